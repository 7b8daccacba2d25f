"""A supervisor and the processes it starts, which play a worker without computing anything."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from server.engine import crash_loop
from server.engine.crash_loop import CrashLoop
from server.engine.supervisor import EXIT_ENGINE_DIED, Supervisor
from server.worker.channel import EngineChannel
from server.worker.messages import Loaded, Ready, Received, Refused, Slept, Start, Step

WORKER = f"""#!{sys.executable}
import os, signal, socket, sys, time
from pathlib import Path
from server.worker.channel import WorkerChannel
from server.worker.messages import Failed, Ready, Shutdown, Stats, Step

channel = WorkerChannel(socket.socket(fileno=int(sys.argv[3])))
channel.receive(wait=True)
plan = Path(__file__).with_name("plan").read_text()
if plan == "fails":
    channel.send(Failed("no such model", 78))
    sys.exit(78)
if plan == "crashes":
    sys.exit(1)
channel.send(Ready("scripted", 16, 64, 0.1))
channel.send(Step([], Stats(0, 0, 0, 0, 64, 0, 0, 0, 0, 0, []), channel.received))
while not any(isinstance(message, Shutdown) for message in channel.receive(wait=True)):
    pass
"""

START = Start(  # nobody looks at what is in it
    model="m",
    eos_token_ids=[0],
    device="cpu",
    dtype="float32",
    quantization=None,
    kv_cache_dtype="auto",
    max_model_len=64,
    max_num_seqs=4,
    max_num_batched_tokens=64,
    target_itl=None,
    block_size=16,
    kv_cache_bytes=1,
    gpu_utilization=None,
    deterministic=False,
    prefix_caching=True,
    kernels="auto",
    threads=1,
)


@dataclass
class Told:
    """What the supervisor says to its listener."""

    ready: int = 0
    deaths: list[bool] = field(default_factory=list)  # whether each was from outside

    def worker_ready(self, worker: int, ready: Ready, channel: EngineChannel) -> None:
        self.ready += 1

    def worker_received(self, worker: int, received: Received) -> None: ...
    def worker_step(self, worker: int, step: Step) -> None: ...
    def worker_refused(self, worker: int, refused: Refused) -> None: ...
    def worker_loaded(self, worker: int, loaded: Loaded) -> None: ...
    def worker_slept(self, worker: int, slept: Slept) -> None: ...

    def worker_lost(self, worker: int, *, killed: bool) -> None:
        self.deaths.append(killed)


@dataclass
class Stage:
    directory: Path
    told: Told = field(default_factory=Told)

    def plan(self, what: str) -> None:
        (self.directory / "plan").write_text(what)

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not true():
                await asyncio.sleep(0.01)

    def run(self, act: Callable[[Supervisor, asyncio.Task[int]], Awaitable[None]] | None = None) -> int:
        """The exit status of the service."""

        async def play() -> int:
            supervisor = Supervisor(START, self.told, CrashLoop(), stall_timeout=60)
            running = asyncio.create_task(supervisor.run())
            if act is not None:
                await act(supervisor, running)
                supervisor.stop()
            async with asyncio.timeout(30):
                return await running

        return asyncio.run(play())


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    (tmp_path / "worker").write_text(WORKER)
    (tmp_path / "worker").chmod(0o700)
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "worker"))
    return Stage(tmp_path)


def test_a_worker_that_cannot_start_ends_the_service_with_what_it_said(stage: Stage) -> None:
    stage.plan("fails")
    assert stage.run() == 78
    assert len(stage.told.deaths) == 1


def test_a_worker_that_crashes_at_each_start_ends_the_service_with_70(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crash_loop, "WINDOW", 0.5)
    stage.plan("crashes")
    assert stage.run() == EXIT_ENGINE_DIED
    assert len(stage.told.deaths) >= 6


def test_a_model_that_cannot_be_read_once_it_was_served_is_tried_again(stage: Stage) -> None:
    async def act(supervisor: Supervisor, running: asyncio.Task[int]) -> None:
        await stage.until(lambda: stage.told.ready == 1)
        stage.plan("fails")
        assert supervisor.pid is not None
        os.kill(supervisor.pid, signal.SIGKILL)
        await stage.until(lambda: len(stage.told.deaths) >= 2)
        stage.plan("serves")
        await stage.until(lambda: stage.told.ready == 2)
        assert not running.done()

    stage.plan("serves")
    assert stage.run(act) == 0


def test_a_process_that_cannot_be_started_is_tried_again_and_leaks_no_descriptor(stage: Stage) -> None:
    async def act(supervisor: Supervisor, running: asyncio.Task[int]) -> None:
        await stage.until(lambda: len(stage.told.deaths) >= 2)
        before = len(os.listdir("/proc/self/fd"))
        await stage.until(lambda: len(stage.told.deaths) >= 4)
        assert len(os.listdir("/proc/self/fd")) == before
        (stage.directory / "worker").chmod(0o700)
        await stage.until(lambda: stage.told.ready == 1)
        assert not running.done()

    stage.plan("serves")
    (stage.directory / "worker").chmod(0o600)
    assert stage.run(act) == 0


def test_who_killed_a_worker_is_told_from_what_a_worker_did_itself(stage: Stage) -> None:
    async def act(supervisor: Supervisor, _: asyncio.Task[int]) -> None:
        for life, number in enumerate((signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM, signal.SIGSTOP)):
            await stage.until(lambda life=life: stage.told.ready == life + 1)  # type: ignore[misc]
            assert supervisor.pid is not None
            os.kill(supervisor.pid, number)
            if number is signal.SIGSTOP:  # a stopped worker with nothing to do may be so for ever
                os.kill(supervisor.pid, signal.SIGKILL)
            await stage.until(lambda life=life: len(stage.told.deaths) == life + 1)  # type: ignore[misc]

    stage.plan("serves")
    assert stage.run(act) == 0
    assert stage.told.deaths == [True, False, True, True]
