"""What is known of a fine-tuning job, of what happened to it, and of what it made. Frozen: a change is the store's."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    QUEUED = "queued"
    VALIDATING = "validating_files"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self in {Status.SUCCEEDED, Status.FAILED, Status.CANCELLED}


ACTIVE = (Status.VALIDATING, Status.RUNNING)  # a trainer is at it, or has died over it


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTuningJob:
    id: str
    owner: str  # name of a key
    created_at: int
    finished_at: int | None = None
    estimated_finish: int | None = None
    status: Status
    model: str  # what it starts from, by its served name
    training_file: str
    validation_file: str | None
    suffix: str
    seed: int
    method: dict[str, Any]
    hyperparameters: dict[str, Any]
    details: dict[str, str] | None  # its metadata
    fine_tuned_model: str | None = None
    trained_tokens: int | None = None
    result_files: list[str] = field(default_factory=list)
    error: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEvent:
    place: int = 0
    id: str = ""
    created_at: int = 0
    level: str = "info"  # or warn, error
    type: str = "message"  # or metrics
    message: str
    data: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    id: str
    created_at: int
    step_number: int
    name: str
    metrics: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTunedModel:
    id: str  # the name it is served by
    owner: str
    job_id: str
    created_at: int
    directory: str  # below the data directory
