"""Batches behind a whole server: through the openai client, across kill -9, and beside those who wait for answers."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import openai
import pytest
from serving import RunningServer, serving

PATIENCE = 240.0  # seconds
FLAGS = ("--threads", "1")


def client_of(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-anything")


def lines_of(count: int, max_tokens: int) -> bytes:
    """Seeded, so that an answer is the same whenever it is made."""
    return b"".join(
        json.dumps({
            "custom_id": f"line-{i}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "ada", "prompt": f"Number {i} is", "max_tokens": max_tokens, "seed": i},
        }).encode() + b"\n"
        for i in range(count)
    )  # fmt: skip


def submit(client: openai.OpenAI, content: bytes) -> str:
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h").id


def wait(client: openai.OpenAI, id_: str, completed: int | None = None) -> Any:
    """Until it has ended, or so many lines are completed."""
    deadline = time.monotonic() + PATIENCE
    while True:
        batch = client.batches.retrieve(id_)
        assert batch.status != "failed", batch.errors
        if batch.status == "completed" or (completed is not None and batch.request_counts.completed >= completed):
            return batch
        assert time.monotonic() < deadline, batch
        time.sleep(0.02)


def outputs(client: openai.OpenAI, file: str) -> list[dict[str, Any]]:
    return [json.loads(each) for each in client.files.content(file).text.splitlines()]


def check_all_once(client: openai.OpenAI, batch: Any, count: int) -> list[dict[str, Any]]:
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (
        count,
        count,
        0,
    )
    said = outputs(client, batch.output_file_id)
    assert [each["custom_id"] for each in said] == [f"line-{i}" for i in range(count)]
    assert batch.error_file_id is None
    assert [file.id for file in client.files.list(purpose="batch_output")] == [batch.output_file_id]
    return said


def test_the_openai_client(tiny: Path, tmp_path: Path) -> None:
    with serving(tiny, *FLAGS, "--data-dir", str(tmp_path / "data")) as server:
        client = client_of(server)
        file = client.files.create(file=("in.jsonl", lines_of(5, 8)), purpose="batch")
        made = client.batches.create(
            input_file_id=file.id, endpoint="/v1/completions", completion_window="24h", metadata={"why": "test"}
        )
        assert (made.status, made.metadata) == ("validating", {"why": "test"})
        done = wait(client, made.id)
        for i, each in enumerate(check_all_once(client, done, 5)):
            live = client.completions.create(model="ada", prompt=f"Number {i} is", max_tokens=8, seed=i)
            assert each["response"]["body"]["choices"] == live.model_dump()["choices"]
        assert done.usage.output_tokens == 40
        assert [batch.id for batch in client.batches.list(limit=1)] == [made.id]
        with pytest.raises(openai.BadRequestError, match="Cannot cancel"):
            client.batches.cancel(made.id)
        bad = client.files.create(file=("in.jsonl", b"{}\nno\n"), purpose="batch")
        wrong = client.batches.create(input_file_id=bad.id, endpoint="/v1/completions", completion_window="24h")
        while (wrong := client.batches.retrieve(wrong.id)).status == "validating":
            time.sleep(0.02)
        assert wrong.status == "failed"
        assert [(each.line, each.code) for each in wrong.errors.data] == [
            (1, "missing_required_parameter"),
            (2, "invalid_json_line"),
        ]
        long = submit(client, lines_of(200, 200))
        wait(client, long, completed=1)
        assert client.batches.cancel(long).status == "cancelling"
        while (left := client.batches.retrieve(long)).status == "cancelling":
            time.sleep(0.02)
        assert left.status == "cancelled"
        counts = left.request_counts
        assert counts.completed + counts.failed == counts.total == 200
        assert server.metrics()['gpt2_batch_lines_total{outcome="completed"}'] == 5 + counts.completed


def test_kill_9_loses_no_line_and_runs_none_twice(tiny: Path, tmp_path: Path) -> None:
    flags = (*FLAGS, "--data-dir", str(tmp_path / "data"))
    count = 40
    with serving(tiny, *flags) as server:
        id_ = submit(client_of(server), lines_of(count, 24))
        wait(client_of(server), id_, completed=5)
        kill(server)
    with serving(tiny, *flags) as server:
        wait(client_of(server), id_, completed=20)
        assert server.stop() == 0  # as an operator does it
    with serving(tiny, *flags) as server:
        client = client_of(server)
        said = check_all_once(client, wait(client, id_), count)
        body = said[7]["response"]["body"]
        live = client.completions.create(model="ada", prompt="Number 7 is", max_tokens=24, seed=7)
        assert body["choices"] == live.model_dump()["choices"]


def kill(server: RunningServer) -> None:
    """The server alone, as the kernel would; its worker sees that it is gone."""
    server.process.kill()
    server.process.wait()


def test_live_requests_are_not_refused_for_lines(tiny: Path, tmp_path: Path) -> None:
    """Of one seat and one place in the queue a batch takes neither for long."""
    flags = (*FLAGS, "--data-dir", str(tmp_path / "data"), "--max-num-seqs", "1", "--max-num-queued-reqs", "1")
    with serving(tiny, *flags) as server, client_of(server) as client:
        id_ = submit(client, lines_of(12, 100))
        wait(client, id_, completed=1)
        impatient = client.with_options(max_retries=0)
        for seed in range(6):
            answer = impatient.completions.create(model="ada", prompt="a", max_tokens=4, seed=seed)
            assert answer.usage is not None
        check_all_once(client, wait(client, id_), 12)
        refused = [value for name, value in server.metrics().items() if name.startswith("gpt2_requests_rejected")]
        assert not any(refused)
