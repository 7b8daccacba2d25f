"""The comparison with Trainer and peft gives a row for each of the four, of a model that takes a moment."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_each_is_measured() -> None:
    command = [sys.executable, "-m", "benchmarks.learning", "--tiny", "--steps", "3", "--threads", "1"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| `")]
    assert [row[:2] for row in rows] == [
        ["| `lora`", "gpt2-server"],
        ["| `lora`", "Trainer + peft"],
        ["| `full`", "gpt2-server"],
        ["| `full`", "Trainer"],
    ]
    assert all(int(number.rstrip(" |").replace(",", "")) > 0 for row in rows for number in row[2:])
