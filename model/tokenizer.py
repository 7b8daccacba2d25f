"""What a tokenizer is to the rest of the program, and which one a checkpoint has. Imports no torch.

Ids, texts and special tokens are those of transformers 5's AutoTokenizer on the same directory. Most GPT-2s have
byte-level BPE, which tiktoken runs; the rest is run by the library `tokenizers`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from model.byte_level import read_byte_level
from model.files import is_file
from model.tokenizer_files import END_OF_TEXT, SPIECE_NAMES, Kind, TokenizerFiles, read_files
from model.unigram import read_spiece
from model.vocabulary import Ends

__all__ = ["END_OF_TEXT", "Decoder", "Tokenizer", "read_tokenizer"]


class Decoder(Protocol):
    """Turns tokens into text as they come. Joined, what it hands out is the text; nothing is ever taken back."""

    def push(self, id_: int) -> str: ...
    def flush(self) -> str:
        """At the end: what was held back, as U+FFFD where it is no character."""
        ...


class Tokenizer(Protocol):
    """Text to token ids and back. The name of a special token in a text is that token."""

    kind: str  # transformers' name for it
    byte_level: bool  # any text can be written, and is the bytes of its tokens, joined
    vocab_size: int  # the model's; ids that the vocabulary lacks have no text
    ends: Ends
    eos_token_ids: tuple[int, ...]  # all that end a text, the one that a text is ended with first; perhaps none
    eos_token_id: int | None  # that one
    start_id: int | None  # what stands in place of an empty text
    special_tokens: frozenset[str]
    special_ids: frozenset[int]

    @property
    def named(self) -> Mapping[str, str]:
        """Texts of the special tokens that have a role, as eos_token."""
        ...

    @property
    def options(self) -> Mapping[str, Any]:
        """What else the checkpoint says of its tokenizer."""
        ...

    def encode(self, text: str) -> list[int]:
        """Raises UnicodeEncodeError for a lone surrogate; parsing keeps those out."""
        ...

    def encode_prompt(self, text: str) -> list[int]:
        """With the special tokens that the tokenizer puts around a text by itself: often none."""
        ...

    def encode_plain(self, text: str) -> list[int]:
        """Names of special tokens are text like any other."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these by themselves, special tokens too."""
        ...

    def decoder(self, after: Sequence[int]) -> Decoder:
        """Of text that follows these tokens: what a token says may depend on the one before it."""
        ...

    def token_bytes(self, id_: int) -> bytes:
        """What the token adds in the middle of a text."""
        ...

    def name(self, id_: int) -> str:
        """How logprobs show it. Distinct tokens have distinct names."""
        ...

    def runs(self, word: str) -> list[list[int]]:
        """The token runs that write a word, wherever it stands. None is empty."""
        ...


def read_tokenizer(
    directory: Path, vocab_size: int, eos_token_ids: Sequence[int], *, forced: bool = False
) -> Tokenizer:
    """The one that transformers' AutoTokenizer would read. vocab_size: the model's.

    eos_token_ids: those that the model's configuration names, of which ordinary words end nothing; with `forced`,
    exactly those that do. Raises TokenizerError: no files, files that contradict the model, no library for them.
    """
    files = read_files(directory)
    if _is_spiece_alone(files):
        return read_spiece(files, vocab_size, eos_token_ids, forced=forced)
    fast = read_byte_level(files, vocab_size, eos_token_ids, forced=forced)
    if fast is not None:
        return fast
    # The library is 10 MB that most models do without.
    library = importlib.import_module("model.library_tokenizer")
    tokenizer: Tokenizer = library.LibraryTokenizer(files, vocab_size, eos_token_ids, forced=forced)
    return tokenizer


def _is_spiece_alone(files: TokenizerFiles) -> bool:
    """A SentencePiece model of which nothing says how transformers is to read it."""
    return (
        files.kind is Kind.GPT2
        and files.json is None
        and not is_file(files.directory / "vocab.json")
        and any(is_file(files.directory / name) for name in SPIECE_NAMES)
    )
