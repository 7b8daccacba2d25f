"""A server on a scripted engine that runs fine-tuning jobs, the real engine's list of models, a fake trainer."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import httpx
from asking import LIMITS, MODEL
from prometheus_client import CollectorRegistry
from scripted import EOS, VOCAB_SIZE, ScriptedEngine, tokenizer

from model.config import Activation, ModelConfig
from server.api.stored import stored_routes
from server.app import create_app
from server.engine.admission import Admission
from server.engine.engine import Engine
from server.engine.observer import Observer
from server.engine.variants import Variants
from server.jobs import trainer
from server.jobs.recipe import Machine
from server.jobs.store import open_store
from server.jobs.tuning import FineTuning, make_fine_tuning
from server.metrics import Metrics
from server.worker.channel import EngineChannel
from server.worker.messages import Load, Loaded, Ready, ToWorker

FAKE = (sys.executable, str(Path(__file__).parent / "fake_trainer.py"))
CONFIG = ModelConfig(
    n_layer=2, n_head=2, n_embd=8, n_positions=64, vocab_size=VOCAB_SIZE, n_inner=32, activation=Activation.GELU_TANH,
    layer_norm_epsilon=1e-5, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, tie_word_embeddings=True,
    eos_token_ids=(EOS,),
)  # fmt: skip
ENDED = {"succeeded", "failed", "cancelled"}


class Tuned:
    """The short ways to ask it."""

    def __init__(self, client: httpx.AsyncClient, tuning: FineTuning, engine: Engine, directory: Path) -> None:
        self.client, self.tuning, self.engine, self.directory = client, tuning, engine, directory

    async def upload(self, *orders: str, purpose: str = "fine-tune") -> str:
        lines = "".join(f'{{"text": "{order}"}}\n' for order in orders or ("learn",))
        form = {"data": {"purpose": purpose}, "files": {"file": ("train.jsonl", lines.encode())}}
        return str((await self.client.post("/v1/files", **form)).json()["id"])

    async def create(self, *orders: str, **fields: Any) -> dict[str, Any]:
        body = {"model": "gpt2", "training_file": await self.upload(*orders), **fields}
        answer = await self.client.post("/v1/fine_tuning/jobs", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()  # type: ignore[no-any-return]

    async def job(self, id_: str) -> dict[str, Any]:
        return (await self.client.get(f"/v1/fine_tuning/jobs/{id_}")).json()  # type: ignore[no-any-return]

    async def turn(self, id_: str, to: str) -> httpx.Response:
        return await self.client.post(f"/v1/fine_tuning/jobs/{id_}/{to}")

    async def until(self, id_: str, what: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        deadline = time.monotonic() + 60
        while not what(job := await self.job(id_)):
            assert time.monotonic() < deadline, job
            await asyncio.sleep(0.02)
        return job

    async def ended(self, id_: str) -> dict[str, Any]:
        return await self.until(id_, lambda job: job["status"] in ENDED)

    async def messages(self, id_: str) -> list[str]:
        listed = await self.client.get(f"/v1/fine_tuning/jobs/{id_}/events", params={"limit": 100})
        return [event["message"] for event in listed.json()["data"]][::-1]

    async def models(self) -> list[str]:
        listed = (await self.client.get("/v1/models")).json()["data"]
        return [each["id"] for each in listed if each["id"].startswith("ft:")]

    def lives(self, id_: str) -> int:
        return len((self.directory / "jobs" / id_ / "out" / "lives").read_text())

    def go(self, id_: str) -> None:
        """On with a job that waits."""
        path = self.directory / "jobs" / id_ / "go"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


class Loading:
    """The channel of a worker that loads whatever it is told to, and computes nothing."""

    sent = 0

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def send(self, message: ToWorker) -> None:
        if isinstance(message, Load):
            asyncio.get_running_loop().call_soon(self._engine.worker_loaded, 0, Loaded(message.key))


@asynccontextmanager
async def tuned(
    directory: Path, base: Path, *, running: bool = True, url: str | None = None, **machine: Any
) -> AsyncIterator[Tuned]:
    """running: jobs are trained."""
    store = open_store(directory, url, 1 << 20)
    variants = Variants(CONFIG)
    observer = Observer(Metrics("gpt2", "0", 1))
    engine = Engine(tokenizer(), Admission(9, 999), observer, request_timeout=60, stall_timeout=60, variants=variants)
    engine.worker_ready(0, Ready("scripted", 16, 99, 0.0), cast(EngineChannel, Loading(engine)))
    tuning = make_fine_tuning(store, engine, "gpt2", base, CONFIG, Machine(device="cpu", threads=1, **machine))
    model = replace(MODEL, variants=variants)
    app = create_app(
        engine=ScriptedEngine(), tokenizer=tokenizer(), model=model, limits=LIMITS, version="0",
        registry=CollectorRegistry(), on_answer=lambda route, status: None,
        stored=stored_routes(store, tuning, model, LIMITS),
    )  # fmt: skip
    transport = httpx.ASGITransport(app=app)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=60) as client:
            if running:
                tuning.start()
            yield Tuned(client, tuning, engine, directory)
    finally:
        await tuning.stop()
        store.close()


def use_fake_trainer(monkeypatch: Any) -> None:
    monkeypatch.setattr(trainer, "COMMAND", FAKE)
