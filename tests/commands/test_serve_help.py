"""`gpt2-server serve --help` stays short enough to be read."""

from __future__ import annotations

import argparse
import re

from server.cli import make_parser
from server.commands import COMMANDS, load
from server.settings import Settings


def parser_of(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(command)
    load(command).configure(parser)
    return parser


def test_serve_has_five_groups_and_forty_flags_at_most() -> None:
    """If this fails: which flag will few operators ever change? Declare that one with `_rare`."""
    text = parser_of("serve").format_help()
    flags = set(re.findall(r"^  (?:-\w, )?(--[a-z][\w-]*)", text, re.MULTILINE))
    assert 20 < len(flags) <= 40
    groups = re.findall(r"^(\w+):$", text, re.MULTILINE)
    assert groups == ["options", "model", "server", "engine", "speculation", "limits"]


def test_every_setting_says_what_it_is() -> None:
    assert all(field.description for field in Settings.model_fields.values())


def test_every_command_says_what_it_does_and_what_it_takes() -> None:
    parser = make_parser(COMMANDS)
    assert all(f"\n  {name} " in parser.format_help() for name in COMMANDS)
    for name in COMMANDS:
        for action in parser_of(name)._actions:
            assert action.help, f"{name} {action.dest}"
