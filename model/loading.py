"""From a checkpoint directory and a device to a network ready to run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from model.config import read_config
from model.errors import DeviceError
from model.gpt2 import GPT2
from model.gpu import cuda
from model.kernels.layers import Storage
from model.kernels.library import KernelsUnavailableError, load
from model.kernels.ops import KernelOps
from model.memory import give_back
from model.ops import Ops, TorchOps
from model.weights import Progress, as_stored, read_weights

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N`. Raises DeviceError."""
    if name == "cpu" or (name == "auto" and not cuda.available()):
        return torch.device("cpu")
    return cuda.open_device("cuda" if name == "auto" else name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is float32 on a CPU and bfloat16 on a GPU that has it. Raises DeviceError.

    On a CPU float16 is how weights are kept; arithmetic stays fp32.
    """
    if device.type == "cpu":
        if name == "bfloat16":
            raise DeviceError("dtype bfloat16 runs on a GPU; a CPU serves float32 and float16")
        return torch.float32 if name == "auto" else DTYPES[name]
    if name == "bfloat16" and not cuda.has_bfloat16():
        raise DeviceError(f"{cuda.describe(device)} has no bfloat16; float16 and float32 run there")
    if name == "auto":
        return torch.bfloat16 if cuda.has_bfloat16() else torch.float16
    return DTYPES[name]


def choose_ops(
    device: torch.device,
    dtype: torch.dtype,
    kernels: str,
    quantization: str | None = None,
    *,
    deterministic: bool = False,
) -> Ops:
    """On a CPU the C kernels where they were built (`auto`, or a level by name), else and for `off` PyTorch.

    deterministic: rows do not feel their neighbours on a GPU either; on a CPU they never do.
    Raises DeviceError for a level that this machine cannot run, and for weights that PyTorch does not keep that way.
    """
    if device.type != "cpu":
        if quantization is not None:
            raise DeviceError(f"quantization {quantization} runs on a CPU")
        from model.gpu import ops as gpu  # noqa: PLC0415  Triton takes a while to import, and a CPU needs none of it

        return gpu.choose_ops(device, dtype, deterministic=deterministic)
    storage = Storage.FP16 if dtype == torch.float16 else Storage.FP32
    storage = storage if quantization is None else Storage[quantization.upper()]
    if kernels == "off":
        return _without_kernels(device, storage, "they are off")
    try:
        return KernelOps(load(None if kernels == "auto" else kernels), storage)
    except KernelsUnavailableError as error:
        if kernels != "auto":
            raise DeviceError(f"C kernels at level {kernels}: {error}") from error
        ops = _without_kernels(device, storage, str(error))
        log.warning("PyTorch computes, at less than half the speed of the C kernels", extra={"reason": str(error)})
        return ops


def _without_kernels(device: torch.device, storage: Storage, reason: str) -> Ops:
    if storage is not Storage.FP32:
        raise DeviceError(f"on a CPU, {storage.name.lower()} weights need the C kernels: {reason}")
    return TorchOps(device, torch.float32)


def choose_kv_dtype(name: str, ops: Ops) -> torch.dtype:
    """`auto` is what goes with the weights. Raises DeviceError."""
    if name == "auto":
        return ops.kv_dtypes[0]
    if DTYPES[name] not in ops.kv_dtypes:
        raise DeviceError(f"a KV cache of {name} does not go with {ops.describe()}")
    return DTYPES[name]


def load_model(
    directory: Path,
    device: torch.device,
    dtype: torch.dtype,
    kernels: str = "auto",
    quantization: str | None = None,
    *,
    deterministic: bool = False,
    head_tokens: int | None = None,
    eos_token_ids: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> tuple[GPT2, Ops]:
    """head_tokens: as GPT2's. eos_token_ids: in place of those that the files name.

    Raises ConfigError, WeightsError or DeviceError.
    """
    config = read_config(directory)
    if eos_token_ids is not None:
        config = replace(config, eos_token_ids=tuple(eos_token_ids))
    ops = choose_ops(device, dtype, kernels, quantization, deterministic=deterministic)
    try:
        with torch.inference_mode():
            weights = read_weights(directory, config, progress)
            network = GPT2(as_stored(config, weights), weights, ops, head_tokens)
    except cuda.OutOfMemoryError as error:
        raise DeviceError(f"{cuda.describe(device)} has too little free memory for the weights") from error
    give_back()
    return network, ops
