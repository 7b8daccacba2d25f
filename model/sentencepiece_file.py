"""The pieces of a SentencePiece model: of its protobuf message, the few fields that a vocabulary needs.

The fields are those of sentencepiece_model.proto: ModelProto.pieces = 1 (piece = 1, score = 2, type = 3) and
ModelProto.normalizer_spec = 3 (precompiled_charsmap = 2). The encoding is protobuf's (protobuf.dev, "Encoding").
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from model.errors import TokenizerError
from model.files import VOCABULARY_BYTES, read_bytes

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # types of pieces


@dataclass(frozen=True, slots=True)
class Pieces:
    pieces: tuple[tuple[str, float], ...]  # text and score, by id
    added: tuple[tuple[str, bool], ...]  # texts that are looked for before all else, and whether they are special
    charsmap: bytes | None  # how a text is normalised


def read_pieces(path: Path) -> Pieces:
    """Raises TokenizerError."""
    pieces: list[tuple[str, float]] = []
    added: list[tuple[str, bool]] = []
    charsmap: bytes | None = None
    try:
        for field, value in _fields(read_bytes(path, VOCABULARY_BYTES, TokenizerError)):
            if field == 1 and isinstance(value, bytes):
                text, score, kind = _piece(value)
                pieces.append((text, score))
                if kind in (CONTROL, USER_DEFINED):
                    added.append((text, kind == CONTROL))
            if field == 3 and isinstance(value, bytes):
                charsmap = next((each for key, each in _fields(value) if key == 2 and isinstance(each, bytes)), None)
    except (IndexError, struct.error, UnicodeDecodeError):
        pieces = []
    if not pieces:
        raise TokenizerError(f"{path.name} is not a SentencePiece model")
    return Pieces(tuple(pieces), tuple(added), charsmap or None)


def _piece(message: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, NORMAL
    for field, value in _fields(message):
        if field == 1 and isinstance(value, bytes):
            text = value.decode()
        elif field == 2 and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
        elif field == 3 and isinstance(value, int):
            kind = value
    return text, score, kind


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field. Raises IndexError where the message is cut."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(message, at)
        else:
            size = {1: 8, 5: 4}.get(wire, len(message))
        if at + size > len(message):
            raise IndexError
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise IndexError
