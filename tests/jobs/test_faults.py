"""What goes wrong with a real trainer fails its job, says why, and is noticed by nobody else."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import psutil
import pytest
from hygiene import check_message
from serving import serving
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
