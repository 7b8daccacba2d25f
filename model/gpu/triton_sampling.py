"""Drawing from the whole distribution in Triton: one kernel for all rows, where PyTorch takes a dozen over much memory.

As picking.py: the inverse of the cumulative distribution in token order, masses summed in float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # logits read at once


@triton.jit
def _draw(logits, tokens, ways, uniforms, temperatures, out, width, WAY: tl.constexpr, TILE: tl.constexpr):
    """One program a row."""
    row = tl.program_id(0)
    token = tl.load(tokens + row).to(tl.int32)
    if tl.load(ways + row) == WAY:
        line = logits + row.to(tl.int64) * width
        temperature = tl.load(temperatures + row).to(tl.float32)
        highest = -float("inf")
        for first in range(0, width, TILE):
            at = first + tl.arange(0, TILE)
            highest = tl.maximum(highest, tl.max(tl.load(line + at, at < width, -float("inf")), 0))
        highest = highest / temperature
        total = tl.zeros([], tl.float64)
        for first in range(0, width, TILE):
            at = first + tl.arange(0, TILE)
            weight = tl.exp(tl.load(line + at, at < width, -float("inf")) / temperature - highest)
            total += tl.sum(weight.to(tl.float64), 0)
        threshold = tl.load(uniforms + row) * total
        token = 0  # how many masses do not exceed it
        before = tl.zeros([], tl.float64)
        for first in range(0, width, TILE):
            at = first + tl.arange(0, TILE)
            weight = tl.exp(tl.load(line + at, at < width, -float("inf")) / temperature - highest).to(tl.float64)
            mass = before + tl.cumsum(weight, 0)
            token += tl.sum(((mass <= threshold) & (at < width)).to(tl.int32), 0)
            before += tl.sum(weight, 0)
    tl.store(out + row, token)


def draw(logits: Tensor, tokens: Tensor, ways: Tensor, uniforms: Tensor, temperatures: Tensor, way: int) -> Tensor:
    """Of rows whose way is this one, the token that is drawn; of others, what they have. Returns (rows,) int32.

    logits: (rows, vocab) fp32; tokens: (rows,); ways, uniforms, temperatures: (rows, 1) float64. All contiguous.
    """
    rows, width = logits.shape
    out = torch.empty(rows, dtype=torch.int32, device=logits.device)
    _draw[(rows,)](logits, tokens, ways, uniforms, temperatures, out, width, WAY=way, TILE=TILE, num_warps=8)
    return out
