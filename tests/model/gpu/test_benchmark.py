"""The commands that settle what a GPU does must not fail the day there is one: here they run on the CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu, host

ROOT = Path(gpu.__file__).parents[1]


def test_the_benchmark_checks_parity_and_prints_its_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--device", "cpu", "--dtype", "float32", "--shapes", "tiny", "--streams", "1", "8", "--no-peer"]
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
    gpu.main()
    said = capsys.readouterr().out
    assert "Parity: 16 of 16 greedy texts of 100 tokens are the CPU's, in float32" in said
    rows = [line.strip("| ").split(" | ") for line in said.splitlines() if line.startswith("| tiny")]
    assert [row[:2] for row in rows] == [["tiny", "1"], ["tiny", "8"]]
    assert all(row[4:6] == ["–", "–"] for row in rows)  # a CPU has no graphs
    assert all(float(cell.replace(",", "")) > 0 for row in rows for cell in (*row[1:4], *row[6:]))


def test_what_the_host_does_for_a_step_can_be_measured_without_a_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["host", "--streams", "1", "9"])
    host.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[4:]]
    assert [row[0] for row in rows] == ["1", "9"]
    assert all(float(cell.replace(",", "")) > 0 for row in rows for cell in row[1:])


def test_a_whole_server_runs_on_a_device_that_does_nothing() -> None:
    command = [sys.executable, "-m", "benchmarks.host", "--http", "--streams", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    streams, rate, cost = done.stdout.splitlines()[-1].strip("| ").split(" | ")
    assert streams == "2"
    assert float(rate.replace(",", "")) > 0
    assert float(cost) > 0
