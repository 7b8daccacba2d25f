"""A step's input in two buffers that never move: one copy to the device a step, and graphs may read them for ever.

The host's side has two copies in turn, so that a step can be written while the one before is still being read.
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
from model.row import Span

HOST = -1  # a token's source: it stands in `tokens`


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

    def __init__(self, accelerator: Accelerator, largest: Layout, block_size: int, scratch_block: int) -> None:
        """scratch_block: where rows that pad a batch write their keys and values."""
        size = sum(largest.sizes)
        self._host = [accelerator.host_buffer(size, torch.int32) for _ in range(2)]
        self._device = torch.zeros(size, dtype=torch.int32, device=accelerator.device)
        self._block_size = block_size
        self._scratch_block = scratch_block
        self._turn = 0

    def load(self, spans: list[Span], sources: dict[int, int], layout: Layout) -> None:
        """Queue the copy of a step. A layout larger than the spans is filled up with rows that read and write nothing.

        sources: of a row whose last token is not known here yet, the span's index -> where the device has it.
        """
        self._turn = 1 - self._turn
        host = self._host[self._turn]
        self._write(layout.parts(host.numpy()), spans, sources, layout)
        used = sum(layout.sizes)
        self._device[:used].copy_(host[:used], non_blocking=True)

    def _write(
        self, parts: list[npt.NDArray[np.int32]], spans: list[Span], sources: dict[int, int], layout: Layout
    ) -> None:
        tokens, origins, positions, slots, starts, contexts, flat = parts
        tables = flat.reshape(layout.sequences, layout.blocks)
        size, at = self._block_size, 0
        starts[0] = 0
        for i, span in enumerate(spans):
            row, stop, end = span.row, span.start + span.count, at + span.count
            where = np.arange(span.start, stop)
            tokens[at:end] = row.tokens[span.start : stop]
            origins[at:end] = HOST
            origins[end - 1] = sources.get(i, HOST)
            positions[at:end] = where
            slots[at:end] = row.blocks[where // size] * size + where % size
            tables[i] = row.blocks[: layout.blocks]
            contexts[i] = stop
            starts[i + 1] = at = end
        tokens[at:] = positions[at:] = 0
        origins[at:] = HOST
        slots[at:] = self._scratch_block * size
        tables[len(spans) :] = self._scratch_block
        contexts[len(spans) :] = 1
        starts[len(spans) + 1 :] = np.arange(at + 1, at + 1 + layout.sequences - len(spans))

    def batch(self, layout: Layout, sampled: Tensor, spans: tuple[tuple[int, int], ...] = ()) -> Batch:
        """What a step of this layout reads. sampled: (any,) int64, the tokens that sources point to."""
        tokens, origins, positions, slots, starts, contexts, tables = layout.views(self._device)
        known = torch.where(origins == HOST, tokens, sampled[origins.clamp(min=0)].int())
        return Batch(
            tokens=known,
            positions=positions,
            slots=slots,
            query_starts=starts,
            contexts=contexts,
            block_tables=tables.view(layout.sequences, layout.blocks),
            spans=spans,
        )
