"""Connections that bring half a request, or more of one than anybody needs."""

from __future__ import annotations

import gzip
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import h11
import httpx
import pytest
from mixed import until
from serving import RunningServer, serving
from test_worker_faults import evil

from server.http import Parser

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


ABORTED = 'gpt2_request_success_total{finished_reason="abort"}'


@pytest.mark.parametrize("when", ["at once", "later"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_closes_its_half_gets_its_whole_answer(stream: bool, when: str, server: RunningServer) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 100, "ignore_eos": True, "n": 4, "stream": stream}).encode()
    before = server.metrics().get(ABORTED, 0)
    with connect(server) as client:
        client.sendall(post(len(body), body))
        if when == "later":
            time.sleep(0.2)
        client.shutdown(socket.SHUT_WR)
        said = read_to_end(client)
    answer = said.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.count(b'"finish_reason":"length"') == 4
    assert not stream or answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert server.wait_until_idle().get(ABORTED, 0) == before


def test_requests_in_a_row_are_answered_though_the_client_has_closed_its_half(server: RunningServer) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 5, "ignore_eos": True}).encode()
    with connect(server) as client:
        client.sendall(post(len(body), body) * 3)
        client.shutdown(socket.SHUT_WR)
        assert read_to_end(client).count(b"HTTP/1.1 200 ") == 3


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_closes_altogether_has_left(stream: bool, begun: bool, server: RunningServer) -> None:
    """Half-way through a stream of eight choices, or before it has got anything."""
    fields = {"prompt": "a", "max_tokens": 1000, "ignore_eos": True, "n": 8, "stream": stream}
    body = json.dumps(fields).encode()
    before = server.metrics().get(ABORTED, 0)
    with connect(server) as client:
        client.sendall(post(len(body), body))
        if begun and stream:
            for _ in range(20):
                client.recv(2000)
        elif begun:
            time.sleep(0.2)
    assert server.wait_until_idle()[ABORTED] == before + 8


@pytest.mark.slow
def test_that_an_http_1_0_client_has_left_shows_though_nothing_can_be_sent_to_it(tiny: Path) -> None:
    """As a proxy's does that speaks HTTP/1.0 behind it, for a whole answer."""
    body = json.dumps({"prompt": "a", "max_tokens": 500, "ignore_eos": True}).encode()
    request = post(len(body), body).replace(b"HTTP/1.1", b"HTTP/1.0")
    with serving(tiny, "--threads", "1", env=evil("slow:step=any")) as slow:
        with connect(slow) as client:
            client.sendall(request)
            client.shutdown(socket.SHUT_WR)
            time.sleep(40)  # while it reads, it is there
            assert ABORTED not in slow.metrics() or slow.metrics()[ABORTED] == 0
        until(lambda: slow.metrics()[ABORTED] == 1, 90)


def test_half_a_request_and_no_more_is_not_waited_for(server: RunningServer) -> None:
    with connect(server) as client:
        client.sendall(post(100, b'{"prompt": '))
        client.shutdown(socket.SHUT_WR)
        began = time.monotonic()
        read_to_end(client)
        assert time.monotonic() - began < 0.9


@pytest.mark.parametrize(("sent", "status"), [
    (b"GET http://x:80/v1/models HTTP/1.1\r\nHost: other\r\n\r\n", b"200"),
    (b"GET HTTPS://[::1]:80/v1/models?a=b HTTP/1.1\r\nHost: x\r\n\r\n", b"200"),
    (b"GET http://x HTTP/1.1\r\nHost: x\r\n\r\n", b"200"),
    (b"GET http:///health HTTP/1.1\r\nHost: x\r\n\r\n", b"404"),
    (b"GET http://user@x/health HTTP/1.1\r\nHost: x\r\n\r\n", b"404"),
    (b"\r\nGET /health HTTP/1.1\r\nHost: x\r\n\r\n", b"200"),
    (b"\r\n\n\r\nGET /health HTTP/1.0\r\n\r\n", b"200"),
    (b"GET /health HTTP/2.0\r\nHost: x\r\n\r\n", b"505"),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"505"),
    (b"GET /health HTTP/0.9\r\nHost: x\r\n\r\n", b"505"),
    (b"GET /health HTTP/1.7\r\nHost: x\r\n\r\n", b"200"),
    (b"GET /health?" + b"x" * 40_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", b"400"),
    (b"GET /health HTTP/1.1\r\nHost: x\r\nX-Large: " + b"x" * 33_000 + b"\r\n\r\n", b"400"),
    (b"GET /health?" + b"x" * 32_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", b"200"),
    (b"GET /v1/models/ HTTP/1.1\r\nHost: x\r\n\r\n", b"404"),
    (b"GET /v1/engines/ HTTP/1.1\r\nHost: x\r\n\r\n", b"404"),
    (b"DELETE /v1/models/ HTTP/1.1\r\nHost: x\r\n\r\n", b"404"),
    (b"POST /v1/engines//completions HTTP/1.1\r\nHost: x\r\nContent-Length: 15\r\n\r\n{\"prompt\": \"a\"}", b"404"),
], ids=lambda each: ascii(each[:44]))  # fmt: skip
def test_heads_are_read_as_rfc_9112_has_it(sent: bytes, status: bytes, server: RunningServer) -> None:
    with connect(server) as client:
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        said = read_to_end(client)
    assert status in said.split(b"\r\n")[0].split() or status in said.split(b"\r\n")[2].split()
    if status[:1] in b"45":
        assert error_of(said)


def test_a_target_in_absolute_form_has_the_last_word_over_the_host() -> None:
    parser = Parser(1000)
    parser.receive_data(b"\r\nGET http://a.example:1?q=/ HTTP/1.1\r\nHost: b\r\nX: y\r\n\r\n")
    request = parser.next_event()
    assert isinstance(request, h11.Request)
    assert request.target == b"/?q=/"
    assert list(request.headers) == [(b"host", b"a.example:1"), (b"x", b"y")]


def test_an_empty_line_after_a_body_is_no_request(server: RunningServer) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
    with connect(server) as client:
        client.sendall((post(len(body), body) + b"\r\n") * 3)
        client.shutdown(socket.SHUT_WR)
        assert [line[:3] for line in read_to_end(client).split(b"HTTP/1.1 ") if line[:3] != b"100"] == [
            b"",
            *[b"200"] * 3,
        ]


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "gzip, identity"])
def test_a_compressed_body_is_answered_415(coding: str, server: RunningServer) -> None:
    body = gzip.compress(b'{"prompt": "a", "max_tokens": 1}')
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/v1/files"):
        answer = httpx.post(f"{server.url}{path}", content=body, headers={"content-encoding": coding})
        assert answer.status_code == 415
        assert answer.headers["accept-encoding"] == "identity"
        assert "Content-Encoding" in answer.json()["error"]["message"]


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
