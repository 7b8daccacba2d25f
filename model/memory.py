"""Large arrays in main memory. Knows nothing of what they hold."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

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


class ReusedRows:
    """Memory for one large result after another. Freed, each would leave a hole in the heap that the next, longer one
    does not fit in: a batch that fills row by row left 30 MB of them."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._rows = torch.empty(0, width)

    def __call__(self, rows: int) -> Tensor:
        """(rows, width) fp32 of anything, good until the next call."""
        if rows > len(self._rows):
            kept = 1 << (rows - 1).bit_length()
            self._rows = huge_zeros(4 * kept * self._width).view(torch.float32).view(kept, self._width)
        return self._rows[:rows]


def give_back() -> None:
    """What was freed goes back to the system, where the C library knows how: loading leaves hundreds of MB behind."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def give_back_code() -> None:
    """Pages of libraries that only starting needed are let go; what is called again is mapped again from the file.

    Of PyTorch's some 60 MB are touched on import, a fifth of which serving touches again.
    """
    if sys.platform == "linux" and hasattr(mmap, "MADV_DONTNEED"):
        libc = ctypes.CDLL(None)
        for start, end in _unwritten_code():
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def _unwritten_code() -> Iterator[tuple[int, int]]:
    """Mappings of files that can be executed and not written, and that nothing was written to when they were linked.

    Read from proc(5)'s smaps: `start-end mode offset device inode path`, then lines of `Name: value`.
    """
    start, end, mode, inode = "", "", "", ""
    try:
        lines = Path("/proc/self/smaps").read_text("utf-8", "replace").splitlines()
    except OSError:  # there is no /proc in this box
        return
    for line in lines:
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ (\d+)", line):
            start, end, mode, inode = found.groups()
        elif line.split() == ["Private_Dirty:", "0", "kB"] and mode.startswith("r-x") and inode != "0":
            yield int(start, 16), int(end, 16)
