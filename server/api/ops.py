"""What operators and their machines ask: is it alive, is it ready, how busy, which version, the metrics."""

from __future__ import annotations

from collections.abc import Set

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from starlette.responses import PlainTextResponse, Response

from server.api.errors import error_response
from server.engine.request import GenerationEngine
from server.errors import Overloaded


def ops_routes(
    engine: GenerationEngine,
    registry: CollectorRegistry,
    running: Set[str],
    version: str,
) -> APIRouter:
    router = APIRouter(tags=["operations"])

    @router.get("/health")
    async def health() -> Response:
        return _ok() if engine.healthy else error_response(Overloaded("The engine is not healthy."))

    @router.get("/ready")
    async def ready() -> Response:
        return _ok() if engine.ready else error_response(Overloaded("The server is not ready for requests."))

    @router.get("/ping")
    @router.post("/ping")
    async def ping() -> Response:
        return await health()

    @router.get("/version")
    async def show_version() -> JSONResponse:
        return JSONResponse({"version": version})

    @router.get("/load")
    async def load() -> JSONResponse:
        return JSONResponse({"server_load": len(running)})

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(generate_latest(registry), headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})

    return router


def _ok() -> Response:
    return JSONResponse({"status": "ok"})
