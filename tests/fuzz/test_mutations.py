"""B2: bytes into whatever reads bytes, in this process: right bodies and right HTTP with a few bytes changed. Out
comes a request or a refusal; anything else is an exception that nobody expected."""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
from collections.abc import Callable
from typing import Any

import pytest
from hostile import fields, mutated, posted
from hygiene import check_message
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from server.api.chat import parse_chat
from server.api.embeddings import parse_embedding
from server.api.limits import Limits
from server.api.parsing import parse_completion
from server.api.reading import read_body_fields, read_object
from server.api.schemas import DetokenizeBody, TokenizeBody
from server.errors import InvalidRequest
from server.http import Edges, http_server

LIMITS = Limits(max_model_len=64, vocab_size=50257)
PARSERS: list[Callable[[bytes], Any]] = [
    *[lambda raw: parse_completion(raw, LIMITS)] * 5,
    lambda raw: parse_chat(raw, LIMITS),
    lambda raw: parse_embedding(raw, LIMITS),
    lambda raw: read_body_fields(TokenizeBody, read_object(raw)),
    lambda raw: read_body_fields(DetokenizeBody, read_object(raw)),
]


def corpus(dice: random.Random) -> list[bytes]:
    return [json.dumps(fields(dice, wrong=dice.choice([0, 0, 1]))).encode() for _ in range(300)]


def mutate_bodies(count: int, seed: int) -> int:
    """Returns how many were right in spite of all."""
    dice = random.Random(seed)
    bodies, right = corpus(dice), 0
    for number in range(count):
        if number % 10_000 == 9_999:
            bodies = corpus(dice)
        raw = mutated(dice, dice.choice(bodies))
        try:
            dice.choice(PARSERS)(raw)
            right += 1
        except InvalidRequest as refusal:
            check_message(refusal.message)
        except Exception as error:
            raise AssertionError(f"{raw!r}") from error
    return right


class Wire(asyncio.Transport):
    """Where a connection's answers go, if nobody is there."""

    def __init__(self, connected: socket.socket) -> None:
        super().__init__({"socket": connected})
        self.said = bytearray()
        self._closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.said += data

    def is_closing(self) -> bool:
        return self._closed

    def close(self) -> None:
        self._closed = True

    def abort(self) -> None:
        self._closed = True

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


async def ok(scope: Scope, receive: Receive, send: Send) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})


async def mutate_http(count: int, seed: int) -> None:
    """The connection's own code, from bytes off the wire to the application and back."""
    edges = Edges(
        head_timeout=1e6, keep_alive_timeout=1e6, write_timeout=1e6, max_head_bytes=32 << 10, max_connections=100
    )
    config = http_server(ok, edges).config  # type: ignore[arg-type]
    config.load()
    dice = random.Random(seed)
    failures: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        other = socket.create_connection(listener.getsockname())
        connected, _ = listener.accept()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
    for _ in range(count):
        raw = mutated(dice, b"".join(posted(dice, b"{}").raw for _ in range(dice.choice([1, 1, 3]))))
        wire, state = Wire(connected), ServerState()
        connection = config.http_protocol_class(config, state, {})  # type: ignore[call-arg, misc, operator]
        connection.connection_made(wire)
        try:
            at = dice.randrange(len(raw) + 1)
            for piece in (raw[:at], raw[at:]):
                if piece and not wire.is_closing():
                    connection.data_received(piece)
                    await asyncio.sleep(0)
            if dice.random() < 0.3 and not wire.is_closing():
                connection.eof_received()
                await asyncio.sleep(0)
        except Exception as error:
            raise AssertionError(f"{raw!r}") from error
        connection.connection_lost(None)
        await asyncio.sleep(0)
        assert {*re.findall(rb"HTTP/1.1 (\d+) ", wire.said)} <= {b"204", b"400", b"100", b"505"}, raw
    connected.close()
    other.close()
    assert not failures
    assert not edges.idle, "connections that are gone are remembered"


def test_b2_forty_thousand_mutations() -> None:
    right = mutate_bodies(40_000, seed=1)
    assert 500 < right < 39_000, "one-sided"
    asyncio.run(mutate_http(3000, seed=1))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_b2_a_million_mutations() -> None:
    print(f"right in spite of all: {mutate_bodies(1_000_000, seed=2)}")
    asyncio.run(mutate_http(100_000, seed=2))
