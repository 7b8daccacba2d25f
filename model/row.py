"""One sequence as the runner knows it, and how the tokens of many are laid end to end for the network.

Knows nothing of networks, and nothing of why a sequence computes what it does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.batch import Batch, Wanted
from model.grammar import Matcher
from model.request_tables import RequestTables
from model.rng import uniforms
from model.sampling_params import SamplingParams
from model.sampling_row import SamplingRow
from model.step import GrammarState, NewSequence, ScheduledChunk
from model.variants import Variant

UNIFORMS_AHEAD = 64


class Row:
    """A sequence's tokens, block table and random numbers."""

    __slots__ = (
        "_uniforms",
        "blocks",
        "choice",
        "hidden_sum",
        "length",
        "matcher",
        "params",
        "prompt_length",
        "seed",
        "tables",
        "tokens",
        "variant",
    )

    def __init__(
        self,
        new: NewSequence,
        tables: RequestTables,
        context: int,
        max_blocks: int,
        matcher: Matcher | None = None,
        variant: Variant | None = None,
    ) -> None:
        """matcher: of the sequence's grammar, where its output has led. variant: None for the network itself."""
        known = [*new.prompt, *new.output]
        self.tokens: npt.NDArray[np.int64] = np.zeros(context, dtype=np.int64)  # past `length`: guesses, or nothing
        self.tokens[: len(known)] = known
        self.length = len(known)
        self.prompt_length = len(new.prompt)
        self.params: SamplingParams = new.params
        self.tables = tables
        self.choice = new.choice
        self.seed = new.params.seed if new.seed is None else new.seed
        self.hidden_sum: npt.NDArray[np.float64] = np.zeros(())  # (n_embd,) once something was added
        self.blocks: npt.NDArray[np.int32] = np.zeros(max_blocks, dtype=np.int32)
        self.matcher = matcher
        self.variant = variant
        self._uniforms: dict[int, tuple[int, list[float]]] = {}  # word -> the first position, and the numbers from it

    def take_blocks(self, chunk: ScheduledChunk) -> None:
        self.blocks[chunk.first_block : chunk.first_block + len(chunk.blocks)] = chunk.blocks

    def append(self, token: int) -> GrammarState | None:
        """Where it has led in the sequence's grammar."""
        if self.length < len(self.tokens):  # the last token of a full context is never fed back
            self.tokens[self.length] = token
        self.length += 1
        if self.matcher is None:
            return None
        self.matcher.advance([token])
        return self.matcher.state

    def guess(self, tokens: list[int]) -> None:
        """Lay down what may follow the known tokens."""
        self.tokens[self.length : self.length + len(tokens)] = tokens

    def sampling_row(self, guesses: int) -> SamplingRow:
        """What decides the token that follows the known ones and so many guesses."""
        position = self.length + guesses
        return SamplingRow(
            tables=self.tables,
            uniform=self.uniform(position),
            coin=self.uniform(position, word=1) if self.params.xtc_probability > 0 else 0.0,
            known=self.tokens[:position],
            prompt_length=self.prompt_length,
            grammar=self._allowed(),
        )

    def _allowed(self) -> npt.NDArray[np.uint32] | None:
        """By the sequence's grammar; see SamplingRow."""
        if self.matcher is None or self.matcher.allowed is None:
            return None
        return np.frombuffer(self.matcher.allowed, dtype="<u4")

    def uniform(self, position: int, word: int = 0) -> float:
        """Number `word` of the position's own; 0 where none is needed. Drawn ahead, since most will be asked for."""
        if self.params.greedy:
            return 0.0
        start, numbers = self._uniforms.get(word, (0, []))
        if not start <= position < start + len(numbers):
            start = position
            numbers = uniforms(self.seed, self.choice, start, UNIFORMS_AHEAD, word).tolist()
            self._uniforms[word] = start, numbers
        return numbers[position - start]


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens [start, start + count) of a row, and of how many of them, the last, the hidden state is wanted."""

    row: Row
    start: int
    count: int
    wanted: int


def lay_out(spans: list[Span], block_size: int, device: torch.device) -> Batch:
    total = sum(span.count for span in spans)
    tokens = np.empty(total, dtype=np.int64)
    positions = np.empty(total, dtype=np.int64)
    slots = np.empty(total, dtype=np.int64)
    starts = np.zeros(len(spans) + 1, dtype=np.int32)
    width = max(-(-(span.start + span.count) // block_size) for span in spans)
    tables = np.empty((len(spans), width), dtype=np.int32)
    at = 0
    for i, span in enumerate(spans):
        row, end, stop = span.row, at + span.count, span.start + span.count
        where = np.arange(span.start, stop)
        tokens[at:end] = row.tokens[span.start : stop]
        positions[at:end] = where
        slots[at:end] = row.blocks[where // block_size].astype(np.int64) * block_size + where % block_size
        tables[i] = row.blocks[:width]
        starts[i + 1] = at = end

    def place(array: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(device)

    return Batch(
        tokens=place(tokens),
        positions=place(positions),
        slots=place(slots),
        query_starts=place(starts),
        contexts=place(np.array([span.start + span.count for span in spans], dtype=np.int32)),
        block_tables=place(tables),
        spans=tuple((span.count, span.start + span.count) for span in spans),
        wanted=None if all(span.wanted == span.count for span in spans) else _wanted(spans, starts, positions, device),
    )


def _wanted(
    spans: list[Span], starts: npt.NDArray[np.int32], positions: npt.NDArray[np.int64], device: torch.device
) -> Wanted:
    """starts: (spans + 1,), positions: (rows,), of all rows."""
    rows = np.concatenate([np.arange(end - span.wanted, end) for span, end in zip(spans, starts[1:], strict=True)])
    query_starts = np.cumsum([0, *(span.wanted for span in spans)], dtype=np.int32)
    return Wanted(*(torch.from_numpy(array).to(device) for array in (rows, positions[rows], query_starts)))
