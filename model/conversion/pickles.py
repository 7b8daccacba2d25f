"""Checkpoints as torch.save writes them. They are pickles; nothing in them is called.

`torch.load(weights_only=True)` builds tensors and plain values, and refuses a file that asks for anything else.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.conversion.layout import LazyTensor, Source, lazy, regular_size
from model.conversion.nanogpt import from_trainer
from model.conversion.state_dict import from_state_dict
from model.conversion.vocabulary import read_description
from model.errors import ConversionError
from model.files import CONFIG_BYTES, read_object

INDEX_FILE = "pytorch_model.bin.index.json"
_ASKED = re.compile(r"GLOBAL (\S+)")
_NESTED = ("state_dict", "model_state_dict", "module")  # as Lightning, many scripts, and DeepSpeed call it


class Plain:
    """Stands for a class of settings of which a checkpoint holds an instance: its attributes, and no code."""


# As scripts that were run by themselves, or imported, call the class of their settings.
_SETTINGS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (Plain, f"{module}.GPTConfig") for module in ("__main__", "model", "train_gpt2")
]


def open_pickle(path: Path) -> Any:
    """Raises ConversionError: damaged, or it asks for more than tensors and plain values."""
    regular_size(path)
    mapped = zipfile.is_zipfile(path)  # the format before 2020 cannot be mapped
    try:
        with torch.serialization.safe_globals(_SETTINGS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        asked = _ASKED.search(str(error))
        if asked is not None:
            raise ConversionError(
                f"{path.name} asks for {asked[1][:60]}, which is no tensor and might execute code: it was not opened"
            ) from None
        raise ConversionError(f"{path.name} is damaged, or was not written by torch.save") from None
    except MemoryError:
        raise
    except Exception as error:
        if "allocate" in str(error):
            raise MemoryError from None
        raise ConversionError(f"{path.name} is damaged, or was not written by torch.save") from None


def tensors_of(found: Any) -> dict[str, Tensor]:
    """Of a state dict. Raises ConversionError."""
    if not isinstance(found, dict):
        raise ConversionError("it holds no weights by name")
    for key in _NESTED:
        if isinstance(found.get(key), dict):
            return tensors_of(found[key])
    tensors = {name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise ConversionError("it holds no weights by name")
    return tensors


def open_pytorch(path: Path) -> Source:
    """One file: a trainer's checkpoint, or a state dict with its config.json beside it."""
    found = open_pickle(path)
    if isinstance(found, dict) and isinstance(found.get("model"), dict):
        return from_trainer(found, {name: lazy(t) for name, t in tensors_of(found["model"]).items()}, path)
    tensors = {name: lazy(tensor) for name, tensor in tensors_of(found).items()}
    return from_state_dict("PyTorch (pickled)", read_description(path), tensors, [path])


def open_pytorch_shards(index: Path) -> Source:
    """Several files, of which one is open at a time."""
    named = read_object(index, CONFIG_BYTES, ConversionError).get("weight_map")
    names = sorted(set(named.values())) if isinstance(named, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise ConversionError(f"{index.name} does not name files beside it")
    shards = Shards()
    tensors: dict[str, LazyTensor] = {}
    for name in names:
        tensors |= shards.tensors(index.parent / name)
    return from_state_dict("PyTorch (pickled)", read_description(index), tensors, [index.parent / n for n in names])


class Shards:
    """Keeps the one file open that was read last."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._open: dict[str, Tensor] = {}

    def tensors(self, path: Path) -> dict[str, LazyTensor]:
        return {name: self._lazy(path, name, tensor) for name, tensor in self._read(path).items()}

    def _lazy(self, path: Path, name: str, tensor: Tensor) -> LazyTensor:
        return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: self._read(path)[name])

    def _read(self, path: Path) -> dict[str, Tensor]:
        if self._path != path:
            self._open = {}
            self._open = tensors_of(open_pickle(path))
            self._path = path
        return self._open
