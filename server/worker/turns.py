"""Whose turn it is among several owners (keys of the API), and who makes way for whom.

Owners have equal shares, by tokens: of several that have work, the one that has had the fewest tokens comes first with
its prompts, and one that holds more seats or blocks than its share yields them to one that holds fewer. Where there is
one owner, ranks alone decide. Sequences that nobody waits for (`background`) have no share. Pure; changes nothing.
"""

from __future__ import annotations

from collections import Counter

from model.step import ScheduledChunk
from server.worker.block_pool import BlockPool
from server.worker.sequence import Sequence
from server.worker.shares import Shares

PREEMPTIONS_BEFORE_RESERVE = 3  # then it gets all the blocks it may ever need at once, and is left alone


class Turns:
    """Sequences are handed to it in order of rank."""

    def __init__(self, pool: BlockPool, max_num_seqs: int) -> None:
        self.shares = Shares()
        self._pool = pool
        self._seats = max_num_seqs

    def first(self, waiting: list[Sequence]) -> Sequence | None:
        """Of each owner's first, the one whose owner has had the fewest tokens."""
        if not waiting or waiting[0].background or not self.shares.several:
            return waiting[0] if waiting else None
        firsts: dict[str, Sequence] = {}
        for sequence in waiting:
            if sequence.background or len(firsts) == self.shares.owners:
                break
            firsts.setdefault(sequence.owner, sequence)
        return min(firsts.values(), key=lambda s: self.shares.served(s.owner))  # of equals the lowest rank

    def in_turn(self, sequences: list[Sequence]) -> list[Sequence]:
        """A copy; of several owners, those of the one that has had the fewest tokens first."""
        if not self.shares.several:
            return sequences.copy()
        return sorted(sequences, key=lambda s: (s.background, 0 if s.background else self.shares.served(s.owner)))

    def had_fewer(self, sequence: Sequence | None, than: Sequence) -> bool:
        """Whether the owner of the one has had fewer tokens than the owner of the other."""
        if sequence is None or sequence.background or than.background or not self.shares.several:
            return False
        return self.shares.served(sequence.owner) < self.shares.served(than.owner)

    def victim(self, running: list[Sequence], sequence: Sequence, chunks: list[ScheduledChunk]) -> Sequence:
        """Who is preempted so that this one can grow: the newest, of several owners of that which holds most blocks.

        It may be the sequence itself. chunks: of the plan under way. Whoever has one keeps its blocks, which another's
        chunk may not write in the same step, and so does whoever is older than one of the same owner. Where ranks alone
        decide, nobody newer has one yet.
        """
        able = [s for s in reversed(running) if _yields(s, sequence)]
        if not self.shares.several:
            return able[0]
        planned, held = {chunk.id for chunk in chunks}, _blocks(running)
        newest = {s.owner: s.rank for s in running if s.id in planned}  # running is in order of rank
        able = [s for s in able if s.owner not in newest or s.rank > newest[s.owner]]
        return max(able, key=lambda s: (s.background, 0 if s.background else held[s.owner]))  # of equals the newest

    def beyond_its_share(self, running: list[Sequence], first: Sequence, *, seat: bool) -> Sequence | None:
        """Who gives up a seat, or else blocks, for the first of the queue: the newest of an owner that has had more
        than this one's, and holds too much of what is short. None where nobody has to."""
        if not self.shares.several or first.in_flight:
            return None
        if seat:
            held, whole, need = Counter(s.owner for s in running if not s.background), self._seats, 1
        else:
            held, whole, need = _blocks(running), self._pool.num_blocks, self._pool.blocks_for(first.total)
        share = max(whole // self.shares.owners, need)
        if held[first.owner] + need > share:
            return None
        able = [s for s in reversed(running) if _yields(s, first) and self.had_fewer(first, s)]
        return max((s for s in able if held[s.owner] > share), key=lambda s: held[s.owner], default=None)


def _blocks(running: list[Sequence]) -> Counter[str]:
    """That each owner holds."""
    held: Counter[str] = Counter()
    for sequence in running:
        held[sequence.owner] += 0 if sequence.background else len(sequence.block_table)
    return held


def _yields(sequence: Sequence, to: Sequence) -> bool:
    """Whether it may be preempted for another's sake, or its own."""
    return sequence.preemptions < PREEMPTIONS_BEFORE_RESERVE or (sequence.background and not to.background)
