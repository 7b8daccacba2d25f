"""Fine-tuning jobs as current clients ask for them."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from server.api.auth import caller_of
from server.api.body import read_body
from server.api.errors import error_object
from server.api.fine_tuning_parsing import parse_job
from server.api.fine_tuning_schemas import CheckpointAnswer, EventAnswer, FineTuningBody, FineTuningJobAnswer
from server.api.limits import Limits
from server.api.listing import list_response, read_after, read_choice, read_limit
from server.api.models import OWNER, ServedModel
from server.api.reading import ignored_header
from server.api.schemas import request_schema
from server.api.sse import DONE, STREAMED, EventStream, event
from server.errors import InvalidRequest, NotFound, ServerError
from server.jobs.files import FileStore
from server.jobs.jobs import JobStore
from server.jobs.records import Checkpoint, FineTuningJob, JobEvent, Status
from server.jobs.tuning import FineTuning

LIST_DEFAULT, LIST_MAX = 20, 100
CHECKPOINTS_DEFAULT = 10
STREAM_POLL = 0.25  # seconds between looks for what is new
STREAM_PAGE = 256

Show = Callable[[JobEvent], dict[str, Any]]


def job_object(job: FineTuningJob) -> dict[str, Any]:
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": job.created_at,
        "finished_at": job.finished_at,
        "estimated_finish": job.estimated_finish,
        "status": job.status,
        "model": job.model,
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": OWNER,
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "result_files": job.result_files,
        "trained_tokens": job.trained_tokens,
        "seed": job.seed,
        "hyperparameters": job.hyperparameters,
        "method": job.method,
        "user_provided_suffix": job.suffix or None,
        "error": job.error,
        "integrations": [],
        "metadata": job.details,
    }


def event_object(said: JobEvent) -> dict[str, Any]:
    return {
        "id": said.id,
        "object": "fine_tuning.job.event",
        "created_at": said.created_at,
        "level": said.level,
        "type": said.type,
        "message": said.message,
        "data": said.data,
    }


def checkpoint_object(job_id: str, checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "id": checkpoint.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": checkpoint.created_at,
        "fine_tuning_job_id": job_id,
        "fine_tuned_model_checkpoint": checkpoint.name,
        "step_number": checkpoint.step_number,
        "metrics": {name: value for name, value in checkpoint.metrics.items() if value is not None},
    }


def fine_tuning_routes(tuning: FineTuning, files: FileStore, model: ServedModel, limits: Limits) -> APIRouter:
    router = APIRouter(tags=["fine-tuning"], prefix="/v1/fine_tuning/jobs")
    jobs, job_answer = tuning.jobs, _answers(FineTuningJobAnswer)

    @router.post("", openapi_extra=request_body(request_schema(FineTuningBody)), responses=job_answer)
    async def create_job(request: Request) -> Response:
        owner = caller_of(request.scope).name
        job, ignored = parse_job(await read_body(request.scope, request.receive, limits), owner)
        job = await start(tuning, files, model, job)
        return JSONResponse(job_object(job), headers=ignored_header(ignored))

    @router.get("")
    async def list_jobs(request: Request) -> Response:
        """Query: `limit`, `after`, `metadata[name]`."""
        asked = {name: value for name, value in request.query_params.items() if name.startswith("metadata[")}
        page = await jobs.find_all(
            caller_of(request.scope).name,
            after=read_after(request),
            limit=read_limit(request, LIST_DEFAULT, LIST_MAX),
            details={name[9:].removesuffix("]"): value for name, value in asked.items()},
        )
        return list_response([job_object(job) for job in page.items], has_more=page.has_more)

    @router.get("/{job_id}", responses=job_answer)
    async def retrieve_job(job_id: str, request: Request) -> Response:
        return JSONResponse(job_object(await jobs.find(job_id, caller_of(request.scope).name)))

    @router.post("/{job_id}/cancel", responses=job_answer)
    async def cancel_job(job_id: str, request: Request) -> Response:
        return JSONResponse(job_object(await turn(tuning, request, job_id, Status.CANCELLED, "The job was cancelled")))

    @router.post("/{job_id}/pause", responses=job_answer)
    async def pause_job(job_id: str, request: Request) -> Response:
        return JSONResponse(job_object(await turn(tuning, request, job_id, Status.PAUSED, "The job was paused")))

    @router.post("/{job_id}/resume", responses=job_answer)
    async def resume_job(job_id: str, request: Request) -> Response:
        return JSONResponse(job_object(await turn(tuning, request, job_id, Status.QUEUED, "The job goes on")))

    @router.get("/{job_id}/events", responses={200: {"model": EventAnswer, "content": STREAMED}})
    async def list_events(job_id: str, request: Request) -> Response:
        """The latest first. With `stream=true` all of them, as they happen, until the job has ended."""
        if read_choice(request, "stream", ("false", "true")) == "true":
            return await stream_events(jobs, job_id, request, event_object)
        limit = read_limit(request, LIST_DEFAULT, LIST_MAX)
        owner = caller_of(request.scope).name
        page = await jobs.events(job_id, owner, after=read_after(request), limit=limit)
        return list_response([event_object(each) for each in page.items], has_more=page.has_more)

    @router.get("/{job_id}/checkpoints", responses={200: {"model": CheckpointAnswer}})
    async def list_checkpoints(job_id: str, request: Request) -> Response:
        """Models as they were after an epoch, the latest first; served once the job has succeeded."""
        limit = read_limit(request, CHECKPOINTS_DEFAULT, LIST_MAX)
        owner = caller_of(request.scope).name
        page = await jobs.checkpoints(job_id, owner, after=read_after(request), limit=limit)
        return list_response([checkpoint_object(job_id, each) for each in page.items], has_more=page.has_more)

    return router


# === What the older API does the same ===


async def start(tuning: FineTuning, files: FileStore, model: ServedModel, job: FineTuningJob) -> FineTuningJob:
    """Raises InvalidRequest, ModelNotFound or RateLimited."""
    job = replace(job, model=model.resolve(job.model))
    await _check_file(files, "training_file", job.training_file, job.owner)
    if job.validation_file is not None:
        await _check_file(files, "validation_file", job.validation_file, job.owner)
    await tuning.create(job)
    return job


async def _check_file(files: FileStore, name: str, id_: str, owner: str) -> None:
    """Raises InvalidRequest."""
    try:
        file = await files.find(id_, owner)
    except NotFound:
        shown = re.sub(r"[^A-Za-z0-9_.-]", "?", id_[:64])
        raise InvalidRequest(f"invalid {name}: {shown}", name, "file_not_found") from None
    if file.purpose != "fine-tune":
        raise InvalidRequest(f"The {name} must have been uploaded for the purpose fine-tune.", name)


async def turn(tuning: FineTuning, request: Request, job_id: str, to: Status, said: str) -> FineTuningJob:
    """Raises NotFound or InvalidRequest."""
    job = await tuning.jobs.turn(job_id, caller_of(request.scope).name, to, said)
    tuning.runner.nudge()
    return job


async def stream_events(jobs: JobStore, job_id: str, request: Request, show: Show) -> Response:
    """Raises NotFound."""
    job = await jobs.find(job_id, caller_of(request.scope).name)

    async def events() -> AsyncIterator[bytes]:
        place = 0
        while True:
            try:
                found, over = await jobs.events_since(job.id, place, STREAM_PAGE)
            except ServerError as error:
                yield event(json.dumps(error_object(error)).encode())
                return
            for each in found:
                place = each.place
                yield event(json.dumps(show(each)).encode())
            if over:
                yield DONE
                return
            await asyncio.sleep(STREAM_POLL)

    async def close() -> None:
        """It holds nothing."""

    return EventStream(events(), {}, close)


def request_body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _answers(model: Any) -> dict[int | str, dict[str, Any]]:
    return {200: {"model": model}}
