"""Row S1: hours of mixed load with aborts, killed workers and bad input; what must not grow, does not.

SOAK_MINUTES says how long (5), SOAK_REPORT where the figures go as JSON. Of two workers one is killed now and then, and
the other lives through it all, so that its memory can be watched.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx
import psutil
import pytest
from mixed import KINDS
from serving import RunningServer, serving

MINUTES = float(os.environ.get("SOAK_MINUTES", "5"))
WARM_UP = 0.25  # of the time
SAMPLE_SECONDS = 5.0
KILL_SECONDS = 45.0  # on average
CLIENTS = 3
THINK = 0.25  # of what the answer took: a closed loop at 80 %
SLOPE_MAX = 1.0  # MiB an hour
REQUESTS = [
    {"prompt": f"{word} said that", "max_tokens": 20 + 15 * i, **KINDS[i % len(KINDS)]}
    for i, word in enumerate(["She", "He", "They", "We", "Nobody", "Everyone", "Somebody", "Mother"])
]
BAD: list[Any] = [
    b"{",
    b'{"prompt": "\\ud800"}',
    b"[" * 5000,
    {"prompt": "a", "temperature": -1},
    {"prompt": [1 << 40]},
    {"prompt": "a", "max_tokens": 5000},
    {"model": "no-such-model", "prompt": "a"},
    {"prompt": "a", "guided_regex": "(" * 50},
]


@dataclass
class Tally:
    answered: int = 0
    wrong: list[str] = field(default_factory=list)  # what should not have happened
    aborted: int = 0
    refused: int = 0  # bad input
    kills: int = 0
    seconds: list[tuple[float, float]] = field(default_factory=list)  # (when, how long) of whole answers


@dataclass
class Watched:
    """One process over time."""

    process: psutil.Process
    samples: list[tuple[float, float, int, int]] = field(default_factory=list)  # seconds, MiB, descriptors, threads

    def sample(self, now: float) -> None:
        self.samples.append((now, _private_mib(self.process.pid), self.process.num_fds(), self.process.num_threads()))

    def report(self) -> dict[str, float]:
        steady = self.samples[int(len(self.samples) * WARM_UP) :]
        half = len(steady) // 2
        usual = [[median(row[i] for row in rows) for rows in (steady[:half], steady[half:])] for i in (2, 3)]
        return {
            "mib": steady[-1][1],
            "mib_an_hour": _slope([row[0] for row in steady], [row[1] for row in steady]) * 3600,
            "descriptors_gained": usual[0][1] - usual[0][0],
            "threads_gained": usual[1][1] - usual[1][0],
        }


def _private_mib(pid: int) -> float:
    """RssAnon + VmSwap: what the process has of its own, swapped out or not."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "VmSwap"))) / 1024


def _slope(x: list[float], y: list[float]) -> float:
    """Of the line of least squares."""
    x0, y0 = sum(x) / len(x), sum(y) / len(y)
    return sum((a - x0) * (b - y0) for a, b in zip(x, y, strict=True)) / sum((a - x0) ** 2 for a in x)


async def _client(url: str, expected: list[Any], tally: Tally, ends: float, rng: random.Random) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        while time.monotonic() < ends:
            began = time.monotonic()
            kind = rng.random()
            if kind < 0.1:
                await _bad(http, tally, rng)
            elif kind < 0.3:
                await _abort(http, tally, rng)
            else:
                i = rng.randrange(len(REQUESTS))
                await _whole(http, REQUESTS[i], expected[i], tally)
            await asyncio.sleep(THINK * (time.monotonic() - began))


async def _bad(http: httpx.AsyncClient, tally: Tally, rng: random.Random) -> None:
    bad = rng.choice(BAD)
    body = bad if isinstance(bad, bytes) else json.dumps(bad).encode()
    answer = await http.post("/v1/completions", content=body)
    tally.refused += 1
    if not 400 <= answer.status_code < 500:
        tally.wrong.append(f"bad input was answered {answer.status_code}")


async def _abort(http: httpx.AsyncClient, tally: Tally, rng: random.Random) -> None:
    body = {"prompt": "Once", "max_tokens": 300, "n": 2, "stream": True, "ignore_eos": True}
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.aiter_lines()
        for _ in range(rng.randrange(40)):
            await anext(lines)
    tally.aborted += 1


async def _whole(http: httpx.AsyncClient, request: dict[str, Any], expected: Any, tally: Tally) -> None:
    began = time.monotonic()
    answer = await http.post("/v1/completions", json=request)
    tally.answered += 1
    tally.seconds.append((began, time.monotonic() - began))
    if answer.status_code != 200:
        tally.wrong.append(f"a good request was answered {answer.status_code}")
    elif answer.json()["choices"] != expected:
        tally.wrong.append(f"another answer to {request}")


async def _kill(victims: Callable[[], list[psutil.Process]], tally: Tally, rng: random.Random) -> None:
    while True:
        await asyncio.sleep(rng.expovariate(1 / KILL_SECONDS))
        for victim in victims():
            victim.send_signal(rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP]))
            tally.kills += 1


async def _watch(watched: dict[str, Watched]) -> None:
    while True:
        for each in watched.values():
            each.sample(time.monotonic())
        await asyncio.sleep(SAMPLE_SECONDS)


def _workers(server: RunningServer) -> list[psutil.Process]:
    children = psutil.Process(server.process.pid).children()
    return [each for each in children if "server.worker" in " ".join(each.cmdline())]


async def _soak(server: RunningServer, expected: list[Any], watched: dict[str, Watched]) -> Tally:
    tally, rng, ends = Tally(), random.Random(1), time.monotonic() + 60 * MINUTES
    survivor = watched["worker"].process

    def victims() -> list[psutil.Process]:
        return [each for each in _workers(server) if each != survivor]

    background = [asyncio.create_task(_kill(victims, tally, rng)), asyncio.create_task(_watch(watched))]
    clients = [_client(server.url, expected, tally, ends, random.Random(i)) for i in range(CLIENTS)]
    await asyncio.gather(*clients)
    for task in background:
        task.cancel()
    results = await asyncio.gather(*background, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results), results
    return tally


@pytest.mark.slow
@pytest.mark.timeout(60 * MINUTES + 300)
def test_s1_soak() -> None:
    flags = ("--workers", "2", "--threads", "1", "--kv-cache-gib", "0.1")  # small, so that all of it is in use soon
    with serving(None, *flags) as server:
        expected = [server.complete(**request)["choices"] for request in REQUESTS]
        server.complete(prompt="a", guided_regex="a", max_tokens=4)  # starts the checker
        deadline = time.monotonic() + 60
        while len(_workers(server)) < 2:
            assert time.monotonic() < deadline
        children = psutil.Process(server.process.pid).children()
        (checker,) = (each for each in children if "checker" in " ".join(each.cmdline()))
        watched = {
            "api": Watched(psutil.Process(server.process.pid)),
            "worker": Watched(_workers(server)[0]),
            "checker": Watched(checker),
        }
        tally = asyncio.run(_soak(server, expected, watched))
        server.check_identities()
        books = server.metrics()
    report = _report(tally, watched, books)
    print(json.dumps(report, indent=1))
    if "SOAK_REPORT" in os.environ:
        Path(os.environ["SOAK_REPORT"]).write_text(json.dumps(report, indent=1))
    assert not tally.wrong
    assert min(tally.answered, tally.aborted, tally.refused, tally.kills) > 0
    for each in watched.values():
        figures = each.report()
        assert figures["descriptors_gained"] <= 2
        assert figures["threads_gained"] <= 0
        assert MINUTES < 30 or figures["mib_an_hour"] < SLOPE_MAX  # a shorter time says nothing of an hour


def _report(tally: Tally, watched: dict[str, Watched], books: dict[str, float]) -> dict[str, Any]:
    middle = (tally.seconds[0][0] + tally.seconds[-1][0]) / 2
    halves = [[took for when, took in tally.seconds if (when < middle) == first] for first in (True, False)]
    return {
        "minutes": MINUTES,
        "load_of_machine": psutil.getloadavg()[2],
        "answered": tally.answered,
        "wrong": tally.wrong,
        "aborted": tally.aborted,
        "refused": tally.refused,
        "kills": tally.kills,
        "restarts": books["gpt2_worker_restarts_total"],
        "generation_tokens": books["gpt2_generation_tokens_total"],
        "p50_of_halves": [quantiles(half, n=100)[49] for half in halves],
        "p99_of_halves": [quantiles(half, n=100)[98] for half in halves],
        "processes": {name: each.report() for name, each in watched.items()},
    }
