"""Paged attention in Triton: blocks are read where they lie, and only those that a sequence has.

Decoding: "flash-decoding" (Dao, Haziza, Massa, Sizov 2023) with splits of a fixed length, so that neither the batch nor
the longest context in it changes the order of any sum. Several rows of a sequence: flash attention (Dao et al. 2022).
Arithmetic is fp32 throughout, but for the products of keys and values in a prefill, which have the cache's dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.batch import Batch
from model.kv_cache import LayerCache

SPLIT = 256  # positions that one program of a decode step reads
TILE = 64  # positions that it reads at once
VARYING = ["table_width", "splits"]  # from step to step: no kernel is compiled anew for what these happen to be
PREFILL = {2: (64, 64), 4: (32, 32)}  # rows and positions that one program of a prefill takes, by the size of a number


@triton.jit
def _write(qkv, keys, values, slots, heads, block_size, head_dim, stride, WIDTH: tl.constexpr):
    """One program a row and head."""
    row, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    place = ((slot // block_size) * heads + head) * block_size + slot % block_size
    column = tl.arange(0, WIDTH)
    inside = column < head_dim
    source = row.to(tl.int64) * stride + heads * head_dim + head * head_dim + column
    target = place * head_dim + column
    tl.store(keys + target, tl.load(qkv + source, inside), inside)
    tl.store(values + target, tl.load(qkv + source + heads * head_dim, inside), inside)


@triton.jit(do_not_specialize=VARYING)
def _decode(
    qkv, keys, values, tables, owners, contexts, partial, scale, heads, block_size, head_dim, stride, table_width,
    splits, ALONE: tl.constexpr, SPLIT: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program a row, head and split: its maximum, its sum of exponentials, its weighted values.

    The row's own key and value are taken from where they were computed, after all others. ALONE: each row has a table
    to itself, and they are stored too.
    """
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    own = tl.load(contexts + row) - 1
    start = split * SPLIT
    if start <= own:
        column = tl.arange(0, WIDTH)
        inside = column < head_dim
        here = qkv + row.to(tl.int64) * stride + head * head_dim + column
        query = tl.load(here, inside, 0.0).to(tl.float32) * scale
        table = tables + (row if ALONE else tl.load(owners + row)) * table_width
        highest = -float("inf")
        total = 0.0
        mixed = tl.zeros([WIDTH], tl.float32)
        stop = tl.minimum(start + SPLIT, own)
        for first in range(start, stop, TILE):
            position = first + tl.arange(0, TILE)
            seen = position < stop
            block = tl.load(table + position // block_size, seen, 0).to(tl.int64)
            place = ((block * heads + head) * block_size + position % block_size) * head_dim
            where = place[:, None] + column[None, :]
            both = seen[:, None] & inside[None, :]
            key = tl.load(keys + where, both, 0.0).to(tl.float32)
            value = tl.load(values + where, both, 0.0).to(tl.float32)
            score = tl.where(seen, tl.sum(key * query[None, :], 1), -float("inf"))
            peak = tl.maximum(highest, tl.max(score, 0))
            weight = tl.exp(score - peak)
            shrink = tl.exp(highest - peak)
            total = total * shrink + tl.sum(weight, 0)
            mixed = mixed * shrink + tl.sum(value * weight[:, None], 0)
            highest = peak
        if own < start + SPLIT:
            key = tl.load(here + heads * head_dim, inside, 0.0)
            value = tl.load(here + 2 * heads * head_dim, inside, 0.0)
            if ALONE:
                block = tl.load(table + own // block_size).to(tl.int64)
                place = ((block * heads + head) * block_size + own % block_size) * head_dim + column
                tl.store(keys + place, key, inside)
                tl.store(values + place, value, inside)
            score = tl.sum(key.to(tl.float32) * query, 0)
            peak = tl.maximum(highest, score)
            weight = tl.exp(score - peak)
            shrink = tl.exp(highest - peak)
            total = total * shrink + weight
            mixed = mixed * shrink + value.to(tl.float32) * weight
            highest = peak
        out = partial + ((row.to(tl.int64) * heads + head) * splits + split) * (WIDTH + 2)
        tl.store(out, highest)
        tl.store(out + 1, total)
        tl.store(out + 2 + column, mixed)


@triton.jit(do_not_specialize=VARYING)
def _merge(partial, contexts, out, heads, head_dim, splits, SPLIT: tl.constexpr, WIDTH: tl.constexpr):
    """One program a row and head: its splits, in order."""
    row, head = tl.program_id(0), tl.program_id(1)
    context = tl.load(contexts + row)
    column = tl.arange(0, WIDTH)
    highest = -float("inf")
    total = 0.0
    mixed = tl.zeros([WIDTH], tl.float32)
    for split in range(tl.cdiv(context, SPLIT)):
        part = partial + ((row.to(tl.int64) * heads + head) * splits + split) * (WIDTH + 2)
        peak = tl.maximum(highest, tl.load(part))
        shrink = tl.exp(highest - peak)
        weight = tl.exp(tl.load(part) - peak)
        total = total * shrink + tl.load(part + 1) * weight
        mixed = mixed * shrink + tl.load(part + 2 + column) * weight
        highest = peak
    target = (row.to(tl.int64) * heads + head) * head_dim + column
    tl.store(out + target, (mixed / total).to(out.dtype.element_ty), column < head_dim)


@triton.jit(do_not_specialize=VARYING)
def _prefill(
    qkv, keys, values, tables, starts, contexts, out, scale, heads, block_size, head_dim, stride, table_width,
    QUERIES: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program a tile of rows of one sequence, and head."""
    tile, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(starts + sequence)
    count = tl.load(starts + sequence + 1) - start
    if tile * QUERIES < count:
        context = tl.load(contexts + sequence)
        nth = tile * QUERIES + tl.arange(0, QUERIES)
        own = context - count + nth  # the rows' positions
        column = tl.arange(0, WIDTH)
        inside = column < head_dim
        rows = (start + nth).to(tl.int64)
        here = (nth < count)[:, None] & inside[None, :]
        query = tl.load(qkv + rows[:, None] * stride + head * head_dim + column[None, :], here, 0.0)
        table = tables + sequence * table_width
        highest = tl.full([QUERIES], -float("inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        mixed = tl.zeros([QUERIES, WIDTH], tl.float32)
        stop = tl.minimum(context, context - count + (tile + 1) * QUERIES)
        for first in range(0, stop, TILE):
            position = first + tl.arange(0, TILE)
            seen = position < stop
            block = tl.load(table + position // block_size, seen, 0).to(tl.int64)
            place = ((block * heads + head) * block_size + position % block_size) * head_dim
            where = place[:, None] + column[None, :]
            both = seen[:, None] & inside[None, :]
            key = tl.load(keys + where, both, 0.0)
            score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
            score = tl.where(position[None, :] <= own[:, None], score, -float("inf"))
            peak = tl.maximum(highest, tl.max(score, 1))
            weight = tl.exp(score - peak[:, None])
            shrink = tl.exp(highest - peak)
            value = tl.load(values + where, both, 0.0)
            total = total * shrink + tl.sum(weight, 1)
            mixed = mixed * shrink[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
            highest = peak
        target = (rows[:, None] * heads + head) * head_dim + column[None, :]
        tl.store(out + target, (mixed / total[:, None]).to(out.dtype.element_ty), here)


class TritonAttention:
    """deterministic: rows of a prefill take the way of decoding, whose sums never change their order."""

    def __init__(self, *, deterministic: bool) -> None:
        self._deterministic = deterministic

    def decode(self, qkv: Tensor, cache: LayerCache, batch: Batch, scale: float) -> Tensor:
        return _attend(qkv, cache, batch.block_tables, None, batch.contexts, scale)

    def mixed(self, qkv: Tensor, cache: LayerCache, batch: Batch, scale: float) -> Tensor:
        _, heads, block_size, head_dim = cache.keys.shape
        width = triton.next_power_of_2(head_dim)
        _write[(qkv.shape[0], heads)](
            qkv, cache.keys, cache.values, batch.slots, heads, block_size, head_dim, qkv.stride(0),
            WIDTH=width, num_warps=1,
        )  # fmt: skip
        tables = batch.block_tables
        if self._deterministic:
            counts = batch.query_starts.diff()
            owners = torch.arange(len(counts), device=qkv.device, dtype=torch.int32)
            owners = owners.repeat_interleave(counts, output_size=qkv.shape[0])
            return _attend(qkv, cache, tables, owners, batch.positions.int() + 1, scale)
        out = torch.empty(qkv.shape[0], heads * head_dim, dtype=qkv.dtype, device=qkv.device)
        queries, tile = PREFILL[qkv.itemsize]
        grid = (triton.cdiv(max(count for count, _ in batch.spans), queries), heads, tables.shape[0])
        _prefill[grid](
            qkv, cache.keys, cache.values, tables, batch.query_starts, batch.contexts, out, scale, heads, block_size,
            head_dim, qkv.stride(0), tables.shape[1],
            QUERIES=queries, TILE=tile, WIDTH=max(16, width),
        )  # fmt: skip
        return out


def _attend(
    qkv: Tensor, cache: LayerCache, tables: Tensor, owners: Tensor | None, contexts: Tensor, scale: float
) -> Tensor:
    """owners: (rows,) int32, each row's line of the tables, where they are stored already; None where every row has
    one to itself. contexts: (rows,) int32, how many positions each sees."""
    _, heads, block_size, head_dim = cache.keys.shape
    rows, table_width = qkv.shape[0], tables.shape[1]
    width = triton.next_power_of_2(head_dim)
    splits = triton.cdiv(table_width * block_size, SPLIT)
    partial = torch.empty(rows, heads, splits, width + 2, dtype=torch.float32, device=qkv.device)
    out = torch.empty(rows, heads * head_dim, dtype=qkv.dtype, device=qkv.device)
    _decode[(rows, heads, splits)](
        qkv, cache.keys, cache.values, tables, contexts if owners is None else owners, contexts, partial, scale, heads,
        block_size, head_dim, qkv.stride(0), table_width, splits,
        ALONE=owners is None, SPLIT=SPLIT, TILE=TILE, WIDTH=width,
    )  # fmt: skip
    _merge[(rows, heads)](partial, contexts, out, heads, head_dim, splits, SPLIT=SPLIT, WIDTH=width, num_warps=1)
    return out
