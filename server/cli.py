"""`gpt2-server serve [MODEL]`: reads settings, says what is served and where, and returns the service's exit status."""

from __future__ import annotations

import argparse
import asyncio
import shlex
import sys

from model.errors import ModelError
from server import __version__, logs
from server.api.models import ServedModel
from server.lifecycle import build
from server.settings import Settings, SettingsError, flags, read_settings
from server.worker.messages import Ready

EXIT_CONFIG = 78
EXAMPLE = '"prompt": "It was a dark and stormy night, and", "max_tokens": 40, "temperature": 0.7, "seed": 3'


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="gpt2-server", description="An OpenAI-compatible completion server for the GPT-2 family."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    flags(commands.add_parser("serve", help="serve a model", description="Serve a model over HTTP."))
    try:
        return _serve(read_settings(parser.parse_args(argv)))
    except (SettingsError, ModelError) as error:
        print(f"gpt2-server: {error}", file=sys.stderr)
        return EXIT_CONFIG


def _serve(settings: Settings) -> int:
    logs.configure(settings.log_level)
    try:
        service, served = build(settings)
    except OSError as error:
        raise SettingsError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}") from None
    host, port = service.listener.getsockname()[:2]
    return asyncio.run(service.run(lambda ready: _announce(f"http://{host}:{port}", served, ready)))


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


if __name__ == "__main__":
    sys.exit(main())
