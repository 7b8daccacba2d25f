"""The C kernels: built by `pip install` where there is a compiler, loaded through ctypes, and done without elsewhere.

`load()` gives a `Kernels`, or says why there is none. `KernelOps` is `model.ops.Ops` made of them: fp32 activations,
weights kept in fp32, fp16 or int8, on the CPU, every row's result independent of the rows beside it. Knows nothing of
GPT-2.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref, c_char_p, c_double, c_int, c_int64, c_size_t, c_void_p
from enum import IntEnum
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from model.batch import Batch
from model.config import Activation
from model.kernels import structs
from model.kv_cache import KVCache, LayerCache
from model.memory import HugePages, ReusedRows
from model.scores import Scores

PADDING = 32  # MAX_PANEL in kernels.h
STALE = "the C kernels were built for another version; install again"
LEVELS = {"portable": 0, "avx2": 1, "avx512": 2, "vnni": 3}


class Storage(IntEnum):
    """How a linear layer keeps its weights. Arithmetic is fp32 but for INT8, whose products are integers."""

    FP32 = 0
    FP16 = 1
    INT8 = 2


_ACTIVATIONS = {
    None: 0,
    Activation.GELU_TANH: 1,
    Activation.GELU_ERF: 2,
    Activation.RELU: 3,
    Activation.SILU: 4,
}

# === Loading ===


class KernelsUnavailableError(Exception):
    """The message says why, in words fit for the start-up line."""


class Kernels:
    """The loaded library, at one instruction set level. Not for several Python threads at once."""

    def __init__(self, library: ctypes.CDLL, level: int) -> None:
        self._library = library
        self.level = level
        self.memory = HugePages()  # of packed weights

    def set_threads(self, threads: int) -> int:
        """Threads of every later call, the calling one among them. Returns how many there are."""
        return int(self._library.kernels_set_threads(threads))

    def describe(self) -> str:
        return f"C kernels ({self._library.kernels_level_name(self.level).decode()})"

    def seconds(self) -> dict[structs.Op, float]:
        """What was spent in each operation, by all calls so far."""
        spent = (c_double * (len(structs.Op) + 1))()
        self._library.kernels_seconds(spent)
        return {op: spent[op] for op in structs.Op}

    def run(self, steps: ctypes.Array[structs.Step], batch: structs.BatchStruct) -> None:
        self._library.kernels_run(self.level, steps, len(steps), byref(batch))

    def run_one(self, op: structs.Op, call: structs.Call, batch: structs.BatchStruct) -> None:
        self.run(structs.steps([(op, call)]), batch)

    def panels_bytes(self, linear: structs.Linear) -> int:
        return int(self._library.kernels_panels_bytes(self.level, byref(linear)))

    def pack_linear(
        self, weight: Tensor, bias: Tensor | None, storage: Storage = Storage.FP32, *, reuse: bool = False
    ) -> PackedLinear:
        """weight: (out, in) in any strides, bias: (out,). reuse: results are good until the next call."""
        return PackedLinear(self, weight, bias, storage, reuse=reuse)

    def norm(self, weight: Tensor, bias: Tensor, epsilon: float) -> KernelNorm:
        """weight, bias: (width,)."""
        return KernelNorm(self, weight, bias, epsilon)

    def embedding(self, tokens: PackedLinear, positions: Tensor) -> KernelEmbedding:
        """tokens: (vocab, width), positions: (n_positions, width)."""
        return KernelEmbedding(self, tokens, positions)

    def write_kv(self, qkv: Tensor, cache: LayerCache, slots: Tensor) -> None:
        """Store the keys and values of qkv: (rows, 3 * n_embd) at slots: (rows,) int64, in the layout of kernels.h."""
        assert slots.dtype == torch.int64
        qkv = structs.ready(qkv)
        batch = structs.BatchStruct(rows=len(slots), slots=slots.data_ptr())
        self.run_one(structs.Op.WRITE_KV, structs.AttentionCall(structs.kv(cache), qkv.data_ptr()), batch)

    def score(self, logits: Tensor, tokens: Tensor, tops: Sequence[int | None]) -> Scores:
        """logits: (rows, vocab), tokens: (rows,) int64, tops: (rows,), none above the vocabulary's size."""
        top = max(each or 0 for each in tops)
        assert tokens.dtype == torch.int64
        logits, tokens, (rows, width) = structs.ready(logits), tokens.contiguous(), logits.shape
        scores = Scores(
            torch.empty(rows),
            torch.empty(rows, dtype=torch.int64),
            torch.empty(rows, top),
            torch.empty(rows, top, dtype=torch.int64),
            tops,
        )
        outputs = [tensor.data_ptr() for tensor in (scores.own, scores.ranks, scores.values, scores.ids)]
        batch = structs.BatchStruct(rows=rows, tokens=tokens.data_ptr())
        self.run_one(structs.Op.SCORE, structs.ScoreCall(logits.data_ptr(), width, top, *outputs), batch)
        return scores

    def attention(self, qkv: Tensor, cache: LayerCache, batch: Batch, scale: float) -> Tensor:
        """qkv: (rows, 3 * n_embd). Each row sees its sequence's positions up to its own. Returns (rows, n_embd)."""
        qkv = structs.ready(qkv)
        out = torch.empty(qkv.shape[0], qkv.shape[1] // 3)
        call = structs.AttentionCall(structs.kv(cache), qkv.data_ptr(), out.data_ptr(), scale)
        self.run_one(structs.Op.ATTENTION, call, structs.batch(batch))
        return out


def load(level: str | None = None, threads: int | None = None) -> Kernels:
    """The kernels at `level` (a key of LEVELS) or at the best this machine has, run by `threads` threads.

    Raises KernelsUnavailableError where they were not built or cannot be loaded, or where the machine lacks the level.
    """
    library = _library()
    best = library.kernels_best_level()
    chosen = best if level is None else LEVELS[level]
    if chosen > best:
        raise KernelsUnavailableError(f"this machine has no {level}")
    kernels = Kernels(library, chosen)
    kernels.set_threads(threads or torch.get_num_threads())
    return kernels


def _library() -> ctypes.CDLL:
    paths = [path for suffix in EXTENSION_SUFFIXES if (path := Path(__file__).with_name(f"_kernels{suffix}")).exists()]
    if not paths:
        raise KernelsUnavailableError("the C kernels were not built; install again with a C compiler")
    try:
        library = ctypes.CDLL(str(paths[0]))
        _declare(library, "abi", c_int)
        if library.kernels_abi() != structs.ABI:
            raise KernelsUnavailableError(STALE)
        _declare(library, "run", None, c_int, c_void_p, c_int64, c_void_p)
        _declare(library, "set_threads", c_int, c_int)
        _declare(library, "seconds", None, c_void_p)
        _declare(library, "best_level", c_int)
        _declare(library, "level_name", c_char_p, c_int)
        _declare(library, "panels_bytes", c_size_t, c_int, c_void_p)
    except OSError as error:
        raise KernelsUnavailableError("the C kernels cannot be loaded on this machine") from error
    except AttributeError as error:
        raise KernelsUnavailableError(STALE) from error
    return library


def _declare(library: ctypes.CDLL, name: str, result: type | None, *arguments: type) -> None:
    function = getattr(library, f"kernels_{name}")
    function.restype = result
    function.argtypes = arguments


# === Layers ===


class PackedLinear:
    """`model.linear.Linear`, its weights packed for one level."""

    def __init__(self, kernels: Kernels, weight: Tensor, bias: Tensor | None, storage: Storage, *, reuse: bool) -> None:
        weight = weight.float()
        self.outputs, self.inputs = weight.shape
        self._reused = ReusedRows(self.outputs) if reuse else None
        self._kernels = kernels
        self._edges = torch.zeros(2, -(-self.outputs // PADDING) * PADDING)  # bias, scale
        if bias is not None:
            self._edges[0, : self.outputs] = bias
        edges = [edge.data_ptr() for edge in self._edges]
        self._linear = structs.Linear(self.inputs, self.outputs, storage, None, *edges)
        self._panels = kernels.memory.zeros(kernels.panels_bytes(self._linear))
        self._linear.panels = self._panels.data_ptr()
        call = structs.PackCall(ctypes.pointer(self._linear), weight.data_ptr(), *weight.stride())
        kernels.run_one(structs.Op.PACK, call, structs.BatchStruct())
        self._call = structs.LinearCall(ctypes.pointer(self._linear))
        self._steps = structs.steps([(structs.Op.LINEAR, self._call)])
        self._batch = structs.BatchStruct()

    def __call__(self, x: Tensor, *, activation: Activation | None = None, residual: Tensor | None = None) -> Tensor:
        """activation(x Wᵀ + b), plus the residual. x: (rows, in); residual: (rows, out); returns (rows, out)."""
        x = structs.ready(x)
        residual = None if residual is None else structs.ready(residual)
        rows = x.shape[0]
        out = torch.empty(rows, self.outputs) if self._reused is None else self._reused(rows)
        call = self._call
        call.x = x.data_ptr()
        call.residual = None if residual is None else residual.data_ptr()
        call.y = out.data_ptr()
        call.act = _ACTIVATIONS[activation]
        self._batch.rows = rows
        self._kernels.run(self._steps, self._batch)
        return out

    @property
    def pointer(self) -> ctypes._Pointer[structs.Linear]:
        """Good while this lives."""
        return ctypes.pointer(self._linear)

    def call(
        self, x: Tensor, out: Tensor, *, activation: Activation | None = None, residual: Tensor | None = None
    ) -> structs.LinearCall:
        add = None if residual is None else residual.data_ptr()
        return structs.LinearCall(self.pointer, x.data_ptr(), add, out.data_ptr(), _ACTIVATIONS[activation])


class KernelNorm:
    """`model.ops.Norm`."""

    def __init__(self, kernels: Kernels, weight: Tensor, bias: Tensor, epsilon: float) -> None:
        self._kernels = kernels
        self._weight, self._bias = structs.ready(weight), structs.ready(bias)
        self._epsilon = epsilon
        self._call = self.call(self._weight, self._weight)
        self._steps = structs.steps([(structs.Op.NORM, self._call)])
        self._batch = structs.BatchStruct()

    def __call__(self, x: Tensor) -> Tensor:
        """x: (rows, width)."""
        x = structs.ready(x)
        out = torch.empty_like(x)
        self._call.x, self._call.y = x.data_ptr(), out.data_ptr()
        self._batch.rows = x.shape[0]
        self._kernels.run(self._steps, self._batch)
        return out

    def call(self, x: Tensor, out: Tensor) -> structs.NormCall:
        pointers = [tensor.data_ptr() for tensor in (x, self._weight, self._bias, out)]
        return structs.NormCall(*pointers, len(self._weight), self._epsilon)


class KernelEmbedding:
    """`model.ops.Embedding`. The tokens' vectors are read out of a packed layer, so that a tied head is held once."""

    def __init__(self, kernels: Kernels, tokens: PackedLinear, positions: Tensor) -> None:
        self._kernels = kernels
        self._tokens, self._positions = tokens, structs.ready(positions)

    @property
    def width(self) -> int:
        return self._tokens.inputs

    def __call__(self, batch: Batch) -> Tensor:
        """(rows, width)."""
        out = torch.empty(len(batch.tokens), self.width)
        self._kernels.run_one(structs.Op.EMBED, self.call(out), structs.batch(batch))
        return out

    def call(self, out: Tensor) -> structs.EmbedCall:
        return structs.EmbedCall(self._tokens.pointer, self._positions.data_ptr(), out.data_ptr(), self.width)


# === As model.ops.Ops ===


class KernelOps:
    def __init__(self, kernels: Kernels, storage: Storage = Storage.FP32) -> None:
        self._kernels = kernels
        self._storage = storage
        # Beside weights of fewer bits than 32, the cache keeps no more than 16.
        both = (torch.float32, torch.float16)
        self.kv_dtypes: tuple[torch.dtype, ...] = both if storage is Storage.FP32 else both[::-1]
        self.weight_bytes = {Storage.FP32: 4, Storage.FP16: 2, Storage.INT8: 1}[storage]

    def place(self, weight: Tensor) -> Tensor:
        """A copy, never the checkpoint's own memory: a single tensor of it would keep the whole file mapped."""
        return weight.to(torch.float32, copy=True, memory_format=torch.contiguous_format)

    def linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        return self._kernels.pack_linear(weight, bias, self._storage)

    def head(self, weight: Tensor) -> PackedLinear:
        return self._kernels.pack_linear(weight, None, self._storage, reuse=True)

    def small_linear(self, weight: Tensor) -> PackedLinear:
        return self._kernels.pack_linear(weight, None, Storage.FP32)

    def norm(self, weight: Tensor, bias: Tensor, epsilon: float) -> KernelNorm:
        return self._kernels.norm(self.place(weight), self.place(bias), epsilon)

    def embedding(self, tokens: Tensor, positions: Tensor, head: object | None) -> KernelEmbedding:
        packed = self.linear(tokens, None) if head is None else _linear(head)
        return self._kernels.embedding(packed, self.place(positions))

    def write_kv(self, qkv: Tensor, cache: LayerCache, slots: Tensor) -> None:
        self._kernels.write_kv(qkv, cache, slots)

    def attention(self, qkv: Tensor, cache: LayerCache, batch: Batch, scale: float) -> Tensor:
        return self._kernels.attention(qkv, cache, batch, scale)

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


# === The whole network in one call ===


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
    """From a batch to hidden states, all layers in one call: the bits of layer by layer, without the Python between."""

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
        self._record(1)

    def __call__(self, batch: Batch) -> Tensor:
        """Hidden states (wanted rows, n_embd), good until the next call."""
        rows, wanted = len(batch.tokens), batch.wanted
        if rows > len(self._hidden):
            self._record(max(rows, 2 * len(self._hidden)))
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
