"""The C kernels' library, loaded through ctypes. `load()` gives a `Kernels`, or says why there is none.

Knows nothing of layers, or of GPT-2.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from ctypes import byref, c_char_p, c_double, c_int, c_int64, c_size_t, c_void_p
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from model.batch import Batch
from model.kernels import structs
from model.kv_cache import LayerCache
from model.memory import HugePages
from model.scores import Scores

log = logging.getLogger(__name__)

STALE = "the C kernels were built for another version; install again"
LEVELS = {"portable": 0, "avx2": 1, "avx512": 2, "vnni": 3}


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

    def write_kv(self, qkv: Tensor, cache: LayerCache, slots: Tensor) -> None:
        """Store the keys and values of qkv: (rows, 3 * n_embd) at slots: (rows,) int64, in the layout of kernels.h."""
        assert slots.dtype == torch.int64
        assert qkv.shape == (len(slots), 3 * structs.width(cache))
        qkv = structs.ready(qkv)
        batch = structs.BatchStruct(rows=len(slots), slots=slots.data_ptr())
        self.run_one(structs.Op.WRITE_KV, structs.AttentionCall(structs.kv(cache), qkv.data_ptr()), batch)

    def score(self, logits: Tensor, tokens: Tensor, tops: Sequence[int | None]) -> Scores:
        """logits: (rows, vocab), tokens: (rows,) int64, tops: (rows,), none above the vocabulary's size."""
        top = max(each or 0 for each in tops)
        assert tokens.dtype == torch.int64
        assert len(tokens) == len(tops) == len(logits)
        assert top <= logits.shape[1]
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
        assert qkv.shape == (len(batch.tokens), 3 * structs.width(cache))
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
    wanted = threads or torch.get_num_threads()
    started = kernels.set_threads(wanted)
    if started < wanted:
        log.warning("the C kernels have fewer threads than asked for", extra={"asked": wanted, "started": started})
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
