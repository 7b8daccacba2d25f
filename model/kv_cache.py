"""The keys and values of every token in flight, in blocks. Who owns which block is the worker's business, not ours."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from model.config import ModelConfig
from model.memory import huge_zeros


@dataclass(frozen=True, slots=True)
class LayerCache:
    keys: Tensor  # (blocks, heads, block_size, head_dim)
    values: Tensor  # (blocks, heads, block_size, head_dim)


class KVCache:
    """One pool, allocated once. A sequence's block table says in which blocks its positions lie."""

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.n_layer, 2, num_blocks, config.n_head, block_size, config.head_dim)
        self.num_blocks = num_blocks
        self.block_size = block_size
        # zeros, not empty: memory nobody wrote must never be another request's text, nor a NaN behind a mask.
        if device.type == "cpu":
            pool = huge_zeros(prod(shape) * dtype.itemsize).view(dtype).view(shape)
        else:
            pool = torch.zeros(shape, dtype=dtype, device=device)
        self._pool = pool
        self.layers = [LayerCache(keys, values) for keys, values in pool]

    def copy(self, source: int, target: int) -> None:
        """A block's keys and values of all layers, to another block."""
        self._pool[:, :, target] = self._pool[:, :, source]
