"""Debian's PostgreSQL, started for a test in a directory of its own and reached by a socket there."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

START_TIMEOUT = 60


@contextmanager
def postgres() -> Iterator[str]:
    """Its URL. Skips where it is not installed, or there is no user who may run it."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not programs:
        pytest.skip("PostgreSQL is not installed")
    bin_ = programs[-1].parent
    user = _user()
    directory = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # a socket's path has 107 bytes at most
    try:
        if user is not None:
            shutil.chown(directory, user)
        data = directory / "data"
        subprocess.run(
            [bin_ / "initdb", "-D", data, "-A", "trust", "-U", "gpt2", "--no-sync"],
            user=user, check=True, capture_output=True, cwd=directory,
        )  # fmt: skip
        with (directory / "log").open("wb") as log:
            server = subprocess.Popen(
                [bin_ / "postgres", "-D", data, "-k", directory, "-F", "-c", "listen_addresses="],
                user=user, stdout=log, stderr=log, cwd=directory,
            )  # fmt: skip
        try:
            _wait(bin_, directory, server)
            yield f"postgresql+psycopg://gpt2@/postgres?host={directory}"
        finally:
            server.send_signal(signal.SIGINT)  # a fast shutdown: no waiting for clients
            server.wait(60)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _user() -> str | None:
    """PostgreSQL will not run as root."""
    if os.getuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    for name in ("postgres", "nobody"):
        if name in known:
            return name
    pytest.skip("there is no user but root to run PostgreSQL")


def _wait(bin_: Path, directory: Path, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    ask = [bin_ / "pg_isready", "-q", "-h", directory]
    while subprocess.run(ask, check=False).returncode:
        assert server.poll() is None, (directory / "log").read_text()
        assert time.monotonic() < deadline, "PostgreSQL does not start"
        time.sleep(0.05)
