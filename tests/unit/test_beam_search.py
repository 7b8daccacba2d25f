"""The search against the definition: with a beam for everything, it finds the best of all sequences there are."""

from __future__ import annotations

import math
import random
from itertools import product

import pytest

from model.step import TokenLogprobs
from server.engine.beam import BeamSearch
from server.engine.request import BeamParams, EarlyStopping

VOCAB, END = 4, 3


def scores_after(tokens: tuple[int, ...], seed: int) -> list[float]:
    """A made-up model: log-probabilities of what follows, a function of all that came before."""
    chance = random.Random(f"{seed} {tokens}")
    weights = [chance.random() ** 2 + 0.01 for _ in range(VOCAB)]
    return [math.log(weight / sum(weights)) for weight in weights]


def run(search: BeamSearch, seed: int) -> BeamSearch:
    while not search.done:
        rows = []
        for beam in search.running:
            scores = scores_after(beam.tokens, seed)
            top = sorted(enumerate(scores), key=lambda pair: -pair[1])[: search.top]
            rows.append(TokenLogprobs(top[0][1], top))
        search.advance(rows)
    return search


def make(width: int, max_tokens: int, min_tokens: int = 0, **params: object) -> BeamSearch:
    beam = BeamParams(**params)  # type: ignore[arg-type]
    return BeamSearch(width=width, max_tokens=max_tokens, min_tokens=min_tokens, ends=frozenset({END}), params=beam)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0, -1.0])
def test_wide_enough_it_is_exhaustive(seed: int, penalty: float) -> None:
    longest = 4
    found = run(make(200, longest, length_penalty=penalty, early_stopping=EarlyStopping.NEVER), seed)
    best = -math.inf
    for length in range(1, longest + 1):
        for tokens in product(range(VOCAB), repeat=length):
            if END in tokens[:-1] or (length < longest and tokens[-1] != END):
                continue
            total = sum(scores_after(tokens[:i], seed)[token] for i, token in enumerate(tokens))
            best = max(best, total / length**penalty)
    score, beam = found.finished[0]
    assert score == pytest.approx(best)
    assert beam.logprob == pytest.approx(sum(row.logprob for row in beam.rows))
    assert [scored for scored, _ in found.finished] == sorted((s for s, _ in found.finished), reverse=True)


def test_one_beam_is_greedy() -> None:
    tokens: tuple[int, ...] = ()
    while len(tokens) < 6 and (not tokens or tokens[-1] != END):
        scores = scores_after(tokens, 1)
        tokens = (*tokens, scores.index(max(scores)))
    assert run(make(1, 6, early_stopping=EarlyStopping.YES), 1).finished[0][1].tokens == tokens


@pytest.mark.parametrize("seed", range(5))
def test_nothing_ends_before_min_tokens(seed: int) -> None:
    found = run(make(3, 6, min_tokens=4), seed)
    assert len(found.finished) == 3
    assert all(len(beam.tokens) > 4 or beam.tokens[-1] != END for _, beam in found.finished)
