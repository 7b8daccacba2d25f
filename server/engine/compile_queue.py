"""Which grammar is compiled next. Pure: no clock, no process.

Clients take turns by the compiler's time: the one that has had least of it since it came is next, so one that sends
many expensive grammars waits for itself. Of one client's grammars the shortest is first, and of equals the one that
came first. (Start-time fair queueing: P. Goyal, H. Vin, H. Cheng, 1996.)
"""

from __future__ import annotations

import heapq
import itertools
from typing import Generic, TypeVar

Item = TypeVar("Item")


class CompileQueue(Generic[Item]):
    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._waiting: dict[str, list[tuple[int, int, Item]]] = {}  # by client: heaps of (size, number, item)
        self._had: dict[str, float] = {}  # seconds of the compiler, of clients that wait or were served lately
        self._start = 0.0  # what the client that was served last had had by then: where those begin who come now

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def waiting(self, client: str) -> int:
        return len(self._waiting.get(client, ()))

    def add(self, client: str, size: int, item: Item) -> None:
        if client not in self._waiting:
            self._had[client] = max(self._had.get(client, 0.0), self._start)
        heapq.heappush(self._waiting.setdefault(client, []), (size, next(self._numbers), item))

    def take(self) -> tuple[str, Item]:
        """The next one's client, and what it waits for. There is one."""
        client = min(self._waiting, key=lambda each: (self._had[each], self._waiting[each][0][:2]))
        _, _, item = heapq.heappop(self._waiting[client])
        if not self._waiting[client]:
            del self._waiting[client]
        self._start = self._had[client]
        return client, item

    def spent(self, client: str, seconds: float) -> None:
        """What was taken last took so long."""
        self._had[client] += seconds
        for each in [each for each, had in self._had.items() if had <= self._start and each not in self._waiting]:
            del self._had[each]  # as if it came now
