"""`gpt2-server fine-tune` and `distill`, as an operator runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from serving import serving

from server.checkpoint import EMBEDDED
from server.cli import main

CLI = [sys.executable, "-m", "server.cli"]
COMMON = ["--threads", "1", "--max-steps", "4", "--batch-size", "2", "--learning-rate", "0.01"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    lines = [{"prompt": f"Ship {i}", "completion": f" sailed at {i}."} for i in range(8)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_an_adapter_is_made_and_served(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["fine-tune", str(data), "--valid", str(data), "--out", str(out), "--name", "ships", *COMMON]
    assert main([*arguments, "--rank", "2", "--targets", "c_attn"]) == 0
    said = capfd.readouterr().err
    assert "8 examples (" in said
    assert "step 4/4  epoch 1.00  loss " in said
    assert f"Finished after 4 steps: {out / 'model'}" in said
    assert json.loads((out / "model" / "adapter_config.json").read_text())["target_modules"] == ["attn.c_attn"]
    assert (out / "model" / "README.md").read_text().count(f"{EMBEDDED}\n") == 1  # what it can be loaded by
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len((out / "log.csv").read_text().splitlines()) == 5
    with serving(None, "--threads", "1", "--lora-modules", f"ships={out / 'model'}") as server:
        assert server.complete(model="ships", prompt="Ship 9", max_tokens=4)["model"] == "ships"


def test_a_student_is_made_and_guesses(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["distill", str(data), "--out", str(out), "--layers", "2", "--hidden", "1", *COMMON]) == 0
    assert json.loads((out / "model" / "config.json").read_text())["n_layer"] == 2
    body = {"prompt": "The ship", "max_tokens": 20, "temperature": 0}
    flags = ["--speculative-method", "model", "--speculative-model", str(out / "model")]
    with serving(None, "--threads", "1") as plain, serving(None, "--threads", "1", *flags) as guessing:
        assert plain.complete(**body)["choices"] == guessing.complete(**body)["choices"]


def test_what_is_wrong_is_said(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": 1}\n{"text": "fine"}\n{}\n')
    assert main(["fine-tune", str(bad), "--out", str(tmp_path / "out"), "--threads", "1"]) == 65
    said = capfd.readouterr().err.splitlines()
    assert said[0].startswith("line 3: it must have")
    assert said[1] == "gpt2-server: bad.jsonl, line 1: 'text' is not a string (and 1 more bad line)"
    assert main(["fine-tune", str(data), "--out", str(tmp_path / "out"), "--targets", "wte"]) == 78
    assert "cannot target 'wte'" in capfd.readouterr().err
    assert main(["fine-tune", str(data), "--out", str(tmp_path / "out"), "--model", str(data)]) == 78
    assert main(["distill", str(data), "--out", str(tmp_path / "out"), "--shape", "n_layer=2"]) == 78
    assert "a shape of its own needs 'init'" in capfd.readouterr().err


@pytest.mark.slow
def test_ctrl_c_stops_it_and_the_same_command_goes_on(data: Path, tmp_path: Path) -> None:
    arguments = ["fine-tune", str(data), "--out", str(tmp_path / "out"), "--threads", "1", "--epochs", "1000"]
    process = subprocess.Popen(
        [*CLI, *arguments], stderr=subprocess.PIPE, text=True, start_new_session=True, env={**os.environ}
    )
    assert process.stderr is not None
    with process.stderr:
        process.stderr.readline()
        time.sleep(1)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        said = process.stderr.read()
    assert process.wait(60) == 75
    assert "The same command goes on from there." in said
    again = subprocess.Popen([*CLI, *arguments], stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert again.stderr is not None
    with again.stderr:
        assert ", from step " in again.stderr.readline()
        again.send_signal(signal.SIGTERM)
        again.stderr.read()
    assert again.wait(60) == 75
