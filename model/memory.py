"""Large arrays in main memory. Knows nothing of what they hold."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
CHUNK = 32 << 20
CACHE_LINE = 64


def huge_zeros(size: int) -> Tensor:
    """(size,) uint8 zeros, in huge pages where the system has them: those stream almost twice as fast."""
    memory = mmap.mmap(-1, size + HUGE_PAGE, **({"flags": mmap.MAP_PRIVATE} if os.name == "posix" else {}))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    return whole[start : start + size]


class HugePages:
    """Zeros, many arrays to a mapping: one for each would waste half a huge page at its end."""

    def __init__(self) -> None:
        self._rest = torch.empty(0, dtype=torch.uint8)  # of the latest mapping

    def zeros(self, size: int) -> Tensor:
        """(size,) uint8, on a cache line of its own. A mapping lives as long as any of its arrays."""
        if size > CHUNK:
            return huge_zeros(size)
        if size > len(self._rest):
            self._rest = huge_zeros(CHUNK)
        taken, self._rest = self._rest[:size], self._rest[-(-size // CACHE_LINE) * CACHE_LINE :]
        return taken


def give_back() -> None:
    """What was freed goes back to the system, where the C library knows how: loading leaves hundreds of MB behind."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
