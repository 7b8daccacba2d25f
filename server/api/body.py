"""Reading a request's body, with a bound on its size and on its time."""

from __future__ import annotations

import anyio
from starlette.types import Message, Receive, Scope

from server.api.limits import Limits
from server.errors import BodyTimeout, BodyTooLarge


class ClientGone(Exception):  # noqa: N818  (not an error: the client may leave)
    """The client left; nobody waits for an answer."""


async def read_body(scope: Scope, receive: Receive, limits: Limits) -> bytes:
    """The whole body, counted as it comes. Raises BodyTooLarge, BodyTimeout or ClientGone."""
    most = limits.max_body_bytes
    if _announced(scope) > most:
        raise _too_large(most)
    try:
        with anyio.fail_after(limits.body_timeout):
            return await _read(receive, most)
    except TimeoutError:
        raise BodyTimeout("The body of the request did not arrive in time.") from None


async def until_gone(receive: Receive) -> None:
    """Returns when the client has left. To be called after the body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read(receive: Receive, most: int) -> bytes:
    body = bytearray()
    more = True
    while more:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body += message.get("body", b"")
        if len(body) > most:
            raise _too_large(most)
        more = message.get("more_body", False)
    return bytes(body)


def _announced(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value[:20])
    return 0


def _too_large(most: int) -> BodyTooLarge:
    return BodyTooLarge(f"The body of the request is too large: this server takes {most} bytes.", code="body_too_large")
