"""The HTTP server under the application: uvicorn, without its signal handlers and with bounds it lacks.

uvicorn has no read timeout: an idle socket, or half a head, would be held for ever. It has no write timeout either: a
client that reads nothing would hold its answer as long. A body's deadline is the api's, which answers it with a 408.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import re
import resource
import select
import socket
import struct
import termios
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger(__name__)

BACKLOG = 2048
LAST_WORDS = 1  # seconds that answers which were cut short get to leave
READ_BYTES = 8 << 10  # at once: h11 takes 17 us for a chunk of one byte, and nobody else is served meanwhile
PROGRESS_BYTES = 4 << 10  # what a reader has to take of its answer within the write deadline, to be one that reads
DESCRIPTORS_KEPT = 128  # for everything that is no client's connection
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: drop what is unsent
GONE_PERIOD = 0.1  # seconds between looks whether a client that has said all it will is still there
BLANK_LINES = re.compile(rb"(?:\r?\n)*")
ABSOLUTE_FORM = re.compile(rb"https?://([A-Za-z0-9._~%:\[\]-]+)(/[^?]*)?(\?.*)?", re.IGNORECASE)


@dataclass(slots=True, kw_only=True)
class Edges:
    """What a connection may cost. One for all connections of a server. Times are seconds."""

    head_timeout: float  # for a request's head, from its first byte or from connecting
    keep_alive_timeout: float
    write_timeout: float  # for PROGRESS_BYTES of an answer, or its rest
    max_head_bytes: int
    max_connections: int
    idle: dict[DeadlineProtocol, None] = field(default_factory=dict)  # those that wait for a head, oldest first


class HTTPServer(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Parser(h11.Connection):
    """h11's, with what it leaves to its caller: RFC 9112, sections 2.2 (empty lines before a request), 2.3 (versions)
    and 3.2.2 (targets in absolute form). And a head is never longer than allowed, in however few reads it comes."""

    def __init__(self, max_head_bytes: int) -> None:
        super().__init__(h11.SERVER, max_head_bytes)
        self._max_head_bytes = max_head_bytes
        self.refusal = HTTPStatus.BAD_REQUEST  # of what raised RemoteProtocolError

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """Raises RemoteProtocolError."""
        if self.their_state is not h11.IDLE:
            return super().next_event()
        waiting = self.trailing_data[0]
        blank = BLANK_LINES.match(waiting)
        assert blank is not None
        if blank.end():
            self._receive_buffer.maybe_extract_at_most(blank.end())
        event = super().next_event()
        if not isinstance(event, h11.Request):
            return event
        if len(waiting) - blank.end() - len(self.trailing_data[0]) > self._max_head_bytes:
            raise h11.RemoteProtocolError("the head is too long")
        if not event.http_version.startswith(b"1."):
            self.refusal = HTTPStatus.HTTP_VERSION_NOT_SUPPORTED
            raise h11.RemoteProtocolError("not HTTP/1")
        return event if event.target.startswith(b"/") else _origin_form(event)


def _origin_form(request: h11.Request) -> h11.Request:
    """A target in absolute form has the last word over the Host header; other targets are left as they are."""
    found = ABSOLUTE_FORM.fullmatch(request.target)
    if found is None:
        return request
    host, path, query = found.groups()
    headers = [(name, host if name == b"host" else value) for name, value in request.headers]
    return h11.Request(
        method=request.method,
        target=(path or b"/") + (query or b""),
        headers=headers,
        http_version=request.http_version,
    )


class DeadlineProtocol(H11Protocol):
    """A connection that is closed when its client does not do its part in time."""

    edges: Edges
    conn: Parser
    _reading: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None
    _leaving: asyncio.TimerHandle | None = None
    _said_all = False  # the client has closed its half

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.conn = Parser(self.edges.max_head_bytes)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.max_size = READ_BYTES  # type: ignore[attr-defined]  # of asyncio's socket transports
        transport.set_write_buffer_limits(high=0)  # told of every byte that cannot be sent
        if len(self.connections) > self.edges.max_connections:
            self._make_room()
        self._watch_reading()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_reading()

    def eof_received(self) -> bool:  # type: ignore[override]
        """A client that has said all it will may still read. It has left when its side of the connection is gone, which
        only shows once something is sent to it: where an answer has not begun, an interim one is. HTTP/1.0 has none of
        those; there the kernel asks, and the other one forgets a connection within a minute or so."""
        if self._said_all or not self._answering:  # reading goes on after a pause, and finds the end again
            return self._answering
        self._said_all = True
        if self.conn.our_state is h11.SEND_RESPONSE and self.scope["http_version"] == "1.1":
            interim = h11.InformationalResponse(status_code=100, headers=[], reason="Continue")
            self.transport.write(self.conn.send(interim))
        else:
            self._keep_alive()
        self._watch_leaving()
        return True

    def _keep_alive(self) -> None:
        connection = self.transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    @property
    def _answering(self) -> bool:
        """A request, a whole one, waits for its answer or for the rest of it."""
        return self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body

    def _watch_leaving(self) -> None:
        """As long as the answer takes. No event tells that a half-closed connection was reset, until the next write."""
        connection = select.poll()
        connection.register(self.transport.get_extra_info("socket"), 0)
        if connection.poll(0):  # POLLERR or POLLHUP
            self.transport.abort()
        else:
            self._leaving = self.loop.call_later(GONE_PERIOD, self._watch_leaving)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._said_all and not self._answering:
            self.transport.close()
        if self.cycle is not None and self.cycle.response_complete:  # an idle connection remembers nothing
            self.cycle = self.scope = self.headers = None  # type: ignore[assignment]
        self._watch_reading()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.loop.call_soon(self._watch_writing)  # when the whole of what is being written is in the buffer

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_writing_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_reading_timer()
        self._stop_writing_timer()
        if self._leaving is not None:
            self._leaving.cancel()
        self.edges.idle.pop(self, None)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        if self.cycle is not None:  # whoever still works on an answer is told that nobody hears it
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._say(self.conn.refusal, NOT_HTTP)

    def _watch_reading(self) -> None:
        """A head that is awaited has a deadline; so has a body that nobody reads, as its answer has been given."""
        if self.transport.is_closing():
            return
        theirs, ours = self.conn.their_state, self.conn.our_state
        if theirs is h11.IDLE:
            self.edges.idle[self] = None
        else:
            self.edges.idle.pop(self, None)
        if theirs is not h11.IDLE and not (theirs is h11.SEND_BODY and ours is h11.DONE):
            self._stop_reading_timer()
        elif self._reading is None and self.timeout_keep_alive_task is None:
            self._reading = self.loop.call_later(self.edges.head_timeout, self.transport.abort)

    def _watch_writing(self) -> None:
        if self.transport.get_write_buffer_size() and self._writing is None:
            self._writing = self.loop.call_later(self.edges.write_timeout, self._check_written, self._unread())

    def _check_written(self, before: int) -> None:
        self._writing = None
        if before - self._unread() >= PROGRESS_BYTES:
            self._watch_writing()
            return
        log.info("a client does not read its answer")
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.transport.abort()

    def _stop_reading_timer(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _stop_writing_timer(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def _unread(self) -> int:
        """Bytes of answers that the client has not acknowledged: ours, and those the kernel has."""
        kernel = array("i", [0])
        fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, kernel)
        return self.transport.get_write_buffer_size() + kernel[0]

    def _make_room(self) -> None:
        """The connection that has waited longest for a request goes. Where none waits, the new one does."""
        oldest = next(iter(self.edges.idle), None)
        if oldest is None:
            self._say(HTTPStatus.SERVICE_UNAVAILABLE, BUSY)
            return
        del self.edges.idle[oldest]
        self.connections.discard(oldest)
        oldest.transport.abort()

    def _say(self, status: HTTPStatus, body: bytes) -> None:
        """The last word on this connection. Once an answer has begun there is no other to be given."""
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        if status is HTTPStatus.SERVICE_UNAVAILABLE:
            headers.append(("retry-after", "1"))
        head = h11.Response(status_code=status, headers=headers, reason=status.phrase)
        try:
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:
            self.transport.abort()
        else:
            self.transport.close()


def http_server(app: FastAPI, edges: Edges) -> HTTPServer:
    """May lower the bound of connections to what this process may open."""
    allowed = _descriptors(edges.max_connections + DESCRIPTORS_KEPT) - DESCRIPTORS_KEPT
    if allowed < edges.max_connections:
        log.warning("fewer connections than max_connections: the limit of open files", extra={"connections": allowed})
        edges.max_connections = max(allowed, 1)
    config = uvicorn.Config(
        app,
        http=type("Protocol", (DeadlineProtocol,), {"edges": edges}),
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=edges.keep_alive_timeout,  # type: ignore[arg-type]  # handed to call_later: a float will do
        timeout_graceful_shutdown=LAST_WORDS,
        backlog=BACKLOG,
    )
    return HTTPServer(config)


def _descriptors(wanted: int) -> int:
    """How many files this process may open, which is raised to `wanted` where that is allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most


def _error(message: str, kind: str) -> bytes:
    """As api/errors.py has it, for those who do not get as far."""
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": None}}).encode()


NOT_HTTP = _error("The request is not HTTP as this server reads it.", "invalid_request_error")
BUSY = _error("The server has no room for another connection. Please try again later.", "overloaded_error")
