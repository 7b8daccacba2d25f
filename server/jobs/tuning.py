"""Fine-tuning, put together: the jobs, who trains them, and what they have made."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from model.config import ModelConfig
from server.engine.engine import Engine
from server.jobs.jobs import JobStore
from server.jobs.library import Library
from server.jobs.recipe import Machine
from server.jobs.records import FineTuningJob
from server.jobs.runner import Runner
from server.jobs.store import Store


@dataclass(frozen=True, slots=True)
class FineTuning:
    jobs: JobStore
    library: Library
    runner: Runner
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def start(self) -> None:
        self._tasks.append(asyncio.create_task(self.runner.run()))

    async def stop(self) -> None:
        """Returns once no trainer runs. What it was at goes on with the next start."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def create(self, job: FineTuningJob) -> None:
        """Raises InvalidRequest, NotFound, ModelNotFound or RateLimited."""
        await self.runner.check(job)
        await self.jobs.create(job)
        self.runner.nudge()


def make_fine_tuning(
    store: Store, engine: Engine, base_name: str, base: Path, config: ModelConfig, machine: Machine
) -> FineTuning:
    """base: the directory of the model that is served. The models of earlier jobs are served from now on."""
    jobs = JobStore(store.database)
    if store.lock is not None:
        jobs.release_all()
    library = Library(engine, jobs, store.directory, base_name, base, config)
    library.restore()
    return FineTuning(
        jobs, library, Runner(jobs, store.files, library, machine, store.directory, lambda: engine.load > 0)
    )
