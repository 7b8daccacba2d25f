"""`gpt2-server complete`: the tokens a server gives, without a server, and a clean end whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from serving import RunningServer

COMMAND = [sys.executable, "-m", "server.cli", "complete"]


def complete(model: Path, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, "--model", str(model), "--threads", "1", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=60)


def test_it_says_what_a_server_says(server: RunningServer, tiny: Path) -> None:
    fields = {"temperature": 0.8, "seed": 5, "max_tokens": 40, "stop": [" zebra", "é"]}
    expected = server.complete(prompt="Hello — 日本", top_k=50, n=2, **fields)["choices"]
    flags = ("--temperature", "0.8", "--seed", "5", "--max-tokens", "40", "--stop", " zebra", "--stop", "é")
    done = complete(tiny, "-", *flags, "--set", "top_k=50", "--set", "n=2", stdin="Hello — 日本")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{expected[0]['text']}\n---\n{expected[1]['text']}\n"


@pytest.mark.parametrize(
    ("arguments", "status", "line"),
    [
        (["a", "--max-tokens", "2000"], 78, "maximum context length is 1024 tokens"),
        (["a", "--set", "best_of=true"], 78, "best_of"),
        (["a", "--set", "best_of"], 2, "FIELD=VALUE"),
        (["a", "--set", "stop=b"], 2, "is not JSON"),
        (["a", "--model", "/no/such"], 78, "is no directory"),
        (["a", "--device", "cuda:99"], 78, "device cuda:99"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], status: int, line: str, tiny: Path) -> None:
    done = complete(tiny, *arguments)
    assert done.returncode == status
    assert line in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_ctrl_c_ends_it_at_once_and_leaves_nothing(tiny: Path) -> None:
    flags = ["--model", str(tiny), "--threads", "1", "--max-tokens", "1000", "--set", "ignore_eos=true"]
    # Jobs that a shell has put in the background ignore it, and so would what they start.
    command = ["env", "--default-signal=INT", *COMMAND, "a", *flags, "--set", "n=16"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        os.killpg(process.pid, signal.SIGINT)  # a terminal tells the whole group
        assert process.wait(30) == 130
        assert process.stderr.read() == b""
    deadline = time.monotonic() + 30
    while living_members(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def living_members(group: int) -> list[int]:
    pids = []
    for process in psutil.process_iter(["status"]):
        with suppress(ProcessLookupError):
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                pids.append(process.pid)
    return pids
