"""What the drafters guess, by itself. That no guess changes an answer is in test_same_bytes."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from model.speculative import NGRAMS, NgramIndex


def naive(tokens: list[int], count: int) -> list[int]:
    """The continuation of the latest earlier place where the last few tokens stood, for the longest few there is."""
    for n in NGRAMS:
        for end in range(len(tokens) - 1, n - 1, -1):
            if len(tokens) > n and tokens[end - n : end] == tokens[-n:]:
                period = tokens[end:]
                return [period[i % len(period)] for i in range(count)]
    return []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 9), st.lists(st.integers(1, 20)))
def test_the_index_finds_what_a_search_finds(tokens: list[int], count: int, steps: list[int]) -> None:
    """However the text has grown before it is asked."""
    index, known = NgramIndex(), 0
    for step in [*steps, len(tokens)]:
        known = min(known + step, len(tokens))
        assert index.continuation(np.array(tokens[:known]), count) == naive(tokens[:known], count)


def test_text_that_repeats_itself_goes_round() -> None:
    assert NgramIndex().continuation(np.array([7, 8, 9, 7, 8, 9, 7]), 7) == [8, 9, 7, 8, 9, 7, 8]


def test_of_text_that_never_repeats_there_is_no_guess() -> None:
    assert NgramIndex().continuation(np.arange(50), 5) == []
