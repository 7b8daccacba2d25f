"""`gpt2-server complete PROMPT`: the text a server would answer with, streamed to the terminal, without a server.

It is the same application and the same worker process; only the socket between is left out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from starlette.types import Message

from server import logs
from server.commands.local import post_completion, serving_here
from server.errors import SettingsError
from server.settings import Settings, read_settings, some_flags

INTERRUPTED = 130
SEATS = 8  # sequences at once: one person is waiting, and a small KV cache starts sooner
DATA = b"data: {"
BETWEEN = "\n---\n"  # choices
CONTROLS = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)), "�")  # all but tab and line feed


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help="the text to go on with; - reads it from standard input")
    parser.add_argument("--max-tokens", type=int, default=100, metavar="N", help="[100]")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 takes the most likely token [1]")
    parser.add_argument("--seed", type=int, metavar="N", help="same seed, same text; default: another every time")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="ends the text; may be given several times")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=_field,
        metavar="FIELD=VALUE",
        help="any other field of POST /v1/completions, as JSON: --set top_k=40 --set 'logit_bias={\"50256\": -100}'",
    )
    some_flags(parser, "model", "revision", "device", "dtype", "threads")


def _field(text: str) -> tuple[str, Any]:
    """Raises ArgumentTypeError."""
    name, equals, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is not JSON" if equals else "write FIELD=VALUE") from None


def run(arguments: argparse.Namespace) -> int:
    logs.configure("warning")
    settings = read_settings(arguments).model_copy(update={"max_num_seqs": SEATS})
    body = json.dumps(_body(arguments)).encode()
    try:
        return asyncio.run(_complete(settings, body))
    except KeyboardInterrupt:
        print()
        return INTERRUPTED


def _body(arguments: argparse.Namespace) -> dict[str, Any]:
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    fields = {"prompt": prompt, "max_tokens": arguments.max_tokens, "stream": True}
    for name in ("temperature", "seed", "stop"):
        if getattr(arguments, name) is not None:
            fields[name] = getattr(arguments, name)
    return fields | dict(arguments.set)


async def _complete(settings: Settings, body: bytes) -> int:
    async with serving_here(settings) as backend:
        return await Call(body, _show).make(backend.app)


def _show(text: str) -> None:
    """A terminal is not to be steered by what a model says."""
    print(text.translate(CONTROLS) if sys.stdout.isatty() else text, end="", flush=True)


class Call:
    """One streamed POST /v1/completions, made to the application itself."""

    def __init__(self, body: bytes, write: Callable[[str], None]) -> None:
        self._write = write
        self._body = body
        self._received = b""
        self._later: dict[int, str] = {}  # of choices that are shown when the first has ended

    async def make(self, app: FastAPI) -> int:
        """Returns the exit status. Raises SettingsError with what the application refused."""
        await post_completion(app, self._body, self._send)
        if self._received:
            raise SettingsError(json.loads(self._received)["error"]["message"])
        for _, text in sorted(self._later.items()):
            self._write(f"{BETWEEN}{text}")
        self._write("\n")
        return 0

    async def _send(self, message: Message) -> None:
        self._received += message.get("body", b"")
        while b"\n" in self._received:
            line, _, self._received = self._received.partition(b"\n")
            if line.startswith(DATA):
                self._take(json.loads(line.removeprefix(DATA[:-1])))

    def _take(self, event: dict[str, Any]) -> None:
        if "error" in event:
            raise SettingsError(event["error"]["message"])
        for choice in event["choices"]:
            if choice["index"] == 0:
                self._write(choice["text"])
            else:
                self._later[choice["index"]] = self._later.get(choice["index"], "") + choice["text"]
