"""A step's input in a buffer that never moves: one copy to the device a step, and graphs may read it for ever.

The host's side has several copies in turn, so that a step can be written while the one before is still being read. The
device's begins with the tokens that the step before has sampled, so that one gather finds every row's token.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.batch import Batch
from model.gpu.accelerator import Accelerator
from model.gpu.seats import HOST, Seats
from model.row import Row

LOADS = 4  # two steps may be under way, each in two parts


@dataclass(frozen=True, slots=True)
class Chunks:
    """Tokens [start, start + count) of each of some rows, that sit at `seats`."""

    rows: list[Row]
    seats: npt.NDArray[np.int64]  # (chunks,)
    starts: npt.NDArray[np.int64]  # (chunks,)
    counts: npt.NDArray[np.int64]  # (chunks,)

    def part(self, start: int, stop: int) -> Chunks:
        some = slice(start, stop)
        return Chunks(self.rows[some], self.seats[some], self.starts[some], self.counts[some])

    @property
    def stops(self) -> npt.NDArray[np.int64]:
        """(chunks,): how long each row's context is once the step has run."""
        return self.starts + self.counts


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each part of a step of `rows` rows in `sequences` sequences lies in the buffer."""

    rows: int
    sequences: int
    blocks: int  # columns of the block tables

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of tokens, sources, positions, slots, query_starts, contexts, block_tables."""
        rows, sequences = self.rows, self.sequences
        return rows, rows, rows, rows, sequences + 1, sequences, sequences * self.blocks

    def parts(self, buffer: npt.NDArray[np.int32]) -> list[npt.NDArray[np.int32]]:
        ends = np.cumsum((0, *self.sizes)).tolist()
        return [buffer[start:end] for start, end in pairwise(ends)]

    def views(self, buffer: Tensor) -> list[Tensor]:
        return list(buffer[: sum(self.sizes)].split(list(self.sizes)))


class StepInputs:
    """Holds what the largest step needs."""

    def __init__(
        self, accelerator: Accelerator, largest: Layout, block_size: int, scratch_block: int, seats: Seats
    ) -> None:
        """scratch_block: where rows that pad a batch write their keys and values."""
        size = sum(largest.sizes)
        self._host = [accelerator.host_buffer(size, torch.int32) for _ in range(LOADS)]
        self._known = torch.zeros(largest.sequences + size, dtype=torch.int32, device=accelerator.device)
        self.sampled = self._known[: largest.sequences]  # of the step before, by its places
        self._device = self._known[largest.sequences :]
        self._block_size = block_size
        self._scratch_block = scratch_block
        self._seats = seats
        self._turn = 0

    def load(self, chunks: Chunks, layout: Layout) -> None:
        """Queue the copy of a step, or of a part of it.

        A layout larger than the chunks is filled up with rows that read and write nothing.

        A last token that the device has, by its seat's place, is taken from there.
        """
        self._turn = (self._turn + 1) % LOADS
        host = self._host[self._turn]
        self._write(layout.parts(host.numpy()), chunks, layout)
        used = sum(layout.sizes)
        self._device[:used].copy_(host[:used], non_blocking=True)

    def _write(self, parts: list[npt.NDArray[np.int32]], chunks: Chunks, layout: Layout) -> None:
        tokens, sources, positions, slots, starts, contexts, flat = parts
        tables = flat.reshape(layout.sequences, layout.blocks)
        counts, count, size = chunks.counts, len(chunks.rows), self._block_size
        ends = counts.cumsum()  # in the step's rows
        total = int(ends[-1]) if count else 0
        owners = np.repeat(np.arange(count), counts)  # (total,)
        where = np.arange(total) + (chunks.stops - ends)[owners]  # each row's position
        blocks = self._seats.tables[chunks.seats[owners], where // size]
        places = self._seats.places[chunks.seats]
        for i in np.flatnonzero((counts > 1) | (places == HOST)):  # the others' only token is on the device
            tokens[ends[i] - counts[i] : ends[i]] = chunks.rows[i].tokens[chunks.starts[i] : chunks.stops[i]]
        first = len(self.sampled)  # where the device's copy of `tokens` begins
        sources[:] = np.arange(first, first + layout.rows)
        sources[ends - 1] = np.where(places == HOST, sources[ends - 1], places)
        positions[:total], positions[total:] = where, 0
        slots[:total], slots[total:] = blocks * size + where % size, self._scratch_block * size
        tables[:count], tables[count:] = self._seats.tables[chunks.seats, : layout.blocks], self._scratch_block
        contexts[:count], contexts[count:] = chunks.stops, 1
        starts[0] = 0
        starts[1 : count + 1] = ends
        starts[count + 1 :] = np.arange(total + 1, total + 1 + layout.sequences - count)
        tokens[total:] = 0

    def batch(self, layout: Layout, spans: tuple[tuple[int, int], ...] = ()) -> Batch:
        """What a step of this layout reads."""
        _, sources, positions, slots, starts, contexts, tables = layout.views(self._device)
        return Batch(
            tokens=self._known.index_select(0, sources),
            positions=positions,
            slots=slots,
            query_starts=starts,
            contexts=contexts,
            block_tables=tables.view(layout.sequences, layout.blocks),
            spans=spans,
        )
