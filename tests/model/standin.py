"""A device that is the CPU: it does at once what it is told, and what was recorded it does again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class StandIn:
    """Counts what a graph runner asks of it."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0
        self.waited = 0

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def host_buffer(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.full((size,), 77, dtype=dtype)  # what nobody has written yet is not zero

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        step()

        def replay() -> None:
            self.replayed += 1
            step()

        return replay

    def mark(self) -> Callable[[], None]:
        def wait() -> None:
            self.waited += 1

        return wait
