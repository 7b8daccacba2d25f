"""A LoRA adapter's matrices: packed to run beside a network's own, and laid out for peft's files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import Activation
from model.linear import Linear, activate_alike
from model.ops import Ops

_LAYOUT = "base_model.model.transformer.h.{layer}.{site}.lora_{part}.weight"

Site = tuple[int, str]  # a layer's number, and one of SITES


@dataclass(frozen=True, slots=True)
class LowRank:
    """Adds `scaling * (x A^T) B^T` to what a matrix makes of x."""

    a: Tensor  # (rank, in)
    b: Tensor  # (out, rank)
    scaling: float


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
