"""A real server in its own processes, as a user starts it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

START_TIMEOUT = 60
IDLE_TIMEOUT = 10


@dataclass
class RunningServer:
    url: str
    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)  # standard output and error, as they come

    @property
    def worker_pid(self) -> int:
        (worker,) = (c for c in psutil.Process(self.process.pid).children() if "server.worker" in " ".join(c.cmdline()))
        return int(worker.pid)

    def complete(self, **body: Any) -> dict[str, Any]:
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        decoded: dict[str, Any] = answer.json()
        return decoded

    def stream(self, **body: Any) -> Iterator[dict[str, Any]]:
        """The chunks of a streamed answer; checks that it ends as it should."""
        with httpx.stream("POST", f"{self.url}/v1/completions", json={**body, "stream": True}, timeout=120) as answer:
            assert answer.status_code == 200
            lines = [line for line in answer.iter_lines() if line and not line.startswith(":")]
        assert lines[-1] == "data: [DONE]"
        yield from (json.loads(line.removeprefix("data: ")) for line in lines[:-1])

    def metrics(self) -> dict[str, float]:
        """Samples of /metrics by name and labels, without the model's name, and of all workers together."""
        samples: dict[str, float] = {}
        for line in httpx.get(f"{self.url}/metrics").text.splitlines():
            if not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                name = re.sub(r',?(engine|model_name)="[^"]*"', "", name).replace("{,", "{").removesuffix("{}")
                samples[name] = samples.get(name, 0) + float(value)
        return samples

    def wait_until_idle(self) -> dict[str, float]:
        """The books of an idle server: nothing runs, nothing waits, no block is held."""
        deadline = time.monotonic() + IDLE_TIMEOUT
        while True:
            now = self.metrics()
            busy = [
                now[f"gpt2_{name}"] for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
            ]
            if not any(busy):
                return now
            assert time.monotonic() < deadline, f"running, waiting, KV use: {busy}"
            time.sleep(0.05)

    def check_identities(self) -> None:
        """What must hold of the metrics at any moment at which nothing is in flight."""
        now = self.wait_until_idle()
        ended = sum(value for name, value in now.items() if name.startswith("gpt2_request_success_total"))
        assert now["gpt2_requests_total"] == ended + now["gpt2_requests_in_flight"]
        assert now["gpt2_e2e_request_latency_seconds_count"] == ended
        assert now["gpt2_generation_tokens_total"] == (
            now["gpt2_time_to_first_token_seconds_count"] + now["gpt2_inter_token_latency_seconds_count"]
        )

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Returns the exit status; leaves no process behind."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(number)
        status = self.process.wait(30)
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not alive
        return status


@contextmanager
def serving(model: Path | None = None, *flags: str, env: dict[str, str] | None = None) -> Iterator[RunningServer]:
    """A server that is ready. On leaving it is drained, and its books are checked."""
    process = start(model, *flags, env=env)
    server = RunningServer("", process)
    reader = threading.Thread(target=_read, args=(server,), daemon=True)
    reader.start()
    try:
        server.url = _wait_for_url(server)
        yield server
        if process.poll() is None:
            server.check_identities()
            assert server.stop() == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        reader.join(5)
        assert process.stdout is not None
        process.stdout.close()


def start(model: Path | None, *flags: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "server.cli", "serve", *([str(model)] if model else []), "--port", "0", *flags]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **(env or {})},
    )


def check_refused(process: subprocess.Popen[str], line: str) -> None:
    """It says why in one line, and exits 78."""
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 78, out
    said = [each for each in out.splitlines() if line in each]
    assert len(said) == 1, out
    assert "Traceback" not in out
    assert "Serving on" not in out


def _read(server: RunningServer) -> None:
    assert server.process.stdout is not None
    for line in server.process.stdout:
        server.lines.append(line.rstrip("\n"))


def _wait_for_url(server: RunningServer) -> str:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline and server.process.poll() is None:
        for line in list(server.lines):
            if match := re.search(r"Serving on (http://\S+),", line):
                return match[1]
        time.sleep(0.02)
    raise AssertionError("the server did not start:\n" + "\n".join(server.lines))
