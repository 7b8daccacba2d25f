"""Which worker computes a sequence: the one that holds most of its prompt, and of these the least busy.

It keeps a light record of the prompt blocks sent to each worker, as many as the worker has, oldest forgotten first. A
record that is wrong costs time, never an answer. Knows nothing of processes or requests.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from hashlib import sha256

CROWD = 8  # a worker so many sequences busier than the idlest gets no more, whatever it holds


class Router:
    def __init__(self, workers: int) -> None:
        """workers: how many there will be; with one, there is nothing to remember."""
        self._several = workers > 1
        self._loads: dict[int, int] = {}  # of workers that run
        self._records: dict[int, OrderedDict[bytes, None]] = {}
        self._sizes: dict[int, int] = {}  # blocks
        self._block_size = 1

    def joined(self, worker: int, num_blocks: int, block_size: int) -> None:
        """A fresh one, that holds nothing."""
        self._loads[worker] = 0
        self._records[worker] = OrderedDict()
        self._sizes[worker] = num_blocks
        self._block_size = block_size

    def left(self, worker: int) -> None:
        for books in (self._loads, self._records, self._sizes):
            books.pop(worker, None)

    def forgot(self, worker: int) -> None:
        """Its cache is empty now."""
        if worker in self._records:
            self._records[worker].clear()

    def choose(self, tokens: list[int], salt: bytes) -> int | None:
        """A worker for a sequence that starts with these; its load counts until `ended`. None when there is none."""
        if not self._loads:
            return None
        digests = self._digests(tokens, salt) if self._several else []
        idlest = min(self._loads.values())
        able = [each for each, load in self._loads.items() if load - idlest < CROWD]
        worker = min(able, key=lambda each: (-self._held(each, digests), self._loads[each]))
        self._record(worker, digests)
        self._loads[worker] += 1
        return worker

    def ended(self, worker: int) -> None:
        if worker in self._loads:
            self._loads[worker] -= 1

    def _digests(self, tokens: list[int], salt: bytes) -> list[bytes]:
        """Of each full block, with all those before it and the salt."""
        digest, size, digests = sha256(salt).digest(), self._block_size, []
        for at in range(0, len(tokens) - size + 1, size):
            digest = sha256(digest + array("I", tokens[at : at + size]).tobytes()).digest()
            digests.append(digest)
        return digests

    def _held(self, worker: int, digests: list[bytes]) -> int:
        record = self._records[worker]
        return next((i for i, digest in enumerate(digests) if digest not in record), len(digests))

    def _record(self, worker: int, digests: list[bytes]) -> None:
        record = self._records[worker]
        for digest in reversed(digests):  # tails are forgotten before heads
            record[digest] = None
            record.move_to_end(digest)
        while len(record) > self._sizes[worker]:
            record.popitem(last=False)
