"""Paged attention whose shapes do not depend on what is in the batch, so that a graph can hold it: in PyTorch alone.

It reads every sequence as long as the block table is wide, which the Triton kernels beside it do not: they serve where
Triton is there, this where it is not, and as what they are tested against.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import attention as one_by_one
from model.attention import write_kv
from model.batch import Batch
from model.kv_cache import LayerCache


class PagedAttention(Protocol):
    """Stores the keys and values of qkv: (rows, 3 * n_embd), and lets the rows attend. Returns (rows, n_embd)."""

    def decode(self, qkv: Tensor, cache: LayerCache, batch: Batch, scale: float) -> Tensor:
        """Each row is the last of its own sequence, and no row reads what another one stores."""
        ...

    def mixed(self, qkv: Tensor, cache: LayerCache, batch: Batch, scale: float) -> Tensor:
        """Any number of rows of each sequence."""
        ...


class GatheredAttention:
    def decode(self, qkv: Tensor, cache: LayerCache, batch: Batch, scale: float) -> Tensor:
        write_kv(qkv, cache, batch.slots)
        _, heads, _, head_dim = cache.keys.shape
        rows = qkv.shape[0]
        query = qkv[:, : heads * head_dim].view(rows, heads, 1, head_dim)
        keys, values = _gather(cache.keys, batch.block_tables), _gather(cache.values, batch.block_tables)
        seen = torch.arange(keys.shape[2], device=qkv.device) < batch.contexts[:, None]  # (rows, positions)
        mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=seen[:, None, None], scale=scale)
        return mixed.reshape(rows, heads * head_dim)

    def mixed(self, qkv: Tensor, cache: LayerCache, batch: Batch, scale: float) -> Tensor:
        write_kv(qkv, cache, batch.slots)
        return one_by_one(qkv, cache, batch, scale)


def _gather(cache: Tensor, tables: Tensor) -> Tensor:
    """(rows, heads, positions, head_dim), the positions that nobody wrote included."""
    return cache[tables].transpose(1, 2).flatten(2, 3)
