"""`gpt2-server completion SHELL`: a script for bash, zsh or fish, made from the parser itself.

source <(gpt2-server completion bash)
gpt2-server completion fish | source
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping

from server.commands import COMMANDS, load

PROGRAM = "gpt2-server"
BASH = """\
_gpt2_server() {{
    local current=${{COMP_WORDS[COMP_CWORD]}}
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W {commands} -- "$current"))
        return
    fi
    case ${{COMP_WORDS[1]}} in
{cases}
    esac
}}
complete -o default -F _gpt2_server {program}
"""
CASE = """\
    {name})
        case $current in
        -*) COMPREPLY=($(compgen -W {flags} -- "$current")) ;;
        *) COMPREPLY=($(compgen -f -- "$current")) ;;
        esac ;;"""
ZSH = "autoload -U +X bashcompinit && bashcompinit\n"  # zsh reads what bash does


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=["bash", "zsh", "fish"], help="the shell")


def run(arguments: argparse.Namespace) -> int:
    flags = {name: _flags(name) for name in COMMANDS}
    if arguments.shell == "fish":
        print(_fish(flags), end="")
    else:
        print((ZSH if arguments.shell == "zsh" else "") + _bash(flags), end="")
    return 0


def _flags(command: str) -> dict[str, str]:
    """Text of each flag."""
    parser = argparse.ArgumentParser()
    load(command).configure(parser)
    return {
        flag: action.help or "" for action in parser._actions for flag in action.option_strings if flag.startswith("--")
    }


def _bash(flags: Mapping[str, Mapping[str, str]]) -> str:
    cases = "\n".join(CASE.format(name=name, flags=shlex.quote(" ".join(each))) for name, each in flags.items())
    return BASH.format(commands=shlex.quote(" ".join(flags)), cases=cases, program=PROGRAM)


def _fish(flags: Mapping[str, Mapping[str, str]]) -> str:
    known = " ".join(flags)
    lines = [
        f"complete -c {PROGRAM} -f -n 'not __fish_seen_subcommand_from {known}' -a {name} -d {_quote(text)}"
        for name, text in COMMANDS.items()
    ]
    lines += [
        f"complete -c {PROGRAM} -n '__fish_seen_subcommand_from {name}' -l {flag.removeprefix('--')} -d {_quote(text)}"
        for name, each in flags.items()
        for flag, text in each.items()
    ]
    return "\n".join([*lines, ""])


def _quote(text: str) -> str:
    """For fish, in which a backslash escapes in single quotes."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", " ") + "'"
