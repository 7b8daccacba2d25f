"""Writes the tables of commands and settings into docs/cli.md, from the very tables that the command line is made of.

    python scripts/document_cli.py [--print]

Between `<!-- table: NAME -->` and `<!-- end -->` the page is ours; the rest is written by hand.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).parent.parent))

from server.commands import COMMANDS
from server.settings import ENV_PREFIX, Settings

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
SECTION = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def commands() -> list[str]:
    return ["| command | what it does |", "| --- | --- |"] + [
        f"| `gpt2-server {name}` | {text} |" for name, text in COMMANDS.items()
    ]


def settings() -> list[str]:
    rows = [f"| flag | variable, `{ENV_PREFIX}…` | default | what it is |", "| --- | --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        flag = f"`--{name.replace('_', '-')}`" if isinstance(field.json_schema_extra, dict) else ""
        flag = "`MODEL`" if name == "model" else flag
        text = f"{field.description}{_choices(field.annotation)}".replace("|", "\\|")
        rows.append(f"| {flag} | `{name.upper()}` | {_default(field.default)} | {text} |")
    return rows


def _choices(annotation: Any) -> str:
    """Of a Literal, also of one that may be left out."""
    inner = [each for each in get_args(annotation) if isinstance(each, str)]
    return f" ({', '.join(inner)})" if inner else ""


def _default(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(f"`{each}`" for each in value) or "none"
    return "" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def page(text: str) -> str:
    """The page with its tables made anew."""
    tables = {"commands": commands, "settings": settings}
    return SECTION.sub(lambda found: found[1] + "\n".join(tables[found[2]]()) + "\n" + found[3], text)


if __name__ == "__main__":
    made = page(PAGE.read_text("utf-8"))
    if "--print" in sys.argv:
        sys.stdout.write(made)
    else:
        PAGE.write_text(made, "utf-8")
