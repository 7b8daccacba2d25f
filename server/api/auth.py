"""Who is asking. On a server with keys everything needs one but what OPEN_PATHS names, and what an operator opens."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.errors import error_response
from server.api.keys import Caller, Keyring
from server.errors import Forbidden, InvalidRequest, MethodNotAllowed, Unauthorized

OPEN_PATHS = frozenset({"/health", "/ready"})
MISSING = (
    "You didn't provide an API key. You need to provide your API key in an Authorization header using Bearer auth "
    "(i.e. Authorization: Bearer YOUR_KEY)."
)


ANYONE = Caller()
METHODS = ("GET", "POST", "DELETE", "OPTIONS")


def caller_of(scope: Scope) -> Caller:
    caller = scope.get("caller", ANYONE)
    assert isinstance(caller, Caller)
    client = scope.get("client")  # (host, port)
    return replace(caller, address=client[0]) if client else caller


class AuthMiddleware:
    """Deny by default, decided on scope["path"]: a Host header cannot change that (CVE-2026-48746)."""

    def __init__(self, app: ASGIApp, keys: Keyring, open_paths: Set[str] = OPEN_PATHS) -> None:
        self._app = app
        self._open_paths = open_paths
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._open_paths:
            await self._app(scope, receive, send)
            return
        key = _sent_key(scope)
        if not key and scope["method"] == "OPTIONS":
            await _answer_options()(scope, receive, send)
            return
        if not key:
            await error_response(Unauthorized(MISSING))(scope, receive, send)
            return
        caller = self._keys.find(key)
        if caller is None:
            error = Unauthorized(f"Incorrect API key provided: {_masked(key)}.", code="invalid_api_key")
            await error_response(error)(scope, receive, send)
            return
        scope["caller"] = caller
        await self._app(scope, receive, send)


def _answer_options() -> Response:
    """The same for every path: a browser asks without a key, and learns of no route."""
    response = error_response(MethodNotAllowed("Not allowed without a key.", code="method_not_supported"))
    response.headers["allow"] = ", ".join(METHODS)
    return response


class PreflightMiddleware(CORSMiddleware):
    """Says in an error object what a browser may not do."""

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        refusal = error_response(InvalidRequest(f"{bytes(response.body).decode()}."))
        copied = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
        refusal.headers.update(copied)
        return refusal


class OriginMiddleware:
    """A page of another origin does nothing here unless its origin is let in, not even blindly.

    Browsers say so of what they send to this machine or over TLS, in a header that no page can change.
    """

    def __init__(self, app: ASGIApp, allowed: Set[str]) -> None:
        self._app = app
        self._allowed = allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and scope["method"] == "POST" and self._is_strange(dict(scope["headers"])):
            app = error_response(Forbidden("Pages of this origin are not let in."))
        await app(scope, receive, send)

    def _is_strange(self, headers: Mapping[bytes, bytes]) -> bool:
        origin = headers.get(b"origin", b"").decode("latin-1")
        return headers.get(b"sec-fetch-site") == b"cross-site" and not self._allowed & {"*", origin}


def _sent_key(scope: Scope) -> bytes:
    sent = dict(scope["headers"])
    scheme, _, key = sent.get(b"authorization", b"").strip().partition(b" ")
    if scheme.lower() == b"bearer" and key.strip():
        return bytes(key.strip())
    return bytes(sent.get(b"x-api-key", b"").strip())


def _masked(key: bytes) -> str:
    """Enough for its owner to know which key it was, when there is enough of it to hide."""
    text = "".join(c if c.isascii() and c.isalnum() else "*" for c in key.decode("latin-1"))
    return f"{text[:3]}***{text[-4:]}" if len(text) >= 20 else "***"
