"""Files: what fine-tuning jobs and batches read, and what they leave."""

from __future__ import annotations

import re
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse
from pydantic import BaseModel
from starlette.responses import Response

from server.api.auth import caller_of
from server.api.limits import Limits
from server.api.listing import list_response, read_after, read_choice, read_limit
from server.api.multipart import Form, body_chunks, read_form
from server.api.reading import ignored_header, shown_name
from server.errors import InvalidRequest, NotFound
from server.jobs.files import FileStore, StoredFile

PURPOSES = ("fine-tune", "batch")  # of what clients upload
LIST_MAX = 10_000
EXPIRY = (3600, 2_592_000)  # seconds: an hour, thirty days
KNOWN_FIELDS = frozenset({"purpose", "expires_after[anchor]", "expires_after[seconds]"})
FORM_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "file": {"type": "string", "format": "binary", "description": "JSON lines"},
        "purpose": {"type": "string", "enum": list(PURPOSES)},
    },
    "required": ["file", "purpose"],
}


class FileAnswer(BaseModel):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"]
    status_details: None


class FileDeletedAnswer(BaseModel):
    id: str
    object: Literal["file"]
    deleted: bool


class FileListAnswer(BaseModel):
    object: Literal["list"]
    data: list[FileAnswer]
    first_id: str | None
    last_id: str | None
    has_more: bool


def file_object(file: StoredFile) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "expires_at": file.expires_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


def file_routes(files: FileStore, limits: Limits) -> APIRouter:
    router = APIRouter(tags=["files"])

    @router.post(
        "/v1/files",
        openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": FORM_SCHEMA}}}},
        responses={200: {"model": FileAnswer}},
    )
    async def upload(request: Request) -> Response:
        async with files.draft() as draft:
            chunks = body_chunks(request.receive, limits.body_timeout)
            form = await read_form(request.headers, chunks, draft)
            purpose = _purpose(form)
            if form.filename is None:
                raise InvalidRequest("Missing required parameter: 'file'.", "file", "missing_required_parameter")
            if not draft.bytes:
                raise InvalidRequest("The file is empty.", "file", "invalid_value")
            file = await draft.keep(
                filename=form.filename,
                purpose=purpose,
                owner=caller_of(request.scope).name,
                expires_after=_expiry(form),
            )
        return JSONResponse(file_object(file), headers=_ignored(form))

    @router.get("/v1/files", responses={200: {"model": FileListAnswer}})
    async def list_files(request: Request) -> Response:
        """Query: `purpose`, `limit`, `after`, `order` (desc or asc)."""
        page = await files.list(
            caller_of(request.scope).name,
            purpose=request.query_params.get("purpose"),
            after=read_after(request),
            limit=read_limit(request, LIST_MAX, LIST_MAX),
            newest_first=read_choice(request, "order", ("desc", "asc")) == "desc",
        )
        return list_response([file_object(file) for file in page.items], has_more=page.has_more)

    @router.get("/v1/files/{file_id}", responses={200: {"model": FileAnswer}})
    async def retrieve_file(file_id: str, request: Request) -> Response:
        return JSONResponse(file_object(await files.find(file_id, caller_of(request.scope).name)))

    @router.get("/v1/files/{file_id}/content", response_class=FileResponse)
    async def file_content(file_id: str, request: Request) -> Response:
        file = await files.find(file_id, caller_of(request.scope).name)
        path = files.path(file)
        if not path.is_file():
            raise NotFound("The content of this file is gone.", param="id")
        return FileResponse(path, media_type="application/octet-stream", filename=file.filename)

    @router.delete("/v1/files/{file_id}", responses={200: {"model": FileDeletedAnswer}})
    async def delete_file(file_id: str, request: Request) -> Response:
        await files.delete(file_id, caller_of(request.scope).name)
        return JSONResponse({"id": file_id, "object": "file", "deleted": True})

    return router


def _purpose(form: Form) -> str:
    """Raises InvalidRequest."""
    purpose = form.fields.get("purpose")
    if purpose is None:
        raise InvalidRequest("Missing required parameter: 'purpose'.", "purpose", "missing_required_parameter")
    if purpose not in PURPOSES:
        raise InvalidRequest(f"Invalid value for 'purpose': it should be one of {', '.join(PURPOSES)}.", "purpose")
    return purpose


def _expiry(form: Form) -> int | None:
    """Seconds. Raises InvalidRequest."""
    anchor, seconds = (form.fields.get(f"expires_after[{name}]") for name in ("anchor", "seconds"))
    if anchor is None and seconds is None:
        return None
    least, most = EXPIRY
    if (
        anchor != "created_at"
        or not re.fullmatch("[0-9]{1,9}", seconds or "")
        or not least <= int(seconds or 0) <= most
    ):
        raise InvalidRequest(
            f"Invalid 'expires_after': expected the anchor created_at and {least} to {most} seconds.", "expires_after"
        )
    return int(seconds or 0)


def _ignored(form: Form) -> dict[str, str]:
    return ignored_header(shown_name(name) for name in form.fields if name not in KNOWN_FIELDS)
