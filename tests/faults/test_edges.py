"""Connections that bring half a request, or more of one than anybody needs."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from serving import RunningServer, serving

SHORT = {"HEAD_TIMEOUT": "1", "BODY_TIMEOUT": "1", "KEEP_ALIVE_TIMEOUT": "1", "MAX_BODY_BYTES": "20000"}


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[RunningServer]:
    with serving(
        tiny, "--threads", "1", env={f"GPT2_SERVER_{name}": value for name, value in SHORT.items()}
    ) as running:
        yield running


def connect(server: RunningServer) -> socket.socket:
    where = urlsplit(server.url)
    assert where.hostname is not None
    return socket.create_connection((where.hostname, where.port or 80), timeout=20)


def read_to_end(client: socket.socket) -> bytes:
    """What the server says until it closes."""
    said = b""
    try:
        while piece := client.recv(65536):
            said += piece
    except ConnectionResetError:
        pass
    return said


def drip(client: socket.socket, data: bytes) -> None:
    for byte in data:
        client.sendall(bytes([byte]))
        time.sleep(0.05)


def post(length: int, body: bytes = b"") -> bytes:
    return f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode() + body


@pytest.mark.parametrize("sent", [b"", b"GE", b"GET /health HTTP/1.1\r\nHost: x\r\nX-Half: "])
def test_a_head_that_does_not_come_is_not_waited_for(sent: bytes, server: RunningServer) -> None:
    with connect(server) as client:
        client.sendall(sent)
        began = time.monotonic()
        assert read_to_end(client) == b""
        assert 0.5 < time.monotonic() - began < 5


def test_a_head_that_drips_is_not_waited_for_either(server: RunningServer) -> None:
    with connect(server) as client:
        began = time.monotonic()
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            drip(client, b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"x-drip: 1\r\n" * 100)
        assert time.monotonic() - began < 5


def test_half_a_head_on_a_used_connection(server: RunningServer) -> None:
    with connect(server) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        said = b""
        while not said.endswith(b'{"status":"ok"}'):
            said += client.recv(65536)
        client.sendall(b"GET /hea")
        assert read_to_end(client) == b""


def test_half_a_body_is_answered_408(server: RunningServer) -> None:
    with connect(server) as client:
        client.sendall(post(100, b'{"prompt": '))
        said = read_to_end(client)
    assert said.startswith(b"HTTP/1.1 408 ")
    assert json.loads(said.split(b"\r\n\r\n")[1])["error"].keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body_is_refused_before_it_is_read(chunked: bool, server: RunningServer) -> None:
    with connect(server) as client:
        if chunked:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            client.sendall((b"1000\r\n" + b" " * 4096 + b"\r\n") * 6)
        else:
            client.sendall(post(1 << 40))
        assert client.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_a_large_head_is_refused(server: RunningServer) -> None:
    with connect(server) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Large: " + b"x" * 70_000)
        assert read_to_end(client).startswith((b"HTTP/1.1 400 ", b""))


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX-Nul: \x00\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
def test_what_is_no_http_is_answered_400(sent: bytes, server: RunningServer) -> None:
    with connect(server) as client:
        client.sendall(sent)
        assert client.recv(65536).startswith(b"HTTP/1.1 400 ")


def test_five_hundred_half_requests_leave_the_server_answering(server: RunningServer) -> None:
    clients = [connect(server) for _ in range(500)]
    try:
        for i, client in enumerate(clients):
            client.sendall(post(100, b"{") if i % 2 else b"GET /x HT")
        began = time.monotonic()
        assert server.complete(prompt="a", max_tokens=1)
        assert time.monotonic() - began < 2
        for client in clients:
            read_to_end(client)
        assert time.monotonic() - began < 15
    finally:
        for client in clients:
            client.close()
