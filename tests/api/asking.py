"""A server on a scripted engine, in this process, and the short ways to ask it and to read what it says."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from hygiene import check_error
from prometheus_client import CollectorRegistry
from scripted import CONTEXT, VOCAB_SIZE, ScriptedEngine, tokenizer
from starlette.testclient import TestClient

from server.api.keys import Key, Keyring, key_digest
from server.api.limits import Limits
from server.api.models import ServedModel
from server.api.stored import stored_routes
from server.app import create_app
from server.jobs.store import Store

MODEL = ServedModel(
    name="gpt2",
    aliases=("text-davinci-002", "openai-community/gpt2", "a b"),
    created=1700000000,
    root="gpt2",
    max_model_len=CONTEXT,
    fingerprint="fp_test",
)
LIMITS = Limits(max_model_len=CONTEXT, vocab_size=VOCAB_SIZE)


@dataclass
class Api:
    """A server on a scripted engine, and the short ways to ask it."""

    engine: ScriptedEngine
    client: TestClient
    answers: list[tuple[str, int]] = field(default_factory=list)  # what the metrics hook was told

    def post(self, path: str = "/v1/completions", **fields: Any) -> Any:
        return self.client.post(path, json=fields)

    def complete(self, **fields: Any) -> dict[str, Any]:
        response = self.post(**fields)
        assert response.status_code == 200, response.text
        return response.json()

    def chunks(self, **fields: Any) -> list[dict[str, Any]]:
        """A clean stream's events, without [DONE]."""
        response = self.post(stream=True, **fields)
        assert response.status_code == 200, response.text
        *events, done = events_of(response.text)
        assert done == "[DONE]"
        return [json.loads(data) for data in events]

    def error(self, **fields: Any) -> dict[str, Any]:
        return error_of(self.post(**fields), 400)


def events_of(body: str) -> list[str]:
    """Exactly `data: …` and a blank line, nothing else."""
    assert body.endswith("\n\n")
    lines = body.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    return [line.removeprefix("data: ") for line in lines]


def error_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = check_error(response.text)
    assert len(error["message"]) < 600
    return error


def join(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A stream's chunks as the choices they add up to."""
    choices: dict[int, dict[str, Any]] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        whole = choices.setdefault(
            choice["index"], {"text": "", "index": choice["index"], "logprobs": None, "finish_reason": None}
        )
        assert whole["finish_reason"] is None, "a chunk after the last"
        whole["text"] += choice["text"]
        if choice["finish_reason"] is not None:
            whole["finish_reason"] = choice["finish_reason"]
            whole["stop_reason"] = choice["stop_reason"]
        if choice["logprobs"] is not None:
            _extend(whole, choice["logprobs"])
    return [choices[index] for index in sorted(choices)]


def _extend(whole: dict[str, Any], logprobs: dict[str, Any]) -> None:
    if whole["logprobs"] is None:
        whole["logprobs"] = logprobs
        return
    for name, column in logprobs.items():
        if column is not None:
            whole["logprobs"][name] += column


def make_api(
    engine: ScriptedEngine | None = None, limits: Limits = LIMITS, store: Store | None = None, **parts: Any
) -> Api:
    engine = engine or ScriptedEngine()
    answers: list[tuple[str, int]] = []
    keys = [Key(name, key_digest(key)) for name, key in parts.pop("keys", {}).items()]
    app = create_app(
        engine=engine,
        tokenizer=tokenizer(),
        model=MODEL,
        limits=limits,
        version="0",
        registry=parts.pop("registry", CollectorRegistry()),
        on_answer=lambda route, status: answers.append((route, status)),
        keys=Keyring(keys) if keys else None,
        stored=None if store is None else stored_routes(store, None, MODEL, limits),
        **parts,
    )
    return Api(engine, TestClient(app, raise_server_exceptions=False), answers)
