"""Runs one training job in a process of its own: `python -m model.training.finetune JOB.json`.

The job is a JSON file (`model.training.job.Job`); it names its data, where it starts from, and a directory `out`:

    out/model/                 the result: a model, or an adapter (adapter_config.json), with a card README.md
    out/checkpoints/step-N/    the same, as it was after an epoch; the last `checkpoints` of them
    out/log.csv, loss.png      a row a step, and its curve
    out/state.safetensors      what the same job resumes from; gone once it has finished
    out/result.json            once it has finished: what the "finished" event says

Standard output has one JSON object a line, each with an "event" (nothing else is ever printed there):

    started     steps, epochs, batch_size, examples, valid_examples, tokens (learnt in an epoch), parameters (that
                learn), learning_rate, from_step (0, or where it resumes), kind ("model" or "adapter"), notes (sentences
                about the data)
    validating  step, done (from 0 to 1): once a second while a validation takes so long
    step        step, steps, epoch (a number with a fraction), loss, valid_loss (null where not measured), accuracy
                and valid_accuracy (of tokens; of pairs where preferences are learnt), tokens (learnt so far),
                learning_rate, seconds (of the step, without its validation)
    checkpoint  step, path (relative to out), loss, valid_loss
    finished    step, epochs, tokens, loss, valid_loss, kind, path ("model"), early (ended before its last step)
    stopped     step: it was told to; its state is saved
    failed      message (one line, for a client to read), reason (job, data, model, device, loss, disk, internal) and,
                where lines of data are bad, file and problems: [{line, message}], a hundred at most

Exit status: 0 finished; 75 stopped (SIGTERM, SIGINT, or nobody reads its output any more): started again it goes on
where it was; 64 bad job; 65 bad data; 74 disk or file; 70 the loss is no number; 78 a model, an adapter or a device
cannot be used; 1 a defect, of which standard error says more. To cancel, send SIGTERM, or kill it at any moment, and
delete `out`; to pause, send SIGTERM; to resume after either or after a crash, run the same job again: it ends with the
same weights. A finished job that is run again says so and does nothing.

On SIGURG it rests for as long as it has worked since the last one: whoever shares the machine sends it a few a second
while there is something more urgent.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import torch

from model.errors import DataError, DeviceError, JobError, ModelError, TrainingError
from model.training.card import Made, write_card
from model.training.checkpoint import write_atomically
from model.training.job import Job, read_job
from model.training.log import Log, Row
from model.training.plot import draw_curve
from model.training.prepare import Prepared, prepare
from model.training.tuner import STATE

EXIT_STOPPED = 75
FAILURES: list[tuple[type[Exception], str, int]] = [
    (JobError, "job", 64),
    (DataError, "data", 65),
    (TrainingError, "loss", 70),
    (DeviceError, "device", 78),
    (ModelError, "model", 78),
    (OSError, "disk", 74),
    (torch.OutOfMemoryError, "device", 78),
]
PROBLEMS_MAX = 100
RESULT = "result.json"
REST_MAX = 2.0  # seconds
UNSAVED_MAX = 10.0  # seconds of work that a long validation may find unsaved
WATCH_EVERY = 1.0  # seconds

Report = Callable[..., None]


class GivingWay:
    """On SIGURG, which does nothing to a process that does not know it."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        signal.signal(signal.SIGURG, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        time.sleep(min(time.monotonic() - self._since, REST_MAX))
        self._since = time.monotonic()


class Stopping:
    """Set by a signal; looked at between pieces of work."""

    def __init__(self) -> None:
        self._set = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._set = True

    def __call__(self) -> bool:
        return self._set


def report(event: str, **fields: Any) -> None:
    """Raises BrokenPipeError when nobody reads any more."""
    print(json.dumps({"event": event, **fields}), flush=True)


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m model.training.finetune JOB.json", file=sys.stderr)
        return 64
    stopping = Stopping()
    GivingWay()
    try:
        job = read_job(Path(arguments[0]))
        os.nice(job.nice)
        if job.threads is not None:
            torch.set_num_threads(job.threads)
        return Run(job, stopping).go()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains as it ends
        return EXIT_STOPPED
    except Exception as error:
        return fail(error)


def fail(error: Exception) -> int:
    for kind, reason, status in FAILURES:
        if isinstance(error, kind):
            report("failed", message=_sentence(error), reason=reason, **_problems(error))
            return status
    traceback.print_exc()
    report("failed", message="The trainer has a defect; its log says more.", reason="internal")
    return 1


def _sentence(error: Exception) -> str:
    """No path in it."""
    if isinstance(error, OSError):
        name = Path(str(error.filename)).name.removesuffix(".partial").lstrip(".") if error.filename else "a file"
        return f"cannot read or write {name}: {error.strerror or type(error).__name__}"
    if isinstance(error, torch.OutOfMemoryError):
        return "the device has too little memory; fewer micro_batch_tokens, or recompute, need less"
    return str(error)


def _problems(error: Exception) -> dict[str, Any]:
    if not isinstance(error, DataError) or not error.problems:
        return {}
    return {"problems": [each._asdict() for each in error.problems[:PROBLEMS_MAX]]}


class Run:
    """One job from start, or where it was left, to its end."""

    def __init__(self, job: Job, stopping: Callable[[], bool]) -> None:
        self._job = job
        self._out = Path(job.out)
        self._fingerprint = job.fingerprint()
        self._stopping = stopping

    def go(self) -> int:
        """Returns the exit status. Raises ModelError or OSError."""
        self._out.mkdir(parents=True, exist_ok=True)
        known = self._known_result()
        if known is not None:
            report("finished", **known)
            return 0
        prepared = prepare(self._job)
        tuner = prepared.tuner
        if (self._out / STATE).exists():
            tuner.resume(self._out, self._fingerprint)
        self._say_started(prepared)
        with Log(self._out / "log.csv", tuner.step) as log:
            self._learn(prepared, log)
        if not self._is_over(prepared):
            tuner.save(self._out, self._fingerprint)
            report("stopped", step=tuner.step)
            return EXIT_STOPPED
        self._finish(prepared)
        return 0

    def _known_result(self) -> dict[str, Any] | None:
        path = self._out / RESULT
        if not path.exists():
            return None
        result: dict[str, Any] = json.loads(path.read_bytes())
        if result.pop("job") != self._fingerprint:
            raise JobError("the directory holds the result of another job")
        return result

    def _say_started(self, prepared: Prepared) -> None:
        recipe = prepared.tuner.recipe
        report(
            "started",
            steps=recipe.steps,
            epochs=self._job.hyperparameters.epochs,
            batch_size=recipe.batch_size,
            examples=prepared.examples,
            valid_examples=prepared.valid_examples,
            tokens=prepared.target_tokens,
            parameters=prepared.learning,
            learning_rate=recipe.rate,
            from_step=prepared.tuner.step,
            kind=prepared.kind,
            notes=prepared.notes,
        )

    def _learn(self, prepared: Prepared, log: Log) -> None:
        """Until it is over or told to stop: steps, each with the validation that is due after it. A state may be saved
        between the two; what resumes from it begins with the validation."""
        tuner, recipe = prepared.tuner, prepared.tuner.recipe
        saved = time.monotonic()
        while not self._is_over(prepared) and not self._stopping():
            began = time.monotonic()
            if self._is_measured(prepared) and tuner.train_step(self._stopping) is None:
                break
            seconds = time.monotonic() - began
            if not self._is_measured(prepared) and time.monotonic() - saved >= min(self._job.save_every, UNSAVED_MAX):
                tuner.save(self._out, self._fingerprint)
                saved = time.monotonic()
            measured = self._validate(prepared)
            if not self._is_measured(prepared):
                break
            assert tuner.loss is not None
            accuracies = tuner.accuracy, None if measured is None else tuner.valid_accuracy
            log.write(Row(tuner.step, tuner.tokens, float(tuner.step), tuner.loss, measured, seconds, *accuracies))
            report(
                "step",
                step=tuner.step,
                steps=recipe.steps,
                epoch=round(tuner.step / tuner.steps_per_epoch, 3),
                loss=tuner.loss,
                valid_loss=measured,
                accuracy=accuracies[0],
                valid_accuracy=accuracies[1],
                tokens=tuner.tokens,
                learning_rate=recipe.rate * recipe.scale(tuner.step - 1),
                seconds=round(seconds, 4),
            )
            if tuner.step % tuner.steps_per_epoch == 0 and not tuner.finished:
                self._checkpoint(prepared)
            if time.monotonic() - saved >= self._job.save_every and not tuner.finished:
                tuner.save(self._out, self._fingerprint)
                saved = time.monotonic()

    def _is_over(self, prepared: Prepared) -> bool:
        return prepared.tuner.finished and self._is_measured(prepared)

    def _is_measured(self, prepared: Prepared) -> bool:
        """Whether no validation is due."""
        tuner = prepared.tuner
        due = tuner.step % prepared.validate_every == 0 or tuner.step >= tuner.recipe.steps
        return not due or not prepared.valid_examples or tuner.step in (0, tuner.measured)

    def _validate(self, prepared: Prepared) -> float | None:
        """None where none is due, and where it was told to stop."""
        if self._is_measured(prepared):
            return None
        said = time.monotonic()

        def watch(part: float) -> None:
            nonlocal said
            if time.monotonic() - said >= WATCH_EVERY:
                said = time.monotonic()
                report("validating", step=prepared.tuner.step, done=round(part, 4))

        return prepared.tuner.validate(self._stopping, watch)

    def _checkpoint(self, prepared: Prepared) -> None:
        """The model as it is now; the oldest go, once there are more than the job keeps."""
        if self._job.checkpoints:
            tuner = prepared.tuner
            path = Path("checkpoints", f"step-{tuner.step}")
            self._write(prepared, path)
            kept = sorted((self._out / "checkpoints").glob("step-*"), key=lambda each: int(each.name[5:]))
            for old in kept[: -self._job.checkpoints]:
                shutil.rmtree(old)
            report("checkpoint", step=tuner.step, path=str(path), loss=tuner.loss, valid_loss=tuner.valid_loss)

    def _write(self, prepared: Prepared, path: Path) -> None:
        """Whole or not at all."""
        final = self._out / path
        partial = final.with_name(f".{final.name}.partial")
        for leftover in (partial, final):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            prepared.write(partial)
            recipe = prepared.tuner.recipe
            made = Made(prepared.kind, prepared.examples, recipe.batch_size, recipe.rate)
            write_card(partial / "README.md", self._job, made, self._out / "log.csv")
            partial.rename(final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _finish(self, prepared: Prepared) -> None:
        tuner = prepared.tuner
        tuner.take_best()
        draw_curve(self._out / "log.csv", self._out / "loss.png")
        self._write(prepared, Path("model"))
        shutil.copyfile(self._out / "loss.png", self._out / "model" / "loss.png")
        result = {
            "step": tuner.step,
            "epochs": round(tuner.step / tuner.steps_per_epoch, 3),
            "tokens": tuner.tokens,
            "loss": tuner.loss,
            "valid_loss": tuner.best if tuner.recipe.patience is not None else tuner.valid_loss,
            "kind": prepared.kind,
            "path": "model",
            "early": tuner.step < tuner.recipe.steps,
        }
        write_atomically(self._out / RESULT, msgspec.json.encode({**result, "job": self._fingerprint}))
        (self._out / STATE).unlink(missing_ok=True)
        report("finished", **result)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
