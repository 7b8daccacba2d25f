"""Batches as rows: what was asked for, how far it has come, what came of each line, and which server is at it.

A line's outcome is one transaction with the count it adds to, and both are refused to a server whose lease is over: so
each line has one outcome, whoever died or was late. Knows nothing of how lines are answered.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, delete, func, insert, or_, select, update

from server.errors import InvalidRequest, NotFound, RateLimited, ServerError
from server.jobs.database import Database, Page, new_id, read_page
from server.jobs.tables import batch_lines, batches

WINDOW = "24h"
WINDOW_SECONDS = 24 * 3600
LEASE = 30.0  # seconds; renewed much more often
OPEN_MAX = 64  # batches of a key that have not ended
PAGE = 64  # lines that are read from the database at once


class Status(StrEnum):
    VALIDATING = "validating"
    FAILED = "failed"  # the input is wrong; nothing was run
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


OPEN = (Status.VALIDATING, Status.IN_PROGRESS, Status.FINALIZING, Status.CANCELLING)
CANCELLABLE = (Status.VALIDATING, Status.IN_PROGRESS)


class LeaseLostError(ServerError):
    """Another server has the batch now, or it is gone."""

    def __init__(self) -> None:
        super().__init__("Another server works on this batch.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Times are unix seconds. With `total` lines known, total = completed + failed + those without an outcome."""

    id: str
    owner: str  # name of a key
    endpoint: str
    status: Status
    input_file_id: str
    output_file_id: str | None = None
    error_file_id: str | None = None
    completion_window: str = WINDOW
    output_expires_after: int | None = None  # seconds
    details: dict[str, str] | None = None  # its metadata
    model: str | None = None
    errors: list[dict[str, Any]] | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a line."""

    number: int
    succeeded: bool
    output: str  # JSON, of one line
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0


class BatchStore:
    def __init__(self, database: Database, server: str | None = None) -> None:
        """server: a name of this one, that no other has."""
        self._database = database
        self._server = new_id("server-") if server is None else server
        self.changed: Callable[[], None] = _nothing  # told when there is something to do, or to stop

    # === What clients ask ===

    async def create(
        self, owner: str, endpoint: str, input_file_id: str, details: dict[str, str] | None, expires_after: int | None
    ) -> Batch:
        """Raises RateLimited."""
        now = int(time.time())
        batch = Batch(
            id=new_id("batch_"),
            owner=owner,
            endpoint=endpoint,
            status=Status.VALIDATING,
            input_file_id=input_file_id,
            output_expires_after=expires_after,
            details=details,
            created_at=now,
            expires_at=now + WINDOW_SECONDS,
        )

        def add(connection: Connection) -> None:
            open_ = select(func.count()).where(batches.c.owner == owner, batches.c.status.in_(OPEN))
            if (connection.scalar(open_) or 0) >= OPEN_MAX:
                raise RateLimited(f"There are {OPEN_MAX} batches already that have not ended.")
            connection.execute(insert(batches).values(**asdict(batch)))

        await self._database.run(add)
        self.changed()
        return batch

    async def find(self, id_: str, owner: str) -> Batch:
        """Raises NotFound."""
        return await self._database.run(lambda connection: _find(connection, id_, owner))

    async def page(self, owner: str, *, after: str | None, limit: int) -> Page[Batch]:
        """The newest first. Raises InvalidRequest where there is no batch `after`."""

        def read(connection: Connection) -> Page[Batch]:
            page = read_page(connection, batches, [batches.c.owner == owner], after=after, limit=limit)
            return Page([_batch(row) for row in page.items], page.has_more)

        return await self._database.run(read)

    async def cancel(self, id_: str, owner: str) -> Batch:
        """As it is now; whoever runs it ends it soon. Raises NotFound, or InvalidRequest where it is late."""

        def ask(connection: Connection) -> Batch:
            batch = _find(connection, id_, owner)
            asked = update(batches).where(batches.c.id == batch.id, batches.c.status.in_(CANCELLABLE))
            connection.execute(asked.values(status=Status.CANCELLING, cancelling_at=int(time.time())))
            now = _find(connection, id_, owner)
            if now.status is not Status.CANCELLING:
                raise InvalidRequest(f"Cannot cancel a batch with status '{now.status}'.")
            return now

        batch = await self._database.run(ask)
        self.changed()
        return batch

    # === What whoever runs them asks ===

    def release_all(self) -> None:
        """At the start of a server that has the database alone: who held a lease is dead."""
        self._database.run_now(lambda connection: connection.execute(update(batches).values(lease_until=None)))

    async def release_ours(self) -> None:
        """When nothing of ours runs any more. A claim may have come true after whoever made it was cancelled."""
        ours = update(batches).where(batches.c.runner == self._server).values(lease_until=None)
        await self._database.run(lambda connection: connection.execute(ours))

    async def claim(self) -> Batch | None:
        """The oldest batch that has work left and that nobody runs: ours from now on."""

        def take(connection: Connection) -> Batch | None:
            free = or_(batches.c.lease_until.is_(None), batches.c.lease_until < time.time())
            due = [batches.c.status.in_(OPEN), free]
            id_ = connection.scalar(select(batches.c.id).where(*due).order_by(batches.c.place).limit(1))
            if id_ is None:
                return None
            taken = update(batches).where(batches.c.id == id_, *due)  # another server may have been faster
            if not connection.execute(taken.values(runner=self._server, lease_until=time.time() + LEASE)).rowcount:
                return None
            return _batch(connection.execute(select(batches).where(batches.c.id == id_)).one())

        return await self._database.run(take)

    async def renew(self, batch: Batch) -> Batch:
        """As it is now. Raises LeaseLostError."""

        def extend(connection: Connection) -> Batch:
            self._change(connection, batch, lease_until=time.time() + LEASE)
            return _batch(connection.execute(select(batches).where(batches.c.id == batch.id)).one())

        return await self._database.run(extend)

    async def release(self, batch: Batch) -> None:
        ours = update(batches).where(*self._ours(batch))
        await self._database.run(lambda connection: connection.execute(ours.values(lease_until=None)))

    async def advance(self, batch: Batch, status: Status, **values: Any) -> Batch:
        """To another status, unless a client has cancelled it meanwhile; that is seen in what returns.

        Of a batch that has ended, only its files are kept. Raises LeaseLostError.
        """

        def change(connection: Connection) -> Batch:
            now = int(time.time())
            still = [*self._ours(batch), batches.c.status == batch.status]
            times = {f"{status}_at": now}
            connection.execute(update(batches).where(*still).values(status=status, **times, **values))
            row = connection.execute(select(batches).where(*self._ours(batch))).first()
            if row is None:
                raise LeaseLostError
            if row.status not in OPEN:
                connection.execute(delete(batch_lines).where(batch_lines.c.batch_id == batch.id))
            return _batch(row)

        return await self._database.run(change)

    async def record(self, batch: Batch, outcomes: Sequence[Outcome]) -> None:
        """Lines that have no outcome yet. Raises LeaseLostError, and then nothing is recorded."""

        def add(connection: Connection) -> None:
            succeeded = sum(outcome.succeeded for outcome in outcomes)
            self._change(
                connection,
                batch,
                completed=batches.c.completed + succeeded,
                failed=batches.c.failed + len(outcomes) - succeeded,
                input_tokens=batches.c.input_tokens + sum(outcome.input_tokens for outcome in outcomes),
                cached_tokens=batches.c.cached_tokens + sum(outcome.cached_tokens for outcome in outcomes),
                output_tokens=batches.c.output_tokens + sum(outcome.output_tokens for outcome in outcomes),
            )
            rows = [
                {"batch_id": batch.id, "number": each.number, "succeeded": each.succeeded, "output": each.output}
                for each in outcomes
            ]
            connection.execute(insert(batch_lines), rows)

        await self._database.run(add)

    async def done(self, batch: Batch) -> set[int]:
        """Numbers of the lines that have an outcome."""
        query = select(batch_lines.c.number).where(batch_lines.c.batch_id == batch.id)
        return await self._database.run(lambda connection: set(connection.scalars(query)))

    async def outputs(self, batch: Batch, *, succeeded: bool, after: int) -> list[tuple[int, str]]:
        """A page of lines, by number, with what came of them."""
        of_kind = [batch_lines.c.batch_id == batch.id, batch_lines.c.succeeded == succeeded]
        query = select(batch_lines.c.number, batch_lines.c.output).where(*of_kind, batch_lines.c.number > after)
        query = query.order_by(batch_lines.c.number).limit(PAGE)
        return await self._database.run(lambda connection: [(row[0], row[1]) for row in connection.execute(query)])

    def point(self, batch: Batch, column: str, connection: Connection, file_id: str) -> None:
        """To a file, in the transaction that makes it. Raises LeaseLostError."""
        self._change(connection, batch, **{column: file_id})

    def _change(self, connection: Connection, batch: Batch, **values: Any) -> None:
        if not connection.execute(update(batches).where(*self._ours(batch)).values(**values)).rowcount:
            raise LeaseLostError

    def _ours(self, batch: Batch) -> list[ColumnElement[bool]]:
        return [batches.c.id == batch.id, batches.c.runner == self._server, batches.c.lease_until.is_not(None)]


def _find(connection: Connection, id_: str, owner: str) -> Batch:
    row = connection.execute(select(batches).where(batches.c.id == id_, batches.c.owner == owner)).first()
    if row is None:
        shown = "".join(c if c.isascii() and c.isprintable() else "?" for c in id_[:64])
        raise NotFound(f"No batch found with id '{shown}'.", param="batch_id")
    return _batch(row)


def _batch(row: Row[Any]) -> Batch:
    batch = Batch(**{name: getattr(row, name) for name in Batch.__slots__})
    return replace(batch, status=Status(row.status))


def _nothing() -> None:
    pass
