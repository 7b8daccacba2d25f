"""What a data directory adds to a server: files, fine-tuning jobs and batches, put together.

Imported where there is a data directory, and nowhere else: the database library below would cost every other server
10 MiB and a tenth of a second of its start.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter

from model.config import ModelConfig
from server.api.batch_lines import CompletionLines
from server.api.chat_template import chat_template_source
from server.api.completions import CompletionService
from server.api.limits import Limits
from server.api.models import ServedModel
from server.api.stored import stored_routes
from server.engine.engine import Engine
from server.jobs.batch_runner import BatchRunner
from server.jobs.recipe import Machine
from server.jobs.store import Store, open_store
from server.jobs.tuning import FineTuning, make_fine_tuning
from server.metrics import Metrics
from server.settings import Settings


@dataclass(frozen=True, slots=True)
class Stored:
    store: Store
    tuning: FineTuning
    batches: BatchRunner

    def routes(self, model: ServedModel, limits: Limits) -> APIRouter:
        return stored_routes(self.store, self.tuning, model, limits)

    def start(self) -> None:
        self.tuning.start()
        self.batches.start()

    async def stop(self) -> None:
        try:
            await self.tuning.stop()
        finally:
            await self.batches.stop()

    def close(self) -> None:
        self.store.close()


def open_stored(
    settings: Settings,
    engine: Engine,
    served: ServedModel,
    base: Path,
    config: ModelConfig,
    lines: CompletionService,
    metrics: Metrics,
) -> Stored:
    """base: the directory of the model that is served. lines: answers those of batches. Raises SettingsError."""
    assert settings.data_dir is not None
    url = None if settings.database_url is None else settings.database_url.get_secret_value()
    store = open_store(Path(settings.data_dir).expanduser().resolve(), url, settings.max_file_bytes)
    batches = BatchRunner(
        store.batches,
        store.files,
        {"/v1/completions": CompletionLines(lines)},
        lines_at_once=settings.batch_lines_at_once,
        crowded=lambda: engine.crowded,
        on_line=metrics.batch_line,
    )
    return Stored(store, make_fine_tuning(store, engine, served.name, base, config, _machine(settings, base)), batches)


def _machine(settings: Settings, base: Path) -> Machine:
    """What jobs train on."""
    cores = len(os.sched_getaffinity(0))
    return Machine(
        device=settings.training_device,
        threads=settings.training_threads or max(cores // 2, 1),
        chat_template=chat_template_source(settings.chat_template, base),
    )
