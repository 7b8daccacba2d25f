"""B4, F11: what a server leaves behind: nothing of its clients in its log, and nothing at all on a disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from hygiene import check_error
from serving import RunningServer, serving

ROOT = Path(__file__).parents[2]
WORDS = ["periwinkle", "sarsaparilla", "quokka"]  # of prompts, of stop strings, of names
KEY = "sk-marmalade-4711"


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.touch(0o600)
    keys.write_text(f"team-a: {KEY}\n")
    flags = ("--api-key-file", str(keys), "--open-paths", "/metrics", "--log-level", "debug")
    with serving(tiny, "--threads", "1", *flags) as running:
        yield running


def ask(server: RunningServer, path: str = "/v1/completions", key: str = KEY, **body: object) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, headers={"authorization": f"Bearer {key}"}, timeout=60)


def test_b4_a_mixed_day_leaves_no_word_of_it_in_the_log(server: RunningServer) -> None:
    text, stop, name = WORDS
    for stream in (False, True):
        assert (
            ask(server, prompt=f"{text} {text}", stop=stop, user=name, max_tokens=5, stream=stream).status_code == 200
        )
    assert ask(server, prompt=[15047, 32017], max_tokens=2, logprobs=3, echo=True).status_code == 200
    assert ask(server, prompt=text, guided_regex=f"({text}|{stop})").status_code == 200
    errors = [
        ask(server, prompt=text, max_tokens=stop),
        ask(server, prompt=text, model=name),
        ask(server, prompt=text, guided_regex=f"({text}"),
        ask(server, prompt=text, guided_json={"type": text}),
        ask(server, prompt=text, key=f"{KEY}-wrong"),
        ask(server, path=f"/v1/{name}/{text}"),
        ask(server, path="/v1/embeddings", input=[text, 5]),
        ask(server, path="/tokenize", prompt=5, text=text),
        httpx.post(f"{server.url}/v1/completions", content=text, headers={"x-api-key": KEY}),
    ]
    for answer in errors:
        assert 400 <= answer.status_code < 500
        check_error(answer.text)
    server.wait_until_idle()
    said = "\n".join(server.lines)
    for secret in (*WORDS, KEY, "marmalade", "15047", "32017"):
        assert secret not in said
    lines = [json.loads(line) for line in server.lines if line.startswith("{")]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    assert not any("exception" in line for line in lines)
    answered = [line for line in lines if line["message"] == "answered" and line["route"] == "/v1/completions"]
    assert len(answered) == 9  # the one with the wrong key reached no route
    assert {line["key"] for line in answered if "key" in line} == {"team-a"}
    assert answered[0]["request"].startswith("req_")
    assert (answered[2]["prompt_tokens"], answered[2]["completion_tokens"]) == (2, 2)


BUBBLE = [
    "bwrap", "--unshare-all", "--die-with-parent", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev",
    "--uid", "10001", "--gid", "10001", "--clearenv", "--setenv", "PATH", "/usr/bin:/bin",
]  # fmt: skip
# PyTorch imports dill where it is installed, and dill wants a directory for temporary files. The server does not need
# dill: it is here because a development tool asks for it.
WITHOUT_DILL = "import sys; sys.modules['dill'] = None"
INSIDE = """
import json, os, subprocess, sys, urllib.request
server = subprocess.Popen(
    [sys.executable, "-m", "server.cli", "serve", sys.argv[1], "--threads", "1", "--port", "8000"],
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
)
for line in server.stdout:
    if "Serving on" in line:
        break
else:
    sys.exit("it did not start")
assert os.getuid() == 10001 and "HOME" not in os.environ
for place in ("/", os.getcwd(), "/tmp", "/var/tmp", "/dev/shm/../../run"):
    try:
        open(os.path.join(place, "probe"), "w")
        sys.exit(f"{place} can be written to")
    except OSError:
        pass
body = json.dumps({"prompt": "a", "max_tokens": 5, "guided_regex": "[ab]+"}).encode()
request = urllib.request.Request("http://127.0.0.1:8000/v1/completions", body)
print(json.load(urllib.request.urlopen(request, timeout=30))["usage"]["completion_tokens"])
server.terminate()
rest = server.stdout.read()
print(server.wait(20), "Traceback" in rest)
"""


def test_f11_no_disk_no_home_no_network_no_name(tiny: Path, tmp_path: Path) -> None:
    """A read-only root, an empty environment, loopback alone, and a user that nobody has heard of."""
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    tried = subprocess.run([*BUBBLE, "true"], capture_output=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"bubblewrap may not do this here: {tried.stderr.decode().strip()}")
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_DILL)
    python = [
        "--setenv",
        "PYTHONPATH",
        f"{tmp_path}:{ROOT}",
        "--chdir",
        str(ROOT),
        sys.executable,
        "-B",
        "-c",
        INSIDE,
        str(tiny),
    ]
    ran = subprocess.run(
        [*BUBBLE, *python], capture_output=True, text=True, timeout=120, check=False, env={"PATH": os.environ["PATH"]}
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    tokens, ended = ran.stdout.splitlines()
    assert 1 <= int(tokens) <= 5
    assert ended == "0 False"
