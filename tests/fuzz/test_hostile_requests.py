"""B1, B4: whatever is sent, over whole connections: no answer of 500 or more, no hang, and every error an error object
that tells nothing of the machine. What the log says of it is looked at too."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from hostile import Hostile, hostile
from hygiene import check_error, check_message
from serving import RunningServer, serving

CONNECTIONS = 48
HANG = 60.0  # seconds; the longest of the server's own deadlines is 1 here
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    template = tmp_path_factory.mktemp("chat") / "template.jinja"
    template.write_text(TEMPLATE)
    short = {f"GPT2_SERVER_{name}": "1" for name in ("HEAD_TIMEOUT", "BODY_TIMEOUT", "KEEP_ALIVE_TIMEOUT")}
    with serving(tiny, "--threads", "1", "--chat-template", str(template), env=short) as running:
        yield running


class Connection:
    """As little of a client as can read what a server says, however odd the question was."""

    def __init__(self, host: str, port: int) -> None:
        self._where = (host, port)
        self._open: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: Hostile) -> tuple[int, bytes] | None:
        """Status and body; None where no answer came, which only what is no request may meet."""
        for again in (True, False):
            fresh = self._open is None
            reader, writer = self._open or await asyncio.open_connection(*self._where)
            self._open = (reader, writer)
            try:
                writer.write(request.raw)
                await writer.drain()
                head = await self._head(reader)
                body = await self._body(reader, head, request)
            except (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                self.close()
                if fresh or not again:
                    return None
                continue  # it was idle for too long, and closed
            if not request.whole or b"connection: close" in head.lower():
                self.close()
            return int(head[9:12]), body
        return None

    async def _head(self, reader: asyncio.StreamReader) -> bytes:
        head = await reader.readuntil(b"\r\n\r\n")
        while head.startswith(b"HTTP/1.1 100"):
            head = await reader.readuntil(b"\r\n\r\n")
        return head

    async def _body(self, reader: asyncio.StreamReader, head: bytes, request: Hostile) -> bytes:
        lines = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
        if request.raw.startswith(b"HEAD ") or head[9:12] == b"204":
            return b""
        if b"chunked" in lines.get(b"transfer-encoding", b""):
            body = b""
            while size := int(await reader.readline(), 16):
                body += (await reader.readexactly(size + 2))[:-2]
            await reader.readexactly(2)
            return body
        return await reader.readexactly(int(lines.get(b"content-length", b"0")))

    def close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None


def check_answer(request: Hostile, status: int, body: bytes) -> None:
    assert status < 500, (status, body)
    if request.raw.startswith((b"HEAD ", b"OPTIONS ")):
        return
    if status >= 400:
        check_error(body)
    elif body.startswith(b"data: "):
        for line in body.decode().split("\n\n"):
            if line.startswith('data: {"error"'):
                check_error(line.removeprefix("data: "))


async def storm(server: RunningServer, count: int, seed: int) -> Counter[str]:
    where = urlsplit(server.url)
    assert where.hostname is not None
    assert where.port is not None
    left = iter(range(count))
    seen: Counter[str] = Counter()

    async def ask_on() -> None:
        connection = Connection(where.hostname or "", where.port or 0)
        for number in left:
            request = hostile(random.Random(f"{seed} {number}"))
            try:
                async with asyncio.timeout(HANG):
                    answer = await connection.ask(request)
                if answer is None:
                    assert not request.whole, "no answer"
                    seen["none"] += 1
                    continue
                check_answer(request, *answer)
                seen[str(answer[0])] += 1
            except Exception as error:
                raise AssertionError(f"request {number} of seed {seed}: {request.raw[:2000]!r}") from error
        connection.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(CONNECTIONS):
            group.create_task(ask_on())
    return seen


def check_log(server: RunningServer) -> None:
    for line in server.lines:
        if line.startswith("{"):
            written = json.loads(line)
            assert written["level"] in {"info", "debug"}, line
            check_message(written["message"])


def rss(server: RunningServer) -> int:
    return int(psutil.Process(server.process.pid).memory_info().rss)


def test_b1_b4_two_thousand_hostile_requests(server: RunningServer) -> None:
    seen = asyncio.run(storm(server, 2000, seed=1))
    assert seen["200"] > 200
    assert seen["400"] > 400
    check_log(server)
    server.check_identities()


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_b1_b4_a_hundred_thousand_hostile_requests(server: RunningServer) -> None:
    asyncio.run(storm(server, 5000, seed=2))  # caches fill
    before = rss(server)
    seen = asyncio.run(storm(server, 100_000, seed=3))
    server.check_identities()
    after = rss(server)
    print(dict(sorted(seen.items())), f"RSS {before >> 20} MiB before, {after >> 20} MiB after")
    check_log(server)
    with suppress(KeyError):
        assert not server.metrics()["gpt2_worker_restarts_total"]
    assert after < before * 1.05
