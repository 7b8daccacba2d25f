"""How many guesses pay. Knows nothing of sequences or networks, and reads no clock.

A step of n rows takes about a + b·n seconds: at few rows the weights are read anyway and a guess is nearly free; at
many it costs a row like any other. It is right with some probability p, and of use if those before it are right too.
From a, b, p and the number of streams follows the length that makes the most tokens a second, and that may be 0.
"""

from __future__ import annotations

FIRST_ACCEPTANCE = 0.6  # of a sequence about which nothing is known
MEMORY = 8.0  # guesses after which a sequence's record counts as much as what came before
PROBE = 1 / 64  # the way back to FIRST_ACCEPTANCE that a sequence which may not guess goes in one step
SMOOTHING = 0.2  # weight of one step among those of its size
FREE_ROWS = 16  # until two sizes of steps were seen: rows that take as long as the weights
WORTH = 1.02  # a length must promise this much more than a shorter one: what is gained in theory alone is not gained


class SpeculationController:
    def __init__(self, most: int, cost: float) -> None:
        """most: the longest run of guesses. cost: of a drafter's step, as a share of the network's, until seen."""
        if most < 1 or cost < 0:
            raise ValueError("at least one guess, at a cost of at least 0")
        self._most = most
        self._cost = cost
        self._seen: dict[int, tuple[float, float]] = {}  # by size of step: mean rows, mean seconds
        self._lengths: dict[tuple[int, int], int] = {}  # what was worked out since the last step

    def observe(self, rows: int, seconds: float) -> None:
        """Take in one step of decoding, less what making its guesses took.

        Known tokens and guesses alike are rows. A prompt's rows cost less.
        """
        size = rows.bit_length()
        mean_rows, mean_seconds = self._seen.get(size, (float(rows), seconds))
        self._seen[size] = (
            mean_rows + SMOOTHING * (rows - mean_rows),
            mean_seconds + SMOOTHING * (seconds - mean_seconds),
        )
        self._lengths.clear()

    def drafted(self, guesses: int, streams: int, seconds: float) -> None:
        """Take in what making so many guesses, one after another, took for so many streams together."""
        if len(self._seen) > 1:  # else nobody knows what share of a step that is
            fixed, per_row = self._line()
            share = seconds / (guesses * (fixed + per_row * streams))
            self._cost += SMOOTHING * (share - self._cost)
            self._lengths.clear()

    def length(self, acceptance: float, streams: int) -> int:
        """Guesses for a sequence of this acceptance, with so many streams in the step."""
        rounded = min(int(acceptance * 32), 31)
        key = rounded, streams
        if key not in self._lengths:
            self._lengths[key] = self._best((rounded + 0.5) / 32, streams)
        return self._lengths[key]

    def learned(self, acceptance: float, drafted: int, accepted: int) -> float:
        """A sequence's acceptance after some guesses; what stands behind a wrong one was not put to the test."""
        tried = accepted + (accepted < drafted)
        return acceptance + (accepted - tried * acceptance) / (MEMORY + tried)

    def rested(self, acceptance: float) -> float:
        """The same after a step in which it was not worth a guess: some day it may try again."""
        return acceptance + PROBE * (FIRST_ACCEPTANCE - acceptance)

    def _best(self, p: float, streams: int) -> int:
        fixed, per_row = self._line()
        best, best_rate, tokens, chance = 0, 0.0, 0.0, 1.0
        for length in range(self._most + 1):
            tokens += chance  # of one stream, expected
            chance *= p
            drafting = length * self._cost * (fixed + per_row * streams)
            rate = tokens / (fixed + per_row * streams * (1 + length) + drafting)
            if length == 0 or rate > best_rate * WORTH:
                best, best_rate = length, rate
        return best

    def _line(self) -> tuple[float, float]:
        """(a, b) through what was seen, by least squares of relative errors; shares of a second matter as ratios."""
        points = list(self._seen.values())
        w = sum(t**-2 for _, t in points)
        n = sum(r * t**-2 for r, t in points)
        nn = sum(r * r * t**-2 for r, t in points)
        s = sum(1 / t for _, t in points)
        ns = sum(r / t for r, t in points)
        spread = w * nn - n * n
        if len(points) < 2 or spread <= 0:
            return float(FREE_ROWS), 1.0
        per_row = max((w * ns - n * s) / spread, 0.0)
        return max((s - per_row * n) / w, 0.0), per_row
