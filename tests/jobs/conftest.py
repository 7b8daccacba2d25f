"""A server on a scripted engine that keeps files in a directory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from asking import Api, make_api
from outside import environment

from server.jobs.store import Store, open_store

__all__ = ["environment"]

FILE_BYTES = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = open_store(tmp_path / "data", None, FILE_BYTES)
    yield store
    store.close()


@pytest.fixture
def api(store: Store) -> Api:
    return make_api(store=store)
