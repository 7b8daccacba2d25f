"""Bodies that ask for a fine-tuning job, read into one. What depends on models and files is looked at afterwards."""

from __future__ import annotations

import re
import secrets
import time
from typing import Any

from server.api.fine_tuning_schemas import AUTO, FineTuneBody, FineTuningBody
from server.api.metadata import read_metadata
from server.api.reading import read_body_fields, read_object, unknown_fields
from server.errors import InvalidRequest
from server.jobs.database import new_id
from server.jobs.records import FineTuningJob, Status

DEPTH_MAX = 8  # of objects within a method
SEEDS = 1 << 31
SHOWN = ("n_epochs", "batch_size", "learning_rate_multiplier")  # whether they were asked for or not
LEGACY_RATE = 0.1  # what openai 0.28's users know as the usual multiplier


def parse_job(raw: bytes, owner: str) -> tuple[FineTuningJob, tuple[str, ...]]:
    """The job, and names of fields nobody knows. Raises InvalidRequest."""
    fields = read_object(raw)
    for name in ("method", "hyperparameters"):
        if name in fields:
            fields[name] = _without_defaults(fields[name])
    body = read_body_fields(FineTuningBody, fields)
    if body.integrations not in (None, []):
        raise InvalidRequest(
            "'integrations' are not supported by this server.", "integrations", "unsupported_parameter"
        )
    job = _job(
        "ftjob-",
        owner,
        body,
        method=_method(body),
        seed=secrets.randbelow(SEEDS) if body.seed is None else body.seed,
        details=read_metadata(body.metadata),
    )
    return job, unknown_fields(fields, FineTuningBody)


def parse_fine_tune(raw: bytes, owner: str) -> tuple[FineTuningJob, tuple[str, ...]]:
    """The same, as openai 0.28 asks. Raises InvalidRequest."""
    fields = read_object(raw)
    body = read_body_fields(FineTuneBody, fields)
    if body.compute_classification_metrics or body.prompt_loss_weight not in (None, 0, 0.01):
        name = "compute_classification_metrics" if body.compute_classification_metrics else "prompt_loss_weight"
        raise InvalidRequest(f"'{name}' is not supported by this server.", name, "unsupported_parameter")
    asked: dict[str, Any] = {"n_epochs": body.n_epochs}
    if body.batch_size is not None:
        asked["batch_size"] = body.batch_size
    if body.learning_rate_multiplier is not None:
        asked["learning_rate_multiplier"] = body.learning_rate_multiplier / LEGACY_RATE
    method = {"type": "supervised", "supervised": {"hyperparameters": asked}}
    job = _job("ft-", owner, body, method=method, seed=secrets.randbelow(SEEDS), details=None)
    return job, unknown_fields(fields, FineTuneBody)


def _job(
    prefix: str,
    owner: str,
    body: FineTuningBody | FineTuneBody,
    *,
    method: dict[str, Any],
    seed: int,
    details: dict[str, str] | None,
) -> FineTuningJob:
    asked = method[method["type"]].get("hyperparameters", {})
    return FineTuningJob(
        id=new_id(prefix),
        owner=owner,
        created_at=int(time.time()),
        status=Status.QUEUED,
        model=body.model,
        training_file=body.training_file,
        validation_file=body.validation_file,
        suffix=_suffix(body.suffix),
        seed=seed,
        method=method,
        hyperparameters={**dict.fromkeys(SHOWN, AUTO), **asked},
        details=details,
    )


def _without_defaults(value: Any, depth: int = 0) -> Any:
    """Without what is null or `auto`, at any depth. Raises InvalidRequest."""
    if not isinstance(value, dict):
        return value
    if depth > DEPTH_MAX:
        raise InvalidRequest("Invalid 'method': it is nested too deeply.", "method", "invalid_value")
    kept = {name: item for name, item in value.items() if item is not None and item != AUTO}
    return {name: _without_defaults(item, depth + 1) for name, item in kept.items()}


def _method(body: FineTuningBody) -> dict[str, Any]:
    """With an entry of its type. Raises InvalidRequest."""
    older = None if body.hyperparameters is None else body.hyperparameters.model_dump(exclude_unset=True)
    if body.method is None:
        return {"type": "supervised", "supervised": {"hyperparameters": older or {}}}
    if older:
        raise InvalidRequest("'hyperparameters' belong into the 'method' where there is one.", "hyperparameters")
    kind = body.method.type
    for other in ("supervised", "dpo", "distillation"):
        if other != kind and getattr(body.method, other) is not None:
            raise InvalidRequest(f"'method.{other}' does not go with the type {kind}.", "method")
    return {"type": kind, kind: {}, **body.method.model_dump(exclude_unset=True)}


def _suffix(text: str) -> str:
    """As a part of a name. Raises InvalidRequest."""
    suffix = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-")
    if text and not suffix:
        raise InvalidRequest("Invalid 'suffix': it needs a letter or a digit.", "suffix", "invalid_value")
    return suffix
