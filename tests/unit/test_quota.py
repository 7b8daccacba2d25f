"""A key's share, minute by minute."""

from __future__ import annotations

import pytest

from server.engine.quota import TokenBuckets


def test_a_full_bucket_lets_in_anything_and_then_makes_wait_for_it() -> None:
    buckets = TokenBuckets(600)  # ten a second
    assert buckets.wait("a", 0.0) == 0
    buckets.take("a", 1000, 0.0)
    assert buckets.wait("a", 0.0) == pytest.approx(40.1)
    assert buckets.wait("a", 40.0) == pytest.approx(0.1)
    assert buckets.wait("a", 40.2) == 0


def test_keys_do_not_share() -> None:
    buckets = TokenBuckets(600)
    buckets.take("a", 1000, 0.0)
    assert buckets.wait("b", 0.0) == 0


def test_what_was_not_used_comes_back() -> None:
    buckets = TokenBuckets(600)
    buckets.take("a", 700, 0.0)
    buckets.take("a", -690, 0.0)
    assert buckets.wait("a", 0.0) == 0
    buckets.take("a", 590, 0.0)
    assert buckets.wait("a", 0.0) == pytest.approx(0.1)


def test_it_never_holds_more_than_a_minute() -> None:
    buckets = TokenBuckets(600)
    buckets.take("a", 1, 0.0)
    buckets.take("a", -500, 1000.0)
    buckets.take("a", 600, 2000.0)
    assert buckets.wait("a", 2000.0) == pytest.approx(0.1)
