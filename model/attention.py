"""Causal attention over the paged cache, in PyTorch alone: the path that serves where no C kernel was built.

Each sequence is computed by itself, over exactly its own context, so its batch-mates cannot change a bit of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.batch import Batch
from model.kv_cache import LayerCache


def write_kv(qkv: Tensor, cache: LayerCache, slots: Tensor) -> None:
    """Store the keys and values of qkv: (rows, 3 * n_embd) at their slots."""
    _, heads, block_size, head_dim = cache.keys.shape
    _, keys, values = qkv.view(-1, 3, heads, head_dim).unbind(1)  # (rows, heads, head_dim) each
    blocks, offsets = slots // block_size, slots % block_size
    cache.keys[blocks, :, offsets] = keys.to(cache.keys.dtype)
    cache.values[blocks, :, offsets] = values.to(cache.values.dtype)


def attention(qkv: Tensor, cache: LayerCache, batch: Batch, scale: float) -> Tensor:
    """Each row attends to its sequence's positions up to its own. qkv: (rows, 3 * n_embd); returns (rows, n_embd)."""
    _, heads, block_size, head_dim = cache.keys.shape
    width = heads * head_dim
    out = torch.empty(qkv.shape[0], width, dtype=qkv.dtype, device=qkv.device)
    row = 0
    for table, (count, context) in zip(batch.block_tables, batch.spans, strict=True):
        blocks = table[: -(-context // block_size)]
        query = qkv[row : row + count, :width].view(count, heads, head_dim).transpose(0, 1)
        keys = _gather(cache.keys, blocks, context)
        values = _gather(cache.values, blocks, context)
        mixed = F.scaled_dot_product_attention(
            query.unsqueeze(0), keys, values, attn_mask=_causal(count, context, qkv.device), scale=scale
        )
        out[row : row + count] = mixed.squeeze(0).transpose(0, 1).reshape(count, width)
        row += count
    return out


def _gather(cache: Tensor, blocks: Tensor, context: int) -> Tensor:
    """(1, heads, context, head_dim) of one sequence."""
    picked = cache[blocks].transpose(0, 1)  # (heads, blocks, block_size, head_dim)
    return picked.flatten(1, 2)[:, :context].unsqueeze(0)


def _causal(count: int, context: int, device: torch.device) -> Tensor | None:
    """(count, context): True where the i-th of the last `count` positions may look. None for a single row."""
    if count == 1:
        return None
    return torch.ones(count, context, dtype=torch.bool, device=device).tril(context - count)
