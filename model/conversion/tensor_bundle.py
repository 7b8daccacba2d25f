"""TensorFlow's checkpoints: an index of tensors (a LevelDB table of protocol buffers) and files of their bytes.

Sources: tensorflow/core/util/tensor_bundle, tensorflow/core/protobuf/tensor_bundle.proto, and LevelDB's
doc/table_format.md. Checksums are not verified; lengths are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from model.conversion.layout import LazyTensor, regular_size
from model.errors import ConversionError
from model.files import VOCABULARY_BYTES, read_bytes

_FOOTER_BYTES, _MAGIC = 48, 0xDB4775248B80FB57
_TRAILER_BYTES = 5  # after a block: how it is compressed, and its checksum
_DTYPES = {1: torch.float32, 14: torch.bfloat16, 19: torch.float16}  # DT_FLOAT, DT_BFLOAT16, DT_HALF
Field = tuple[int, int | bytes]


def read_bundle(index: Path) -> tuple[dict[str, LazyTensor], list[Path]]:
    """The tensors of floating point by name, and the files. Raises ConversionError."""
    try:
        entries = dict(_table(read_bytes(index, VOCABULARY_BYTES, ConversionError)))
        header = _fields(entries.pop(b""))
        shards = _number_of_files(header)
    except (IndexError, ValueError, KeyError, OverflowError):
        raise ConversionError(f"{index.name} is damaged, or no index of a TensorFlow checkpoint") from None
    if any(number == 2 and value for number, value in header):
        raise ConversionError("it was written by a machine of the other byte order")
    paths = [index.with_suffix(f".data-{i:05}-of-{shards:05}") for i in range(shards)]
    tensors = {}
    for name, entry in entries.items():
        tensor = _tensor(_fields(entry), paths)
        if tensor is not None:
            tensors[name.decode("utf-8", "replace")] = tensor
    return tensors, [index, *paths]


def _number_of_files(header: list[Field]) -> int:
    value = next((value for number, value in header if number == 1), 1)
    if not isinstance(value, int) or not 0 < value < 1000:
        raise ValueError("no number of files")
    return value


def _tensor(entry: list[Field], paths: list[Path]) -> LazyTensor | None:
    """None where it is of no floating point, as a counter of steps."""
    values = {number: value for number, value in entry if number != 7}
    if len(entry) != len(values):
        raise ConversionError("it keeps tensors in slices")
    dtype = _DTYPES.get(_int(values.get(1, 0)))
    if dtype is None:
        return None
    shape = tuple(
        _int(dict(_fields(_bytes(d))).get(1, 0)) for number, d in _fields(_bytes(values.get(2, b""))) if number == 2
    )
    shard, offset, size = (_int(values.get(number, 0)) for number in (3, 4, 5))
    if shard >= len(paths) or math.prod(shape) * dtype.itemsize != size or offset + size > regular_size(paths[shard]):
        raise ConversionError("its index and its data contradict each other")

    def read() -> Tensor:
        with paths[shard].open("rb") as file:
            file.seek(offset)
            return torch.frombuffer(bytearray(file.read(size)), dtype=dtype).reshape(shape)

    return LazyTensor(shape, dtype, read)


def _int(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ConversionError("its index is damaged")
    return value


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ConversionError("its index is damaged")
    return value


# === A LevelDB table ===


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Every key and value. Raises ValueError or IndexError."""
    footer = data[-_FOOTER_BYTES:]
    if len(footer) < _FOOTER_BYTES or int.from_bytes(footer[-8:], "little") != _MAGIC:
        raise ValueError("no table")
    _, at = _handle(footer, 0)  # of an index that nobody uses
    index, _ = _handle(footer, at)
    for _, handle in _block(data, *index):
        yield from _block(data, *_handle(handle, 0)[0])


def _handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    offset, at = _varint(data, at)
    size, at = _varint(data, at)
    return (offset, size), at


def _block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys are stored as what they add to a start that they share with the key before."""
    if offset + size + _TRAILER_BYTES > len(data) or data[offset + size] != 0:
        raise ValueError("a block that is compressed or cut off")
    block = data[offset : offset + size]
    end = len(block) - 4 - 4 * int.from_bytes(block[-4:], "little")  # then come the places where keys are whole
    if end < 0:
        raise ValueError("a block without its end")
    at, key = 0, b""
    while at < end:
        shared, at = _varint(block, at)
        added, at = _varint(block, at)
        length, at = _varint(block, at)
        key = key[:shared] + block[at : at + added]
        yield key, block[at + added : at + added + length]
        at += added + length


# === Protocol buffers ===


def _fields(data: bytes) -> list[Field]:
    """Numbers and values: integers, or bytes of strings and messages. Raises ValueError or IndexError."""
    at, found = 0, []
    while at < len(data):
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        value: int | bytes
        if kind == 0:
            value, at = _varint(data, at)
        else:
            if kind == 2:
                size, at = _varint(data, at)
            elif kind in (1, 5):
                size = 8 if kind == 1 else 4
            else:
                raise ValueError("a field of no kind")
            value, at = data[at : at + size], at + size
        if at > len(data):
            raise ValueError("a field that is cut off")
        found.append((number, value))
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
