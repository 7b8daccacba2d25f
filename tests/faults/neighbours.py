"""What somebody else's requests do to a stream: a probe beside them, and the most extreme bodies within the limits."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from statistics import quantiles
from typing import Any

import httpx
import psutil
from hypothesis import strategies as st
from serving import RunningServer

VOCAB = 50257
LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=None)
HEALTH_PERIOD = 0.01  # seconds between two looks at /health
WARM = 0.5  # seconds of the probe alone before what it is measured beside

Body = dict[str, Any]


@dataclass(slots=True)
class Seen:
    """By a probe. Seconds."""

    gaps: list[float] = field(default_factory=list)  # between two chunks of its stream
    health: list[float] = field(default_factory=list)  # answers of /health
    statuses: list[int] = field(default_factory=list)  # of the bodies it ran beside; 0 for those it left
    memory: int = 0  # bytes of the api process, at most

    @property
    def gap(self) -> float:
        return max(self.gaps, default=0.0)

    @property
    def p99(self) -> float:
        return quantiles(self.gaps, n=100, method="inclusive")[98] if len(self.gaps) > 1 else self.gap

    @property
    def loop(self) -> float:
        return max(self.health, default=0.0)


def watch(server: RunningServer, bodies: list[Body], seconds: float, headers: dict[str, str] | None = None) -> Seen:
    """Send bodies at once, and leave those that are not answered after so many seconds; a probe streams beside them."""
    return asyncio.run(_watch(server, bodies, seconds, headers or {}))


async def _watch(server: RunningServer, bodies: list[Body], seconds: float, headers: dict[str, str]) -> Seen:
    seen, over, api = Seen(), asyncio.Event(), psutil.Process(server.process.pid)
    async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=LIMITS, headers=headers) as http:
        begun = asyncio.Event()
        probes = [asyncio.create_task(each) for each in (_stream(http, seen, begun, over), _look(http, seen, over))]
        try:
            await begun.wait()
            await asyncio.sleep(WARM)
            seen.gaps.clear()
            seen.health.clear()
            raw = [json.dumps(body).encode() for body in bodies]
            asking = [asyncio.create_task(_ask(http, each)) for each in raw]
            await asyncio.wait(asking or [asyncio.create_task(asyncio.sleep(seconds))], timeout=seconds)
            seen.memory = api.memory_info().rss
            for task in asking:
                task.cancel()
            answers = await asyncio.gather(*asking, return_exceptions=True)
            seen.statuses = [answer if isinstance(answer, int) else 0 for answer in answers]
            await asyncio.sleep(0.1)
        finally:
            over.set()
            await asyncio.gather(*probes)
    return seen


async def _ask(http: httpx.AsyncClient, body: bytes) -> int:
    answer = await http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code < 500 or "retry-after" in answer.headers, answer.text
    return answer.status_code


async def _stream(http: httpx.AsyncClient, seen: Seen, begun: asyncio.Event, over: asyncio.Event) -> None:
    body = {"prompt": "Once", "max_tokens": 1000, "ignore_eos": True, "stream": True}
    while not over.is_set():
        last = time.monotonic()
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    now = time.monotonic()
                    seen.gaps.append(now - last)
                    last = now
                    begun.set()
                if over.is_set():
                    break


async def _look(http: httpx.AsyncClient, seen: Seen, over: asyncio.Event) -> None:
    while not over.is_set():
        began = time.monotonic()
        assert (await http.get("/health")).status_code == 200
        seen.health.append(time.monotonic() - began)
        await asyncio.sleep(HEALTH_PERIOD)


def plain(body: Body) -> Body:
    """The load without the trick: as many samples of as many prompts as short, and as many tokens."""
    prompts = body["prompt"] if isinstance(body["prompt"], list) and body["prompt"] else [body["prompt"]]
    several = len(prompts) if isinstance(prompts[0], str | list) else 1
    count = min(128, several * max(body.get("n", 1), body.get("best_of", 1)))
    return {"prompt": "Once", "n": count, "max_tokens": body.get("max_tokens", 16), "ignore_eos": True}


# === Tricks that were found ===

LETTERS = "abcdefghijklmnop"
TRICKS: dict[str, Body] = {
    "breakers": {
        "prompt": "Once", "n": 128, "max_tokens": 200, "dry_multiplier": 1,
        "dry_sequence_breakers": [letter * 40 for letter in LETTERS],
    },
    "whole vocabulary": {
        "prompt": "Once", "n": 128, "max_tokens": 950, "min_tokens": 900, "logit_bias": {"11": 1},
        "allowed_token_ids": list(range(VOCAB)), "stop_token_ids": list(range(50_000)),
    },
    "many prompts": {"prompt": ["the quick brown fox " * 199] * 128, "max_tokens": 16},
    "many prompts of ids": {"prompt": [[i % 100] * 1500 for i in range(128)], "max_tokens": 16},
    "beams": {
        "prompt": "Once", "n": 20, "best_of": 20, "max_tokens": 200, "use_beam_search": True, "logprobs": 20,
        "stop_token_ids": list(range(64)),
    },
    "stop strings": {
        "prompt": "a a a a", "n": 128, "max_tokens": 200, "allowed_token_ids": [257, 64, 7252],
        "stop": [(letter + "a" * 9) * 25 for letter in LETTERS],
    },
    "bad words": {
        "prompt": "Once", "n": 128, "max_tokens": 200, "bad_words": [f"{'a' * i} b" for i in range(1, 129)],
    },
    "bias": {
        "prompt": "Once", "n": 128, "max_tokens": 200, "logit_bias": {str(i): 5 for i in range(1024)},
        "presence_penalty": 1, "frequency_penalty": 1, "repetition_penalty": 1.2,
    },
}  # fmt: skip


# === The search for more ===


def _some(strategies: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Body]:
    """Any few of these fields."""
    return st.sets(st.sampled_from(sorted(strategies)), max_size=5).flatmap(
        lambda names: st.fixed_dictionaries({name: strategies[name] for name in sorted(names)})
    )


def _text(size: int) -> st.SearchStrategy[str]:
    units = ["a", "ab", "the quick ", "\n", "=", " ", "天", "\u00ff", "0,", "👩‍👩‍👧"]
    return st.sampled_from(units).map(lambda unit: (unit * size)[:size])


_ids = st.sampled_from([1, 64, 1000, VOCAB - 1, VOCAB]).map(lambda count: list(range(count)))
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "min_tokens": st.sampled_from([0, 100]),
    "temperature": st.sampled_from([0, 1, 2]),
    "top_p": st.sampled_from([0.01, 0.95]),
    "top_k": st.sampled_from([1, 300, VOCAB - 1]),
    "min_p": st.just(0.05),
    "typical_p": st.just(0.9),
    "xtc_probability": st.just(1.0),
    "presence_penalty": st.just(2.0),
    "repetition_penalty": st.just(1.3),
    "logprobs": st.sampled_from([0, 5, 20]),
    "allowed_token_ids": _ids,
    "stop_token_ids": _ids,
    "logit_bias": st.sampled_from([1, 1024]).map(lambda count: {str(i): 1 for i in range(count)}),
    "stop": st.lists(_text(256), min_size=1, max_size=16),
    "bad_words": st.integers(1, 128).flatmap(lambda count: st.lists(_text(40), min_size=count, max_size=count)),
    "dry_multiplier": st.just(1.0),
    "dry_sequence_breakers": st.lists(_text(12), max_size=16),
    "dry_allowed_length": st.just(1),
    "echo": st.booleans(),
    "prompt_logprobs": st.sampled_from([0, 20]),
    "cache_salt": _text(256),
    "priority": st.sampled_from([-(2**31), 2**31 - 1]),
    "use_beam_search": st.just(True),
    "best_of": st.sampled_from([1, 20]),
    "truncate_prompt_tokens": st.sampled_from([1, 500]),
}
PROMPTS = st.one_of(
    st.just("Once"),
    _text(3000),
    _text(300_000),
    st.sampled_from([2, 128]).flatmap(lambda count: _text(3000).map(lambda text: [text] * count)),
    st.sampled_from([10, 900, 100_000]).map(lambda count: [i % 100 for i in range(count)]),
    st.sampled_from([5, 900, 1500]).map(lambda count: [[i % 100] * count for i in range(128)]),
)
EXTREME: st.SearchStrategy[Body] = st.builds(
    lambda prompt, n, fields: {"prompt": prompt, "n": n, "max_tokens": 120, **fields},
    PROMPTS, st.sampled_from([1, 8, 128]), _some(FIELDS),
)  # fmt: skip


def summary(body: Body) -> str:
    """Short enough for a report."""
    return json.dumps({name: _short(value) for name, value in body.items()}, ensure_ascii=False)


def _short(value: Any) -> Any:
    if isinstance(value, list | dict) and value:
        return f"{len(value)} x {_short(next(iter(value)))}"
    return f"{value[:12]}… ({len(value)})" if isinstance(value, str) and len(value) > 20 else value
