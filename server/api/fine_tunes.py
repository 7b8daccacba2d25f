"""Fine-tuning jobs as openai 0.28 asks for them: `openai.FineTune`. The jobs are the same."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from server.api.auth import caller_of
from server.api.body import read_body
from server.api.files import file_object
from server.api.fine_tuning import request_body, start, stream_events, turn
from server.api.fine_tuning_parsing import LEGACY_RATE, parse_fine_tune
from server.api.fine_tuning_schemas import FineTuneAnswer, FineTuneBody
from server.api.limits import Limits
from server.api.listing import read_choice
from server.api.models import OWNER, ServedModel
from server.api.reading import ignored_header
from server.api.schemas import request_schema
from server.errors import NotFound
from server.jobs.files import FileStore, StoredFile
from server.jobs.records import FineTuningJob, JobEvent, Status
from server.jobs.tuning import FineTuning

EVENTS_MAX = 10_000  # in an answer
JOBS_MAX = 100  # the latest
STATUS = {
    Status.QUEUED: "pending",
    Status.PAUSED: "pending",
    Status.VALIDATING: "pending",
}  # the others have kept their names


def fine_tune_event(said: JobEvent) -> dict[str, Any]:
    return {
        "object": "fine-tune-event", "created_at": said.created_at, "level": said.level, "message": said.message,
    }  # fmt: skip


def fine_tune_routes(tuning: FineTuning, files: FileStore, model: ServedModel, limits: Limits) -> APIRouter:
    router = APIRouter(tags=["fine-tuning"], prefix="/v1/fine-tunes")
    answers: dict[int | str, dict[str, Any]] = {200: {"model": FineTuneAnswer}}
    jobs = tuning.jobs

    async def show(job: FineTuningJob, *, events: bool = True) -> dict[str, Any]:
        shown = _fine_tune(job) | {
            "training_files": await _files(files, job, [job.training_file]),
            "validation_files": await _files(files, job, [job.validation_file] if job.validation_file else []),
            "result_files": await _files(files, job, job.result_files),
        }
        if events:
            said, _ = await jobs.events_since(job.id, 0, EVENTS_MAX)
            shown["events"] = [fine_tune_event(each) for each in said]
        return shown

    @router.post("", openapi_extra=request_body(request_schema(FineTuneBody)), responses=answers)
    async def create_fine_tune(request: Request) -> Response:
        owner = caller_of(request.scope).name
        job, ignored = parse_fine_tune(await read_body(request.scope, request.receive, limits), owner)
        return JSONResponse(await show(await start(tuning, files, model, job)), headers=ignored_header(ignored))

    @router.get("")
    async def list_fine_tunes(request: Request) -> Response:
        page = await jobs.find_all(caller_of(request.scope).name, after=None, limit=JOBS_MAX)
        shown = [await show(job, events=False) for job in page.items]
        return JSONResponse({"object": "list", "data": shown})

    @router.get("/{job_id}", responses=answers)
    async def retrieve_fine_tune(job_id: str, request: Request) -> Response:
        return JSONResponse(await show(await jobs.find(job_id, caller_of(request.scope).name)))

    @router.post("/{job_id}/cancel", responses=answers)
    async def cancel_fine_tune(job_id: str, request: Request) -> Response:
        return JSONResponse(await show(await turn(tuning, request, job_id, Status.CANCELLED, "The job was cancelled")))

    @router.get("/{job_id}/events")
    async def list_fine_tune_events(job_id: str, request: Request) -> Response:
        """In the order in which they happened; with `stream=true` until the job has ended."""
        if read_choice(request, "stream", ("false", "true")) == "true":
            return await stream_events(jobs, job_id, request, fine_tune_event)
        job = await jobs.find(job_id, caller_of(request.scope).name)
        said, _ = await jobs.events_since(job.id, 0, EVENTS_MAX)
        return JSONResponse({"object": "list", "data": [fine_tune_event(each) for each in said]})

    return router


def _fine_tune(job: FineTuningJob) -> dict[str, Any]:
    shown = job.hyperparameters
    rate = shown.get("learning_rate_multiplier")
    return {
        "id": job.id,
        "object": "fine-tune",
        "created_at": job.created_at,
        "updated_at": job.finished_at or job.created_at,
        "status": STATUS.get(job.status, job.status),
        "model": job.model,
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": OWNER,
        "hyperparams": {
            "n_epochs": shown.get("n_epochs"),
            "batch_size": _number(shown.get("batch_size")),
            "learning_rate_multiplier": rate * LEGACY_RATE if isinstance(rate, int | float) else LEGACY_RATE,
            "prompt_loss_weight": 0,
        },
    }


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) else None


async def _files(files: FileStore, job: FineTuningJob, ids: list[str]) -> list[dict[str, Any]]:
    """Those that are still there, and the ids of the others."""
    shown = []
    for id_ in ids:
        try:
            shown.append(file_object(await files.find(id_, job.owner)))
        except NotFound:
            gone = StoredFile(
                id=id_, owner=job.owner, created_at=job.created_at, expires_at=None, bytes=0, filename="", purpose=""
            )
            shown.append({**file_object(gone), "status": "deleted"})
    return shown
