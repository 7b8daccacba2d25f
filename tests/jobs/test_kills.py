"""Kills of the trainer, and of its server: a job goes on, and ends with the weights of one that was left alone."""

from __future__ import annotations

import contextlib
import hashlib
import random
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from serving import RunningServer, serving, start

LINES = b"".join(
    b'{"prompt": "The %dth ship", "completion": " was late by %d hours."}\n' % (i, i * i) for i in range(16)
)
HYPER = {"n_epochs": 5, "batch_size": 2, "learning_rate": 0.01}


def post(server: RunningServer, path: str, **fields: Any) -> dict[str, Any]:
    answer = httpx.post(f"{server.url}{path}", **fields, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def create(server: RunningServer) -> str:
    file = post(server, "/v1/files", data={"purpose": "fine-tune"}, files={"file": ("train.jsonl", LINES)})
    method = {"type": "supervised", "supervised": {"hyperparameters": HYPER}}
    body = {"model": "davinci", "training_file": file["id"], "seed": 5, "method": method}
    return str(post(server, "/v1/fine_tuning/jobs", json=body)["id"])


def state(server: RunningServer, id_: str) -> dict[str, Any]:
    return httpx.get(f"{server.url}/v1/fine_tuning/jobs/{id_}", timeout=60).json()  # type: ignore[no-any-return]


def until_ended(server: RunningServer, id_: str) -> dict[str, Any]:
    deadline = time.monotonic() + 200
    while (job := state(server, id_))["status"] not in {"succeeded", "failed", "cancelled"}:
        assert time.monotonic() < deadline, job
        time.sleep(0.1)
    return job


def wait(server: RunningServer, id_: str) -> None:
    job = until_ended(server, id_)
    assert job["status"] == "succeeded", job


def trainer_of(server: RunningServer) -> psutil.Process | None:
    for child in psutil.Process(server.process.pid).children():
        with contextlib.suppress(psutil.Error):
            if "model.training.finetune" in " ".join(child.cmdline()):
                return child
    return None


def steps(server: RunningServer, id_: str) -> int:
    events = httpx.get(f"{server.url}/v1/fine_tuning/jobs/{id_}/events", params={"limit": 100}, timeout=60).json()
    return max((event["data"]["step"] for event in events["data"] if event["type"] == "metrics"), default=0)


def wait_for_step(server: RunningServer, id_: str, step: int) -> psutil.Process:
    """Returns who took it."""
    deadline = time.monotonic() + 100
    while (trainer := trainer_of(server)) is None or steps(server, id_) < step:
        assert time.monotonic() < deadline, state(server, id_)
        time.sleep(0.01)
    return trainer


def weights(data: Path, id_: str) -> str:
    return hashlib.sha256(
        (data / "jobs" / id_ / "out" / "model" / "adapter_model.safetensors").read_bytes()
    ).hexdigest()


@pytest.mark.timeout(280)
def test_a_killed_trainer_and_a_killed_server_cost_no_bit(tiny: Path, tmp_path: Path) -> None:
    moment = random.Random(11)
    flags = ("--threads", "1", "--data-dir", str(tmp_path))
    with serving(tiny, *flags) as server:
        alone = create(server)
        wait(server, alone)
        killed = create(server)
        for _ in range(2):
            trainer = wait_for_step(server, killed, steps(server, killed) + moment.randint(1, 9))
            assert psutil.Process(trainer.pid).nice() == 19
            time.sleep(moment.random() * 0.05)
            with contextlib.suppress(psutil.Error):
                trainer.send_signal(signal.SIGKILL)
            while trainer.is_running() and trainer.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)
        httpx.get(f"{server.url}/health").raise_for_status()
        wait(server, killed)
        orphaned = create(server)
        wait_for_step(server, orphaned, 3)
        family = psutil.Process(server.process.pid).children(recursive=True)
        server.process.kill()
        server.process.wait(30)
        _, alive = psutil.wait_procs(family, timeout=60)
        assert not alive, "the trainer outlives its server by a step, not more"
    with serving(tiny, *flags) as server:
        wait(server, orphaned)
        listed = {model["id"] for model in httpx.get(f"{server.url}/v1/models").json()["data"]}
        assert {state(server, id_)["fine_tuned_model"] for id_ in (alone, killed, orphaned)} <= listed
    assert weights(tmp_path, alone) == weights(tmp_path, killed) == weights(tmp_path, orphaned)


def test_two_servers_cannot_have_one_directory(tiny: Path, tmp_path: Path) -> None:
    with serving(tiny, "--threads", "1", "--data-dir", str(tmp_path)):
        second = start(tiny, "--threads", "1", "--data-dir", str(tmp_path))
        out, _ = second.communicate(timeout=60)
        assert second.returncode == 78
        assert "another server uses the data directory" in out


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_job_succeeds_though_the_worker_is_killed_as_it_loads_what_the_job_has_made(
    tiny: Path, tmp_path: Path
) -> None:
    """Whenever one is up, from the job's start to its end."""
    rng, killed = random.Random(7), 0
    with serving(tiny, "--threads", "1", "--data-dir", str(tmp_path)) as server:
        expected = server.complete(prompt="The 3th ship", max_tokens=8, seed=1)["choices"]
        id_ = create(server)
        while state(server, id_)["status"] not in {"succeeded", "failed"} and killed < 40:
            if server.metrics()["gpt2_engine_up"]:
                time.sleep(rng.uniform(0.0, 0.4))
                with contextlib.suppress(ValueError, psutil.Error):  # it is being replaced
                    psutil.Process(server.worker_pid).kill()
                    killed += 1
            time.sleep(0.05)
        wait(server, id_)
        name = state(server, id_)["fine_tuned_model"]
        assert server.complete(model=name, prompt="The 3th ship", max_tokens=8, seed=1)["choices"]
        assert server.complete(prompt="The 3th ship", max_tokens=8, seed=1)["choices"] == expected
        assert killed > 0
