"""The routes of what outlives a request. Without a data directory they are there to say what is missing."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.files import file_routes
from server.api.limits import Limits
from server.errors import NotFound
from server.jobs.store import Store

PREFIXES = ("/v1/files", "/v1/fine_tuning", "/v1/fine-tunes", "/v1/batches")


def stored_routes(store: Store | None, limits: Limits) -> APIRouter:
    router = APIRouter()
    if store is None:
        router.include_router(_absent_routes())
        return router
    router.include_router(file_routes(store.files, limits))
    return router


def _absent_routes() -> APIRouter:
    router = APIRouter(include_in_schema=False)

    async def refuse(request: Request) -> Response:
        raise NotFound(
            "This server keeps no files and runs no jobs. Its operator can start it with --data-dir.",
            code="data_dir_required",
        )

    for prefix in PREFIXES:
        for path in (prefix, f"{prefix}/{{rest:path}}"):
            router.add_api_route(path, refuse, methods=["GET", "POST", "DELETE"])
    return router
