"""The C sampler against the definition in model/picking.py and model/logits.py: the same token for any request."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import load_or_skip
from torch import Tensor

from model import picking
from model.dry import DryParams
from model.kernels.library import Kernels
from model.kernels.sampling import Sampler
from model.request_tables import make_tables
from model.rng import uniforms
from model.sampling import choose
from model.sampling_params import SamplingParams
from model.sampling_row import SamplingRow

F32 = npt.NDArray[np.float32]
FUSED = ["avx2", "avx512", "vnni"]  # levels that have fused multiply-adds in vectors
ENDS = (0,)


def fused(a: F32 | float, b: F32, c: F32 | float) -> F32:
    """a * b + c, rounded once: the product of two float32 is exact in float64."""
    exact = np.asarray(a, np.float64) * np.asarray(b, np.float64) + np.asarray(c, np.float64)
    return exact.astype(np.float32)


def exp_of_the_kernels(tempered: Tensor) -> Tensor:
    """vectors.h's exponential function, operation by operation."""
    f32 = np.float32
    x = np.minimum(np.maximum(tempered.numpy(), f32(-87)), f32(88))
    magic = f32(1.5 * 2**23)
    shifted = fused(f32(1.44269504), x, magic)
    n = shifted - magic
    r = fused(f32(-0.693359375), n, x)
    r = fused(f32(2.12194440e-4), n, r)
    p = np.full_like(x, 1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = fused(p, r, f32(c))
    y = fused(p, r * r, r) + f32(1)
    bits = y.view(np.int32).astype(np.int64) + (shifted.view(np.int32).astype(np.int64) << 23)
    return torch.from_numpy(bits.astype(np.int32).view(np.float32))


@pytest.fixture(params=FUSED)
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    kernels = load_or_skip(request.param, threads=2)
    yield kernels
    kernels.set_threads(1)


@pytest.fixture
def same_exp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picking, "weigh", exp_of_the_kernels)


def make_row(vocab: int, known: list[int], prompt: int, uniform: float, coin: float, **params: Any) -> SamplingRow:
    grammar = params.pop("grammar_bits", None)
    return SamplingRow(
        tables=make_tables(SamplingParams(**{"seed": 0, **params}), vocab, ENDS),
        uniform=uniform,
        coin=coin,
        known=np.array(known, dtype=np.int64),
        prompt_length=prompt,
        grammar=grammar,
    )


UNIFORM = st.integers(0, 2**32 - 1).map(lambda word: word * 2.0**-32)
FILTERS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.01, 0.3, 0.8, 1.0, 1.7, 50.0]),
        "top_k": st.sampled_from([1, 2, 3, 7, 40, 300, 5000]),
        "top_p": st.sampled_from([0.0, 1e-6, 0.1, 0.5, 0.9, 0.95, 0.999999]),
        "min_p": st.sampled_from([1e-6, 0.01, 0.05, 0.5, 1.0]),
        "typical_p": st.sampled_from([0.01, 0.3, 0.9, 0.999]),
        "min_p_last": st.booleans(),
        "temperature_last": st.booleans(),
        "xtc_probability": st.sampled_from([0.5, 1.0]),
        "xtc_threshold": st.sampled_from([0.0, 0.001, 0.1, 0.5, 0.7]),
    },
)


@st.composite
def adjustments(draw: st.DrawFn, vocab: int) -> dict[str, Any]:
    token = st.integers(0, vocab - 1)
    some = st.lists(token, min_size=1, max_size=12, unique=True).map(lambda ids: tuple(sorted(ids)))
    words = st.lists(st.lists(token, min_size=1, max_size=3).map(tuple), max_size=6).map(tuple)
    bits = st.lists(token, min_size=1, max_size=40, unique=True)
    dry = st.builds(
        DryParams,
        multiplier=st.sampled_from([0.5, 3.0]),
        base=st.sampled_from([1.0, 1.75, 3.0]),
        allowed_length=st.integers(1, 3),
        last_n=st.sampled_from([None, 0, 1, 5, 100]),
        breakers=st.lists(st.tuples(some, st.lists(token, max_size=2).map(tuple)), max_size=4).map(tuple),
    )
    fields = {
        "logit_bias": some.flatmap(
            lambda ids: st.tuples(*[st.tuples(st.just(i), st.sampled_from([-100.0, -5.0, 0.5, 30.0])) for i in ids])
        ),
        "allowed_token_ids": some,
        "bad_words": words,
        "min_tokens": st.integers(1, 8),
        "stop_token_ids": some,
        "presence_penalty": st.sampled_from([-2.0, 0.5]),
        "frequency_penalty": st.sampled_from([-0.5, 0.7]),
        "repetition_penalty": st.sampled_from([0.5, 1.3]),
        "repetition_penalty_range": st.sampled_from([0, 1, 4, 100]),
        "dry": dry,
        "grammar_bits": bits.map(lambda ids: pack(ids, vocab)),
    }
    return draw(st.fixed_dictionaries({}, optional=fields))


def pack(ids: list[int], vocab: int) -> npt.NDArray[np.uint32]:
    words = np.zeros(-(-vocab // 32), dtype=np.uint32)
    for token in ids:
        words[token // 32] |= np.uint32(1 << token % 32)
    return words


@st.composite
def steps(draw: st.DrawFn) -> tuple[Tensor, list[SamplingRow]]:
    """Rows of one step. Some logits are equal to others, some are minus infinity."""
    vocab = draw(st.sampled_from([1, 2, 5, 15, 16, 17, 127, 128, 129, 503, 3000, 50257]))
    numbers = np.random.default_rng(draw(st.integers(0, 2**20)))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        tokens = draw(st.lists(st.integers(0, min(vocab, 4) - 1), min_size=1, max_size=30))
        prompt = draw(st.integers(1, len(tokens)))
        asked = {**draw(FILTERS), **(draw(adjustments(vocab)) if draw(st.booleans()) else {})}
        rows.append(make_row(vocab, tokens, prompt, draw(UNIFORM), draw(st.sampled_from([0.2, 0.7])), **asked))
    logits = numbers.normal(0, draw(st.sampled_from([0.0, 0.5, 4.0])), (len(rows), vocab)).astype(np.float32)
    if draw(st.booleans()):
        logits = np.round(logits)
    if all(row.grammar is None for row in rows) and draw(st.booleans()):
        logits[numbers.random(logits.shape) < 0.3] = -np.inf
        logits[:, 0] = 0
    return torch.from_numpy(logits), rows


@pytest.mark.usefixtures("same_exp")
@settings(max_examples=400, deadline=None)
@given(steps())
def test_the_same_tokens_as_by_the_definition(step: tuple[Tensor, list[SamplingRow]]) -> None:
    logits, rows = step
    before = logits.clone()
    expected = choose(logits, rows)
    for level in FUSED:
        try:
            sampler = Sampler(load_or_skip(level, threads=2))
        except pytest.skip.Exception:
            continue
        assert sampler(logits, rows) == expected, level
    assert torch.equal(logits, before)


SAMPLERS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 12},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.05},
    "typical_p": {"typical_p": 0.7},
    "xtc": {"xtc_probability": 1.0, "xtc_threshold": 0.08},
    "repetition": {"repetition_penalty": 1.4},
}
PAIRS = list(combinations_with_replacement(SAMPLERS, 2))


def probabilities(logits: F32, known: list[int], fields: dict[str, Any]) -> npt.NDArray[np.float64]:
    """The distribution by the papers' formulas, in float64, written without a look at the code."""
    x = logits.astype(np.float64)
    for token in set(known) if "repetition_penalty" in fields else ():
        x[token] = x[token] / fields["repetition_penalty"] if x[token] > 0 else x[token] * fields["repetition_penalty"]
    p = np.exp((x - x.max()) / fields.get("temperature", 1.0))
    p[p < fields.get("min_p", 0.0) * p.max()] = 0
    p[np.argsort(-p)[fields.get("top_k", len(p)) :]] = 0
    p /= p.sum()
    order = np.argsort(-p)
    p[order[1:][np.cumsum(p[order])[:-1] >= fields.get("top_p", 2.0)]] = 0
    p /= p.sum()
    if "typical_p" in fields:
        surprise = np.where(p > 0, -np.log(np.maximum(p, 1e-300)), np.inf)
        order = np.argsort(np.abs(surprise - (p * np.where(p > 0, surprise, 0)).sum()))
        p[order[1:][np.cumsum(p[order])[:-1] >= fields["typical_p"]]] = 0
        p /= p.sum()
    if "xtc_threshold" in fields:
        top = np.flatnonzero(p >= fields["xtc_threshold"])
        p[top[top != min(top, key=lambda token: p[token], default=-1)]] = 0
    return p / p.sum()


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_twenty_thousand_draws_have_the_distribution_of_the_formulas(pair: tuple[str, str]) -> None:
    """Chi-square, tokens of fewer than five expected draws taken together; a seed that is never drawn again."""
    sampler, draws, known = Sampler(load_or_skip(None, threads=2)), 20_000, [0, 3, 3, 9]
    logits = np.random.default_rng(len("".join(pair))).normal(0, 2, 60).astype(np.float32)
    fields = {**SAMPLERS[pair[0]], **SAMPLERS[pair[1]]}
    rows = [make_row(60, known, 1, u, 0.0, **fields) for u in uniforms(seed=5, choice=1, start=0, count=draws).tolist()]
    tokens = sampler(torch.from_numpy(np.tile(logits, (draws, 1))), rows)
    counts, expected = np.bincount(np.array(tokens), minlength=60), draws * probabilities(logits, known, fields)
    assert not counts[expected == 0].any()
    rare = expected < 5
    seen = np.append(counts[~rare], counts[rare].sum())
    awaited = np.append(expected[~rare], expected[rare].sum())
    square = ((seen - awaited) ** 2 / np.maximum(awaited, 1)).sum()
    freedom = len(seen) - 1
    assert square < freedom + 5 * (2 * freedom) ** 0.5 + 5  # more than five standard deviations: about one in 10^6
