"""The subcommands of `gpt2-server`: a row in COMMANDS, and a module here of that name with `configure` and `run`.

Only the one that is asked for is imported: `healthcheck` runs every few seconds, and must not wait for a web framework.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Protocol, cast

COMMANDS = {
    "serve": "serve a model over HTTP",
    "complete": "complete a text here, without a server",
    "bench": "load a server, and say how fast it answers",
    "fetch": "bring a model here from the Hugging Face Hub",
    "convert": "rewrite a model of another format in the one that is served",
    "export": "write a model as other programs read it, or merge an adapter into it",
    "check": "say what a model is and needs, or why it cannot be served",
    "fine-tune": "train a model, or an adapter for it, on examples",
    "distill": "train a smaller model to say what a larger one would",
    "evaluate": "say how well models say a held-out text",
    "completion": "print a script that completes commands and flags in a shell",
    "healthcheck": "ask a running server whether it is well",
}


class Command(Protocol):
    """What a module of server/commands/ looks like."""

    def configure(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, arguments: argparse.Namespace) -> int:
        """Returns the exit status. Raises SettingsError or ModelError."""
        ...


def load(name: str) -> Command:
    return cast(Command, importlib.import_module(f"server.commands.{name.replace('-', '_')}"))
