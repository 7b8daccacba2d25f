"""The result file of a fine-tuning job: the trainer's log with OpenAI's columns. Knows nothing of jobs or files."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from model.training.log import read_log

COLUMNS = {
    "step": "step",
    "train_loss": "loss",
    "train_accuracy": "accuracy",
    "valid_loss": "valid_loss",
    "valid_mean_token_accuracy": "valid_accuracy",
}


def result_csv(log: Path) -> bytes:
    """A row a step; empty where nothing was measured. Raises OSError."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([row.get(ours) or "" for ours in COLUMNS.values()] for row in read_log(log))
    return text.getvalue().encode()
