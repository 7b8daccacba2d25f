"""Bounds for the process that opens foreign files: memory, time, what it may write, no network, no other program.

A pickle is opened with `weights_only`, which builds tensors and plain values and calls nothing. These bounds hold
should that fail, and hold for the parsers of the other formats too.
"""

from __future__ import annotations

import ctypes
import platform
import resource
import struct
import sys
from pathlib import Path

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_LOAD, _JUMP_IF_EQUAL, _JUMP_IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # of classic BPF
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050001, 0x80000000  # REFUSE: errno EPERM
_X32 = 0x40000000
# Linux's numbers of: socket, connect, bind, execve, execveat, ptrace, process_vm_writev, io_uring_setup
_FORBIDDEN = {
    "x86_64": (0xC000003E, (41, 42, 49, 59, 322, 101, 311, 425)),
    "aarch64": (0xC00000B7, (198, 203, 200, 221, 281, 117, 271, 425)),
}


def confine(*, memory: int, seconds: int, written: int) -> None:
    """For the rest of this process. memory: bytes beyond what it has by now; written: bytes of any one file.

    Where the system is not Linux the calls are not filtered, and the other bounds are all there is.
    """
    _limit(resource.RLIMIT_AS, _address_space() + memory)
    _limit(resource.RLIMIT_CPU, seconds, seconds + 5)  # SIGXCPU first: whoever waits can tell what it was
    _limit(resource.RLIMIT_FSIZE, written)
    _limit(resource.RLIMIT_CORE, 0)
    if sys.platform == "linux" and platform.machine() in _FORBIDDEN:
        _filter_calls(*_FORBIDDEN[platform.machine()])


def _limit(kind: int, value: int, last: int | None = None) -> None:
    """last: where the system kills, in place of a signal at `value`."""
    hard = resource.getrlimit(kind)[1]
    unbounded = hard == resource.RLIM_INFINITY
    last = value if last is None else last
    resource.setrlimit(kind, (value if unbounded else min(value, hard), last if unbounded else min(last, hard)))


def _address_space() -> int:
    try:
        return int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
    except OSError:
        return 8 << 30


def _filter_calls(architecture: int, forbidden: tuple[int, ...]) -> None:
    """seccomp(2): a program for every system call. A system that has none of it is left as it is."""
    refuse = len(forbidden)
    program = [
        (_LOAD, 0, 0, 4),  # of which architecture
        (_JUMP_IF_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),  # its number
        (_JUMP_IF_AT_LEAST, refuse + 1, 0, _X32),
        *((_JUMP_IF_EQUAL, refuse - i, 0, number) for i, number in enumerate(forbidden)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in program))
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    filter_ = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, filter_, 0, 0)
