"""What every answer carries, whoever wrote it: an id, its time, the API's version; and no exception escapes.
HEAD is answered as GET is, without the body.

Pure ASGI. BaseHTTPMiddleware would hide a client's leaving from the handlers behind it.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable

from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.auth import caller_of
from server.api.body import ClientGone
from server.api.errors import INTERNAL, error_response
from server.errors import InvalidRequest, RequestError, UnsupportedEncoding

log = logging.getLogger(__name__)

REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
OPENAI_VERSION = "2020-10-01"
UNMATCHED = "unmatched"
PROBES = frozenset({"/health", "/ready", "/ping", "/metrics", "/load"})

AnswerHook = Callable[[str, int], None]  # route template, HTTP status (499: the client left first)


def request_id_of(scope: Scope) -> str:
    return str(scope.get("request_id", ""))


class AnswerMiddleware:
    """The outermost of ours."""

    def __init__(self, app: ASGIApp, on_answer: AnswerHook, max_headers: int) -> None:
        self._app = app
        self._max_headers = max_headers
        self._on_answer = on_answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        status: int | None = None
        request_id = _request_id(scope)
        scope["request_id"] = request_id

        head = scope["method"] == "HEAD"
        if head:
            scope = {**scope, "method": "GET"}

        async def send_marked(message: Message) -> None:
            nonlocal status
            if head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["openai-processing-ms"] = str(round((time.perf_counter() - began) * 1000))
                headers["openai-version"] = OPENAI_VERSION
            await send(message)

        try:
            await (self._refusal(scope) or self._app)(scope, receive, send_marked)
        except ClientGone:
            pass
        except Exception:
            log.exception("request %s failed", request_id)
            if status is not None:
                raise  # the server under us has to cut the connection: the answer is half said
            await error_response(INTERNAL)(scope, receive, send_marked)
        finally:
            self._on_answer(_route(scope), status or 499)
            _log_answer(scope, request_id, status or 499, time.perf_counter() - began)

    def _refusal(self, scope: Scope) -> Response | None:
        """Of a head that nobody should act upon."""
        headers = scope["headers"]
        error: RequestError
        if len(headers) > self._max_headers:
            error = InvalidRequest(f"The request has too many headers: this server takes {self._max_headers}.")
        elif {b"content-length", b"transfer-encoding"} <= {name for name, _ in headers}:
            error = InvalidRequest("The request states the length of its body twice.")  # a proxy may believe the other
        elif any(name == b"content-encoding" and value.strip().lower() != b"identity" for name, value in headers):
            error = UnsupportedEncoding("The body of the request must not be compressed (Content-Encoding).")
        else:
            return None
        response = error_response(error)
        response.headers["connection"] = "close"
        return response


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and REQUEST_ID.fullmatch(value):
            return str(value.decode("ascii"))
    return f"req_{secrets.token_hex(16)}"


def _log_answer(scope: Scope, request_id: str, status: int, seconds: float) -> None:
    """One line an answer: whose, which, how much. Of probes and scrapes, which are many, only for debugging."""
    route = _route(scope)
    level = logging.DEBUG if route in PROBES else logging.INFO
    if log.isEnabledFor(level):
        line = {"request": request_id, "route": route, "status": status, "seconds": round(seconds, 4)}
        if caller := caller_of(scope).name:
            line["key"] = caller
        if (generation := scope.get("generation")) is not None:
            used = generation.usage
            line |= {"prompt_tokens": used.prompt_tokens, "completion_tokens": used.completion_tokens}
        log.log(level, "answered", extra=line)


def _route(scope: Scope) -> str:
    """The template, never the path: label values come from our own constants."""
    path = getattr(scope.get("route"), "path", None)
    if isinstance(path, str):
        return path
    endpoint = scope.get("endpoint")  # all that the framework says of a route of its own, as /openapi.json
    routes = scope["app"].routes if endpoint is not None else ()
    return next((each.path for each in routes if getattr(each, "endpoint", None) is endpoint), UNMATCHED)
