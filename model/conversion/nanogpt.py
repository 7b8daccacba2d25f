"""Checkpoints of Andrej Karpathy's trainers in PyTorch: nanoGPT's `ckpt.pt`, and build-nanogpt's `model_*.pt`.

Sources: https://github.com/karpathy/nanoGPT (train.py, model.py), https://github.com/karpathy/build-nanogpt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from model.conversion.layout import LazyTensor, Source, gpt2_config, linear_to_conv1d, unpad
from model.conversion.state_dict import plain_names
from model.errors import ConversionError

_SETTINGS = {"n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias", "dropout"}
_NUMBERS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")


def from_trainer(checkpoint: dict[str, Any], tensors: dict[str, LazyTensor], path: Path) -> Source:
    """tensors: of its `model`. Raises ConversionError."""
    settings, format_, activation = _settings(checkpoint)
    unknown = sorted(key for key in settings.keys() - _SETTINGS if settings[key] not in (None, False, 0))
    if unknown:
        raise ConversionError(f"it was made by another nanoGPT, with {unknown[0][:40]}, of which nothing is known here")
    if any(type(settings.get(key)) is not int or settings[key] <= 0 for key in _NUMBERS):
        raise ConversionError("its settings do not give the shape of a GPT-2")
    config = gpt2_config(
        layers=settings["n_layer"],
        heads=settings["n_head"],
        width=settings["n_embd"],
        positions=settings["block_size"],
        tokens=settings["vocab_size"],
        activation=activation,
    )
    named = plain_names(tensors)
    _fill_biases(named, settings["n_layer"], settings["n_embd"])
    linear_to_conv1d(named)
    unpad(config, named)
    return Source(format_, config, named, [path])


def _settings(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], str, str]:
    """And the format in words, and the activation: the two trainers differ in how they compute GELU."""
    settings = checkpoint.get("model_args")
    if isinstance(settings, dict):
        return settings, "nanoGPT", "gelu"
    settings = checkpoint.get("config")
    if settings is not None and not isinstance(settings, dict):  # an instance of its settings' class
        return dict(vars(settings)), "build-nanogpt", "gelu_new"
    raise ConversionError("it holds weights, but no settings of nanoGPT (model_args) or build-nanogpt (config)")


def _fill_biases(tensors: dict[str, LazyTensor], layers: int, width: int) -> None:
    """A network without biases (`bias=False`) is one whose biases are zero."""
    sizes = {f"h.{i}.{name}": size for i in range(layers) for name, size in (
        ("ln_1", width), ("ln_2", width), ("attn.c_attn", 3 * width), ("attn.c_proj", width),
        ("mlp.c_fc", 4 * width), ("mlp.c_proj", width),
    )}  # fmt: skip
    if any(name.endswith(".bias") for name in tensors):
        return
    for name, size in {**sizes, "ln_f": width}.items():
        weight = tensors.get(f"{name}.weight")
        tensors[f"{name}.bias"] = _zeros(size, torch.float32 if weight is None else weight.dtype)


def _zeros(size: int, dtype: torch.dtype) -> LazyTensor:
    return LazyTensor((size,), dtype, lambda: torch.zeros(size, dtype=dtype))
