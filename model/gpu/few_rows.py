"""All layers for a decode step of few rows: six kernels a layer, where one after the other they are eleven."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from model.batch import Batch
from model.config import Activation
from model.gpu.linear import LayerNorm
from model.gpu.triton_linear import FEW, few_rows
from model.kv_cache import KVCache, LayerCache
from model.linear import PlainLinear
from model.ops import Embedding, Ops


class FewRows:
    """Other steps it leaves to the layers themselves."""

    def __init__(
        self, embed: Embedding, layers: Sequence[Any], cache: KVCache, activation: Activation, ops: Ops
    ) -> None:
        """layers: `model.gpt2.Layer`s of LayerNorms and PlainLinears."""
        self._embed = embed
        self._layers = layers
        self._cache = cache
        self._activation = activation
        self._ops = ops

    def __call__(self, batch: Batch) -> Tensor:
        hidden = self._embed(batch)
        few = not batch.spans and hidden.shape[0] <= FEW
        for layer, cache in zip(self._layers, self._cache.layers, strict=False):
            if few:
                hidden = self._layer(layer, hidden, cache, batch)
            else:
                hidden = layer(hidden, cache, batch, self._ops, self._activation)
        return hidden if batch.wanted is None else hidden[batch.wanted.rows]

    def _layer(self, layer: Any, hidden: Tensor, cache: LayerCache, batch: Batch) -> Tensor:
        """As `Layer.__call__`."""
        qkv = _linear(layer.attend_in, hidden, norm=layer.norm_1)
        mixed = self._ops.attention(qkv, cache, batch, layer.scale)
        hidden = _linear(layer.attend_out, mixed, residual=hidden)
        wide = _linear(layer.mlp_in, hidden, norm=layer.norm_2, activation=self._activation)
        return _linear(layer.mlp_out, wide, residual=hidden)


def _linear(
    linear: PlainLinear,
    x: Tensor,
    *,
    norm: LayerNorm | None = None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    assert linear.bias is not None, "GPT-2's layers have biases"
    parts = None if norm is None else (norm.weight, norm.bias, norm.epsilon)
    return few_rows(x, linear.weight, linear.bias, norm=parts, activation=activation, residual=residual)
