"""Matrix times vector, many rows at once: the part of GPT-2 that costs.

On a CPU, PyTorch's own `F.linear` (MKL) is two to three times slower than oneDNN with weights packed once, and its rows
change in the last bit with the number of rows beside them; oneDNN's do not, from two rows on.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import Activation

_ONEDNN_NAMES = {
    Activation.GELU_TANH: ("gelu", "tanh"),
    Activation.GELU_ERF: ("gelu", "none"),
    Activation.RELU: ("relu", ""),
    Activation.SILU: ("swish", ""),
}


SINGLE_THREAD_ELEMENTS = 32768  # PyTorch's grain: an elementwise operation on fewer stays on one thread
WIDEST_UNROLLED = 32  # floats in two AVX-512 vectors, which is what its loops take at a time


class Linear(Protocol):
    """y = activation(x Wᵀ + b), or x Wᵀ + b + residual. x: (rows, in); returns (rows, out)."""

    def __call__(
        self, x: Tensor, *, activation: Activation | None = None, residual: Tensor | None = None
    ) -> Tensor: ...


def activate(x: Tensor, activation: Activation) -> Tensor:
    match activation:
        case Activation.GELU_TANH:
            return F.gelu(x, approximate="tanh")
        case Activation.GELU_ERF:
            return F.gelu(x)
        case Activation.RELU:
            return F.relu(x)
        case Activation.SILU:
            return F.silu(x)


def activate_alike(x: Tensor, activation: Activation) -> Tensor:
    """The same bits for a row, whatever rows are beside it. x: (rows, width), contiguous.

    PyTorch computes the end of what a thread is given one number at a time, which differs in the last bit from its
    vectors. Pieces that one thread gets, and that are whole vectors, have no such end; others go row by row.
    """
    width = x.shape[1]
    together = max(1, SINGLE_THREAD_ELEMENTS // width) if width % WIDEST_UNROLLED == 0 else 1
    if x.shape[0] <= together:
        return activate(x, activation)
    return torch.cat([activate(piece, activation) for piece in x.split(together)])


class OneDNNLinear:
    """fp32 on a CPU, weights in oneDNN's own layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight: (out, in)."""
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.float().contiguous())
        self._bias = None if bias is None else bias.float().contiguous()

    def __call__(self, x: Tensor, *, activation: Activation | None = None, residual: Tensor | None = None) -> Tensor:
        rows = x.shape[0]
        if rows == 1:  # a single row takes another kernel, which sums in another order
            x = x.expand(2, -1).contiguous()
            residual = None if residual is None else residual.expand(2, -1).contiguous()
        out: Tensor
        if residual is not None:
            out = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._weight, self._bias, "add")
        else:
            name, algorithm = ("none", "") if activation is None else _ONEDNN_NAMES[activation]
            out = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, name, [], algorithm)
        return out[:rows]


class PlainLinear:
    """Any device and dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight: (out, in)."""
        self.weight = weight.contiguous()
        self.bias = bias

    def __call__(self, x: Tensor, *, activation: Activation | None = None, residual: Tensor | None = None) -> Tensor:
        out = F.linear(x, self.weight, self.bias)
        if residual is not None:
            return out + residual
        return out if activation is None else activate(out, activation)
