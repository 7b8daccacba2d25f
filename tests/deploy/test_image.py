"""What the Dockerfile says, and (slow) what becomes of it: built, and run as its user on a root nobody can write."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx
import psutil
import pytest
from deploy.image import ROOT, TOOLS, Builder, Image

DOCKERFILE = re.sub(r"\\\n", "", (ROOT / "Dockerfile").read_text("utf-8"))
INSTRUCTIONS = [line.split(" ", 1) for line in DOCKERFILE.splitlines() if line and not line.startswith(("#", " "))]
BUILD_TIMEOUT = 1800
START_TIMEOUT = 120
missing = [tool for tool in TOOLS if shutil.which(tool) is None]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Instructions by stage, those of the stages it is built on first."""
    found: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for word, rest in INSTRUCTIONS:
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            current = found[name] = list(found.get(base, [("FROM", base)]))
        else:
            current.append((word, rest.strip()))
    return found


def said(target: str, word: str) -> str:
    return [rest for each, rest in stages()[target] if each == word][-1]


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_image_asks_for_nothing_it_need_not_have(target: str) -> None:
    user, group = said(target, "USER").split(":")
    assert int(user) > 0
    assert int(group) > 0
    assert json.loads(said(target, "ENTRYPOINT")) == ["gpt2-server"]  # no shell between it and its signals
    assert json.loads(said(target, "CMD")) == ["serve"]
    assert said(target, "STOPSIGNAL") == "SIGTERM"
    assert said(target, "VOLUME") == "/models"
    health = said(target, "HEALTHCHECK")
    assert json.loads(health.partition("CMD ")[2]) == ["gpt2-server", "healthcheck"]


def test_the_default_is_the_cpu_image() -> None:
    assert list(stages())[-1] == "cpu"


def test_the_compiler_stays_behind() -> None:
    """But on a GPU, where Triton needs one at run time."""
    assert not any("apt-get" in rest for _, rest in stages()["cpu"])
    for target in ("cpu", "cuda"):
        copies = [rest for word, rest in stages()[target] if word == "COPY"]
        assert copies == [f"--from=build-{target} /opt/gpt2-server /opt/gpt2-server"]


def test_what_is_copied_is_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    kept = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored
    copied = {
        name for word, rest in INSTRUCTIONS if word == "COPY" and "--from" not in rest for name in rest.split()[:-1]
    }
    assert {name.rstrip("/") for name in copied} == kept


def test_nothing_in_it_is_secret_or_fetched_by_hand() -> None:
    assert not re.search(r"(?i)api_key|password|token=|curl |wget |ADD ", DOCKERFILE)


@pytest.mark.slow
@pytest.mark.timeout(BUILD_TIMEOUT)
@pytest.mark.skipif(bool(missing) or os.geteuid() != 0, reason=f"needs root and {' '.join(TOOLS)}")
def test_the_image_is_built_and_serves(tmp_path: Path) -> None:
    builder = Builder(tmp_path)
    began = time.monotonic()
    try:
        builder.make_base()
        based = time.monotonic()
        with builder.built("cpu") as image:
            print(f"base: {based - began:.0f} s; image: {image.size / 1e6:.0f} MB, {time.monotonic() - based:.0f} s")
            serve(image, tmp_path)
    finally:
        builder.clean()


def serve(image: Image, scratch: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    log = scratch / "log"
    with log.open("w") as out:
        command = image.command(scratch, "serve", "--port", url.rsplit(":", 1)[1])
        sandbox = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        healthcheck = image.command(scratch, "healthcheck", "--ready", url)
        deadline = time.monotonic() + START_TIMEOUT
        while subprocess.run(healthcheck, capture_output=True, check=False).returncode:
            assert sandbox.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        check_answer(url)
        server = next(each for each in psutil.Process(sandbox.pid).children(recursive=True) if is_server(each))
        check_confinement(server.pid, image.config["User"])
        server.send_signal(signal.SIGTERM)
        assert sandbox.wait(30) == 0, log.read_text()
        print(log.read_text())
    finally:
        sandbox.kill()
        sandbox.wait()


def is_server(process: psutil.Process) -> bool:
    command = process.cmdline()
    return "python" in command[0] and "serve" in command


def check_answer(url: str) -> None:
    answer = subprocess.run(
        [
            "curl",
            "-sS",
            f"{url}/v1/completions",
            "-d",
            '{"model": "gpt2-server-default", "prompt": "It was", "max_tokens": 8}',
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(answer.stdout)["usage"]["completion_tokens"] > 0
    assert "gpt2_build_info{" in httpx.get(f"{url}/metrics").text


def check_confinement(pid: int, user: str) -> None:
    """Of the server and of its worker: the number of the user, no capabilities, a root nobody can write."""
    for each in (pid, *(child.pid for child in psutil.Process(pid).children())):
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{each}/status").read_text().splitlines())
        numbers = {*status["Uid"].split(), *status["Gid"].split()}
        assert numbers == set(user.split(":")), numbers
        assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
        assert status["NoNewPrivs"] == "1"
        mounts = [line.split() for line in Path(f"/proc/{each}/mountinfo").read_text().splitlines()]
        (options,) = {fields[5] for fields in mounts if fields[4] == "/"}
        assert "ro" in options.split(",")
