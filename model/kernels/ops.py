"""`model.ops.Ops` of C kernels: fp32 activations, weights kept in fp32, fp16 or int8, on the CPU, every row's result
independent of the rows beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.batch import Batch
from model.config import Activation
from model.kernels.forward import Forward, Layer
from model.kernels.layers import KernelEmbedding, KernelNorm, PackedLinear, Storage
from model.kernels.library import Kernels
from model.kernels.sampling import Sampler
from model.kv_cache import KVCache, LayerCache
from model.sampling import sample
from model.sampling_row import SamplingRow
from model.scores import Scores
from model.step import TokenLogprobs


class KernelOps:
    def __init__(self, kernels: Kernels, storage: Storage = Storage.FP32) -> None:
        self._kernels = kernels
        self._storage = storage
        self._sampler = Sampler(kernels)
        # Beside weights of fewer bits than 32, the cache keeps no more than 16.
        both = (torch.float32, torch.float16)
        self.kv_dtypes: tuple[torch.dtype, ...] = both if storage is Storage.FP32 else both[::-1]
        self.weight_bytes = {Storage.FP32: 4, Storage.FP16: 2, Storage.INT8: 1}[storage]

    def place(self, weight: Tensor) -> Tensor:
        """A copy, never the checkpoint's own memory: a single tensor of it would keep the whole file mapped."""
        return weight.to(torch.float32, copy=True, memory_format=torch.contiguous_format)

    def linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        return PackedLinear(self._kernels, weight, bias, self._storage)

    def head(self, weight: Tensor) -> PackedLinear:
        return PackedLinear(self._kernels, weight, None, self._storage, reuse=True)

    def small_linear(self, weight: Tensor) -> PackedLinear:
        return PackedLinear(self._kernels, weight, None, Storage.FP32)

    def norm(self, weight: Tensor, bias: Tensor, epsilon: float) -> KernelNorm:
        return KernelNorm(self._kernels, self.place(weight), self.place(bias), epsilon)

    def embedding(self, tokens: Tensor, positions: Tensor, head: object | None) -> KernelEmbedding:
        packed = self.linear(tokens, None) if head is None else head
        assert isinstance(packed, PackedLinear)
        return KernelEmbedding(self._kernels, packed, self.place(positions))

    def write_kv(self, qkv: Tensor, cache: LayerCache, slots: Tensor) -> None:
        self._kernels.write_kv(qkv, cache, slots)

    def attention(self, qkv: Tensor, cache: LayerCache, batch: Batch, scale: float) -> Tensor:
        return self._kernels.attention(qkv, cache, batch, scale)

    def sample(self, logits: Tensor, rows: list[SamplingRow]) -> tuple[list[int | None], list[TokenLogprobs | None]]:
        return sample(logits, rows, self._sampler, self._kernels.score)

    def score(self, logits: Tensor, tokens: Tensor, tops: Sequence[int | None]) -> Scores:
        return self._kernels.score(logits, tokens, tops)

    def fuse(self, embed: object, layers: Sequence[Layer], cache: KVCache, activation: Activation) -> Forward:
        assert isinstance(embed, KernelEmbedding)
        return Forward(self._kernels, embed, layers, cache.layers, activation)

    @property
    def kernels(self) -> Kernels:
        return self._kernels

    def describe(self) -> str:
        return f"{self._storage.name.lower()}, {self._kernels.describe()}"
