"""Server-sent events as the clients of completions read them: `data: …` and a blank line, nothing else but pings."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

import anyio
from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import AppStatus, EventSourceResponse
from starlette.types import Receive, Scope, Send

PING_SECONDS = 15  # proxies cut a stream that is silent for much longer
EXOTIC_LINE_ENDS = [(c.encode(), f"\\u{ord(c):04x}".encode()) for c in "\x85\u2028\u2029"]
DONE = b"data: [DONE]\n\n"
# What an OpenAPI document says of a stream: until OpenAPI 3.2 the schema is that of an event.
EVENT_SCHEMA = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
STREAMED: dict[str, dict[str, object]] = {"text/event-stream": {"schema": EVENT_SCHEMA}}

# Streams end when the drain says so, not when a signal arrives; and no text of a client's belongs in a debug log.
AppStatus.enable_automatic_graceful_drain = False
logging.getLogger("sse_starlette.sse").setLevel(logging.INFO)


def event(data: bytes) -> bytes:
    """One line to every reader: some clients' line splitters (httpx.iter_lines) know more line ends than SSE has."""
    if not data.isascii():
        for character, escape in EXOTIC_LINE_ENDS:
            data = data.replace(character, escape)
    return b"data: " + data + b"\n\n"


def _ping() -> ServerSentEvent:
    return ServerSentEvent(comment="ping", sep="\n")


class EventStream(EventSourceResponse):
    """Sends events; whatever ends it, `close` has been awaited. That its client reads them is server/http.py's care."""

    def __init__(
        self, events: AsyncIterator[bytes], headers: Mapping[str, str], close: Callable[[], Awaitable[None]]
    ) -> None:
        super().__init__(
            events,
            headers={"cache-control": "no-cache", **headers},
            ping=PING_SECONDS,
            sep="\n",
            ping_message_factory=_ping,
        )
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._close()

    @staticmethod
    async def _listen_for_exit_signal() -> None:
        """The library would poll uvicorn for its exit, in a task that never ends. Ours needs no such watch."""
        await anyio.sleep_forever()
