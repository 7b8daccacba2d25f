"""Files that clients upload, and those that are made for them: a row in the database, the bytes beside it on disk.

A path is made of an id of ours, never of what a client sent.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sqlalchemy import ColumnElement, Connection, delete, insert, or_, select

from server.errors import BodyTooLarge, NotFound, ServerError, StorageError
from server.jobs.database import Database, Page, new_id, read_page
from server.jobs.tables import files

log = logging.getLogger(__name__)

BUFFER = 1 << 20  # bytes that are written at once
NAME_LENGTH = 255  # characters


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    id: str
    owner: str  # name of a key
    created_at: int  # unix seconds
    expires_at: int | None
    bytes: int
    filename: str  # what the client called it, made safe to show
    purpose: str


class FileStore:
    def __init__(self, database: Database, directory: Path, max_bytes: int) -> None:
        self._database = database
        self._directory = directory
        self._max_bytes = max_bytes
        directory.mkdir(parents=True, exist_ok=True)

    @property
    def max_bytes(self) -> int:
        return self._max_bytes

    def draft(self, *, bounded: bool = True) -> Draft:
        """bounded: as what a client sends is."""
        return Draft(self._database, self._directory, self._max_bytes if bounded else None)

    def path(self, file: StoredFile) -> Path:
        return self._directory / file.id

    async def find(self, id_: str, owner: str) -> StoredFile:
        """Raises NotFound."""
        return await self._database.run(lambda connection: find_file(connection, id_, owner))

    async def list(
        self, owner: str, *, purpose: str | None, after: str | None, limit: int, newest_first: bool
    ) -> Page[StoredFile]:
        """Raises InvalidRequest where there is no file `after`."""
        where = _visible(owner)
        if purpose is not None:
            where.append(files.c.purpose == purpose)

        def read(connection: Connection) -> Page[StoredFile]:
            page = read_page(connection, files, where, after=after, limit=limit, newest_first=newest_first)
            return Page([_stored(row) for row in page.items], page.has_more)

        return await self._database.run(read)

    async def delete(self, id_: str, owner: str) -> None:
        """Raises NotFound."""

        def remove(connection: Connection) -> StoredFile:
            found = find_file(connection, id_, owner)
            connection.execute(delete(files).where(files.c.id == found.id))
            return found

        await self._unlink(await self._database.run(remove))

    async def delete_expired(self) -> None:
        def remove(connection: Connection) -> list[StoredFile]:
            due = [_stored(row) for row in connection.execute(select(files).where(files.c.expires_at <= time.time()))]
            connection.execute(delete(files).where(files.c.id.in_([each.id for each in due])))
            return due

        for file in await self._database.run(remove):
            await self._unlink(file)

    def sweep(self) -> None:
        """Bytes that no row is about, left by a server that died. Nobody else may use the directory meanwhile."""

        def known(connection: Connection) -> set[str]:
            return set(connection.scalars(select(files.c.id)))

        ids = self._database.run_now(known)
        for path in self._directory.iterdir():
            if path.name not in ids:
                path.unlink(missing_ok=True)

    async def _unlink(self, file: StoredFile) -> None:
        await asyncio.to_thread(self.path(file).unlink, missing_ok=True)


class Draft:
    """A file that is being written; without `keep` it leaves nothing behind."""

    def __init__(self, database: Database, directory: Path, max_bytes: int | None) -> None:
        self._database = database
        self._id = new_id("file-")
        self._path = directory / self._id
        self._partial = directory / f".{self._id}"
        self._max_bytes = max_bytes
        self._file: Any = None
        self._buffer = bytearray()
        self.bytes = 0

    async def __aenter__(self) -> Self:
        try:
            self._file = self._partial.open("xb")
        except OSError as error:
            raise _unwritable(error) from None
        return self

    async def write(self, data: bytes) -> None:
        """Raises BodyTooLarge, or StorageError where the disk is full."""
        self.bytes += len(data)
        if self._max_bytes is not None and self.bytes > self._max_bytes:
            raise BodyTooLarge(
                f"The file is too large: this server takes {self._max_bytes} bytes.", code="file_too_large"
            )
        self._buffer += data
        if len(self._buffer) >= BUFFER:
            await self._flush()

    async def keep(
        self,
        *,
        filename: str,
        purpose: str,
        owner: str,
        expires_after: int | None = None,
        also: Callable[[Connection, str], object] | None = None,
    ) -> StoredFile:
        """expires_after: seconds. also: told the file's id in the same transaction. Raises StorageError, and what
        `also` raises of ServerError; then there is no such file."""
        await self._flush()
        try:
            await self._do(self._sync)
        except BaseException:
            self._path.unlink(missing_ok=True)
            raise
        now = int(time.time())
        file = StoredFile(
            id=self._id,
            owner=owner,
            created_at=now,
            expires_at=None if expires_after is None else now + expires_after,
            bytes=self.bytes,
            filename=safe_name(filename),
            purpose=purpose,
        )

        def add(connection: Connection) -> None:
            connection.execute(insert(files).values(**asdict(file)))
            if also is not None:
                also(connection, file.id)

        try:
            await self._database.run(add)
        except ServerError:
            self._path.unlink(missing_ok=True)
            raise
        return file

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        try:
            with suppress(OSError):  # it writes what is left to write, which failed before or is not wanted any more
                self._file.close()
        finally:
            self._partial.unlink(missing_ok=True)

    async def _flush(self) -> None:
        data, self._buffer = bytes(self._buffer), bytearray()
        await self._do(partial(self._file.write, data))

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._partial.rename(self._path)

    async def _do(self, work: Any) -> Any:
        """In a thread, which is at its end in any case when this returns or raises."""
        working = asyncio.ensure_future(asyncio.to_thread(work))
        try:
            return await asyncio.shield(working)
        except OSError as error:
            raise _unwritable(error) from None
        finally:
            await asyncio.wait({working})


def _unwritable(error: OSError) -> StorageError:
    log.error("a file cannot be written", extra={"reason": error.strerror})
    return StorageError()


def find_file(connection: Connection, id_: str, owner: str) -> StoredFile:
    """Raises NotFound."""
    row = connection.execute(select(files).where(files.c.id == id_, *_visible(owner))).first()
    if row is None:
        raise NotFound(f"No such File object: {_shown(id_)}", param="id")
    return _stored(row)


def safe_name(name: str) -> str:
    """Of a path its last part; of characters those that can be shown."""
    last = name.replace("\\", "/").rpartition("/")[2]
    return "".join(c for c in last if c.isprintable())[:NAME_LENGTH] or "file"


def _visible(owner: str) -> list[ColumnElement[bool]]:
    return [files.c.owner == owner, or_(files.c.expires_at.is_(None), files.c.expires_at > time.time())]


def _stored(row: Any) -> StoredFile:
    return StoredFile(**{name: getattr(row, name) for name in StoredFile.__slots__})


def _shown(id_: str) -> str:
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in id_[:64])
