"""Batches: files of requests that are answered when nobody else waits."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.responses import Response

from server.api.auth import caller_of
from server.api.body import read_body
from server.api.files import EXPIRY
from server.api.limits import Limits
from server.api.listing import list_response, read_after, read_limit
from server.api.metadata import Metadata, read_metadata
from server.api.reading import ignored_header, read_body_fields, read_object, unknown_fields
from server.api.schemas import Integer, Wire, request_schema
from server.errors import InvalidRequest, NotFound
from server.jobs.batches import WINDOW, Batch, BatchStore, Status
from server.jobs.files import FileStore

ENDPOINTS = ("/v1/completions",)
LIST_DEFAULT, LIST_MAX = 20, 100
PURPOSE = "batch"  # of the input
TIMES = (
    "created_at", "in_progress_at", "expires_at", "finalizing_at", "completed_at", "failed_at", "expired_at",
    "cancelling_at", "cancelled_at",
)  # fmt: skip


class OutputExpiry(Wire):
    anchor: Literal["created_at"]
    seconds: Integer = Field(ge=EXPIRY[0], le=EXPIRY[1])


class BatchBody(Wire):
    """POST /v1/batches."""

    input_file_id: str = Field(description="of a file uploaded with the purpose batch")
    endpoint: str = Field(description="/v1/completions")
    completion_window: str = Field(description=WINDOW)
    metadata: Metadata = Field(default=None, description="up to 16 texts by name, for yourself")
    output_expires_after: OutputExpiry | None = Field(
        default=None, description="anchor created_at, and seconds until the files that are made are deleted"
    )


class BatchCounts(BaseModel):
    total: int
    completed: int
    failed: int


class BatchLineError(BaseModel):
    code: str
    message: str
    param: str | None
    line: int | None


class BatchErrors(BaseModel):
    object: Literal["list"]
    data: list[BatchLineError]


class BatchUsage(BaseModel):
    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class BatchAnswer(BaseModel):
    id: str
    object: Literal["batch"]
    endpoint: str
    model: str | None
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: Status
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: BatchCounts
    usage: BatchUsage
    metadata: dict[str, str] | None


class BatchListAnswer(BaseModel):
    object: Literal["list"]
    data: list[BatchAnswer]
    first_id: str | None
    last_id: str | None
    has_more: bool


def batch_object(batch: Batch) -> dict[str, Any]:
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model,
        "errors": None if batch.errors is None else {"object": "list", "data": batch.errors},
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": batch.status,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        **{name: getattr(batch, name) for name in TIMES},
        "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
        "usage": {
            "input_tokens": batch.input_tokens,
            "input_tokens_details": {"cached_tokens": batch.cached_tokens},
            "output_tokens": batch.output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": batch.input_tokens + batch.output_tokens,
        },
        "metadata": batch.details,
    }


def batch_routes(batches: BatchStore, files: FileStore, limits: Limits) -> APIRouter:
    router = APIRouter(tags=["batches"])
    schema = {"requestBody": {"required": True, "content": {"application/json": {"schema": request_schema(BatchBody)}}}}

    @router.post("/v1/batches", openapi_extra=schema, responses={200: {"model": BatchAnswer}})
    async def create_batch(request: Request) -> Response:
        fields = read_object(await read_body(request.scope, request.receive, limits))
        body = _read(fields)
        owner = caller_of(request.scope).name
        await _check_file(files, body.input_file_id, owner)
        expiry = None if body.output_expires_after is None else body.output_expires_after.seconds
        details = read_metadata(body.metadata)
        batch = await batches.create(owner, body.endpoint, body.input_file_id, details, expiry)
        ignored = unknown_fields(fields, BatchBody)
        return JSONResponse(batch_object(batch), headers=ignored_header(ignored))

    @router.get("/v1/batches", responses={200: {"model": BatchListAnswer}})
    async def list_batches(request: Request) -> Response:
        """Query: `limit`, `after`. The newest first."""
        limit = read_limit(request, LIST_DEFAULT, LIST_MAX)
        page = await batches.page(caller_of(request.scope).name, after=read_after(request), limit=limit)
        return list_response([batch_object(batch) for batch in page.items], has_more=page.has_more)

    @router.get("/v1/batches/{batch_id}", responses={200: {"model": BatchAnswer}})
    async def retrieve_batch(batch_id: str, request: Request) -> Response:
        return JSONResponse(batch_object(await batches.find(batch_id, caller_of(request.scope).name)))

    @router.post("/v1/batches/{batch_id}/cancel", responses={200: {"model": BatchAnswer}})
    async def cancel_batch(batch_id: str, request: Request) -> Response:
        """What was answered by then is kept."""
        return JSONResponse(batch_object(await batches.cancel(batch_id, caller_of(request.scope).name)))

    return router


def _read(fields: dict[str, Any]) -> BatchBody:
    """Raises InvalidRequest."""
    body = read_body_fields(BatchBody, fields)
    if body.endpoint not in ENDPOINTS:
        raise InvalidRequest(
            f"Invalid 'endpoint': batches are answered for {', '.join(ENDPOINTS)} alone.", "endpoint", "invalid_value"
        )
    if body.completion_window != WINDOW:
        message = f"Invalid 'completion_window': it should be {WINDOW}."
        raise InvalidRequest(message, "completion_window", "invalid_value")
    return body


async def _check_file(files: FileStore, id_: str, owner: str) -> None:
    """Raises InvalidRequest."""
    try:
        file = await files.find(id_, owner)
    except NotFound as error:
        raise InvalidRequest(error.message, "input_file_id", "invalid_value") from None
    if file.purpose != PURPOSE:
        message = f"The input file must be uploaded with the purpose '{PURPOSE}'."
        raise InvalidRequest(message, "input_file_id", "invalid_value")
