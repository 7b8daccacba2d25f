"""The one table from errors to HTTP, and the error object: four keys, on every path, the framework's own included."""

from __future__ import annotations

import json
import math
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from server.errors import (
    BodyTimeout,
    BodyTooLarge,
    DeadlineExceeded,
    Draining,
    EngineError,
    Forbidden,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    RateLimited,
    ServerError,
    TryLater,
    Unauthorized,
    UnsupportedEncoding,
    WorkerKilled,
)

# Looked up along the error's own line of ancestors, so the nearest entry counts.
STATUS: dict[type[ServerError], tuple[int, str]] = {
    InvalidRequest: (400, "invalid_request_error"),
    Unauthorized: (401, "invalid_request_error"),
    Forbidden: (403, "invalid_request_error"),
    NotFound: (404, "invalid_request_error"),
    MethodNotAllowed: (405, "invalid_request_error"),
    BodyTimeout: (408, "invalid_request_error"),
    BodyTooLarge: (413, "invalid_request_error"),
    UnsupportedEncoding: (415, "invalid_request_error"),
    RateLimited: (429, "rate_limit_error"),
    TryLater: (503, "overloaded_error"),
    DeadlineExceeded: (504, "server_error"),
    EngineError: (500, "server_error"),
    ServerError: (500, "server_error"),
}
INTERNAL = ServerError("The server had an error while processing your request. Sorry about that!")
PATH_SHOWN = 200


def status_of(error: ServerError) -> tuple[int, str]:
    """HTTP status, and the error object's type."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def error_object(error: ServerError) -> dict[str, Any]:
    _, kind = status_of(error)
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def error_response(error: ServerError) -> Response:
    status, _ = status_of(error)
    headers: dict[str, str] = {}
    if isinstance(error, TryLater):
        headers["retry-after"] = str(min(max(math.ceil(error.retry_after), 1), 60))
    if isinstance(error, Draining | BodyTimeout):  # not where a body is too large: while it is read on, we are heard
        headers["connection"] = "close"
    if isinstance(error, UnsupportedEncoding):
        headers["accept-encoding"] = "identity"
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, DeadlineExceeded | WorkerKilled) or error is INTERNAL:
        headers["x-should-retry"] = "false"  # the same request would meet the same end
    body = json.dumps(error_object(error), ensure_ascii=False, allow_nan=False).encode()
    return Response(body, status, headers, media_type="application/json")


async def answer_server_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ServerError)
    return error_response(error)


async def answer_http_exception(request: Request, error: Exception) -> Response:
    """The framework's own: no such route, no such method."""
    assert isinstance(error, HTTPException)
    method, path = request.method[:16], _shown(request.scope["path"])
    if error.status_code == 404:
        return error_response(NotFound(f"Invalid URL ({method} {path})"))
    if error.status_code == 405:
        hint = "(HINT: Perhaps you meant to use a different HTTP method?)"
        response = error_response(
            MethodNotAllowed(f"Not allowed to {method} on {path}. {hint}", code="method_not_supported")
        )
        response.headers["allow"] = _allowed_methods(request) or (error.headers or {}).get("Allow", "")
        return response
    if error.status_code < 500:
        return error_response(InvalidRequest("The request could not be understood."))
    return error_response(INTERNAL)


def _allowed_methods(request: Request) -> str:
    """Of every route with this path template. The framework's own answer names those of the first alone."""
    template = getattr(request.scope.get("route"), "path", "")
    documented = request.app.openapi()["paths"].get(template.replace(":path}", "}"), {})  # as the document has it
    return ", ".join(method.upper() for method in documented)


def _shown(path: str) -> str:
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in path[:PATH_SHOWN])
