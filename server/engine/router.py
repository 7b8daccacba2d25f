"""Which worker computes a sequence: the one that holds most of its prompt, and of these the least busy.

It keeps a light record of the prompt blocks sent to each worker, as many as the worker has, oldest forgotten first. A
record that is wrong costs time, never an answer. Knows nothing of processes or requests.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import sha256

CROWD = 8  # a worker so many sequences busier than the idlest gets no more, whatever it holds


class PrefixRecord:
    """The prompt blocks that were sent somewhere, as digests; so many, oldest forgotten first."""

    def __init__(self, size: int) -> None:
        """size: how many blocks."""
        self._size = size
        self._digests: OrderedDict[bytes, None] = OrderedDict()

    def held(self, digests: Sequence[bytes]) -> int:
        """How many of these are here, from the first on without a gap."""
        return next((i for i, digest in enumerate(digests) if digest not in self._digests), len(digests))

    def add(self, digests: Sequence[bytes]) -> None:
        for digest in reversed(digests):  # tails are forgotten before heads
            self._digests[digest] = None
            self._digests.move_to_end(digest)
        while len(self._digests) > self._size:
            self._digests.popitem(last=False)

    def clear(self) -> None:
        self._digests.clear()


def block_digests(tokens: Sequence[int], salt: bytes, block_size: int) -> list[bytes]:
    """Of each full block, with all those before it and the salt."""
    digest, digests = sha256(salt).digest(), []
    for at in range(0, len(tokens) - block_size + 1, block_size):
        digest = sha256(digest + array("I", tokens[at : at + block_size]).tobytes()).digest()
        digests.append(digest)
    return digests


class Router:
    def __init__(self, workers: int) -> None:
        """workers: how many there will be; with one, there is nothing to remember."""
        self._several = workers > 1
        self._loads: dict[int, int] = {}  # of workers that run
        self._records: dict[int, PrefixRecord] = {}
        self._block_size = 1

    def joined(self, worker: int, num_blocks: int, block_size: int) -> None:
        """A fresh one, that holds nothing."""
        self._loads[worker] = 0
        self._records[worker] = PrefixRecord(num_blocks)
        self._block_size = block_size

    def left(self, worker: int) -> None:
        self._loads.pop(worker, None)
        self._records.pop(worker, None)

    def forgot(self, worker: int) -> None:
        """Its cache is empty now."""
        if worker in self._records:
            self._records[worker].clear()

    def choose(self, tokens: list[int], salt: bytes) -> int | None:
        """A worker for a sequence that starts with these; its load counts until `ended`. None when there is none."""
        if not self._loads:
            return None
        digests = block_digests(tokens, salt, self._block_size) if self._several else []
        idlest = min(self._loads.values())
        able = [each for each, load in self._loads.items() if load - idlest < CROWD]
        worker = min(able, key=lambda each: (-self._records[each].held(digests), self._loads[each]))
        self._records[worker].add(digests)
        self._loads[worker] += 1
        return worker

    def ended(self, worker: int) -> None:
        if worker in self._loads:
            self._loads[worker] -= 1
