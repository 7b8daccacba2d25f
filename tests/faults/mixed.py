"""Streams of all kinds at once, and proof that faults changed no byte of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from serving import RunningServer

KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"seed": 11},
    {"seed": 12, "n": 2},
    {"seed": 13, "logprobs": 3},
    {"seed": 14, "stop": ["qzxj", "the end of all"], "top_p": 0.9},
    {"temperature": 0, "echo": True, "logprobs": 1},
    {"seed": 15, "presence_penalty": 0.8, "frequency_penalty": 0.3},
    {"seed": 16, "temperature": 1.3, "n": 2, "logprobs": 2, "stop": ["\n\n\n\n"]},
]


def mixed_requests(count: int, max_tokens: int) -> list[dict[str, Any]]:
    """Greedy, seeded, n = 2, logprobs, stop strings, echo, penalties; every prompt is another."""
    return [
        {"prompt": f"Chapter {i}. It was", "max_tokens": max_tokens, "ignore_eos": True, **KINDS[i % len(KINDS)]}
        for i in range(count)
    ]


def stream_choices(server: RunningServer, request: dict[str, Any], timeout: float = 300) -> list[dict[str, Any]]:
    """A streamed answer, put together again: of each choice its text, its logprobs and how it ended."""
    choices = [{"text": "", "logprobs": [], "finish_reason": None} for _ in range(request.get("n", 1))]
    for chunk in server.stream(**request):
        for piece in chunk["choices"]:
            choice = choices[piece["index"]]
            choice["text"] += piece["text"]
            choice["finish_reason"] = piece["finish_reason"] or choice["finish_reason"]
            if piece["logprobs"] is not None:
                choice["logprobs"] += zip(
                    *(piece["logprobs"][key] or [] for key in sorted(piece["logprobs"])), strict=True
                )
    return choices


def stream_all(server: RunningServer, requests: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(lambda request: stream_choices(server, request), requests))


def post(server: RunningServer, timeout: float = 120, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=timeout)


def last_event(server: RunningServer, **body: Any) -> dict[str, Any]:
    """Of a stream that ends with an error."""
    with httpx.stream("POST", f"{server.url}/v1/completions", json={**body, "stream": True}, timeout=120) as answer:
        lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
    assert "[DONE]" not in lines[-1], lines[-1]
    event: dict[str, Any] = json.loads(lines[-1].removeprefix("data: "))
    return event


def until(true: Callable[[], bool], seconds: float = 30) -> float:
    """Waits; returns for how long."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds, "in vain"
        time.sleep(0.01)
    return time.monotonic() - began
