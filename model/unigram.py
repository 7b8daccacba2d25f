"""Unigram vocabularies of SentencePiece (Kudo 2018), as Japanese GPT-2s have them, run by the library `sentencepiece`.

Text comes back as SentencePiece decodes it: `▁` is a space, but for the one at the start of a text; pieces of bytes are
UTF-8.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from pathlib import Path

from model.errors import TokenizerError
from model.files import VOCABULARY_BYTES, read_bytes
from model.pieces import Encode, PieceTokenizer, from_json, library, names_in, read_options

SPIECE_NAMES = ("spiece.model", "tokenizer.model", "sentencepiece.model")
SPACE = "\u2581"
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_utf8 = codecs.getincrementaldecoder("utf-8")


class UnigramTokenizer(PieceTokenizer):
    kind = "T5Tokenizer"

    def decoder(self, after: Sequence[int]) -> UnigramDecoder:
        return UnigramDecoder(self, at_start=all(id_ in self.special_ids or not self.pieces[id_] for id_ in after))

    def shown(self, id_: int) -> str:
        """A byte's piece as a byte, whatever it is: a letter may have a piece of its own."""
        byte = BYTE.fullmatch(self.pieces[id_])
        return f"bytes:\\x{byte[1].lower()}" if byte else self.token_bytes(id_).decode()

    def token_bytes(self, id_: int) -> bytes:
        piece = self.pieces[id_]
        if id_ in self.special_ids:
            return piece.encode()
        byte = BYTE.fullmatch(piece)
        return bytes.fromhex(byte[1]) if byte else piece.replace(SPACE, " ").encode()

    def runs(self, word: str) -> list[list[int]]:
        """At the start of a word, and inside one, where there is no `▁` before it."""
        runs = super().runs(word)
        for first, *rest in list(runs):
            inside = self.pieces[first].removeprefix(SPACE)
            if not inside and rest:
                runs.append(rest)
            elif inside != self.pieces[first] and inside in self.pieces:
                runs.append([self.pieces.index(inside), *rest])
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


def read_spiece(path: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> UnigramTokenizer:
    """Raises TokenizerError."""
    sentencepiece = library("sentencepiece")
    raw = read_bytes(path, VOCABULARY_BYTES, TokenizerError)
    if not raw:  # which the library takes for no model at all
        raise TokenizerError(f"{path.name} is empty")
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=raw)
    except (RuntimeError, OSError, TypeError) as error:
        raise TokenizerError(f"{path.name} is not a SentencePiece model") from error
    pieces = [model.id_to_piece(id_) for id_ in range(model.get_piece_size())]
    vocab = {piece: id_ for id_, piece in enumerate(pieces)}
    roles = {"bos_token": model.bos_id(), "unk_token": model.unk_id()}
    options = read_options(path.parent)
    names = {role: pieces[id_] for role, id_ in roles.items() if id_ >= 0} | names_in(options, vocab)
    special = {piece: id_ for piece, id_ in vocab.items() if model.is_control(id_) or model.is_unknown(id_)}
    special |= {name: vocab[name] for name in names.values()}
    encode = _encoder(model.encode, lower=options.get("do_lower_case") is True)
    return UnigramTokenizer(pieces, encode, special, names, vocab_size, eos_token_ids)


def _encoder(encode: Encode, *, lower: bool) -> Encode:
    return lambda text: list(encode(text.lower() if lower else text))


def unigram_from_json(directory: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> UnigramTokenizer:
    """From tokenizer.json. Raises TokenizerError."""
    pieces, encode, special = from_json(directory, vocab_size)
    options = read_options(directory)
    names = names_in(options, {piece: id_ for id_, piece in enumerate(pieces)})
    lower = options.get("do_lower_case") is True
    return UnigramTokenizer(pieces, _encoder(encode, lower=lower), special, names, vocab_size, eos_token_ids)
