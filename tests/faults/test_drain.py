"""How a server leaves: rows F1, F2 and F3 of docs/reliability.md."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import openai
import psutil
import pytest
from mixed import last_event, mixed_requests, post, stream_all
from serving import RunningServer, serving

LONG = {"prompt": "a", "max_tokens": 1000, "n": 20, "ignore_eos": True}


def running(server: RunningServer) -> float:
    return server.metrics()["gpt2_num_requests_running"]


def wait_for_work(server: RunningServer, sequences: int = 1) -> None:
    deadline = time.monotonic() + 30
    while running(server) < sequences:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def family(server: RunningServer) -> list[psutil.Process]:
    parent = psutil.Process(server.process.pid)
    return [parent, *parent.children(recursive=True)]


def check_gone(processes: list[psutil.Process], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while any(lives(each) for each in processes):
        assert time.monotonic() < deadline, processes
        time.sleep(0.01)


def lives(process: psutil.Process) -> bool:
    """What is left of an orphan until somebody asks for its status is no process."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_f1_while_it_drains_it_refuses_new_work_and_finishes_the_old(tiny: Path) -> None:
    requests = mixed_requests(8, 300)
    with serving(tiny, "--threads", "1", "--shutdown-timeout", "240") as server, ThreadPoolExecutor(1) as pool:
        expected = stream_all(server, requests)
        streams = pool.submit(stream_all, server, requests)
        wait_for_work(server, sum(request.get("n", 1) for request in requests))
        processes = family(server)
        with httpx.Client(base_url=server.url) as http:
            assert http.get("/ready").status_code == 200
            server.process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + 1
            while http.get("/ready").status_code == 200:
                assert time.monotonic() < deadline
            refused = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
            assert refused.status_code == 503
            assert refused.headers["connection"] == "close"
            assert refused.headers["retry-after"]
            assert http.get("/health").status_code == 200  # leaving is no illness
        assert not streams.done(), "too late to show anything"
        assert streams.result() == expected
        assert server.process.wait(10) == 0
        check_gone(processes)


def test_f2_what_is_not_finished_in_the_window_is_told_so(tiny: Path) -> None:
    with serving(tiny, "--threads", "1", "--shutdown-timeout", "1") as server, ThreadPoolExecutor(2) as pool:
        stream = pool.submit(last_event, server, **LONG)
        whole = pool.submit(post, server, **LONG)
        wait_for_work(server)
        processes = family(server)
        server.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert stream.result()["error"]["message"].startswith("The server shut down before")
        assert whole.result().status_code == 503
        assert server.process.wait(20) == 0
        assert time.monotonic() - began < 1 + 2 + 12  # the window, what the row allows, and a machine that is shared
        check_gone(processes)


@pytest.mark.parametrize("stuck", [True, pytest.param(False, marks=[pytest.mark.slow])])
def test_f2_a_second_signal_ends_it_within_a_second(stuck: bool, tiny: Path) -> None:
    with serving(tiny, "--threads", "1") as server, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, server, **LONG)
        wait_for_work(server)
        processes = family(server)
        if stuck:
            os.kill(server.worker_pid, signal.SIGSTOP)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(1) == 1
        check_gone(processes, 1)
        with pytest.raises(httpx.TransportError):
            answer.result()


def test_f2_two_signals_at_once_are_one_wish(tiny: Path) -> None:
    """A container's runtime may tell the process group and its leader."""
    with serving(tiny, "--threads", "1") as server, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, server, **{**LONG, "max_tokens": 50})
        wait_for_work(server)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.005)
        server.process.send_signal(signal.SIGTERM)
        assert answer.result().status_code == 200
        assert server.process.wait(20) == 0


def test_f2_a_stuck_worker_does_not_keep_an_idle_server_from_leaving(tiny: Path) -> None:
    with serving(tiny, "--threads", "1") as server:
        processes = family(server)
        os.kill(server.worker_pid, signal.SIGSTOP)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(6) == 0
        check_gone(processes)


@pytest.mark.parametrize("stuck", [True, pytest.param(False, marks=[pytest.mark.slow])])
def test_f3_a_server_that_is_killed_leaves_nothing_behind(stuck: bool, tiny: Path) -> None:
    with serving(tiny, "--threads", "1") as server, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, server, **LONG)
        wait_for_work(server)
        processes = family(server)
        if stuck:
            os.kill(server.worker_pid, signal.SIGSTOP)
        server.process.kill()
        server.process.wait(30)  # a leader that is a zombie already may still have threads that end
        check_gone(processes)
        with pytest.raises(httpx.TransportError):
            answer.result()
        port = str(urlsplit(server.url).port)
    with serving(tiny, "--threads", "1", "--port", port) as again:
        assert again.complete(prompt="a", max_tokens=1)


@contextmanager
def balancing(servers: list[RunningServer]) -> Iterator[str]:
    """What stands before servers that are replaced one by one: each new connection goes to one that is ready."""
    listener = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def ready(server: RunningServer) -> bool:
        try:
            return httpx.get(f"{server.url}/ready", timeout=2).status_code == 200
        except httpx.TransportError:
            return False

    def relay(source: socket.socket, target: socket.socket) -> None:
        with source, target:
            try:
                while data := source.recv(65536):
                    target.sendall(data)
                target.shutdown(socket.SHUT_WR)
            except OSError:
                pass

    def accept() -> None:
        while not over.is_set():
            client, _ = listener.accept()
            where = next((urlsplit(each.url) for each in list(servers) if ready(each)), None)
            if where is None or over.is_set():
                client.close()
                continue
            assert where.hostname is not None
            server = socket.create_connection((where.hostname, where.port or 80))
            for pair in ((client, server), (server, client)):
                threading.Thread(target=relay, args=(pair[0].dup(), pair[1].dup()), daemon=True).start()
            client.close()
            server.close()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield "http://{}:{}".format(*listener.getsockname())
    finally:
        over.set()
        socket.create_connection(listener.getsockname()).close()
        thread.join(5)
        listener.close()


def test_a_rolling_restart_loses_no_request(tiny: Path) -> None:
    """The old server leaves under load while the new one is ready; the client is openai's, with its own retries."""
    with ExitStack() as stack:
        old, new = (stack.enter_context(serving(tiny, "--threads", "1")) for _ in range(2))
        expected = [old.complete(prompt=f"{i}", max_tokens=30, seed=i)["choices"][0]["text"] for i in range(4)]
        url = stack.enter_context(balancing([old, new]))
        leaving = threading.Event()

        def talk(i: int) -> int:
            """Returns how many answers it got after the old server was told to leave."""
            after = 0
            with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
                while after < 5:
                    answer = client.completions.create(model="davinci", prompt=f"{i}", max_tokens=30, seed=i)
                    assert answer.choices[0].text == expected[i]
                    after += leaving.is_set()
            return after

        pool = stack.enter_context(ThreadPoolExecutor(4))
        talks = [pool.submit(talk, i) for i in range(4)]
        time.sleep(1)
        leaving.set()
        assert old.stop() == 0
        assert [each.result() for each in talks] == [5] * 4
        assert new.metrics()["gpt2_requests_total"] > 0
