"""Fine-tuning jobs as they are kept: their state, what happened to them, and what was made.

A job that a server trains is that server's by a lease: whoever lets it lapse has died, and another may go on.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from sqlalchemy import Column, ColumnElement, Connection, and_, delete, exists, func, insert, or_, select, update

from server.errors import InvalidRequest, NotFound, RateLimited
from server.jobs.database import Database, Page, new_id, read_page
from server.jobs.records import ACTIVE, Checkpoint, FineTunedModel, FineTuningJob, JobEvent, Status
from server.jobs.tables import fine_tuned_models, fine_tuning_checkpoints, fine_tuning_events, fine_tuning_jobs

OPEN_MAX = 64  # jobs of a key that have not ended


class JobStore:
    def __init__(self, database: Database) -> None:
        self._database = database

    # === What clients ask ===

    async def create(self, job: FineTuningJob) -> None:
        """Raises RateLimited."""

        def work(connection: Connection) -> None:
            table = fine_tuning_jobs
            unended = [status for status in Status if not status.ended]
            mine = and_(table.c.owner == job.owner, table.c.status.in_(unended))
            if (connection.scalar(select(func.count()).select_from(table).where(mine)) or 0) >= OPEN_MAX:
                raise RateLimited(f"There are {OPEN_MAX} fine-tuning jobs already that have not ended.")
            connection.execute(insert(table).values(**asdict(job)))
            _say(connection, job.id, [JobEvent(message=f"Created fine-tuning job: {job.id}")])

        await self._database.run(work)

    async def find(self, id_: str, owner: str) -> FineTuningJob:
        """Raises NotFound."""
        return await self._database.run(lambda connection: _find(connection, id_, owner))

    async def find_all(
        self, owner: str, *, after: str | None, limit: int, details: dict[str, str] | None = None
    ) -> Page[FineTuningJob]:
        """details: what a job's metadata must hold. Raises InvalidRequest."""
        where = [fine_tuning_jobs.c.owner == owner]
        shared = self._database.shared
        where += [_holds(fine_tuning_jobs.c.details, pair, shared) for pair in (details or {}).items()]

        def work(connection: Connection) -> Page[FineTuningJob]:
            page = read_page(connection, fine_tuning_jobs, where, after=after, limit=limit)
            return Page([_job(row) for row in page.items], page.has_more)

        return await self._database.run(work)

    async def turn(self, id_: str, owner: str, to: Status, said: str) -> FineTuningJob:
        """Cancel, pause or resume it. Raises NotFound, or InvalidRequest where its state allows no such thing."""
        allowed = {
            Status.CANCELLED: {Status.QUEUED, Status.PAUSED, *ACTIVE},
            Status.PAUSED: {Status.QUEUED, *ACTIVE},
            Status.QUEUED: {Status.PAUSED},
        }[to]

        def work(connection: Connection) -> FineTuningJob:
            job = _find(connection, id_, owner)
            if job.status not in allowed:
                raise InvalidRequest(f"Job {job.id} is {job.status}: it cannot become {to}.", code="invalid_job_status")
            ended = {"finished_at": int(time.time())} if to.ended else {}
            _change(connection, job.id, status=to, estimated_finish=None, **ended)
            _say(connection, job.id, [JobEvent(message=said)])
            return _find(connection, id_, owner)

        return await self._database.run(work)

    async def events(self, id_: str, owner: str, *, after: str | None, limit: int) -> Page[JobEvent]:
        """The latest first. Raises NotFound or InvalidRequest."""

        def work(connection: Connection) -> Page[JobEvent]:
            where = [fine_tuning_events.c.job_id == _find(connection, id_, owner).id]
            page = read_page(connection, fine_tuning_events, where, after=after, limit=limit)
            return Page([_event(row) for row in page.items], page.has_more)

        return await self._database.run(work)

    async def events_since(self, id_: str, place: int, limit: int) -> tuple[list[JobEvent], bool]:
        """In the order in which they happened, and whether there will be no more."""

        def work(connection: Connection) -> tuple[list[JobEvent], bool]:
            status = connection.scalar(select(fine_tuning_jobs.c.status).where(fine_tuning_jobs.c.id == id_))
            table = fine_tuning_events
            rows = select(table).where(table.c.job_id == id_, table.c.place > place).order_by(table.c.place)
            found = [_event(row) for row in connection.execute(rows.limit(limit))]
            return found, (status is None or Status(status).ended) and len(found) < limit

        return await self._database.run(work)

    async def checkpoints(self, id_: str, owner: str, *, after: str | None, limit: int) -> Page[Checkpoint]:
        """The latest first. Raises NotFound or InvalidRequest."""

        def work(connection: Connection) -> Page[Checkpoint]:
            where = [fine_tuning_checkpoints.c.job_id == _find(connection, id_, owner).id]
            page = read_page(connection, fine_tuning_checkpoints, where, after=after, limit=limit)
            return Page([_checkpoint(row) for row in page.items], page.has_more)

        return await self._database.run(work)

    # === What a server that trains says ===

    def release_all(self) -> None:
        """Nobody trains: for the one server of a database, when it starts."""
        self._database.run_now(lambda connection: connection.execute(update(fine_tuning_jobs).values(runner=None)))

    async def claim(self, runner: str, lease: float) -> FineTuningJob | None:
        """The oldest job that waits for a trainer, or has lost it. lease: seconds."""
        table = fine_tuning_jobs

        def work(connection: Connection) -> FineTuningJob | None:
            lost = and_(table.c.status.in_(ACTIVE), or_(table.c.runner.is_(None), table.c.lease_until < time.time()))
            waiting = select(table).where(or_(table.c.status == Status.QUEUED, lost)).order_by(table.c.place).limit(1)
            row = connection.execute(waiting.with_for_update(skip_locked=True)).first()
            if row is None:
                return None
            _change(connection, row.id, status=Status.VALIDATING, runner=runner, lease_until=time.time() + lease)
            said = f"Validating training file: {row.training_file}"
            if row.validation_file is not None:
                said += f" and validation file: {row.validation_file}"
            _say(connection, row.id, [JobEvent(message=said)])
            return _find(connection, row.id, row.owner)

        return await self._database.run(work)

    async def renew(self, id_: str, runner: str, lease: float) -> bool:
        """False: it is no longer to be trained here."""
        return await self.note(id_, runner, lease_until=time.time() + lease)

    async def note(self, id_: str, runner: str, events: Iterable[JobEvent] = (), **changes: Any) -> bool:
        """Changes that hold only while this server trains the job; whether it does."""
        table = fine_tuning_jobs

        def work(connection: Connection) -> bool:
            if not connection.execute(
                update(table).where(*_held(id_, runner)).values(**changes or {"runner": runner})
            ).rowcount:
                return False
            _say(connection, id_, events)
            return True

        return await self._database.run(work)

    async def release(self, id_: str, runner: str) -> None:
        """It goes on elsewhere, or after a restart."""
        table = fine_tuning_jobs
        mine = update(table).where(table.c.id == id_, table.c.runner == runner).values(runner=None)
        await self._database.run(lambda connection: connection.execute(mine))

    async def without_result(self, ids: Iterable[str]) -> list[str]:
        """Those that have failed or were cancelled, and those nobody knows."""
        asked = list(ids)
        table = fine_tuning_jobs
        live = table.c.status.not_in([Status.FAILED, Status.CANCELLED])

        def work(connection: Connection) -> set[str]:
            return set(connection.scalars(select(table.c.id).where(table.c.id.in_(asked), live)))

        useful = await self._database.run(work)
        return [id_ for id_ in asked if id_ not in useful]

    async def add_checkpoint(self, job_id: str, runner: str, checkpoint: Checkpoint, keep: int) -> bool:
        """The oldest go, once there are more than `keep`. False: the job was taken away meanwhile."""
        table = fine_tuning_checkpoints

        def work(connection: Connection) -> bool:
            held = update(fine_tuning_jobs).where(*_held(job_id, runner)).values(runner=runner)
            if not connection.execute(held).rowcount:
                return False
            mine = table.c.job_id == job_id
            connection.execute(delete(table).where(mine, table.c.step_number >= checkpoint.step_number))  # run again
            connection.execute(insert(table).values(job_id=job_id, **asdict(checkpoint)))
            places = list(connection.scalars(select(table.c.place).where(mine).order_by(table.c.place)))
            connection.execute(delete(table).where(table.c.place.in_(places[:-keep])))
            _say(connection, job_id, [JobEvent(message=f"Checkpoint created at step {checkpoint.step_number}")])
            return True

        return await self._database.run(work)

    async def succeed(
        self, id_: str, runner: str, models: list[FineTunedModel], events: Iterable[JobEvent], **changes: Any
    ) -> bool:
        """The job has ended and its models are there, or neither. False: the job was taken away meanwhile."""
        table = fine_tuning_jobs

        def work(connection: Connection) -> bool:
            now = int(time.time())
            held = _held(id_, runner)
            done = update(table).where(*held).values(status=Status.SUCCEEDED, finished_at=now, runner=None, **changes)
            if not connection.execute(done).rowcount:
                return False
            connection.execute(insert(fine_tuned_models), [asdict(model) for model in models])
            _say(connection, id_, events)
            return True

        return await self._database.run(work)

    async def fail(self, id_: str, runner: str, events: Iterable[JobEvent], error: dict[str, Any]) -> bool:
        """False: the job was taken away meanwhile."""
        changes = {"status": Status.FAILED, "finished_at": int(time.time()), "estimated_finish": None, "error": error}
        return await self.note(id_, runner, events, **changes)

    # === Models ===

    async def models(self) -> list[FineTunedModel]:
        return await self._database.run(_models)

    def models_now(self) -> list[FineTunedModel]:
        return self._database.run_now(_models)

    async def remove_model(self, id_: str, owner: str) -> FineTunedModel:
        """Raises NotFound."""

        def work(connection: Connection) -> FineTunedModel:
            mine = [fine_tuned_models.c.id == id_, fine_tuned_models.c.owner == owner]
            row = connection.execute(select(fine_tuned_models).where(*mine)).first()
            if row is None:
                raise NotFound("No such fine-tuned model of yours.", param="model", code="model_not_found")
            connection.execute(delete(fine_tuned_models).where(*mine))
            return _model(row)

        return await self._database.run(work)


def _holds(details: Column[Any], pair: tuple[str, str], shared: bool) -> ColumnElement[bool]:
    """Whether an object of texts has the pair. No path leads to it: a path cannot say every name."""
    each = func.json_each_text if shared else func.json_each
    pairs = each(details).table_valued("key", "value")
    return exists().where(pairs.c.key == pair[0], pairs.c.value == pair[1])


def _find(connection: Connection, id_: str, owner: str) -> FineTuningJob:
    """Raises NotFound."""
    mine = [fine_tuning_jobs.c.id == id_, fine_tuning_jobs.c.owner == owner]
    row = connection.execute(select(fine_tuning_jobs).where(*mine)).first()
    if row is None:
        shown = "".join(c if c.isascii() and c.isprintable() else "?" for c in id_[:64])
        raise NotFound(f"Could not find fine tune: {shown}", param="fine_tune_id", code="fine_tune_not_found")
    return _job(row)


def _held(id_: str, runner: str) -> list[ColumnElement[bool]]:
    """That the job is still this server's to train."""
    table = fine_tuning_jobs
    return [table.c.id == id_, table.c.runner == runner, table.c.status.in_(ACTIVE)]


def _change(connection: Connection, id_: str, **values: Any) -> None:
    connection.execute(update(fine_tuning_jobs).where(fine_tuning_jobs.c.id == id_).values(**values))


def _say(connection: Connection, job_id: str, events: Iterable[JobEvent]) -> None:
    now = int(time.time())
    rows = [
        {"id": new_id("ftevent-"), "job_id": job_id, "created_at": now, "level": event.level, "type": event.type,
         "message": event.message, "data": event.data}
        for event in events
    ]  # fmt: skip
    if rows:
        connection.execute(insert(fine_tuning_events), rows)


def _fields(kind: Any, row: Any) -> dict[str, Any]:
    return {name: getattr(row, name) for name in kind.__slots__}


def _job(row: Any) -> FineTuningJob:
    return FineTuningJob(**{**_fields(FineTuningJob, row), "status": Status(row.status)})


def _event(row: Any) -> JobEvent:
    return JobEvent(**_fields(JobEvent, row))


def _checkpoint(row: Any) -> Checkpoint:
    return Checkpoint(**_fields(Checkpoint, row))


def _model(row: Any) -> FineTunedModel:
    return FineTunedModel(**_fields(FineTunedModel, row))


def _models(connection: Connection) -> list[FineTunedModel]:
    return [_model(row) for row in connection.execute(select(fine_tuned_models).order_by(fine_tuned_models.c.place))]
