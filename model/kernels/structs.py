"""The structs of kernels.h, as ctypes sees them, and how tensors become pointers in them. Loads nothing."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_double, c_float, c_int32, c_int64, c_void_p
from enum import IntEnum

import torch
from torch import Tensor

from model.batch import Batch, Wanted
from model.kv_cache import LayerCache

ABI = 4  # of kernels.h
MAX_HEAD_DIM = 256  # KB in kernels.h


class Linear(Structure):
    _fields_ = [
        ("inputs", c_int64),
        ("outputs", c_int64),
        ("kind", c_int64),
        ("panels", c_void_p),
        ("bias", c_void_p),
        ("scale", c_void_p),
    ]


class BatchStruct(Structure):
    _fields_ = [
        ("rows", c_int64),
        ("sequences", c_int64),
        ("table_width", c_int64),
        ("tokens", c_void_p),
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("query_starts", c_void_p),
        ("block_tables", c_void_p),
        ("packed", c_void_p),
        ("tiles", c_void_p),
        ("tile_count", c_int64),
    ]


class LinearCall(Structure):
    _fields_ = [
        ("w", POINTER(Linear)),
        ("x", c_void_p),
        ("residual", c_void_p),
        ("y", c_void_p),
        ("act", c_int32),
    ]


class PackCall(Structure):
    _fields_ = [
        ("w", POINTER(Linear)),
        ("weight", c_void_p),
        ("stride_out", c_int64),
        ("stride_in", c_int64),
    ]


class NormCall(Structure):
    _fields_ = [
        ("x", c_void_p),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("y", c_void_p),
        ("width", c_int64),
        ("epsilon", c_float),
    ]


class EmbedCall(Structure):
    _fields_ = [
        ("tokens", POINTER(Linear)),
        ("positions", c_void_p),
        ("y", c_void_p),
        ("width", c_int64),
    ]


class KV(Structure):
    _fields_ = [
        ("keys", c_void_p),
        ("values", c_void_p),
        ("heads", c_int64),
        ("block_size", c_int64),
        ("head_dim", c_int64),
        ("half", c_int32),
    ]


class AttentionCall(Structure):
    _fields_ = [
        ("kv", KV),
        ("qkv", c_void_p),
        ("out", c_void_p),
        ("scale", c_float),
    ]


class ScoreCall(Structure):
    _fields_ = [
        ("logits", c_void_p),
        ("width", c_int64),
        ("top", c_int64),
        ("own", c_void_p),
        ("rank", c_void_p),
        ("values", c_void_p),
        ("ids", c_void_p),
    ]


class Sampling(Structure):
    _fields_ = [
        ("top_p", c_double),
        ("typical_p", c_double),
        ("xtc_probability", c_double),
        ("xtc_threshold", c_double),
        ("dry_multiplier", c_double),
        ("dry_base", c_double),
        ("top_k", c_int64),
        ("min_tokens", c_int64),
        ("penalty_range", c_int64),
        ("dry_allowed_length", c_int64),
        ("dry_last_n", c_int64),
        ("dry_most", c_int64),
        ("allowed", c_void_p),
        ("bias_ids", c_void_p),
        ("bias", c_void_p),
        ("end_ids", c_void_p),
        ("ban_ids", c_void_p),
        ("run_tokens", c_void_p),
        ("run_starts", c_void_p),
        ("head_starts", c_void_p),
        ("tails", c_void_p),
        ("tail_starts", c_void_p),
        ("tail_tokens", c_void_p),
        ("biases", c_int64),
        ("ends", c_int64),
        ("bans", c_int64),
        ("runs", c_int64),
        ("temperature", c_float),
        ("min_p", c_float),
        ("presence", c_float),
        ("frequency", c_float),
        ("repetition", c_float),
        ("greedy", c_int32),
        ("min_p_last", c_int32),
        ("temperature_last", c_int32),
        ("adjusts", c_int32),
    ]


class SampleRow(Structure):
    _fields_ = [
        ("request", POINTER(Sampling)),
        ("tokens", c_void_p),
        ("prompt", c_int64),
        ("known", c_int64),
        ("grammar", c_void_p),
        ("uniform", c_double),
        ("coin", c_double),
    ]


class SampleCall(Structure):
    _fields_ = [
        ("logits", c_void_p),
        ("width", c_int64),
        ("rows", POINTER(SampleRow)),
        ("longest", c_int64),
        ("tokens", c_void_p),
    ]


class Step(Structure):
    _fields_ = [
        ("op", c_int64),
        ("call", c_void_p),
    ]


class Op(IntEnum):
    PACK = 0
    LINEAR = 1
    NORM = 2
    EMBED = 3
    WRITE_KV = 4
    ATTENTION = 5
    SCORE = 6
    SAMPLE = 7


Call = PackCall | LinearCall | NormCall | EmbedCall | AttentionCall | ScoreCall | SampleCall


# === Pointers ===


def steps(calls: Sequence[tuple[Op, Call]]) -> ctypes.Array[Step]:
    """The caller keeps the calls alive."""
    return (Step * len(calls))(*[Step(op, ctypes.addressof(call)) for op, call in calls])


def batch(batch: Batch) -> BatchStruct:
    assert batch.tokens.dtype == batch.positions.dtype == batch.slots.dtype == torch.int64
    assert batch.query_starts.dtype == batch.block_tables.dtype == torch.int32
    assert batch.block_tables.is_contiguous()
    assert len(batch.positions) == len(batch.tokens)
    sequences, table_width = batch.block_tables.shape
    return BatchStruct(
        rows=len(batch.tokens),
        sequences=sequences,
        table_width=table_width,
        tokens=batch.tokens.data_ptr(),
        positions=batch.positions.data_ptr(),
        slots=batch.slots.data_ptr(),
        query_starts=batch.query_starts.data_ptr(),
        block_tables=batch.block_tables.data_ptr(),
    )


def wanted(batch: Batch, wanted: Wanted) -> BatchStruct:
    """The batch as the operations from its last attention on see it."""
    assert wanted.positions.dtype == torch.int64
    assert wanted.query_starts.dtype == torch.int32
    return BatchStruct(
        rows=len(wanted.rows),
        sequences=len(batch.block_tables),
        table_width=batch.block_tables.shape[1],
        positions=wanted.positions.data_ptr(),
        query_starts=wanted.query_starts.data_ptr(),
        block_tables=batch.block_tables.data_ptr(),
    )


def ready(x: Tensor) -> Tensor:
    assert x.dtype == torch.float32
    return x.contiguous()


def width(cache: LayerCache) -> int:
    """Of a row's keys, as of its values and queries."""
    _, heads, _, head_dim = cache.keys.shape
    return heads * head_dim


def kv(cache: LayerCache) -> KV:
    _, heads, block_size, head_dim = cache.keys.shape
    assert head_dim <= MAX_HEAD_DIM
    assert cache.values.shape == cache.keys.shape
    assert cache.values.dtype == cache.keys.dtype
    assert cache.keys.is_contiguous()
    assert cache.values.is_contiguous()
    half = cache.keys.dtype == torch.float16
    return KV(cache.keys.data_ptr(), cache.values.data_ptr(), heads, block_size, head_dim, half)
