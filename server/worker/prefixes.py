"""What a sequence finds in the prefix cache, and what it lets others find there. Pure, as the scheduler."""

from __future__ import annotations

from server.worker.block_pool import BlockPool
from server.worker.sequence import Sequence


class Prefixes:
    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool

    def full_blocks(self, sequence: Sequence) -> list[int]:
        """The cached blocks that hold the beginning of a sequence, as far as it can use them."""
        if not self._pool.enable_prefix_caching:
            return []
        full = min(len(sequence.tokens) // self._pool.block_size, self._pool.blocks_for(sequence.reusable))
        return self._pool.match(sequence.leading_keys(full, self._pool.block_size))

    def tail(self, sequence: Sequence, full: int) -> int | None:
        """The block with what a sequence can use behind so many full ones; its content is there until the next plan."""
        if not self._pool.enable_prefix_caching or sequence.reusable // self._pool.block_size != full:
            return None
        key = sequence.tail_key(sequence.reusable, self._pool.block_size)
        return next(iter(self._pool.match([] if key is None else [key])), None)

    def register(self, sequence: Sequence) -> None:
        """Let others find the blocks that the sequence has filled with known tokens."""
        full = min(sequence.computed, len(sequence.tokens)) // self._pool.block_size
        if self._pool.enable_prefix_caching and full > sequence.registered:
            keys = sequence.leading_keys(full, self._pool.block_size)
            for i in range(sequence.registered, full):
                self._pool.register(sequence.block_table[i], keys[i])
            sequence.registered = full

    def register_tail(self, sequence: Sequence) -> None:
        """Let sequences that go on from this one find its last block, which is not full."""
        known = min(sequence.computed, len(sequence.tokens))
        key = sequence.tail_key(known, self._pool.block_size)
        if key is not None and self._pool.blocks_for(known) <= len(sequence.block_table):
            self._pool.register(sequence.block_table[known // self._pool.block_size], key)
