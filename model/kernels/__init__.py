"""The C kernels: built by `pip install` where there is a compiler, loaded through ctypes, and done without elsewhere.

`load()` gives a `Kernels`, or says why there is none. `KernelOps` is `model.ops.Ops` made of them: fp32 activations,
weights kept in fp32, fp16 or int8, on the CPU, every row's result independent of the rows beside it. Knows nothing of
GPT-2.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from ctypes import POINTER, Structure, byref, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p
from enum import IntEnum
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from model.batch import Batch
from model.config import Activation
from model.kv_cache import LayerCache

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
        ("kind", c_int32),
        ("level", c_int32),
        ("panels", c_void_p),
        ("bias", c_void_p),
        ("scale", c_void_p),
    ]


class _LinearCall(Structure):
    _fields_ = [
        ("w", POINTER(_Linear)),
        ("x", c_void_p),
        ("residual", c_void_p),
        ("y", c_void_p),
        ("packed", c_void_p),
        ("rows", c_int64),
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
        ("rows", c_int64),
        ("width", c_int64),
        ("epsilon", c_float),
    ]


class _EmbedCall(Structure):
    _fields_ = [
        ("tokens", c_void_p),
        ("positions", c_void_p),
        ("wte", c_void_p),
        ("wpe", c_void_p),
        ("y", c_void_p),
        ("rows", c_int64),
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


class _WriteCall(Structure):
    _fields_ = [
        ("kv", _KV),
        ("qkv", c_void_p),
        ("slots", c_void_p),
        ("rows", c_int64),
    ]


class _AttentionCall(Structure):
    _fields_ = [
        ("kv", _KV),
        ("qkv", c_void_p),
        ("positions", c_void_p),
        ("query_starts", c_void_p),
        ("block_tables", c_void_p),
        ("out", c_void_p),
        ("tiles", c_void_p),
        ("tile_count", c_int64),
        ("table_width", c_int64),
        ("scale", c_float),
    ]


# === Loading ===


class KernelsUnavailableError(Exception):
    """The message says why, in words fit for the start-up line."""


class Kernels:
    """The loaded library, at one instruction set level."""

    def __init__(self, library: ctypes.CDLL, level: int) -> None:
        self._library = library
        self.level = level

    def set_threads(self, threads: int) -> int:
        """Threads of every later call, the calling one among them. Returns how many there are."""
        return int(self._library.kernels_set_threads(threads))

    def describe(self) -> str:
        return f"C kernels ({self._library.kernels_level_name(self.level).decode()})"

    def pack_linear(self, weight: Tensor, bias: Tensor | None, storage: Storage = Storage.FP32) -> PackedLinear:
        """weight: (out, in) in any strides, bias: (out,)."""
        return PackedLinear(self._library, self.level, weight, bias, storage)

    def norm(self, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
        """x: (rows, width)."""
        x = _ready(x)
        out = torch.empty_like(x)
        call = _NormCall(x.data_ptr(), weight.data_ptr(), bias.data_ptr(), out.data_ptr(), *x.shape, epsilon)
        self._library.kernels_norm(self.level, byref(call))
        return out

    def embed(self, tokens: Tensor, positions: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
        """wte[tokens] + wpe[positions]; tokens and positions: (rows,) int64. Returns (rows, width)."""
        assert tokens.dtype == positions.dtype == torch.int64
        out = torch.empty(len(tokens), wte.shape[1])
        pointers = [tensor.data_ptr() for tensor in (tokens, positions, wte, wpe, out)]
        self._library.kernels_embed(self.level, byref(_EmbedCall(*pointers, *out.shape)))
        return out

    def write_kv(self, qkv: Tensor, cache: LayerCache, slots: Tensor) -> None:
        """Store the keys and values of qkv: (rows, 3 * n_embd) at slots: (rows,) int64, in the layout of kernels.h."""
        assert slots.dtype == torch.int64
        qkv = _ready(qkv)
        call = _WriteCall(_kv(cache), qkv.data_ptr(), slots.data_ptr(), len(slots))
        self._library.kernels_write_kv(self.level, byref(call))

    def attention(
        self,
        qkv: Tensor,
        cache: LayerCache,
        positions: Tensor,
        query_starts: Tensor,
        block_tables: Tensor,
        scale: float,
    ) -> Tensor:
        """qkv: (rows, 3 * n_embd); the rest as in `Batch`. Returns (rows, n_embd)."""
        assert positions.dtype == torch.int64
        assert query_starts.dtype == block_tables.dtype == torch.int32
        assert block_tables.is_contiguous()
        qkv = _ready(qkv)
        out = torch.empty(qkv.shape[0], qkv.shape[1] // 3)
        call = _AttentionCall(
            kv=_kv(cache),
            qkv=qkv.data_ptr(),
            positions=positions.data_ptr(),
            query_starts=query_starts.data_ptr(),
            block_tables=block_tables.data_ptr(),
            out=out.data_ptr(),
            table_width=block_tables.shape[1],
            scale=scale,
        )
        self._library.kernels_attention(self.level, byref(call), len(block_tables))
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
        for name in ("pack", "linear"):
            _declare(library, name, None, c_void_p)
        for name in ("norm", "embed", "write_kv"):
            _declare(library, name, None, c_int, c_void_p)
        _declare(library, "attention", None, c_int, c_void_p, c_int64)
        _declare(library, "set_threads", c_int, c_int)
        _declare(library, "best_level", c_int)
        _declare(library, "level_name", c_char_p, c_int)
        _declare(library, "panels_bytes", c_size_t, c_void_p)
    except (OSError, AttributeError) as error:
        raise KernelsUnavailableError("the C kernels cannot be loaded on this machine") from error
    return library


def _declare(library: ctypes.CDLL, name: str, result: type | None, *arguments: type) -> None:
    function = getattr(library, f"kernels_{name}")
    function.restype = result
    function.argtypes = arguments


# === Linear layers ===


class PackedLinear:
    """`model.linear.Linear`, its weights packed for one level."""

    def __init__(self, library: ctypes.CDLL, level: int, weight: Tensor, bias: Tensor | None, storage: Storage) -> None:
        weight = weight.float()
        outputs, inputs = weight.shape
        self._library = library
        self._edges = torch.zeros(2, -(-outputs // PADDING) * PADDING)  # bias, scale
        if bias is not None:
            self._edges[0, :outputs] = bias
        self._linear = _Linear(
            inputs, outputs, storage, level, None, self._edges[0].data_ptr(), self._edges[1].data_ptr()
        )
        self._panels = huge_bytes(library.kernels_panels_bytes(byref(self._linear)))
        self._linear.panels = self._panels.data_ptr()
        self._outputs = outputs
        self._call = _LinearCall(w=ctypes.pointer(self._linear))
        library.kernels_pack(byref(_PackCall(self._call.w, weight.data_ptr(), *weight.stride())))

    def __call__(
        self,
        x: Tensor,
        *,
        activation: Activation | None = None,
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """activation(x Wᵀ + b), plus the residual. x: (rows, in); residual and out: (rows, out)."""
        x = _ready(x)
        residual = None if residual is None else _ready(residual)
        if out is None:
            out = torch.empty(x.shape[0], self._outputs)
        call = self._call
        call.x = x.data_ptr()
        call.residual = None if residual is None else residual.data_ptr()
        call.y = out.data_ptr()
        call.rows = x.shape[0]
        call.act = _ACTIVATIONS[activation]
        self._library.kernels_linear(byref(call))
        return out


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

    def norm(self, weight: Tensor, bias: Tensor, epsilon: float) -> _Norm:
        return _Norm(self._kernels, self.place(weight), self.place(bias), epsilon)

    def embed(self, batch: Batch, token_embedding: Tensor, position_embedding: Tensor) -> Tensor:
        return self._kernels.embed(batch.tokens, batch.positions, token_embedding, position_embedding)

    def write_kv(self, qkv: Tensor, cache: LayerCache, slots: Tensor) -> None:
        self._kernels.write_kv(qkv, cache, slots)

    def attention(self, qkv: Tensor, cache: LayerCache, batch: Batch, scale: float) -> Tensor:
        return self._kernels.attention(qkv, cache, batch.positions, batch.query_starts, batch.block_tables, scale)

    def describe(self) -> str:
        return f"{self._storage.name.lower()}, {self._kernels.describe()}"


class _Norm:
    def __init__(self, kernels: Kernels, weight: Tensor, bias: Tensor, epsilon: float) -> None:
        self._kernels = kernels
        self._weight = weight
        self._bias = bias
        self._epsilon = epsilon

    def __call__(self, x: Tensor) -> Tensor:
        return self._kernels.norm(x, self._weight, self._bias, self._epsilon)


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
