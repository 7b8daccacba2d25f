"""Keeps a worker process alive: starts it, hands its messages on, and starts another when it dies.

Knows nothing of requests; who gets told what is the business of whoever listens.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from pathlib import Path
from typing import Protocol

from server.engine.heartbeat import Heartbeat
from server.worker.channel import EngineChannel
from server.worker.messages import Failed, Loaded, Ready, Refused, Shutdown, Slept, Start, Starting, Step

log = logging.getLogger(__name__)

EXIT_ENGINE_DIED = 70
EXIT_CONFIG = 78
CRASHES_MAX = 5  # lives in a row in which no token came about: starting another helps nobody
BACKOFF_MAX = 1.0  # seconds
START_TIMEOUT = 600.0  # to load the model
STOP_TIMEOUT = 2.0  # to end when told to
LOOK = 0.25  # between two looks at a worker
STOPPED_TIMEOUT = 0.5  # a process that was stopped (SIGSTOP) is not merely slow, so it gets no more


class Listener(Protocol):
    """Told of each worker by its number, which the one that takes its place inherits."""

    def worker_ready(self, worker: int, ready: Ready, channel: EngineChannel) -> None: ...
    def worker_step(self, worker: int, step: Step) -> None: ...
    def worker_refused(self, worker: int, refused: Refused) -> None: ...
    def worker_loaded(self, worker: int, loaded: Loaded) -> str | None: ...  # why there can be no service
    def worker_slept(self, worker: int, slept: Slept) -> None: ...
    def worker_lost(self, worker: int) -> None: ...


class Supervisor:
    def __init__(self, start: Start, listener: Listener, worker: int = 0, *, stall_timeout: float) -> None:
        """stall_timeout: seconds that a worker with work may be silent before it is replaced."""
        self._worker = worker
        self._start = start
        self._listener = listener
        self._stall_timeout = stall_timeout
        self._crashes = 0  # in a row
        self._channel: EngineChannel | None = None
        self._ready = False
        self._stopping = False
        self.starting = Starting(0.0)  # how far the worker is, while it is not ready
        self.pid: int | None = None  # of the worker that runs now

    async def run(self) -> int:
        """Until `stop`. Returns the exit status of the service: 0, or why no worker can be kept running."""
        while not self._stopping:
            failure = await self._one_life()
            if self._stopping:
                return 0
            self._listener.worker_lost(self._worker)
            if failure is not None:
                log.error("worker failed", extra={"worker": self._worker, "reason": failure.message})
                return failure.exit_code
            if self._crashes > CRASHES_MAX:
                log.error("worker died too often", extra={"worker": self._worker, "crashes": self._crashes})
                return EXIT_ENGINE_DIED
            if self._crashes > 1:
                await asyncio.sleep(min(0.1 * 2**self._crashes, BACKOFF_MAX))
        return 0

    def stop(self) -> None:
        self._stopping = True
        if self._channel is not None:
            self._channel.send(Shutdown())

    async def _one_life(self) -> Failed | None:
        """One worker from start to end. Returns what it said if it could not start; None if it just died."""
        ours, theirs = socket.socketpair()
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "server.worker", str(theirs.fileno()), pass_fds=(theirs.fileno(),)
            )
        finally:
            theirs.close()
        self.pid = process.pid
        self._channel = await EngineChannel.open(ours)
        self._crashes += 1  # until it has proved itself
        self._ready = False
        heartbeat = Heartbeat()
        watch = asyncio.create_task(self._watch(process, self._channel, heartbeat))
        try:
            self._channel.send(self._start)
            if self._stopping:  # told while the process was being started
                self._channel.send(Shutdown())
            return await self._listen(self._channel, heartbeat)
        finally:
            watch.cancel()
            self._channel.close()
            self._channel = None
            await _reap(process)
            log.info("worker ended", extra={"pid": process.pid, "status": process.returncode})

    async def _listen(self, channel: EngineChannel, heartbeat: Heartbeat) -> Failed | None:
        while (message := await channel.receive()) is not None:
            heartbeat.heard(message)
            match message:
                case Starting():
                    self.starting = message
                case Ready():
                    self._ready = True
                    self._listener.worker_ready(self._worker, message, channel)
                case Step():
                    if message.outputs:
                        self._crashes = 0
                    self._listener.worker_step(self._worker, message)
                case Refused():
                    self._listener.worker_refused(self._worker, message)
                case Loaded():
                    reason = self._listener.worker_loaded(self._worker, message)
                    if reason is not None:
                        return Failed(reason, EXIT_CONFIG)
                case Slept():
                    self._listener.worker_slept(self._worker, message)
                case Failed():
                    return message
        return None

    async def _watch(self, process: asyncio.subprocess.Process, channel: EngineChannel, heartbeat: Heartbeat) -> None:
        """Kills a worker that is stuck, or that does not end when told to. The rest follows from its death."""
        ending = 0
        while True:
            await asyncio.sleep(LOOK)
            ending += self._stopping
            silent = LOOK * heartbeat.look(channel.sent)
            stuck = silent > (self._stall_timeout if self._ready else START_TIMEOUT)
            if stuck or LOOK * ending > STOP_TIMEOUT or (silent >= STOPPED_TIMEOUT and _is_stopped(process.pid)):
                log.error("worker is stuck", extra={"worker": self._worker, "pid": process.pid, "seconds": silent})
                process.kill()
                return


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
