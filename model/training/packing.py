"""Examples of unequal length laid out as rectangles of tokens. It changes what a step costs, and never its result.

Short examples share a row, told apart by a number: a token sees those before it of its own example alone, and
positions begin anew with each. A step that does not fit into memory falls into several rectangles, whose summed losses
are the step's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.training.dataset import Example

PADDING = -1


@dataclass(frozen=True, slots=True)
class Packed:
    tokens: Tensor  # (rows, length) int64
    positions: Tensor  # (rows, length) int64, from 0 in each example
    owners: Tensor  # (rows, length) int64: which example a token belongs to; PADDING, none
    predicts: Tensor  # (targets,) int64: index into the flattened (rows * length) whose next token is learnt
    targets: Tensor  # (targets,) int64: that token

    def to(self, device: torch.device) -> Packed:
        moved = (self.tokens, self.positions, self.owners, self.predicts, self.targets)
        return Packed(*(tensor.to(device) for tensor in moved))

    def mask(self) -> Tensor:
        """(rows, 1, length, length) bool: True where the first position may look at the second."""
        length = self.tokens.shape[1]
        same = self.owners.unsqueeze(2) == self.owners.unsqueeze(1)
        return (same & torch.ones(length, length, dtype=torch.bool, device=same.device).tril()).unsqueeze(1)


def pack(examples: Sequence[Example], max_tokens: int) -> Iterator[Packed]:
    """Rectangles of at most `max_tokens` (or of one row) that hold every example once, in a fixed order."""
    length = max(len(example.tokens) for example in examples) - 1
    rows = _first_fit([len(example.tokens) - 1 for example in examples], length)
    together = max(1, max_tokens // length)
    for first in range(0, len(rows), together):
        yield _lay_out([[examples[i] for i in row] for row in rows[first : first + together]], length)


def _first_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Indices into `sizes`, in rows whose sizes add up to `length` at most: the longest first, each where it fits."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = next((row for row, free in enumerate(room) if free >= sizes[i]), len(rows))
        if at == len(rows):
            rows.append([])
            room.append(length)
        rows[at].append(i)
        room[at] -= sizes[i]
    return rows


def _lay_out(rows: list[list[Example]], length: int) -> Packed:
    shape = (len(rows), length)
    tokens, positions = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    owners = np.full(shape, PADDING, dtype=np.int64)
    learnt = np.zeros(shape, dtype=np.bool_)
    following = np.zeros(shape, dtype=np.int64)
    owner = 0
    for i, row in enumerate(rows):
        start = 0
        for example in row:
            cut = slice(start, start + len(example.tokens) - 1)
            tokens[i, cut], following[i, cut] = example.tokens[:-1], example.tokens[1:]
            positions[i, cut] = np.arange(len(example.tokens) - 1)
            owners[i, cut], learnt[i, cut] = owner, example.learnt[1:]
            start, owner = cut.stop, owner + 1
    predicts = np.flatnonzero(learnt)
    arrays = (tokens, positions, owners, predicts, following.ravel()[predicts])
    return Packed(*(torch.from_numpy(array) for array in arrays))
