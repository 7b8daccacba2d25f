"""The database, and the one thread that speaks to it: SQLite in the data directory, or PostgreSQL for several servers.

Knows nothing of what the rows mean.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import string
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from sqlalchemy import URL, ColumnElement, Connection, Row, Table, create_engine, event, insert, make_url, select, text
from sqlalchemy import Engine as Connections
from sqlalchemy.exc import ArgumentError, DataError, SQLAlchemyError

from server.errors import InvalidRequest, SettingsError, StorageError
from server.jobs.tables import SCHEMA_VERSION, metadata, schema_version

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Item = TypeVar("Item")

LETTERS = string.ascii_letters + string.digits
ID_LENGTH = 24
POSTGRES = "postgresql+psycopg"
CREATING = 0x67707432  # PostgreSQL's advisory lock while tables are made; any number will do


@dataclass(frozen=True, slots=True)
class Page(Generic[Item]):
    items: list[Item]
    has_more: bool


def new_id(prefix: str) -> str:
    """Nobody can guess it, and it is safe in paths and URLs."""
    return prefix + "".join(secrets.choice(LETTERS) for _ in range(ID_LENGTH))


class Database:
    """Each piece of work is a transaction of its own, one after the other."""

    def __init__(self, connections: Connections) -> None:
        """Raises SettingsError where it cannot be used."""
        self._connections = connections
        self._closed = False  # a server that ends may still have streams to end
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="database")
        try:
            self._prepare()
        except SQLAlchemyError as error:
            self.close()
            raise SettingsError(f"the database cannot be used: {_reason(error)}") from None
        except SettingsError:
            self.close()
            raise

    @property
    def shared(self) -> bool:
        """With other servers."""
        return self._connections.dialect.name != "sqlite"

    async def run(self, work: Callable[[Connection], Result]) -> Result:
        """Raises StorageError, InvalidRequest where a value is none for the database, and what the work raises; then
        nothing has changed."""
        if self._closed:
            raise StorageError
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.run_now, work)

    def run_now(self, work: Callable[[Connection], Result]) -> Result:
        """The same in this thread: for a server that starts, and answers nobody yet."""
        try:
            with self._connections.begin() as connection:
                return work(connection)
        except DataError:  # PostgreSQL's texts hold no U+0000
            raise InvalidRequest("The request holds a text that cannot be stored.") from None
        except SQLAlchemyError as error:
            log.error("the database failed", extra={"reason": _reason(error)})
            raise StorageError from None

    def close(self) -> None:
        self._closed = True
        self._thread.shutdown()
        self._connections.dispose()

    def _prepare(self) -> None:
        with self._connections.begin() as connection:
            if self.shared:  # several servers may start at once
                connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": CREATING})
            metadata.create_all(connection)
            version = connection.scalar(select(schema_version.c.version))
            if version is None:
                connection.execute(insert(schema_version).values(version=SCHEMA_VERSION))
            elif version != SCHEMA_VERSION:
                age = "newer" if version > SCHEMA_VERSION else "older"
                raise SettingsError(f"the database has schema {version}, of a {age} server: this one has no use for it")


def open_database(directory: Path, url: str | None) -> Database:
    """url: None keeps it in the directory. Raises SettingsError."""
    if url is None:
        connections = create_engine(URL.create("sqlite", database=str(directory / "jobs.sqlite")))
        event.listen(connections, "connect", _tune_sqlite)
        return Database(connections)
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise SettingsError(f"database_url is no {POSTGRES}://… URL") from None
    if parsed.drivername not in (POSTGRES, "postgresql"):
        raise SettingsError(f"database_url is no {POSTGRES}://… URL")
    try:
        connections = create_engine(parsed.set(drivername=POSTGRES), pool_pre_ping=True, pool_size=1, max_overflow=0)
    except ImportError:
        raise SettingsError("a PostgreSQL database needs: pip install 'gpt2-server[postgres]'") from None
    return Database(connections)


def _tune_sqlite(connection: Any, record: Any) -> None:
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", "busy_timeout=5000"):
        connection.execute(f"PRAGMA {pragma}")


def _reason(error: SQLAlchemyError) -> str:
    """Without statements and their values, which are clients'; nor does it show a URL."""
    original = getattr(error, "orig", None)
    return type(error).__name__ if original is None else str(original).partition("\n")[0]


def read_page(
    connection: Connection,
    table: Table,
    where: Sequence[ColumnElement[bool]],
    *,
    after: str | None,
    limit: int,
    newest_first: bool = True,
) -> Page[Row[Any]]:
    """Rows after the one with the id `after`. Raises InvalidRequest where there is none such."""
    order = table.c.place.desc() if newest_first else table.c.place.asc()
    query = select(table).where(*where).order_by(order).limit(limit + 1)
    if after is not None:
        place = connection.scalar(select(table.c.place).where(table.c.id == after, *where))
        if place is None:
            raise InvalidRequest("No such object to list after.", "after", "invalid_value")
        query = query.where(table.c.place < place if newest_first else table.c.place > place)
    rows = list(connection.execute(query))
    return Page(rows[:limit], len(rows) > limit)
