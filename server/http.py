"""The HTTP server under the application: uvicorn, without its signal handlers and with a deadline for heads.

uvicorn has no read timeout: an idle socket, or half a head, would be held for ever. Bodies have their deadline in the
api, answers in the stream.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_BYTES_MAX = 32 << 10  # h11 refuses more; httptools would take a head of any size
BACKLOG = 2048
LAST_WORDS = 1  # seconds that answers which were cut short get to leave


class HTTPServer(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class DeadlineProtocol(H11Protocol):
    """Closes a connection whose request's head is not complete in time, from its first byte or from connecting."""

    head_timeout = 10.0  # seconds
    _expiry: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._disarm()
        elif self._expiry is None:
            self._expiry = self.loop.call_later(self.head_timeout, self.transport.abort)

    def _disarm(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None


def http_server(app: FastAPI, *, head_timeout: float, keep_alive_timeout: float) -> HTTPServer:
    protocol = type("Protocol", (DeadlineProtocol,), {"head_timeout": head_timeout})
    config = uvicorn.Config(
        app,
        http=protocol,
        h11_max_incomplete_event_size=HEAD_BYTES_MAX,
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=keep_alive_timeout,  # type: ignore[arg-type]  # handed to call_later, which takes a float
        timeout_graceful_shutdown=LAST_WORDS,
        backlog=BACKLOG,
    )
    return HTTPServer(config)
