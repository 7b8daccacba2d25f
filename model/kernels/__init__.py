"""The C kernels: built by `pip install` where there is a compiler, loaded through ctypes, and done without elsewhere.

`load()` gives a `Kernels`, or says why there is none. `KernelOps` is `model.ops.Ops` made of them: fp32 activations,
weights kept in fp32, fp16 or int8, on the CPU, every row's result independent of the rows beside it. Knows nothing of
GPT-2.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p
from enum import IntEnum
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from model.batch import Batch
from model.config import Activation
from model.kv_cache import KVCache, LayerCache

HUGE_PAGE = 2 << 20
MAX_HEAD_DIM = 256  # KB in kernels.h
PADDING = 32  # MAX_PANEL in kernels.h
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

# === The structs of kernels.h ===


class _Linear(Structure):
    _fields_ = [
        ("inputs", c_int64),
        ("outputs", c_int64),
        ("kind", c_int64),
        ("panels", c_void_p),
        ("bias", c_void_p),
        ("scale", c_void_p),
    ]


class _Batch(Structure):
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


class _LinearCall(Structure):
    _fields_ = [
        ("w", POINTER(_Linear)),
        ("x", c_void_p),
        ("residual", c_void_p),
        ("y", c_void_p),
        ("act", c_int32),
    ]


class _PackCall(Structure):
    _fields_ = [
        ("w", POINTER(_Linear)),
        ("weight", c_void_p),
        ("stride_out", c_int64),
        ("stride_in", c_int64),
    ]


class _NormCall(Structure):
    _fields_ = [
        ("x", c_void_p),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("y", c_void_p),
        ("width", c_int64),
        ("epsilon", c_float),
    ]


class _EmbedCall(Structure):
    _fields_ = [
        ("wte", c_void_p),
        ("wpe", c_void_p),
        ("y", c_void_p),
        ("width", c_int64),
    ]


class _KV(Structure):
    _fields_ = [
        ("keys", c_void_p),
        ("values", c_void_p),
        ("heads", c_int64),
        ("block_size", c_int64),
        ("head_dim", c_int64),
        ("half", c_int32),
    ]


class _AttentionCall(Structure):
    _fields_ = [
        ("kv", _KV),
        ("qkv", c_void_p),
        ("out", c_void_p),
        ("scale", c_float),
    ]


class _Step(Structure):
    _fields_ = [
        ("op", c_int64),
        ("call", c_void_p),
    ]


class _Op(IntEnum):
    PACK = 0
    LINEAR = 1
    NORM = 2
    EMBED = 3
    WRITE_KV = 4
    ATTENTION = 5


_Call = _PackCall | _LinearCall | _NormCall | _EmbedCall | _AttentionCall


# === Loading ===


class KernelsUnavailableError(Exception):
    """The message says why, in words fit for the start-up line."""


class Kernels:
    """The loaded library, at one instruction set level. Not for several Python threads at once."""

    def __init__(self, library: ctypes.CDLL, level: int) -> None:
        self._library = library
        self.level = level

    def set_threads(self, threads: int) -> int:
        """Threads of every later call, the calling one among them. Returns how many there are."""
        return int(self._library.kernels_set_threads(threads))

    def describe(self) -> str:
        return f"C kernels ({self._library.kernels_level_name(self.level).decode()})"

    def run(self, steps: ctypes.Array[_Step], batch: _Batch) -> None:
        self._library.kernels_run(self.level, steps, len(steps), byref(batch))

    def run_one(self, op: _Op, call: _Call, batch: _Batch) -> None:
        self.run(_steps([(op, call)]), batch)

    def panels_bytes(self, linear: _Linear) -> int:
        return int(self._library.kernels_panels_bytes(self.level, byref(linear)))

    def pack_linear(self, weight: Tensor, bias: Tensor | None, storage: Storage = Storage.FP32) -> PackedLinear:
        """weight: (out, in) in any strides, bias: (out,)."""
        return PackedLinear(self, weight, bias, storage)

    def norm(self, weight: Tensor, bias: Tensor, epsilon: float) -> KernelNorm:
        """weight, bias: (width,)."""
        return KernelNorm(self, weight, bias, epsilon)

    def embed(self, tokens: Tensor, positions: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
        """wte[tokens] + wpe[positions]; tokens and positions: (rows,) int64. Returns (rows, width)."""
        assert tokens.dtype == positions.dtype == torch.int64
        out = torch.empty(len(tokens), wte.shape[1])
        batch = _Batch(rows=len(tokens), tokens=tokens.data_ptr(), positions=positions.data_ptr())
        self.run_one(_Op.EMBED, _embed_call(wte, wpe, out), batch)
        return out

    def write_kv(self, qkv: Tensor, cache: LayerCache, slots: Tensor) -> None:
        """Store the keys and values of qkv: (rows, 3 * n_embd) at slots: (rows,) int64, in the layout of kernels.h."""
        assert slots.dtype == torch.int64
        qkv = _ready(qkv)
        batch = _Batch(rows=len(slots), slots=slots.data_ptr())
        self.run_one(_Op.WRITE_KV, _AttentionCall(_kv(cache), qkv.data_ptr()), batch)

    def attention(self, qkv: Tensor, cache: LayerCache, batch: Batch, scale: float) -> Tensor:
        """qkv: (rows, 3 * n_embd). Each row sees its sequence's positions up to its own. Returns (rows, n_embd)."""
        qkv = _ready(qkv)
        out = torch.empty(qkv.shape[0], qkv.shape[1] // 3)
        call = _AttentionCall(_kv(cache), qkv.data_ptr(), out.data_ptr(), scale)
        self.run_one(_Op.ATTENTION, call, _batch(batch))
        return out


def load(level: str | None = None, threads: int | None = None) -> Kernels:
    """The kernels at `level` (a key of LEVELS) or at the best this machine has, run by `threads` threads.

    GPT2_SERVER_KERNELS in the environment chooses a level too; 0 switches them off.

    Raises KernelsUnavailableError where that is so, where they were not built or cannot be loaded, or where the machine
    lacks the level.
    """
    wanted = level or os.environ.get("GPT2_SERVER_KERNELS", "")
    if wanted == "0":
        raise KernelsUnavailableError("switched off by GPT2_SERVER_KERNELS=0")
    if wanted and wanted not in LEVELS:
        raise KernelsUnavailableError(f"GPT2_SERVER_KERNELS must be 0 or one of {', '.join(LEVELS)}")
    library = _library()
    best = library.kernels_best_level()
    chosen = LEVELS[wanted] if wanted else best
    if chosen > best:
        raise KernelsUnavailableError(f"this machine has no {wanted}")
    kernels = Kernels(library, chosen)
    kernels.set_threads(threads or torch.get_num_threads())
    return kernels


def _library() -> ctypes.CDLL:
    paths = [path for suffix in EXTENSION_SUFFIXES if (path := Path(__file__).with_name(f"_kernels{suffix}")).exists()]
    if not paths:
        raise KernelsUnavailableError("the C kernels were not built; install again with a C compiler")
    try:
        library = ctypes.CDLL(str(paths[0]))
        _declare(library, "run", None, c_int, c_void_p, c_int64, c_void_p)
        _declare(library, "set_threads", c_int, c_int)
        _declare(library, "best_level", c_int)
        _declare(library, "level_name", c_char_p, c_int)
        _declare(library, "panels_bytes", c_size_t, c_int, c_void_p)
    except (OSError, AttributeError) as error:
        raise KernelsUnavailableError("the C kernels cannot be loaded on this machine") from error
    return library


def _declare(library: ctypes.CDLL, name: str, result: type | None, *arguments: type) -> None:
    function = getattr(library, f"kernels_{name}")
    function.restype = result
    function.argtypes = arguments


# === Layers ===


class PackedLinear:
    """`model.linear.Linear`, its weights packed for one level."""

    def __init__(self, kernels: Kernels, weight: Tensor, bias: Tensor | None, storage: Storage) -> None:
        weight = weight.float()
        self.outputs, inputs = weight.shape
        self._kernels = kernels
        self._edges = torch.zeros(2, -(-self.outputs // PADDING) * PADDING)  # bias, scale
        if bias is not None:
            self._edges[0, : self.outputs] = bias
        edges = [edge.data_ptr() for edge in self._edges]
        self._linear = _Linear(inputs, self.outputs, storage, None, *edges)
        self._panels = huge_bytes(kernels.panels_bytes(self._linear))
        self._linear.panels = self._panels.data_ptr()
        call = _PackCall(ctypes.pointer(self._linear), weight.data_ptr(), *weight.stride())
        kernels.run_one(_Op.PACK, call, _Batch())
        self._call = _LinearCall(ctypes.pointer(self._linear))
        self._steps = _steps([(_Op.LINEAR, self._call)])
        self._batch = _Batch()

    def __call__(self, x: Tensor, *, activation: Activation | None = None, residual: Tensor | None = None) -> Tensor:
        """activation(x Wᵀ + b), plus the residual. x: (rows, in); residual: (rows, out); returns (rows, out)."""
        x = _ready(x)
        residual = None if residual is None else _ready(residual)
        out = torch.empty(x.shape[0], self.outputs)
        call = self._call
        call.x = x.data_ptr()
        call.residual = None if residual is None else residual.data_ptr()
        call.y = out.data_ptr()
        call.act = _ACTIVATIONS[activation]
        self._batch.rows = x.shape[0]
        self._kernels.run(self._steps, self._batch)
        return out

    def call(
        self, x: Tensor, out: Tensor, *, activation: Activation | None = None, residual: Tensor | None = None
    ) -> _LinearCall:
        add = None if residual is None else residual.data_ptr()
        return _LinearCall(ctypes.pointer(self._linear), x.data_ptr(), add, out.data_ptr(), _ACTIVATIONS[activation])


class KernelNorm:
    """`model.ops.Norm`."""

    def __init__(self, kernels: Kernels, weight: Tensor, bias: Tensor, epsilon: float) -> None:
        self._kernels = kernels
        self._weight, self._bias = _ready(weight), _ready(bias)
        self._epsilon = epsilon
        self._call = self.call(self._weight, self._weight)
        self._steps = _steps([(_Op.NORM, self._call)])
        self._batch = _Batch()

    def __call__(self, x: Tensor) -> Tensor:
        """x: (rows, width)."""
        x = _ready(x)
        out = torch.empty_like(x)
        self._call.x, self._call.y = x.data_ptr(), out.data_ptr()
        self._batch.rows = x.shape[0]
        self._kernels.run(self._steps, self._batch)
        return out

    def call(self, x: Tensor, out: Tensor) -> _NormCall:
        pointers = [tensor.data_ptr() for tensor in (x, self._weight, self._bias, out)]
        return _NormCall(*pointers, len(self._weight), self._epsilon)


def huge_bytes(size: int) -> Tensor:
    """(size,) uint8 zeros, in huge pages where the system has them: those stream almost twice as fast."""
    memory = mmap.mmap(-1, size + HUGE_PAGE, **({"flags": mmap.MAP_PRIVATE} if os.name == "posix" else {}))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    return whole[start : start + size]


# === As model.ops.Ops ===


class KernelOps:
    def __init__(self, kernels: Kernels, storage: Storage = Storage.FP32) -> None:
        self._kernels = kernels
        self._storage = storage

    def place(self, weight: Tensor) -> Tensor:
        return weight.float().contiguous()

    def linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        return self._kernels.pack_linear(weight, bias, self._storage)

    def norm(self, weight: Tensor, bias: Tensor, epsilon: float) -> KernelNorm:
        return self._kernels.norm(self.place(weight), self.place(bias), epsilon)

    def embed(self, batch: Batch, token_embedding: Tensor, position_embedding: Tensor) -> Tensor:
        return self._kernels.embed(batch.tokens, batch.positions, token_embedding, position_embedding)

    def write_kv(self, qkv: Tensor, cache: LayerCache, slots: Tensor) -> None:
        self._kernels.write_kv(qkv, cache, slots)

    def attention(self, qkv: Tensor, cache: LayerCache, batch: Batch, scale: float) -> Tensor:
        return self._kernels.attention(qkv, cache, batch, scale)

    def fuse(
        self,
        token_embedding: Tensor,
        position_embedding: Tensor,
        layers: Sequence[Layer],
        cache: KVCache,
        activation: Activation,
    ) -> Forward:
        return Forward(self._kernels, token_embedding, position_embedding, layers, cache.layers, activation)

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
        token_embedding: Tensor,
        position_embedding: Tensor,
        layers: Sequence[Layer],
        caches: Sequence[LayerCache],
        activation: Activation,
    ) -> None:
        """caches: one for each layer; they stay where they are in memory as long as this lives."""
        self._kernels = kernels
        self._embeddings = _ready(token_embedding), _ready(position_embedding)
        self._layers = layers
        self._caches = caches
        self._activation = activation
        self._record(1)

    def __call__(self, batch: Batch) -> Tensor:
        """Hidden states (rows, n_embd), good until the next call."""
        rows = len(batch.tokens)
        if rows > len(self._hidden):
            self._record(max(rows, 2 * len(self._hidden)))
        self._kernels.run(self._steps, _batch(batch))
        return self._hidden[:rows]

    def _record(self, rows: int) -> None:
        width = self._embeddings[0].shape[1]
        hidden, normed, mixed = (torch.empty(rows, width) for _ in range(3))
        qkv, wide = torch.empty(rows, 3 * width), torch.empty(rows, _linear(self._layers[0].mlp_in).outputs)
        calls: list[tuple[_Op, _Call]] = [(_Op.EMBED, _embed_call(*self._embeddings, hidden))]
        for layer, cache in zip(self._layers, self._caches, strict=True):
            attention = _AttentionCall(_kv(cache), qkv.data_ptr(), mixed.data_ptr(), layer.scale)
            calls += [
                (_Op.NORM, _norm(layer.norm_1).call(hidden, normed)),
                (_Op.LINEAR, _linear(layer.attend_in).call(normed, qkv)),
                (_Op.WRITE_KV, attention),
                (_Op.ATTENTION, attention),
                (_Op.LINEAR, _linear(layer.attend_out).call(mixed, hidden, residual=hidden)),
                (_Op.NORM, _norm(layer.norm_2).call(hidden, normed)),
                (_Op.LINEAR, _linear(layer.mlp_in).call(normed, wide, activation=self._activation)),
                (_Op.LINEAR, _linear(layer.mlp_out).call(wide, hidden, residual=hidden)),
            ]
        self._hidden = hidden
        self._steps = _steps(calls)
        self._kept = calls, normed, mixed, qkv, wide  # the steps point into these


def _linear(part: object) -> PackedLinear:
    assert isinstance(part, PackedLinear)
    return part


def _norm(part: object) -> KernelNorm:
    assert isinstance(part, KernelNorm)
    return part


# === Pointers ===


def _steps(calls: Sequence[tuple[_Op, _Call]]) -> ctypes.Array[_Step]:
    """The caller keeps the calls alive."""
    return (_Step * len(calls))(*[_Step(op, ctypes.addressof(call)) for op, call in calls])


def _batch(batch: Batch) -> _Batch:
    assert batch.tokens.dtype == batch.positions.dtype == batch.slots.dtype == torch.int64
    assert batch.query_starts.dtype == batch.block_tables.dtype == torch.int32
    assert batch.block_tables.is_contiguous()
    sequences, table_width = batch.block_tables.shape
    return _Batch(
        rows=len(batch.tokens),
        sequences=sequences,
        table_width=table_width,
        tokens=batch.tokens.data_ptr(),
        positions=batch.positions.data_ptr(),
        slots=batch.slots.data_ptr(),
        query_starts=batch.query_starts.data_ptr(),
        block_tables=batch.block_tables.data_ptr(),
    )


def _embed_call(wte: Tensor, wpe: Tensor, out: Tensor) -> _EmbedCall:
    return _EmbedCall(wte.data_ptr(), wpe.data_ptr(), out.data_ptr(), wte.shape[1])


def _ready(x: Tensor) -> Tensor:
    assert x.dtype == torch.float32
    return x.contiguous()


def _kv(cache: LayerCache) -> _KV:
    _, heads, block_size, head_dim = cache.keys.shape
    assert head_dim <= MAX_HEAD_DIM
    assert cache.keys.is_contiguous()
    assert cache.values.is_contiguous()
    half = cache.keys.dtype == torch.float16
    return _KV(cache.keys.data_ptr(), cache.values.data_ptr(), heads, block_size, head_dim, half)
