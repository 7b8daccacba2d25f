"""When to stop starting workers, because the service gets nowhere. Pure: no process, and it is told the time.

The service gives up when its workers have died six times or more, over a minute or more, and in all that time none of
them computed a token. One rule for all workers together: a worker that dies again and again ends nothing while another
one serves.

Two kinds of death do not count. A worker that was ready and had nothing to do was killed from outside, and the next one
will be as good. And while another worker is ready and has nothing to do, whoever asks for something is served.
"""

from __future__ import annotations

DEATHS = 6
WINDOW = 60.0  # seconds


class CrashLoop:
    """One for all workers of a service. Times are seconds of one clock, which never goes back."""

    def __init__(self) -> None:
        self._deaths = 0  # those that count, since the service last got anywhere
        self._since = 0.0  # when the first of them was
        self._idle: dict[int, float] = {}  # by worker that is ready and has nothing to do: since when

    def progressed(self) -> None:
        """A worker computed something that was asked for."""
        self._deaths = 0

    def looked(self, worker: int, now: float, *, idle: bool) -> None:
        """idle: it is ready and has nothing to do. A worker that is so for a minute is as good as one that computes."""
        if not idle:
            self._idle.pop(worker, None)
        elif now - self._idle.setdefault(worker, now) >= WINDOW:
            self._deaths = 0

    def died(self, worker: int, now: float, *, idle: bool) -> bool:
        """Whether to give up. idle: it was ready and had nothing to do."""
        self._idle.pop(worker, None)
        if idle or self._idle:
            return False
        if self._deaths == 0:
            self._since = now
        self._deaths += 1
        return self._deaths >= DEATHS and now - self._since >= WINDOW
