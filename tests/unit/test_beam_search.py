"""The search against the definition: with a beam for everything, it finds the best of all sequences there are."""

from __future__ import annotations

import math
import random
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.step import TokenLogprobs
from server.engine.beam import Beam, BeamSearch
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


def naive_advance(search: BeamSearch, scores: list[TokenLogprobs]) -> tuple[list[Beam], list[tuple[float, Beam]]]:
    """The running and the finished beams after a step, of all continuations sorted."""
    length = len(search.running[0].tokens) + 1
    candidates = [
        beam.extended(token, logprob, row.top[: search.shown])
        for beam, row in zip(search.running, scores, strict=True)
        for token, logprob in row.top
        if token not in search.ends or len(beam.tokens) >= search.min_tokens
    ]
    candidates.sort(key=lambda beam: -beam.logprob)
    finished = [
        (beam.logprob / length**search.params.length_penalty, beam)
        for beam in candidates[: search.width]
        if beam.tokens[-1] in search.ends or length == search.max_tokens
    ]
    both = sorted([*search.finished, *finished], key=lambda scored: -scored[0])
    return [beam for beam in candidates if beam.tokens[-1] not in search.ends][: search.width], both[: search.width]


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_step_is_that_of_sorting_all_continuations(data: st.DataObject) -> None:
    """Equal scores too: which of equals goes on decides every byte after it."""
    ends = data.draw(st.frozensets(st.integers(0, 9), max_size=4))
    search = BeamSearch(
        width=data.draw(st.integers(1, 6)),
        max_tokens=4,
        min_tokens=data.draw(st.integers(0, 3)),
        ends=ends,
        params=BeamParams(length_penalty=data.draw(st.sampled_from([0.0, 1.0, -1.0]))),
        shown=data.draw(st.integers(0, 3)),
    )
    likely = st.sampled_from([-0.5, -1.0, -1.5, -2.0, -math.inf])
    while not search.done:
        rows = []
        for _ in search.running:
            tokens = data.draw(st.permutations(range(10)))[: search.top]
            logprobs = sorted((data.draw(likely) for _ in tokens), reverse=True)
            rows.append(TokenLogprobs(logprobs[0], list(zip(tokens, logprobs, strict=True))))
        running, finished = naive_advance(search, rows)
        search.advance(rows)
        assert (search.running, search.finished) == (running, finished)


@pytest.mark.parametrize("seed", range(5))
def test_nothing_ends_before_min_tokens(seed: int) -> None:
    found = run(make(3, 6, min_tokens=4), seed)
    assert len(found.finished) == 3
    assert all(len(beam.tokens) > 4 or beam.tokens[-1] != END for _, beam in found.finished)
