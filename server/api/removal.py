"""DELETE /v1/models/{model}, and the answer of a server that keeps nothing to whoever asks for what it would keep."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.responses import Response

from server.api.auth import caller_of
from server.api.models import ServedModel
from server.errors import Forbidden, NotFound

MADE = "ft:"  # how the names of what jobs make begin
PREFIXES = ("/v1/files", "/v1/fine_tuning", "/v1/fine-tunes", "/v1/batches")

Remove = Callable[[str, str], Awaitable[None]]  # a model that a job has made, and who asks


class ModelDeletedAnswer(BaseModel):
    id: str
    object: Literal["model"]
    deleted: bool


def removal_routes(remove: Remove | None, model: ServedModel) -> APIRouter:
    router = APIRouter(tags=["models"])

    @router.delete("/v1/models/{model_id:path}", responses={200: {"model": ModelDeletedAnswer}})
    async def delete_model(model_id: str, request: Request) -> Response:
        """Of what fine-tuning jobs have made. Requests that run finish."""
        name = model.resolve_engine(model_id)
        if remove is None or not name.startswith(MADE):
            raise Forbidden("Only models that a fine-tuning job has made can be deleted.")
        await remove(name, caller_of(request.scope).name)
        return JSONResponse({"id": name, "object": "model", "deleted": True})

    return router


def absent_routes(model: ServedModel) -> APIRouter:
    """In place of those that need a data directory, to say what is missing."""
    router = APIRouter()
    router.include_router(removal_routes(None, model))

    async def refuse(request: Request) -> Response:
        raise NotFound(
            "This server keeps no files and runs no jobs. Its operator can start it with --data-dir.",
            code="data_dir_required",
        )

    for prefix in PREFIXES:
        for path in (prefix, f"{prefix}/{{rest:path}}"):
            router.add_api_route(path, refuse, methods=["GET", "POST", "DELETE"], include_in_schema=False)
    return router
