"""`gpt2-server serve [MODEL]`: reads settings, says what is served and where, and serves until a signal."""

from __future__ import annotations

import argparse
import asyncio
import shlex
import signal
import sys
from collections.abc import Sequence

from server import logs
from server.api.models import ServedModel
from server.lifecycle import build
from server.settings import ENV_PREFIX, flags, read_settings
from server.worker.messages import Ready, Starting

EXAMPLE = '"prompt": "It was a dark and stormy night, and", "max_tokens": 40, "temperature": 0.7, "seed": 51'
BAR = 30  # characters
ERASE_LINE = "\r\x1b[K"

configure = flags


def run(arguments: argparse.Namespace) -> int:
    settings = read_settings(arguments)
    if settings.api_key_file is not None:  # until there is who reads the keys again, a SIGHUP waits
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    logs.configure(settings.log_level)
    service = build(settings)
    host, port = service.listener.getsockname()[:2]
    key = None
    if service.backend.keys is not None:
        key = f"${ENV_PREFIX}API_KEY" if settings.api_key is not None else "YOUR_KEY"
    terminal = Terminal(f"http://{in_url(host)}:{port}", service.backend.served, key, service.backend.notes)
    return asyncio.run(service.run(terminal))


def in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


class Terminal:
    """What the operator sees of a start: a bar while it lasts, then a banner and a curl to try."""

    def __init__(self, url: str, served: ServedModel, key: str | None = None, notes: Sequence[str] = ()) -> None:
        """key: how the shell that tries the curl names it; None where nobody needs one. notes: on the model."""
        self._notes = notes
        self._url = url
        self._authorization = "" if key is None else f' -H "Authorization: Bearer {key}"'
        self._served = served
        self._shown: str | None = None if sys.stderr.isatty() else ""  # "" shows no bar

    def starting(self, progress: Starting) -> None:
        if self._shown == "":
            return
        if progress.graphs:
            bar = f"Recording CUDA graphs {_bar(progress.recorded / progress.graphs)} "
            bar += f"{progress.recorded} of {progress.graphs}, {progress.seconds:.1f} s"
        else:
            bar = f"Loading {self._served.name} {_bar(progress.share)} {progress.share:4.0%}"
        if bar != self._shown:
            print(f"{ERASE_LINE}{bar}", end="", file=sys.stderr, flush=True)
            self._shown = bar

    def ready(self, ready: Ready) -> None:
        if self._shown:
            print(ERASE_LINE, end="", file=sys.stderr, flush=True)
        tokens = ready.num_blocks * ready.block_size
        body = f'{{"model": "{self._served.name}", {EXAMPLE}}}'
        print(
            f"{self._served.name} on {ready.backend}; KV cache for {tokens:,} tokens; "
            f"ready in {ready.load_seconds:.1f} s",
            *self._notes,
            f"Serving on {self._url}, until Ctrl-C. Try:",
            "",
            f"  curl {self._url}/v1/completions{self._authorization} -d {shlex.quote(body)}",
            "",
            sep="\n",
            flush=True,
        )


def _bar(share: float) -> str:
    done = round(BAR * share)
    return "█" * done + "░" * (BAR - done)
