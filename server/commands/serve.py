"""`gpt2-server serve [MODEL]`: reads settings, says what is served and where, and serves until a signal."""

from __future__ import annotations

import argparse
import asyncio
import shlex

from server import logs
from server.api.models import ServedModel
from server.errors import SettingsError
from server.lifecycle import build
from server.settings import flags, read_settings
from server.worker.messages import Ready

EXAMPLE = '"prompt": "It was a dark and stormy night, and", "max_tokens": 40, "temperature": 0.7, "seed": 3'

configure = flags


def run(arguments: argparse.Namespace) -> int:
    settings = read_settings(arguments)
    logs.configure(settings.log_level)
    try:
        service = build(settings)
    except OSError as error:
        raise SettingsError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}") from None
    host, port = service.listener.getsockname()[:2]
    return asyncio.run(service.run(lambda ready: _announce(f"http://{host}:{port}", service.backend.served, ready)))


def _announce(url: str, served: ServedModel, ready: Ready) -> None:
    tokens = ready.num_blocks * ready.block_size
    body = f'{{"model": "{served.name}", {EXAMPLE}}}'
    print(
        f"{served.name} on {ready.backend}; KV cache for {tokens:,} tokens; ready in {ready.load_seconds:.1f} s",
        f"Serving on {url}, until Ctrl-C. Try:",
        "",
        f"  curl {url}/v1/completions -d {shlex.quote(body)}",
        "",
        sep="\n",
        flush=True,
    )
