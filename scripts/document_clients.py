"""Writes the tables of docs/clients.md: other servers' names, what is refused, and what can change no answer.

    python scripts/document_clients.py [--print]

Between `<!-- names: NAME -->` and `<!-- end -->` the page is ours; the rest is written by hand.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from server.api.aliases import ALIASES  # noqa: E402
from server.api.unsupported import DEPENDENT, HARMLESS, OFF_UP_TO, UNSUPPORTED  # noqa: E402

PAGE = ROOT / "docs" / "clients.md"
SECTION = re.compile(r"(<!-- names: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def page(text: str) -> str:
    """The page with its tables made anew."""
    made = {"aliases": aliases(), "refused": refused(), "dependent": listed(DEPENDENT), "harmless": listed(HARMLESS)}
    return SECTION.sub(lambda found: found[1] + made[found[2]] + found[3], text)


def aliases() -> str:
    ours: dict[str, list[str]] = {}
    for name, alias in ALIASES.items():
        ours.setdefault(alias.name, []).append(f"`{name}`")
    return _table(("here", "elsewhere"), ((f"`{name}`", ", ".join(sorted(ours[name]))) for name in sorted(ours)))


def refused() -> str:
    rows: dict[str, str] = {name: ", ".join(_shown(value) for value in idle) for name, idle in UNSUPPORTED.items()}
    rows |= {name: f"numbers up to {limit}" for name, limit in OFF_UP_TO.items()}
    return _table(("field", "asks for nothing"), ((f"`{name}`", rows[name]) for name in sorted(rows)))


def listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names)) + ".\n"


def _table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    lines = [head, ("---", "---"), *rows]
    return "".join(f"| {one} | {other} |\n" for one, other in lines)


def _shown(value: Any) -> str:
    return f"`{json.dumps(value)}`"


if __name__ == "__main__":
    made = page(PAGE.read_text("utf-8"))
    if "--print" in sys.argv[1:]:
        sys.stdout.write(made)
    else:
        PAGE.write_text(made, "utf-8")
