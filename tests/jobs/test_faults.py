"""What goes wrong with a real trainer fails its job, says why, and is noticed by nobody else."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from hygiene import check_message
from serving import serving
from test_batches_served import check_all_once, client_of, lines_of, submit
from test_batches_served import wait as wait_for_batch
from test_kills import post, state, until_ended

TEXT = b'{"text": "Wind south-west, fresh. Two boats in."}\n' * 8
FILE_MOST = 4 << 20  # bytes: the database and a log fit, weights do not


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_full_disk_a_loss_that_is_no_number_and_a_deleted_file(tiny: Path, tmp_path: Path) -> None:
    with serving(tiny, "--threads", "1", "--data-dir", str(tmp_path)) as server:

        def create(**hyperparameters: Any) -> str:
            file = post(server, "/v1/files", data={"purpose": "fine-tune"}, files={"file": ("train.jsonl", TEXT)})
            supervised = {"trainable": "full", "hyperparameters": {"max_steps": 4, "batch_size": 2, **hyperparameters}}
            method = {"type": "supervised", "supervised": supervised}
            body = {"model": "davinci", "training_file": file["id"], "method": method}
            return str(post(server, "/v1/fine_tuning/jobs", json=body)["id"])

        before = server.complete(prompt="Two boats", max_tokens=8, seed=1)["choices"]
        psutil.Process(server.process.pid).rlimit(resource.RLIMIT_FSIZE, (FILE_MOST, FILE_MOST))
        full, wild, gone = create(), create(learning_rate=1e6, clip=1e6, warm_up=0), create()
        (tmp_path / "files" / state(server, gone)["training_file"]).unlink()
        errors = [until_ended(server, id_)["error"] for id_ in (full, wild, gone)]
        assert [error["code"] for error in errors] == ["storage_error", "loss_is_no_number", "invalid_training_file"]
        for error in errors:
            check_message(error["message"])
        assert [path.name for path in tmp_path.glob("jobs/*/out")] == []
        assert server.complete(prompt="Two boats", max_tokens=8, seed=1)["choices"] == before
        assert not [line for line in server.lines if '"level": "error"' in line]


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_disk_that_is_full_for_a_while_costs_a_batch_no_line_and_nobody_else_an_answer(
    tiny: Path, tmp_path: Path
) -> None:
    lines = lines_of(60, 40)
    with serving(tiny, "--threads", "1", "--data-dir", str(tmp_path)) as server, client_of(server) as client:
        undisturbed = wait_for_batch(client, submit(client, lines))
        expected = check_all_once(client, undisturbed, 60)
        client.files.delete(undisturbed.output_file_id)
        id_ = submit(client, lines)
        wait_for_batch(client, id_, completed=5)
        process = psutil.Process(server.process.pid)
        soft, hard = process.rlimit(resource.RLIMIT_FSIZE)
        process.rlimit(resource.RLIMIT_FSIZE, (1, hard))
        for _ in range(10):
            assert server.complete(prompt="a", max_tokens=2)
            upload = httpx.post(f"{server.url}/v1/files", data={"purpose": "batch"}, files={"file": ("a", b"{}")})
            assert (upload.status_code, upload.json()["error"]["code"]) == (503, "storage_error")
            check_message(upload.json()["error"]["message"])
            assert httpx.get(f"{server.url}/health").status_code == 200
            time.sleep(0.3)
        process.rlimit(resource.RLIMIT_FSIZE, (soft, hard))
        batch = wait_for_batch(client, id_)
        found = check_all_once(client, batch, 60)
        texts = [
            sorted((each["custom_id"], each["response"]["body"]["choices"][0]["text"]) for each in lines)
            for lines in (found, expected)
        ]
        assert texts[0] == texts[1]
