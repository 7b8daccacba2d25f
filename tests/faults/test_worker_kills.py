"""The worker is killed or stopped at random, twenty times, under 32 mixed streams of the default model.

No stream may fail, or say another byte than in an undisturbed run. RECOVERY_MAX (seconds) is for machines that are busy
with other things, KILLS for those who cannot wait; KILLS_REPORT says where the figures go as JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from threading import Event
from typing import Any

import psutil
import pytest
from mixed import mixed_requests, stream_all, stream_choices
from serving import RunningServer, serving

KILLS = int(os.environ.get("KILLS", "20"))
STREAMS = 32
RECOVERY_MAX = float(os.environ.get("RECOVERY_MAX", "3.0"))


def recovery(server: RunningServer, number: signal.Signals) -> float:
    """Seconds from the signal until a new worker brings tokens."""
    before = server.metrics()["gpt2_worker_restarts_total"]
    os.kill(server.worker_pid, number)
    began = time.monotonic()
    while (now := server.metrics())["gpt2_worker_restarts_total"] == before:
        time.sleep(0.02)
    tokens = now["gpt2_generation_tokens_total"]  # none can come from the dead one any more
    while server.metrics()["gpt2_generation_tokens_total"] == tokens:
        assert time.monotonic() - began < 60
        time.sleep(0.02)
    return time.monotonic() - began


def keep_asking(server: RunningServer, request: dict[str, Any], expected: Any, over: Event) -> int:
    """Returns how many answers it got, all of them right."""
    answers = 0
    while not over.is_set():
        assert stream_choices(server, request) == expected
        answers += 1
    return answers


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_twenty_deaths_under_thirty_two_streams(number: signal.Signals) -> None:
    requests, over, rng = mixed_requests(STREAMS, 120), Event(), random.Random(int(number))
    with serving() as server, ThreadPoolExecutor(STREAMS) as pool:
        expected = stream_all(server, requests)
        asking = [pool.submit(keep_asking, server, *pair, over) for pair in zip(requests, expected, strict=True)]
        try:
            seconds = []
            for _ in range(KILLS):
                time.sleep(rng.uniform(0.0, 2.0))
                seconds.append(recovery(server, number))
                print(f"{seconds[-1]:.2f} s")
        finally:
            over.set()
        answers = sum(each.result() for each in asking)
        restarts = server.metrics()["gpt2_worker_restarts_total"]
    report = {
        "signal": number.name,
        "answers": answers,
        "restarts": restarts,
        "recovery_median": round(median(seconds), 2),
        "recovery_most": round(max(seconds), 2),
        "load_of_machine": psutil.getloadavg()[0],
    }
    print(json.dumps(report))
    if "KILLS_REPORT" in os.environ:
        with Path(os.environ["KILLS_REPORT"]).open("a") as file:
            file.write(json.dumps(report) + "\n")
    assert restarts == KILLS
    assert max(seconds) <= RECOVERY_MAX
