"""GPT-2's operations on a GPU: PyTorch's matrix products and norms, and paged attention that a graph can hold."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.batch import Batch
from model.config import Activation
from model.errors import DeviceError
from model.gpu import cuda
from model.gpu.attention import GatheredAttention, PagedAttention
from model.kv_cache import LayerCache
from model.linear import Linear, PlainLinear
from model.ops import TorchOps

try:
    from model.gpu.triton_attention import TritonAttention
except ImportError:  # CPU builds of PyTorch come without Triton
    HAS_TRITON = False
else:
    HAS_TRITON = True

FIXED_ROWS = 64


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


class GpuOps(TorchOps):
    def __init__(
        self, device: torch.device, dtype: torch.dtype, attention: PagedAttention, *, deterministic: bool
    ) -> None:
        super().__init__(device, dtype)
        self._attention = attention
        self._deterministic = deterministic

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        plain = PlainLinear(self.place(weight), None if bias is None else self.place(bias))
        return FixedLinear(plain) if self._deterministic else plain

    def write_kv(self, qkv: Tensor, cache: LayerCache, slots: Tensor) -> None:
        self._attention.write(qkv, cache, slots)

    def attention(self, qkv: Tensor, cache: LayerCache, batch: Batch, scale: float) -> Tensor:
        if batch.spans:
            return self._attention.mixed(qkv, cache, batch, scale)
        return self._attention.decode(qkv, cache, batch.block_tables, batch.contexts, scale)

    def describe(self) -> str:
        kind = "Triton" if HAS_TRITON else "gathered"
        exact = ", deterministic" if self._deterministic else ""
        return f"{super().describe()}, {cuda.describe(self._device)}, {kind} attention{exact}"


def choose_ops(device: torch.device, dtype: torch.dtype, *, deterministic: bool) -> GpuOps:
    """Raises DeviceError."""
    if HAS_TRITON:
        return GpuOps(device, dtype, TritonAttention(deterministic=deterministic), deterministic=deterministic)
    if deterministic:
        raise DeviceError("--deterministic on a GPU needs Triton, which CUDA builds of PyTorch for Linux bring along")
    return GpuOps(device, dtype, GatheredAttention(), deterministic=False)
