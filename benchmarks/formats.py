"""The formats a CPU keeps weights in, and networks in them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from model.gpt2 import GPT2
from model.kernels.ops import KernelOps
from model.loading import choose_kv_dtype, load_model

FORMATS: dict[str, tuple[torch.dtype, str | None]] = {
    "fp32": (torch.float32, None),
    "fp16": (torch.float16, None),
    "int8": (torch.float32, "int8"),
}
FLAGS: dict[str, list[str]] = {"fp32": [], "fp16": ["--dtype", "float16"], "int8": ["--quantization", "int8"]}


@dataclass(frozen=True, slots=True)
class Loaded:
    network: GPT2
    ops: KernelOps
    kv_dtype: torch.dtype


def load(directory: Path, name: str, threads: int) -> Loaded:
    """As a worker does it: with the C kernels, which have threads of their own."""
    dtype, quantization = FORMATS[name]
    torch.set_num_threads(threads)
    network, ops = load_model(directory, torch.device("cpu"), dtype, quantization=quantization)
    torch.set_num_threads(1)
    assert isinstance(ops, KernelOps)
    return Loaded(network, ops, choose_kv_dtype("auto", ops))
