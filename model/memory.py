"""Large arrays in main memory. Knows nothing of what they hold."""

from __future__ import annotations

import mmap
import os

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
