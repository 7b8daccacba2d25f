"""`gpt2-server COMMAND`: finds the command, reads its arguments and returns its exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection

from model.errors import ModelError
from server import __version__
from server.commands import COMMANDS, load
from server.errors import SettingsError

EXIT_CONFIG = 78


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    arguments = make_parser(argv[:1]).parse_args(argv)
    try:
        return load(arguments.command).run(arguments)
    except (SettingsError, ModelError) as error:
        print(f"gpt2-server: {error}", file=sys.stderr)
        return EXIT_CONFIG


def make_parser(wanted: Collection[str]) -> argparse.ArgumentParser:
    """All commands by name; those `wanted` with their arguments."""
    shown = "\n".join(f"  {name:<13}{text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="gpt2-server",
        usage="gpt2-server [-h] [--version] COMMAND …",
        description=f"An OpenAI-compatible completion server for the GPT-2 family.\n\ncommands:\n{shown}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(
        dest="command", prog="gpt2-server", required=True, metavar="COMMAND", help=argparse.SUPPRESS
    )
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, description=f"{text[0].upper()}{text[1:]}.")
        if name in wanted:
            load(name).configure(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
