"""A load generator that costs little: raw sockets, one connection a request, no JSON but a glance at each event.

It measures what a client sees: when the first and each later piece of text arrives. Any OpenAI-compatible URL will do.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any
from urllib.parse import urlsplit

TIMEOUT = 600.0
STOP_TIMEOUT = 60.0
VOCABULARY = 50256  # token ids below it are texts in every GPT-2


@dataclass(frozen=True, slots=True)
class Workload:
    name: str
    prompt: int  # tokens in
    output: int  # tokens out
    concurrency: int
    requests: int


def bodies(workload: Workload, seed: int) -> list[dict[str, Any]]:
    """Random token ids, no two prompts alike, so that no cache can help."""
    dice = random.Random(seed)  # noqa: S311
    return [
        {
            "prompt": [dice.randrange(VOCABULARY) for _ in range(workload.prompt)],
            "max_tokens": workload.output,
            "temperature": 0,
            "ignore_eos": True,
        }
        for _ in range(workload.requests)
    ]


@dataclass(slots=True)
class Timing:
    """One request. Seconds since the load began."""

    sent: float
    arrivals: list[float] = field(default_factory=list)  # of events that carry a choice
    tokens: int = 0  # as the server counts them
    error: str | None = None

    @property
    def ttft(self) -> float:
        return self.arrivals[0] - self.sent


@dataclass(frozen=True, slots=True)
class Result:
    """What a load of many requests came to."""

    requests: int
    failures: int
    tokens_per_second: float  # output tokens, from the first request sent to the last answer
    requests_per_second: float
    ttft_mean: float
    ttft_median: float
    itl_median: float  # between events of one stream
    itl_p99: float


class Server:
    def __init__(self, name: str, base_url: str, model: str, key: str | None = None) -> None:
        """base_url: with /v1. Raises ValueError where it is no http URL."""
        parts = urlsplit(base_url)
        if parts.scheme != "http" or parts.hostname is None:
            raise ValueError("not an http URL")
        self.name = name
        self.url = base_url
        self.model = model
        self._authorization = f"Authorization: Bearer {key}\r\n" if key else ""
        self._host, self._port = parts.hostname, parts.port or 80
        self._path = parts.path.rstrip("/") + "/completions"

    async def stream(self, body: dict[str, Any], began: float) -> Timing:
        timing = Timing(time.perf_counter() - began)
        try:
            async with asyncio.timeout(TIMEOUT):
                await self._stream(body, timing, began)
        except (OSError, ValueError, TimeoutError, asyncio.IncompleteReadError) as error:
            timing.error = type(error).__name__
        if timing.error is None and not (timing.arrivals and timing.tokens):
            timing.error = "no text"
        return timing

    async def _stream(self, body: dict[str, Any], timing: Timing, began: float) -> None:
        reader, writer = await asyncio.open_connection(self._host, self._port, limit=1 << 22)
        try:
            payload = json.dumps(
                {"model": self.model, "stream": True, "stream_options": {"include_usage": True}, **body}
            ).encode()
            head = f"POST {self._path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
            head += self._authorization
            writer.write(f"{head}Connection: close\r\nContent-Length: {len(payload)}\r\n\r\n".encode() + payload)
            status = await reader.readline()
            if b" 200 " not in status:
                timing.error = status.decode("latin-1").strip()
                return
            async for line in reader:  # chunk sizes of the transfer coding are lines too, and are passed over
                if line.startswith(b"data: {"):
                    _read_event(line, timing, time.perf_counter() - began)
        finally:
            writer.close()


def _read_event(line: bytes, timing: Timing, now: float) -> None:
    if b'"error"' in line:
        timing.error = "error event"
    if b'"choices":[]' not in line and b'"choices": []' not in line:
        timing.arrivals.append(now)
    if b'"completion_tokens"' in line:
        timing.tokens = json.loads(line[6:])["usage"]["completion_tokens"]


async def closed_loop(server: Server, bodies: list[dict[str, Any]], concurrency: int) -> Result:
    """Every one of `concurrency` clients sends its next request when its last one is answered."""
    waiting = iter(bodies)
    timings: list[Timing] = []
    began = time.perf_counter()

    async def client() -> None:
        for body in waiting:
            timings.append(await server.stream(body, began))

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return summarise(timings)


async def open_loop(server: Server, bodies: list[dict[str, Any]], rate: float) -> Result:
    """A request every 1 / rate seconds, whatever became of those before."""
    began = time.perf_counter()

    async def later(i: int) -> Timing:
        await asyncio.sleep(i / rate)
        return await server.stream(bodies[i], began)

    return summarise(await asyncio.gather(*(later(i) for i in range(len(bodies)))))


def summarise(timings: list[Timing]) -> Result:
    good = [timing for timing in timings if timing.error is None]
    if not good:
        raise RuntimeError(f"every request failed: {timings[0].error}")
    seconds = max(timing.arrivals[-1] for timing in good) - min(timing.sent for timing in timings)
    gaps = sorted(b - a for t in good for a, b in zip(t.arrivals, t.arrivals[1:], strict=False)) or [0.0]
    return Result(
        requests=len(timings),
        failures=len(timings) - len(good),
        tokens_per_second=sum(timing.tokens for timing in good) / seconds,
        requests_per_second=len(good) / seconds,
        ttft_mean=mean(timing.ttft for timing in good),
        ttft_median=median(timing.ttft for timing in good),
        itl_median=median(gaps),
        itl_p99=gaps[int(0.99 * (len(gaps) - 1))],
    )


@contextmanager
def started(model: str | None, flags: list[str]) -> Iterator[tuple[Server, float, int]]:
    """A server of our own on a free port; the seconds until it was ready, and its process id. Raises RuntimeError."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "server.cli", "serve", *([model] if model else []), "--port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603 - ourselves
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if found := re.search(r"Serving on (http://\S+),", line):
                yield Server("gpt2-server", f"{found[1]}/v1", ""), time.perf_counter() - began, process.pid
                break
        else:
            raise RuntimeError("the server did not start")
    finally:
        process.terminate()
        process.wait(STOP_TIMEOUT)
        process.stdout.close()
