"""A proxy in front of the server that refuses the first requests, in the server's own words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import httpx

from server.api.errors import error_response
from server.errors import Overloaded, RateLimited, ServerError

BUSY = Overloaded("The queue is full.", retry_after=1)
LIMITED = RateLimited("This key has had its share.", retry_after=1)


class Proxy(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, target: str, refusals: list[ServerError]) -> None:
        super().__init__(("127.0.0.1", 0), Relay)
        self.target = target
        self.refusals = refusals
        self.seen: list[dict[str, str]] = []  # headers of each request

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Relay(BaseHTTPRequestHandler):
    server: Proxy

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.seen.append({name.lower(): value for name, value in self.headers.items()})
        if self.server.refusals:
            refusal = error_response(self.server.refusals.pop(0))
            self._answer(refusal.status_code, dict(refusal.headers), bytes(refusal.body))
            return
        answer = httpx.post(self.server.target + self.path, content=body, timeout=60)
        self._answer(answer.status_code, dict(answer.headers), answer.content)

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name not in ("transfer-encoding", "content-length", "date"):
                self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  (its name there)
        pass


@contextmanager
def refusing(target: str, *refusals: ServerError) -> Iterator[Proxy]:
    proxy = Proxy(target, list(refusals))
    thread = Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join(5)
