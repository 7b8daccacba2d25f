"""How many guesses pay. Knows nothing of sequences or networks, and reads no clock.

A step of n rows takes about a + b·n seconds: at few rows the weights are read anyway and a guess is nearly free; at
many it costs a row like any other. Making k guesses takes about c + d·k of such a step: the first finds the drafter
behind, and out of the processor's cache. A guess is right with some probability p, and of use if those before it are
right too. From these and the number of streams follows the length that makes the most tokens a second; it may be 0.
"""

from __future__ import annotations

HOPE = 0.8  # acceptance where nothing is known: what a good drafter reaches, for what is never tried is never learnt
MEMORY = 8.0  # guesses after which a sequence's record counts as much as what came before
PROBE = 1 / 256  # the way back to HOPE that a sequence which may not guess goes in one step
KINSHIP = 1 / 16  # weight of one sequence's record in what is expected of others of its kind
SMOOTHING = 0.2  # weight of one step among those of its size
FORGETTING = 1 / 256  # the way back to what it was said to cost that a drafter's record goes in one step
LEAST_COST = 1e-3  # of a guess: looking one up takes time too, and in a fit a cost of nothing has infinite weight
FREE_ROWS = 16.0  # until two sizes of steps were seen: rows that take as long as the weights
WORTH = 1.02  # a length must promise this much more than a shorter one: what is gained in theory alone is not gained

Point = tuple[float, float]


class SpeculationController:
    def __init__(self, most: int, cost: float) -> None:
        """most: the longest run of guesses. cost: of each, as a share of the network's step, until it is known."""
        if most < 1 or cost < 0:
            raise ValueError("at least one guess, at a cost of at least 0")
        self._most = most
        self._cost = max(cost, LEAST_COST)
        self._steps: dict[int, Point] = {}  # by size of step: mean rows, mean seconds
        self._drafts: dict[int, Point] = {}  # by number of guesses: it, mean share of a step
        self._lengths: dict[tuple[int, int], int] = {}  # what was worked out since the last step
        self._step_line, self._draft_line = self._fit_steps(), self._fit_drafts()
        self._kinds = {True: HOPE, False: HOPE}  # greedy or not -> acceptance of late

    def observe(self, rows: int, seconds: float) -> None:
        """Take in one step of decoding, less what making its guesses took.

        Known tokens and guesses alike are rows. A prompt's rows cost less.
        """
        size = rows.bit_length()
        self._steps[size] = _between(self._steps.get(size, (rows, seconds)), (rows, seconds), SMOOTHING)
        for guesses, point in self._drafts.items():
            self._drafts[guesses] = _between(point, self._said(guesses), FORGETTING)
        self._learnt()

    def drafted(self, guesses: int, streams: int, seconds: float) -> None:
        """Take in what making so many guesses, one after another, took for so many streams together."""
        if self._steps:  # else nobody knows what share of a step that is
            fixed, per_row = self._step_line
            share = seconds / (fixed + per_row * streams)
            known = self._drafts.get(guesses, self._said(guesses))  # not the first one alone: it found all cold
            self._drafts[guesses] = _between(known, (guesses, share), SMOOTHING)
            self._learnt()

    def length(self, acceptance: float, streams: int) -> int:
        """Guesses for a sequence of this acceptance, with so many streams in the step."""
        rounded = min(int(acceptance * 32), 31)
        key = rounded, streams
        if key not in self._lengths:
            self._lengths[key] = self._best((rounded + 0.5) / 32, streams)
        return self._lengths[key]

    def first(self, *, greedy: bool) -> float:
        """The acceptance to expect of a new sequence: what that of its kind was of late, a little hopefully."""
        lately = self._kinds[greedy]
        self._kinds[greedy] = lately + KINSHIP * (HOPE - lately)
        return lately

    def learned(self, acceptance: float, drafted: int, accepted: int, *, greedy: bool) -> float:
        """A sequence's acceptance after some guesses; what stands behind a wrong one was not put to the test."""
        tried = accepted + (accepted < drafted)
        new = acceptance + (accepted - tried * acceptance) / (MEMORY + tried)
        if tried:
            self._kinds[greedy] += KINSHIP * (new - self._kinds[greedy])
        return new

    def rested(self, acceptance: float) -> float:
        """The same after a step in which it was not worth a guess: some day it may try again."""
        return acceptance + PROBE * (HOPE - acceptance)

    def _said(self, guesses: int) -> Point:
        return guesses, self._cost * guesses

    def _learnt(self) -> None:
        """Once a step, and not for every sequence of the next."""
        self._step_line, self._draft_line = self._fit_steps(), self._fit_drafts()
        self._lengths.clear()

    def _best(self, p: float, streams: int) -> int:
        (fixed, per_row), (behind, per_guess) = self._step_line, self._draft_line
        plain = fixed + per_row * streams
        best, best_rate, tokens, chance = 0, 1 / plain, 1.0, 1.0
        for length in range(1, self._most + 1):
            chance *= p
            tokens += chance  # of one stream, expected
            drafting = (behind + length * per_guess) * plain
            rate = tokens / (plain + per_row * streams * length + drafting)
            if rate > best_rate * WORTH:
                best, best_rate = length, rate
        return best

    def _fit_steps(self) -> Point:
        """(a, b), in seconds once a step was seen."""
        points = list(self._steps.values())
        if (line := _fit(points)) is not None:
            return line
        per_row = points[0][1] / (FREE_ROWS + points[0][0]) if points else 1.0
        return FREE_ROWS * per_row, per_row

    def _fit_drafts(self) -> Point:
        """(c, d), in shares of a step."""
        points = list(self._drafts.values())
        if (line := _fit(points)) is not None:
            return line
        return max(points[0][1] - self._cost * points[0][0], 0.0) if points else 0.0, self._cost


def _between(old: Point, new: Point, weight: float) -> Point:
    return old[0] + weight * (new[0] - old[0]), old[1] + weight * (new[1] - old[1])


def _fit(points: list[Point]) -> Point | None:
    """(a, b) of the line y = a + b·x through points, neither negative; None where they do not make a line.

    By least squares of relative errors: shares of a second matter as ratios.
    """
    w = sum(y**-2 for _, y in points)
    n = sum(x * y**-2 for x, y in points)
    nn = sum(x * x * y**-2 for x, y in points)
    s = sum(1 / y for _, y in points)
    ns = sum(x / y for x, y in points)
    spread = w * nn - n * n
    if len(points) < 2 or spread <= 0:
        return None
    slope = max((w * ns - n * s) / spread, 0.0)
    return max((s - slope * n) / w, 0.0), slope
