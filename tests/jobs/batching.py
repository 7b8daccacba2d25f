"""Batches on a scripted engine: the short ways to make one, to carry it out, and to read what it left."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

from asking import LIMITS, MODEL, Api
from scripted import tokenizer

from server.api.batch_lines import CompletionLines
from server.api.completions import CompletionService
from server.api.phrases import Phrases
from server.engine.output import TokenTexts
from server.engine.request import GenerationEngine
from server.jobs.batch_runner import BatchRunner
from server.jobs.batches import OPEN
from server.jobs.store import Store

PATIENCE = 60.0  # seconds
URL = "/v1/completions"


def line(custom_id: Any, method: Any = "POST", url: Any = URL, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": method, "url": url, "body": {"model": "gpt2", "prompt": "a", **body}}


def jsonl(lines: list[Any]) -> bytes:
    return b"".join((each if isinstance(each, bytes) else json.dumps(each).encode()) + b"\n" for each in lines)


def upload(api: Api, lines: list[Any] | bytes, purpose: str = "batch", **how: Any) -> str:
    content = lines if isinstance(lines, bytes) else jsonl(lines)
    answer = api.client.post("/v1/files", data={"purpose": purpose}, files={"file": ("in.jsonl", content)}, **how)
    return str(answer.json()["id"])


def ask(file: str, **fields: Any) -> dict[str, Any]:
    return {"input_file_id": file, "endpoint": URL, "completion_window": "24h", **fields}


def create(api: Api, lines: list[Any] | bytes, **fields: Any) -> str:
    answer = api.client.post("/v1/batches", json=ask(upload(api, lines), **fields))
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def make_runner(store: Store, engine: GenerationEngine, **how: Any) -> BatchRunner:
    service = CompletionService(
        engine=engine,
        tokenizer=tokenizer(),
        model=MODEL,
        limits=LIMITS,
        texts=TokenTexts(tokenizer()),
        running=set(),
        phrases=Phrases(tokenizer()),
        grammars=None,
    )
    how = {"lines_at_once": 4, "crowded": lambda: False, **how}
    return BatchRunner(store.batches, store.files, {URL: CompletionLines(service)}, **how)


async def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)


async def until_ended(store: Store, id_: str, owner: str = "") -> None:
    deadline = time.monotonic() + PATIENCE
    while (await store.batches.find(id_, owner)).status in OPEN:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


def carry_out(api: Api, store: Store, id_: str, **how: Any) -> dict[str, Any]:
    """Returns the batch as it ends."""

    async def main() -> None:
        runner = make_runner(store, api.engine, **how)
        runner.start()
        try:
            await until_ended(store, id_)
        finally:
            await runner.stop()

    asyncio.run(main())
    return retrieve(api, id_)


def retrieve(api: Api, id_: str) -> dict[str, Any]:
    batch: dict[str, Any] = api.client.get(f"/v1/batches/{id_}").json()
    return batch


def content(api: Api, id_: str | None) -> list[dict[str, Any]]:
    if id_ is None:
        return []
    text = api.client.get(f"/v1/files/{id_}/content").text
    assert text.endswith("\n")
    return [json.loads(each) for each in text.splitlines()]
