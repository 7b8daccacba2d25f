"""Writes the tables of docs/observability.md: metrics from server/metrics.py, alerts from docker/alerts.yml.

    python scripts/document_metrics.py [--print]

Between `<!-- table: NAME -->` and `<!-- end -->` the page is ours; the rest is written by hand.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from server.metrics import Metrics  # noqa: E402

PAGE = ROOT / "docs" / "observability.md"
SECTION = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def page(text: str) -> str:
    """The page with its tables made anew."""
    tables = {"metrics": metrics(), "alerts": alerts()}
    return SECTION.sub(lambda found: found[1] + tables[found[2]] + found[3], text)


def metrics() -> str:
    rows = ["| metric | kind | labels | |", "| --- | --- | --- | --- |"]
    for row in Metrics("", "").table:
        labels = ", ".join(f"`{label}`" for label in row.labels if label != "model_name")
        rows.append(f"| `{row.name}` | {row.kind} | {labels} | {row.text} |")
    return "\n".join(rows) + "\n"


def alerts() -> str:
    rows = ["| alert | severity | when | for |", "| --- | --- | --- | --- |"]
    groups = yaml.safe_load((ROOT / "docker" / "alerts.yml").read_text("utf-8"))["groups"]
    for rule in (rule for group in groups for rule in group["rules"]):
        when = " ".join(rule["expr"].split()).replace("|", "\\|")
        rows.append(f"| {rule['alert']} | {rule['labels']['severity']} | `{when}` | {rule['for']} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    text = page(PAGE.read_text("utf-8"))
    if "--print" in sys.argv[1:]:
        sys.stdout.write(text)
    else:
        PAGE.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
