"""How long guesses should be: arithmetic, without a clock or a network."""

from __future__ import annotations

import pytest

from server.worker.speculation import HOPE, SpeculationController


def controller(most: int = 8, cost: float = 0.0, *, fixed: float = 0.0, per_row: float = 0.0) -> SpeculationController:
    """One that has seen a machine whose steps take fixed + rows x per_row seconds."""
    made = SpeculationController(most, cost)
    for _ in range(20):
        for rows in (1, 2, 5, 32, 64, 128, 512):
            made.observe(rows, fixed + rows * per_row)
    return made


@pytest.mark.parametrize("wrong", [(0, 0.0), (4, -0.1)])
def test_numbers_that_mean_nothing_are_refused(wrong: tuple[int, float]) -> None:
    with pytest.raises(ValueError, match="at least"):
        SpeculationController(*wrong)


def test_where_rows_are_free_a_sure_guess_is_as_long_as_can_be() -> None:
    assert controller(fixed=1.0, per_row=1e-6).length(0.99, streams=1) == 8


def test_where_every_row_costs_alike_nobody_guesses() -> None:
    made = controller(fixed=1e-6, per_row=1.0)
    assert [made.length(p, streams) for p in (0.1, 0.6, 0.99) for streams in (1, 8, 64)] == [0] * 9


def test_the_better_the_guesses_the_longer() -> None:
    made = controller(fixed=20.0, per_row=1.0)
    lengths = [made.length(p / 10, streams=1) for p in range(11)]
    assert lengths == sorted(lengths)
    assert lengths[0] == 0
    assert lengths[-1] == 8
    assert len(set(lengths)) > 4


def test_the_more_streams_the_shorter() -> None:
    made = controller(fixed=20.0, per_row=1.0)
    lengths = [made.length(0.8, streams) for streams in (1, 2, 4, 8, 16, 32, 64, 128)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > 3
    assert lengths[-1] == 0


def test_a_dear_drafter_guesses_less_and_one_as_dear_as_the_network_never() -> None:
    lengths = [controller(cost=cost, fixed=20.0, per_row=1.0).length(0.8, streams=1) for cost in (0.0, 0.1, 0.3, 1.0)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[2] > 0
    assert lengths[3] == 0


def test_what_a_drafter_costs_is_measured() -> None:
    made = controller(cost=0.8, fixed=20.0, per_row=1.0)  # it was thought to be dear
    assert made.length(0.8, streams=1) == 0
    for guesses in (1, 4) * 30:
        made.drafted(guesses, streams=1, seconds=guesses * 2.1)  # and costs a tenth of a step
    assert made.length(0.8, streams=1) == controller(cost=0.1, fixed=20.0, per_row=1.0).length(0.8, streams=1) > 2


def test_a_drafter_that_takes_long_to_begin_makes_many_guesses_or_none() -> None:
    made = controller(cost=0.01, fixed=20.0, per_row=0.2)
    for guesses in (1, 4) * 30:
        made.drafted(guesses, streams=1, seconds=20.2 * (0.6 + 0.05 * guesses))
    lengths = [made.length(p / 20, streams=1) for p in range(21)]
    assert lengths == sorted(lengths)
    assert {0, 8} < set(lengths)
    assert not {1, 2} & set(lengths)


def test_what_it_takes_to_begin_is_not_charged_for_every_guess() -> None:
    """One guess at a time teaches nothing about the second: that is thought to cost what it was said to."""
    made = controller(cost=0.1, fixed=20.0, per_row=0.2)
    for _ in range(30):
        made.drafted(1, streams=1, seconds=20.2 * 0.5)
    assert made.length(0.85, streams=1) > 4


def test_what_guesses_cost_among_many_streams_is_a_share_of_their_step() -> None:
    made = controller(cost=0.1, fixed=20.0, per_row=1.0)
    for guesses in (1, 4) * 30:
        made.drafted(guesses, streams=8, seconds=guesses * 28.0 * 0.1)
    assert made.length(0.8, streams=1) == controller(cost=0.1, fixed=20.0, per_row=1.0).length(0.8, streams=1)


def test_before_anything_was_seen_a_lone_stream_may_try() -> None:
    made = SpeculationController(8, 0.0)
    assert made.length(HOPE, streams=1) > 0
    made.observe(1, 0.01)
    assert made.length(HOPE, streams=1) > 0


def test_it_forgets_a_hiccup() -> None:
    made = controller(fixed=20.0, per_row=1.0)
    before = made.length(0.8, streams=8)
    made.observe(8, 2800.0)
    for _ in range(30):
        made.observe(8, 28.0)
    assert made.length(0.8, streams=8) == before


def test_acceptance_follows_what_came_of_guesses() -> None:
    made = SpeculationController(4, 0.0)
    good = bad = HOPE
    for _ in range(40):
        good, bad = made.learned(good, 4, 4, greedy=True), made.learned(bad, 4, 0, greedy=False)
    assert good > 0.95
    assert bad < 0.05
    assert made.learned(0.5, 0, 0, greedy=True) == 0.5  # nothing was guessed, nothing learned
    assert made.learned(0.5, 4, 2, greedy=True) > made.learned(0.5, 4, 1, greedy=True)
    for _ in range(800):
        bad = made.rested(bad)
    assert bad == pytest.approx(HOPE, abs=0.05)  # it may try again


def test_a_new_sequence_begins_with_what_its_kind_came_to() -> None:
    made = SpeculationController(4, 0.0)
    assert made.first(greedy=True) == made.first(greedy=False) == HOPE
    bad = HOPE
    for _ in range(100):
        bad = made.learned(bad, 4, 0, greedy=False)
    assert made.first(greedy=False) < 0.05
    assert made.first(greedy=True) == HOPE
    for _ in range(60):
        made.first(greedy=False)
    assert made.first(greedy=False) > 0.7  # in the end one of them tries again


def test_a_drafter_that_was_slow_once_is_tried_again() -> None:
    made = controller(cost=0.1, fixed=20.0, per_row=1.0)
    for guesses in (1, 4) * 5:
        made.drafted(guesses, streams=1, seconds=10 * 20.0)
    assert made.length(0.9, streams=1) == 0
    for _ in range(2000):
        made.observe(1, 21.0)
    assert made.length(0.9, streams=1) > 3


def test_a_drafter_that_costs_next_to_nothing_is_forgotten_without_end() -> None:
    """What nobody uses any more goes back to what it was said to cost; a cost of 0 would leave nothing to compare."""
    made = SpeculationController(5, 0.0)
    made.observe(1, 0.002)
    for guesses in (1, 3):
        made.drafted(guesses, streams=1, seconds=2e-5)
    for _ in range(150_000):
        made.observe(1, 0.002)
    assert made.length(0.9, streams=1) == 5
