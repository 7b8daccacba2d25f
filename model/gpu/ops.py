"""GPT-2's operations on a GPU: PyTorch's matrix products and norms, and paged attention that a graph can hold.

For steps of few rows there are kernels that do several of these at once. They need Triton, whose import takes a while:
import this where there is a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.batch import Batch
from model.config import Activation
from model.errors import DeviceError
from model.gpu import cuda
from model.gpu.attention import GatheredAttention, PagedAttention
from model.gpu.linear import FixedLinear, FP32OutLinear, LayerNorm
from model.gpu.sampling import Draw
from model.kv_cache import KVCache, LayerCache
from model.linear import Linear, PlainLinear
from model.ops import Embedding, Norm, TorchOps

try:
    from model.gpu.few_rows import FewRows
    from model.gpu.triton_attention import TritonAttention
    from model.gpu.triton_sampling import draw as triton_draw
except ImportError:  # CPU builds of PyTorch come without Triton
    HAS_TRITON = False
else:
    HAS_TRITON = True


DRAW: Draw | None = triton_draw if HAS_TRITON else None


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

    def head(self, weight: Tensor) -> Linear:
        head = FP32OutLinear(self.place(weight))
        return FixedLinear(head) if self._deterministic else head

    def norm(self, weight: Tensor, bias: Tensor, epsilon: float) -> Norm:
        return LayerNorm(self.place(weight), self.place(bias), epsilon)

    def embedding(self, tokens: Tensor, positions: Tensor, head: Linear | None) -> Embedding:
        tokens, positions = self.place(tokens), self.place(positions)
        return lambda batch: F.embedding(batch.tokens, tokens) + F.embedding(batch.positions, positions)

    def write_kv(self, qkv: Tensor, cache: LayerCache, slots: Tensor) -> None:
        """Attention does it."""

    def attention(self, qkv: Tensor, cache: LayerCache, batch: Batch, scale: float) -> Tensor:
        attend = self._attention.mixed if batch.spans else self._attention.decode
        return attend(qkv, cache, batch, scale)

    def fuse(
        self, embed: Embedding, layers: Sequence[Any], cache: KVCache, activation: Activation
    ) -> Callable[[Batch], Tensor] | None:
        """Sums of few rows are taken in another order than by the layers themselves."""
        if self._deterministic or isinstance(self._attention, GatheredAttention):
            return None
        return FewRows(embed, layers, cache, activation, self)

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
