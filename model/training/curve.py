"""Draws a run's log: `python -m model.training.curve LOG.csv CURVE.png`. Needs matplotlib, which serving does not."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from model.training.log import read_log


def draw(log: Path, picture: Path) -> None:
    """Loss over tokens: every step's smoothed, and the validation losses as points."""
    rows = read_log(log)
    tokens = np.array([int(row["tokens"]) for row in rows]) / 1e6
    loss = np.array([float(row["loss"]) for row in rows])
    valid = [(int(row["tokens"]) / 1e6, float(row["valid_loss"])) for row in rows if row["valid_loss"]]
    figure = Figure(figsize=(6, 3.5), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.plot(tokens, loss, color="tab:blue", alpha=0.25, linewidth=0.6)
    window = min(50, len(loss))
    smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
    axes.plot(tokens[window - 1 :], smooth, color="tab:blue", label=f"training, mean of {window} steps")
    if valid:
        axes.plot(*zip(*valid, strict=True), "o-", color="tab:red", markersize=3, linewidth=0.8, label="validation")
    axes.set_xlabel("million tokens")
    axes.set_ylabel("loss, nats a token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture)


if __name__ == "__main__":
    matplotlib.use("Agg")
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
