"""The data directory of a server: the database, and the files beside it."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

from server.errors import SettingsError
from server.jobs.batches import BatchStore
from server.jobs.database import Database, open_database
from server.jobs.files import FileStore


@dataclass(frozen=True, slots=True)
class Store:
    directory: Path
    database: Database
    files: FileStore
    batches: BatchStore
    lock: int | None  # a descriptor, while nobody else may use the directory

    def close(self) -> None:
        try:
            self.database.close()
        finally:
            if self.lock is not None:
                os.close(self.lock)


def open_store(directory: Path, url: str | None, max_file_bytes: int) -> Store:
    """url: of a database that servers share, and the directory with it; None: both are ours alone.

    Raises SettingsError.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = _lock(directory) if url is None else None
    except OSError as error:
        raise SettingsError(f"the data directory cannot be used: {error.strerror}") from None
    try:
        database = open_database(directory, url)
    except SettingsError:
        if lock is not None:
            os.close(lock)
        raise
    files = FileStore(database, directory / "files", max_file_bytes)
    batches = BatchStore(database)
    if lock is not None:
        files.sweep()
        batches.release_all()
    return Store(directory, database, files, batches, lock)


def _lock(directory: Path) -> int:
    """Held until the process ends. Raises SettingsError where another holds it."""
    descriptor = os.open(directory / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise SettingsError("another server uses the data directory; several need a --database-url together") from None
    return descriptor
