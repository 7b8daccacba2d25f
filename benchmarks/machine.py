"""What a figure was measured on."""

from __future__ import annotations

import platform
import re
import sys
from pathlib import Path

import psutil


def machine() -> str:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    return f"{psutil.cpu_count()} cores, {model[1] if model else platform.processor()}"


def family(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def resident_mib(process: psutil.Process) -> float:
    """Of a process and all its children, a page that several share counted once."""
    return sum(each.memory_full_info().pss for each in family(process)) / (1 << 20)
