"""Two servers with one PostgreSQL: a batch is run by one of them, and by the other once that one is dead."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from asking import make_api
from batching import content, create, line, make_runner, retrieve, until, until_ended
from postgres import postgres
from scripted import ScriptedEngine

from server.jobs.store import Store, open_store

LINES = 30


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with postgres() as url:
        yield url


@pytest.fixture
def stores(url: str, tmp_path: Path) -> Iterator[list[Store]]:
    stores = [open_store(tmp_path, url, 1 << 20) for _ in range(2)]
    yield stores
    for store in stores:
        store.close()


def test_each_batch_is_run_by_one_server(stores: list[Store]) -> None:
    engines = [ScriptedEngine(), ScriptedEngine()]
    apis = [make_api(engine, store=store) for engine, store in zip(engines, stores, strict=True)]
    ids = [create(apis[n % 2], [line(f"{n}-{i}") for i in range(LINES)]) for n in range(6)]

    async def main() -> None:
        runners = [make_runner(store, engine) for store, engine in zip(stores, engines, strict=True)]
        for runner in runners:
            runner.start()
        for id_ in ids:
            await until_ended(stores[0], id_)
        for runner in runners:
            await runner.stop()

    asyncio.run(main())
    assert sum(len(engine.requests) for engine in engines) == 6 * LINES
    for n, id_ in enumerate(ids):
        done = retrieve(apis[1 - n % 2], id_)
        assert (done["status"], done["request_counts"]["completed"]) == ("completed", LINES)
        said = content(apis[n % 2], done["output_file_id"])
        assert [each["custom_id"] for each in said] == [f"{n}-{i}" for i in range(LINES)]


def test_another_takes_over_from_one_that_died(stores: list[Store], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("LEASE", 2.0), ("IDLE", 0.1), ("LOOK", 0.2)):
        for module in ("batches", "batch_runner"):
            monkeypatch.setattr(f"server.jobs.{module}.{name}", seconds, raising=False)
    dying, heir = ScriptedEngine(), ScriptedEngine()
    apis = [make_api(engine, store=store) for engine, store in zip((dying, heir), stores, strict=True)]
    id_ = create(apis[0], [line(str(i)) for i in range(LINES)])

    async def nothing(*_: object) -> None:
        """What a dead server does."""

    async def main() -> None:
        one = make_runner(stores[0], dying, lines_at_once=2, crowded=lambda: len(dying.closed) >= 10)
        one.start()
        await until(lambda: len(dying.closed) >= 10)
        for name in ("release", "release_ours"):
            monkeypatch.setattr(stores[0].batches, name, nothing)
        await one.stop()
        other = make_runner(stores[1], heir)
        other.start()
        await until_ended(stores[1], id_)
        await other.stop()

    asyncio.run(main())
    done = retrieve(apis[1], id_)
    assert done["request_counts"] == {"total": LINES, "completed": LINES, "failed": 0}
    assert [each["custom_id"] for each in content(apis[0], done["output_file_id"])] == [str(i) for i in range(LINES)]
    assert 0 < len(heir.requests) <= LINES - 10 + 2  # what was recorded is not run again
