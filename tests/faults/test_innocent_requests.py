"""Workers killed one by one and all at once, busy and idle, whatever they compute: no request fails or changes a byte,
and the service goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import psutil
import pytest
import torch
from mixed import KINDS, until
from serving import RunningServer, serving

from model.adapter_config import SITES, AdapterConfig
from model.training.checkpoint import load_network
from model.training.lora import add_lora, export_lora, matrices_of

KILLS = int(os.environ.get("KILLS", "200"))
GAP = 2.0  # seconds between two kills, on the average
POINT = {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"enum": ["a", "b"]}}, "required": ["x", "y"]}
SPECIAL: list[dict[str, Any]] = [
    {"guided_regex": "([a-z]{3,9} ){5}[0-9]{4}", "ignore_eos": False, "seed": 19},
    {"json_schema": POINT, "max_tokens": 60, "ignore_eos": False, "seed": 20},
    {"use_beam_search": True, "best_of": 3, "n": 2, "max_tokens": 20},
    {"model": "one", "seed": 21},
    {"model": "two", "seed": 22, "n": 2},
    {"n": 8, "seed": 23, "max_tokens": 60},
]


@pytest.fixture(scope="module")
def adapters(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    made = []
    for seed, name in enumerate(("one", "two")):
        network = load_network(tiny)
        config = AdapterConfig(rank=4, alpha=8.0, targets=SITES, base="default")
        generator = torch.Generator().manual_seed(seed)
        add_lora(network, config, generator)
        with torch.no_grad():
            for pair in matrices_of(network).values():
                pair.b.normal_(0.0, 0.15, generator=generator)
        export_lora(network, config, tmp_path_factory.mktemp(name))
        made.append(f"{name}={tmp_path_factory.getbasetemp() / (name + '0')}")
    return made


def requests() -> list[dict[str, Any]]:
    """Of every kind; prompts repeat, so some tokens are guessed right."""
    return [
        {"prompt": f"{i} one two three one two three", "max_tokens": 150, "ignore_eos": True, **kind}
        for i, kind in enumerate([*KINDS[:4], *SPECIAL])
    ]


def choices_of(server: RunningServer, request: dict[str, Any], stream: bool) -> list[Any]:
    """What each choice says, and how it ends."""
    if not stream:
        answer = server.complete(**request)["choices"]
        return [(choice["text"], choice["finish_reason"]) for choice in answer]
    texts, ends = [""] * request.get("n", 1), [None] * request.get("n", 1)
    for chunk in server.stream(**request):
        for piece in chunk["choices"]:
            texts[piece["index"]] += piece["text"]
            ends[piece["index"]] = piece["finish_reason"] or ends[piece["index"]]
    return list(zip(texts, ends, strict=True))


def workers_of(server: RunningServer) -> list[int]:
    """Of those that are being started, too."""
    found = []
    for child in psutil.Process(server.process.pid).children():
        with suppress(psutil.Error):  # it ends just now
            if "server.worker" in child.cmdline():
                found.append(child.pid)
    return found


@dataclass
class Clients:
    """They ask the same again and again, and hold every answer against the first."""

    server: RunningServer
    asked: list[dict[str, Any]] = field(default_factory=requests)
    busy: Event = field(default_factory=Event)  # or they wait
    over: bool = False
    answers: int = 0

    def __post_init__(self) -> None:
        self._expected = [choices_of(self.server, request, stream=False) for request in self.asked]

    def keep_asking(self, place: int) -> None:
        turn = 0
        while self.busy.wait() and not self.over:
            turn += 1
            said = choices_of(self.server, self.asked[place], stream=(place + turn) % 2 == 0)
            assert said == self._expected[place], self.asked[place]
            self.answers += 1

    def leave(self) -> None:
        """One that is gone half-way through its eight choices."""
        body = {"prompt": "left", "n": 8, "max_tokens": 900, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{self.server.url}/v1/completions", json=body, timeout=120) as answer:
            next(answer.iter_lines())


def kill(server: RunningServer, clients: Clients, rng: random.Random, gap: float) -> int:
    """gap: seconds before it, on the average. Returns how many workers were killed, at the same moment."""
    idle = rng.random() < 0.3
    if idle:
        clients.busy.clear()
        until(lambda: server.metrics()["gpt2_requests_in_flight"] == 0, 120)
    elif rng.random() < 0.2:
        clients.leave()
    time.sleep(rng.expovariate(1 / gap))
    pids = workers_of(server)
    victims = pids if rng.random() < 0.5 else pids[:1]
    kill_all(victims)
    clients.busy.set()
    return len(victims)


def kill_all(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def check(tiny: Path, adapters: list[str], workers: int, kills: int, seed: int, gap: float = GAP) -> dict[str, Any]:
    flags = ("--threads", "1", "--workers", str(workers), "--speculative-method", "ngram", "--lora-modules", *adapters)
    env = {"GPT2_SERVER_LORA_MODULES_GIB": "0.0001"}  # room for one at a time: they are read again and again
    rng, killed = random.Random(seed), 0
    with serving(tiny, *flags, env=env) as server:
        clients = Clients(server)
        with ThreadPoolExecutor(len(clients.asked)) as pool:
            asking = [pool.submit(clients.keep_asking, place) for place in range(len(clients.asked))]
            clients.busy.set()
            try:
                while killed < kills and not any(each.done() for each in asking):
                    killed += kill(server, clients, rng, gap)
            finally:
                clients.over = True
                clients.busy.set()
            for each in asking:
                each.result()
        assert server.process.poll() is None
        assert not [line for line in server.lines if "has killed worker after worker" in line]
        now = server.wait_until_idle()
        return {"workers": workers, "killed": killed, "answers": clients.answers,
                "restarts": now["gpt2_worker_restarts_total"]}  # fmt: skip


def test_workers_killed_at_the_same_moment_fail_nobody(tiny: Path, adapters: list[str]) -> None:
    report = check(tiny, adapters, workers=2, kills=3, seed=3, gap=0.5)
    assert report["restarts"] >= 3


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_two_hundred_kills_fail_nobody(workers: int, tiny: Path, adapters: list[str]) -> None:
    report = check(tiny, adapters, workers, kills=-(-KILLS // 3), seed=workers)
    print(json.dumps(report))
    assert report["answers"] > 0


def pause_until_ready(server: RunningServer) -> None:
    until(lambda: httpx.get(f"{server.url}/ready").status_code == 200, 120)


@pytest.fixture(scope="module")
def pair(tiny: Path) -> Iterator[RunningServer]:
    with serving(tiny, "--threads", "1", "--workers", "2") as server:
        yield server


@pytest.mark.slow
def test_an_idle_worker_killed_again_and_again_ends_no_service(pair: RunningServer) -> None:
    """Eight times, more often than the service may lose workers at their work."""
    for _ in range(8):
        until(lambda: pair.metrics()["gpt2_engine_up"] == 2, 120)
        kill_all(workers_of(pair)[-1:])
        assert pair.complete(prompt="a", max_tokens=8)
        time.sleep(0.5)
    assert pair.process.poll() is None


@pytest.mark.slow
def test_all_workers_killed_again_and_again_with_answers_between_end_no_service(pair: RunningServer) -> None:
    for _ in range(8):
        kill_all(workers_of(pair))
        assert pair.complete(prompt="a", max_tokens=200, ignore_eos=True)
    pause_until_ready(pair)
