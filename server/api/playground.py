"""The playground: one page at `/`, made of three files that are read once. It asks this server's API alone."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

WEB = Path(__file__).parent.parent / "web"
FILES = {
    "/": ("index.html", "text/html"),
    "/playground.css": ("playground.css", "text/css"),
    "/playground.js": ("playground.js", "text/javascript"),
}
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def playground_routes() -> APIRouter:
    """Open without a key: the page holds no secret, and asks for the key itself."""
    router = APIRouter(include_in_schema=False)
    for path, (name, media_type) in FILES.items():
        router.add_api_route(path, _page((WEB / name).read_bytes(), media_type), methods=["GET"])
    return router


def _page(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def show() -> Response:
        return Response(content, headers=HEADERS, media_type=media_type)

    return show
