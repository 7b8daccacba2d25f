"""From a batch to hidden states, all layers in one call: the bits of layer by layer, without the Python between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from model.batch import Batch
from model.config import Activation
from model.kernels import structs
from model.kernels.layers import KernelEmbedding, KernelNorm, PackedLinear
from model.kernels.library import Kernels
from model.kv_cache import LayerCache

ROWS_KEPT = 512  # room for so many rows is never given back
CALLS = 256  # in a row that need less than a quarter of the room before it is


class Layer(Protocol):
    """`model.gpt2.Layer`. Its parts were made by KernelOps."""

    @property
    def norm_1(self) -> object: ...
    @property
    def attend_in(self) -> object: ...
    @property
    def attend_out(self) -> object: ...
    @property
    def norm_2(self) -> object: ...
    @property
    def mlp_in(self) -> object: ...
    @property
    def mlp_out(self) -> object: ...
    @property
    def scale(self) -> float: ...


class Forward:
    def __init__(
        self,
        kernels: Kernels,
        embed: KernelEmbedding,
        layers: Sequence[Layer],
        caches: Sequence[LayerCache],
        activation: Activation,
    ) -> None:
        """caches: one for each layer, or more; they stay where they are in memory as long as this lives."""
        self._kernels = kernels
        self._embed = embed
        self._layers = layers
        self._caches = caches
        self._activation = activation
        self._small = 0  # calls in a row that needed little of the room
        self._record(1)

    def __call__(self, batch: Batch) -> Tensor:
        """Hidden states (wanted rows, n_embd), good until the next call."""
        rows, wanted = len(batch.tokens), batch.wanted
        assert len(batch.slots) == rows
        assert len(batch.query_starts) == len(batch.block_tables) + 1
        room = len(self._hidden)
        self._small = self._small + 1 if room > ROWS_KEPT and rows < room // 4 else 0
        if rows > room:
            self._record(max(rows, 2 * room))
        elif self._small == CALLS:
            self._small = 0
            self._record(max(rows, ROWS_KEPT))
        if wanted is None:
            self._kernels.run(self._steps, structs.batch(batch))
            return self._hidden[:rows]
        self._kernels.run(self._until_kv, structs.batch(batch))
        if count := len(wanted.rows):
            for kept in (self._hidden, self._queries):
                kept[:count] = kept[wanted.rows]
            self._kernels.run(self._from_kv, structs.wanted(batch, wanted))
        return self._hidden[:count]

    def _record(self, rows: int) -> None:
        width = self._embed.width
        hidden, normed, mixed = (torch.empty(rows, width) for _ in range(3))
        qkv, wide = torch.empty(rows, 3 * width), torch.empty(rows, _linear(self._layers[0].mlp_in).outputs)
        calls: list[tuple[structs.Op, structs.Call]] = [(structs.Op.EMBED, self._embed.call(hidden))]
        for layer, cache in zip(self._layers, self._caches, strict=False):
            attention = structs.AttentionCall(structs.kv(cache), qkv.data_ptr(), mixed.data_ptr(), layer.scale)
            calls += [
                (structs.Op.NORM, _norm(layer.norm_1).call(hidden, normed)),
                (structs.Op.LINEAR, _linear(layer.attend_in).call(normed, qkv)),
                (structs.Op.WRITE_KV, attention),
                (structs.Op.ATTENTION, attention),
                (structs.Op.LINEAR, _linear(layer.attend_out).call(mixed, hidden, residual=hidden)),
                (structs.Op.NORM, _norm(layer.norm_2).call(hidden, normed)),
                (structs.Op.LINEAR, _linear(layer.mlp_in).call(normed, wide, activation=self._activation)),
                (structs.Op.LINEAR, _linear(layer.mlp_out).call(wide, hidden, residual=hidden)),
            ]
        self._hidden, self._queries = hidden, qkv[:, :width]
        self._steps = structs.steps(calls)
        # The same in two parts, cut where the last layer's keys and values are written.
        cut = max(i for i, (op, _) in enumerate(calls) if op is structs.Op.WRITE_KV) + 1
        self._until_kv, self._from_kv = structs.steps(calls[:cut]), structs.steps(calls[cut:])
        self._kept = calls, normed, mixed, qkv, wide  # the steps point into these


def _linear(part: object) -> PackedLinear:
    assert isinstance(part, PackedLinear)
    return part


def _norm(part: object) -> KernelNorm:
    assert isinstance(part, KernelNorm)
    return part
