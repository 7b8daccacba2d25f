"""Batches, on a scripted engine: what a file may hold, what comes of its lines, and how one ends before its end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from asking import Api, error_of, make_api
from batching import (
    ask,
    carry_out,
    content,
    create,
    jsonl,
    line,
    make_runner,
    retrieve,
    until,
    until_ended,
    upload,
)
from scripted import ScriptedEngine

from server.errors import EngineError, Overloaded
from server.jobs import batch_input
from server.jobs.batch_input import read_lines
from server.jobs.batches import Batch, BatchStore, LeaseLostError, Outcome, Status
from server.jobs.store import Store, open_store
from server.worker.messages import BACKGROUND


def test_a_batch_is_what_the_api_answers_line_by_line(api: Api, store: Store) -> None:
    bodies = [
        {"model": "gpt2", "prompt": "a", "max_tokens": 3, "logprobs": 2, "echo": True},
        {"prompt": ["b", "c"], "n": 2, "user": None},
        {"model": "text-davinci-002", "prompt": [1, 2, 3], "stop": "l"},
    ]
    lines = [
        {"custom_id": f"q-{i}", "method": "POST", "url": "/v1/completions", "body": b} for i, b in enumerate(bodies)
    ]
    id_ = create(api, lines, metadata={"for": "me"})
    fresh = retrieve(api, id_)
    assert (fresh["status"], fresh["request_counts"]) == ("validating", {"total": 0, "completed": 0, "failed": 0})
    assert fresh["expires_at"] == fresh["created_at"] + 86400
    done = carry_out(api, store, id_)
    assert (done["status"], done["error_file_id"], done["errors"]) == ("completed", None, None)
    assert (done["metadata"], done["endpoint"], done["model"]) == ({"for": "me"}, "/v1/completions", "gpt2")
    assert done["request_counts"] == {"total": 3, "completed": 3, "failed": 0}
    assert done["in_progress_at"] <= done["finalizing_at"] <= done["completed_at"]
    said = content(api, done["output_file_id"])
    assert [each["custom_id"] for each in said] == ["q-0", "q-1", "q-2"]
    total = 0
    for each, body in zip(said, bodies, strict=True):
        assert each.keys() == {"id", "custom_id", "response", "error"}
        assert each["id"].startswith("batch_req_")
        assert each["error"] is None
        response = each["response"]
        assert (response["status_code"], response["request_id"][:4]) == (200, "req_")
        live = api.complete(**body)
        total += live["usage"]["total_tokens"]
        for own in ("id", "created"):
            assert type(response["body"].pop(own)) is type(live.pop(own))
        assert response["body"] == live
    assert done["usage"]["total_tokens"] == total
    file = api.client.get(f"/v1/files/{done['output_file_id']}").json()
    assert (file["purpose"], file["filename"]) == ("batch_output", f"{id_}_output.jsonl")


def test_lines_go_behind_everybody_and_are_closed(api: Api, store: Store) -> None:
    create_id = create(api, [line("low", priority=5), line("high", priority=-(2**31))])
    carry_out(api, store, create_id)
    low, high = api.engine.requests
    assert low.priority > high.priority >= BACKGROUND > 2**31 - 1
    assert low.background
    assert sorted(api.engine.closed) == sorted(request.id for request in api.engine.requests)
    api.complete(prompt="a", priority=2**31 - 1)
    assert not api.engine.requests[-1].background


WRONG: list[tuple[Any, str, str | None]] = [
    (b"{", "invalid_json_line", None),
    (b"[1]", "invalid_json_line", None),
    (b'{"custom_id": "\\ud800", "method": "POST"}', "invalid_json_line", None),
    (b"\xff\xfe", "invalid_json_line", None),
    (line("ok"), "duplicate_custom_id", "custom_id"),
    ({**line("x"), "custom_id": None}, "missing_required_parameter", "custom_id"),
    ({**line("x"), "custom_id": 7}, "invalid_custom_id", "custom_id"),
    (line(""), "invalid_custom_id", "custom_id"),
    (line("i" * 300), "invalid_custom_id", "custom_id"),
    (line("m", method="GET"), "invalid_method", "method"),
    (line("u", url="/v1/chat/completions"), "invalid_url", "url"),
    ({**line("b"), "body": [1]}, "invalid_request", "body"),
    (line("w", model="nope"), "model_not_found", "body.model"),
    (line("s", stream=True), "unsupported_parameter", "body.stream"),
    (line("t", temperature=9), "decimal_above_max_value", "body.temperature"),
    (line("n", n=1000), "integer_above_max_value", "body.n"),
    (line("p", prompt=7), "invalid_request", "body.prompt"),
    (b'{"x": "' + b"y" * (1 << 20) + b'" }' + b" " * 2000, "line_too_long", None),
]


def test_every_bad_line_is_named_and_nothing_is_run(tmp_path: Any) -> None:
    store = open_large(tmp_path)
    try:
        api = make_api(store=store)
        lines = [line("ok"), b"", *(wrong for wrong, _, _ in WRONG), line("last")]
        done = carry_out(api, store, create(api, lines))
        assert (done["status"], done["output_file_id"], done["error_file_id"]) == ("failed", None, None)
        assert done["failed_at"] is not None
        assert done["errors"]["object"] == "list"
        said = [(each["line"], each["code"], each["param"]) for each in done["errors"]["data"]]
        assert said == [(number, code, param) for number, (_, code, param) in enumerate(WRONG, 3)]
        assert api.engine.requests == []
    finally:
        store.close()


def open_large(directory: Any) -> Store:
    return open_store(directory, None, 8 << 20)


def test_files_that_are_wrong_as_a_whole(api: Api, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def error(lines: list[Any] | bytes) -> list[tuple[str, int | None]]:
        done = carry_out(api, store, create(api, lines))
        assert done["status"] == "failed"
        return [(each["code"], each["line"]) for each in done["errors"]["data"]]

    assert error(b"\n \n") == [("empty_file", None)]
    monkeypatch.setattr("server.jobs.batch_runner.LINES_MAX", 2)
    assert error([line(str(i)) for i in range(3)]) == [("too_many_tasks", None)]
    monkeypatch.setattr(batch_input, "ERRORS_MAX", 1)
    assert error([b"x", b"y"]) == [("invalid_json_line", 1), ("too_many_errors", None)]
    gone = create(api, [line("a")])
    api.client.delete(f"/v1/files/{retrieve(api, gone)['input_file_id']}")
    assert carry_out(api, store, gone)["errors"]["data"][0]["code"] == "input_file_gone"
    assert api.engine.requests == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input_file_id": None}, "input_file_id"),
        ({"input_file_id": "file-none"}, "input_file_id"),
        ({"endpoint": "/v1/chat/completions"}, "endpoint"),
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, "output_expires_after"),
    ],
)
def test_what_is_asked_for_wrongly(api: Api, fields: dict[str, Any], param: str) -> None:
    file = upload(api, [line("a")])
    assert error_of(api.client.post("/v1/batches", json={**ask(file), **fields}), 400)["param"] == param
    assert api.client.get("/v1/batches").json()["data"] == []


def test_a_file_for_something_else(api: Api) -> None:
    file = upload(api, [line("a")], purpose="fine-tune")
    assert error_of(api.client.post("/v1/batches", json=ask(file)), 400)["param"] == "input_file_id"
    assert api.client.post("/v1/batches", json=ask(upload(api, [line("a")]), colour=1)).headers["x-ignored-fields"]


def test_lists_have_pages_and_ids_are_looked_for(api: Api) -> None:
    ids = [create(api, [line("a")]) for _ in range(3)]
    page = api.client.get("/v1/batches", params={"limit": 2}).json()
    assert ([each["id"] for each in page["data"]], page["has_more"]) == ([ids[2], ids[1]], True)
    rest = api.client.get("/v1/batches", params={"after": ids[1]}).json()
    assert ([each["id"] for each in rest["data"]], rest["has_more"]) == ([ids[0]], False)
    assert error_of(api.client.get("/v1/batches", params={"limit": "101"}), 400)["param"] == "limit"
    for method, path in (("GET", "/v1/batches/batch_x"), ("POST", "/v1/batches/batch_x/cancel")):
        error_of(api.client.request(method, path), 404)


def test_a_key_has_so_many_batches_at_a_time(api: Api, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.jobs.batches.OPEN_MAX", 1)
    file = upload(api, [line("a")])
    first = api.client.post("/v1/batches", json=ask(file)).json()["id"]
    assert "retry-after" in api.client.post("/v1/batches", json=ask(file)).headers
    carry_out(api, store, first)
    assert api.client.post("/v1/batches", json=ask(file)).status_code == 200


def test_keys_see_their_own(store: Store) -> None:
    api = make_api(store=store, keys={"ann": "key-of-ann", "bob": "key-of-bob"})
    ann, bob = ({"authorization": f"Bearer key-of-{name}"} for name in ("ann", "bob"))
    file = upload(api, [line("a")], headers=ann)
    assert error_of(api.client.post("/v1/batches", json=ask(file), headers=bob), 400)["param"] == "input_file_id"
    id_ = api.client.post("/v1/batches", json=ask(file), headers=ann).json()["id"]
    assert api.client.get("/v1/batches", headers=bob).json()["data"] == []
    assert api.client.get(f"/v1/batches/{id_}", headers=bob).status_code == 404
    assert api.client.post(f"/v1/batches/{id_}/cancel", headers=bob).status_code == 404

    async def main() -> None:
        runner = make_runner(store, api.engine)
        runner.start()
        await until_ended(store, id_, "ann")
        await runner.stop()

    asyncio.run(main())
    assert [request.key_name for request in api.engine.requests] == ["ann"]
    output = api.client.get(f"/v1/batches/{id_}", headers=ann).json()["output_file_id"]
    assert api.client.get(f"/v1/files/{output}/content", headers=ann).status_code == 200
    assert api.client.get(f"/v1/files/{output}/content", headers=bob).status_code == 404


def test_lines_that_fail_by_themselves(api: Api, store: Store) -> None:
    """What needs the tokenizer is known only when a line is run, and costs the others nothing."""
    long = line("long", prompt="a" * 60, max_tokens=60)
    done = carry_out(api, store, create(api, [line("one"), long, line("two")]))
    assert (done["status"], done["request_counts"]) == ("completed", {"total": 3, "completed": 2, "failed": 1})
    assert [each["custom_id"] for each in content(api, done["output_file_id"])] == ["one", "two"]
    (said,) = content(api, done["error_file_id"])
    assert (said["custom_id"], said["error"], said["response"]["status_code"]) == ("long", None, 400)
    assert said["response"]["body"]["error"]["code"] == "context_length_exceeded"


def test_an_engine_that_fails_a_line_and_one_that_has_stopped(store: Store) -> None:
    engine = ScriptedEngine(failure=EngineError())
    api = make_api(engine, store=store)
    done = carry_out(api, store, create(api, [line("a")]))
    (said,) = content(api, done["error_file_id"])
    assert (said["response"]["status_code"], done["request_counts"]["failed"]) == (500, 1)

    engine.healthy = False
    second = create(api, [line("a")])

    async def main() -> None:
        runner = make_runner(store, engine)
        runner.start()
        await until(lambda: len(engine.requests) > 1)  # it is asked for again, not given up
        await asyncio.sleep(0)
        await runner.stop()

    asyncio.run(main())
    assert retrieve(api, second)["status"] == "in_progress"
    engine.healthy, engine.failure = True, None
    assert carry_out(api, store, second)["request_counts"] == {"total": 1, "completed": 1, "failed": 0}


def test_a_refused_line_is_asked_again(store: Store) -> None:
    engine = ScriptedEngine(refusal=Overloaded("Asleep.", retry_after=0.01))
    api = make_api(engine, store=store)
    id_ = create(api, [line(str(i)) for i in range(6)])

    async def main() -> None:
        runner = make_runner(store, engine)
        runner.start()
        while (await store.batches.find(id_, "")).status is not Status.IN_PROGRESS:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        engine.refusal = None
        await until_ended(store, id_)
        await runner.stop()

    asyncio.run(main())
    assert retrieve(api, id_)["request_counts"] == {"total": 6, "completed": 6, "failed": 0}


def test_few_lines_at_once_and_none_while_somebody_waits(store: Store) -> None:
    engine = ScriptedEngine(hangs=True)
    api = make_api(engine, store=store)
    ids = [create(api, [line(str(i)) for i in range(9)]) for _ in range(2)]
    crowd = [True]

    async def main() -> None:
        runner = make_runner(store, engine, lines_at_once=3, crowded=lambda: crowd[0])
        runner.start()
        for id_ in ids:
            while (await store.batches.find(id_, "")).status is not Status.IN_PROGRESS:
                await asyncio.sleep(0.005)
        await asyncio.sleep(0.1)
        assert engine.requests == []
        crowd[0] = False
        await until(lambda: len(engine.requests) == 3)
        await asyncio.sleep(0.1)
        assert len(engine.requests) == 3
        await runner.stop()
        assert len(engine.closed) == 3

    asyncio.run(main())
    engine.hangs = False
    for id_ in ids:
        done = carry_out(api, store, id_)
        assert [each["custom_id"] for each in content(api, done["output_file_id"])] == [str(i) for i in range(9)]


@pytest.mark.parametrize("ticks", range(5))
def test_a_runner_stops_even_where_it_is_told_of_something_just_then(ticks: int, store: Store) -> None:
    async def main() -> None:
        runner = make_runner(store, ScriptedEngine())
        runner.start()
        await asyncio.sleep(0.1)  # it waits by now
        runner._told.set()
        for _ in range(ticks):
            await asyncio.sleep(0)
        async with asyncio.timeout(5):
            await runner.stop()

    asyncio.run(main())


def test_a_line_being_written_when_its_batch_is_cancelled_is_counted(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = make_api(store=store)
    id_ = create(api, [line(str(i)) for i in range(3)])
    told: list[bool] = []
    record = store.batches.record

    async def slow(batch: Batch, outcomes: Sequence[Outcome]) -> None:
        await record(batch, outcomes)
        if outcomes[0].succeeded:
            await store.batches.cancel(id_, "")
            await asyncio.sleep(0.5)

    monkeypatch.setattr(BatchStore, "record", lambda self, *what: slow(*what))
    monkeypatch.setattr("server.jobs.batch_runner.LOOK", 0.1)
    done = carry_out(api, store, id_, lines_at_once=1, on_line=told.append)
    assert (done["status"], done["request_counts"]) == ("cancelled", {"total": 3, "completed": 1, "failed": 2})
    assert sorted(told) == [False, False, True]


def test_cancelled_batches_keep_what_was_answered(store: Store) -> None:
    engine = ScriptedEngine()
    api = make_api(engine, store=store)
    at_once = create(api, [line("a")])
    said = api.client.post(f"/v1/batches/{at_once}/cancel").json()
    assert (said["status"], said["cancelling_at"] is not None) == ("cancelling", True)
    assert api.client.post(f"/v1/batches/{at_once}/cancel").json()["status"] == "cancelling"
    done = carry_out(api, store, at_once)
    assert (done["status"], done["output_file_id"], engine.requests) == ("cancelled", None, [])

    id_ = create(api, [line(str(i)) for i in range(8)])

    async def main() -> None:
        runner = make_runner(store, engine, lines_at_once=1, crowded=lambda: len(engine.closed) >= 5)
        runner.start()
        while (await store.batches.find(id_, "")).completed < 5:
            await asyncio.sleep(0.005)
        await store.batches.cancel(id_, "")
        await until_ended(store, id_)
        await runner.stop()

    asyncio.run(main())
    done = retrieve(api, id_)
    assert (done["status"], done["request_counts"]) == ("cancelled", {"total": 8, "completed": 5, "failed": 3})
    assert [each["custom_id"] for each in content(api, done["output_file_id"])] == list("01234")
    rest = content(api, done["error_file_id"])
    assert [(each["custom_id"], each["response"]) for each in rest] == [("5", None), ("6", None), ("7", None)]
    assert {each["error"]["code"] for each in rest} == {"batch_cancelled"}
    late = error_of(api.client.post(f"/v1/batches/{id_}/cancel"), 400)
    assert late["message"] == "Cannot cancel a batch with status 'cancelled'."


def test_batches_expire(api: Api, store: Store) -> None:
    id_ = create(api, [line("a"), line("b")])

    async def main() -> None:
        runner = make_runner(store, api.engine, crowded=lambda: bool(api.engine.closed), lines_at_once=1)
        runner.start()
        while (await store.batches.find(id_, "")).completed < 1:
            await asyncio.sleep(0.005)
        await store.database.run(lambda connection: connection.exec_driver_sql("UPDATE batches SET expires_at = 5"))
        await until_ended(store, id_)
        await runner.stop()

    asyncio.run(main())
    done = retrieve(api, id_)
    assert (done["status"], done["expired_at"] is not None) == ("expired", True)
    assert [each["custom_id"] for each in content(api, done["output_file_id"])] == ["a"]
    assert [each["error"]["code"] for each in content(api, done["error_file_id"])] == ["batch_expired"]


def test_an_input_that_goes_while_it_is_run(store: Store) -> None:
    engine = ScriptedEngine()
    api = make_api(engine, store=store)
    id_ = create(api, [line("a"), line("b")])

    async def main() -> None:
        runner = make_runner(store, engine, crowded=lambda: bool(engine.closed), lines_at_once=1)
        runner.start()
        while (await store.batches.find(id_, "")).completed < 1:
            await asyncio.sleep(0.005)
        await runner.stop()

    asyncio.run(main())
    api.client.delete(f"/v1/files/{retrieve(api, id_)['input_file_id']}")
    done = carry_out(api, store, id_)
    assert (done["status"], done["errors"]["data"][0]["code"]) == ("failed", "input_file_gone")
    assert [each["custom_id"] for each in content(api, done["output_file_id"])] == ["a"]


@pytest.mark.parametrize("seed", range(3))
def test_however_often_it_is_left_each_line_has_one_outcome(store: Store, seed: int) -> None:
    engine = ScriptedEngine()
    api = make_api(engine, store=store)
    id_ = create(api, [line(str(i), max_tokens=60 if i % 5 else 64) for i in range(40)])  # 64 do not fit

    async def leave(turns: int) -> None:
        runner = make_runner(store, engine)
        runner.start()
        for _ in range(turns):
            await asyncio.sleep(0.001)
        await runner.stop()

    turns = seed + 1
    while retrieve(api, id_)["status"] != "completed":
        asyncio.run(leave(turns))
        turns += 1 + turns // 4
    done = retrieve(api, id_)
    assert done["request_counts"] == {"total": 40, "completed": 32, "failed": 8}
    said = [content(api, done[name]) for name in ("output_file_id", "error_file_id")]
    assert [[int(each["custom_id"]) for each in lines] for lines in said] == [
        [i for i in range(40) if i % 5],
        [i for i in range(40) if not i % 5],
    ]
    outputs = api.client.get("/v1/files", params={"purpose": "batch_output"}).json()["data"]
    assert len(outputs) == 2


def test_a_batch_is_run_by_one_server_at_a_time(api: Api, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two servers with one database; what a server writes after its lease is over, and another's began, is refused."""
    create(api, [line("a")])
    here, there = (BatchStore(store.database, name) for name in ("here", "there"))
    outcome = Outcome(number=1, succeeded=True, output="{}")

    async def main() -> None:
        batch = await here.claim()
        assert batch is not None
        assert await there.claim() is None
        monkeypatch.setattr("server.jobs.batches.LEASE", -1.0)
        await here.renew(batch)  # by which it has run out
        monkeypatch.undo()
        taken = await there.claim()
        assert taken is not None
        assert taken.id == batch.id
        for late in (here.renew(batch), here.record(batch, [outcome]), here.advance(batch, Status.IN_PROGRESS)):
            with pytest.raises(LeaseLostError):
                await late
        await here.release(batch)
        assert await here.claim() is None
        await there.record(taken, [outcome])
        await there.release(taken)
        again = await here.claim()
        assert again is not None
        assert (again.completed, await here.done(again)) == (1, {1})

    asyncio.run(main())


def test_nothing_of_lines_is_left_in_the_database(api: Api, store: Store) -> None:
    carry_out(api, store, create(api, [line("a"), line("b")]))
    rows = store.database.run_now(lambda connection: connection.exec_driver_sql("SELECT * FROM batch_lines").all())
    assert rows == []


def test_outputs_expire_where_it_is_asked_for(api: Api, store: Store) -> None:
    id_ = create(api, [line("a")], output_expires_after={"anchor": "created_at", "seconds": 3600})
    file = api.client.get(f"/v1/files/{carry_out(api, store, id_)['output_file_id']}").json()
    assert file["expires_at"] == file["created_at"] + 3600


@pytest.mark.parametrize("raw", [b"", b"\n\n", b"a\nb", b"a\n\n b \n", b"x" * 5000 + b"\ny\n", b"z" * 300_000 + b"\nq"])
def test_lines_are_read_whole_and_numbered(raw: bytes, tmp_path: Any) -> None:
    path = tmp_path / "in"
    path.write_bytes(raw)

    async def read() -> list[tuple[int, bytes | None]]:
        return [(each.number, each.raw) async for each in read_lines(path, 3000)]

    wanted = [
        (number, None if len(text) > 3000 + batch_input.REST else text)
        for number, text in enumerate(raw.split(b"\n"), 1)
        if text.strip()
    ]
    assert [(n, text if text is None else text.removesuffix(b"\n")) for n, text in asyncio.run(read())] == wanted


def test_what_is_shown_of_an_answer_is_json(api: Api, store: Store) -> None:
    strange = 'quotes " and \u2028 and \\ and é'
    done = carry_out(api, store, create(api, jsonl([line(strange)])))
    raw = api.client.get(f"/v1/files/{done['output_file_id']}/content").content
    assert raw.count(b"\n") == 1
    assert json.loads(raw)["custom_id"] == strange
