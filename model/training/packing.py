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
    owners: Tensor  # (rows, length) int64: the index of the example a token belongs to; PADDING, none
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


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Which examples share a row, found once for as many passes as there are."""

    length: int  # of a row
    rows: Sequence[Sequence[int]]  # indices into the examples

    def lay_out(self, examples: Sequence[Example]) -> Packed:
        return _lay_out([[(i, examples[i]) for i in row] for row in self.rows], self.length)


def arrange(examples: Sequence[Example], max_tokens: int, together: int = 1) -> list[Rectangle]:
    """Rectangles of at most `max_tokens` (or of one row) that hold every example once, in a fixed order.

    together: so many examples that follow each other are in one rectangle.
    """
    sizes = [len(example.tokens) - 1 for example in examples]
    if together == 1:
        return _rectangles(range(len(sizes)), sizes, max_tokens)
    found: list[Rectangle] = []
    group: list[int] = []
    for first in range(0, len(sizes), together):
        more = range(first, first + together)
        if group and max(sizes[i] for i in [*group, *more]) * (len(group) + together) > max_tokens:
            found += _rectangles(group, sizes, len(sizes) * max(sizes))
            group = []
        group += more
    return found + _rectangles(group, sizes, len(sizes) * max(sizes))


def _rectangles(chosen: Sequence[int], sizes: Sequence[int], max_tokens: int) -> list[Rectangle]:
    length = max(sizes[i] for i in chosen)
    rows = _best_fit([sizes[i] for i in chosen], length)
    height = max(1, max_tokens // length)
    return [
        Rectangle(length, [[chosen[i] for i in row] for row in rows[first : first + height]])
        for first in range(0, len(rows), height)
    ]


def pack(examples: Sequence[Example], max_tokens: int) -> Iterator[Packed]:
    for rectangle in arrange(examples, max_tokens):
        yield rectangle.lay_out(examples)


def _best_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Indices into `sizes`, in rows whose sizes add up to `length` at most: the longest first, each into a row with the
    least room that is enough. Rows are kept by their room, and the rooms of which there are rows as bits of a number,
    so that thousands of examples take a moment."""
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(length + 1)]
    rooms = 0  # bit r is set where a row has room r
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        enough = rooms >> sizes[i]
        if enough:
            room = sizes[i] + (enough & -enough).bit_length() - 1
            at = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, at = length, len(rows)
            rows.append([])
        rows[at].append(i)
        by_room[room - sizes[i]].append(at)
        rooms |= 1 << (room - sizes[i])
    return rows


def _lay_out(rows: Sequence[Sequence[tuple[int, Example]]], length: int) -> Packed:
    shape = (len(rows), length)
    tokens, positions = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    owners = np.full(shape, PADDING, dtype=np.int64)
    learnt = np.zeros(shape, dtype=np.bool_)
    following = np.zeros(shape, dtype=np.int64)
    for i, row in enumerate(rows):
        start = 0
        for owner, example in row:
            cut = slice(start, start + len(example.tokens) - 1)
            tokens[i, cut], following[i, cut] = example.tokens[:-1], example.tokens[1:]
            positions[i, cut] = np.arange(len(example.tokens) - 1)
            owners[i, cut], learnt[i, cut] = owner, example.learnt[1:]
            start = cut.stop
    predicts = np.flatnonzero(learnt)
    arrays = (tokens, positions, owners, predicts, following.ravel()[predicts])
    return Packed(*(torch.from_numpy(array) for array in arrays))
