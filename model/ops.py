"""What the network is made of, and the PyTorch way to make it: any device, any dtype, no compiler needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import attention, write_kv
from model.batch import Batch
from model.config import Activation
from model.kv_cache import KVCache, LayerCache
from model.linear import Linear, OneDNNLinear, PlainLinear
from model.sampling import sample
from model.sampling_row import SamplingRow
from model.scores import Scores, score
from model.step import TokenLogprobs


class Norm(Protocol):
    """Layer normalisation over the last dimension. x: (rows, n_embd)."""

    def __call__(self, x: Tensor) -> Tensor: ...


class Embedding(Protocol):
    """The sum of each token's vector and its position's. Returns (rows, n_embd)."""

    def __call__(self, batch: Batch) -> Tensor: ...


class Ops(Protocol):
    """The operations GPT-2 needs, for one device and dtype."""

    kv_dtypes: tuple[torch.dtype, ...]  # what the KV cache may be of; the one to take first
    weight_bytes: int  # of a linear layer's weight as it is kept

    def place(self, weight: Tensor) -> Tensor: ...
    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear: ...
    def head(self, weight: Tensor) -> Linear:
        """With very many outputs; a result is good until the next call."""
        ...

    def small_linear(self, weight: Tensor) -> Linear:
        """Of a matrix so small that keeping it in fewer bits would save nothing."""
        ...

    def norm(self, weight: Tensor, bias: Tensor, epsilon: float) -> Norm: ...
    def embedding(self, tokens: Tensor, positions: Tensor, head: Linear | None) -> Embedding:
        """tokens: (vocab, n_embd), positions: (n_positions, n_embd), head: `head` of the tokens, or None."""
        ...

    def write_kv(self, qkv: Tensor, cache: LayerCache, slots: Tensor) -> None: ...
    def attention(self, qkv: Tensor, cache: LayerCache, batch: Batch, scale: float) -> Tensor: ...
    def sample(self, logits: Tensor, rows: list[SamplingRow]) -> tuple[list[int | None], list[TokenLogprobs | None]]:
        """As `model.sampling.sample`."""
        ...

    def score(self, logits: Tensor, tokens: Tensor, tops: Sequence[int | None]) -> Scores:
        """As `model.scores.score`."""
        ...

    def fuse(
        self, embed: Embedding, layers: Sequence[Any], cache: KVCache, activation: Activation
    ) -> Callable[[Batch], Tensor] | None:
        """All layers in one call, on a CPU with the bits of one after the other; None where there is no such thing.

        Returns the hidden states of the rows that are wanted.
        """
        ...

    def describe(self) -> str:
        """A few words for the start-up line."""
        ...


class TorchOps:
    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._dtype = dtype
        self.kv_dtypes: tuple[torch.dtype, ...] = (dtype,)
        self.weight_bytes = dtype.itemsize

    def place(self, weight: Tensor) -> Tensor:
        return weight.to(self._device, self._dtype).contiguous()

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        if self._device.type == "cpu" and self._dtype == torch.float32 and torch.backends.mkldnn.is_available():
            return OneDNNLinear(weight, bias)
        return PlainLinear(self.place(weight), None if bias is None else self.place(bias))

    def head(self, weight: Tensor) -> Linear:
        return self.linear(weight, None)

    def small_linear(self, weight: Tensor) -> Linear:
        return self.linear(weight, None)

    def norm(self, weight: Tensor, bias: Tensor, epsilon: float) -> Norm:
        weight, bias = self.place(weight), self.place(bias)
        return lambda x: F.layer_norm(x, (x.shape[-1],), weight, bias, epsilon)

    def embedding(self, tokens: Tensor, positions: Tensor, head: Linear | None) -> Embedding:
        tokens, positions = self.place(tokens), self.place(positions)
        return lambda batch: tokens[batch.tokens] + positions[batch.positions]

    def write_kv(self, qkv: Tensor, cache: LayerCache, slots: Tensor) -> None:
        write_kv(qkv, cache, slots)

    def attention(self, qkv: Tensor, cache: LayerCache, batch: Batch, scale: float) -> Tensor:
        return attention(qkv, cache, batch, scale)

    def sample(self, logits: Tensor, rows: list[SamplingRow]) -> tuple[list[int | None], list[TokenLogprobs | None]]:
        return sample(logits, rows)

    def score(self, logits: Tensor, tokens: Tensor, tops: Sequence[int | None]) -> Scores:
        return score(logits, tokens, tops)

    def fuse(
        self, embed: Embedding, layers: Sequence[Any], cache: KVCache, activation: Activation
    ) -> Callable[[Batch], Tensor] | None:
        return None

    def describe(self) -> str:
        return f"{str(self._dtype).removeprefix('torch.')}, PyTorch {torch.__version__}"
