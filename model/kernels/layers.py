"""Layers made of the C kernels, each callable by itself and as a step of a longer run."""

from __future__ import annotations

import ctypes
from enum import IntEnum

import torch
from torch import Tensor

from model.batch import Batch
from model.config import Activation
from model.kernels import structs
from model.kernels.library import Kernels
from model.memory import ReusedRows

PADDING = 32  # MAX_PANEL in kernels.h


class Storage(IntEnum):
    """How a linear layer keeps its weights. Arithmetic is fp32 but for INT8, whose products are integers."""

    FP32 = 0
    FP16 = 1
    INT8 = 2


_ACTIVATIONS = {
    None: 0,
    Activation.GELU_TANH: 1,
    Activation.GELU_ERF: 2,
    Activation.RELU: 3,
    Activation.SILU: 4,
}


class PackedLinear:
    """`model.linear.Linear`, its weights packed for one level."""

    def __init__(
        self,
        kernels: Kernels,
        weight: Tensor,
        bias: Tensor | None,
        storage: Storage = Storage.FP32,
        *,
        reuse: bool = False,
    ) -> None:
        """weight: (out, in) in any strides, bias: (out,). reuse: results are good until the next call."""
        weight = weight.float()
        self.outputs, self.inputs = weight.shape
        assert bias is None or bias.shape == (self.outputs,)
        self._reused = ReusedRows(self.outputs) if reuse else None
        self._kernels = kernels
        self._edges = torch.zeros(2, -(-self.outputs // PADDING) * PADDING)  # bias, scale
        if bias is not None:
            self._edges[0, : self.outputs] = bias
        edges = [edge.data_ptr() for edge in self._edges]
        self._linear = structs.Linear(self.inputs, self.outputs, storage, None, *edges)
        self._panels = kernels.memory.zeros(kernels.panels_bytes(self._linear))
        self._linear.panels = self._panels.data_ptr()
        call = structs.PackCall(ctypes.pointer(self._linear), weight.data_ptr(), *weight.stride())
        kernels.run_one(structs.Op.PACK, call, structs.BatchStruct())
        self._call = structs.LinearCall(ctypes.pointer(self._linear))
        self._steps = structs.steps([(structs.Op.LINEAR, self._call)])
        self._batch = structs.BatchStruct()

    def __call__(self, x: Tensor, *, activation: Activation | None = None, residual: Tensor | None = None) -> Tensor:
        """activation(x Wᵀ + b), plus the residual. x: (rows, in); residual: (rows, out); returns (rows, out)."""
        self._check(x, residual)
        x = structs.ready(x)
        residual = None if residual is None else structs.ready(residual)
        rows = x.shape[0]
        out = torch.empty(rows, self.outputs) if self._reused is None else self._reused(rows)
        call = self._call
        call.x = x.data_ptr()
        call.residual = None if residual is None else residual.data_ptr()
        call.y = out.data_ptr()
        call.act = _ACTIVATIONS[activation]
        self._batch.rows = rows
        self._kernels.run(self._steps, self._batch)
        return out

    def _check(self, x: Tensor, residual: Tensor | None) -> None:
        """C reads as many numbers as the layer has inputs and outputs, whatever the tensors hold."""
        assert x.shape == (len(x), self.inputs)
        assert residual is None or residual.shape == (len(x), self.outputs)

    @property
    def pointer(self) -> ctypes._Pointer[structs.Linear]:
        """Good while this lives."""
        return ctypes.pointer(self._linear)

    def call(
        self, x: Tensor, out: Tensor, *, activation: Activation | None = None, residual: Tensor | None = None
    ) -> structs.LinearCall:
        self._check(x, residual)
        assert out.shape == (len(x), self.outputs)
        add = None if residual is None else residual.data_ptr()
        return structs.LinearCall(self.pointer, x.data_ptr(), add, out.data_ptr(), _ACTIVATIONS[activation])


class KernelNorm:
    """`model.ops.Norm`."""

    def __init__(self, kernels: Kernels, weight: Tensor, bias: Tensor, epsilon: float) -> None:
        """weight, bias: (width,)."""
        self._kernels = kernels
        assert weight.shape == bias.shape == (len(weight),)
        self._weight, self._bias = structs.ready(weight), structs.ready(bias)
        self._epsilon = epsilon
        self._call = self.call(self._weight, self._weight)
        self._steps = structs.steps([(structs.Op.NORM, self._call)])
        self._batch = structs.BatchStruct()

    def __call__(self, x: Tensor) -> Tensor:
        """x: (rows, width)."""
        assert x.shape == (len(x), len(self._weight))
        x = structs.ready(x)
        out = torch.empty_like(x)
        self._call.x, self._call.y = x.data_ptr(), out.data_ptr()
        self._batch.rows = x.shape[0]
        self._kernels.run(self._steps, self._batch)
        return out

    def call(self, x: Tensor, out: Tensor) -> structs.NormCall:
        pointers = [tensor.data_ptr() for tensor in (x, self._weight, self._bias, out)]
        return structs.NormCall(*pointers, len(self._weight), self._epsilon)


class KernelEmbedding:
    """`model.ops.Embedding`. The tokens' vectors are read out of a packed layer, so that a tied head is held once."""

    def __init__(self, kernels: Kernels, tokens: PackedLinear, positions: Tensor) -> None:
        """tokens: (vocab, width), positions: (n_positions, width)."""
        self._kernels = kernels
        assert positions.shape == (len(positions), tokens.inputs)
        self._tokens, self._positions = tokens, structs.ready(positions)

    @property
    def width(self) -> int:
        return self._tokens.inputs

    def __call__(self, batch: Batch) -> Tensor:
        """(rows, width)."""
        out = torch.empty(len(batch.tokens), self.width)
        self._kernels.run_one(structs.Op.EMBED, self.call(out), structs.batch(batch))
        return out

    def call(self, out: Tensor) -> structs.EmbedCall:
        return structs.EmbedCall(self._tokens.pointer, self._positions.data_ptr(), out.data_ptr(), self.width)
