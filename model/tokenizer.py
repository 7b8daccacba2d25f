"""What a tokenizer is to the rest of the program, and which one a checkpoint has. Imports no torch.

Most GPT-2s have byte-level BPE. Chinese and Japanese ones have WordPiece or a unigram vocabulary, whose libraries are
an extra: `pip install gpt2-server[tokenizers]`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from model.byte_level import END_OF_TEXT, read_byte_level, read_json
from model.errors import TokenizerError
from model.files import is_file
from model.unigram import SPIECE_NAMES, read_spiece, unigram_from_json
from model.wordpiece import read_wordpiece, wordpiece_from_json

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
    eos_token: str
    eos_token_id: int  # the one that a text is ended with
    eos_token_ids: tuple[int, ...]  # all that end a text, that one first
    bos_token: str
    unk_token: str
    special_tokens: frozenset[str]
    special_ids: frozenset[int]

    def encode(self, text: str) -> list[int]:
        """Raises UnicodeEncodeError for a lone surrogate; parsing keeps those out."""
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


def read_tokenizer(directory: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> Tokenizer:
    """By the files that are there. Raises TokenizerError: none, one that contradicts the model, no library for it."""
    if is_file(directory / "vocab.json") and is_file(directory / "merges.txt"):
        return read_byte_level(directory, vocab_size, eos_token_ids)
    if is_file(directory / "tokenizer.json"):
        return _from_json(directory, vocab_size, eos_token_ids)
    if is_file(directory / "vocab.txt"):
        return read_wordpiece(directory, vocab_size, eos_token_ids)
    for name in SPIECE_NAMES:
        if is_file(directory / name):
            return read_spiece(directory / name, vocab_size, eos_token_ids)
    raise TokenizerError(
        "the checkpoint has neither vocab.json and merges.txt nor tokenizer.json, vocab.txt or spiece.model"
    )


def _from_json(directory: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> Tokenizer:
    model = read_json(directory / "tokenizer.json").get("model")
    match model.get("type") if isinstance(model, dict) else None:
        case "WordPiece":
            return wordpiece_from_json(directory, vocab_size, eos_token_ids)
        case "Unigram":
            return unigram_from_json(directory, vocab_size, eos_token_ids)
        case _:
            return read_byte_level(directory, vocab_size, eos_token_ids)
