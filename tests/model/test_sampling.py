"""Each rule against a formula written another way: numpy for the distributions, transformers for the processors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model.dry import DryParams
from model.logits import adjust
from model.request_tables import make_tables
from model.sampling import sample, token_logprobs
from model.sampling_params import SamplingParams
from model.sampling_row import SamplingRow

VOCAB = 1000
EOS = 999
OTHER_END = 21


def row(
    uniform: float = 0.0, prompt: list[int] | None = None, output: list[int] | None = None, **params: Any
) -> SamplingRow:
    return SamplingRow(
        tables=make_tables(SamplingParams(**{"seed": 0, **params}), VOCAB, (EOS, OTHER_END)),
        uniform=uniform,
        coin=0.0,
        known=np.array([*(prompt or []), *(output or [])], dtype=np.int64),
        prompt_length=len(prompt or []),
        grammar=None,
    )


def logits(rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def distribution(values: Tensor, steps: int = 20_000, **params: Any) -> np.ndarray:
    """How often each token is picked as the uniform number walks evenly over [0, 1)."""
    chunk = 2_000
    counts = np.zeros(VOCAB)
    for start in range(0, steps, chunk):
        rows = [row((i + 0.5) / steps, **params) for i in range(start, start + chunk)]
        tokens, _ = sample(values.expand(chunk, -1), rows)
        counts += np.bincount(tokens, minlength=VOCAB)
    return counts / steps


def warped(values: Tensor, *processors: LogitsProcessor, ids: list[int] | None = None) -> np.ndarray:
    scores = values.clone()
    for processor in processors:
        scores = processor(torch.tensor([ids or [0]]), scores)
    expected: np.ndarray = scores.softmax(-1)[0].numpy()
    return expected


@pytest.mark.parametrize(
    ("params", "processors"),
    [
        ({}, []),
        ({"temperature": 0.5}, [TemperatureLogitsWarper(0.5)]),
        ({"temperature": 2.0}, [TemperatureLogitsWarper(2.0)]),
        ({"top_k": 5}, [TopKLogitsWarper(5)]),
        ({"top_k": 400}, [TopKLogitsWarper(400)]),  # more than the head: the whole sort
        ({"top_p": 0.5}, [TopPLogitsWarper(0.5)]),
        ({"top_p": 0.999}, [TopPLogitsWarper(0.999)]),
        ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        ({"min_p": 1e-4, "temperature": 1.5}, [TemperatureLogitsWarper(1.5), MinPLogitsWarper(1e-4)]),
        ({"top_k": 20, "top_p": 0.7}, [TopKLogitsWarper(20), TopPLogitsWarper(0.7)]),
        ({"top_k": 500, "top_p": 0.99}, [TopKLogitsWarper(500), TopPLogitsWarper(0.99)]),
        (
            {"temperature": 0.8, "min_p": 0.02, "top_k": 50, "top_p": 0.9},
            [TemperatureLogitsWarper(0.8), MinPLogitsWarper(0.02), TopKLogitsWarper(50), TopPLogitsWarper(0.9)],
        ),
    ],
    ids=str,
)
def test_the_distribution_is_the_one_transformers_makes(
    params: dict[str, Any], processors: list[LogitsProcessor]
) -> None:
    values = logits()
    # An even walk over 20,000 numbers gives each token its probability to within one step at each end.
    np.testing.assert_allclose(distribution(values, **params), warped(values, *processors), atol=1.5e-4)


def test_repetition_penalty_counts_prompt_and_output() -> None:
    values = logits()
    expected = warped(values, RepetitionPenaltyLogitsProcessor(1.7), ids=[1, 2, 3, 3])
    got = distribution(values, prompt=[1, 2], output=[3, 3], repetition_penalty=1.7)
    np.testing.assert_allclose(got, expected, atol=1.5e-4)


@pytest.mark.parametrize("last", [1, 3, 5, 100])
def test_a_range_lets_the_penalties_see_the_latest_tokens_alone(last: int) -> None:
    values, prompt, output = logits(), [5, 7, 7, 9], [3, 5, 3]
    for fields in ({"repetition_penalty": 1.3}, {"presence_penalty": 0.5, "frequency_penalty": 0.7}):
        seen = [*prompt, *output][-last:]
        short = row(prompt=seen[: max(0, len(seen) - 3)], output=output[-last:], **fields)
        ranged = row(prompt=prompt, output=output, repetition_penalty_range=last, **fields)
        assert torch.equal(adjust(values, [ranged]), adjust(values, [short]))


@pytest.mark.parametrize("params", [
    {"temperature": 0.5, "top_p": 0.8}, {"temperature": 1.7, "min_p": 0.1, "top_p": 0.9},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9}, {"temperature": 2.0, "top_k": 4}, {"temperature": 0.7},
])  # fmt: skip
def test_the_temperature_comes_last_where_it_is_asked_to(params: dict[str, Any]) -> None:
    values = logits()
    processors: list[LogitsProcessor] = []
    if "min_p" in params:
        processors.append(MinPLogitsWarper(params["min_p"]))
    if "top_k" in params:
        processors.append(TopKLogitsWarper(params["top_k"]))
    if "top_p" in params:
        processors.append(TopPLogitsWarper(params["top_p"]))
    expected = warped(values, *processors, TemperatureLogitsWarper(params["temperature"]))
    got = distribution(values, 4_000, temperature_last=True, **params)
    np.testing.assert_allclose(got, expected, atol=6e-4)


@pytest.mark.parametrize("top_k", [None, 30, 400])
def test_min_p_comes_after_top_p_where_it_is_asked_to(top_k: int | None) -> None:
    values = logits(seed=3) / 2
    before = [] if top_k is None else [TopKLogitsWarper(top_k)]
    expected = warped(values, *before, TopPLogitsWarper(0.6), MinPLogitsWarper(0.25))
    assert (expected > 0).sum() < (warped(values, *before, TopPLogitsWarper(0.6)) > 0).sum()
    got = distribution(values, 4_000, top_k=top_k, top_p=0.6, min_p=0.25, min_p_last=True)
    np.testing.assert_allclose(got, expected, atol=6e-4)


def test_the_named_tokens_are_scored_in_place_of_the_likeliest() -> None:
    values = logits()
    _, (scored,) = sample(values, [row(0.5, logprobs=3, logprob_token_ids=(7, 400))])
    assert scored is not None
    raw = values[0].log_softmax(-1)
    assert [token for token, _ in scored.top] == [7, 400]
    assert [value for _, value in scored.top] == pytest.approx([raw[7].item(), raw[400].item()], abs=1e-5)


def test_presence_and_frequency_penalties_follow_openais_formula() -> None:
    """mu[j] -= c[j] * frequency + (c[j] > 0) * presence, c counted over generated tokens."""
    values = logits()
    output = [5, 5, 5, 9]
    expected = values[0].numpy().copy()
    for j in range(VOCAB):
        c = output.count(j)
        expected[j] -= c * 0.6 + (c > 0) * 0.4
    expected = np.exp(expected) / np.exp(expected).sum()
    got = distribution(values, prompt=[7, 7], output=output, presence_penalty=0.4, frequency_penalty=0.6)
    np.testing.assert_allclose(got, expected, atol=1.5e-4)


def test_negative_penalties_reward() -> None:
    values = torch.zeros(1, VOCAB)
    values[0, 3] = -1.0
    assert sample(values, [row(output=[3], presence_penalty=-2.0, temperature=0.0)])[0] == [3]


def test_bias_moves_and_minus_hundred_bans_even_the_argmax() -> None:
    values = logits()
    best, second = values[0].topk(2).indices.tolist()
    assert sample(values, [row(temperature=0.0)])[0] == [best]
    assert sample(values, [row(temperature=0.0, logit_bias=((best, -100.0),))])[0] == [second]
    assert sample(values, [row(temperature=0.0, logit_bias=((42, 100.0),))])[0] == [42]
    expected = values[0].double().numpy()
    expected[7] += 2.5
    expected = np.exp(expected) / np.exp(expected).sum()
    np.testing.assert_allclose(distribution(values, logit_bias=((7, 2.5),)), expected, atol=1.5e-4)


def test_only_allowed_tokens_are_picked() -> None:
    got = distribution(logits(), allowed_token_ids=(3, 4, 5))
    assert set(np.flatnonzero(got)) == {3, 4, 5}


def test_min_tokens_holds_back_every_end() -> None:
    values = torch.zeros(1, VOCAB)
    values[0, EOS], values[0, OTHER_END], values[0, 8], values[0, 20] = 9.0, 8.5, 8.0, 7.0
    early = row(temperature=0.0, min_tokens=2, stop_token_ids=(8,), output=[1])
    late = row(temperature=0.0, min_tokens=2, stop_token_ids=(8,), output=[1, 2])
    assert sample(values, [early])[0] == [20]
    assert sample(values, [late])[0] == [EOS]


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 1e-6}, {"top_p": 0.0}, {"top_k": 1}])
def test_greedy_in_all_its_forms(params: dict[str, Any]) -> None:
    values = logits(4)
    tokens, _ = sample(values, [row(0.999, **params)] * 4)
    assert tokens == values.argmax(-1).tolist()


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-32])
def test_the_ends_of_the_unit_interval_pick_possible_tokens(uniform: float) -> None:
    values = logits()
    values[0, 0] = values[0, -1] = -torch.inf
    for params in ({}, {"top_p": 0.9}, {"temperature": 0.01}):
        (token,), _ = sample(values, [row(uniform, **params)])
        assert torch.isfinite(values[0, token])


MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"top_p": 0.9},
    {"top_k": 7, "logprobs": 3},
    {"temperature": 1.7, "logprobs": 0},
    {"min_p": 0.05, "presence_penalty": 1.0, "output": [1, 2, 3]},
    {"logit_bias": ((5, 4.0),), "temperature": 0.3},
    {"repetition_penalty": 1.3, "prompt": [4, 4, 9], "logprobs": 5},
    {"typical_p": 0.6, "xtc_probability": 1.0, "xtc_threshold": 0.05},
    {"bad_words": ((3, 7), (9,)), "output": [1, 3], "dry": DryParams(multiplier=0.8, allowed_length=1)},
]


def test_a_row_is_decided_by_itself_alone() -> None:
    """The same token and the same float log-probabilities alone, and among any neighbours in any order."""
    values = logits(len(MIXED), seed=3)
    rows = [row(0.37 + 0.05 * i, **params) for i, params in enumerate(MIXED)]
    alone = [sample(values[i : i + 1], [each]) for i, each in enumerate(rows)]
    for order in (list(range(10)), [7, 3, 9, 1, 0, 2, 6, 8, 5, 4], [4, 8, 4, 3, 1, 1, 9, 1, 7]):
        tokens, scores = sample(values[order], [rows[i] for i in order])
        assert tokens == [alone[i][0][0] for i in order]
        assert scores == [alone[i][1][0] for i in order]


def test_logprobs_are_those_of_the_raw_logits() -> None:
    values = logits()
    expected = values[0].double().log_softmax(-1)
    tokens, (score,) = sample(values, [row(0.5, temperature=0.2, logit_bias=((3, 50.0),), logprobs=4)])
    assert tokens == [3]
    assert score is not None
    assert score.logprob == pytest.approx(expected[3].item(), abs=1e-5)
    top = expected.topk(4)
    assert [id_ for id_, _ in score.top] == top.indices.tolist()
    assert [value for _, value in score.top] == pytest.approx(top.values.tolist(), abs=1e-5)


def test_the_logits_handed_in_stay_as_they_were() -> None:
    values = logits(2)
    before = values.clone()
    sample(values, [row(logit_bias=((3, 50.0),)), row(temperature=0.0, min_tokens=3)])
    assert torch.equal(values, before)


def test_ranks_count_the_likelier_tokens() -> None:
    values = logits(rows=6, seed=9)
    values[:, 500:] = values[:, :500]  # each value twice: of two alike, neither is likelier
    tokens = torch.randint(0, VOCAB, (6,), generator=torch.Generator().manual_seed(1))
    scores = token_logprobs(values, tokens, [0, 1, 5, 20, 0, 3])
    raw = values.numpy()
    assert [score.rank for score in scores] == [
        1 + int((raw[i] > raw[i, token]).sum()) for i, token in enumerate(tokens.tolist())
    ]
