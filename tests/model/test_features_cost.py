"""No sampling field takes the fast path away: CPU time a token with it, beside the same streams without it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import model
from benchmarks.features import FEATURES, Bench
from model.kernels.ops import KernelOps
from model.loading import load_model
from model.tokenizer import read_tokenizer

BOUND = 1.6  # times the CPU time of plain sampling. Sorting the vocabulary once a row would be over 5.


@pytest.fixture(scope="module")
def bench() -> Bench:
    directory = Path(model.__file__).parent / "default"
    torch.set_num_threads(1)
    network, ops = load_model(directory, torch.device("cpu"), torch.float32, quantization="int8")
    if not isinstance(ops, KernelOps):
        pytest.skip("the C kernels were not built")
    tokenizer = read_tokenizer(directory, network.config.vocab_size, network.config.eos_token_ids)
    return Bench(network, ops.kv_dtypes[0], tokenizer, rounds=3, tokens=6)


@pytest.mark.parametrize("name", FEATURES)
def test_a_field_costs_a_bounded_share_of_a_token(bench: Bench, name: str) -> None:
    cost = bench.cost(name, FEATURES[name], streams=16)
    assert cost.with_ < BOUND * cost.without
