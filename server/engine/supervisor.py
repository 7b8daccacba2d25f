"""Keeps a worker process alive: starts it, hands its messages on, and starts another when it dies.

Knows nothing of requests; who gets told what is the business of whoever listens.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from server.engine.crash_loop import CrashLoop
from server.engine.heartbeat import Heartbeat
from server.worker.channel import EngineChannel
from server.worker.messages import (
    Failed,
    Loaded,
    Ready,
    Received,
    Refused,
    Shutdown,
    Slept,
    Start,
    Starting,
    Step,
)

log = logging.getLogger(__name__)

EXIT_ENGINE_DIED = 70
EXIT_CONFIG = 78
BACKOFF_MAX = 1.0  # seconds
START_TIMEOUT = 600.0  # to load the model
STOP_TIMEOUT = 2.0  # to end when told to
LOOK = 0.25  # between two looks at a worker
STOPPED_TIMEOUT = 0.5  # a process that was stopped (SIGSTOP) is not merely slow, so it gets no more
CRASHES = {  # signals that a process gets for what it did; others come from outside
    signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV, signal.SIGSYS, signal.SIGTRAP,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Death:
    """How a worker ended."""

    idle: bool  # it was ready and had nothing to do
    killed: bool  # from outside, or by the kernel for want of memory; not by what it computed
    failure: Failed | None = None  # what it said, if it said anything


class Listener(Protocol):
    """Told of each worker by its number, which the one that takes its place inherits."""

    def worker_ready(self, worker: int, ready: Ready, channel: EngineChannel) -> None: ...
    def worker_received(self, worker: int, received: Received) -> None: ...
    def worker_step(self, worker: int, step: Step) -> None: ...
    def worker_refused(self, worker: int, refused: Refused) -> None: ...
    def worker_loaded(self, worker: int, loaded: Loaded) -> str | None: ...  # why there can be no service
    def worker_slept(self, worker: int, slept: Slept) -> None: ...
    def worker_lost(self, worker: int, *, killed: bool) -> None: ...


class Supervisor:
    def __init__(
        self, start: Start, listener: Listener, crash_loop: CrashLoop, worker: int = 0, *, stall_timeout: float
    ) -> None:
        """crash_loop: one for all workers. stall_timeout: seconds that a worker with work may be silent before it is
        replaced."""
        self._worker = worker
        self._start = start
        self._listener = listener
        self._crash_loop = crash_loop
        self._stall_timeout = stall_timeout
        self._crashes = 0  # of this worker in a row, without a token between
        self._channel: EngineChannel | None = None
        self._ready = False
        self._proven = False  # a worker was ready once, so what the service needs can be read
        self._stopping = False
        self.starting = Starting(0.0)  # how far the worker is, while it is not ready
        self.pid: int | None = None  # of the worker that runs now

    async def run(self) -> int:
        """Until `stop`. Returns the exit status of the service: 0, or why no worker can be kept running."""
        while not self._stopping:
            death = await self._one_life()
            if self._stopping:
                return 0
            self._listener.worker_lost(self._worker, killed=death.killed)
            status = self._judge(death)
            if status is not None:
                return status
            if self._crashes > 1:
                await asyncio.sleep(min(0.1 * 2**self._crashes, BACKOFF_MAX))
        return 0

    def stop(self) -> None:
        self._stopping = True
        if self._channel is not None:
            self._channel.send(Shutdown())

    def _judge(self, death: Death) -> int | None:
        """The exit status of the service, where starting another worker would help nobody."""
        failure = death.failure
        if failure is not None:
            log.error("worker failed", extra={"worker": self._worker, "reason": failure.message})
            if not self._proven:  # nobody is served yet, and the next start would say the same
                return failure.exit_code
        self._crashes += not death.idle
        if not self._crash_loop.died(self._worker, time.monotonic(), idle=death.idle):
            return None
        log.error("worker died too often", extra={"worker": self._worker, "crashes": self._crashes})
        return EXIT_ENGINE_DIED if failure is None else failure.exit_code

    async def _one_life(self) -> Death:
        """One worker from start to end."""
        self._ready = False
        try:
            ours, theirs = socket.socketpair()
            with ours:
                with theirs:
                    process = await asyncio.create_subprocess_exec(
                        sys.executable, "-m", "server.worker", str(theirs.fileno()), pass_fds=(theirs.fileno(),)
                    )
                return await self._live(process, ours)
        except OSError as error:  # no process, descriptor or memory is to be had: in a while there may be
            log.error("a worker cannot be started", extra={"worker": self._worker, "reason": error.strerror})
            return Death(idle=False, killed=False)

    async def _live(self, process: asyncio.subprocess.Process, ours: socket.socket) -> Death:
        heartbeat = Heartbeat()
        failure: Failed | None = None
        self.pid = process.pid
        try:
            channel = self._channel = await EngineChannel.open(ours)
            watch = asyncio.create_task(self._watch(process, channel, heartbeat))
            try:
                channel.send(self._start)
                if self._stopping:  # told while the process was being started
                    channel.send(Shutdown())
                failure = await self._listen(channel, heartbeat)
            finally:
                watch.cancel()
                channel.close()
        finally:
            self._channel = None
            await _reap(process)
            log.info("worker ended", extra={"pid": process.pid, "status": process.returncode})
        assert process.returncode is not None
        stuck = watch.done() and not watch.cancelled() and watch.result()
        killed = process.returncode < 0 and -process.returncode not in CRASHES and not stuck
        return Death(idle=self._is_idle(channel, heartbeat), killed=killed, failure=failure)

    def _is_idle(self, channel: EngineChannel, heartbeat: Heartbeat) -> bool:
        return self._ready and not heartbeat.has_work(channel.sent)

    async def _listen(self, channel: EngineChannel, heartbeat: Heartbeat) -> Failed | None:
        while (message := await channel.receive()) is not None:
            heartbeat.heard(message)
            match message:
                case Starting():
                    self.starting = message
                case Ready():
                    self._ready = self._proven = True
                    self._listener.worker_ready(self._worker, message, channel)
                case Received():
                    self._listener.worker_received(self._worker, message)
                case Step():
                    if message.outputs:
                        self._crashes = 0
                        self._crash_loop.progressed()
                    self._listener.worker_step(self._worker, message)
                case Refused():
                    self._listener.worker_refused(self._worker, message)
                case Loaded():
                    reason = self._listener.worker_loaded(self._worker, message)
                    if reason is not None:
                        self._proven = False  # it takes more than the model for this service to be ready
                        return Failed(reason, EXIT_CONFIG)
                case Slept():
                    self._listener.worker_slept(self._worker, message)
                case Failed():
                    return message
        return None

    async def _watch(self, process: asyncio.subprocess.Process, channel: EngineChannel, heartbeat: Heartbeat) -> bool:
        """Kills a worker that is stuck, or that does not end when told to. The rest follows from its death.

        Returns whether the worker has itself to blame for that: not one that somebody stopped.
        """
        ending = 0
        while True:
            await asyncio.sleep(LOOK)
            ending += self._stopping
            self._crash_loop.looked(self._worker, time.monotonic(), idle=self._is_idle(channel, heartbeat))
            silent = LOOK * heartbeat.look(channel.sent)
            stuck = silent > (self._stall_timeout if self._ready else START_TIMEOUT)
            stopped = silent >= STOPPED_TIMEOUT and _is_stopped(process.pid)
            if stuck or stopped or LOOK * ending > STOP_TIMEOUT:
                log.error("worker is stuck", extra={"worker": self._worker, "pid": process.pid, "seconds": silent})
                process.kill()
                return not stopped


def _is_stopped(pid: int) -> bool:
    """By a signal; proc(5). Where this is not Linux, nobody knows."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(") ")[2][:1]
    except OSError:
        return False
    return state == "T"


async def _reap(process: asyncio.subprocess.Process) -> None:
    """Its socket is closed by now, so it ends by itself; one that is stuck is killed."""
    try:
        async with asyncio.timeout(STOP_TIMEOUT):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
