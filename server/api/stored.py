"""The routes of what outlives a request. Without a data directory they are there to say what is missing."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.responses import Response

from server.api.auth import caller_of
from server.api.batches import batch_routes
from server.api.files import file_routes
from server.api.fine_tunes import fine_tune_routes
from server.api.fine_tuning import fine_tuning_routes
from server.api.limits import Limits
from server.api.models import ServedModel
from server.errors import Forbidden, NotFound
from server.jobs.store import Store
from server.jobs.tuning import FineTuning

MADE = "ft:"  # how the names of what jobs make begin
PREFIXES = ("/v1/files", "/v1/fine_tuning", "/v1/fine-tunes", "/v1/batches")


class ModelDeletedAnswer(BaseModel):
    id: str
    object: Literal["model"]
    deleted: bool


def stored_routes(store: Store | None, tuning: FineTuning | None, model: ServedModel, limits: Limits) -> APIRouter:
    router = APIRouter()
    router.include_router(removal_routes(tuning, model))
    if store is not None:
        router.include_router(file_routes(store.files, limits))
        router.include_router(batch_routes(store.batches, store.files, limits))
    if store is not None and tuning is not None:
        router.include_router(fine_tuning_routes(tuning, store.files, model, limits))
        router.include_router(fine_tune_routes(tuning, store.files, model, limits))
    if store is None:
        router.include_router(_absent_routes())
    return router


def removal_routes(tuning: FineTuning | None, model: ServedModel) -> APIRouter:
    router = APIRouter(tags=["models"])

    @router.delete("/v1/models/{model_id:path}", responses={200: {"model": ModelDeletedAnswer}})
    async def delete_model(model_id: str, request: Request) -> Response:
        """Of what fine-tuning jobs have made. Requests that run finish."""
        name = model.resolve_engine(model_id)
        if tuning is None or not name.startswith(MADE):
            raise Forbidden("Only models that a fine-tuning job has made can be deleted.")
        await tuning.library.remove(name, caller_of(request.scope).name)
        return JSONResponse({"id": name, "object": "model", "deleted": True})

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
