"""A model served to this process alone: the application and the worker of a server, without the socket between."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.types import Message, Scope

from model.errors import ModelError
from server.assembly import POLL, Backend, assemble
from server.errors import SettingsError
from server.settings import Settings

ALONE = {"api_key": None, "api_key_file": None, "data_dir": None, "database_url": None, "playground": False}


@asynccontextmanager
async def serving_here(settings: Settings) -> AsyncIterator[Backend]:
    """Ready. Raises ModelError or SettingsError."""
    backend = assemble(settings.model_copy(update={**ALONE, "workers": 1}))
    workers = backend.start()
    try:
        while not backend.engine.ready:
            if any(worker.done() for worker in workers):
                raise ModelError("the model could not be loaded; the reason is in the line above")
            await asyncio.sleep(POLL)
        yield backend
    finally:
        await backend.stop(workers)


async def post_completion(app: FastAPI, body: bytes, send: Callable[[Message], Awaitable[None]]) -> None:
    """POST /v1/completions, made to the application itself."""
    bodies = [body]

    async def receive() -> Message:
        if bodies:
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}
        await asyncio.Event().wait()  # nobody hangs up; who is interrupted is cancelled
        raise AssertionError

    await app(_scope(), receive, send)


async def ask(app: FastAPI, fields: dict[str, Any]) -> dict[str, Any]:
    """The whole answer. Raises SettingsError with what the application refused."""
    received = bytearray()

    async def send(message: Message) -> None:
        received.extend(message.get("body", b""))

    await post_completion(app, json.dumps(fields).encode(), send)
    answer: dict[str, Any] = json.loads(received)
    if "error" in answer:
        raise SettingsError(answer["error"]["message"])
    return answer


def _scope() -> Scope:
    path = "/v1/completions"
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json")],
        "client": None,
        "server": None,
    }
