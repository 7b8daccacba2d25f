"""Workers that are killed, stopped, hang, or are killed by what they compute. Rows F4 and F5 of docs/reliability.md."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from mixed import last_event, mixed_requests, post, stream_all, until
from serving import RunningServer, serving

EVIL = Path(__file__).parent / "evil"
SLOW = [pytest.mark.slow]
POISON = 31337  # a token id that no other request of these tests has
POISONED: dict[str, Any] = {"prompt": [POISON], "max_tokens": 5}


def evil(what: str) -> dict[str, str]:
    return {"EVIL": what, "PYTHONPATH": os.pathsep.join([str(EVIL), os.environ.get("PYTHONPATH", "")])}


def tokens(server: RunningServer) -> float:
    return server.metrics()["gpt2_generation_tokens_total"]


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=SLOW)])
def test_a_worker_killed_or_stopped_under_mixed_streams_changes_no_byte(number: signal.Signals, tiny: Path) -> None:
    requests = mixed_requests(8, 250)
    with serving(tiny, "--threads", "1") as server, ThreadPoolExecutor(1) as pool:
        expected = stream_all(server, requests)
        running = pool.submit(stream_all, server, requests)
        for _ in range(2):
            before = tokens(server)
            until(lambda before=before: tokens(server) > before + 100)
            os.kill(server.worker_pid, number)
        assert running.result() == expected
        assert server.metrics()["gpt2_worker_restarts_total"] == 2


def test_f5_a_step_that_never_ends_is_found_and_health_tells(tiny: Path) -> None:
    flags = ("--threads", "1", "--stall-timeout", "2")
    with serving(tiny, *flags, env=evil(f"hang:token={POISON}")) as server, ThreadPoolExecutor(1) as pool:
        hung = pool.submit(post, server, **POISONED)
        first = server.worker_pid
        until(lambda: httpx.get(f"{server.url}/health").status_code == 503, 6)
        assert httpx.get(f"{server.url}/metrics").status_code == 200
        until(lambda: not psutil.pid_exists(first))
        assert hung.result().status_code == 500  # the second worker hung as well
        assert hung.result().json()["error"]["code"] == "engine_error"
        assert hung.result().headers["x-should-retry"] == "false"
        until(lambda: httpx.get(f"{server.url}/health").status_code == 200)
        assert server.complete(prompt="a", max_tokens=3)
        assert server.metrics()["gpt2_worker_restarts_total"] == 2


@pytest.mark.slow
def test_a_slow_worker_is_not_killed(tiny: Path) -> None:
    """Five steps of more than a second, where two may pass without one."""
    with serving(tiny, "--threads", "1", "--stall-timeout", "2", env=evil("slow:step=any")) as server:
        assert server.complete(prompt="a", max_tokens=5)
        assert server.metrics()["gpt2_worker_restarts_total"] == 0


def test_a_worker_that_was_never_asked_anything_may_be_silent(tiny: Path) -> None:
    with serving(tiny, "--threads", "1", "--stall-timeout", "1") as server:
        worker = server.worker_pid
        time.sleep(3)
        assert server.worker_pid == worker


@pytest.mark.slow
def test_an_idle_worker_may_be_silent(tiny: Path) -> None:
    with serving(tiny, "--threads", "1", "--stall-timeout", "1") as server:
        server.complete(prompt="a", max_tokens=1)
        time.sleep(2.5)
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert server.metrics()["gpt2_worker_restarts_total"] == 0


@pytest.mark.parametrize("what", ["exit", pytest.param("raise", marks=SLOW)])
def test_what_kills_workers_fails_alone(what: str, tiny: Path, server: RunningServer) -> None:
    requests = mixed_requests(8, 120)
    expected = stream_all(server, requests)
    with (
        serving(tiny, "--threads", "1", env=evil(f"{what}:token={POISON}")) as evil_server,
        ThreadPoolExecutor(3) as pool,
    ):
        running = pool.submit(stream_all, evil_server, requests)
        until(lambda: tokens(evil_server) > 100)
        whole = pool.submit(post, evil_server, **POISONED)
        # In mid-stream: the bias makes it say the word.
        biased = {"prompt": "x", "max_tokens": 9, "logit_bias": {str(POISON): 100}}
        event = pool.submit(last_event, evil_server, **biased)
        assert whole.result().status_code == 500
        assert whole.result().json()["error"]["code"] == "engine_error"
        assert event.result()["error"]["code"] == "engine_error"
        assert running.result() == expected
        restarts = evil_server.metrics()["gpt2_worker_restarts_total"]
        assert restarts <= 8, "four for each"
        assert evil_server.metrics()['gpt2_request_success_total{finished_reason="error"}'] == 2


@pytest.fixture(scope="module")
def short(tiny: Path) -> Iterator[RunningServer]:
    with serving(tiny, "--threads", "1", "--max-num-seqs", "1", "--request-timeout", "2") as server:
        yield server


def test_a_request_has_its_time_running_or_queued(short: RunningServer) -> None:
    long = {"prompt": "a", "max_tokens": 1000, "n": 100, "ignore_eos": True}
    with ThreadPoolExecutor(2) as pool:
        event = pool.submit(last_event, short, **long)
        until(lambda: short.metrics()["gpt2_num_requests_running"] == 1)
        queued = pool.submit(post, short, prompt="b", max_tokens=1)
        assert event.result()["error"]["message"].startswith("The request was not finished in the time")
        assert queued.result().status_code in (200, 504)  # it had its turn when the first one's time was up, or not
    short.check_identities()


@pytest.mark.slow
def test_what_waits_for_longer_than_a_request_may_take_is_told_504(short: RunningServer) -> None:
    with ThreadPoolExecutor(3) as pool:
        began = time.monotonic()
        long = [pool.submit(post, short, prompt="a", max_tokens=1000, n=100, ignore_eos=True) for _ in range(3)]
        answers = [each.result() for each in long]
        assert {answer.status_code for answer in answers} == {504}
        assert all(answer.headers["x-should-retry"] == "false" for answer in answers)
        assert time.monotonic() - began < 10
    short.check_identities()


def test_a_queued_request_whose_client_has_left_is_never_run(tiny: Path) -> None:
    with serving(tiny, "--threads", "1", "--max-num-seqs", "1") as server, ThreadPoolExecutor(12) as pool:
        running = pool.submit(server.complete, prompt="a", max_tokens=900, ignore_eos=True)
        until(lambda: server.metrics()["gpt2_num_requests_running"] == 1)
        os.kill(server.worker_pid, signal.SIGSTOP)  # on a fast machine 900 tokens take less time than the leaving

        def leave(i: int) -> None:
            with pytest.raises(httpx.ReadTimeout):
                post(server, timeout=0.4, prompt=f"{i} one two three", max_tokens=500, ignore_eos=True)

        try:
            for left in [pool.submit(leave, i) for i in range(10)]:
                left.result()
            assert not running.done()
        finally:
            os.kill(server.worker_pid, signal.SIGCONT)
        running.result()
        now = server.metrics()
        assert now["gpt2_generation_tokens_total"] == 900
        assert now['gpt2_request_success_total{finished_reason="abort"}'] == 10


@pytest.mark.slow
def test_f4_a_worker_that_never_gets_anywhere_ends_the_service_with_70(tiny: Path) -> None:
    with serving(tiny, "--threads", "1", env=evil("raise:step=1")) as server, ThreadPoolExecutor(1) as pool:
        told = pool.submit(last_event, server, prompt="a", max_tokens=5)
        others = [last_event]  # the first request is found guilty; then the next one, and so on
        while server.process.poll() is None:
            try:
                others.append(post(server, prompt="b", max_tokens=5))
            except httpx.TransportError:
                break
        assert told.result()["error"]["code"] == "engine_error"
        assert server.process.wait(10) == 70
        assert any('"type": "RuntimeError", "said": "evil"' in line for line in server.lines)
        assert any("worker died too often" in line for line in server.lines)


@pytest.mark.slow
@pytest.mark.parametrize("step", [5, 50])
def test_f4_a_worker_that_raises_now_and_then_costs_nobody_a_byte(step: int, tiny: Path, server: RunningServer) -> None:
    requests = mixed_requests(4, 12 if step == 5 else 110)
    expected = stream_all(server, requests)
    with serving(tiny, "--threads", "1", env=evil(f"raise:step={step}")) as evil_server:
        assert stream_all(evil_server, requests) == expected
        assert evil_server.metrics()["gpt2_worker_restarts_total"] >= 2
