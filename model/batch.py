"""One step's input to the network: the tokens of many sequences, laid end to end."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Wanted:
    """Rows whose hidden states are asked for: the last few of each sequence, or none. The others are computed for their
    keys and values, which the last layer has before it attends, so it can do without them from there on."""

    rows: Tensor  # (wanted,) int64, of the batch's
    positions: Tensor  # (wanted,) int64
    query_starts: Tensor  # (sequences + 1,) int32


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequence i of the batch owns rows [query_starts[i], query_starts[i + 1]), in the order of their positions."""

    tokens: Tensor  # (rows,) int64
    positions: Tensor  # (rows,) int64, from 0 in each sequence
    slots: Tensor  # (rows,) int64: block * block_size + offset, where a row's key and value are kept
    query_starts: Tensor  # (sequences + 1,) int32
    contexts: Tensor  # (sequences,) int32: how many positions are computed once the step has run
    block_tables: Tensor  # (sequences, blocks) int32, contiguous; entries past a sequence's blocks mean nothing
    spans: tuple[tuple[int, int], ...]  # (sequences) pairs (rows, context length), for paths that loop in Python;
    # empty where every sequence has one row and no shape may depend on the contexts
    wanted: Wanted | None = None  # None for every row
