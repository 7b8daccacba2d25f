"""From a fine-tuning job as it was asked for to the trainer's own (`model/training/job.py`), or why there is none."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from model.config import check_variant, read_config
from model.errors import JobError, ModelError
from model.training.job import Job, parse_job
from server.errors import InvalidRequest
from server.jobs.library import Library, Origin
from server.jobs.records import FineTuningJob

HYPERPARAMETERS = {"n_epochs": "epochs"}  # ours have the trainer's names but for this one
CHECKPOINTS = 3  # kept of a job


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where training runs, and how much of it."""

    device: str
    threads: int
    chat_template: str | None = None  # Jinja source


def trainer_job(
    job: FineTuningJob, library: Library, machine: Machine, *, train: Path, valid: Path | None, out: Path
) -> Job:
    """Raises InvalidRequest or ModelNotFound."""
    kind = job.method["type"]
    asked = job.method.get(kind) or {}
    origin = library.origin(job.model)
    fields = {
        "train": str(train),
        "valid": None if valid is None else str(valid),
        "out": str(out),
        "model": str(origin.model),
        "adapter": None if origin.adapter is None else str(origin.adapter),
        "method": kind,
        "init": asked.get("init"),
        "shape": asked.get("shape") or {},
        "hyperparameters": _hyperparameters(asked.get("hyperparameters") or {}, job.seed),
        "base_name": str(origin.model),  # which whoever reads the result can load
        "name": model_name(job, library.base_name),
        "chat_template": machine.chat_template,
        "device": machine.device,
        "threads": machine.threads,
        "nice": 19,
        "checkpoints": CHECKPOINTS,
    }
    fields |= _distillation(asked, library, origin) if kind == "distillation" else _supervised(asked, origin)
    if kind == "dpo":
        fields["dpo"] = _dpo(asked)
    try:
        made = parse_job(msgspec.json.encode(fields))
        _check_servable(made, origin, library)
    except JobError as error:
        raise InvalidRequest(f"Invalid 'method': {error}.", "method", "invalid_value") from None
    except ModelError as error:
        raise InvalidRequest(f"Invalid 'method': what it makes: {error}.", "method", "invalid_value") from None
    return made


def model_name(job: FineTuningJob, base_name: str) -> str:
    return f"ft:{base_name}:{job.suffix}:{job.id[-8:]}"


def checkpoint_name(job: FineTuningJob, base_name: str, step: int) -> str:
    return f"{model_name(job, base_name)}:ckpt-step-{step}"


def _hyperparameters(asked: dict[str, Any], seed: int) -> dict[str, Any]:
    kept = {name: value for name, value in asked.items() if name != "beta"}
    return {"seed": seed, **{HYPERPARAMETERS.get(name, name): value for name, value in kept.items()}}


def _dpo(asked: dict[str, Any]) -> dict[str, Any]:
    beta = (asked.get("hyperparameters") or {}).get("beta")
    return {} if beta is None else {"beta": beta}


def _supervised(asked: dict[str, Any], origin: Origin) -> dict[str, Any]:
    trainable = asked.get("trainable") or ("lora" if asked.get("init") is None else "full")
    lora = dict(asked.get("lora") or {})
    if not origin.is_base:  # an adapter on it could not be served on the model
        lora["merge"] = True
    return {"trainable": trainable, "lora": lora}


def _distillation(asked: dict[str, Any], library: Library, origin: Origin) -> dict[str, Any]:
    """A student is made of its teacher's layers, unless the job names another model to start from, or starts anew."""
    teacher = library.origin(asked["teacher"]) if asked.get("teacher") else origin
    if teacher.adapter is not None:
        raise InvalidRequest("An adapter cannot be a teacher, nor be made a student: a whole model can.", "method")
    terms = ("temperature", "soft", "hard", "hidden", "attention", "layers", "embeddings")
    given = {name: asked[name] for name in terms if asked.get(name) is not None}
    fields: dict[str, Any] = {"trainable": "full", "distillation": {"teacher": str(teacher.model), **given}}
    if not asked.get("teacher") or asked.get("init") is not None:
        fields["model"] = None
    return fields


def _check_servable(job: Job, origin: Origin, library: Library) -> None:
    """Raises ModelError where the result could not be served beside the model."""
    config = read_config(Path(job.model or (job.distillation.teacher if job.distillation else origin.model)))
    shape = {name: value for name, value in msgspec.structs.asdict(job.shape).items() if value is not None}
    check_variant(replace(config, **shape), library.config)
