"""Guesses of what a sequence will say next, for the network to verify many at a time.

Speculative decoding (Leviathan, Kalman, Matias 2023; Chen et al. 2023), in the form that fits counter-based randomness:
the network samples its own token at every guessed position, with that position's own uniform number, and a guess is
right where it is that token. So the output is, byte for byte, what it would have been without guessing, and a drafter
can make an answer earlier but never another. Knows nothing of how many guesses pay; that is asked of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.gpt2 import GPT2
from model.kv_cache import KVCache
from model.row import Row, Span, lay_out
from model.step import ScheduledChunk

NGRAMS = (4, 3, 2)  # the longest that has been seen before says what comes next


class Drafter(Protocol):
    def draft(self, chunks: list[ScheduledChunk], rows: Mapping[int, Row]) -> list[list[int]]:
        """For each chunk, up to `chunk.drafts` guesses of what follows its row's known tokens."""
        ...

    def forget(self, id_: int) -> None:
        """The sequence has left."""
        ...


# === Prompt lookup ===


class PromptLookup:
    """What followed the last few tokens when they last stood in the same text (Saxena 2023, "Prompt Lookup")."""

    def __init__(self) -> None:
        self._indexes: dict[int, NgramIndex] = {}

    def draft(self, chunks: list[ScheduledChunk], rows: Mapping[int, Row]) -> list[list[int]]:
        guesses: list[list[int]] = []
        for chunk in chunks:
            row = rows[chunk.id]
            if chunk.drafts:
                index = self._indexes.setdefault(chunk.id, NgramIndex())
                guesses.append(index.continuation(row.tokens[: row.length], chunk.drafts))
            else:
                guesses.append([])
        return guesses

    def forget(self, id_: int) -> None:
        self._indexes.pop(id_, None)


class NgramIndex:
    """Where in a growing text each n-gram was last followed by something."""

    def __init__(self) -> None:
        self._after: dict[bytes, int] = {}  # an n-gram's bytes -> the position behind it
        self._indexed = 0

    def continuation(self, tokens: npt.NDArray[np.int64], count: int) -> list[int]:
        """`count` tokens that may follow, or none. tokens: (known,), those of the last call and what came since."""
        known = len(tokens)
        for end in range(self._indexed, known):
            for n in NGRAMS:
                if end >= n:
                    self._after[tokens[end - n : end].tobytes()] = end
        self._indexed = known
        for n in NGRAMS:
            start = self._after.get(tokens[known - n :].tobytes()) if known >= n else None
            if start is not None:  # what runs over the end goes round: such a text repeats itself
                return [int(tokens[start + i % (known - start)]) for i in range(count)]
        return []


# === A draft model ===


class DraftModel:
    """A smaller network of the same vocabulary, with a KV pool of its own under the same block numbers.

    It computes what the network computes of prompts, and lags behind in decoding until guesses are wanted. It draws
    them with the uniform numbers that the network will draw with, so that where the two agree, so do the tokens. Blocks
    found in the prefix cache are taken to hold its keys and values too; where they do not, its guesses are worse.
    """

    def __init__(self, model: GPT2, cache: KVCache, device: torch.device) -> None:
        self._model = model
        self._cache = cache
        self._device = device
        self._computed: dict[int, int] = {}  # tokens of each sequence whose keys and values are in the cache

    def draft(self, chunks: list[ScheduledChunk], rows: Mapping[int, Row]) -> list[list[int]]:
        guesses: dict[int, list[int]] = {chunk.id: [] for chunk in chunks}
        due = [chunk for chunk in chunks if chunk.count > 1 or chunk.drafts]
        if due:
            hidden = self._last_hidden([self._unseen(chunk, rows[chunk.id]) for chunk in due])
        for made in range(max(chunk.drafts for chunk in chunks)):
            asking = [i for i, chunk in enumerate(due) if chunk.drafts > made]
            due, hidden = [due[i] for i in asking], hidden[asking]
            asked = [rows[chunk.id] for chunk in due]
            if made:
                hidden = self._last_hidden([Span(row, row.length + made - 1, 1, 1) for row in asked])
            for chunk, row, token in zip(due, asked, self._guess(asked, hidden, made), strict=True):
                guesses[chunk.id].append(token)
                row.guess(guesses[chunk.id])
        return [guesses[chunk.id] for chunk in chunks]

    def _unseen(self, chunk: ScheduledChunk, row: Row) -> Span:
        """What it has yet to compute up to the end of the chunk: more than the chunk, where it has lagged behind."""
        start, end = min(self._computed.get(chunk.id, chunk.start), chunk.start), chunk.start + chunk.count
        self._computed[chunk.id] = end + max(chunk.drafts - 1, 0)  # the last guess is never fed back
        return Span(row, start, end - start, 1)

    def _last_hidden(self, spans: list[Span]) -> Tensor:
        """Compute spans; returns the hidden state of each one's last token: (spans, n_embd)."""
        batch = lay_out(spans, self._cache.block_size, self._device)
        return self._model.forward(batch, self._cache)

    def _guess(self, rows: list[Row], hidden: Tensor, made: int) -> list[int]:
        deciders = [row.sampling_row(made) for row in rows]
        # Where no token is left the network will find that out: whatever is guessed there is wrong.
        return [0 if token is None else token for token in self._model.sample(self._model.logits(hidden), deciders)[0]]

    def forget(self, id_: int) -> None:
        self._computed.pop(id_, None)
