"""KV-cache blocks: who holds them, and which hold tokens that somebody may ask for again.

Knows nothing of tensors, sequences or steps: a block is a number. A block is free when nobody refers to it; a free one
keeps its key, so it can still be found, until it is handed out again.

    free list:  [ never or no longer keyed | keyed, least recently used … most recently used ]
                  ^ handed out first
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from hashlib import sha256
from typing import NamedTuple


class BlockKey(NamedTuple):
    """What a block holds: its own tokens and, through the digest, all those before them and the salt.

    A full block, or the last one of a sequence.
    """

    digest: bytes
    tokens: bytes  # compared on every hit, so that a collision of digests is a miss and not another's text


def root_digest(salt: bytes) -> bytes:
    """The parent of a sequence's first block. Sequences of different salts share nothing."""
    return sha256(salt).digest()


def block_keys(parent: bytes, tokens: list[int], block_size: int) -> list[BlockKey]:
    """The keys of blocks that hold these tokens, one after the other behind `parent`; the last need not be full."""
    packed = array("I", tokens)
    width = block_size * packed.itemsize
    data = packed.tobytes()
    keys = []
    for at in range(0, len(data), width):
        own = data[at : at + width]
        parent = sha256(parent + own).digest()
        keys.append(BlockKey(parent, own))
    return keys


class BlockPool:
    """Ref-counted blocks with a prefix index. Callers take with `share` and `allocate` and give back with `free`."""

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError("a block pool needs at least one block of at least one token")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._references = [0] * num_blocks
        self._keys: list[BlockKey | None] = [None] * num_blocks
        self._index: dict[bytes, int] = {}  # digest -> the block that holds it
        self._free = OrderedDict.fromkeys(range(num_blocks))
        self._cached = 0  # how many of the free ones have a key

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks nobody holds, of which the content can still be found."""
        return self._cached

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def match(self, keys: Iterable[BlockKey]) -> list[int]:
        """The longest run of leading keys that is in the cache. Takes no reference."""
        blocks: list[int] = []
        for key in keys:
            block = self._index.get(key.digest)
            if block is None or self._keys[block] != key:
                break
            blocks.append(block)
        return blocks

    def available(self, shared: list[int]) -> int:
        """How many blocks could be allocated once `shared` are taken."""
        return len(self._free) - sum(self._references[block] == 0 for block in shared)

    def share(self, blocks: list[int]) -> None:
        """Take one more reference to each of the blocks that `match` found."""
        for block in blocks:
            if self._references[block] == 0:
                del self._free[block]
                self._cached -= 1
            self._references[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks nobody holds, forgetting what was cached in them. The caller has seen they are there."""
        assert count <= len(self._free), "allocated more blocks than are free"
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
            key = self._keys[block]
            if key is not None:
                del self._index[key.digest]
                self._keys[block] = None
                self._cached -= 1
        return blocks

    def register(self, block: int, key: BlockKey) -> None:
        """Let others find a held block by its content. Where the content is known already, the older block stays."""
        assert self._references[block] > 0, "registered a block nobody holds"
        if self.enable_prefix_caching and self._keys[block] is None and key.digest not in self._index:
            self._index[key.digest] = block
            self._keys[block] = key

    def free(self, table: list[int]) -> None:
        """Give back one reference to each block of a table, last block first: tails are evicted before heads."""
        for block in reversed(table):
            assert self._references[block] > 0, "freed a block nobody holds"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if self._keys[block] is None:
                    self._free.move_to_end(block, last=False)
                else:
                    self._cached += 1

    def forget(self) -> None:
        """Empty the prefix index: what the blocks hold is gone. Nobody may hold any."""
        assert not self.num_used
        self._keys = [None] * self.num_blocks
        self._index.clear()
        self._cached = 0

    def check(self, tables: Iterable[list[int]]) -> None:
        """Prove the books against the block tables of all who hold blocks."""
        held = Counter(block for table in tables for block in table)
        assert [held[block] for block in range(self.num_blocks)] == self._references, "references differ from tables"
        assert held.keys().isdisjoint(self._free), "a held block is free"
        assert len(held) + len(self._free) == self.num_blocks, "free + used differs from total"
        keyed = {key.digest: block for block, key in enumerate(self._keys) if key is not None}
        assert keyed == self._index, "the prefix index differs from the blocks' keys"
        cached = sum(self._keys[block] is not None for block in self._free)
        assert cached == self._cached, "the count of cached blocks is wrong"
