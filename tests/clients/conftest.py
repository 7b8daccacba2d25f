"""Clients that need another version of a package than ours get an environment of their own, kept between runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

CACHE = Path(__file__).parents[2] / ".cache" / "clients"


@pytest.fixture(scope="session")
def environment() -> Callable[..., Path]:
    """The Python of a virtual environment that holds just these requirements. Skips where they cannot be had."""

    def make(name: str, *requirements: str) -> Path:
        directory = CACHE / name
        python = directory / "bin" / "python"
        done = directory / "installed"
        if not done.exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", directory], check=True)
            install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements]
            result = subprocess.run(install, capture_output=True, text=True, check=False)
            if result.returncode:
                pytest.skip(f"{' '.join(requirements)} cannot be installed: {result.stderr.strip()[-300:]}")
            done.touch()
        return python

    return make
