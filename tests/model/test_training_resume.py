"""A run that dies ends with the weights of one that does not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from model.config import ModelConfig, parse_config
from model.training.__main__ import main
from model.training.data import TokenArray
from model.training.log import Log, Row, read_log
from model.training.schedule import Progress
from model.training.trainer import STATE, Recipe, Trainer, run

ROOT = Path(__file__).parents[2]
RECIPE = Recipe(batch_tokens=64, shorter=2, candidates=32, half_precision=False, validate_every=4)
STEPS = 12  # through every phase: short and long windows, sampled and full softmax


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small only lose by being divided among cores, and much where others use them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(**changes: object) -> ModelConfig:
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 16, "vocab_size": 97, "eos_token_id": 96}
    return parse_config({**shape, **changes})


def text() -> TokenArray:
    return np.random.default_rng(0).integers(97, size=500).astype(np.uint16)


def trainer() -> Trainer:
    return Trainer(config(), RECIPE, text(), text()[:200], Progress(total=STEPS, cap=1))


def made(out: Path) -> Trainer:
    out.mkdir(exist_ok=True)
    return trainer()


def run_to_end(trainer: Trainer, out: Path) -> bytes:
    with Log(out / "log.csv", trainer.step) as log:
        run(trainer, out, log, timed=False, save_every=0.0)
    return (out / "model.safetensors").read_bytes()


@pytest.fixture
def uninterrupted(tmp_path: Path) -> bytes:
    out = tmp_path / "uninterrupted"
    out.mkdir()
    return run_to_end(trainer(), out)


@pytest.mark.parametrize("death", [1, 5, 10, 11])
def test_a_resumed_run_ends_with_identical_weights(tmp_path: Path, uninterrupted: bytes, death: int) -> None:
    first = trainer()
    for _ in range(death):
        first.train_step()
        first.progress.advance(1)
    first.save(tmp_path)
    first.train_step()  # lost: it was not saved

    second = trainer()
    second.resume(tmp_path)
    assert (second.step, second.progress.done) == (death, death)
    assert run_to_end(second, tmp_path) == uninterrupted


def test_another_networks_state_is_refused(tmp_path: Path) -> None:
    trainer().save(tmp_path)
    for other in (config(n_layer=1), config(n_embd=32)):
        with pytest.raises(ValueError, match=STATE):
            Trainer(other, RECIPE, text(), text(), Progress(total=1, cap=1)).resume(tmp_path)


def test_a_run_from_a_model_has_its_weights_goes_on_in_the_text_and_is_resumed_as_any(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    run_to_end(made(base), base)

    first = made(out)
    first.begin_from(base, tokens=STEPS * RECIPE.batch_tokens)
    stored = load_file(base / "model.safetensors")
    assert all(first.network.state_dict()[name].equal(tensor.float()) for name, tensor in stored.items())
    assert first.tokens == 768
    first.train_step()
    first.save(out)
    second = made(out)
    second.resume(out)
    assert (second.step, second.tokens) == (1, 832)


def test_a_run_from_a_model_of_another_shape_is_refused(tmp_path: Path) -> None:
    made(tmp_path).save(tmp_path)
    other = Trainer(config(n_layer=1), RECIPE, text(), text(), Progress(total=1, cap=1))
    with pytest.raises(RuntimeError, match=r"transformer\.h\.1"):
        other.begin_from(tmp_path, 0)


@pytest.mark.parametrize("flags", [["--from", "model/default", "--layers", "3"], ["--seen", "5"]])
def test_what_would_be_ignored_is_refused(flags: list[str], tmp_path: Path) -> None:
    asked = ["--corpus", "x", "--vocab", "x", "--out", str(tmp_path), "--steps", "1", *flags]
    with pytest.raises(SystemExit, match="2"):
        main(asked)


def test_a_timed_run_credits_the_clock_and_stops(tmp_path: Path) -> None:
    seconds = iter(range(0, 10_000, 3))
    timed = Trainer(config(), RECIPE, text(), text()[:200], Progress(total=30, cap=5))
    with Log(tmp_path / "log.csv", 0) as log:
        run(timed, tmp_path, log, timed=True, save_every=60, clock=lambda: float(next(seconds)))
    assert (timed.step, timed.progress.done) == (10, 30)
    rows = read_log(tmp_path / "log.csv")
    assert [row["done"] for row in rows][:2] == ["3.0", "6.0"]
    assert [row["step"] for row in rows if row["valid_loss"]] == ["4", "8"]
    assert {row["tokens_per_second"] for row in rows} == {"21"}


def test_the_log_forgets_steps_that_will_be_run_again(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    with Log(path, 0) as log:
        for step in range(1, 6):
            log.write(Row(step, 64 * step, float(step), 4.0, None, 1.0))
    with path.open("a") as file:
        file.write("6,384,6")  # killed in the middle of a line
    with Log(path, 3) as log:
        log.write(Row(4, 256, 4.0, 3.5, 3.75, 2.0))
    assert [(row["step"], row["loss"]) for row in read_log(path)] == [
        ("1", "4.0000"), ("2", "4.0000"), ("3", "4.0000"), ("4", "3.5000"),
    ]  # fmt: skip
    assert read_log(path)[-1]["tokens_per_second"] == "32"


def test_a_process_killed_at_random_resumes_to_the_same_weights(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    words = "The quick brown fox jumps over the lazy dog, and the dog does not mind it at all. "
    (corpus / "train.txt").write_text(words * 30)
    (corpus / "valid.txt").write_text(words * 5)
    whole, killed = (start(corpus, tmp_path / name) for name in ("whole", "killed"))
    try:
        deadline = time.monotonic() + 120
        while killed.poll() is None and not (tmp_path / "killed" / STATE).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(killed.pid, signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL
        resumed = start(corpus, tmp_path / "killed")
        assert resumed.wait(120) == 0
        assert whole.wait(120) == 0
    finally:
        for process in (whole, killed):
            if process.poll() is None:
                process.kill()
    expected, got = (load_file(tmp_path / name / STATE) for name in ("whole", "killed"))
    assert expected.keys() == got.keys()
    assert all(expected[name].equal(got[name]) for name in expected)
    assert [row["step"] for row in read_log(tmp_path / "killed" / "log.csv")] == [str(n) for n in range(1, 41)]


def start(corpus: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "model.training", "--corpus", str(corpus), "--vocab", "model/default"]
    shape = ["--out", str(out), "--layers", "1", "--width", "8", "--heads", "2", "--context", "64", "--threads", "1"]
    length = ["--steps", "40", "--batch-tokens", "256", "--candidates", "64", "--fp32", "--save-every", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *shape, *length], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
