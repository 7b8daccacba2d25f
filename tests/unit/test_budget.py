"""The token budget settles where a full step takes the target, and nothing but full steps raises it."""

from __future__ import annotations

from random import Random

import pytest

from server.worker.budget import BudgetController


@pytest.mark.parametrize(
    ("base", "slope", "ideal"), [(0.020, 0.002, 40), (0.008, 0.0012, 76), (0.005, 5e-6, 2048), (0.2, 0.002, 16)]
)
def test_it_settles_at_the_target_whatever_the_machine(base: float, slope: float, ideal: int) -> None:
    controller = BudgetController(0.1, smallest=16, largest=2048)
    noise = Random(1)
    for step in range(400):
        tokens = 8 if step % 30 > 12 else controller.budget  # decoding alone, now and then with prompts
        controller.observe(tokens, (base + slope * tokens) * noise.uniform(0.9, 1.1))
    assert controller.budget == pytest.approx(ideal, rel=0.15)


def test_no_step_on_the_way_takes_much_longer_than_the_target() -> None:
    controller = BudgetController(0.1, smallest=16, largest=2048)
    taken = []
    for _ in range(50):
        taken.append(0.02 + 0.002 * controller.budget)
        controller.observe(controller.budget, taken[-1])
    assert max(taken) < 0.2


def test_decoding_alone_does_not_move_it() -> None:
    controller = BudgetController(0.1, smallest=16, largest=2048)
    while controller.budget < 512:
        controller.observe(controller.budget, 0.01)
    before = controller.budget
    for seconds in (0.001, 0.5, 0.01):
        assert controller.observe(8, seconds) == before


def test_a_step_that_was_not_full_lowers_it_or_leaves_it() -> None:
    controller = BudgetController(0.1, smallest=10, largest=1000)
    assert controller.observe(9, 0.01) == 10
    assert controller.observe(10, 0.01) == 20
    assert controller.observe(15, 0.125) == 16


def test_one_hiccup_costs_half_at_most() -> None:
    controller = BudgetController(0.1, smallest=16, largest=64)
    for _ in range(3):
        controller.observe(controller.budget, 0.01)
    assert controller.budget == 64
    assert controller.observe(64, 30.0) == 32


def test_a_clock_too_coarse_to_see_the_step_raises_it() -> None:
    assert BudgetController(0.1, smallest=16, largest=64).observe(16, 0.0) == 32


@pytest.mark.parametrize(("target", "smallest", "largest"), [(0.0, 1, 2), (0.1, 0, 2), (0.1, 3, 2)])
def test_wrong_numbers_are_refused(target: float, smallest: int, largest: int) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        BudgetController(target, smallest=smallest, largest=largest)
