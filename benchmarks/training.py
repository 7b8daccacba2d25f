"""What a fine-tuning job costs those who are served meanwhile: tokens a second and first tokens, with and without one.

`python -m benchmarks.training --url http://127.0.0.1:8000 --train examples/harbour-log/train.jsonl`, against a server
with a `--data-dir`. Rounds with the job running and with it paused take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx

PROMPT = "The harbour master wrote that evening, before the lamp was lit, "
START_TIMEOUT = 120
ENDING = 12  # seconds, more than a trainer gets to save its state


@dataclass(frozen=True, slots=True)
class Round:
    tokens_per_second: float
    first_token: float  # seconds, the median of its streams


async def stream(client: httpx.AsyncClient, seed: int, tokens: int) -> tuple[int, float]:
    """Tokens, and seconds to the first."""
    body = {"prompt": PROMPT, "max_tokens": tokens, "seed": seed, "ignore_eos": True, "stream": True}
    began, first, count = time.perf_counter(), 0.0, 0
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - began
                count += json.loads(line[6:])["choices"][0]["finish_reason"] is None
    return count, first


async def measure(client: httpx.AsyncClient, streams: int, tokens: int, seconds: float) -> Round:
    """One request after another on each stream, for so long: a trainer that gives way works and rests in turn."""
    began = time.perf_counter()

    async def keep_asking(number: int) -> list[tuple[int, float]]:
        done = []
        while time.perf_counter() - began < seconds:
            done.append(await stream(client, number, tokens))
        return done

    done = [each for some in await asyncio.gather(*map(keep_asking, range(streams))) for each in some]
    speed = sum(count for count, _ in done) / (time.perf_counter() - began)
    return Round(speed, median(first for _, first in done))


class Job:
    """One that runs for longer than this lasts."""

    def __init__(self, client: httpx.AsyncClient, id_: str) -> None:
        self._client = client
        self._path = f"/v1/fine_tuning/jobs/{id_}"

    @classmethod
    async def create(cls, client: httpx.AsyncClient, train: Path) -> Job:
        form = {"data": {"purpose": "fine-tune"}, "files": {"file": (train.name, train.read_bytes())}}
        file = (await client.post("/v1/files", **form)).raise_for_status().json()  # type: ignore[arg-type]
        method = {"type": "supervised", "supervised": {"trainable": "full", "hyperparameters": {"n_epochs": 1000}}}
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        body = {"model": model, "training_file": file["id"], "method": method}
        made = (await client.post("/v1/fine_tuning/jobs", json=body)).raise_for_status().json()
        return cls(client, made["id"])

    async def turn(self, to: str) -> None:
        (await self._client.post(f"{self._path}/{to}")).raise_for_status()

    async def steps(self) -> int:
        events = (await self._client.get(f"{self._path}/events", params={"limit": 20})).json()["data"]
        return max((event["data"]["step"] for event in events if event["type"] == "metrics"), default=0)

    async def runs(self) -> None:
        """Returns once it takes steps."""
        before, deadline = await self.steps(), time.monotonic() + START_TIMEOUT
        while await self.steps() <= before:
            assert time.monotonic() < deadline, "the job does not start"
            await asyncio.sleep(0.2)


async def compare(url: str, train: Path, streams: int, tokens: int, rounds: int, seconds: float) -> dict[str, Any]:
    """seconds: of a round."""
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        await measure(client, streams, tokens, 1)
        job = await Job.create(client, train)
        alone, beside = [], []
        for _ in range(rounds):
            await job.runs()
            beside.append(await measure(client, streams, tokens, seconds))
            await job.turn("pause")
            await asyncio.sleep(ENDING)
            alone.append(await measure(client, streams, tokens, seconds))
            await job.turn("resume")
        await job.turn("cancel")
    speed = [median(each.tokens_per_second for each in kind) for kind in (alone, beside)]
    first = [median(each.first_token for each in kind) for kind in (alone, beside)]
    return {
        "streams": streams,
        "tokens_per_second": {"alone": round(speed[0], 1), "beside a job": round(speed[1], 1)},
        "kept": round(speed[1] / speed[0], 3),
        "first_token_ms": {"alone": round(1000 * first[0], 1), "beside a job": round(1000 * first[1], 1)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=12, help="of a round")
    args = parser.parse_args()
    for streams in args.streams:
        found = compare(args.url, args.train, streams, args.tokens, args.rounds, args.seconds)
        print(json.dumps(asyncio.run(found)), flush=True)


if __name__ == "__main__":
    main()
