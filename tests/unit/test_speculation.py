"""How long guesses should be: arithmetic, without a clock or a network."""

from __future__ import annotations

import pytest

from server.worker.speculation import FIRST_ACCEPTANCE, SpeculationController


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
    for _ in range(30):
        made.drafted(4, streams=1, seconds=4 * 2.1)  # and costs a tenth of a step
    assert made.length(0.8, streams=1) == controller(cost=0.1, fixed=20.0, per_row=1.0).length(0.8, streams=1) > 2
    for _ in range(30):
        made.drafted(2, streams=4, seconds=2 * 24.0)
    assert made.length(0.8, streams=1) == 0


def test_what_a_drafter_costs_is_not_guessed_at_before_steps_of_two_sizes_were_seen() -> None:
    made = SpeculationController(8, 0.1)
    before = made.length(0.8, streams=1)
    made.observe(1, 0.01)
    made.drafted(4, streams=1, seconds=1.0)
    assert made.length(0.8, streams=1) == before


def test_before_anything_was_seen_a_lone_stream_may_try() -> None:
    made = SpeculationController(8, 0.0)
    assert made.length(FIRST_ACCEPTANCE, streams=1) > 0
    made.observe(1, 0.01)
    assert made.length(FIRST_ACCEPTANCE, streams=1) > 0


def test_it_forgets_a_hiccup() -> None:
    made = controller(fixed=20.0, per_row=1.0)
    before = made.length(0.8, streams=8)
    made.observe(8, 2800.0)
    for _ in range(30):
        made.observe(8, 28.0)
    assert made.length(0.8, streams=8) == before


def test_acceptance_follows_what_came_of_guesses() -> None:
    made = SpeculationController(4, 0.0)
    good = bad = FIRST_ACCEPTANCE
    for _ in range(40):
        good, bad = made.learned(good, 4, 4), made.learned(bad, 4, 0)
    assert good > 0.95
    assert bad < 0.05
    assert made.learned(0.5, 0, 0) == 0.5  # nothing was guessed, nothing learned
    assert made.learned(0.5, 4, 2) > made.learned(0.5, 4, 1)
    for _ in range(200):
        bad = made.rested(bad)
    assert bad == pytest.approx(FIRST_ACCEPTANCE, abs=0.05)  # it may try again
