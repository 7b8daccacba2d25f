"""A real HAProxy with docker/haproxy.cfg before two servers: it passes streams on as they come, asks another server
for what one did not begin to answer, and nobody twice for what one did.
"""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from serving import RunningServer, serving

pytestmark = pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not installed")
CONFIG = Path(__file__).parents[2] / "docker" / "haproxy.cfg"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@contextmanager
def balancer(directory: Path, servers: list[str]) -> Iterator[str]:
    """Its URL. The committed file, but for addresses, which Docker's DNS would know."""
    ports = {":8080": free_port(), ":8405": free_port()}
    text = CONFIG.read_text("utf-8")
    for port, ours in ports.items():
        text, times = re.subn(rf"bind {port}\b", f"bind 127.0.0.1:{ours}", text)
        assert times == 1
    text, _ = re.subn(r"(?m)^resolvers docker\n(    .*\n)+", "", text)
    text = text.replace(" resolvers docker init-addr none", "")
    text, times = re.subn(r"(?m)^    server-template .*\n", "", text)
    assert times == 2
    lines = "".join(f"    server s{i} {address}\n" for i, address in enumerate(servers))
    text = text.replace("\nfrontend metrics", f"{lines}\nfrontend metrics", 1)
    (directory / "haproxy.cfg").write_text(text)
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(["haproxy", "-db", "-f", directory / "haproxy.cfg"], stdout=log, stderr=log)
    try:
        api, metrics = (f"http://127.0.0.1:{port}" for port in ports.values())
        deadline = time.monotonic() + 20
        while not up(metrics, len(servers)):
            assert time.monotonic() < deadline, (directory / "log").read_text()
            time.sleep(0.1)
        yield api
    finally:
        process.terminate()
        process.wait(20)


def up(metrics: str, wanted: int) -> bool:
    try:
        text = httpx.get(f"{metrics}/metrics").text
    except httpx.HTTPError:
        return False
    return len(re.findall(r'haproxy_server_status\{proxy="servers",server="\w+",state="UP"\} 1', text)) == wanted


def test_haproxy_has_no_complaint() -> None:
    result = subprocess.run(["haproxy", "-c", "-f", CONFIG], capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert "WARNING" not in result.stdout + result.stderr


def completed(server: RunningServer) -> float:
    return server.metrics().get('gpt2_http_requests_total{route="/v1/completions",status="200"}', 0)


@pytest.mark.slow
def test_streams_are_passed_on_and_lost_servers_replaced(tiny: Path, tmp_path: Path) -> None:
    with (
        serving(tiny, "--threads", "1") as one,
        serving(tiny, "--threads", "1") as two,
        balancer(tmp_path, [one.url[7:], two.url[7:]]) as api,
    ):
        streams_come_as_they_are_made(api)
        both_have_work(api, one, two)
        a_draining_server_is_spared(api, one, two)


def streams_come_as_they_are_made(api: str) -> None:
    body = {"prompt": "a", "max_tokens": 300, "stream": True, "ignore_eos": True}
    times = []
    with httpx.stream("POST", f"{api}/v1/completions", json=body, timeout=60) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                times.append(time.monotonic())
    assert len(times) > 200  # a chunk holds whole characters: some tokens have none of their own
    spread = times[-1] - times[0]
    assert times[150] - times[0] > 0.2 * spread  # not gathered and sent at the end
    assert spread > 0.1


def both_have_work(api: str, one: RunningServer, two: RunningServer) -> None:
    before = completed(one), completed(two)
    threads = [threading.Thread(target=ask, args=(api,)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    after = completed(one), completed(two)
    assert after[0] > before[0]
    assert after[1] > before[1]
    assert sum(after) == sum(before) + 6


def ask(api: str) -> int:
    body = {"prompt": "a", "max_tokens": 100, "ignore_eos": True}
    return httpx.post(f"{api}/v1/completions", json=body, timeout=60).status_code


def a_draining_server_is_spared(api: str, one: RunningServer, two: RunningServer) -> None:
    """From the first moment, before any health check has seen it, and what it was answering it answers."""
    body = {"prompt": "a", "max_tokens": 900, "stream": True, "ignore_eos": True}
    ended: list[str] = []

    def read() -> None:
        with httpx.stream("POST", f"{api}/v1/completions", json=body, timeout=60) as answer:
            ended.append([line for line in answer.iter_lines() if line][-1])

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    while not (one.metrics()["gpt2_requests_in_flight"] and two.metrics()["gpt2_requests_in_flight"]):
        time.sleep(0.02)
    one.process.send_signal(signal.SIGTERM)
    assert [ask(api) for _ in range(8)] == [200] * 8
    for reader in readers:
        reader.join(60)
    assert ended == ["data: [DONE]"] * 2
    assert one.process.wait(30) == 0
    assert [ask(api) for _ in range(4)] == [200] * 4
