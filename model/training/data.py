"""Text to training batches: documents tokenised once into a flat file of token ids, read back as packed windows.

Knows nothing of networks. Documents follow each other, each ended by `<|endoftext|>`, and windows cut the stream
wherever they fall, so no position is padding.
"""

from __future__ import annotations

import hashlib
import lzma
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from model.tokenizer import END_OF_TEXT, Tokenizer

TokenArray = npt.NDArray[np.uint16]


def read_documents(path: Path) -> Iterator[str]:
    """The documents of a UTF-8 text file, plain or `.xz`, in which `<|endoftext|>` stands between them."""
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8", newline="") as file:
        text = file.read()
    yield from (document for document in text.split(END_OF_TEXT) if document.strip())


def tokenise(paths: list[Path], tokenizer: Tokenizer, cache: Path) -> TokenArray:
    """All documents of `paths` as one memory-mapped array of token ids, each document ended by `<|endoftext|>`.

    The array is kept in `cache` under a hash of the files' bytes, and read from there the next time.
    """
    if tokenizer.vocab_size > 1 << 16:
        raise ValueError("token ids above 65,535 do not fit the token file")
    stored = cache / f"tokens-{_digest(paths)}.bin"
    if not stored.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = stored.with_suffix(f".{os.getpid()}.partial")
        with partial.open("wb") as file:
            for path in paths:
                for document in read_documents(path):
                    ids = [*tokenizer.encode(document), tokenizer.eos_token_id]
                    file.write(np.array(ids, dtype=np.uint16).tobytes())
        partial.replace(stored)
    return np.memmap(stored, dtype=np.uint16, mode="r")


def _digest(paths: list[Path]) -> str:
    digest = hashlib.sha256(b"gpt2 uint16 v1")
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Batch:
    inputs: npt.NDArray[np.int64]  # (rows, length)
    targets: npt.NDArray[np.int64]  # (rows, length), the inputs one token later
    starts: npt.NDArray[np.int64]  # (rows,) the position of each row's first token


class Windows:
    """Windows of a token stream in a seeded random order, every epoch another.

    A window is found from its number alone, so a run that knows how many it has used resumes where it was. The
    stream is laid out on a grid of whole contexts, shifted anew each epoch; a window shorter than the context keeps
    the position it has on that grid, and so every position is trained whatever the length.
    """

    def __init__(self, tokens: TokenArray, context: int, seed: int) -> None:
        if len(tokens) < 2 * context + 1:
            raise ValueError(f"{len(tokens)} tokens of text are too few for a context of {context}")
        self._tokens = tokens
        self._context = context
        self._seed = seed
        self._epoch: tuple[int, int, int, npt.NDArray[np.int64]] | None = None

    def batch(self, first: int, rows: int, length: int) -> Batch:
        """Windows number `first` to `first + rows` of those of `length` tokens, which divides the context."""
        assert self._context % length == 0
        begins = [self._begin(number, length) for number in range(first, first + rows)]
        taken = np.stack([self._tokens[begin : begin + length + 1] for begin, _ in begins]).astype(np.int64)
        starts = np.array([start for _, start in begins], dtype=np.int64)
        return Batch(inputs=taken[:, :-1], targets=taken[:, 1:], starts=starts)

    def _begin(self, number: int, length: int) -> tuple[int, int]:
        """Where window `number` begins in the stream, and the position its first token has."""
        per_epoch = (len(self._tokens) - 1 - self._context) // length
        epoch, index = divmod(number, per_epoch)
        if self._epoch is None or self._epoch[:2] != (epoch, length):
            random = np.random.default_rng((self._seed, epoch, length))
            phase = int(random.integers(self._context))
            self._epoch = (epoch, length, phase, random.permutation(per_epoch))
        _, _, phase, order = self._epoch
        offset = int(order[index]) * length
        return phase + offset, offset % self._context


def consecutive(tokens: TokenArray, length: int, rows: int) -> Iterator[Batch]:
    """The whole stream in order, in windows of `length` tokens from position 0: what validation reads."""
    count = (len(tokens) - 1) // length
    for first in range(0, count, rows):
        begins = np.arange(first, min(first + rows, count)) * length
        taken = np.stack([tokens[begin : begin + length + 1] for begin in begins]).astype(np.int64)
        yield Batch(inputs=taken[:, :-1], targets=taken[:, 1:], starts=np.zeros(len(begins), dtype=np.int64))
