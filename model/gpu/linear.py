"""Linear layers and norms whose weights kernels of our own can get at, and how some of them multiply."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import Activation
from model.linear import Linear

FIXED_ROWS = 64


@dataclass(frozen=True, slots=True)
class LayerNorm:
    weight: Tensor  # (n_embd,)
    bias: Tensor  # (n_embd,)
    epsilon: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.epsilon)


class FP32OutLinear:
    """Sums in fp32 as they are, not rounded to the weights' dtype: bfloat16 has no room for the logits of near ties."""

    def __init__(self, weight: Tensor) -> None:
        """weight: (out, in)."""
        self._weight = weight.T

    def __call__(self, x: Tensor, *, activation: Activation | None = None, residual: Tensor | None = None) -> Tensor:
        """Returns (rows, out) fp32."""
        assert activation is None
        assert residual is None
        if x.device.type == "cuda" and x.dtype != torch.float32:  # no other device multiplies that way
            return torch.mm(x, self._weight, out_dtype=torch.float32)
        return torch.mm(x, self._weight).float()


class FixedLinear:
    """A linear layer that always multiplies matrices of one shape, so that no row's sums depend on how many there are.

    Libraries choose a kernel, and with it an order of summation, by the shape. It costs little where the batch is
    small, since the weights are read anyway, and nothing where it is a multiple of the fixed number.
    """

    def __init__(self, linear: Linear, rows: int = FIXED_ROWS) -> None:
        self._linear = linear
        self._rows = rows

    def __call__(self, x: Tensor, *, activation: Activation | None = None, residual: Tensor | None = None) -> Tensor:
        rows, fixed = x.shape[0], self._rows
        short = -rows % fixed
        pieces = F.pad(x, (0, 0, 0, short)).split(fixed)
        out = torch.cat([self._linear(piece, activation=activation) for piece in pieces])[:rows]
        return out if residual is None else out + residual
