"""Silence counts against a worker that has something to do, and against no other."""

from __future__ import annotations

import pytest

from server.engine.heartbeat import Heartbeat
from server.worker.messages import Ready, Stats, Step


def step(*, running: int = 0, waiting: int = 0, received: int = 0) -> Step:
    return Step([], Stats(running, waiting, 0, 0, 8, 0, 0, 0, 0, 0, []), received)


def looks(heartbeat: Heartbeat, sent: int, count: int = 3) -> list[int]:
    return [heartbeat.look(sent) for _ in range(count)]


def test_one_that_was_told_nothing_may_be_silent() -> None:
    assert looks(Heartbeat(), sent=0) == [0, 0, 0]


def test_one_that_has_not_taken_in_what_it_was_told_may_not() -> None:
    heartbeat = Heartbeat()
    heartbeat.heard(step(received=4))
    assert looks(heartbeat, sent=4) == [0, 0, 0]
    assert looks(heartbeat, sent=5) == [1, 2, 3]
    heartbeat.heard(step(received=5))
    assert looks(heartbeat, sent=5) == [0, 0, 0]


@pytest.mark.parametrize("work", [{"running": 1}, {"waiting": 1}])
def test_one_that_has_work_may_not(work: dict[str, int]) -> None:
    heartbeat = Heartbeat()
    heartbeat.heard(step(**work, received=2))
    assert looks(heartbeat, sent=2) == [1, 2, 3]


def test_any_word_ends_the_silence_and_work_goes_on() -> None:
    heartbeat = Heartbeat()
    assert looks(heartbeat, sent=1) == [1, 2, 3]
    heartbeat.heard(Ready("cpu", 16, 8, 0.1))
    assert looks(heartbeat, sent=1) == [1, 2, 3]
    heartbeat.heard(step(running=1, received=1))
    assert looks(heartbeat, sent=1) == [1, 2, 3]
