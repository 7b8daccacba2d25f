"""Sleep, for operators: give the memory back without giving up the address. Paths and levels are vLLM's.

vLLM ends what runs when it falls asleep; here it may finish first, unless `mode=abort` says otherwise.
"""

from __future__ import annotations

from typing import Protocol

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from server.errors import InvalidRequest


class Sleeper(Protocol):
    @property
    def asleep(self) -> bool: ...
    async def sleep(self, level: int, *, abort: bool) -> None: ...
    async def wake_up(self) -> None: ...


def sleep_routes(sleeper: Sleeper) -> APIRouter:
    router = APIRouter(tags=["operations"])

    @router.post("/sleep", response_class=Response)
    async def sleep(request: Request) -> Response:
        """Answers once the memory is given back: at level 1 the KV pool, at level 2 the weights too. As vLLM's, the
        answer has no body."""
        level = _choice(request, "level", ("1", "2"))
        mode = _choice(request, "mode", ("wait", "abort"))
        await sleeper.sleep(int(level), abort=mode == "abort")
        return Response()

    @router.post("/wake_up", response_class=Response)
    async def wake_up(request: Request) -> Response:
        """Answers once requests are taken again."""
        if request.query_params.get("tags"):
            raise InvalidRequest("`tags` is not supported: everything is woken up at once.", "tags")
        await sleeper.wake_up()
        return Response()

    @router.get("/is_sleeping")
    async def is_sleeping() -> Response:
        return JSONResponse({"is_sleeping": sleeper.asleep})

    return router


def _choice(request: Request, name: str, values: tuple[str, ...]) -> str:
    """A query parameter of few values, the first of them its default. Raises InvalidRequest."""
    value = request.query_params.get(name, values[0])
    if value not in values:
        raise InvalidRequest(f"`{name}` must be one of {', '.join(values)}.", name)
    return value
