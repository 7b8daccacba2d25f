"""Tokens per key and minute. Pure: it is told the time. Knows nothing of requests but what they may cost.

A bucket for each key fills at a steady rate up to a minute's worth. A request is let in while its key's bucket holds
anything; all it may cost is taken at once, if need be on credit, and what it did not use comes back when it ends.
"""

from __future__ import annotations

SECONDS = 60.0


class TokenBuckets:
    def __init__(self, tokens_per_minute: int) -> None:
        self._most = float(tokens_per_minute)
        self._levels: dict[str, tuple[float, float]] = {}  # by key: its level, and when that was so

    def wait(self, key: str, now: float) -> float:
        """Seconds until the key may ask again; 0 when it may now."""
        level = self._level(key, now)
        return 0.0 if level > 0 else (1 - level) * SECONDS / self._most

    def take(self, key: str, tokens: int, now: float) -> None:
        """Negative tokens come back."""
        self._levels[key] = (min(self._level(key, now) - tokens, self._most), now)

    def _level(self, key: str, now: float) -> float:
        level, then = self._levels.get(key, (self._most, now))
        return min(level + (now - then) * self._most / SECONDS, self._most)
