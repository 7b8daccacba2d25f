"""A backend served over HTTP, from its start to its end: what is started, in which order, and how it ends.

Signals are ours: SIGTERM or SIGINT drains (no new work, running requests finish), a second one ends at once;
SIGHUP reads the key file again.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Protocol

from server.api.keys import Keyring
from server.assembly import POLL, Backend, assemble, read_keys
from server.errors import Draining, EngineError, SettingsError
from server.http import BACKLOG, Edges, HTTPServer, http_server
from server.settings import Settings
from server.worker.messages import Ready, Starting

log = logging.getLogger(__name__)

ONE_WISH = 0.1  # seconds within which two signals are one: a process group and its leader may both be told
LAG_PERIOD = 0.25  # seconds between looks at how late the event loop is


class Announcer(Protocol):
    """Whoever tells the operator how the start goes."""

    def starting(self, progress: Starting) -> None:
        """Called often."""
        ...

    def ready(self, ready: Ready) -> None: ...


class StopSignal:
    """SIGTERM or SIGINT: the first asks to drain, one that comes later to end at once."""

    def __init__(self) -> None:
        self.came = asyncio.Event()
        self._at = 0.0

    def receive(self) -> None:
        now = time.monotonic()
        if not self.came.is_set():
            self._at = now
            self.came.set()
        elif now - self._at >= ONE_WISH:
            log.warning("second signal: ending at once")
            os._exit(1)


@dataclass(frozen=True, slots=True)
class Service:
    """A backend that is served over HTTP, from here to its end."""

    backend: Backend
    http: HTTPServer
    listener: socket.socket
    shutdown_timeout: float
    reload: Callable[[], None] | None  # on SIGHUP
    observe_lag: Callable[[float], None]  # told by how many seconds the event loop is late

    async def run(self, announcer: Announcer) -> int:
        """Until a signal, or until a worker cannot be kept running. Returns the exit status."""
        gc.collect()
        gc.freeze()  # what was loaded stays: the collector need not walk it whenever a large request is read
        stop = StopSignal()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.receive)
        if self.reload is not None:
            loop.add_signal_handler(signal.SIGHUP, self.reload)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})  # one that came while it started is heard now
        workers = self.backend.start()
        http = asyncio.create_task(self.http.serve(sockets=[self.listener]))
        announcing = asyncio.create_task(self._announce(announcer))
        watching = asyncio.create_task(self._watch_lag())
        stopped = asyncio.create_task(stop.came.wait())
        try:
            await asyncio.wait({*workers, stopped, http}, return_when=asyncio.FIRST_COMPLETED)
            if stop.came.is_set():
                await self._drain()
            else:
                self.backend.engine.fail_all(EngineError("The engine has stopped and cannot answer this request."))
        finally:
            for task in (announcing, watching, stopped):
                task.cancel()
            try:
                status = await self.backend.stop(workers)
            finally:
                self.http.should_exit = True
                await http
        return status

    async def _announce(self, announcer: Announcer) -> None:
        while not self.backend.engine.ready:
            workers = [supervisor.starting for supervisor in self.backend.supervisors]
            announcer.starting(min(workers, key=attrgetter("share", "recorded")))
            await asyncio.sleep(POLL)
        assert self.backend.engine.worker is not None
        announcer.ready(self.backend.engine.worker)

    async def _watch_lag(self) -> None:
        while True:
            due = time.perf_counter() + LAG_PERIOD
            await asyncio.sleep(LAG_PERIOD)
            self.observe_lag(max(time.perf_counter() - due, 0.0))

    async def _drain(self) -> None:
        """New work is refused from the first moment; what runs may finish; what is left at the end is told so."""
        log.info("draining", extra={"requests": self.backend.engine.load})
        self.backend.engine.drain()
        if self.backend.stored is not None:
            await self.backend.stored.batches.stop()  # what is left of them is the next server's
        deadline = time.monotonic() + self.shutdown_timeout
        while not self.backend.engine.idle and time.monotonic() < deadline:
            await asyncio.sleep(POLL)
        if not self.backend.engine.idle:
            log.warning("drain window is over", extra={"requests": self.backend.engine.load})
            self.backend.engine.fail_all(Draining("The server shut down before this request was finished."))


def build(settings: Settings) -> Service:
    """Raises ModelError where the model cannot be served, and SettingsError where the address cannot be bound."""
    backend = assemble(settings)
    keys = backend.keys
    return Service(
        backend=backend,
        http=http_server(backend.app, _edges(settings)),
        listener=_listen(settings.host, settings.port),
        shutdown_timeout=settings.shutdown_timeout,
        reload=None if keys is None or settings.api_key_file is None else partial(_reload, settings, keys),
        observe_lag=backend.metrics.loop_lag.observe,
    )


def _edges(settings: Settings) -> Edges:
    return Edges(
        head_timeout=settings.head_timeout,
        keep_alive_timeout=settings.keep_alive_timeout,
        write_timeout=settings.write_timeout,
        max_head_bytes=settings.max_head_bytes,
        max_connections=settings.max_connections,
    )


def _reload(settings: Settings, keyring: Keyring) -> None:
    """A file that cannot be used changes nothing: who had a key still has it."""
    try:
        keys = read_keys(settings)
    except SettingsError as error:
        log.error("the keys stay as they were", extra={"reason": str(error)})
        return
    keyring.replace(keys)
    log.info("keys read again", extra={"keys": len(keys)})


def _listen(host: str, port: int) -> socket.socket:
    """Bound before anything is loaded, so that a taken port is said at once. Raises SettingsError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no name of a host"
        raise SettingsError(f"cannot listen on {host}:{port}: {reason}") from None
    listener.setblocking(False)
    # Connections inherit it. asyncio sets it only where a socket was made with IPPROTO_TCP, which this one was not, and
    # without it an answer's second write waits for the client to acknowledge the first: 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
