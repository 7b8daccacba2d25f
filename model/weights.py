"""A checkpoint's tensors, from safetensors in the Hugging Face layout, checked before anything runs.

Nothing here can execute: pickled checkpoints are refused by name and by content.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.config import ModelConfig
from model.errors import WeightsError
from model.files import CONFIG_BYTES, WEIGHTS_BYTES, check_safetensors, read_object

Progress = Callable[[float], None]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
EMBEDDINGS, HEAD = "wte.weight", "lm_head.weight"
PREFIXES = re.compile(r"(_orig_mod|module|model|transformer)\.")
SHARD = re.compile(r"[\w.-]{1,200}\.safetensors")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CONVERT = "gpt2-server convert DIR NEW_DIR"


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor the network needs, by its Hugging Face name without the `transformer.` prefix."""
    width, inner = config.n_embd, config.n_inner
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (config.vocab_size, width),
        "wpe.weight": (config.n_positions, width),
        "ln_f.weight": (width,),
        "ln_f.bias": (width,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, width)
    for i in range(config.n_layer):
        shapes |= {f"h.{i}.{name}.{part}": (width,) for name in ("ln_1", "ln_2") for part in ("weight", "bias")}
        for name, rows, columns in (  # Conv1D: (in, out)
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, inner),
            ("mlp.c_proj", inner, width),
        ):
            shapes[f"h.{i}.{name}.weight"] = (rows, columns)
            shapes[f"h.{i}.{name}.bias"] = (columns,)
    return shapes


def read_weights(directory: Path, config: ModelConfig, progress: Progress | None = None) -> dict[str, Tensor]:
    """The tensors of `expected_shapes`, as stored (memory-mapped). Others in the file are ignored.

    Where the configuration ties the output layer to the embeddings and the file has another one nevertheless, that is
    among them too: see `as_stored`. Tied weights may have the name of either.

    progress: told the share that was read, from 0 to 1, after each tensor.

    Raises WeightsError: a file or tensor is missing, truncated, mis-shaped, not floating point, non-finite or pickled.
    """
    shapes = expected_shapes(config)
    shapes[HEAD] = shapes[EMBEDDINGS]
    found: dict[str, Tensor] = {}
    numbers = 0
    for path in _files(directory):
        for name, tensor in _tensors(path, shapes):
            _check(name, tensor, shapes[name])
            found[name] = tensor
            numbers += tensor.numel()
            if progress is not None:
                progress(min(numbers / config.parameters, 1.0))
    if config.tie_word_embeddings and HEAD in found:
        _tie(found)
    missing = sorted(expected_shapes(config).keys() - found.keys())
    if missing:
        raise WeightsError(
            f"the checkpoint lacks {missing[0]}" + (f" and {len(missing) - 1} more" * (len(missing) > 1))
        )
    return found


def _tie(found: dict[str, Tensor]) -> None:
    """Of an output layer that is the embeddings, keep one."""
    head = found.pop(HEAD)
    if not torch.equal(found.setdefault(EMBEDDINGS, head), head):
        found[HEAD] = head


def as_stored(config: ModelConfig, weights: Mapping[str, Tensor]) -> ModelConfig:
    """The configuration that these weights have: an output layer of its own overrules what config.json says."""
    return replace(config, tie_word_embeddings=False) if HEAD in weights else config


def plain_name(stored: str) -> str:
    """A tensor's name without what wrappers put before it: torch.compile, DataParallel, and modules that hold one."""
    while (cut := PREFIXES.match(stored)) is not None:
        stored = stored[cut.end() :]
    return stored


def _files(directory: Path) -> list[Path]:
    if (directory / SINGLE_FILE).exists():
        return [directory / SINGLE_FILE]
    if (directory / INDEX_FILE).exists():
        return _shards(directory)
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt")) or any(directory.glob("*.pth")):
        raise WeightsError(f"the checkpoint is pickled, which can execute code; convert it once: {CONVERT}")
    raise WeightsError(f"the checkpoint has no readable {SINGLE_FILE}")


def _shards(directory: Path) -> list[Path]:
    weight_map = read_object(directory / INDEX_FILE, CONFIG_BYTES, WeightsError).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) and SHARD.fullmatch(name) for name in names):
        raise WeightsError(f"{INDEX_FILE} does not name files of the checkpoint")
    return [directory / name for name in sorted(set(names))]


def _tensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    check_safetensors(path, WEIGHTS_BYTES, WeightsError)
    try:
        with safe_open(path, framework="pt") as file:
            for stored in file.keys():  # noqa: SIM118 - safe_open is no mapping
                name = plain_name(stored)
                if name in shapes:
                    yield name, file.get_tensor(stored)
    except SafetensorError as error:
        raise WeightsError(f"{path.name} is damaged or no safetensors file") from error
    except OSError as error:
        raise WeightsError(f"cannot read {path.name}: {error.strerror or 'not a regular file'}") from error


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise WeightsError(f"{name} has shape {tuple(tensor.shape)}, config.json asks for {shape}")
    if tensor.dtype not in FLOATS:
        kinds = ", ".join(str(kind).removeprefix("torch.") for kind in FLOATS)
        raise WeightsError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, not floating point of {kinds}")
    if not all_finite(tensor):
        raise WeightsError(f"{name} holds NaN or infinity")


def all_finite(tensor: Tensor) -> bool:
    """In one pass and without a copy: of a NaN and any number the NaN is both the smallest and the largest."""
    return tensor.numel() == 0 or all(map(math.isfinite, map(float, torch.aminmax(tensor))))
