"""The model being served: its names, and who it is when asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from server.engine.variants import Variant, Variants
from server.errors import ModelNotFound

OWNER = "gpt2-server"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    name: str  # what answers call it
    aliases: tuple[str, ...] = ()  # other names it answers to
    created: int  # unix seconds
    root: str  # where it came from: an id or a folder's name, never a path
    max_model_len: int
    fingerprint: str  # one value for each (weights, dtype, code version)
    variants: Variants | None = None  # models beside this one

    def resolve(self, asked: str) -> str:
        """The served name. None asked for means this one. Raises ModelNotFound."""
        if not asked or asked == self.name or asked in self.aliases:
            return self.name
        if self.variant(asked) is not None:
            return asked
        raise ModelNotFound(asked)

    def variant(self, name: str) -> Variant | None:
        """None for the model itself."""
        return None if self.variants is None else self.variants.find(name)

    def fingerprint_of(self, name: str) -> str:
        variant = self.variant(name)
        return self.fingerprint if variant is None else f"{self.fingerprint}-{variant.fingerprint}"

    def resolve_engine(self, asked: str) -> str:
        """As in a path, where none is no name: openai 0.28 writes spaces as pluses there. Raises ModelNotFound."""
        if not asked:
            raise ModelNotFound(asked)
        try:
            return self.resolve(asked)
        except ModelNotFound:
            return self.resolve(asked.replace("+", " "))

    @property
    def names(self) -> tuple[str, ...]:
        beside = () if self.variants is None else self.variants.names
        return (self.name, *(alias for alias in self.aliases if alias != self.name), *beside)


def model_object(model: ServedModel, name: str) -> dict[str, Any]:
    variant = model.variant(name)
    return {
        "id": name,
        "object": "model",
        "created": model.created if variant is None else variant.created,
        "owned_by": OWNER,
        "root": model.root if variant is None else variant.directory.name,
        "parent": None if name == model.name else model.name,
        "max_model_len": model.max_model_len,
        "permission": [],
    }


def model_routes(model: ServedModel) -> APIRouter:
    router = APIRouter(tags=["models"])

    @router.get("/v1/models")
    @router.get("/models", include_in_schema=False)
    async def list_models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [model_object(model, name) for name in model.names]})

    @router.get("/v1/models/{model_id:path}")
    @router.get("/models/{model_id:path}", include_in_schema=False)
    async def retrieve_model(model_id: str) -> JSONResponse:
        model.resolve_engine(model_id)
        return JSONResponse(model_object(model, model_id if model_id in model.names else model.name))

    return router
