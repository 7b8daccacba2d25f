"""What a request's fields come to as arrays, against the fields; made once however many samples there are."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from model.request_tables import RequestTables, TablesOfRequests, make_tables
from model.sampling_params import SamplingParams

ids = st.lists(st.integers(0, 99), min_size=1, unique=True).map(lambda some: tuple(sorted(some)))


@given(ids, st.integers(100, 140))
def test_the_bits_of_allowed_tokens_are_these_tokens(allowed: tuple[int, ...], vocab_size: int) -> None:
    tables = make_tables(SamplingParams(seed=0, allowed_token_ids=allowed), vocab_size, eos_token_ids=(0,))
    assert tables.allowed is not None
    assert [i for i in range(32 * len(tables.allowed)) if tables.allowed[i // 32] >> (i % 32) & 1] == list(allowed)
    bits = tables.allowed_bits()
    assert bits is not None
    assert bits.shape == (vocab_size,)
    assert tuple(np.flatnonzero(bits)) == allowed


def test_a_bias_of_minus_100_bans_and_one_above_it_does_not() -> None:
    bias = ((3, -100.0), (7, -99.99999999), (9, 2.5))
    tables = make_tables(SamplingParams(seed=0, logit_bias=bias), 10, eos_token_ids=(0,))
    assert tables.bias_ids is not None
    assert tables.bias_values is not None
    assert tables.bias_ids.tolist() == [3, 7, 9]
    assert tables.bias_values.tolist() == [-np.inf, -100.0, 2.5]


def test_what_min_tokens_bans_is_there_where_it_is_asked_for() -> None:
    params = SamplingParams(seed=0, stop_token_ids=(2, 5))
    assert make_tables(params, 10, eos_token_ids=(9,)).ends is None
    ends = make_tables(replace(params, min_tokens=1), 10, eos_token_ids=(9,)).ends
    assert ends is not None
    assert ends.tolist() == [2, 5, 9]


def test_samples_that_share_their_params_share_their_tables_until_the_last_has_left() -> None:
    tables = TablesOfRequests(vocab_size=10, eos_token_ids=(0,))
    params = SamplingParams(seed=0, allowed_token_ids=(1, 2))
    held: RequestTables | None = tables.of(params)
    assert tables.of(params) is held
    assert tables.of(replace(params)) is not held
    assert held is not None
    gone = weakref.ref(held)
    held = None
    gc.collect()
    assert gone() is None
