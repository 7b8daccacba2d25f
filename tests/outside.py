"""Programs of others that tests run, each in an environment of its own that is kept between runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CACHE = Path(__file__).parents[1] / ".cache" / "clients"
INSTALL_TIMEOUT = 240  # seconds; pytest gives up on a test after 300

Environment = Callable[..., Path]


def install(command: list[Any], where: Path, timeout: float = INSTALL_TIMEOUT) -> None:
    """Skips the test where it fails: no network is no fault of the server."""
    try:
        result = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False, timeout=timeout)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{command[-1]} was not installed within {timeout:g} s")
    if result.returncode:
        pytest.skip(f"{command[-1]} cannot be installed: {result.stderr.strip()[-300:]}")


@pytest.fixture(scope="session")
def environment() -> Environment:
    """The Python of a virtual environment that holds just these requirements. Skips where they cannot be had."""

    def make(name: str, *requirements: str, beside_ours: bool = False, timeout: float = INSTALL_TIMEOUT) -> Path:
        """beside_ours: it sees our own packages too, so that torch is not installed twice."""
        directory = CACHE / name
        python = directory / "bin" / "python"
        done = directory / "installed"
        wanted = "\n".join(requirements)
        if not done.exists() or done.read_text() != wanted:
            subprocess.run([sys.executable, "-m", "venv", "--clear", directory], check=True)
            if beside_ours:
                version = f"python{sys.version_info.major}.{sys.version_info.minor}"
                ours = directory / "lib" / version / "site-packages" / "ours.pth"
                ours.write_text(sysconfig.get_path("purelib") + "\n")
            pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            install([*pip, *requirements], CACHE, timeout)
            done.write_text(wanted)
        return python

    return make


@pytest.fixture(scope="session")
def node_modules() -> Callable[..., Path]:
    """A directory in which node finds just these packages."""

    def make(name: str, *packages: str) -> Path:
        if shutil.which("npm") is None:
            pytest.skip("npm is not installed")
        directory = CACHE / name
        done = directory / "installed"
        wanted = "\n".join(packages)
        if not done.exists() or done.read_text() != wanted:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
            install(["npm", "install", "--no-audit", "--no-fund", "--silent", *packages], directory)
            done.write_text(wanted)
        return directory

    return make


def say(command: list[Any], where: Path | None = None, timeout: float = 240) -> list[Any]:
    """What a script printed, one JSON value a line."""
    result = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False, timeout=timeout)
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads(line) for line in result.stdout.splitlines()]
