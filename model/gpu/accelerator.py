"""What the GPU runner asks of a device beside arithmetic. cuda.py answers for real; the tests have a stand-in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Accelerator(Protocol):
    """Work is queued in order and done later; nothing here waits but what `mark` returns."""

    @property
    def device(self) -> torch.device: ...

    def host_buffer(self, size: int, dtype: torch.dtype) -> Tensor:
        """(size,) of host memory that the device copies from and to while the host goes on."""
        ...

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """Record what `step` queues, which always reads and writes the same tensors; returns what queues it again.

        Runs `step` at least once.
        """
        ...

    def mark(self) -> Callable[[], None]:
        """Returns what waits until everything queued so far is done."""
        ...
