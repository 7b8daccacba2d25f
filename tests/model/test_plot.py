"""The loss curve that is drawn without a plotting library."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from model.training.log import Log, Row
from model.training.plot import BLUE, HEIGHT, PALE, RED, WIDTH, draw_curve


def draw(tmp_path: Path, losses: list[float], valid: dict[int, float]) -> npt.NDArray[np.int64]:
    with Log(tmp_path / "log.csv", 0) as log:
        for step, loss in enumerate(losses, start=1):
            log.write(Row(step, step * 10, float(step), loss, valid.get(step), 0.1))
    draw_curve(tmp_path / "log.csv", tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(np.int64)
    return pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]


def test_a_falling_loss_falls_from_left_to_right(tmp_path: Path) -> None:
    pixels = draw(tmp_path, [5 * math.exp(-i / 40) for i in range(100)], {50: 3.0, 100: 2.0})
    assert pixels.shape == (HEIGHT, WIDTH)
    below = slice(40, HEIGHT)  # the legend stands above
    for colour in (BLUE, PALE, RED):
        rows, columns = np.nonzero(pixels[below] == colour)
        assert rows[columns.argmin()] < rows[columns.argmax()]


@pytest.mark.parametrize("losses", [[], [2.5], [1.0, 1.0], [float("nan"), 2.0], [1e-9, 2e-9], [12000.0] * 3])
def test_any_log_can_be_drawn(tmp_path: Path, losses: list[float]) -> None:
    assert draw(tmp_path, losses, {}).shape == (HEIGHT, WIDTH)
