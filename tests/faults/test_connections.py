"""Many connections, more than are allowed, and clients that do not read what they asked for."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from serving import RunningServer, serving
from starlette.types import Receive, Scope, Send

from server.http import DeadlineProtocol, Edges, http_server

GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
HALF = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{"
ABORTED = 'gpt2_request_success_total{finished_reason="abort"}'


def connect(url: str, receive_buffer: int | None = None) -> socket.socket:
    where = urlsplit(url)
    assert where.hostname is not None
    client = socket.socket()
    if receive_buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.settimeout(20)
    client.connect((where.hostname, where.port or 80))
    return client


def healthy(client: socket.socket) -> None:
    client.sendall(GET)
    read_answer(client)


def read_answer(client: socket.socket) -> None:
    said = b""
    while not said.endswith(b'{"status":"ok"}'):
        piece = client.recv(4096)
        assert piece
        said += piece


def closed(client: socket.socket) -> bool:
    client.setblocking(False)
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


@pytest.fixture
def descriptors() -> Iterator[int]:
    """As many as this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 20_000 if hard == resource.RLIM_INFINITY else min(hard, 20_000)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    yield most
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def hold(tiny: Path, count: int) -> tuple[float, list[float]]:
    """Bytes each of `count` idle connections takes, and how long a probe waits for its answers beside them."""
    env = {"GPT2_SERVER_KEEP_ALIVE_TIMEOUT": "600", "GPT2_SERVER_HEAD_TIMEOUT": "600"}
    with serving(tiny, "--threads", "1", env=env) as server, ExitStack() as stack:
        process = psutil.Process(server.process.pid)
        probe = stack.enter_context(httpx.Client())
        for _ in range(200):
            probe.get(f"{server.url}/health")
        before = process.memory_info().rss
        for _ in range(count // 100):
            clients = [stack.enter_context(connect(server.url)) for _ in range(100)]
            for client in clients:
                client.sendall(GET)
            for client in clients:
                read_answer(client)
        each = (process.memory_info().rss - before) / count
        waits = []
        for _ in range(300):
            began = time.perf_counter()
            assert probe.get(f"{server.url}/health").status_code == 200
            waits.append(time.perf_counter() - began)
        assert server.complete(prompt="a", max_tokens=1)
    return each, waits


def test_l1_a_thousand_idle_connections(tiny: Path, descriptors: int) -> None:
    each, waits = hold(tiny, 1000)
    assert each < 8 * 1024  # of a thousand, the allocator's steps show
    assert statistics.median(waits) < 0.03  # 0.04 and more: an answer waited for its first part to be acknowledged


@pytest.mark.slow
def test_l1_ten_thousand_idle_connections(tiny: Path, descriptors: int) -> None:
    if descriptors < 10_500:
        pytest.skip(f"this machine allows {descriptors} open files")
    each, waits = hold(tiny, 10_000)
    p99 = statistics.quantiles(waits, n=100)[-1]
    print(f"{each:.0f} bytes a connection, probe p99 {p99 * 1000:.1f} ms")
    assert each < 5 * 1024
    assert p99 < 0.01


def test_beyond_the_cap_the_longest_idle_goes_and_where_none_is_idle_the_new_one(tiny: Path) -> None:
    with serving(tiny, "--threads", "1", env={"GPT2_SERVER_MAX_CONNECTIONS": "40"}) as server:
        with ExitStack() as stack:
            clients = [stack.enter_context(connect(server.url)) for _ in range(60)]
            for client in clients[20:]:
                healthy(client)
            assert [closed(client) for client in clients] == [True] * 20 + [False] * 40
            assert server.complete(prompt="a", max_tokens=1)
        with ExitStack() as stack:
            for _ in range(40):
                stack.enter_context(connect(server.url)).sendall(HALF)
            refused = wait_for_status(server, 503)
            assert refused.headers["retry-after"] == "1"
            assert refused.json()["error"]["type"] == "overloaded_error"
        wait_for_status(server, 200)


def wait_for_status(server: RunningServer, status: int) -> httpx.Response:
    deadline = time.monotonic() + 10
    while (answer := httpx.get(f"{server.url}/health")).status_code != status:
        assert time.monotonic() < deadline
    return answer


class Talker:
    """An application that says more than any buffer holds, in one go or bit by bit."""

    def __init__(self, *, streams: bool) -> None:
        self._streams = streams
        self.left = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        speaking = asyncio.ensure_future(self._speak(send))
        while (await receive())["type"] != "http.disconnect":
            pass
        speaking.cancel()
        self.left.set()

    async def _speak(self, send: Send) -> None:
        await send({"type": "http.response.body", "body": b"x" * (64 << 20), "more_body": True})
        while self._streams:
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            await asyncio.sleep(0)


class Listening:
    """A server of ours around an application, in this process, and a client that has asked it something."""

    def __init__(self, app: Any) -> None:
        edges = Edges(
            head_timeout=5, keep_alive_timeout=5, write_timeout=0.5, max_head_bytes=32 << 10, max_connections=100
        )
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self._server = http_server(app, edges)

    async def __aenter__(self) -> socket.socket:
        self._task = asyncio.create_task(self._server.serve(sockets=[self._listener]))
        self._client = connect(f"http://127.0.0.1:{self._listener.getsockname()[1]}", 4096)
        self._client.setblocking(False)
        return self._client

    async def __aexit__(self, *_: object) -> None:
        self._client.close()
        self._server.should_exit = True
        async with asyncio.timeout(10):
            await self._task


async def read_at(rate: int | None, seconds: float, *, streams: bool) -> bool:
    """Whether a client that takes `rate` bytes a second has been left after a while; None reads nothing."""
    app = Talker(streams=streams)
    async with Listening(app) as client:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(client, GET)
        end = loop.time() + seconds
        try:
            while loop.time() < end and not app.left.is_set():
                if rate is not None:
                    async with asyncio.timeout(1):
                        await loop.sock_recv(client, max(rate // 20, 1))
                await asyncio.sleep(0.05)
        except ConnectionResetError:
            async with asyncio.timeout(5):
                await app.left.wait()
        return app.left.is_set()


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(("rate", "left"), [(None, True), (20, True), (1_000_000, False)])
def test_f9_who_does_not_read_is_left(rate: int | None, left: bool, streams: bool) -> None:
    assert asyncio.run(read_at(rate, 10.0 if left else 2.0, streams=streams)) is left


async def largest_read(monkeypatch: pytest.MonkeyPatch) -> int:
    sizes = []

    def data_received(self: DeadlineProtocol, data: bytes) -> None:
        sizes.append(len(data))
        original(self, data)

    original = DeadlineProtocol.data_received
    monkeypatch.setattr(DeadlineProtocol, "data_received", data_received)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    async with Listening(app) as client:
        loop = asyncio.get_running_loop()
        chunks = b"1\r\n \r\n" * 20_000 + b"0\r\n\r\n"
        await loop.sock_sendall(client, b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
        async with asyncio.timeout(30):
            assert (await loop.sock_recv(client, 100)).startswith(b"HTTP/1.1 200 ")
    return max(sizes)


def test_l4_little_is_read_between_two_looks_at_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """h11 takes 17 us for a chunk of one byte: what asyncio reads at once by default, 256 KiB, would be 0.7 s."""
    assert asyncio.run(largest_read(monkeypatch)) <= 8192


def test_f9_a_stuck_reader_holds_no_block_for_long(tiny: Path) -> None:
    with serving(tiny, "--threads", "1", env={"GPT2_SERVER_WRITE_TIMEOUT": "1"}) as server:
        fields = {"prompt": "a b c", "n": 32, "max_tokens": 1000, "logprobs": 20, "stream": True, "ignore_eos": True}
        body = json.dumps(fields).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        with connect(server.url, 4096) as client:
            client.sendall(head.encode() + body)
            deadline = time.monotonic() + 60
            while not server.metrics()[ABORTED]:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            now = server.wait_until_idle()
        assert now[ABORTED] == 32
        assert sum("a client does not read its answer" in line for line in server.lines) == 1


@pytest.mark.slow
def test_f10_two_thousand_half_requests(tiny: Path, descriptors: int) -> None:
    """Half heads are closed at their deadline of 10 s; half bodies are told so at theirs, of 30 s, and closed."""
    with serving(tiny, "--threads", "1") as server, ExitStack() as stack:
        began = time.monotonic()
        for sent in (b"GET /x HT", HALF):
            for _ in range(1000):
                stack.enter_context(connect(server.url)).sendall(sent)
        waits = []
        with httpx.Client() as probe:
            for _ in range(500):
                asked = time.perf_counter()
                assert probe.get(f"{server.url}/health").status_code == 200
                waits.append(time.perf_counter() - asked)
        process, left = psutil.Process(server.process.pid), []
        while not left or left[-1][1]:
            count = sum(each.status == "ESTABLISHED" for each in process.net_connections("tcp"))
            left.append((time.monotonic() - began, count))
            assert left[-1][0] < 60
            time.sleep(0.2)
        heads = next(when for when, count in left if count <= 1000)
        p99 = statistics.quantiles(waits, n=100)[-1]
        print(f"heads gone after {heads:.1f} s, bodies after {left[-1][0]:.1f} s, probe p99 {p99 * 1000:.1f} ms")
        assert heads < 15
        assert left[-1][0] < 40
        assert p99 < 0.02
