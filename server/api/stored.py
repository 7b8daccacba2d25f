"""The routes of what outlives a request."""

from __future__ import annotations

from fastapi import APIRouter

from server.api.batches import batch_routes
from server.api.files import file_routes
from server.api.fine_tunes import fine_tune_routes
from server.api.fine_tuning import fine_tuning_routes
from server.api.limits import Limits
from server.api.models import ServedModel
from server.api.removal import removal_routes
from server.jobs.store import Store
from server.jobs.tuning import FineTuning


def stored_routes(store: Store, tuning: FineTuning | None, model: ServedModel, limits: Limits) -> APIRouter:
    router = APIRouter()
    router.include_router(removal_routes(None if tuning is None else tuning.library.remove, model))
    router.include_router(file_routes(store.files, limits))
    router.include_router(batch_routes(store.batches, store.files, limits))
    if tuning is not None:
        router.include_router(fine_tuning_routes(tuning, store.files, model, limits))
        router.include_router(fine_tune_routes(tuning, store.files, model, limits))
    return router
