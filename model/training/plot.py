"""Draws a run's log as a PNG with numpy and zlib alone, so that training needs no plotting library."""

from __future__ import annotations

import math
import struct
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from model.training.checkpoint import write_atomically
from model.training.log import read_log

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 28, 40  # margins
WHITE, GRID, INK, BLUE, PALE, RED = 0xFFFFFF, 0xE4E4E4, 0x303030, 0x1F77B4, 0xBAD6E9, 0xD62728
GLYPHS = {  # 3 x 5 dots, a row an octal digit
    "0": 0o75557, "1": 0o26227, "2": 0o71747, "3": 0o71717, "4": 0o55711, "5": 0o74717, "6": 0o74757, "7": 0o71111,
    "8": 0o75757, "9": 0o75717, ".": 0o00002, "k": 0o45655, "M": 0o57755, " ": 0, "l": 0o44447, "o": 0o00757,
    "s": 0o07636, "t": 0o27223, "e": 0o07747, "p": 0o07574, "r": 0o06444, "a": 0o07157, "i": 0o20222, "n": 0o06555,
    "v": 0o05552, "d": 0o11757,
}  # fmt: skip

Canvas = npt.NDArray[np.uint32]
Points = list[tuple[float, float]]


def draw_curve(log: Path, picture: Path) -> None:
    """Loss over steps: each step's pale, their running mean blue, validation red."""
    rows = read_log(log)
    loss = [(float(row["step"]), float(row["loss"])) for row in rows]
    valid = [(float(row["step"]), float(row["valid_loss"])) for row in rows if row["valid_loss"]]
    write_atomically(picture, png(_chart(loss, valid)))


def png(canvas: Canvas) -> bytes:
    """canvas: (height, width) of 0xRRGGBB."""
    height, width = canvas.shape
    colours = np.stack([canvas >> 16, canvas >> 8, canvas], axis=2).astype(np.uint8)  # (height, width, 3)
    raw = np.concatenate([np.zeros((height, 1), np.uint8), colours.reshape(height, -1)], axis=1).tobytes()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(raw, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def _chart(loss: Points, valid: Points) -> Canvas:
    canvas: Canvas = np.full((HEIGHT, WIDTH), WHITE, dtype=np.uint32)
    values = [y for _, y in loss + valid if math.isfinite(y)] or [0.0]
    low, high = min(values), max(values)
    pad = (high - low) * 0.05 or 0.5
    last = max((x for x, _ in loss), default=1.0)
    area = (0.0, max(last, 1.0), low - pad, high + pad)
    _axes(canvas, area)
    _line(canvas, _place(loss, area), PALE)
    _line(canvas, _place(_smooth(loss), area), BLUE, thick=2)
    _line(canvas, _place(valid, area), RED, thick=2)
    for x, y in _place(valid, area):
        canvas[max(y - 2, 0) : y + 4, max(x - 2, 0) : x + 4] = RED
    _text(canvas, LEFT, 8, "loss", INK)
    _text(canvas, LEFT + 60, 8, "train", BLUE)
    if valid:
        _text(canvas, LEFT + 130, 8, "valid", RED)
    _text(canvas, WIDTH - RIGHT - 36, HEIGHT - 14, "steps", INK)
    return canvas


def _smooth(points: Points) -> Points:
    window = max(1, len(points) // 20)
    sums = np.cumsum([0.0, *(y for _, y in points)])
    firsts = [max(0, i + 1 - window) for i in range(len(points))]
    means = [(sums[i + 1] - sums[first]) / (i + 1 - first) for i, first in enumerate(firsts)]
    return [(x, float(mean)) for (x, _), mean in zip(points, means, strict=True)]


def _place(points: Points, area: tuple[float, float, float, float]) -> list[tuple[int, int]]:
    left, right, low, high = area
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    return [
        (LEFT + round((x - left) / (right - left) * width), TOP + round((high - y) / (high - low) * height))
        for x, y in points
        if math.isfinite(y)
    ]


def _axes(canvas: Canvas, area: tuple[float, float, float, float]) -> None:
    left, right, low, high = area
    for value in _ticks(low, high):
        ((_, y),) = _place([(left, value)], area)
        canvas[y, LEFT : WIDTH - RIGHT] = GRID
        label = f"{value:.3g}"
        _text(canvas, LEFT - 8 - 8 * len(label), y - 5, label, INK)
    for value in _ticks(left, right):
        ((x, _),) = _place([(value, low)], area)
        canvas[TOP : HEIGHT - BOTTOM, x] = GRID
        label = f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}"
        _text(canvas, x - 4 * len(label), HEIGHT - BOTTOM + 8, label, INK)
    canvas[TOP : HEIGHT - BOTTOM, LEFT] = INK
    canvas[HEIGHT - BOTTOM, LEFT : WIDTH - RIGHT] = INK


def _ticks(low: float, high: float) -> list[float]:
    """Four to ten round numbers between."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step)
    return [round(i * step, 12) for i in range(first, math.floor(high / step) + 1)]


def _line(canvas: Canvas, points: list[tuple[int, int]], colour: int, thick: int = 1) -> None:
    for (x0, y0), (x1, y1) in pairwise(points):
        count = max(abs(x1 - x0), abs(y1 - y0)) + 1
        xs, ys = np.linspace(x0, x1, count).round().astype(int), np.linspace(y0, y1, count).round().astype(int)
        for shift in range(thick):
            canvas[np.clip(ys + shift, 0, HEIGHT - 1), xs] = colour


def _text(canvas: Canvas, x: int, y: int, text: str, colour: int) -> None:
    for i, character in enumerate(text):
        bits = GLYPHS.get(character, 0)
        for dot in range(15):
            if bits >> (14 - dot) & 1:
                top, left = y + dot // 3 * 2, x + 8 * i + dot % 3 * 2
                canvas[max(top, 0) : top + 2, max(left, 0) : left + 2] = colour
