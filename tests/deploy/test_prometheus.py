"""A real Prometheus scrapes a real server under load: every panel and every alert has data, and alerts fire."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from deploy.prometheus import DOCKER, Prometheus, prometheus
from serving import RunningServer, serving

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None, reason="prometheus is not installed"
)
FLAGS = ["--threads=1", "--workers=2", "--max-num-seqs=2", "--max-num-queued-reqs=1", "--speculative-method=ngram"]
CALLERS = 8
VARIABLES = {"$job": ".*", "$model_name": ".*", "$instance": ".*", "$__rate_interval": "5m"}
# A stream of one token after another, all alike: guesses come true.
WORK = {"prompt": [11, 12, 13] * 20, "max_tokens": 24, "logit_bias": {"11": 80}, "temperature": 0, "n": 2}


@pytest.fixture(scope="module")
def served(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningServer, Prometheus]]:
    with serving(tiny, *FLAGS) as server:
        target = server.url.removeprefix("http://")
        with prometheus(tmp_path_factory.mktemp("prometheus"), [target]) as watching:
            watching.wait_until(lambda: watching.query("sum(gpt2_engine_up) == 2"), 20)  # else first events go unseen
            yield server, watching


@contextmanager
def load(server: RunningServer) -> Iterator[None]:
    """More than it can queue, until the end of the block."""
    done = threading.Event()

    def call() -> None:
        with httpx.Client(timeout=60) as client:
            while not done.is_set():
                answer = client.post(f"{server.url}/v1/completions", json=WORK)
                assert answer.status_code in {200, 503}
                time.sleep(0.02)

    threads = [threading.Thread(target=call) for _ in range(CALLERS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join(60)


def checked(*command: Any, said: str = "") -> None:
    result = subprocess.run(["promtool", "check", *command], input=said, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "WARNING" not in result.stdout + result.stderr
    assert not said or not result.stdout + result.stderr  # the linter of metrics has no complaint at all


def test_promtool_has_no_complaint(served: tuple[RunningServer, Prometheus]) -> None:
    server, _ = served
    server.complete(**WORK)
    checked("config", DOCKER / "prometheus.yml")
    checked("rules", DOCKER / "recording.yml", DOCKER / "alerts.yml")
    checked("metrics", said=httpx.get(f"{server.url}/metrics").text)


def panels() -> Iterator[tuple[str, str]]:
    for path in sorted((DOCKER / "grafana" / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_text("utf-8"))["panels"]:
            for target in panel["targets"]:
                expression = target["expr"]
                for name, value in VARIABLES.items():
                    expression = expression.replace(name, value)
                yield f"{path.stem}: {panel['title']}", expression


def test_every_expression_has_data_and_overload_raises_an_alarm(served: tuple[RunningServer, Prometheus]) -> None:
    server, watching = served
    wanted = dict(enumerate(panels()))
    assert len(wanted) > 80
    recorded = {rule["name"]: rule["query"] for rule in watching.rules() if rule["type"] == "recording"}
    assert len(recorded) >= 6
    with load(server):
        watching.wait_until(lambda: {"Overload", "HTTPErrors"} <= watching.firing(), 40)

        def all_have_data() -> bool:
            for number, (_, expression) in list(wanted.items()):
                if finite(watching.query(expression)):
                    del wanted[number]
            return not wanted

        try:
            watching.wait_until(all_have_data, 60)
        except AssertionError:
            pytest.fail("no data: " + "\n".join(f"{where}: {what}" for where, what in wanted.values()))
        for name in recorded:
            assert finite(watching.query(name)), name
    for rule in watching.rules():
        assert rule["health"] == "ok", rule


def finite(result: list[dict[str, Any]]) -> bool:
    return any(series["value"][1] not in {"NaN", "+Inf", "-Inf"} for series in result)


def test_a_killed_worker_raises_an_alarm(served: tuple[RunningServer, Prometheus]) -> None:
    server, watching = served
    lost = "sum(gpt2_worker_restarts_total)"
    before = float(watching.query(lost)[0]["value"][1])
    children = psutil.Process(server.process.pid).children()
    worker = next(child for child in children if "server.worker" in " ".join(child.cmdline()))
    os.kill(worker.pid, signal.SIGKILL)
    watching.wait_until(lambda: watching.query(f"{lost} > {before}"), 40)
    watching.wait_until(lambda: "WorkerRestarts" in watching.firing(), 40)
    watching.wait_until(lambda: watching.query("sum(gpt2_engine_up) == 2"), 60)


def test_a_server_that_was_put_to_sleep_raises_no_alarm(tiny: Path, tmp_path: Path) -> None:
    """It refuses what it is told to refuse, and its worker is where it should be."""
    refused = 'sum(rate(gpt2_requests_rejected_total{reason="asleep"}[5m]))'
    with serving(tiny, "--threads=1") as server, prometheus(tmp_path, [server.url.removeprefix("http://")]) as watching:
        server.complete(**WORK)
        watching.wait_until(lambda: watching.query("sum(gpt2_engine_up) == 1"), 20)
        assert httpx.post(f"{server.url}/sleep?level=2", timeout=60).status_code == 200

        def ask_until(expression: str) -> None:
            def answered() -> Any:
                for path in ("/v1/completions", "/invocations"):
                    assert httpx.post(f"{server.url}{path}", json=WORK).status_code == 503
                return watching.query(expression)

            watching.wait_until(answered, 40)

        ask_until(f"{refused} > 0")
        ask_until("count_over_time(job:gpt2_http_errors:ratio_rate5m[5m]) > 3")  # worked out once a second
        assert not watching.firing() & {"NoWorker", "Overload", "HTTPErrors", "RequestErrors", "ServerDown"}
        assert httpx.post(f"{server.url}/wake_up", timeout=60).status_code == 200


def test_a_server_that_is_gone_raises_an_alarm(served: tuple[RunningServer, Prometheus]) -> None:
    server, watching = served
    server.check_identities()
    assert "ServerDown" not in watching.firing()
    assert server.stop() == 0
    watching.wait_until(lambda: "ServerDown" in watching.firing(), 20)
