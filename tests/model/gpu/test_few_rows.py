"""Kernels that do several operations at once against PyTorch's one by one, and networks made of them against others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import GPT2LMHeadModel

from model.batch import Batch
from model.config import Activation, read_config
from model.gpt2 import GPT2
from model.gpu import cuda
from model.gpu.ops import HAS_TRITON, GpuOps
from model.kv_cache import KVCache
from model.linear import activate
from model.weights import read_weights

if HAS_TRITON:
    from model.gpu.triton_attention import TritonAttention
    from model.gpu.triton_linear import FEW, few_rows

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="there is no Triton for this system")
DEVICE = torch.device("cuda" if cuda.available() else "cpu")
NOISE = torch.Generator().manual_seed(11)
Made = Callable[..., tuple[Path, GPT2LMHeadModel]]


def noise(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=NOISE).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)  # the interpreter multiplies no bfloat16
@pytest.mark.parametrize(("rows", "width_in", "width_out"), [(1, 48, 80), (5, 200, 50), (17, 130, 64), (32, 768, 33)])
@pytest.mark.parametrize("activation", [None, *Activation])
@pytest.mark.parametrize("normed", [False, True])
def test_one_kernel_does_what_several_do(
    rows: int, width_in: int, width_out: int, dtype: torch.dtype, activation: Activation | None, normed: bool
) -> None:
    x, weight = noise(rows, width_in, dtype=dtype), noise(width_out, width_in, dtype=dtype) / width_in**0.5
    bias, gain, shift = (noise(size, dtype=dtype) for size in (width_out, width_in, width_in))
    residual = noise(rows, width_out, dtype=dtype) if activation is None else None
    norm = (gain, shift, 1e-5) if normed else None
    found = few_rows(x, weight, bias, norm=norm, activation=activation, residual=residual)
    if normed:
        x = functional.layer_norm(x.float(), (width_in,), gain.float(), shift.float(), 1e-5).to(dtype)
    expected = functional.linear(x.double(), weight.double(), bias.double())
    if activation is not None:
        expected = activate(expected, activation)
    if residual is not None:
        expected = expected + residual
    exact = dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=2e-5 if exact else 1e-2, rtol=1e-5 if exact else 2e-3)


def network_of(directory: Path) -> GPT2:
    config = read_config(directory)
    ops = GpuOps(DEVICE, torch.float32, TritonAttention(deterministic=False), deterministic=False)
    with torch.inference_mode():
        return GPT2(config, read_weights(directory, config), ops)


def step(tokens: list[list[int]], start: int, *, decodes: bool) -> Batch:
    """Tokens from `start` of some sequences, each with two blocks of 16 of its own."""
    count, sequences = len(tokens[0]), len(tokens)
    positions = torch.arange(start, start + count).repeat(sequences)
    tables = torch.arange(2 * sequences).view(sequences, 2).flip(1).contiguous()
    owners = torch.arange(sequences).repeat_interleave(count)
    numbers = {
        "tokens": torch.tensor(tokens).flatten(),
        "positions": positions,
        "slots": tables[owners, positions // 16] * 16 + positions % 16,
        "query_starts": torch.arange(sequences + 1) * count,
        "contexts": torch.full((sequences,), start + count),
        "block_tables": tables,
    }
    spans = () if decodes else ((count, start + count),) * sequences
    return Batch(**{name: each.int().to(DEVICE) for name, each in numbers.items()}, spans=spans)


@torch.inference_mode()
@pytest.mark.parametrize("sequences", [1, 3])
def test_a_network_of_few_rows_says_what_transformers_says(make_checkpoint: Made, sequences: int) -> None:
    directory, theirs = make_checkpoint()
    network = network_of(directory)
    cache = KVCache(network.config, 2 * sequences, 16, torch.float32, DEVICE)
    tokens = torch.randint(0, network.config.vocab_size, (sequences, 20), generator=NOISE)
    expected = theirs(tokens).logits
    network.forward(step(tokens[:, :14].tolist(), 0, decodes=False), cache)
    for at in range(14, 20):  # across the end of a block
        hidden = network.forward(step(tokens[:, at : at + 1].tolist(), at, decodes=True), cache)
        torch.testing.assert_close(network.logits(hidden).cpu(), expected[:, at], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_a_step_of_more_rows_takes_the_way_of_one_layer_after_the_other(
    make_checkpoint: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, theirs = make_checkpoint()
    network = network_of(directory)
    monkeypatch.setattr("model.gpu.few_rows.few_rows", lambda *_, **__: pytest.fail("too many rows"))
    sequences = FEW + 1
    cache = KVCache(network.config, 2 * sequences, 16, torch.float32, DEVICE)
    tokens = torch.randint(0, network.config.vocab_size, (sequences, 3), generator=NOISE)
    network.forward(step(tokens[:, :2].tolist(), 0, decodes=False), cache)
    hidden = network.forward(step(tokens[:, 2:].tolist(), 2, decodes=True), cache)
    torch.testing.assert_close(network.logits(hidden).cpu(), theirs(tokens).logits[:, 2], atol=1e-4, rtol=1e-4)
