"""How many tokens a step may compute, so that running streams get their next token in time.

Knows nothing of sequences, and reads no clock: it is told how long a step of so many tokens took.
"""

from __future__ import annotations

PREFILL_LEAST = 4  # tokens of prompts that a step may take, however many streams run and however slow the machine is
STRIDE = 2.0  # at most this factor up or down after one step: a hiccup of the machine is not a law


class BudgetController:
    """Moves the budget by target / measured after each step that used it; it rests where a full step takes the target.

    Steps of less than half the budget (decoding alone) tell nothing about it, and their noise must not move it. It
    starts at the smallest: the first prompts pay a few short steps, and no stream waits for one of unknown length.
    """

    def __init__(self, target_itl: float, *, smallest: int, largest: int) -> None:
        """`target_itl` in seconds."""
        if target_itl <= 0 or not 1 <= smallest <= largest:
            raise ValueError("the target must be positive, and 1 <= smallest <= largest")
        self._target = target_itl
        self._smallest = smallest
        self._largest = largest
        self._budget = float(smallest)

    @property
    def budget(self) -> int:
        return int(self._budget)

    def observe(self, tokens: int, seconds: float) -> int:
        """Take in one step; returns the budget for the next."""
        if tokens * 2 >= self.budget:
            factor = min(STRIDE, max(1 / STRIDE, self._target / seconds)) if seconds > 0 else STRIDE
            if factor < 1 or tokens >= self.budget:  # a step that was not full may not raise it
                self._budget = min(self._largest, max(self._smallest, self._budget * factor))
        return self.budget
