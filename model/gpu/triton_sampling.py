"""Drawing from the whole distribution in Triton: one kernel for all rows, where PyTorch takes a dozen over much memory.

As picking.py: weights rounded to grains, and the first token at which their running sum exceeds uniform * sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.picking import coarse

TILE = 4096  # logits read at once


@triton.jit
def _grains(line, at, width, highest, inverse, coarse):
    """The masses of the tokens `at`, in float64."""
    weight = tl.exp((tl.load(line + at, at < width, -float("inf")) - highest) * inverse)
    return weight.to(tl.float64) + coarse - coarse


@triton.jit
def _draw(logits, tokens, ways, uniforms, temperatures, out, width, coarse, WAY: tl.constexpr, TILE: tl.constexpr):
    """One program a row."""
    row = tl.program_id(0)
    token = tl.load(tokens + row).to(tl.int32)
    if tl.load(ways + row) == WAY:
        line = logits + row.to(tl.int64) * width
        inverse = 1.0 / tl.load(temperatures + row).to(tl.float32)
        highest = -float("inf")
        for first in range(0, width, TILE):
            at = first + tl.arange(0, TILE)
            highest = tl.maximum(highest, tl.max(tl.load(line + at, at < width, -float("inf")), 0))
        total = tl.zeros([], tl.float64)
        for first in range(0, width, TILE):
            total += tl.sum(_grains(line, first + tl.arange(0, TILE), width, highest, inverse, coarse), 0)
        threshold = tl.load(uniforms + row) * total
        token = 0  # how many running sums do not exceed it
        before = tl.zeros([], tl.float64)
        for first in range(0, width, TILE):
            at = first + tl.arange(0, TILE)
            mass = _grains(line, at, width, highest, inverse, coarse)
            token += tl.sum(((before + tl.cumsum(mass, 0) <= threshold) & (at < width)).to(tl.int32), 0)
            before += tl.sum(mass, 0)
    tl.store(out + row, token)


def draw(logits: Tensor, tokens: Tensor, ways: Tensor, uniforms: Tensor, temperatures: Tensor, way: int) -> Tensor:
    """Of rows whose way is this one, the token that is drawn; of others, what they have. Returns (rows,) int32.

    logits: (rows, vocab) fp32; tokens: (rows,); ways, uniforms, temperatures: (rows, 1) float64. All contiguous.
    """
    rows, width = logits.shape
    large = coarse(width)
    out = torch.empty(rows, dtype=torch.int32, device=logits.device)
    _draw[(rows,)](logits, tokens, ways, uniforms, temperatures, out, width, large, WAY=way, TILE=TILE, num_warps=8)
    return out
