"""Ray Serve, two nodes, two replicas: the plain client streams through it, and a replica's death fails no request."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from outside import Environment, environment

__all__ = ["environment"]

ROOT = Path(__file__).parents[2]
TIMEOUT = 240
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def url(environment: Environment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    python = environment("ray", "ray[serve]==2.60.0", beside_ours=True, timeout=600)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = (ROOT / "docker" / "ray-serve.yaml").read_text("utf-8")
    for shipped, ours in (
        ("port: 8000", f"port: {port}"),
        ("EveryNode", "HeadOnly"),  # both nodes are this machine
        ("threads: 2 ", "threads: 1 "),
        ("kv_cache_gib: 1.0", "kv_cache_gib: 0.1"),
    ):
        assert shipped in config
        config = config.replace(shipped, ours)
    path = tmp_path_factory.mktemp("ray") / "serve.yaml"
    path.write_text(config, "utf-8")
    home = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # sockets have short names
    env = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": home}
    env["RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S"] = "5"  # a busy machine's replicas are slow to say how busy
    log = path.with_suffix(".log").open("w")
    command = [python, Path(__file__).with_name("ray_cluster.py"), path]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=env)
    assert process.stdin is not None
    try:
        wait_until_ready(f"http://127.0.0.1:{port}", process, Path(log.name))
        wait_for_replicas(2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.stdin.close()
        process.wait(90)
        log.close()
        shutil.rmtree(home, ignore_errors=True)


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            if httpx.get(f"{url}/ready", timeout=10).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(2)
    raise AssertionError(log.read_text()[-4000:])


def replicas() -> list[psutil.Process]:
    """The processes of the deployment Completions."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        line = " ".join(process.info["cmdline"] or ())
        if "ServeReplica:gpt2-server:Completions" in line and (process.info["environ"] or {}).get("PYTHONPATH") == str(
            ROOT
        ):
            found.append(process)
    return found


def engines() -> list[psutil.Process]:
    return [
        child for replica in replicas() for child in replica.children() if "server.worker" in " ".join(child.cmdline())
    ]


def wait_for_replicas(number: int) -> None:
    deadline = time.monotonic() + TIMEOUT
    while len(engines()) != number:
        assert time.monotonic() < deadline
        time.sleep(0.5)


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="anything")


def ask(client: openai.OpenAI, prompt: str, **fields: Any) -> Any:
    return client.completions.create(model="gpt2-server-default", prompt=prompt, **fields)


def test_the_client_streams_through_it(client: openai.OpenAI) -> None:
    whole = ask(client, "It was", max_tokens=60, seed=3).choices[0].text
    chunks = list(ask(client, "It was", max_tokens=60, seed=3, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole
    assert len(chunks) > 10
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        ask(client, "It was", max_tokens=5000)


def test_the_page_and_the_routes_are_there(url: str) -> None:
    assert "<html" in httpx.get(url).text
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "gpt2-server-default"
    assert httpx.get(f"{url}/nowhere").status_code == 404
    too_much = httpx.post(f"{url}/v1/completions", content=b"x" * (2 << 20), timeout=30)
    assert too_much.status_code == 413


def worked(before: dict[int, float]) -> list[float]:
    """Seconds that each engine has computed since."""
    return [engine.cpu_times().user - before.get(engine.pid, 0.0) for engine in engines()]


def test_a_prompt_goes_where_its_beginning_is_cached(client: openai.OpenAI) -> None:
    before = {engine.pid: engine.cpu_times().user for engine in engines()}
    deadline = time.monotonic() + TIMEOUT
    number = 0
    while not (len(worked(before)) == 2 and min(worked(before)) > 0.1):  # Ray sends nothing to one that just began
        assert time.monotonic() < deadline, "one replica does all of it"
        number += 1
        ask(client, f"{number} " + "warm " * 50, max_tokens=4)
    prompts = [f"{i}: " + "the sea and the wind and the rain " * 20 for i in range(16)]
    firsts = [ask(client, prompt, max_tokens=1).usage for prompt in prompts]
    again = [ask(client, f"{prompt} once more", max_tokens=1).usage for prompt in prompts]
    assert not any(usage.prompt_tokens_details.cached_tokens for usage in firsts)
    hits = [usage.prompt_tokens_details.cached_tokens for usage in again]
    assert all(hit >= 96 for hit in hits), hits


def test_the_death_of_an_engine_costs_no_stream_a_byte(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"max_tokens": 400, "seed": 4, "extra_body": {"ignore_eos": True}}
    undisturbed = ask(client, "a b", **fields).choices[0].text
    stream = ask(client, "a b", stream=True, **fields)
    text = next(stream).choices[0].text
    for engine in engines():
        os.kill(engine.pid, signal.SIGKILL)
    assert text + "".join(chunk.choices[0].text for chunk in stream) == undisturbed


def test_the_death_of_a_replica_under_load_fails_no_request(client: openai.OpenAI) -> None:
    """With the client's own default of two retries."""

    def one(i: int) -> int:
        fields = {"max_tokens": 100, "extra_body": {"ignore_eos": True}}
        return int(ask(client, f"{i} bottles of", **fields).usage.completion_tokens)

    wait_for_replicas(2)
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(one, i) for i in range(80)]
        while sum(each.done() for each in running) < 20:
            time.sleep(0.02)
        killed = replicas()[0]
        killed.kill()
        assert not all(each.done() for each in running)
        assert [each.result() for each in running] == [100] * 80
    wait_for_replicas(2)  # Ray has put another in its place
    assert killed.pid not in {replica.pid for replica in replicas()}
