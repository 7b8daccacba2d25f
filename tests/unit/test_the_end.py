"""A service that ends, with parts that fail at it: every other part is stopped all the same."""

from __future__ import annotations

import asyncio
import socket
from types import SimpleNamespace
from typing import Any

import pytest

from server.assembly import Backend
from server.lifecycle import Service

PARTS = ["stored.stop", "supervisor.stop", "supervisor.run", "grammars.stop", "stored.close"]


class Parts:
    """Of a backend; one of them fails at its end."""

    def __init__(self, failing: str | None) -> None:
        self._failing = failing
        self._told = asyncio.Event()
        self.ended: list[str] = []

    def end(self, name: str) -> None:
        self.ended.append(name)
        if name == self._failing:
            raise RuntimeError(name)

    async def end_soon(self, name: str) -> None:
        await asyncio.sleep(0)
        self.end(name)

    def stop_supervisor(self) -> None:
        self._told.set()
        self.end("supervisor.stop")

    async def run_supervisor(self) -> int:
        await self._told.wait()
        await self.end_soon("supervisor.run")
        return 7

    def backend(self) -> Backend:
        stored = SimpleNamespace(
            start=lambda: None, stop=lambda: self.end_soon("stored.stop"), close=lambda: self.end("stored.close")
        )
        supervisor = SimpleNamespace(run=self.run_supervisor, stop=self.stop_supervisor)
        grammars = SimpleNamespace(stop=lambda: self.end_soon("grammars.stop"))
        unused: Any = None
        return Backend(unused, unused, [supervisor], grammars, unused, unused, unused, stored)  # type: ignore[list-item, arg-type]


@pytest.mark.parametrize("failing", [None, *PARTS])
def test_a_part_that_fails_to_stop_keeps_no_other_from_it(failing: str | None) -> None:
    async def run() -> None:
        parts = Parts(failing)
        backend = parts.backend()
        workers = backend.start()
        await asyncio.sleep(0)
        if failing is None:
            assert await backend.stop(workers) == 7
        else:
            with pytest.raises(RuntimeError, match=failing):
                await backend.stop(workers)
        assert parts.ended == PARTS

    asyncio.run(run())


def test_connections_are_closed_whatever_becomes_of_the_backend() -> None:
    class HTTP:
        should_exit = False
        ended = False

        async def serve(self, sockets: list[socket.socket]) -> None:
            while not self.should_exit:
                await asyncio.sleep(0.01)
            self.ended = True

    class Failing:
        engine = SimpleNamespace(ready=True, worker=object(), fail_all=lambda _: None)

        def start(self) -> list[asyncio.Task[int]]:
            return [asyncio.create_task(asyncio.sleep(0, 70))]

        async def stop(self, workers: list[asyncio.Task[int]]) -> int:
            raise RuntimeError

    async def run() -> None:
        http, nobody = HTTP(), SimpleNamespace(ready=lambda _: None)
        listener, backend = socket.socket(), Failing()
        service = Service(backend, http, listener, 1.0, None, lambda _: None)  # type: ignore[arg-type]
        with listener, pytest.raises(RuntimeError):
            await service.run(nobody)  # type: ignore[arg-type]
        assert http.ended

    asyncio.run(run())
