"""The data directory: one server's alone, swept of what nobody knows, refused where it is of a newer server."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest
from asking import error_of, make_api

from server.errors import SettingsError
from server.jobs.jobs import JobStore
from server.jobs.records import Checkpoint, FineTuningJob, JobEvent, Status
from server.jobs.store import Store, open_store
from server.jobs.tables import SCHEMA_VERSION


def test_the_database_is_in_wal_mode_and_knows_its_version(store: Store) -> None:
    with sqlite3.connect(store.directory / "jobs.sqlite") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("SELECT version FROM schema_version").fetchall() == [(SCHEMA_VERSION,)]
    connection.close()


def test_it_is_one_servers_alone(store: Store) -> None:
    with pytest.raises(SettingsError, match="another server"):
        open_store(store.directory, None, 1024)


def test_it_is_there_again(tmp_path: Path) -> None:
    first = open_store(tmp_path, None, 1024)
    made = make_api(store=first).client.post("/v1/files", data={"purpose": "batch"}, files={"file": b"1"}).json()
    first.close()
    (tmp_path / "files" / "orphan").write_bytes(b"1")
    (tmp_path / "files" / ".file-partial").write_bytes(b"1")
    second = open_store(tmp_path, None, 1024)
    assert make_api(store=second).client.get(f"/v1/files/{made['id']}/content").content == b"1"
    assert [path.name for path in (tmp_path / "files").iterdir()] == [made["id"]]
    second.close()


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 0])
def test_the_database_of_another_version_is_refused(tmp_path: Path, version: int) -> None:
    open_store(tmp_path, None, 1024).close()
    with sqlite3.connect(tmp_path / "jobs.sqlite") as connection:
        connection.execute("UPDATE schema_version SET version = ?", (version,))
    connection.close()
    with pytest.raises(SettingsError, match=f"schema {version}, of a"):
        open_store(tmp_path, None, 1024)


def test_what_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="data directory"):
        open_store(tmp_path / "file" / "below", None, 1024)
    (tmp_path / "jobs.sqlite").write_text("this is no database, and long enough to be told from one" * 99)
    with pytest.raises(SettingsError, match="not a database"):
        open_store(tmp_path, None, 1024)
    for url in ("nonsense", "sqlite:///x", "postgresql+pg8000://localhost/x", "mysql://a/b"):
        with pytest.raises(SettingsError, match="database_url is no"):
            open_store(tmp_path / "other", url, 1024)
    with pytest.raises(SettingsError, match="database cannot be used") as said:
        open_store(tmp_path / "other", "postgresql+psycopg://me:secret@127.0.0.1:1/x", 1024)
    assert "secret" not in str(said.value)


def test_a_database_that_fails_is_a_503(store: Store) -> None:
    api = make_api(store=store)
    with sqlite3.connect(store.directory / "jobs.sqlite") as connection:
        connection.execute("ALTER TABLE files RENAME TO elsewhere")
    connection.close()
    response = api.client.get("/v1/files")
    assert error_of(response, 503)["code"] == "storage_error"
    assert "retry-after" in response.headers


def test_what_is_said_of_a_job_is_refused_from_a_server_whose_lease_is_over(store: Store) -> None:
    """A trainer may say something when another server has its job already."""
    jobs = JobStore(store.database)
    job = FineTuningJob(
        id="ftjob-1", owner="", created_at=1, status=Status.QUEUED, model="m", training_file="f", validation_file=None,
        suffix="", seed=1, method={}, hyperparameters={}, details=None,
    )  # fmt: skip
    checkpoint = Checkpoint(id="ftckpt_1", created_at=1, step_number=5, name="m:ckpt-step-5", metrics={})

    async def main() -> None:
        await jobs.create(job)
        assert await jobs.claim("here", lease=-1.0) is not None
        assert await jobs.claim("there", lease=60.0) is not None
        assert not await jobs.add_checkpoint(job.id, "here", checkpoint, 3)
        assert not await jobs.note(job.id, "here", [JobEvent(message="late")])
        assert not await jobs.fail(job.id, "here", [], {})
        assert not await jobs.succeed(job.id, "here", [], [])
        assert not await jobs.renew(job.id, "here", 60.0)
        assert (await jobs.checkpoints(job.id, "", after=None, limit=9)).items == []
        assert await jobs.add_checkpoint(job.id, "there", checkpoint, 3)
        assert len((await jobs.checkpoints(job.id, "", after=None, limit=9)).items) == 1

    asyncio.run(main())
