"""What a trainer says, as events and fields of its job."""

from __future__ import annotations

import statistics
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from server.jobs.records import FineTuningJob, JobEvent, Status

EVENTS_MAX = 1000  # of steps, about; of a longer job every so many
STEPS_OF_TIME = 20  # looked at for the time that is left
AUTO = "auto"
CRASHES_MAX = 3  # in a row, without a step between
LINES_SHOWN = 10  # bad lines of data in a message; all of them are in the event
ERRORS = {
    "data": ("invalid_training_file", "training_file"),
    "job": ("invalid_job", "method"),
    "model": ("invalid_model", "model"),
    "device": ("device_error", None),
    "loss": ("loss_is_no_number", "method"),
    "disk": ("storage_error", None),
}


@dataclass(slots=True)
class Progress:
    job: FineTuningJob
    furthest: int = 0  # step
    crashes: int = 0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=STEPS_OF_TIME))  # of the last steps
    result: dict[str, Any] | None = None  # of the "finished" event
    failure: dict[str, Any] | None = None  # of the "failed" event

    @property
    def over(self) -> bool:
        return self.result is not None or self.failure is not None

    def count_crash(self, before: int) -> None:
        """before: the furthest step when the trainer that died had begun."""
        self.crashes = self.crashes + 1 if self.furthest <= before else 1
        if self.crashes > CRASHES_MAX:
            self.failure = {
                "reason": "killed", "message": "the trainer was killed again and again; the machine may lack memory"
            }  # fmt: skip

    def take(self, said: dict[str, Any]) -> tuple[list[JobEvent], dict[str, Any]]:
        """Events to be kept, and fields of the job to be changed."""
        match said["event"]:
            case "started":
                return self._started(said)
            case "step":
                return self._stepped(said)
            case "finished":
                self.result = said
            case "failed":
                self.failure = said
        return [], {}

    def _started(self, said: dict[str, Any]) -> tuple[list[JobEvent], dict[str, Any]]:
        step = said["from_step"]
        asked = self.job.hyperparameters
        shown = {**asked, "n_epochs": said["epochs"], "batch_size": said["batch_size"]}
        if shown.get("learning_rate_multiplier") == AUTO:
            shown["learning_rate_multiplier"] = 1.0
        message = f"Fine-tuning job resumed from step {step}" if step else "Fine-tuning job started"
        about = {name: said[name] for name in ("examples", "valid_examples", "tokens", "parameters", "steps")}
        started = JobEvent(message=message, data={**about, "learning_rate": said["learning_rate"]})
        notes = [] if step else [JobEvent(level="warn", message=note) for note in said["notes"]]
        return [started, *notes], {"status": Status.RUNNING, "hyperparameters": shown}

    def _stepped(self, said: dict[str, Any]) -> tuple[list[JobEvent], dict[str, Any]]:
        step, steps = said["step"], said["steps"]
        self.furthest = max(self.furthest, step)
        self.seconds.append(said["seconds"])
        if said["valid_loss"] is None and step not in (1, steps) and step % -(-steps // EVENTS_MAX):
            return [], {}
        valid = "" if said["valid_loss"] is None else f", validation loss={said['valid_loss']:.4f}"
        event = JobEvent(
            type="metrics",
            message=f"Step {step}/{steps}: training loss={said['loss']:.4f}{valid}",
            data={
                "step": step,
                "total_steps": steps,
                "epoch": said["epoch"],
                "train_loss": said["loss"],
                "full_valid_loss": said["valid_loss"],
                "train_mean_token_accuracy": said["accuracy"],
                "full_valid_mean_token_accuracy": said["valid_accuracy"],
                "learning_rate": said["learning_rate"],
                "tokens": said["tokens"],
            },
        )
        left = (steps - step) * statistics.median(self.seconds)
        return [event], {"estimated_finish": int(time.time() + left)}


def failure_of(said: dict[str, Any], job: FineTuningJob) -> dict[str, Any]:
    """The job's error, as clients see it."""
    code, param = ERRORS.get(said["reason"], ("server_error", None))
    message = said["message"]
    if said["reason"] == "data" and job.validation_file is not None and job.validation_file in message:
        code, param = "invalid_validation_file", "validation_file"
    problems = said.get("problems") or []
    if problems:
        shown = [f"line {each['line']}: {each['message']}" for each in problems[:LINES_SHOWN]]
        more = f"; and {len(problems) - LINES_SHOWN} more" if len(problems) > LINES_SHOWN else ""
        message = f"The {param} has bad lines; {'; '.join(shown)}{more}"
    elif not message.startswith("file-"):
        message = f"{message[:1].upper()}{message[1:]}"
    return {"code": code, "message": f"{message}.", "param": param}
