"""The batched sampler against picking.py, which decides one row at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from standin import StandIn
from torch import Tensor

from model.dry import DryParams
from model.gpu import cuda, ops, sampling
from model.gpu.sampling import Sampler, on_device
from model.picking import pick
from model.request_tables import make_tables
from model.sampling_params import SamplingParams
from model.sampling_row import SamplingRow

VOCAB, TILE = 700, 4096  # the latter is what the kernel reads at once


@dataclass(frozen=True)
class Draw:
    """What decides one row, beside its logits."""

    params: SamplingParams
    uniform: float


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(seed=1, **fields)


def draws() -> st.SearchStrategy[Draw]:
    made = st.builds(
        params,
        temperature=st.sampled_from([0.0, 0.2, 1.0, 3.0]),
        top_k=st.sampled_from([None, 1, 2, 50, 256, 257, 699]),
        top_p=st.sampled_from([0.0, 0.1, 0.8, 0.999, 1.0]),
        min_p=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    )
    uniform = st.integers(0, 2**32 - 1).map(lambda word: word * 2.0**-32)
    return st.builds(Draw, made, uniform)


def row_of(draw: Draw) -> SamplingRow:
    tables, nothing = make_tables(draw.params, VOCAB, (0,)), np.zeros(0, dtype=np.int64)
    return SamplingRow(tables=tables, uniform=draw.uniform, coin=0.0, known=nothing, prompt_length=0, grammar=None)


def refine(logits: Tensor, rows: list[Draw]) -> list[int]:
    """The first row has the last seat."""
    sampler, seats = Sampler(StandIn(), len(rows), VOCAB), np.arange(len(rows))[::-1].copy()
    for seat, row in zip(seats, rows, strict=True):
        sampler.keep(int(seat), row.params)
    assert sampler.drawn(seats) == [i for i, row in enumerate(rows) if not row.params.greedy]
    uniforms = np.array([row.uniform for row in rows])
    tokens: list[int] = sampler.refine(logits, logits.argmax(-1), seats, uniforms).tolist()
    return tokens


@settings(max_examples=300, deadline=None)
@given(st.lists(draws(), min_size=1, max_size=70), st.integers(0, 1000))
def test_a_batch_is_decided_as_its_rows_would_be(rows: list[Draw], seed: int) -> None:
    logits = 4 * torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(seed))
    expected = [pick(logits[i], row_of(row)) for i, row in enumerate(rows)]
    assert refine(logits, rows) == expected


@pytest.mark.skipif(ops.DRAW is None, reason="there is no Triton for this system")
@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.2, 1.0, 3.0]), st.floats(0, 1 - 2**-32)), min_size=1, max_size=6))
def test_one_kernel_draws_where_the_cumulative_distribution_passes_the_number(rows: list[tuple[float, float]]) -> None:
    assert ops.DRAW is not None
    device = torch.device("cuda" if cuda.available() else "cpu")
    logits = 4 * torch.randn(len(rows), 2 * TILE + 9, generator=torch.Generator().manual_seed(len(rows)))
    logits[0, ::3] = -torch.inf
    temperatures, uniforms = torch.tensor(rows, dtype=torch.float64).split(1, dim=1)
    ways = torch.full_like(uniforms, sampling.Way.WHOLE)
    ways[-1] = sampling.Way.GREEDY
    kept = torch.full((len(rows),), 7, dtype=torch.int32)
    parts = (part.contiguous().to(device) for part in (logits, kept, ways, uniforms, temperatures))
    *drawn, last = ops.DRAW(*parts, sampling.Way.WHOLE).tolist()
    assert last == 7
    mass = (logits / temperatures).softmax(dim=-1).cumsum(dim=-1)  # float64, since temperatures are
    for row, token in enumerate(drawn):
        number = uniforms[row, 0].item()
        assert mass[row, token] > number - 1e-6
        assert token == 0 or mass[row, token - 1] < number + 1e-6
        assert logits[row, token] > -torch.inf


def test_a_row_does_not_feel_its_neighbours() -> None:
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(3))
    rows = [Draw(params(top_p=0.9), 0.4), Draw(params(), 0.4), Draw(params(top_k=9), 0.4), Draw(params(top_k=1), 0.4)]
    assert refine(logits, rows) == [refine(logits[i : i + 1], rows[i : i + 1])[0] for i in range(4)]


@pytest.mark.parametrize(
    "fields",
    [
        {"logit_bias": ((5, 1.0),)},
        {"allowed_token_ids": (1, 2)},
        {"bad_words": ((1,),)},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"repetition_penalty": 1.1},
        {"dry": DryParams(multiplier=0.8)},
        {"grammar": "{}"},
        {"min_tokens": 1},
        {"typical_p": 0.9},
        {"xtc_probability": 0.5},
        {"temperature_last": True},
        {"min_p_last": True},
        {"logprob_token_ids": (5,)},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_needs_more_than_numbers_is_left_to_others(fields: dict[str, Any]) -> None:
    assert not on_device(params(**fields))
    assert on_device(params(temperature=0.5, top_k=3, top_p=0.4, min_p=0.1, logprobs=3, stop_token_ids=(4,)))


def test_every_sampling_field_is_either_decided_here_or_known_not_to_matter() -> None:
    """A field that is new to SamplingParams must be thought about here."""
    decided = {"seed", "temperature", "top_k", "top_p", "min_p"}
    elsewhere = {
        "max_tokens",
        "stop_token_ids",
        "ignore_eos",
        "logprobs",
        "prompt_logprobs",
        "pooled",
        "repetition_penalty_range",
    }
    refused = {
        "min_tokens", "typical_p", "xtc_probability", "xtc_threshold", "presence_penalty", "frequency_penalty",
        "repetition_penalty", "logit_bias", "allowed_token_ids", "bad_words", "dry", "grammar",
        "temperature_last", "min_p_last", "logprob_token_ids",
    }  # fmt: skip
    assert set(SamplingParams.__dataclass_fields__) == decided | elsewhere | refused
