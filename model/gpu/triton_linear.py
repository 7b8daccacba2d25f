"""Linear layers of a few rows in Triton: the norm before and the activation or residual after ride along.

A decode step of few streams reads weights and does little else: what it costs is launches, and six kernels a layer are
less than eleven. Sums are fp32, and so is everything between the rows that come in and those that go out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.config import Activation

FEW = 32  # rows; for more, a norm computed anew by every program costs more than it saves, and libraries do better
OUT = 16  # outputs of one program: the fewest that tensor cores take
IN = {2: 256, 4: 64}  # inputs read at once, by the size of a number: what fits into registers


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """As linear.activate."""
    if ACTIVATION == "gelu_new":  # 0.5 (1 + tanh u) is the logistic function of 2u
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    return x


@triton.jit(do_not_specialize=["rows"])
def _few_rows(
    x, weight, bias, gain, shift, residual, out, rows, width_in, width_out, epsilon,
    NORM: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr,
):  # fmt: skip
    """One program OUT columns of all rows."""
    row = tl.arange(0, ROWS)
    column = tl.program_id(0) * OUT + tl.arange(0, OUT)
    here = (row < rows)[:, None]
    inside = column < width_out
    source = x + row[:, None] * width_in
    mean = tl.zeros([ROWS], tl.float32)
    spread = tl.zeros([ROWS], tl.float32)
    if NORM:
        for first in range(0, width_in, IN):
            at = first + tl.arange(0, IN)
            mean += tl.sum(tl.load(source + at[None, :], here & (at < width_in)[None, :], 0.0).to(tl.float32), 1)
        mean /= width_in
        for first in range(0, width_in, IN):
            at = first + tl.arange(0, IN)
            some = here & (at < width_in)[None, :]
            off = tl.where(some, tl.load(source + at[None, :], some, 0.0).to(tl.float32) - mean[:, None], 0.0)
            spread += tl.sum(off * off, 1)
        spread = tl.rsqrt(spread / width_in + epsilon)
    sums = tl.zeros([OUT, ROWS], tl.float32)
    for first in range(0, width_in, IN):
        at = first + tl.arange(0, IN)
        known = at < width_in
        lines = weight + column[:, None].to(tl.int64) * width_in
        part = tl.load(lines + at[None, :], inside[:, None] & known[None, :], 0.0)
        value = tl.load(source + at[None, :], here & known[None, :], 0.0)
        if NORM:
            normal = (value.to(tl.float32) - mean[:, None]) * spread[:, None]
            factor = tl.load(gain + at, known, 0.0).to(tl.float32)
            offset = tl.load(shift + at, known, 0.0).to(tl.float32)
            value = (normal * factor[None, :] + offset[None, :]).to(part.dtype)
        sums = tl.dot(part, tl.trans(value), sums, input_precision="ieee")
    sums += tl.load(bias + column, inside, 0.0).to(tl.float32)[:, None]
    sums = _activate(sums, ACTIVATION)
    target = row[None, :] * width_out + column[:, None]
    there = (row < rows)[None, :] & inside[:, None]
    if RESIDUAL:
        sums += tl.load(residual + target, there, 0.0).to(tl.float32)
    tl.store(out + target, sums.to(out.dtype.element_ty), there)


def few_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    norm: tuple[Tensor, Tensor, float] | None = None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(norm(x) Wᵀ + b) + residual, all in one kernel. x: (rows, in), at most FEW; returns (rows, out).

    norm: weight, bias and epsilon of a layer normalisation of x.
    """
    rows, width_in = x.shape
    width_out = weight.shape[0]
    gain, shift, epsilon = (bias, bias, 0.0) if norm is None else norm
    name = None if activation is None else activation.value
    out = torch.empty(rows, width_out, dtype=x.dtype, device=x.device)
    _few_rows[(triton.cdiv(width_out, OUT),)](
        x, weight, bias, gain, shift, out if residual is None else residual, out, rows, width_in, width_out, epsilon,
        NORM=norm is not None, RESIDUAL=residual is not None, ACTIVATION=name,
        ROWS=max(16, triton.next_power_of_2(rows)), OUT=OUT, IN=IN[x.itemsize],
    )  # fmt: skip
    return out
