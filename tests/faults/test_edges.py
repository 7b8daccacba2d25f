"""Connections that bring half a request, or more of one than anybody needs."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
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


def error_of(said: bytes) -> dict[str, str]:
    """The body of the last answer, which is an error object."""
    error = json.loads(said.rpartition(b"\r\n\r\n")[2])["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error  # type: ignore[no-any-return]


CHUNKED = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"


@pytest.mark.parametrize("sent", [
    b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length : 1\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: +1\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
    CHUNKED + b"\r\nzz\r\n",
    CHUNKED + b"\r\n-1\r\n",
    CHUNKED + b"Content-Length: 5\r\n\r\n0\r\n\r\n",
    CHUNKED + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    CHUNKED.replace(b"chunked", b"gzip, chunked") + b"\r\n0\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: x\r\nX-Nul: \x00\r\n\r\n",
    b"GET /health\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"G\xffT /health HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /health HTTP/1.1\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"a:\r\n" * 100 + b"\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
], ids=lambda sent: ascii(sent[-40:]))  # fmt: skip
def test_what_is_no_http_is_answered_400_and_left(sent: bytes, server: RunningServer) -> None:
    with connect(server) as client:
        client.sendall(sent)
        said = read_to_end(client)
    assert said.startswith(b"HTTP/1.1 400 ")
    assert error_of(said)["type"] == "invalid_request_error"


def test_garbage_leaves_no_line_in_the_log(server: RunningServer) -> None:
    before = len(server.lines)
    for sent in (b"\x00\r\n\r\n", CHUNKED.replace(b"POST", b"HEAD") + b"\r\nzz\r\n", CHUNKED + b"\r\nzz\r\n"):
        with connect(server) as client:
            client.sendall(sent)
            assert read_to_end(client).startswith(b"HTTP/1.1 400 ")
    assert server.complete(prompt="a", max_tokens=1)
    assert all('"answered"' in line for line in server.lines[before:])  # one line each, of what was answered


def test_requests_in_a_row_are_answered_in_order(server: RunningServer) -> None:
    """A hundred in one go, the last of them no request at all."""
    bodies = [json.dumps({"prompt": f"{i}", "max_tokens": 0, "echo": True}).encode() for i in range(100)]
    with connect(server) as client:
        client.sendall(b"".join(post(len(body), body) for body in bodies) + b"garbage\r\n\r\n")
        said = read_to_end(client)
    answers = said.split(b"HTTP/1.1 ")[1:]
    assert [answer[:3] for answer in answers] == [b"200"] * 100 + [b"400"]
    texts = [json.loads(answer.rpartition(b"\r\n\r\n")[2])["choices"][0]["text"] for answer in answers[:-1]]
    assert texts == [str(i) for i in range(100)]


@pytest.mark.parametrize("size", [1, 6, 5000])
def test_a_body_may_come_in_chunks_of_any_size(size: int, server: RunningServer) -> None:
    """CVE-2025-23310, CVE-2025-23311: a few megabytes of six-byte chunks killed another server."""
    body = json.dumps({"prompt": "a", "max_tokens": 1, "user": "x" * 10_000}).encode()
    pieces = (body[at : at + size] for at in range(0, len(body), size))
    with connect(server) as client:
        client.sendall(CHUNKED + b"\r\n" + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces))
        client.sendall(b"0\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_a_client_that_closes_its_half_has_left(server: RunningServer) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 1000, "ignore_eos": True, "n": 8}).encode()
    before = server.metrics().get('gpt2_request_success_total{finished_reason="abort"}', 0)
    with connect(server) as client:
        client.sendall(post(len(body), body))
        time.sleep(0.3)
        client.shutdown(socket.SHUT_WR)
        assert read_to_end(client) == b""
    assert server.wait_until_idle()['gpt2_request_success_total{finished_reason="abort"}'] == before + 8


def test_who_sends_too_much_still_hears_why(server: RunningServer) -> None:
    """The rest of a large body is read for a while: closed at once, the socket would drop the answer."""
    assert httpx.post(f"{server.url}/v1/completions", content=b" " * 5_000_000).status_code == 413


def test_a_body_that_nobody_asked_for_is_not_read_for_ever(server: RunningServer) -> None:
    with connect(server) as client:
        client.sendall(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 404 ")
        began = time.monotonic()
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            drip(client, b" " * 200)
        assert time.monotonic() - began < 5


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
