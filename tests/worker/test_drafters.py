"""What the drafters guess, by itself. That no guess changes an answer is in test_same_bytes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from stepping import CPU, load

from model.gpt2 import UNLIKELY
from model.kv_cache import KVCache
from model.loading import load_model
from model.row import Row
from model.runner import Runner
from model.sampling_params import SamplingParams
from model.speculative import NGRAMS, NgramIndex, PromptLookup
from model.step import NewSequence, ScheduledChunk, StepPlan


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


class Slow(PromptLookup):
    def draft(self, chunks: list[ScheduledChunk], rows: Mapping[int, Row]) -> list[list[int]]:
        time.sleep(0.05)
        return super().draft(chunks, rows)


def test_a_step_says_how_long_its_guesses_took(tiny: Path) -> None:
    """What verifying them costs is something else, and both decide how many pay."""
    network = load(tiny)
    cache = KVCache(network.config, 2, 16, torch.float32, CPU)
    runner = Runner(network, cache, CPU, 32, drafter=Slow())
    chunk = ScheduledChunk(id=1, start=0, count=6, first_block=0, blocks=[0], samples=True, drafts=3)
    began = time.perf_counter()
    result = runner.run(StepPlan([], [NewSequence(1, [1, 2, 3, 1, 2, 3], [], SamplingParams(seed=0))], [chunk]))
    assert 0.05 <= result.drafting < time.perf_counter() - began
    assert result.drafted == {1: 3}


@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_a_short_head_knows_the_first_tokens_alone(tiny: Path, kernels: str) -> None:
    whole = load(tiny, kernels)
    short, _ = load_model(tiny, CPU, torch.float32, kernels, head_tokens=300)
    hidden = torch.randn(3, whole.config.n_embd)
    expected, got = whole.logits(hidden), short.logits(hidden)
    assert got.shape == expected.shape
    torch.testing.assert_close(got[:, :300], expected[:, :300], rtol=0, atol=1e-5)
    assert bool((got[:, 300:] == UNLIKELY).all())
    assert whole.parameters_read - short.parameters_read == (whole.config.vocab_size - 300) * whole.config.n_embd


def test_a_head_longer_than_the_vocabulary_is_whole(tiny: Path) -> None:
    whole = load(tiny)
    long, _ = load_model(tiny, CPU, torch.float32, head_tokens=whole.config.vocab_size + 1)
    hidden = torch.randn(3, whole.config.n_embd)
    assert long.logits(hidden).equal(whole.logits(hidden))
