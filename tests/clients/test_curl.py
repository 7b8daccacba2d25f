"""curl as people type it: no content type, a form's by default."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
from serving import RunningServer

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


def curl(*arguments: str) -> str:
    return subprocess.run(["curl", "-sS", *arguments], capture_output=True, text=True, check=True).stdout


def test_whole(server: RunningServer) -> None:
    answer = json.loads(curl(f"{server.url}/v1/completions", "-d", '{"prompt": "Hello", "max_tokens": 5}'))
    assert answer["choices"][0]["text"]


def test_streamed(server: RunningServer) -> None:
    body = '{"prompt": "Hello", "max_tokens": 5, "stream": true}'
    out = curl("-N", "-i", f"{server.url}/v1/completions", "-d", body)
    assert "content-type: text/event-stream" in out
    assert out.endswith("data: [DONE]\n\n")


def test_the_path_of_old_engines(server: RunningServer) -> None:
    answer = json.loads(curl(f"{server.url}/v1/engines/davinci/completions", "-d", '{"prompt": "Hello"}'))
    assert answer["usage"]["completion_tokens"] <= 16


def test_a_mistake_is_answered_with_an_error_object(server: RunningServer) -> None:
    error = json.loads(curl(f"{server.url}/v1/completions", "-d", "{"))["error"]
    assert error.keys() == {"message", "type", "param", "code"}
