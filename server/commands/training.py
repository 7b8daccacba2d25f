"""What `fine-tune` and `distill` share: the trainer runs in a process of its own, and its progress is shown here.

Knows nothing of how a network learns; the trainer's contract is in `model/training/finetune.py`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import msgspec

from model.training.job import Hyperparameters, Job, Shape, parse_job
from server.checkpoint import find_checkpoint

STOPPED = 75  # the trainer's status, and ours: run it again to go on
BAR = 24
STEPS_OF_TIME = 20  # looked at for the time that is left
Hyper = dict[str, Any]


def add_common(parser: argparse.ArgumentParser) -> None:
    defaults, job = Hyperparameters(), Job(train="", out="")
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="receives the model, its card and its loss curve; the same command goes on where it was stopped",
    )
    parser.add_argument("--valid", metavar="FILE", help="JSONL that is measured on and never learnt")
    group = parser.add_argument_group("learning")
    group.add_argument("--epochs", type=int, default=defaults.epochs, metavar="N", help="[%(default)s]")
    group.add_argument("--max-steps", type=int, metavar="N", help="end after so many, if the epochs have more")
    group.add_argument("--batch-size", type=int, metavar="N", help="examples in a step; default: by how many there are")
    group.add_argument("--learning-rate", type=float, metavar="X", help="default: by method and width of the model")
    group.add_argument("--early-stop", type=int, metavar="N", help="end after N validations without a better loss")
    group.add_argument("--validate-every", type=int, metavar="N", help="steps; default: an epoch")
    group.add_argument("--dropout", type=float, default=defaults.dropout, metavar="X", help="[%(default)g]")
    group.add_argument("--valid-tokens", type=int, metavar="N", help="learnt tokens that are measured; default: all")
    group.add_argument(
        "--too-long",
        default=job.too_long,
        choices=["truncate", "split", "refuse"],
        help="what becomes of an example longer than the context [%(default)s]",
    )
    group.add_argument("--seed", type=int, default=defaults.seed, metavar="N", help="[%(default)s]")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [%(default)s]")
    machine.add_argument(
        "--precision",
        default="auto",
        choices=["auto", "float32", "bfloat16"],
        help="of matrix products; auto: bfloat16 on a GPU that has it",
    )
    machine.add_argument("--threads", type=int, metavar="N", help="default: all cores")
    machine.add_argument("--recompute", action="store_true", help="gradient checkpointing: less memory, more time")
    machine.add_argument(
        "--micro-batch-tokens",
        type=int,
        default=job.micro_batch_tokens,
        metavar="N",
        help="computed at once; less needs less memory [%(default)s]",
    )


def add_from_scratch(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("from scratch")
    group.add_argument("--init", choices=["gpt2", "xavier"], help="start from random weights, drawn this way")
    group.add_argument(
        "--shape",
        nargs="+",
        type=_size,
        metavar="NAME=N",
        help=f"their shape, where it differs: {', '.join(Shape.__struct_fields__)}",
    )


def _size(text: str) -> tuple[str, int]:
    """Raises ArgumentTypeError."""
    name, _, number = text.partition("=")
    if name not in Shape.__struct_fields__ or not number.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=N")
    return name, int(number)


def common_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    given = ("epochs", "max_steps", "batch_size", "learning_rate", "early_stop", "validate_every", "dropout", "seed")
    hyperparameters = {name: getattr(arguments, name) for name in given}
    same = ("device", "precision", "threads", "recompute", "micro_batch_tokens", "valid_tokens", "too_long")
    return {
        "train": str(Path(arguments.train).resolve()),
        "valid": None if arguments.valid is None else str(Path(arguments.valid).resolve()),
        "out": str(Path(arguments.out).resolve()),
        "hyperparameters": hyperparameters,
        "init": arguments.init,
        "shape": dict(arguments.shape or []),
        **{name: getattr(arguments, name) for name in same},
    }


def checkpoint_of(model: str | None) -> tuple[str, str]:
    """A model argument's directory, and what it can be loaded by: the Hub's id, or the directory. Raises ModelError."""
    found = find_checkpoint(model, None)
    directory = str(found.directory)
    return directory, directory if found.revision is None else found.name


def train(fields: dict[str, Any]) -> int:
    """Runs the job to its end, or until Ctrl-C. Returns the exit status. Raises ModelError."""
    job = parse_job(msgspec.json.encode(fields))
    with tempfile.NamedTemporaryFile("wb", suffix=".json") as file:
        file.write(msgspec.json.encode(job))
        file.flush()
        command = [sys.executable, "-m", "model.training.finetune", file.name]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603 - our own module
        assert process.stdout is not None
        with _interrupts_to(process), process.stdout:
            show(process.stdout, Screen(sys.stderr), Path(job.out))
        return process.wait()


@contextmanager
def _interrupts_to(process: subprocess.Popen[str]) -> Iterator[None]:
    """Ctrl-C reaches the trainer by itself, which saves its state; SIGTERM we hand on. We wait for it."""
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda number, frame: None),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, frame: process.terminate()),
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# === What is seen ===


class Screen:
    """A bar that is drawn over itself on a terminal, and a line now and then elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._drawn = False
        self._last = -1.0

    def line(self, text: str) -> None:
        end = "\r\033[K" if self._drawn else ""
        self._drawn = False
        print(f"{end}{text}", file=self._stream, flush=True)

    def bar(self, text: str, part: float) -> None:
        if self._live:
            filled = round(part * BAR)
            width = shutil.get_terminal_size().columns - 1
            shown = f"{'█' * filled}{'░' * (BAR - filled)} {text}"[:width]
            print(f"\r\033[K{shown}", end="", file=self._stream, flush=True)
            self._drawn = True
        elif part >= 1 or part - self._last >= 0.1:
            self._last = part
            self.line(text)


def show(events: Iterator[str], screen: Screen, out: Path) -> None:
    """events: lines of the trainer's output."""
    left = TimeLeft()
    for line in events:
        event = json.loads(line)
        match event["event"]:
            case "started":
                screen.line(_started(event))
                for note in event["notes"]:
                    screen.line(note)
            case "validating":
                screen.bar(f"step {event['step']}: measuring, {event['done']:.0%}", event["done"])
            case "step":
                screen.bar(_step(event, left.after(event)), event["step"] / event["steps"])
                if event["valid_loss"] is not None:
                    screen.line(f"step {event['step']}: validation loss {event['valid_loss']:.4f}")
            case "finished":
                early = " (early: it fell no more)" if event["early"] else ""
                screen.line(f"Finished after {event['step']} steps{early}: {out / event['path']}")
            case "stopped":
                screen.line(f"Stopped after step {event['step']}. The same command goes on from there.")
            case "failed":
                for problem in event.get("problems", [])[1:]:
                    screen.line(f"line {problem['line']}: {problem['message']}")
                screen.line(f"gpt2-server: {event['message']}")


def _started(event: dict[str, Any]) -> str:
    resumed = f", from step {event['from_step']}" if event["from_step"] else ""
    return (
        f"{event['examples']:,} examples ({event['tokens']:,} tokens to learn), {event['parameters']:,} parameters "
        f"that learn, {event['steps']:,} steps of {event['batch_size']}{resumed}"
    )


class TimeLeft:
    """Of a run, by the median of its last steps, and by what validations have taken for each step so far."""

    def __init__(self) -> None:
        self._steps: deque[float] = deque(maxlen=STEPS_OF_TIME)
        self._measuring = 0.0  # seconds, of all validations so far
        self._seen = 0  # steps
        self._at = time.monotonic()

    def after(self, event: dict[str, Any]) -> float:
        """Seconds."""
        now = time.monotonic()
        self._steps.append(event["seconds"])
        if event["valid_loss"] is not None and self._seen:
            self._measuring += max(now - self._at - event["seconds"], 0.0)
        self._at = now
        self._seen += 1
        each = statistics.median(self._steps) + self._measuring / self._seen
        return each * float(event["steps"] - event["step"])


def _step(event: dict[str, Any], left: float) -> str:
    minutes, seconds = divmod(round(left), 60)
    eta = f"{minutes}:{seconds:02d} left"
    return f"step {event['step']}/{event['steps']}  epoch {event['epoch']:.2f}  loss {event['loss']:.4f}  {eta}"
