"""What the README shows is what happens."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import RunningServer, serving

README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """The embedded default model, as `make serve` serves it."""
    with serving(None, "--threads", "1") as running:
        yield running


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_gives_the_answer_shown(server: RunningServer) -> None:
    found = re.search(r"^\$ (curl .*)\n(\{.*\})$", README, re.MULTILINE)
    assert found is not None
    command = found[1].replace("http://127.0.0.1:8000", server.url)
    answer = json.loads(subprocess.run(["sh", "-c", f"{command} -sS"], capture_output=True, check=True).stdout)
    shown = json.loads(found[2])
    assert answer.keys() == shown.keys()
    assert answer["choices"] == shown["choices"]
    assert answer["usage"] == shown["usage"]


def test_the_curl_that_the_server_prints_is_the_readme_s(server: RunningServer) -> None:
    (printed,) = (line.strip() for line in server.lines if "curl http" in line)
    assert f"$ {printed.replace(server.url, 'http://127.0.0.1:8000')}\n" in README


def test_the_current_client_s_lines_run(server: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
    script = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "OpenAI(" in block)
    exec(compile(script.replace("http://127.0.0.1:8000", server.url), "README.md", "exec"), {})  # noqa: S102
    assert len(capsys.readouterr().out) > 50


def test_every_flag_it_names_exists() -> None:
    command = [sys.executable, "-m", "server.cli", "serve", "--help"]
    help_text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    named = set(re.findall(r"`(--[a-z-]+)`", README))
    assert named
    assert {flag for flag in named if flag not in help_text} == set()
