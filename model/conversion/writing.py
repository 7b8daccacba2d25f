"""Writes a model in the Hugging Face layout, holding one tensor in memory at a time."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import parse_config
from model.conversion.layout import DTYPES, LazyTensor, Source
from model.errors import ConversionError
from model.weights import SINGLE_FILE, all_finite, expected_shapes

SOURCE_FILE = "SOURCE.json"
READ_BYTES = 1 << 20
_HEAD, _EMBEDDINGS = "lm_head.weight", "wte.weight"


def write_model(source: Source, directory: Path) -> None:
    """Raises ConversionError or ConfigError: a tensor is missing, mis-shaped or not finite, or the disk is full."""
    tensors = dict(source.tensors)
    _settle_head(source.config, tensors)
    shapes = expected_shapes(parse_config(source.config))
    missing = sorted(shapes.keys() - tensors.keys())
    if missing:
        more = f" and {len(missing) - 1} more" * (len(missing) > 1)
        raise ConversionError(f"it lacks {missing[0]}{more}")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise ConversionError(f"{name} has shape {tensors[name].shape}; the model's shape asks for {shape}")
    stored = {name if name == _HEAD else f"transformer.{name}": tensors[name] for name in sorted(shapes)}
    write_safetensors(directory / SINGLE_FILE, stored)
    for name, data in source.tokenizer.items():
        (directory / name).write_bytes(data)
    _write_json(directory / "config.json", source.config)
    digests = {path.name: _sha256(path) for path in source.files}
    _write_json(directory / SOURCE_FILE, {"format": source.format, "sha256": digests})


def _settle_head(config: dict[str, Any], tensors: dict[str, LazyTensor]) -> None:
    """Equal to the embeddings, it is tied to them; otherwise the model has a head of its own."""
    if _HEAD not in tensors:
        return
    tensors.setdefault(_EMBEDDINGS, tensors[_HEAD])
    same = tensors[_HEAD].shape == tensors[_EMBEDDINGS].shape
    if same and torch.equal(tensors[_HEAD].read(), tensors[_EMBEDDINGS].read()):
        if config.get("tie_word_embeddings", True):
            del tensors[_HEAD]
    else:
        config["tie_word_embeddings"] = False


def write_safetensors(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Source: the format's own page, https://huggingface.co/docs/safetensors. Raises ConversionError."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        dtype = _stored_dtype(name, tensor)
        start, end = end, end + math.prod(tensor.shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    if shutil.disk_usage(path.parent).free < end:
        raise ConversionError(f"there are less than the {end / (1 << 30):.1f} GiB of disk that the result takes")
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name, tensor in tensors.items():
            file.write(_bytes(name, tensor))


def _stored_dtype(name: str, tensor: LazyTensor) -> torch.dtype:
    if tensor.dtype in DTYPES:
        return tensor.dtype
    if tensor.dtype == torch.float64:
        return torch.float32
    raise ConversionError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, not floating point")


def _bytes(name: str, lazy: LazyTensor) -> memoryview:
    tensor: Tensor = lazy.read().detach()
    if tuple(tensor.shape) != lazy.shape or tensor.dtype != lazy.dtype:
        raise ConversionError(f"{name} is not what its file announces")
    if not all_finite(tensor):
        raise ConversionError(f"{name} holds NaN or infinity")
    tensor = tensor.to(_stored_dtype(name, lazy)).contiguous()
    data: memoryview = tensor.flatten().view(torch.uint8).numpy().data
    return data


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(READ_BYTES):
            digest.update(data)
    return digest.hexdigest()
