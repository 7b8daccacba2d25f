"""Load as benchmarks make it: the exact requests of `vllm bench serve` and of guidellm, and guidellm itself."""

from __future__ import annotations

import json
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from outside import Environment
from serving import RunningServer

from server.checkpoint import EMBEDDED

STREAMS = 8
TOKENS = 24


@dataclass
class Timed:
    """What a benchmark sees of one stream."""

    begun: float = field(default_factory=time.perf_counter)
    arrivals: list[float] = field(default_factory=list)  # of each chunk that counts as a token
    text: str = ""
    usage: dict[str, Any] | None = None  # of the last chunk that has one
    done: bool = False

    @property
    def first(self) -> float:
        return self.arrivals[0] - self.begun

    @property
    def gaps(self) -> list[float]:
        return [late - early for early, late in zip(self.arrivals, self.arrivals[1:], strict=False)]


def stream(url: str, body: dict[str, Any], *, count_empty: bool) -> Timed:
    """count_empty: every chunk with a choice is a token, as vLLM counts; else only those with text, as guidellm."""
    timed = Timed()
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if not line.startswith("data:"):
                continue
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                timed.done = True
                continue
            chunk = json.loads(data)
            assert not chunk.get("error")
            timed.usage = chunk.get("usage") or timed.usage
            for choice in chunk["choices"]:
                timed.text += choice["text"]
                if count_empty or choice["text"]:
                    timed.arrivals.append(time.perf_counter())
    return timed


def check(timed: Timed) -> None:
    assert timed.done
    assert timed.usage is not None
    assert timed.usage["completion_tokens"] == TOKENS
    assert 0 < timed.first < 30
    assert all(0 <= gap < 30 for gap in timed.gaps)


def test_the_requests_of_vllm_bench_serve(server: RunningServer) -> None:
    first = httpx.get(f"{server.url}/v1/models").json()["data"][0]
    assert {"id", "root"} <= first.keys()

    def ask(i: int) -> Timed:
        body = {
            "model": first["id"], "prompt": f"{i} " + "sea " * 40, "repetition_penalty": 1.0, "max_tokens": TOKENS,
            "logprobs": None, "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True,
        }  # fmt: skip
        return stream(server.url, body, count_empty=True)

    with ThreadPoolExecutor(STREAMS) as pool:
        for timed in pool.map(ask, range(STREAMS * 2)):
            check(timed)
            assert timed.usage is not None
            assert timed.usage["prompt_tokens"] > 40
            assert len(timed.arrivals) <= TOKENS + 1  # and the one that says how it ended


def test_the_requests_of_guidellm(server: RunningServer) -> None:
    assert httpx.get(f"{server.url}/health", follow_redirects=True).is_success
    name = httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"]

    def ask(i: int) -> Timed:
        body = {
            "model": name, "prompt": f"{i} " + "wind " * 40, "stream": True, "max_tokens": TOKENS, "ignore_eos": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }  # fmt: skip
        return stream(server.url, body, count_empty=False)

    with ThreadPoolExecutor(STREAMS) as pool:
        for timed in pool.map(ask, range(STREAMS * 2)):
            check(timed)
            assert timed.text
            assert timed.usage is not None
            assert timed.usage["prompt_tokens_details"].keys() == {"cached_tokens"}
            assert len(timed.arrivals) <= TOKENS


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_guidellm(server: RunningServer, environment: Environment, tmp_path: Path) -> None:
    """Completes without a failure; what it counts is what was asked for, and its times are those of single tokens."""
    python = environment("guidellm", "guidellm==0.8.1", beside_ours=True, timeout=600)
    name = httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"]
    report = tmp_path / "report.json"
    command = [
        python.parent / "guidellm", "run", "--disable-console",
        "--backend", f"kind=openai_http,target={server.url},model={name},request_format=/v1/completions",
        "--profile", f"kind=concurrent,streams={STREAMS}", "--constraint", "kind=max_requests,count=40",
        "--data", f"kind=synthetic_text,prompt_tokens=64,output_tokens={TOKENS}",
        "--tokenizer", f"kind=huggingface_auto,model={EMBEDDED}", "--output", f"kind=json,path={report}",
    ]  # fmt: skip
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=offline, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    (benchmark,) = json.loads(report.read_text("utf-8"))["benchmarks"]
    metrics = benchmark["metrics"]
    totals = metrics["request_totals"]
    assert (totals["successful"], totals["errored"]) == (40, 0)
    assert metrics["output_token_count"]["successful"]["mean"] == TOKENS
    first, between = (metrics[each]["successful"] for each in ("time_to_first_token_ms", "inter_token_latency_ms"))
    assert 0 < between["median"] < first["median"] < 30_000
