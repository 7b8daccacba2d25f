"""When the service stops starting workers: after a minute in which it got nowhere, and not before."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.engine.crash_loop import DEATHS, WINDOW, CrashLoop


def die_often(crash_loop: CrashLoop, start: float, seconds: float, worker: int = 0, every: float = 2.0) -> float | None:
    """A worker dies at its work every so often. Returns when the service gave up, if it did."""
    for death in range(int(seconds / every) + 1):
        if crash_loop.died(worker, start + death * every, idle=False):
            return start + death * every
    return None


def test_a_worker_that_never_gets_anywhere_ends_the_service_after_a_minute() -> None:
    assert die_often(CrashLoop(), 100.0, 300) == 100.0 + WINDOW


def test_a_worker_that_takes_long_to_die_is_given_six_lives() -> None:
    assert die_often(CrashLoop(), 0.0, 3000, every=90.0) == 90.0 * (DEATHS - 1)


def test_a_token_of_any_worker_starts_the_count_again() -> None:
    crash_loop = CrashLoop()
    for minute in range(30):
        assert die_often(crash_loop, minute * 59.0, 58) is None
        crash_loop.progressed()


def test_workers_killed_while_they_had_nothing_to_do_end_no_service() -> None:
    crash_loop = CrashLoop()
    assert not any(crash_loop.died(0, moment * 0.5, idle=True) for moment in range(1000))


def test_a_worker_that_cannot_be_started_ends_nothing_while_another_stands_ready() -> None:
    crash_loop = CrashLoop()
    crash_loop.looked(1, 0.0, idle=True)
    assert die_often(crash_loop, 0.0, 1000) is None
    crash_loop.looked(1, 1000.0, idle=False)
    assert die_often(crash_loop, 1000.0, 1000) == 1000.0 + WINDOW


def test_a_minute_in_which_a_worker_stands_ready_starts_the_count_again() -> None:
    crash_loop = CrashLoop()
    assert die_often(crash_loop, 0.0, 10) is None
    for moment in range(int(WINDOW) + 1):
        crash_loop.looked(0, 20.0 + moment, idle=True)
    crash_loop.looked(0, 81.0, idle=False)
    assert die_often(crash_loop, 82.0, WINDOW - 2) is None


@given(st.lists(st.tuples(st.floats(0.01, 30.0), st.sampled_from(["die", "die", "die", "token", "stand", "work"]),
                          st.integers(0, 2))))  # fmt: skip
def test_it_gives_up_only_after_a_minute_without_a_token_and_with_nobody_ready(
    events: list[tuple[float, str, int]],
) -> None:
    crash_loop, now, deaths, standing = CrashLoop(), 0.0, list[float](), set[int]()
    for pause, what, worker in events:
        now += pause
        match what:
            case "token":
                crash_loop.progressed()
                deaths.clear()
            case "stand" | "work":
                crash_loop.looked(worker, now, idle=what == "stand")
                (standing.add if what == "stand" else standing.discard)(worker)
            case _:
                standing.discard(worker)
                gave_up = crash_loop.died(worker, now, idle=False)
                if not standing:
                    deaths.append(now)
                if gave_up:
                    assert not standing
                    assert len(deaths) >= DEATHS
                    assert now - deaths[0] >= WINDOW
