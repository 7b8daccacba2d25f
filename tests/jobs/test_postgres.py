"""Several servers with one data directory and one PostgreSQL: what one keeps or makes, all have."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from postgres import postgres
from test_fine_tuning import base
from tuned import Tuned, tuned, use_fake_trainer

from server.errors import SettingsError
from server.jobs import runner
from server.jobs.store import open_store
from server.jobs.tables import SCHEMA_VERSION

__all__ = ["base"]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with postgres() as url:
        yield url


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_trainer(monkeypatch)
    for name, seconds in (("POLL", 0.1), ("RENEWAL", 0.2), ("LEASE", 2.0)):
        monkeypatch.setattr(runner, name, seconds)


async def until(what: Callable[[], Awaitable[bool]]) -> None:
    deadline = time.monotonic() + 60
    while not await what():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


def test_what_one_server_makes_the_others_serve(url: str, base: Path, tmp_path: Path) -> None:
    async def story(one: Tuned, two: Tuned) -> None:
        file = await one.upload()
        assert (await two.client.get(f"/v1/files/{file}/content")).text == '{"text": "learn"}\n'
        jobs = [await (one, two)[n % 2].create(metadata={"n": str(n)}) for n in range(6)]
        done = [await one.ended(job["id"]) for job in jobs]
        assert [job["status"] for job in done] == ["succeeded"] * 6
        assert [two.lives(job["id"]) for job in jobs] == [1] * 6
        found = await two.client.get("/v1/fine_tuning/jobs", params={"metadata[n]": "4"})
        assert [job["id"] for job in found.json()["data"]] == [jobs[4]["id"]]
        quoted = await two.client.get("/v1/fine_tuning/jobs", params={'metadata[a"b]': "4"})
        assert quoted.json()["data"] == []
        for params in ({"metadata[a\0b]": "4"}, {"after": "a\0b"}):
            assert (await two.client.get("/v1/fine_tuning/jobs", params=params)).status_code == 400
        name = done[0]["fine_tuned_model"]
        for server in (one, two):

            async def all_there(server: Tuned = server) -> bool:
                return len(await server.models()) == 12

            await until(all_there)
        assert (await two.client.delete(f"/v1/models/{name}")).status_code == 200

        async def gone() -> bool:
            return name not in await one.models()

        await until(gone)
        assert (await two.client.delete(f"/v1/files/{file}")).status_code == 200
        assert (await one.client.get(f"/v1/files/{file}")).status_code == 404

    async def run() -> None:
        async with tuned(tmp_path, base, url=url) as one, tuned(tmp_path, base, url=url) as two:
            await story(one, two)

    asyncio.run(run())


def test_a_server_that_dies_leaves_its_job_to_another(url: str, base: Path, tmp_path: Path) -> None:
    async def run() -> None:
        async with tuned(tmp_path, base, url=url) as one:
            job = await one.create("wait")
            await one.until(job["id"], lambda job: job["status"] == "running")
            with psycopg.connect(url.replace("+psycopg", "")) as connection:
                connection.execute("UPDATE fine_tuning_jobs SET runner = 'one that has died', lease_until = 0")
            async with tuned(tmp_path, base, url=url) as two:
                await two.until(job["id"], lambda job: job["status"] == "running")
                two.go(job["id"])
                assert (await two.ended(job["id"]))["status"] == "succeeded"
            assert one.lives(job["id"]) == 2

    asyncio.run(run())


def test_a_newer_schema_is_refused(url: str, tmp_path: Path) -> None:
    open_store(tmp_path, url, 1024).close()
    with psycopg.connect(url.replace("+psycopg", "")) as connection:
        connection.execute("UPDATE schema_version SET version = %s", (SCHEMA_VERSION + 1,))
    try:
        with pytest.raises(SettingsError, match="a newer server"):
            open_store(tmp_path, url, 1024)
    finally:
        with psycopg.connect(url.replace("+psycopg", "")) as connection:
            connection.execute("UPDATE schema_version SET version = %s", (SCHEMA_VERSION,))
