"""Trains the jobs that wait, one at a time and the oldest first, and has what they make served at once.

Whatever happens to a trainer happens to its job alone. A server that ends, or is killed, leaves the job to the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from model.errors import ModelError
from model.training.job import Job
from server.errors import ServerError, StorageError
from server.jobs.database import new_id
from server.jobs.files import FileStore
from server.jobs.jobs import JobStore
from server.jobs.library import Library
from server.jobs.progress import Progress, failure_of
from server.jobs.recipe import CHECKPOINTS, Machine, checkpoint_name, model_name, trainer_job
from server.jobs.records import Checkpoint, FineTunedModel, FineTuningJob, JobEvent
from server.jobs.results import result_csv
from server.jobs.trainer import Trainer, training

log = logging.getLogger(__name__)

POLL = 2.0  # seconds between looks for a job, where nobody says that there is one
LEASE = 30.0  # seconds for which a job is ours without our saying so again
RENEWAL = 5.0
TURN = 0.2  # seconds between looks whether there are requests


class Runner:
    def __init__(
        self,
        jobs: JobStore,
        files: FileStore,
        library: Library,
        machine: Machine,
        directory: Path,
        busy: Callable[[], bool],
    ) -> None:
        """directory: of the data. busy: whether there are requests, beside which a trainer gets half of its time."""
        self._jobs = jobs
        self._files = files
        self._library = library
        self._machine = machine
        self._directory = directory
        self._busy = busy
        self._name = secrets.token_hex(8)
        self._due = asyncio.Event()  # something has changed

    def nudge(self) -> None:
        """A job has come, or is to stop."""
        self._due.set()

    async def check(self, job: FineTuningJob) -> None:
        """Raises InvalidRequest, NotFound or ModelNotFound where no trainer could take it."""
        await self._trainer_job(job)

    async def run(self) -> None:
        """Until it is cancelled; then the trainer has saved its state."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_house())
            group.create_task(self._train_all())

    async def _keep_house(self) -> None:
        while True:
            try:
                await self._library.refresh()
                await self._files.delete_expired()
                await self._sweep()
            except StorageError:
                pass
            except Exception:
                log.exception("keeping house failed")
            await asyncio.sleep(RENEWAL)

    async def _sweep(self) -> None:
        """Nothing is kept of a job that has ended without a result, but what its trainer complained of."""
        paths = {path.parent.name: path for path in (self._directory / "jobs").glob("*/out")}
        for id_ in await self._jobs.without_result(paths) if paths else ():
            await asyncio.to_thread(shutil.rmtree, paths[id_], ignore_errors=True)

    async def _train_all(self) -> None:
        while True:
            self._due.clear()
            try:
                job = await self._jobs.claim(self._name, LEASE)
                if job is None:
                    await self._wait(POLL)
                else:
                    await self._train_leased(job)
            except StorageError:  # the next time, or another server, may have more luck
                await asyncio.sleep(POLL)
            except Exception:
                log.exception("the jobs cannot be looked after")
                await asyncio.sleep(POLL)

    async def _train_leased(self, job: FineTuningJob) -> None:
        """Raises StorageError."""
        try:
            await self._train(job)
        except StorageError:
            raise
        except Exception:
            log.exception("a fine-tuning job failed", extra={"job": job.id})
            await self._fail(job, {"code": "server_error", "message": "The server failed to run the job."})
        finally:
            await self._jobs.release(job.id, self._name)

    async def _wait(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._due.wait()

    # === One job ===

    async def _train(self, job: FineTuningJob) -> None:
        """Again and again, while the trainer dies over it. Raises StorageError."""
        try:
            wanted = await self._trainer_job(job)
        except (ServerError, ModelError) as error:
            if isinstance(error, StorageError):
                raise
            message = error.message if isinstance(error, ServerError) else str(error)
            await self._fail(job, {"code": getattr(error, "code", None) or "invalid_job", "message": message})
            return
        progress = Progress(job)
        while not progress.over:
            before = progress.furthest
            try:
                async with training(wanted, self._home(job)) as trainer:
                    mine = await self._follow(trainer, job, progress)
                    status = await trainer.ended()
            except OSError as error:
                log.error("a trainer cannot be started", extra={"job": job.id, "reason": error.strerror})
                progress.failure = {"reason": "disk", "message": f"the trainer cannot be started: {error.strerror}"}
                break
            if not mine:
                await self._sweep()
                return
            if not progress.over:
                log.warning("a trainer died", extra={"job": job.id, "status": status})
                progress.count_crash(before)
        if progress.result is not None:
            await self._succeed(job, progress)
        else:
            assert progress.failure is not None
            await self._fail(job, failure_of(progress.failure, job), progress.failure.get("problems"))

    async def _trainer_job(self, job: FineTuningJob) -> Job:
        """Raises InvalidRequest, NotFound or ModelNotFound."""
        train = await self._files.find(job.training_file, job.owner)
        valid = None if job.validation_file is None else await self._files.find(job.validation_file, job.owner)
        return await asyncio.to_thread(
            trainer_job, job, self._library, self._machine,
            train=self._files.path(train), valid=None if valid is None else self._files.path(valid),
            out=self._home(job) / "out",
        )  # fmt: skip

    async def _follow(self, trainer: Trainer, job: FineTuningJob, progress: Progress) -> bool:
        """To the trainer's end. False: the job was cancelled, paused, or taken by another server."""
        watching = asyncio.create_task(self._watch(trainer, job))
        giving_way = asyncio.create_task(self._give_way(trainer))
        mine = True
        try:
            async for said in trainer.events():
                if not await self._note(job, progress, said):
                    mine = False
                    trainer.stop()
            return mine and (not watching.done() or await watching)
        finally:
            watching.cancel()
            giving_way.cancel()

    async def _give_way(self, trainer: Trainer) -> None:
        """At the lowest priority it still takes of caches and memory what requests could use."""
        while True:
            if self._busy():
                trainer.give_way()
            await asyncio.sleep(TURN)

    async def _watch(self, trainer: Trainer, job: FineTuningJob) -> bool:
        """Renews the lease. Returns False, and the trainer is told to stop, once the job is no longer ours."""
        while True:
            self._due.clear()
            try:
                if not await self._jobs.renew(job.id, self._name, LEASE):
                    trainer.stop()
                    return False
            except StorageError:
                log.warning("the lease of a job cannot be renewed", extra={"job": job.id})
            await self._wait(RENEWAL)

    async def _note(self, job: FineTuningJob, progress: Progress, said: dict[str, Any]) -> bool:
        """Whether the job is still ours."""
        if said["event"] == "checkpoint":
            name = checkpoint_name(job, self._library.base_name, said["step"])
            metrics = {"step": said["step"], "train_loss": said["loss"], "full_valid_loss": said["valid_loss"]}
            checkpoint = Checkpoint(
                id=new_id("ftckpt_"), created_at=int(time.time()), step_number=said["step"], name=name, metrics=metrics
            )
            return await self._jobs.add_checkpoint(job.id, self._name, checkpoint, CHECKPOINTS)
        events, changes = progress.take(said)
        return not (events or changes) or await self._jobs.note(job.id, self._name, events, **changes)

    async def _succeed(self, job: FineTuningJob, progress: Progress) -> None:
        """Served first, said afterwards: who reads that it has succeeded can use it."""
        out = self._home(job) / "out"
        models = [self._model(job, model_name(job, self._library.base_name), out / "model")]
        page = await self._jobs.checkpoints(job.id, job.owner, after=None, limit=CHECKPOINTS)
        models += [
            self._model(job, each.name, out / "checkpoints" / f"step-{each.step_number}") for each in page.items[::-1]
        ]
        try:
            await self._library.introduce(models)
            await self._finish(job, progress, models, await self._keep_log(job, out / "log.csv"))
        except ModelError as error:
            await self._fail(job, {"code": "server_error", "message": f"The result cannot be served: {error}."})
        finally:
            await self._library.settle(models)

    async def _finish(
        self, job: FineTuningJob, progress: Progress, models: list[FineTunedModel], results: list[str]
    ) -> None:
        assert progress.result is not None
        said = [
            JobEvent(message=f"New fine-tuned model created: {models[0].id}"),
            JobEvent(message="The job has successfully completed"),
        ]
        ours = await self._jobs.succeed(
            job.id, self._name, models, said, fine_tuned_model=models[0].id, estimated_finish=None,
            trained_tokens=progress.result["tokens"], result_files=results,
        )  # fmt: skip
        if ours:
            log.info("a fine-tuning job has succeeded", extra={"job": job.id, "model": models[0].id})

    def _model(self, job: FineTuningJob, name: str, directory: Path) -> FineTunedModel:
        below = str(directory.relative_to(self._directory))
        return FineTunedModel(id=name, owner=job.owner, job_id=job.id, created_at=int(time.time()), directory=below)

    async def _keep_log(self, job: FineTuningJob, path: Path) -> list[str]:
        async with self._files.draft() as draft:
            await draft.write(await asyncio.to_thread(result_csv, path))
            kept = await draft.keep(filename="step_metrics.csv", purpose="fine-tune-results", owner=job.owner)
        return [kept.id]

    async def _fail(
        self, job: FineTuningJob, error: dict[str, Any], problems: list[dict[str, Any]] | None = None
    ) -> None:
        log.warning("a fine-tuning job has failed", extra={"job": job.id, "code": error["code"]})
        said = [
            JobEvent(level="error", message=error["message"], data=None if not problems else {"problems": problems})
        ]
        await self._jobs.fail(job.id, self._name, said, {"param": None, **error})
        await self._sweep()

    def _home(self, job: FineTuningJob) -> Path:
        return self._directory / "jobs" / job.id
