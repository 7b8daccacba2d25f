"""What the trainer is told, for what clients ask: by the method, and by what the job starts from."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_fine_tuning import base
from tuned import CONFIG, tuned

from model.training.checkpoint import hugging_face_config
from model.training.job import Job
from server.api.fine_tuning_parsing import parse_fine_tune, parse_job
from server.errors import InvalidRequest
from server.jobs.recipe import Machine, trainer_job
from server.jobs.records import FineTuningJob

__all__ = ["base"]
ADAPTER, WHOLE = "ft:gpt2:adapter:1", "ft:gpt2:whole:2"
MACHINE = Machine(device="cpu", threads=3, chat_template="{{ messages }}")

Ask = Callable[..., Job]


def parsed(**fields: Any) -> FineTuningJob:
    job, _ = parse_job(json.dumps({"model": "gpt2", "training_file": "file-1", "seed": 9, **fields}).encode(), "")
    return job


@pytest.fixture
def ask(base: Path, tmp_path: Path) -> Ask:
    """The trainer's job for one that is asked for, on a server that has an adapter and a whole model too."""

    def ask(job: FineTuningJob | None = None, **fields: Any) -> Job:
        async def run() -> Job:
            async with tuned(tmp_path / "data", base, running=False) as server:
                for name, is_adapter in ((ADAPTER, True), (WHOLE, False)):
                    directory = tmp_path / name.split(":")[2]
                    directory.mkdir(exist_ok=True)
                    adapter = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
                    file = "adapter_config.json" if is_adapter else "config.json"
                    (directory / file).write_text(json.dumps(adapter if is_adapter else hugging_face_config(CONFIG)))
                    server.engine.variants.add(name, directory)
                given: dict[str, Any] = {"train": tmp_path / "train", "valid": None, "out": tmp_path / "out"}
                return trainer_job(job or parsed(**fields), server.tuning.library, MACHINE, **given)

        return asyncio.run(run())

    return ask


def supervised(**asked: Any) -> dict[str, Any]:
    return {"type": "supervised", "supervised": asked}


def distillation(**asked: Any) -> dict[str, Any]:
    return {"type": "distillation", "distillation": asked}


def test_the_plain_job(ask: Ask, base: Path, tmp_path: Path) -> None:
    job = ask(hyperparameters={"n_epochs": 2, "learning_rate_multiplier": 0.5})
    assert (job.train, job.valid, job.out) == (str(tmp_path / "train"), None, str(tmp_path / "out"))
    assert (job.model, job.adapter, job.trainable, job.method) == (str(base), None, "lora", "supervised")
    assert (job.hyperparameters.epochs, job.hyperparameters.learning_rate_multiplier) == (2, 0.5)
    assert (job.hyperparameters.seed, job.threads, job.nice, job.device) == (9, 3, 19, "cpu")
    assert (job.lora.rank, job.lora.merge, job.chat_template) == (8, False, "{{ messages }}")
    assert job.name is not None
    assert job.name.startswith("ft:gpt2::")


def test_where_a_job_starts(ask: Ask, base: Path, tmp_path: Path) -> None:
    further = ask(model=ADAPTER)
    assert (further.model, further.adapter, further.lora.merge) == (str(base), str(tmp_path / "adapter"), False)
    merged = ask(model=ADAPTER, method=supervised(trainable="full"))
    assert (merged.adapter, merged.trainable) == (str(tmp_path / "adapter"), "full")
    whole = ask(model=WHOLE)
    assert (whole.model, whole.adapter, whole.lora.merge) == (str(tmp_path / "whole"), None, True)
    scratch = ask(method=supervised(init="xavier", shape={"n_layer": 1}))
    assert (scratch.trainable, scratch.init, scratch.shape.n_layer) == ("full", "xavier", 1)


def test_distillation(ask: Ask, base: Path, tmp_path: Path) -> None:
    own = ask(method=distillation(temperature=1, hidden=2, hyperparameters={"max_steps": 5}))
    assert own.distillation is not None
    assert (own.model, own.distillation.teacher, own.trainable) == (None, str(base), "full")
    assert (own.distillation.temperature, own.distillation.hidden, own.distillation.hard) == (1, 2, 0)
    assert own.hyperparameters.max_steps == 5
    taught = ask(model=WHOLE, method=distillation(teacher="gpt2"))
    assert taught.distillation is not None
    assert (taught.model, taught.distillation.teacher) == (str(tmp_path / "whole"), str(base))
    anew = ask(method=distillation(init="gpt2", shape={"n_layer": 1}))
    assert (anew.model, anew.init) == (None, "gpt2")
    for asked in ({"model": ADAPTER, "method": distillation()}, {"method": distillation(teacher=ADAPTER)}):
        with pytest.raises(InvalidRequest, match="adapter cannot be a teacher"):
            ask(**asked)


def test_what_could_not_be_served_beside_the_model(ask: Ask) -> None:
    for shape in ({"n_embd": 16}, {"n_layer": 3}, {"n_positions": 8}, {"n_head": 4}):
        for method in (supervised(init="gpt2", shape=shape), distillation(init="gpt2", shape=shape)):
            with pytest.raises(InvalidRequest, match="cannot be served beside the model"):
                ask(method=method)


def test_the_older_rate_is_relative_to_its_own_default(ask: Ask) -> None:
    body = {"training_file": "file-1", "learning_rate_multiplier": 0.05, "batch_size": 7}
    job, ignored = parse_fine_tune(json.dumps({**body, "classification_n_classes": 2}).encode(), "")
    assert ignored == ("classification_n_classes",)
    made = ask(replace(job, model="gpt2"))
    assert made.hyperparameters.learning_rate_multiplier == pytest.approx(0.5)
    assert (made.hyperparameters.epochs, made.hyperparameters.batch_size) == (4, 7)
