"""The engines of the first API, which openai 0.28 still asks for. An engine is a model by its older name."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from server.api.models import OWNER, ServedModel
from server.engine.request import GenerationEngine


def engine_routes(model: ServedModel, engine: GenerationEngine) -> APIRouter:
    router = APIRouter(tags=["engines"])

    def engine_object(name: str) -> dict[str, Any]:
        return {
            "id": name, "object": "engine", "owner": OWNER, "ready": engine.ready, "created": None, "permissions": None,
        }  # fmt: skip

    @router.get("/v1/engines")
    @router.get("/engines", include_in_schema=False)
    async def list_engines() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [engine_object(name) for name in model.names]})

    @router.get("/v1/engines/{engine_id:path}")
    @router.get("/engines/{engine_id:path}", include_in_schema=False)
    async def retrieve_engine(engine_id: str) -> JSONResponse:
        served = model.resolve_engine(engine_id)
        return JSONResponse(engine_object(engine_id if engine_id in model.names else served))

    return router
