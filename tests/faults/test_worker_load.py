"""More work than fits: rows F6, F7, L2, L3, L4, M1 and S2 of docs/reliability.md. The long forms are marked slow."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import quantiles
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from mixed import mixed_requests, stream_all, stream_choices
from serving import RunningServer, serving

LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=None)


@pytest.fixture(scope="module")
def small(tiny: Path) -> Iterator[RunningServer]:
    """A KV pool of one context: 1024 tokens, as many blocks as one sequence may need."""
    flags = ("--kv-cache-gib", "0.001", "--max-num-seqs", "32", "--max-num-queued-reqs", "100000")
    with serving(tiny, "--threads", "1", *flags, env={"GPT2_SERVER_MAX_NUM_QUEUED_TOKENS": "10000000"}) as server:
        yield server


def note(**figures: Any) -> None:
    """For docs/reliability.md."""
    print(json.dumps(figures))
    if "LOAD_REPORT" in os.environ:
        with Path(os.environ["LOAD_REPORT"]).open("a") as file:
            file.write(json.dumps(figures) + "\n")


# === F6 ===


async def leave(http: httpx.AsyncClient, rng: random.Random) -> None:
    """At some moment: queued, in prefill, between two tokens, at the last one, or before the body is through."""
    body = {
        "prompt": [rng.randrange(50000) for _ in range(rng.choice([1, 30, 600]))],
        "max_tokens": rng.choice([1, 5, 300]),
        "n": rng.choice([1, 1, 3]),
        "stream": rng.random() < 0.5,
        "ignore_eos": True,
    }
    try:
        async with asyncio.timeout(rng.choice([0.0, 0.01, 0.05, 0.2, 1.0]) * rng.random()):
            async with http.stream("POST", "/v1/completions", json=body) as answer:
                async for _ in answer.aiter_bytes():
                    pass
    except TimeoutError:
        pass


async def storm(url: str, count: int, at_once: int) -> None:
    rng, turns = random.Random(6), asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=LIMITS) as http:

        async def one() -> None:
            async with turns:
                await leave(http, rng)

        await asyncio.gather(*(one() for _ in range(count)))


@pytest.mark.parametrize(
    "count", [pytest.param(300, id="fast"), pytest.param(5000, id="whole", marks=[pytest.mark.slow])]
)
@pytest.mark.timeout(900)
def test_f6_a_storm_of_clients_that_leave(count: int, small: RunningServer) -> None:
    asyncio.run(storm(small.url, count, 50))
    began = time.monotonic()
    small.check_identities()  # nothing runs, waits, or holds a block; what was admitted has ended
    seconds = time.monotonic() - began
    assert httpx.get(f"{small.url}/load").json() == {"server_load": 0}
    assert small.complete(prompt="a", max_tokens=1)
    note(row="F6", aborts=count, empty_after_seconds=round(seconds, 3))


# === F7 ===


@pytest.mark.parametrize(
    "count", [pytest.param(60, id="fast"), pytest.param(500, id="whole", marks=[pytest.mark.slow])]
)
@pytest.mark.timeout(900)
def test_f7_four_times_as_much_as_the_pool_holds(count: int, small: RunningServer) -> None:
    """32 seats x 130 tokens ask for four times the pool's 1024."""
    bodies = [{"prompt": [i] * 10, "max_tokens": 120, "temperature": 0, "ignore_eos": True} for i in range(count)]
    before = small.metrics()["gpt2_num_preemptions_total"]

    async def ask(at_once: int, some: list[dict[str, Any]]) -> list[str]:
        turns = asyncio.Semaphore(at_once)
        async with httpx.AsyncClient(base_url=small.url, timeout=600, limits=LIMITS) as http:

            async def one(body: dict[str, Any]) -> str:
                async with turns:
                    answer = await http.post("/v1/completions", json=body)
                assert answer.status_code == 200, answer.text
                return str(answer.json()["choices"][0]["text"])

            return await asyncio.gather(*(one(body) for body in some))

    texts = asyncio.run(ask(count, bodies))
    preemptions = small.metrics()["gpt2_num_preemptions_total"] - before
    assert preemptions > 0
    assert preemptions <= 4 * count
    sample = bodies[:: max(count // 20, 1)]
    assert texts[:: max(count // 20, 1)] == asyncio.run(ask(1, sample))  # each alone
    small.check_identities()
    note(row="F7", requests=count, preemptions=preemptions)


# === M1 and S2 ===


def test_m1_metrics_add_up_to_what_clients_were_told(small: RunningServer) -> None:
    before = small.wait_until_idle()
    usages = [small.complete(**request)["usage"] for request in mixed_requests(8, 30)]
    after = small.wait_until_idle()
    gained = {name: value - before.get(name, 0.0) for name, value in after.items()}
    assert gained["gpt2_generation_tokens_total"] == sum(usage["completion_tokens"] for usage in usages)
    assert gained["gpt2_requests_total"] == gained["gpt2_time_to_first_token_seconds_count"]  # each said something
    small.check_identities()


def test_s2_the_same_seed_says_the_same_in_another_server_and_another_batch(
    small: RunningServer, server: RunningServer
) -> None:
    requests = mixed_requests(16, 60)
    assert stream_all(small, requests) == [stream_choices(server, request) for request in requests]


# === L2 ===


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_l2_two_thousand_streams_at_once(tiny: Path) -> None:
    """Every seat is taken; every stream gets its share and ends as it should."""
    count, length = 2000, 40
    received = [0] * count  # events, of which some bring two tokens: no half of a character is sent
    flags = ("--max-num-seqs", "2000", "--max-num-batched-tokens", "4096", "--max-num-queued-reqs", "2000")

    async def one(http: httpx.AsyncClient, i: int) -> None:
        body = {"prompt": [i], "max_tokens": length, "ignore_eos": True, "stream": True}
        body["stream_options"] = {"include_usage": True}
        events = []
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                received[i] += line.startswith("data: {")
                events = [*events[-1:], line] if line else events
        assert events[1] == "data: [DONE]"
        assert json.loads(events[0].removeprefix("data: "))["usage"]["completion_tokens"] == length

    async def middle() -> list[int]:
        while sum(received) < count * length // 2:
            await asyncio.sleep(0.05)
        return list(received)

    async def all_of_them(url: str) -> list[int]:
        async with httpx.AsyncClient(base_url=url, timeout=900, limits=LIMITS) as http:
            streams = [asyncio.create_task(one(http, i)) for i in range(count)]
            shares = await middle()
            await asyncio.gather(*streams)
        return shares

    with serving(tiny, "--threads", "1", *flags, "--request-timeout", "900") as server:
        shares = asyncio.run(all_of_them(server.url))
    note(row="L2", streams=count, least_at_middle=min(shares), most_at_middle=max(shares))
    assert max(shares) <= 3 * min(shares)


# === L3 and L4 ===


async def _probe(url: str, over: asyncio.Event) -> list[float]:
    """How long the event loop keeps a question waiting that costs it next to nothing."""
    seconds = []
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        while not over.is_set():
            began = time.monotonic()
            assert (await http.get("/ready")).status_code == 200
            seconds.append(time.monotonic() - began)
            await asyncio.sleep(0.02)
    return seconds


async def _saturate(url: str, seconds: float, body: dict[str, Any]) -> float:
    """Requests a second that a closed loop gets answered: its capacity."""
    answers, ends = 0, time.monotonic() + seconds

    async def client(http: httpx.AsyncClient) -> None:
        nonlocal answers
        while time.monotonic() < ends:
            assert (await http.post("/v1/completions", json=body)).status_code == 200
            answers += 1

    async with httpx.AsyncClient(base_url=url, timeout=60, limits=LIMITS) as http:
        await asyncio.gather(*(client(http) for _ in range(24)))
    return answers / seconds


async def _overload(url: str, rate: float, seconds: float, body: dict[str, Any]) -> tuple[list[Any], list[float]]:
    """An open loop: requests come as they come, whatever has become of those before."""
    rng, over, answers = random.Random(3), asyncio.Event(), []
    where, content = urlsplit(url), json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n"

    async def one() -> None:
        """Without a library: what it would take of two cores is time that the server has not."""
        began = time.monotonic()
        reader, writer = await asyncio.open_connection(where.hostname, where.port)
        writer.write(head.encode() + content)
        lines = (await reader.read()).partition(b"\r\n\r\n")[0].decode().lower().split("\r\n")
        took = time.monotonic() - began
        writer.close()
        fields = dict(line.split(": ", 1) for line in lines[1:])
        answers.append((int(lines[0].split()[1]), took, fields.get("retry-after")))

    probe = asyncio.create_task(_probe(url, over))
    asked, ends = [], time.monotonic() + seconds
    while time.monotonic() < ends:
        asked.append(asyncio.create_task(one()))
        await asyncio.sleep(rng.expovariate(rate))
    await asyncio.gather(*asked)
    over.set()
    return answers, await probe


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_l3_l4_ten_times_as_much_as_it_can_do(tiny: Path) -> None:
    body = {"prompt": [5] * 20, "max_tokens": 100, "ignore_eos": True}
    with serving(tiny, "--threads", "1", "--max-num-seqs", "16", "--max-num-queued-reqs", "32") as server:
        capacity = asyncio.run(_saturate(server.url, 10, body))
        answers, probe = asyncio.run(_overload(server.url, 10 * capacity, 30, body))
        waiting = server.metrics()["gpt2_num_requests_waiting"]
    refused = [(took, after) for status, took, after in answers if status == 503]
    served = [took for status, took, _ in answers if status == 200]
    figures = {
        "row": "L3, L4",
        "capacity_per_second": round(capacity, 1),
        "served_per_second": round(len(served) / 30, 1),
        "served_p99_seconds": round(quantiles(served, n=100)[98], 3),
        "refused": len(refused),
        "refused_p99_seconds": round(quantiles([took for took, _ in refused], n=100)[98], 3),
        "probe_p99_seconds": round(quantiles(probe, n=100)[98], 3),
        "retry_after": sorted({int(after) for _, after in refused}),
    }
    note(**figures)
    assert len(served) + len(refused) == len(answers)
    assert waiting == 0
    assert len(served) / 30 >= 0.9 * capacity
    assert figures["refused_p99_seconds"] <= 0.05
    assert figures["probe_p99_seconds"] <= 0.05
