"""The trainer's process: started at the lowest priority, listened to, stopped. Knows nothing of jobs as clients do.

It may outlive a server that was killed, until it has something to say. So it inherits a lock on the job's directory:
whoever gets the lock knows that nobody trains there any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from model.training.job import Job

COMMAND = (sys.executable, "-m", "model.training.finetune")
LINE_MAX = 1 << 20  # bytes of what it says at once
STOP_TIMEOUT = 10.0  # seconds to save its state after it was told to stop
LOCK_POLL = 0.1


class Trainer:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """Until it ends."""
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            with contextlib.suppress(ValueError):  # cut short by a kill
                yield json.loads(line)

    async def ended(self) -> int:
        """Its exit status; negative where a signal ended it."""
        return await self._process.wait()

    def give_way(self) -> None:
        """It rests for as long as it has worked since the last time."""
        self._signal(signal.SIGURG)

    def stop(self) -> None:
        """It saves its state first."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)


@asynccontextmanager
async def training(job: Job, directory: Path) -> AsyncIterator[Trainer]:
    """A trainer at the job, alone in its directory; on leaving it has ended. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "job.json"
    path.write_bytes(msgspec.json.encode(job))
    lock = await _lock(directory / "lock")
    try:
        with (directory / "stderr.txt").open("wb") as complaints:
            process = await asyncio.create_subprocess_exec(
                *COMMAND, str(path),
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=complaints,
                pass_fds=(lock,), limit=LINE_MAX, start_new_session=True,  # Ctrl-C is for us, who then stop it
            )  # fmt: skip
    finally:
        os.close(lock)
    _make_humble(process.pid)
    trainer = Trainer(process)
    try:
        yield trainer
    finally:
        await _end(trainer)


async def _end(trainer: Trainer) -> None:
    trainer.stop()
    ending = asyncio.ensure_future(trainer.ended())
    try:
        async with asyncio.timeout(STOP_TIMEOUT):
            await asyncio.shield(ending)
    except TimeoutError:
        pass
    finally:
        trainer.kill()
        await ending


async def _lock(path: Path) -> int:
    """Waits for a trainer that a server before us has left."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                await asyncio.sleep(LOCK_POLL)
            else:
                return descriptor
    except BaseException:
        os.close(descriptor)
        raise


def _make_humble(pid: int) -> None:
    """It gets the time that nobody else wants, and is the first to go where memory is short. Linux alone knows how."""
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000", "ascii")
