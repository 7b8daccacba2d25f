"""A LoRA adapter's matrices: read from and written to peft's files, and packed to run beside a network's own."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.adapter_config import SITES, WEIGHTS_FILE, AdapterConfig, read_adapter_config
from model.config import Activation, ModelConfig
from model.errors import AdapterError
from model.linear import Linear, activate_alike
from model.ops import Ops

_NAME = re.compile(
    r"base_model\.model\.(?:transformer\.)?h\.(\d+)\.([a-z]+\.[a-z_]+)\.lora_([AB])(?:\.default)?\.weight"
)
_LAYOUT = "base_model.model.transformer.h.{layer}.{site}.lora_{part}.weight"

Site = tuple[int, str]  # a layer's number, and one of SITES


@dataclass(frozen=True, slots=True)
class LowRank:
    """Adds `scaling * (x A^T) B^T` to what a matrix makes of x."""

    a: Tensor  # (rank, in)
    b: Tensor  # (out, rank)
    scaling: float


def site_shape(config: ModelConfig, site: str) -> tuple[int, int]:
    """(in, out) of one of SITES."""
    width, inner = config.n_embd, config.n_inner
    shapes = dict(zip(SITES, ((width, 3 * width), (width, width), (width, inner), (inner, width)), strict=True))
    return shapes[site]


def read_adapter(directory: Path, config: ModelConfig) -> tuple[AdapterConfig, dict[Site, LowRank]]:
    """Of a model of this shape, in fp32. Raises AdapterError: damaged, of another shape, or not plain LoRA."""
    described = read_adapter_config(directory)
    parts: dict[Site, dict[str, Tensor]] = {}
    try:
        with safe_open(directory / WEIGHTS_FILE, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                layer, site, part = _place(name)
                parts.setdefault((layer, site), {})[part] = file.get_tensor(name).float()
    except SafetensorError as error:
        raise AdapterError(f"{WEIGHTS_FILE} is damaged or no safetensors file") from error
    except OSError as error:
        raise AdapterError(f"cannot read {WEIGHTS_FILE}: {error.strerror or 'no such file'}") from error
    if not parts:
        raise AdapterError(f"{WEIGHTS_FILE} holds no matrices")
    matrices = {place: _low_rank(place, found, described, config) for place, found in sorted(parts.items())}
    targets = tuple(site for site in SITES if any(place[1] == site for place in matrices))
    return replace(described, targets=targets), matrices


def _place(name: str) -> tuple[int, str, str]:
    match = _NAME.fullmatch(name)
    if match is None or match[2] not in SITES:
        raise AdapterError(f"the adapter has {name[:80]}, which is no LoRA matrix of GPT-2's layers")
    return int(match[1]), match[2], match[3]


def _low_rank(place: Site, found: dict[str, Tensor], described: AdapterConfig, config: ModelConfig) -> LowRank:
    layer, site = place
    if set(found) != {"A", "B"}:
        raise AdapterError(f"the adapter has one matrix of h.{layer}.{site} and not the other")
    a, b = found["A"], found["B"]
    inputs, outputs = site_shape(config, site)
    if layer >= config.n_layer or a.dim() != 2 or a.shape[1] != inputs or b.shape != (outputs, a.shape[0]):
        raise AdapterError(f"the adapter's h.{layer}.{site} does not fit the model")
    if not math.isfinite(float(a.sum(dtype=torch.float64) + b.sum(dtype=torch.float64))):
        raise AdapterError(f"the adapter's h.{layer}.{site} holds NaN or infinity")
    return LowRank(a, b, described.scaling(a.shape[0]))


def adapter_tensors(matrices: dict[Site, LowRank]) -> dict[str, Tensor]:
    """By the names of peft's file."""
    return {
        _LAYOUT.format(layer=layer, site=site, part=part): tensor.detach().to("cpu", torch.float32).contiguous()
        for (layer, site), pair in matrices.items()
        for part, tensor in (("A", pair.a), ("B", pair.b))
    }


def json_bytes(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


# === Running beside a network ===


class Adapter:
    """One adapter, packed for a device. Knows nothing of who uses it."""

    def __init__(self, matrices: dict[Site, LowRank], ops: Ops) -> None:
        self._pairs = {
            place: (ops.small_linear(pair.a), ops.small_linear(pair.b * pair.scaling))
            for place, pair in matrices.items()
        }
        self.bytes = sum(4 * (pair.a.numel() + pair.b.numel()) for pair in matrices.values())

    def delta(self, place: Site, x: Tensor) -> Tensor | None:
        """What it adds to what the matrix at `place` makes of x: (rows, in); None where it adds nothing."""
        pair = self._pairs.get(place)
        return None if pair is None else pair[1](pair[0](x))


@dataclass(frozen=True, slots=True)
class AdaptedRows:
    """Those rows of a batch that belong to one adapter."""

    adapter: Adapter
    rows: Tensor | None  # (rows of the adapter,) int64; None for all


def adapted_linear(
    place: Site,
    linear: Linear,
    x: Tensor,
    adapted: Sequence[AdaptedRows],
    *,
    activation: Activation | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """As `linear(x, ...)`, with its adapter's share for each adapted row; other rows keep every bit."""
    if len(adapted) == 1 and adapted[0].rows is None:
        return _all_adapted(adapted[0].adapter.delta(place, x), linear, x, activation, residual)
    y = linear(x, activation=activation, residual=residual)
    for part in adapted:
        assert part.rows is not None
        own = x[part.rows]
        delta = part.adapter.delta(place, own)
        if delta is None:
            continue
        if activation is None:
            y[part.rows] += delta
        else:
            y[part.rows] = activate_alike(linear(own) + delta, activation)
    return y


def _all_adapted(
    delta: Tensor | None, linear: Linear, x: Tensor, activation: Activation | None, residual: Tensor | None
) -> Tensor:
    """The same bits, without looking for rows."""
    if delta is None:
        return linear(x, activation=activation, residual=residual)
    y = linear(x, residual=residual).add_(delta)
    return y if activation is None else activate_alike(y, activation)
