"""What the process that opens foreign files cannot do, even were a file to run code in it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

BEGIN = """
import os, socket, subprocess, sys
from model.conversion.confinement import confine
confine(memory=256 << 20, seconds=2, written=1 << 20)
"""
TRIES = {
    "network": ("socket.create_connection(('127.0.0.1', 9))", "PermissionError"),
    "datagrams": ("socket.socket(type=socket.SOCK_DGRAM)", "PermissionError"),
    "a unix socket": ("socket.socket(socket.AF_UNIX)", "PermissionError"),
    "a program": ("subprocess.run(['true'])", "PermissionError"),
    "a shell": ("sys.exit('no shell' if os.system('touch MARK') else 0)", "no shell"),
    "another program in its place": ("os.execv('/bin/true', ['true'])", "PermissionError"),
    "memory": ("bytearray(1 << 30)", "MemoryError"),
    "a large file": (
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); open('large', 'wb').write(bytes(2 << 20))",
        "OSError",
    ),
}  # fmt: skip


def run(code: str, directory: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BEGIN + code]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="the calls are filtered on Linux")
@pytest.mark.parametrize("name", TRIES)
def test_what_it_cannot_do(name: str, tmp_path: Path) -> None:
    code, refusal = TRIES[name]
    done = run(code, tmp_path)
    assert done.returncode != 0
    assert refusal in done.stderr
    assert not (tmp_path / "MARK").exists()


def test_it_ends_when_its_time_is_over(tmp_path: Path) -> None:
    assert run("while True: pass", tmp_path).returncode == -signal.SIGXCPU


def test_what_it_is_there_for_it_can_do(tmp_path: Path) -> None:
    done = run("open('out', 'wb').write(bytes(1 << 19)); print(len(open('out', 'rb').read()))", tmp_path)
    assert done.stdout.strip() == str(1 << 19), done.stderr
