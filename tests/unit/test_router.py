"""Which worker gets a sequence."""

from __future__ import annotations

from server.engine.router import CROWD, Router

BLOCK = 4


def router(workers: int, num_blocks: int = 64) -> Router:
    made = Router(workers)
    for worker in range(workers):
        made.joined(worker, num_blocks, BLOCK)
    return made


def prompt(length: int, first: int = 1) -> list[int]:
    return [first, *range(100, 99 + length)]


def test_without_workers_there_is_none() -> None:
    assert router(0).choose(prompt(8), b"") is None


def test_strangers_go_to_the_idlest() -> None:
    made = router(3)
    assert sorted(made.choose(prompt(8, first), b"") or 0 for first in range(3)) == [0, 1, 2]
    made.ended(1)
    assert made.choose(prompt(8, 9), b"") == 1


def test_a_known_beginning_goes_where_it_is_known() -> None:
    made = router(2)
    assert made.choose(prompt(12, 1), b"") == 0
    assert made.choose(prompt(12, 2), b"") == 1
    assert [made.choose([*prompt(9, 2), 7, 7], b"") for _ in range(3)] == [1, 1, 1]
    assert made.choose(prompt(12, 2), b"salt") == 0  # of another's beginnings nobody knows anything


def test_a_crowded_worker_gets_no_more() -> None:
    made = router(2)
    assert [made.choose(prompt(12), b"") for _ in range(CROWD + 2)] == [0] * CROWD + [1, 1]


def test_what_is_shorter_than_a_block_is_known_nowhere() -> None:
    made = router(2)
    assert [made.choose(prompt(3), b"") for _ in range(4)] == [0, 1, 0, 1]


def test_the_oldest_is_forgotten_first() -> None:
    made = router(2, num_blocks=3)
    made.choose(prompt(8, 1), b"")
    made.ended(0)
    for first in (2, 3):
        made.choose(prompt(8, first), b"")
        made.ended(0)
    made.choose(prompt(8, 4), b"")
    assert made.choose(prompt(8, 1), b"") == 1


def test_a_worker_that_left_or_forgot_knows_nothing() -> None:
    made = router(2)
    made.choose(prompt(8, 1), b"")
    made.forgot(0)
    assert made.choose(prompt(8, 1), b"") == 1
    made.left(1)
    assert made.choose(prompt(8, 1), b"") == 0
    made.ended(1)
    made.joined(1, 64, BLOCK)
    assert made.choose(prompt(8, 1), b"") == 0  # of what it held before it left, nothing
