"""Keeps a worker process alive: starts it, hands its messages on, and starts another when it dies.

Knows nothing of requests; who gets told what is the business of whoever listens.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import time
from collections import deque
from typing import Protocol

from server.worker.channel import EngineChannel
from server.worker.messages import Failed, Ready, Shutdown, Slept, Start, Step

log = logging.getLogger(__name__)

EXIT_ENGINE_DIED = 70
CRASHES_MAX = 5  # within CRASH_WINDOW seconds: then it is no accident, and starting another helps nobody
CRASH_WINDOW = 60.0
BACKOFF_MAX = 2.0
STOP_TIMEOUT = 2.0


class Listener(Protocol):
    """Told of each worker by its number, which the one that takes its place inherits."""

    def worker_ready(self, worker: int, ready: Ready, channel: EngineChannel) -> None: ...
    def worker_step(self, worker: int, step: Step) -> None: ...
    def worker_slept(self, worker: int, slept: Slept) -> None: ...
    def worker_lost(self, worker: int) -> None: ...


class Supervisor:
    def __init__(self, start: Start, listener: Listener, worker: int = 0) -> None:
        self._worker = worker
        self._start = start
        self._listener = listener
        self._crashes: deque[float] = deque()
        self._channel: EngineChannel | None = None
        self._stopping = False
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
            if self._crashed_too_often():
                log.error("worker died too often", extra={"crashes": len(self._crashes), "seconds": CRASH_WINDOW})
                return EXIT_ENGINE_DIED
            await asyncio.sleep(min(0.1 * 2 ** (len(self._crashes) - 1), BACKOFF_MAX))
        return 0

    def stop(self) -> None:
        self._stopping = True
        if self._channel is not None:
            self._channel.send(Shutdown())

    def _crashed_too_often(self) -> bool:
        now = time.monotonic()
        self._crashes.append(now)
        while now - self._crashes[0] > CRASH_WINDOW:
            self._crashes.popleft()
        return len(self._crashes) > CRASHES_MAX

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
        try:
            self._channel.send(self._start)
            if self._stopping:  # told while the process was being started
                self._channel.send(Shutdown())
            return await self._listen(self._channel)
        finally:
            self._channel.close()
            self._channel = None
            await _reap(process)
            log.info("worker ended", extra={"pid": process.pid, "status": process.returncode})

    async def _listen(self, channel: EngineChannel) -> Failed | None:
        while (message := await channel.receive()) is not None:
            match message:
                case Ready():
                    self._listener.worker_ready(self._worker, message, channel)
                case Step():
                    self._listener.worker_step(self._worker, message)
                case Slept():
                    self._listener.worker_slept(self._worker, message)
                case Failed():
                    return message
        return None


async def _reap(process: asyncio.subprocess.Process) -> None:
    """Its socket is closed by now, so it ends by itself; one that is stuck is killed."""
    try:
        await asyncio.wait_for(process.wait(), STOP_TIMEOUT)
    except TimeoutError:
        process.kill()
        await process.wait()
