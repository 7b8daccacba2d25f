from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from outside import environment, node_modules
from serving import RunningServer, serving

__all__ = ["environment", "node_modules"]


@pytest.fixture(scope="package")
def server(tiny: Path) -> Iterator[RunningServer]:
    """One server for all clients."""
    with serving(tiny, "--threads", "1") as running:
        yield running
