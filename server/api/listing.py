"""How lists are asked for and shown: a page of them, after an id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse
from starlette.requests import Request

from server.errors import InvalidRequest


def read_limit(request: Request, default: int, most: int) -> int:
    """Raises InvalidRequest."""
    text = request.query_params.get("limit", str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= most):
        raise InvalidRequest(f"Invalid 'limit': expected an integer from 1 to {most}.", "limit", "invalid_value")
    return int(text)


def read_after(request: Request) -> str | None:
    return request.query_params.get("after") or None


def read_choice(request: Request, name: str, values: tuple[str, ...]) -> str:
    """A query parameter of few values, the first of them its default. Raises InvalidRequest."""
    value = request.query_params.get(name, values[0])
    if value not in values:
        raise InvalidRequest(f"`{name}` must be one of {', '.join(values)}.", name, "invalid_value")
    return value


def list_response(items: Sequence[Mapping[str, Any]], *, has_more: bool) -> JSONResponse:
    return JSONResponse({
        "object": "list",
        "data": items,
        "first_id": items[0]["id"] if items else None,
        "last_id": items[-1]["id"] if items else None,
        "has_more": has_more,
    })  # fmt: skip
