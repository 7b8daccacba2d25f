"""A run's log: one CSV row a step, readable while the run goes on."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

COLUMNS = ("step", "tokens", "done", "loss", "valid_loss", "accuracy", "valid_accuracy", "tokens_per_second")
LATER = {"accuracy", "valid_accuracy"}  # empty where nobody counts; logs of earlier versions lack them


@dataclass(frozen=True, slots=True)
class Row:
    step: int
    tokens: int  # seen by the weights
    done: float  # progress, in its unit
    loss: float  # nats a token, of this step's batch before its update
    valid_loss: float | None
    seconds: float  # this step took
    accuracy: float | None = None  # of the tokens or pairs of this step's batch before its update
    valid_accuracy: float | None = None


class Log:
    """Appends rows; on a resume, rows of steps after the checkpoint are dropped first, for they will be run again."""

    def __init__(self, path: Path, step: int, tokens: int = 0) -> None:
        kept = [row for row in read_log(path) if int(row["step"]) <= step] if path.exists() else []
        self._tokens = int(kept[-1]["tokens"]) if kept else tokens
        self._file = path.open("w", newline="", buffering=1, encoding="utf-8")
        self._writer = csv.writer(self._file)
        self._writer.writerow(COLUMNS)
        self._writer.writerows([row.get(column) or "" for column in COLUMNS] for row in kept)

    def write(self, row: Row) -> None:
        valid = "" if row.valid_loss is None else f"{row.valid_loss:.4f}"
        speed = (row.tokens - self._tokens) / max(row.seconds, 1e-9)
        accuracies = ["" if each is None else f"{each:.4f}" for each in (row.accuracy, row.valid_accuracy)]
        numbers = (row.step, row.tokens, f"{row.done:.1f}", f"{row.loss:.4f}", valid)
        self._writer.writerow((*numbers, *accuracies, f"{speed:.0f}"))
        self._tokens = row.tokens

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()


def read_log(path: Path) -> list[dict[str, str]]:
    """The rows of a log as text, a line cut short by a kill left out."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            row
            for row in csv.DictReader(file)
            if all(isinstance(row.get(column), str) for column in set(COLUMNS) - LATER)
        ]
