"""How far a run is, and what it should do there. Pure: knows no clock, no tensor and no file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Progress:
    """Work done of a budget, in seconds or in steps.

    One step is never credited more than `cap`: a process that was stopped for ten minutes has not trained for them.
    """

    total: float
    cap: float
    done: float = 0.0

    def advance(self, amount: float) -> None:
        self.done += min(max(amount, 0.0), self.cap)

    @property
    def fraction(self) -> float:
        return min(self.done / self.total, 1.0)

    @property
    def finished(self) -> bool:
        return self.done >= self.total


@dataclass(frozen=True, slots=True)
class Schedule:
    """Warm up, stay, decay to nothing; long windows and the full softmax only late, where they pay."""

    warm_up: float = 0.01
    decay_from: float = 0.6
    long_from: float = 0.7
    full_softmax_from: float = 0.95

    def rate(self, fraction: float) -> float:
        """What to multiply the base learning rates by."""
        if fraction < self.warm_up:
            return max(fraction, self.warm_up / 100) / self.warm_up
        if fraction < self.decay_from:
            return 1.0
        return (1.0 - fraction) / (1.0 - self.decay_from)

    def is_long(self, fraction: float) -> bool:
        return fraction >= self.long_from

    def is_full_softmax(self, fraction: float) -> bool:
        return fraction >= self.full_softmax_from
