"""Training stalls nobody: streams keep most of their speed while a job runs."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from serving import serving

from benchmarks.training import compare

TRAIN = Path(__file__).parents[2] / "examples" / "harbour-log" / "train.jsonl"
KEPT = 0.6


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("streams", [1, 8])
def test_streams_keep_most_of_their_speed_beside_a_job(tmp_path: Path, streams: int) -> None:
    with serving(None, "--data-dir", str(tmp_path)) as server:
        found = asyncio.run(compare(server.url, TRAIN, streams, 128, 2, 12))
    print(found)
    assert found["kept"] >= KEPT
