"""transformers' `flax_model.msgpack`: the nested parameters of FlaxGPT2LMHeadModel, as flax serialises them.

Source: flax's `serialization.py`: an array is an extension of type 1 that holds (shape, dtype, bytes) as msgpack, and
one of more than 2^30 bytes is a dictionary of chunks. FlaxConv1D keeps its kernel as (out, in).
"""

from __future__ import annotations

import math
import mmap
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from model.conversion.layout import MATRICES, LazyTensor, Source
from model.conversion.state_dict import from_state_dict, plain_names
from model.conversion.vocabulary import read_description
from model.errors import ConversionError

_ARRAY = 1
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_KINDS = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def open_flax(path: Path) -> Source:
    """Raises ConversionError."""
    config = read_description(path)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        parameters = msgspec.msgpack.decode(mapped, ext_hook=_array)
    except (msgspec.DecodeError, ValueError, TypeError):
        raise ConversionError(f"{path.name} is damaged, or was not written by flax") from None
    if not isinstance(parameters, dict):
        raise ConversionError(f"{path.name} holds no parameters by name")
    tensors: dict[str, LazyTensor] = {}
    _collect("", parameters, tensors)
    named = plain_names(tensors)
    for name, tensor in named.items():
        if name.endswith(MATRICES) and len(tensor.shape) == 2:
            named[name] = tensor.transposed()
    return from_state_dict("Flax", config, named, [path])


def _array(kind: int, data: memoryview) -> LazyTensor:
    if kind != _ARRAY:
        raise ValueError(f"an extension of type {kind}")
    shape, dtype, content = msgspec.msgpack.decode(data, type=tuple[list[int], str, memoryview])
    if dtype not in _DTYPES or math.prod(shape) * _DTYPES[dtype].itemsize != len(content):
        raise ValueError("an array of another size or kind")

    def read() -> Tensor:
        return torch.from_numpy(np.frombuffer(content, np.uint8).copy()).view(_DTYPES[dtype]).reshape(tuple(shape))

    return LazyTensor(tuple(shape), _DTYPES[dtype], read)


def _collect(prefix: str, found: dict[Any, Any], tensors: dict[str, LazyTensor]) -> None:
    if "__msgpack_chunked_array__" in found:
        tensors[prefix] = _joined(found)
        return
    for key, value in found.items():
        name = _KINDS.get(key, key)
        place = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(value, dict):
            _collect(place, value, tensors)
        elif isinstance(value, LazyTensor):
            tensors[place] = value
        else:
            raise ConversionError(f"it has {place[:60]}, which is no array")


def _joined(found: dict[Any, Any]) -> LazyTensor:
    shape = tuple(found["shape"][str(i)] for i in range(len(found["shape"])))
    chunks = [found["chunks"][str(i)] for i in range(len(found["chunks"]))]
    return LazyTensor(
        shape, chunks[0].dtype, lambda: torch.cat([chunk.read().flatten() for chunk in chunks]).reshape(shape)
    )
