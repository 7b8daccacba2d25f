"""How many KV blocks to make."""

from __future__ import annotations


def pool_size(
    *, kv_cache_bytes: int, bytes_per_token: int, block_size: int, max_num_seqs: int, max_model_len: int
) -> int:
    """As many blocks as all seats could ever fill, within the memory allowed, and never fewer than one context needs.

    A pool smaller than one context could not finish a lone sequence, so that much is taken whatever is allowed.
    """
    one_context = -(-max_model_len // block_size)
    affordable = kv_cache_bytes // (bytes_per_token * block_size)
    return max(one_context, min(affordable, max_num_seqs * one_context))
