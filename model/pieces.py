"""What vocabularies of text pieces have in common, WordPiece and unigram: not every text can be written with them.

Their libraries encode; decoding is our own, because a stream needs the text of each token as it comes.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from model import files
from model.byte_level import read_json
from model.errors import TokenizerError

UNKNOWN = " \U0010fffd"  # a character of private use, which no vocabulary has
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

Encode = Callable[[str], list[int]]


class PieceDecoder(Protocol):
    def push(self, id_: int) -> str: ...
    def flush(self) -> str: ...


class PieceTokenizer:
    """A subclass says how pieces become text."""

    kind = ""
    byte_level = False

    def __init__(
        self, pieces: Sequence[str], encode: Encode, special: Mapping[str, int], names: Mapping[str, str],
        vocab_size: int, eos_token_ids: Sequence[int],
    ) -> None:  # fmt: skip
        """encode: text without special tokens. names: bos_token and unk_token, by role. Raises TokenizerError."""
        if len(pieces) > vocab_size:
            raise TokenizerError(
                f"the vocabulary has token {len(pieces) - 1}, the model's {vocab_size} embeddings do not"
            )
        ends = tuple(id_ for id_ in eos_token_ids if id_ < len(pieces))
        if not ends:
            raise TokenizerError("the vocabulary has no end-of-text token")
        self.pieces = [*pieces, *[""] * (vocab_size - len(pieces))]
        self.vocab_size = vocab_size
        self.eos_token_ids = ends
        self.eos_token_id = ends[0]
        self.eos_token = pieces[self.eos_token_id]
        self.bos_token = names.get("bos_token", self.eos_token)
        self.unk_token = names.get("unk_token", self.eos_token)
        special = {**special, **{pieces[id_]: id_ for id_ in ends}}
        self.special_tokens = frozenset(special)
        self.special_ids = frozenset(special.values())
        self._ids = special
        self._border = re.compile("(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")")
        self._encode = encode
        shown = [self.shown(id_) for id_ in range(len(pieces))]
        self._names = self.pieces if len(set(shown)) < len(shown) else shown

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for place, part in enumerate(self._border.split(text)):
            ids += [self._ids[part]] if place % 2 else self.encode_plain(part)
        return ids

    def encode_plain(self, text: str) -> list[int]:
        return self._encode(text) if text else []

    def decode(self, ids: Iterable[int]) -> str:
        decoder = self.decoder(())
        return "".join(map(decoder.push, ids)) + decoder.flush()

    def decoder(self, after: Sequence[int]) -> PieceDecoder:
        raise NotImplementedError

    def shown(self, id_: int) -> str:
        """As logprobs show it."""
        raise NotImplementedError

    def name(self, id_: int) -> str:
        return self._names[id_] if id_ < len(self._names) else ""

    def token_bytes(self, id_: int) -> bytes:
        return self.name(id_).encode()

    def runs(self, word: str) -> list[list[int]]:
        run = self.encode(word.strip())
        return [run] if run else []


def library(name: str) -> Any:
    """A package of the extra. Raises TokenizerError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise TokenizerError(
            f"this vocabulary needs the package {name}: pip install 'gpt2-server[tokenizers]'"
        ) from None


def read_options(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json, where they exist; tokens as texts. Raises TokenizerError."""
    options: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if files.is_file(directory / name):
            options |= read_json(directory / name)
    for name in NAMES:
        if isinstance(options.get(name), dict):
            options[name] = options[name].get("content")
    return {name: value for name, value in options.items() if value is not None}


def names_in(options: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, str]:
    """Of the special tokens that have a role, those that the vocabulary has."""
    return {name: options[name] for name in NAMES if isinstance(options.get(name), str) and options[name] in ids}


def from_json(directory: Path, vocab_size: int) -> tuple[list[str], Encode, dict[str, int]]:
    """A tokenizer.json's pieces, its way to encode text without special tokens, and these. Raises TokenizerError."""
    tokenizers = library("tokenizers")
    raw = files.read_bytes(directory / "tokenizer.json", files.VOCABULARY_BYTES, TokenizerError)
    try:
        whole = tokenizers.Tokenizer.from_buffer(raw)
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerError("tokenizer.json is not a tokenizer") from error
    whole.encode_special_tokens = True
    whole.no_truncation()
    whole.no_padding()
    try:
        whole.encode(UNKNOWN, add_special_tokens=False)
    except Exception as error:
        raise TokenizerError("tokenizer.json has no token for what it does not know") from error
    vocab = whole.get_vocab(with_added_tokens=True)
    largest = max(vocab.values(), default=-1)
    if largest >= vocab_size:
        raise TokenizerError(f"the vocabulary has token {largest}, the model's {vocab_size} embeddings do not")
    special = {added.content: id_ for id_, added in whole.get_added_tokens_decoder().items() if added.special}
    return in_order(vocab), lambda text: list(whole.encode(text, add_special_tokens=False).ids), special


def in_order(vocab: Mapping[str, int]) -> list[str]:
    """Pieces by id; an id that none has is empty."""
    pieces = [""] * (max(vocab.values(), default=-1) + 1)
    for piece, id_ in vocab.items():
        pieces[id_] = piece
    return pieces
