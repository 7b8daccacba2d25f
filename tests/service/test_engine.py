"""The engine as an operator sees it: guessing, several workers, sleep, and requests that can never fit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from serving import RunningServer, serving, start

REQUESTS: list[dict[str, Any]] = [
    {"prompt": "a b a b a b a b a", "max_tokens": 60, "temperature": 0, "logprobs": 2, "ignore_eos": True},
    {"prompt": "Once upon a time", "max_tokens": 60, "seed": 3, "presence_penalty": 0.7, "ignore_eos": True},
    {"prompt": "one two one two", "max_tokens": 40, "seed": 4, "n": 3, "top_p": 0.8, "ignore_eos": True},
]


def answers(server: RunningServer) -> list[Any]:
    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        return [got["choices"] for got in pool.map(lambda request: server.complete(**request), REQUESTS)]


def post(server: RunningServer, path: str) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", timeout=60)


def workers(server: RunningServer) -> list[psutil.Process]:
    children = psutil.Process(server.process.pid).children()
    alive = [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in alive if "server.worker" in " ".join(child.cmdline())]


@pytest.fixture(scope="module")
def expected(server: RunningServer) -> list[Any]:
    """What a plain server says."""
    return answers(server)


def test_prompt_lookup_and_target_itl_change_no_answer(tiny: Path, expected: list[Any]) -> None:
    flags = ("--speculative-method", "ngram", "--target-itl", "0.02", "--threads", "1")
    with serving(tiny, *flags) as server:
        repeating = {"prompt": [11, 12, 13] * 30, "max_tokens": 20, "logit_bias": {"11": 60, "12": 60}, "seed": 1}
        server.complete(**repeating)
        assert answers(server) == expected
        assert server.metrics()["gpt2_spec_decode_num_draft_tokens_total"] > 0


def test_a_speculative_model_changes_no_answer(tiny: Path, expected: list[Any]) -> None:
    """The model itself, which the kernels keep in a quarter of its bytes where it guesses, so that guessing pays."""
    flags = ("--speculative-method", "model", "--speculative-model", str(tiny), "--threads", "1")
    with serving(tiny, *flags) as server:
        assert answers(server) == expected
        if any("C kernels" in line for line in server.lines):
            assert server.metrics()["gpt2_spec_decode_num_draft_tokens_total"] > 0


@pytest.mark.parametrize(
    ("change", "flags", "line"),
    [
        ({}, ["--speculative-method", "model"], "need each other"),
        ({}, ["--speculative-model", "DRAFT"], "need each other"),
        ({"vocab_size": 100}, ["--speculative-method", "model", "--speculative-model", "DRAFT"], "has 100 tokens"),
        ({"n_positions": 64}, ["--speculative-method", "model", "--speculative-model", "DRAFT"], "has 64 positions"),
    ],
)
def test_a_speculative_model_must_suit_the_model(
    change: dict[str, int], flags: list[str], line: str, tiny: Path, tmp_path: Path
) -> None:
    config = json.loads((tiny / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change | ({"eos_token_id": 99} if change else {})))
    shutil.copy(tiny / "model.safetensors", tmp_path)
    process = start(tiny, *[flag.replace("DRAFT", str(tmp_path)) for flag in flags])
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 78, out
    assert line in out
    assert "Traceback" not in out


@pytest.fixture(scope="module")
def pair(tiny: Path) -> Iterator[RunningServer]:
    with serving(tiny, "--workers", "2", "--threads", "1") as server:
        deadline = time.monotonic() + 30
        while len(workers(server)) < 2:
            assert time.monotonic() < deadline
        yield server


def test_two_workers_say_what_one_says(pair: RunningServer, expected: list[Any]) -> None:
    assert answers(pair) == expected
    pair.check_identities()


def test_the_death_of_one_of_two_workers_costs_no_stream_a_byte(pair: RunningServer, expected: list[Any]) -> None:
    before = pair.metrics()["gpt2_worker_restarts_total"]
    request = {"prompt": "a b", "max_tokens": 300, "seed": 4, "n": 4, "ignore_eos": True}
    undisturbed = pair.complete(**request)["choices"]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(lambda: pair.complete(**request)["choices"])
        while pair.metrics()["gpt2_num_requests_running"] == 0:
            time.sleep(0.01)
        os.kill(workers(pair)[0].pid, signal.SIGKILL)
        assert running.result() == undisturbed
    assert pair.metrics()["gpt2_worker_restarts_total"] == before + 1
    assert answers(pair) == expected
    pair.check_identities()


@pytest.mark.parametrize("level", [1, 2])
def test_asleep_it_refuses_and_awake_it_answers_as_before(level: int, idle: RunningServer, expected: list[Any]) -> None:
    with ThreadPoolExecutor(1) as pool:
        long = {"prompt": "a", "max_tokens": 200, "seed": 1, "ignore_eos": True}
        running = pool.submit(lambda: idle.complete(**long))
        while idle.metrics()["gpt2_num_requests_running"] == 0:
            time.sleep(0.01)
        assert post(idle, f"/sleep?level={level}").status_code == 200
        assert running.result()["usage"]["completion_tokens"] == 200  # it finished first
    assert httpx.get(f"{idle.url}/is_sleeping").json() == {"is_sleeping": True}
    assert httpx.get(f"{idle.url}/ready").status_code == 503
    assert httpx.get(f"{idle.url}/health").status_code == 200
    refused = httpx.post(f"{idle.url}/v1/completions", json={"prompt": "a"})
    assert refused.status_code == 503
    assert "asleep" in refused.json()["error"]["message"]
    for _ in range(2):
        assert post(idle, "/wake_up").status_code == 200
    assert httpx.get(f"{idle.url}/is_sleeping").json() == {"is_sleeping": False}
    assert answers(idle) == expected


def test_sleep_may_end_what_runs(idle: RunningServer) -> None:
    with ThreadPoolExecutor(1) as pool:
        long = {"prompt": "a", "max_tokens": 1000, "seed": 1, "ignore_eos": True}
        running = pool.submit(httpx.post, f"{idle.url}/v1/completions", json=long, timeout=60)
        while idle.metrics()["gpt2_num_requests_running"] == 0:
            time.sleep(0.01)
        assert post(idle, "/sleep?mode=abort").status_code == 200
        assert running.result().status_code == 503
    assert post(idle, "/wake_up").status_code == 200


def test_a_worker_that_dies_asleep_is_asleep_again(idle: RunningServer, expected: list[Any]) -> None:
    post(idle, "/sleep")
    before = idle.worker_pid
    os.kill(before, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while not workers(idle) or workers(idle)[0].pid == before:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert httpx.get(f"{idle.url}/is_sleeping").json() == {"is_sleeping": True}
    post(idle, "/wake_up")
    while httpx.get(f"{idle.url}/ready").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert answers(idle) == expected


@pytest.mark.parametrize("query", ["level=3", "level=x", "mode=never"])
def test_a_sleep_of_another_kind_is_refused(query: str, idle: RunningServer) -> None:
    assert post(idle, f"/sleep?{query}").status_code == 400
    assert post(idle, "/wake_up?tags=weights").status_code == 400


def test_what_can_never_fit_is_refused_at_once_and_nothing_behind_it_waits(idle: RunningServer) -> None:
    with httpx.Client(base_url=idle.url) as client:
        client.post("/v1/completions", json={"prompt": [5] * 1020, "max_tokens": 2})
        times = []
        for _ in range(5):
            began = time.perf_counter()
            refused = client.post("/v1/completions", json={"prompt": [5] * 1020, "max_tokens": 10})
            times.append(time.perf_counter() - began)
            assert refused.status_code == 400
            assert refused.json()["error"]["code"] == "context_length_exceeded"
        assert min(times) < 0.05  # the least of five: others use this machine too
        assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200


def test_a_key_that_has_had_its_share_is_told_when_to_come_back(tiny: Path) -> None:
    with serving(tiny, "--threads", "1", "--max-tokens-per-minute", "60") as server:
        request = {"prompt": [5] * 30, "max_tokens": 50, "ignore_eos": True}
        assert server.complete(**request)["usage"]["total_tokens"] == 80  # more than a minute's worth, on credit
        refused = httpx.post(f"{server.url}/v1/completions", json=request)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert 10 < int(refused.headers["retry-after"]) <= 21  # 20 tokens owed, at one a second
        assert server.metrics()['gpt2_requests_rejected_total{reason="rate_limited"}'] == 1
