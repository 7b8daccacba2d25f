"""bad_words, typical_p, xtc and DRY against other formulas: transformers', numpy's, and the definitions written out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_sampling import EOS, VOCAB, distribution, logits, row, warped
from transformers import (
    NoBadWordsLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from model.dry import DryParams, dry_penalties
from model.logits import adjust
from model.request_tables import make_breakers
from model.rng import uniforms
from model.sampling import sample


@pytest.mark.parametrize("output", [[], [5], [1, 5], [5, 6], [1, 5, 6], [6]])
def test_bad_words_are_banned_as_transformers_does(output: list[int]) -> None:
    words = [[7], [5, 6], [5, 6, 8], [6, 6, 6, 6]]
    values = logits()
    processor = NoBadWordsLogitsProcessor(words, eos_token_id=VOCAB - 1)
    expected = processor(torch.tensor([[0, *output]]), values.clone())
    got = adjust(values, [row(output=output, bad_words=tuple(map(tuple, words)))])
    assert torch.equal(got, expected)


def test_bad_words_look_at_the_output_alone() -> None:
    values = logits()
    got = adjust(values, [row(prompt=[5], output=[], bad_words=((5, 6),))])
    assert torch.equal(got, values)


@pytest.mark.parametrize("mass", [0.05, 0.2, 0.5, 0.9, 0.99])
@pytest.mark.parametrize(
    ("params", "processors"),
    [
        ({}, []),
        ({"temperature": 0.5}, [TemperatureLogitsWarper(0.5)]),
        ({"top_k": 30, "top_p": 0.9}, [TopKLogitsWarper(30), TopPLogitsWarper(0.9)]),
    ],
    ids=str,
)
def test_typical_p_is_the_one_transformers_has(mass: float, params: dict[str, Any], processors: list[Any]) -> None:
    values = logits()
    expected = warped(values, *processors, TypicalLogitsWarper(mass))
    np.testing.assert_allclose(distribution(values, 2_000, typical_p=mass, **params), expected, atol=1.1e-3)


def excluded(values: torch.Tensor, threshold: float) -> np.ndarray:
    """xtc's definition: all tokens that reach the threshold go, but for the least likely of them."""
    probabilities = values[0].double().softmax(-1).numpy()
    above = [token for token in range(VOCAB) if probabilities[token] >= threshold]
    spared = min(above, key=lambda token: probabilities[token], default=None)
    for token in above:
        if token != spared:
            probabilities[token] = 0
    kept: np.ndarray = probabilities / probabilities.sum()
    return kept


@pytest.mark.parametrize("threshold", [0.0, 0.02, 0.1, 0.3, 0.5])
def test_xtc_leaves_the_least_likely_of_the_top_choices(threshold: float) -> None:
    values = logits()
    got = distribution(values, 2_000, xtc_probability=1.0, xtc_threshold=threshold)
    np.testing.assert_allclose(got, excluded(values, threshold), atol=1.1e-3)


def test_xtc_acts_when_its_coin_says_so() -> None:
    values = logits()
    best = int(values.argmax())
    for coin, expected in ((0.29, False), (0.31, True)):
        plain = [row(u, xtc_probability=0.3, xtc_threshold=0.01) for u in np.linspace(0, 0.999, 200)]
        picked, _ = sample(values.expand(200, -1), [replace(each, coin=coin) for each in plain])
        assert (best in picked) is expected
    above_half = row(0.5, xtc_probability=1.0, xtc_threshold=0.6)
    assert sample(values * 9, [above_half])[0] == [best]


def test_what_cannot_be_picked_is_no_top_choice() -> None:
    values = logits()
    values[0, 5:] = -torch.inf
    least = int(values[0, :5].argmin())
    assert sample(values, [replace(row(0.9, xtc_probability=1.0, xtc_threshold=0.0), coin=0.1)])[0] == [least]
    assert sample(values, [row(0.99, typical_p=0.999)])[0][0] < 5


def test_the_coin_is_independent_of_the_number_that_picks() -> None:
    picks, coins = uniforms(5, 0, 0, 20_000), uniforms(5, 0, 0, 20_000, word=1)
    assert abs(np.corrcoef(picks, coins)[0, 1]) < 0.02
    assert abs((coins < 0.3).mean() - 0.3) < 0.01
    assert coins[7] == uniforms(5, 0, 7, 1, word=1)[0]


def naive_dry(tokens: list[int], params: DryParams) -> dict[int, float]:
    """For every token: the longest run that precedes an occurrence of it and also ends the text, cut at a breaker."""
    if params.last_n is not None:
        tokens = tokens[len(tokens) - min(params.last_n, len(tokens)) :]
    reach = len(tokens)
    for after in range(len(tokens)):
        at = len(tokens) - 1 - after
        runs = [(head, *tail) for heads, tail in params.breakers for head in heads]
        matches = [len(run) for run in runs if tuple(tokens[at : at + len(run)]) == run]
        if matches:
            reach = after + 1 - max(matches)
            break
    penalties: dict[int, float] = {}
    for at in range(1, len(tokens)):
        length = 0
        while length < min(at, reach) and tokens[at - 1 - length] == tokens[-1 - length]:
            length += 1
        if length >= params.allowed_length and len(tokens) > params.allowed_length:
            penalty = params.multiplier * params.base ** (length - params.allowed_length)
            penalties[tokens[at]] = max(penalties.get(tokens[at], 0), penalty)
    return penalties


few = st.integers(0, 3)


@given(
    st.lists(few, max_size=40),
    st.builds(
        DryParams,
        multiplier=st.sampled_from([0.5, 2.0]),
        base=st.sampled_from([1.0, 1.75]),
        allowed_length=st.integers(1, 4),
        last_n=st.none() | st.integers(1, 30),
        breakers=st.lists(
            st.tuples(
                st.lists(few, min_size=1, max_size=2, unique=True).map(tuple), st.lists(few, max_size=2).map(tuple)
            ),
            max_size=2,
        ).map(tuple),
    ),
)
def test_dry_is_its_definition(tokens: list[int], params: DryParams) -> None:
    breakers = make_breakers(params.breakers, vocab_size=4)
    assert dry_penalties(tokens, params, breakers.tokens_since) == pytest.approx(naive_dry(tokens, params))


def test_dry_takes_its_penalty_off_the_logits_and_never_overflows() -> None:
    values = logits()
    params = DryParams(multiplier=0.8, base=1.75, allowed_length=2)
    got = adjust(values, [row(prompt=[1, 2, 3, 4, 9], output=[1, 2, 3], dry=params)])
    expected = values.clone()
    expected[0, 4] -= 0.8 * 1.75  # three repeated tokens, two of them free
    torch.testing.assert_close(got, expected)
    flood = adjust(values, [row(output=[5] * 1000, dry=params)])
    assert torch.isfinite(flood).all()
    assert flood[0, 5] < -1e30


def test_the_grammar_overrules_bans_that_leave_nothing() -> None:
    values = logits()
    grammar = np.zeros(-(-VOCAB // 32), dtype=np.uint32)
    grammar[0] = 1 << 3 | 1 << 4

    def picked(**params: Any) -> int | None:
        return sample(values, [replace(row(temperature=0.0, **params), grammar=grammar)])[0][0]

    best = max((3, 4), key=lambda token: float(values[0, token]))
    assert picked() == best
    assert picked(logit_bias=((best, -100.0),)) == 7 - best
    assert picked(logit_bias=((3, -100.0), (4, -100.0), (9, 100.0))) == best
    assert picked(allowed_token_ids=(9,), bad_words=((9,),)) == best


EVERYTHING = [
    {"allowed_token_ids": (3,), "bad_words": ((3,),)},
    {"allowed_token_ids": (3, 4), "logit_bias": ((3, -100.0),), "bad_words": ((9, 4),), "output": [9]},
    {"allowed_token_ids": (EOS, 7), "min_tokens": 2, "stop_token_ids": (7,), "output": [7]},
    {"logit_bias": tuple((token, -100.0) for token in range(VOCAB))},
]


@pytest.mark.parametrize("filters", [
    {}, {"temperature": 0.0}, {"top_p": 0.5}, {"top_k": 300, "min_p": 0.1}, {"typical_p": 0.5, "xtc_probability": 1.0},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("bans", EVERYTHING, ids="+".join)
def test_where_everything_is_banned_no_token_comes(bans: dict[str, Any], filters: dict[str, Any]) -> None:
    """Nor does the row disturb its neighbours; and it has no scores."""
    values = logits(3)
    rows = [row(0.5), row(0.5, logprobs=2, **bans, **filters), row(0.5, temperature=0.0)]
    tokens, scores = sample(values, rows)
    assert (tokens[1], scores[1]) == (None, None)
    assert tokens[::2] == [sample(values[i : i + 1], [rows[i]])[0][0] for i in (0, 2)]


@pytest.mark.parametrize("bans", EVERYTHING[:3], ids="+".join)
def test_what_is_banned_now_may_be_said_later(bans: dict[str, Any]) -> None:
    """It is this row's own bans that leave nothing, with this output."""
    freed = {**bans, "bad_words": (), "output": [1, 2, 5]}
    (token,), _ = sample(logits(), [row(0.5, **freed)])
    assert token in bans["allowed_token_ids"]
