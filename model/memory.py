"""Large arrays in main memory. Knows nothing of what they hold."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20


def huge_zeros(size: int) -> Tensor:
    """(size,) uint8 zeros, in huge pages where the system has them: those stream almost twice as fast."""
    memory = mmap.mmap(-1, size + HUGE_PAGE, **({"flags": mmap.MAP_PRIVATE} if os.name == "posix" else {}))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    return whole[start : start + size]


def give_back() -> None:
    """What was freed goes back to the system, where the C library knows how: loading leaves hundreds of MB behind."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
