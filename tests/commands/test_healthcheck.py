"""`gpt2-server healthcheck`: 0 for a server that is well, 1 for anything else, soon, and with next to no imports."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from server.cli import main


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/slow/health":
            self.server.hung.wait(10)  # type: ignore[attr-defined]
        self.send_response({"/health": 200, "/ready": 503, "/behind/a/proxy/health": 200}.get(self.path, 404))
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.hung = threading.Event()  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.hung.set()  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["URL"], 0),
        (["URL/"], 0),
        (["URL/behind/a/proxy"], 0),
        (["URL", "--ready"], 1),
        (["URL/elsewhere"], 1),
        (["URL/slow", "--timeout", "0.2"], 1),
        (["http://127.0.0.1:1"], 1),
        (["http://127.0.0.1:port"], 1),
        (["ftp://127.0.0.1"], 1),
    ],
)
def test_its_exit_status(arguments: list[str], status: int, url: str) -> None:
    assert main(["healthcheck", *(each.replace("URL", url) for each in arguments)]) == status


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", ""])
def test_it_finds_the_server_of_this_machine(host: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT2_SERVER_HOST", host)
    monkeypatch.setenv("GPT2_SERVER_PORT", url.rpartition(":")[2])
    assert main(["healthcheck"]) == 0


def test_it_imports_nothing_that_takes_long() -> None:
    script = (
        "import sys; from server.cli import main; main(['healthcheck', 'http://127.0.0.1:1']); "
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert {"torch", "numpy", "pydantic", "fastapi", "asyncio", "tiktoken"} & set(done.stdout.split()) == set()
