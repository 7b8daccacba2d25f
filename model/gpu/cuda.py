"""Every call of torch.cuda in one place: which devices there are, what they can do, and CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from model.errors import DeviceError

OutOfMemoryError = torch.cuda.OutOfMemoryError


def available() -> bool:
    return torch.cuda.is_available()


def open_device(name: str) -> torch.device:
    """`cuda` or `cuda:N`. Raises DeviceError."""
    if not available():
        reason = "this PyTorch was built without CUDA" if torch.version.cuda is None else "no driver or no device"
        raise DeviceError(f"device {name} was asked for, but there is none for PyTorch {torch.__version__}: {reason}")
    count = torch.cuda.device_count()
    device = torch.device(name if ":" in name else f"{name}:0")
    if device.index >= count:
        raise DeviceError(f"device {name} was asked for, but the last one is cuda:{count - 1}")
    try:
        torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except RuntimeError as error:
        raise DeviceError(f"device {name} cannot be used") from error
    return device


def has_bfloat16() -> bool:
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def describe(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def pool_bytes(device: torch.device, utilization: float) -> int:
    """What is left for the KV cache where `utilization` of the whole memory may be used by anybody. May be negative."""
    free, total = torch.cuda.mem_get_info(device)
    return int(total * utilization) - (total - free)


def release() -> None:
    """Give freed memory back to the device, for others."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class Cuda:
    """An Accelerator. All work goes to the device's current stream; graphs share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    @property
    def device(self) -> torch.device:
        return self._device

    def host_buffer(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype, pin_memory=True)

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        aside = torch.cuda.Stream(self._device)
        aside.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(aside):  # lazily made handles and workspaces must exist before the recording
            step()
        torch.cuda.current_stream(self._device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            step()
        return graph.replay

    def mark(self) -> Callable[[], None]:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event.synchronize
