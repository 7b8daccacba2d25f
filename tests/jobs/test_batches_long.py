"""A thousand lines of the default model: killed in the middle, none lost, none twice; and what live requests feel."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import httpx
import pytest
from serving import RunningServer, serving
from test_batches_served import check_all_once, client_of, kill, lines_of, submit, wait

LINES = 1000
ASKED = 60
PROMPT = "It was a dark and stormy night, and the wind went up and down the stairs of the old house. " * 4


def first_token_times(server: RunningServer) -> list[float]:
    """Seconds from asking to the first chunk, one stream after the other, each with a prompt of its own."""
    times = []
    with httpx.Client(timeout=60) as client:
        for i in range(ASKED):
            body = {"prompt": f"{i} {time.time_ns()} {PROMPT}", "max_tokens": 8, "seed": i, "stream": True}
            began = time.perf_counter()
            with client.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
                lines = answer.iter_lines()
                assert next(lines).startswith("data:")
                times.append(time.perf_counter() - began)
                assert "data: [DONE]" in list(lines)
            time.sleep(0.05)
    return times


def tell(name: str, times: list[float]) -> float:
    middle = statistics.median(times)
    print(f"{name}: median {1000 * middle:.1f} ms, p90 {1000 * statistics.quantiles(times, n=10)[-1]:.1f} ms")
    return middle


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_thousand_lines_and_a_kill(tmp_path: Path) -> None:
    """The figures it prints are worth writing down only from a machine that does nothing else."""
    flags = ("--data-dir", str(tmp_path / "data"))
    with serving(None, *flags) as server:
        first_token_times(server)  # warm
        quiet = tell("time to first token, quiet", first_token_times(server))
        id_ = submit(client_of(server), lines_of(LINES, 64))
        wait(client_of(server), id_, completed=20)
        began, before = time.monotonic(), client_of(server).batches.retrieve(id_).request_counts.completed
        beside = tell("beside a batch", first_token_times(server))
        now = client_of(server).batches.retrieve(id_)
        assert now.status == "in_progress", "the batch was too short to be measured"
        print(f"lines meanwhile: {(now.request_counts.completed - before) / (time.monotonic() - began):.1f} a second")
        kill(server)
    with serving(None, *flags) as server:
        began = time.monotonic()
        left = LINES - client_of(server).batches.retrieve(id_).request_counts.completed
        check_all_once(client_of(server), wait(client_of(server), id_), LINES)
        print(f"lines alone: {left / (time.monotonic() - began):.1f} a second")
    assert beside < 3 * quiet  # 1.5 where nothing else runs: docs/batches.md
