from __future__ import annotations

from collections.abc import Iterator

import pytest
from asking import Api, make_api


@pytest.fixture
def api() -> Iterator[Api]:
    """One server for a test; when it is over, every call it made has been closed."""
    api = make_api()
    yield api
    assert sorted(set(api.engine.closed)) == sorted(request.id for request in api.engine.requests)
    assert api.client.get("/load").json() == {"server_load": 0}
