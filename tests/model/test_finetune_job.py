"""A job as the process that runs it: what it says, what it leaves, and how it dies."""

from __future__ import annotations

import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

from model.training.finetune import Run, main
from model.training.job import Distillation, Job, parse_job
from server.checkpoint import EMBEDDED

ROOT = Path(__file__).parents[2]
TINY = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 64}
COMMAND = [sys.executable, "-m", "model.training.finetune"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    lines = [{"prompt": f"The {i}th ship", "completion": f" was late by {i * i} hours."} for i in range(12)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A tiny model with the real vocabulary, made by a job."""
    out = tmp_path_factory.mktemp("base")
    job = {"train": str(data), "out": str(out), "model": str(EMBEDDED), "init": "gpt2", "shape": TINY, "threads": 1}
    status, events = run({**job, "trainable": "full", "hyperparameters": {"max_steps": 1}}, out)
    assert (status, events[-1]["event"]) == (0, "finished")
    return out / "model"


def run(job: dict[str, Any], where: Path) -> tuple[int, list[dict[str, Any]]]:
    path = where / "job.json"
    path.write_text(json.dumps(job))
    before = torch.get_num_threads(), signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    said, complained = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(complained):
            status = main([str(path)])
    finally:
        torch.set_num_threads(before[0])
        signal.signal(signal.SIGTERM, before[1])
        signal.signal(signal.SIGINT, before[2])
    assert complained.getvalue() == ""
    return status, [json.loads(line) for line in said.getvalue().splitlines()]


def job(base: Path, data: Path, into: Path, **changes: Any) -> dict[str, Any]:
    given = {
        "train": str(data),
        "valid": str(data),
        "out": str(into),
        "model": str(base),
        "threads": 1,
        "hyperparameters": {"epochs": 3, "batch_size": 5, "learning_rate": 0.01, **changes.pop("hyperparameters", {})},
    }
    return {**given, **changes}


@pytest.mark.parametrize("trainable", ["full", "lora", "output_layer"])
def test_a_job_from_start_to_end(base: Path, data: Path, tmp_path: Path, trainable: str) -> None:
    out = tmp_path / "out"
    status, events = run(job(base, data, out, trainable=trainable, name="ft:x"), tmp_path)
    assert status == 0
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, 10))
    measured = [event["valid_loss"] for event in steps if event["valid_loss"] is not None]
    assert len(measured) == 3
    assert measured[-1] < measured[0]
    assert [event["path"] for event in events if event["event"] == "checkpoint"] == [
        "checkpoints/step-3",
        "checkpoints/step-6",
    ]
    assert events[-1]["event"] == "finished"
    written = {path.name for path in (out / "model").iterdir()}
    assert {"README.md", "loss.png"} < written
    assert ("adapter_model.safetensors" in written) == (trainable == "lora") == (events[-1]["kind"] == "adapter")
    assert not (out / "state.safetensors").exists()
    assert str(tmp_path) not in (out / "model" / "README.md").read_text()
    if trainable == "output_layer":
        before, after = load_file(base / "model.safetensors"), load_file(out / "model" / "model.safetensors")
        assert all((after[name] == tensor).all() for name, tensor in before.items())
        assert not (after["lm_head.weight"] == before["transformer.wte.weight"]).all()
    again, events = run(job(base, data, out, trainable=trainable, name="ft:x"), tmp_path)
    assert (again, [event["event"] for event in events]) == (0, ["finished"])


def kill_at_random(command: list[str], moment: random.Random, number: int, steps: int) -> int:
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        for _ in range(moment.randint(1, steps)):
            process.stdout.readline()
        time.sleep(moment.random() * 0.05)
        process.send_signal(number)
        process.stdout.read()
    return process.wait(60)


@pytest.mark.parametrize(
    ("number", "trainable", "patience"),
    [
        (signal.SIGKILL, "full", None),
        pytest.param(signal.SIGKILL, "lora", 2, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "full", 2, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "lora", None, marks=pytest.mark.slow),
    ],
)
def test_a_killed_job_resumes_to_the_same_weights(
    base: Path, data: Path, tmp_path: Path, number: int, trainable: str, patience: int | None
) -> None:
    numbers = {"epochs": 4, "early_stop": patience, "validate_every": 2}
    whole = job(base, data, tmp_path / "whole", trainable=trainable, hyperparameters=numbers, save_every=0.0)
    status, expected = run(whole, tmp_path)
    assert status == 0
    parted = {**whole, "out": str(tmp_path / "parted")}
    path = tmp_path / "parted.json"
    path.write_text(json.dumps(parted))
    moment = random.Random(number)
    for _ in range(2):
        status = kill_at_random([*COMMAND, str(path)], moment, number, 6)
        assert status in ((-9, 0) if number == signal.SIGKILL else (75, 0))
    status, events = run(parted, tmp_path)
    assert status == 0
    assert events[-1] == expected[-1]
    name = "adapter_model.safetensors" if trainable == "lora" else "model.safetensors"
    assert (tmp_path / "parted" / "model" / name).read_bytes() == (tmp_path / "whole" / "model" / name).read_bytes()
    strip = [[line.rsplit(",", 1)[0] for line in (tmp_path / out / "log.csv").read_text().splitlines()]
             for out in ("whole", "parted")]  # fmt: skip
    assert strip[0] == strip[1]


def test_giving_way_takes_time_and_changes_nothing(base: Path, data: Path, tmp_path: Path) -> None:
    status, expected = run(job(base, data, tmp_path / "alone"), tmp_path)
    assert status == 0
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job(base, data, tmp_path / "asked")))
    process = subprocess.Popen([*COMMAND, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    process.send_signal(signal.SIGURG)  # before it can know what that means
    assert process.stdout is not None
    said = []
    with process.stdout:
        for line in process.stdout:
            process.send_signal(signal.SIGURG)
            said.append(json.loads(line))
    assert process.wait(60) == 0
    assert said[-1] == expected[-1]
    alone, asked = (tmp_path / out / "model" / "adapter_model.safetensors" for out in ("alone", "asked"))
    assert alone.read_bytes() == asked.read_bytes()


def test_it_stops_when_nobody_listens(base: Path, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job(base, data, tmp_path / "out", hyperparameters={"epochs": 1000})))
    process = subprocess.Popen([*COMMAND, str(path)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait(60) == 75


def damaged(path: Path) -> Path:
    path.mkdir()
    for file in EMBEDDED.iterdir():
        if file.name != "model.safetensors":
            (path / file.name).symlink_to(file)
    (path / "model.safetensors").write_bytes(b"no weights")
    return path


FAILURES: list[tuple[str, Callable[[Path], dict[str, Any]], int, str, str]] = [
    ("no data", lambda at: {"train": str(at / "gone.jsonl")}, 65, "data", "cannot read gone.jsonl: No such file"),
    ("no model", lambda at: {"model": str(at / "gone")}, 78, "model", "cannot read config.json: No such file"),
    ("damaged model", lambda at: {"model": str(damaged(at / "bad"))}, 78, "model", "model.safetensors is damaged"),
    ("no adapter", lambda at: {"adapter": str(at)}, 78, "model", "cannot read adapter_config.json"),
    ("unknown field", lambda at: {"colour": "red"}, 64, "job", "unknown field `colour`"),
    ("wrong type", lambda at: {"hyperparameters": {"epochs": "many"}}, 64, "job", "`$.hyperparameters.epochs`"),
    ("bad target", lambda at: {"lora": {"targets": ["wte"]}}, 64, "job", "cannot target 'wte'"),
    ("rate", lambda at: {"hyperparameters": {"learning_rate": 1e5}, "trainable": "full"}, 70, "loss", "lower"),
    ("no directory", lambda at: {"out": str(at / "job.json")}, 74, "disk", "job.json"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "status", "reason", "message"), [f[1:] for f in FAILURES], ids=[f[0] for f in FAILURES]
)
def test_a_failure_is_one_clear_line(
    base: Path,
    data: Path,
    tmp_path: Path,
    change: Callable[[Path], dict[str, Any]],
    status: int,
    reason: str,
    message: str,
) -> None:
    asked = job(base, data, tmp_path / "out", **change(tmp_path))
    got, events = run(asked, tmp_path)
    assert (got, events[-1]["event"], events[-1]["reason"]) == (status, "failed", reason)
    assert message in events[-1]["message"]
    assert "\n" not in events[-1]["message"]
    assert str(tmp_path) not in events[-1]["message"]
    assert not (tmp_path / "out" / "model").exists()


def test_bad_lines_are_reported(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n{"txt": 1}\n')
    status, events = run(job(base, path, tmp_path / "out"), tmp_path)
    assert status == 65
    assert [problem["line"] for problem in events[-1]["problems"]] == [2]


def test_a_full_disk_fails_the_job_and_leaves_the_state_before(base: Path, data: Path, tmp_path: Path) -> None:
    asked = job(base, data, tmp_path / "out", trainable="full", save_every=0.0)
    path = tmp_path / "job.json"
    path.write_text(json.dumps(asked))
    limited = ["bash", "-c", f"ulimit -f 1024; trap '' XFSZ; exec {sys.executable} -m model.training.finetune {path}"]
    result = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    last = json.loads(result.stdout.splitlines()[-1])
    assert (result.returncode, last["reason"]) == (74, "disk")
    assert last["message"] == "cannot read or write state.safetensors: File too large"
    assert not list((tmp_path / "out").glob(".*"))
    status, _ = run(asked, tmp_path)
    assert status == 0


def test_another_jobs_directory_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(job(base, data, out), tmp_path)[0] == 0
    status, events = run(job(base, data, out, hyperparameters={"seed": 2}), tmp_path)
    assert (status, events[-1]["message"]) == (64, "the directory holds the result of another job")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "distillation"}, "need each other"),
        ({"model": None}, "no model to start from"),
        ({"init": "gpt2"}, "trained whole"),
        ({"shape": {"n_layer": 3}, "trainable": "full"}, "needs 'init'"),
        ({"hyperparameters": {"early_stop": 2}, "valid": None}, "needs validation data"),
        ({"lora": {"rank": 0}}, "`$.lora.rank`"),
    ],
)
def test_a_job_that_makes_no_sense_is_refused(change: dict[str, Any], message: str) -> None:
    asked = {"train": "t", "valid": "v", "out": "o", "model": "m", **change}
    with pytest.raises(Exception, match=message.replace("$", r"\$").replace("[", r"\[")):
        parse_job(json.dumps(asked).encode())


def test_the_fingerprint_is_of_what_is_computed() -> None:
    one = Job(train="t", out="a", model="m", threads=1, save_every=3.0)
    assert one.fingerprint() == Job(train="t", out="b", model="m", threads=2, nice=5).fingerprint()
    assert one.fingerprint() != Job(train="t", out="a", model="m", trainable="full").fingerprint()


def test_what_the_files_hold_is_a_part_of_the_job(base: Path, data: Path, tmp_path: Path) -> None:
    """Another content at the same path is another job, and the same content at another path the same one."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    train, valid, model, teacher = (tmp_path / name for name in ("train", "valid", "model", "teacher"))
    for path, source in ((train, data), (valid, data)):
        shutil.copyfile(source, path)
    for path in (model, teacher):
        shutil.copytree(base, path)

    def fingerprint() -> str:
        distils = Distillation(teacher=str(teacher))
        job = Job(train=str(train), valid=str(valid), out="o", model=str(model), adapter=str(adapter))
        return msgspec.structs.replace(job, distillation=distils).fingerprint()

    seen = {fingerprint()}
    files = [train, valid, model / "model.safetensors", adapter / "adapter_config.json", teacher / "vocab.json"]
    for file in files:
        file.write_bytes(file.read_bytes() + b" ")
        seen.add(fingerprint())
    assert len(seen) == len(files) + 1
    model = model.rename(tmp_path / "moved")
    assert fingerprint() in seen


def test_new_data_at_the_same_path_is_not_taken_for_the_old(base: Path, data: Path, tmp_path: Path) -> None:
    train = tmp_path / "train.jsonl"
    shutil.copyfile(data, train)
    asked = job(base, data, tmp_path / "out", train=str(train))
    assert run(asked, tmp_path)[0] == 0
    assert run(asked, tmp_path)[0] == 0
    train.write_text('{"text": "blue"}\n' * 9)
    status, events = run(asked, tmp_path)
    assert (status, events[-1]["reason"]) == (64, "job")
    assert "another job" in events[-1]["message"]


@pytest.mark.parametrize("moment", [2, 3, 5, 6, 8, 9, 11, 14])
def test_told_to_stop_at_any_moment_it_ends_at_once_and_resumes_to_the_same_weights(
    moment: int, base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps and validations look whether they are to stop before each rectangle of tokens; here it is the moment-th."""
    looks = 0

    def stopping() -> bool:
        nonlocal looks
        looks += 1
        return looks >= moment

    digests = []
    for out in (tmp_path / "whole", tmp_path / "stopped"):
        changes = {"epochs": 2, "early_stop": 5, "validate_every": 2}
        asked = parse_job(json.dumps(job(base, data, out, micro_batch_tokens=64, hyperparameters=changes)).encode())
        if out.name == "stopped":
            assert Run(asked, stopping).go() == 75
            assert looks <= moment + 1  # the loop that ends looks again
            assert (out / "state.safetensors").exists()
        assert Run(asked, lambda: False).go() == 0
        log = [row.rpartition(",")[0] for row in (out / "log.csv").read_text().splitlines()]  # without seconds
        digests.append(((out / "model" / "adapter_model.safetensors").read_bytes(), log))
    assert digests[0] == digests[1]


def test_a_run_can_be_repeated_from_its_card_alone(base: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(job(base, data, out, hyperparameters={"batch_size": None, "dropout": 0.1}), tmp_path)[0] == 0
    card = (out / "model" / "README.md").read_text()
    for row in ("| learning rate | 0.01 |", "| examples in a step | 1 |", "| dropout | 0.1 |", "| epochs | 3 |"):
        assert row in card
    assert "| validation file | train.jsonl |" in card
    again = json.loads(card.partition("```json")[2].partition("```")[0])
    again["out"] = str(tmp_path / "again")
    assert run(again, tmp_path)[0] == 0
    weights = [(path / "model" / "adapter_model.safetensors").read_bytes() for path in (out, tmp_path / "again")]
    assert weights[0] == weights[1]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
def test_peft_loads_the_result_and_finds_its_base(base: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(job(base, data, out, base_name=str(base)), tmp_path)[0] == 0
    loaded = AutoPeftModelForCausalLM.from_pretrained(out / "model")
    assert loaded.peft_config["default"].base_model_name_or_path == str(base)


def test_preferences_are_learnt_from_start_to_end_and_resumed(base: Path, tmp_path: Path) -> None:
    lines = [{"prompt": f"The {n}th ship", "chosen": " was late.", "rejected": " sank."} for n in range(8)]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = job(base, pairs, tmp_path / "whole", method="dpo", dpo={"beta": 0.2}, micro_batch_tokens=32)
    status, events = run(asked, tmp_path)
    assert status == 0
    steps = [event for event in events if event["event"] == "step"]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert steps[-1]["valid_loss"] < steps[0]["loss"]
    assert "| beta | 0.2 |" in (tmp_path / "whole" / "model" / "README.md").read_text()
    looks = iter([False] * 20)
    stopped = parse_job(json.dumps({**asked, "out": str(tmp_path / "stopped")}).encode())
    assert Run(stopped, lambda: next(looks, True)).go() == 75
    assert Run(stopped, lambda: False).go() == 0
    weights = [(tmp_path / name / "model" / "adapter_model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert weights[0] == weights[1]


def test_what_a_reader_of_the_data_should_know_is_said(base: Path, tmp_path: Path) -> None:
    train, valid = tmp_path / "train.jsonl", tmp_path / "valid.jsonl"
    lines = [{"text": "one"}, {"text": "two"}, {"text": "one"}, {"prompt": "a", "completion": " b" * 99, "id": 5}]
    train.write_text("".join(json.dumps(line) + "\n" for line in lines))
    valid.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("two", "three", "four", "five")))
    _, events = run(job(base, train, tmp_path / "out", valid=str(valid), valid_tokens=4), tmp_path)
    assert events[0]["notes"] == [
        "train.jsonl: examples longer than the context of 64 tokens, cut off at it: 1",
        "train.jsonl: keys that are not used, and in how many lines: 'id' (1)",
        "train.jsonl: examples that are there already: 1",
        "valid.jsonl: examples that are learnt too, or there already: 1",
        "valid.jsonl: measured on 2 of 4 examples, evenly spread",
    ]
    assert events[0]["valid_examples"] == 2


def test_it_imports_nothing_of_the_server() -> None:
    check = "import sys, model.training.finetune; sys.exit(any(name.split('.')[0] == 'server' for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=False, env=os.environ).returncode == 0
