"""Unigram vocabularies of SentencePiece (Kudo 2018) of which nothing says how transformers is to read them, run by the
library `sentencepiece`.

Text comes back as SentencePiece decodes it: `▁` is a space, but for the one at the start of a text; pieces of bytes are
UTF-8.
"""

from __future__ import annotations

import codecs
import importlib
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from model.errors import TokenizerError
from model.files import VOCABULARY_BYTES, is_file, read_bytes
from model.tokenizer_files import SPIECE_NAMES, TokenizerFiles
from model.vocabulary import Ends, decide_ends, embeds_all

SPACE = "\u2581"
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_utf8 = codecs.getincrementaldecoder("utf-8")


class UnigramTokenizer:
    kind = "T5Tokenizer"
    byte_level = False

    def __init__(
        self, model: Any, files: TokenizerFiles, vocab_size: int, declared: Sequence[int], *, forced: bool
    ) -> None:
        """model: a SentencePieceProcessor. Raises TokenizerError."""
        pieces: list[str] = [model.id_to_piece(id_) for id_ in range(model.get_piece_size())]
        ids = {piece: id_ for id_, piece in enumerate(pieces)}
        embeds_all(ids.values(), vocab_size)
        roles = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
        named = {role: text for role, text in files.named.items() if text in ids}
        self.named: dict[str, str] = {role: pieces[id_] for role, id_ in roles.items() if id_ >= 0} | named
        special = {piece for piece, id_ in ids.items() if model.is_control(id_) or model.is_unknown(id_)}
        self.special_tokens = frozenset(special | set(self.named.values()))
        self.special_ids = frozenset(ids[piece] for piece in self.special_tokens)
        self.ends: Ends = decide_ends(self.named, ids, self.special_ids, vocab_size, declared, forced=forced)
        self.eos_token_ids = self.ends.ids
        self.eos_token_id = next(iter(self.eos_token_ids), None)
        self.start_id = self.ends.start
        self.options = files.options
        self.pieces = [*pieces, *[""] * (vocab_size - len(pieces))]
        self.vocab_size = vocab_size
        self._ids = ids
        self._model = model
        self._lower = files.options.get("do_lower_case") is True
        ordered = sorted(self.special_tokens, key=len, reverse=True)
        self._border = re.compile("(" + "|".join(map(re.escape, ordered)) + ")")

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for place, part in enumerate(self._border.split(text)):
            ids += [self._ids[part]] if place % 2 else self.encode_plain(part)
        return ids

    encode_prompt = encode  # nothing is put around a text

    def encode_plain(self, text: str) -> list[int]:
        return list(self._model.encode(text.lower() if self._lower else text)) if text else []

    def decode(self, ids: Iterable[int]) -> str:
        decoder = self.decoder(())
        return "".join(map(decoder.push, ids)) + decoder.flush()

    def decoder(self, after: Sequence[int]) -> UnigramDecoder:
        return UnigramDecoder(self, at_start=all(id_ in self.special_ids or not self.pieces[id_] for id_ in after))

    def name(self, id_: int) -> str:
        return self._names[id_] if id_ < len(self._names) else ""

    @cached_property
    def _names(self) -> list[str]:
        shown = [self._shown(id_) for id_ in range(self.vocab_size)]
        met = [name for name in shown if name]
        return shown if len(set(met)) == len(met) else self.pieces

    def _shown(self, id_: int) -> str:
        """A byte's piece as a byte, whatever it is: a letter may have a piece of its own."""
        byte = BYTE.fullmatch(self.pieces[id_])
        return f"bytes:\\x{byte[1].lower()}" if byte else self.token_bytes(id_).decode()

    def token_bytes(self, id_: int) -> bytes:
        piece = self.pieces[id_]
        if id_ in self.special_ids:
            return piece.encode()
        byte = BYTE.fullmatch(piece)
        text: str = piece.replace(SPACE, " ")
        return bytes.fromhex(byte[1]) if byte else text.encode()

    def runs(self, word: str) -> list[list[int]]:
        """At the start of a word, and inside one, where there is no `▁` before it."""
        whole = self.encode(word.strip())
        if not whole:
            return []
        runs, (first, *rest) = [whole], whole
        inside = self.pieces[first].removeprefix(SPACE)
        if not inside and rest:
            runs.append(rest)
        elif inside != self.pieces[first] and inside in self._ids:
            runs.append([self._ids[inside], *rest])
        return runs


class UnigramDecoder:
    def __init__(self, tokenizer: UnigramTokenizer, *, at_start: bool) -> None:
        self._tokenizer = tokenizer
        self._at_start = at_start
        self._bytes = _utf8("replace")

    def push(self, id_: int) -> str:
        tokenizer = self._tokenizer
        raw = tokenizer.token_bytes(id_)
        if not raw:
            return ""
        if id_ in tokenizer.special_ids:
            return self.flush() + raw.decode()
        if BYTE.fullmatch(tokenizer.pieces[id_]):
            self._at_start = False
            return self._bytes.decode(raw)
        text = raw.decode()
        if self._at_start:
            self._at_start = False
            text = text.removeprefix(" ")
        return self.flush() + text

    def flush(self) -> str:
        """Bytes that no other can complete any more."""
        return self._bytes.decode(b"", True)


def read_spiece(
    files: TokenizerFiles, vocab_size: int, declared: Sequence[int], *, forced: bool = False
) -> UnigramTokenizer:
    """Raises TokenizerError."""
    path = next(files.directory / name for name in SPIECE_NAMES if is_file(files.directory / name))
    try:
        sentencepiece = importlib.import_module("sentencepiece")
    except ImportError:
        raise TokenizerError(
            "this vocabulary needs the package sentencepiece: pip install 'gpt2-server[sentencepiece]'"
        ) from None
    raw = read_bytes(path, VOCABULARY_BYTES, TokenizerError)
    if not raw:  # which the library takes for no model at all
        raise TokenizerError(f"{path.name} is empty")
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=raw)
    except (RuntimeError, OSError, TypeError) as error:
        raise TokenizerError(f"{path.name} is not a SentencePiece model") from error
    return UnigramTokenizer(model, files, vocab_size, declared, forced=forced)
