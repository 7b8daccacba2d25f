"""What the operator sees of a start: a bar on a terminal, none in a log, and a banner that says what is served."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from serving import RunningServer

from server.commands.serve import Terminal
from server.worker.messages import Ready, Starting

COMMAND = [sys.executable, "-m", "server.cli", "serve", "--port", "0", "--threads", "1"]


def test_a_terminal_sees_the_weights_come(tiny: Path) -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "wb") as stderr, os.fdopen(ours, "rb", buffering=0) as terminal:
        process = subprocess.Popen([*COMMAND, str(tiny)], stdout=subprocess.PIPE, stderr=stderr, text=True)
        assert process.stdout is not None
        with process:
            banner = [process.stdout.readline() for _ in range(2)]
            process.send_signal(signal.SIGTERM)
            process.stdout.read()
            assert process.wait(30) == 0
        seen = terminal.read(1 << 16).decode(errors="replace")
    shares = [int(each) for each in re.findall(r"(\d+)%", seen)]
    assert shares[0] == 0
    assert shares == sorted(shares)
    assert "Loading " in seen
    assert re.search(r"on cpu, .*KV cache for [\d,]+ tokens; ready in", banner[0])
    assert banner[1].startswith("Serving on http://127.0.0.1:")


def test_a_log_sees_no_bar(server: RunningServer) -> None:
    assert not any("Loading" in line or "\x1b" in line for line in server.lines)


def curl_of(server: RunningServer) -> str:
    return next(line for line in server.lines if line.strip().startswith("curl "))


def run_verbatim(command: str, **env: str) -> dict[str, Any]:
    said = subprocess.run(["sh", "-c", command], env={**os.environ, **env}, capture_output=True, timeout=60, check=True)
    answer: dict[str, Any] = json.loads(said.stdout)
    return answer


def test_the_banners_curl_is_answered_on_a_server_with_a_key(tiny: Path) -> None:
    key = {"GPT2_SERVER_API_KEY": "sk-of-the-operator"}
    process = subprocess.Popen([*COMMAND, str(tiny)], stdout=subprocess.PIPE, text=True, env={**os.environ, **key})
    assert process.stdout is not None
    with process:
        try:
            curl = next(line for line in process.stdout if line.strip().startswith("curl "))
            assert key["GPT2_SERVER_API_KEY"] not in curl
            assert run_verbatim(curl, **key)["choices"][0]["text"]
        finally:
            process.send_signal(signal.SIGTERM)
            process.stdout.read()


def test_the_banners_curl_is_answered_on_a_server_without(server: RunningServer) -> None:
    assert "Authorization" not in curl_of(server)
    assert run_verbatim(curl_of(server))["choices"][0]["text"]


def test_the_banner_leaves_a_place_for_a_key_of_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    served = type("Served", (), {"name": "some"})()
    Terminal("http://127.0.0.1:1", served, "YOUR_KEY").ready(Ready("cpu", 16, 64, 0.1))
    assert ' -H "Authorization: Bearer YOUR_KEY" ' in capsys.readouterr().out


def test_the_bar_grows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    terminal = Terminal("http://127.0.0.1:1", type("Served", (), {"name": "some"})())
    for share in (0.0, 0.5, 0.5, 1.0):
        terminal.starting(Starting(share))
    for done in (1, 2):
        terminal.starting(Starting(1.0, done, 2, 0.26))
    bars = capsys.readouterr().err.split("\r")[1:]
    assert [bar.count("█") for bar in bars] == [0, 15, 30, 15, 30]
    assert bars[-1].endswith("2 of 2, 0.3 s")
