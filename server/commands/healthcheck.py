"""`gpt2-server healthcheck`: exit status 0 if a server answers that it is well, else 1.

For containers: it needs no curl, and imports nothing that takes long.
"""

from __future__ import annotations

import argparse
import http.client
import os
import sys
from urllib.parse import urlsplit

ANY_ADDRESS = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - what a server may listen on


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "url", nargs="?", metavar="URL", help="of the server [GPT2_SERVER_HOST and GPT2_SERVER_PORT of this machine]"
    )
    parser.add_argument("--ready", action="store_true", help="ask for /ready (it takes requests), not /health")
    parser.add_argument("--timeout", type=float, default=3.0, metavar="SECONDS", help="[3]")


def run(arguments: argparse.Namespace) -> int:
    path = "/ready" if arguments.ready else "/health"
    try:
        status = _ask(arguments.url or _local_url(), path, arguments.timeout)
    except (OSError, ValueError, http.client.HTTPException) as error:
        print(f"no answer: {type(error).__name__}", file=sys.stderr)
        return 1
    print(f"{path}: {status}")
    return 0 if status == http.client.OK else 1


def _local_url() -> str:
    host = os.environ.get("GPT2_SERVER_HOST", "127.0.0.1")
    host = ANY_ADDRESS.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{os.environ.get('GPT2_SERVER_PORT', '8000')}"


def _ask(url: str, path: str, timeout: float) -> int:
    """The status. Raises OSError, ValueError or HTTPException."""
    parts = urlsplit(url if "//" in url else f"//{url}")
    if parts.hostname is None or parts.scheme not in {"", "http"}:
        raise ValueError
    connection = http.client.HTTPConnection(parts.hostname, parts.port or 80, timeout=timeout)
    try:
        connection.request("GET", parts.path.rstrip("/") + path)
        return connection.getresponse().status
    finally:
        connection.close()
