"""The dashboards that are committed are those the script writes, and Grafana's own types accept them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from outside import node_modules

from server.metrics import PROCESS, Metrics

__all__ = ["node_modules"]

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DASHBOARDS = sorted((DOCKER / "grafana" / "dashboards").glob("*.json"))
SUFFIXES = {"counter": ("",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
BUILTIN = {"up"}


def scraped() -> set[str]:
    """Every name that a scrape may hold."""
    table = Metrics("", "").table
    return {row.name + suffix for row in table for suffix in SUFFIXES[row.kind]} | {*PROCESS} | BUILTIN


def read(path: Path) -> dict[str, Any]:
    dashboard: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return dashboard


def names(expression: str) -> set[str]:
    """Of metrics, and of what rules record."""
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|by \([^)]*\)|label_values", " ", expression)
    return set(re.findall(r"\b(?:job:)?(?:gpt2|process)_[\w:]+|\bup\b", bare))


def test_they_are_what_the_script_writes(tmp_path: Path) -> None:
    """If this fails: python scripts/make_dashboards.py"""
    subprocess.run([sys.executable, ROOT / "scripts" / "make_dashboards.py", tmp_path], check=True)
    assert [path.name for path in DASHBOARDS] == sorted(path.name for path in tmp_path.iterdir())
    for path in DASHBOARDS:
        assert path.read_text("utf-8") == (tmp_path / path.name).read_text("utf-8")


def test_rules_and_panels_name_metrics_that_exist() -> None:
    groups = [yaml.safe_load((DOCKER / name).read_text("utf-8"))["groups"] for name in ("recording.yml", "alerts.yml")]
    rules = [rule for file in groups for group in file for rule in group["rules"]]
    recorded = {rule["record"] for rule in rules if "record" in rule}
    panels = [target["expr"] for path in DASHBOARDS for panel in read(path)["panels"] for target in panel["targets"]]
    asked = set().union(*(names(expression) for expression in [*panels, *(rule["expr"] for rule in rules)]))
    assert len(asked) > 50
    assert asked <= scraped() | recorded


def test_every_metric_is_on_a_dashboard() -> None:
    """But for those that only say when, or with which settings."""
    shown = "\n".join(path.read_text("utf-8") for path in DASHBOARDS)
    missing = {
        row.name for row in Metrics("", "").table if not re.search(rf"\b{row.name}(_bucket|_sum|_count)?\b", shown)
    }
    assert missing == {"gpt2_start_time_seconds"}


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_lie_side_by_side(path: Path) -> None:
    panels = read(path)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        assert (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )


def test_every_alert_says_how_bad_it_is_and_what_is_wrong() -> None:
    groups = yaml.safe_load((DOCKER / "alerts.yml").read_text("utf-8"))["groups"]
    for rule in groups[0]["rules"]:
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert rule["annotations"]["summary"]
        assert rule["for"]


def test_grafana_s_types_accept_them(node_modules: Callable[..., Path]) -> None:
    """The schema that Grafana publishes is of TypeScript: a field it does not know, or of a wrong type, is an error."""
    directory = node_modules("grafana", "@grafana/schema@12.0.0", "typescript@5.8")
    assert not complaints(directory, {path.stem: path.read_text("utf-8") for path in DASHBOARDS})
    overview = next(path.read_text("utf-8") for path in DASHBOARDS if path.stem == "overview")
    mistakes = (('"w": 4', '"w": "4"'), ('"gridPos"', '"gridPosition"'), ('"graphTooltip": 1', '"tooltips": 1'))
    wrong = {f"wrong{i}": overview.replace(*mistake, 1) for i, mistake in enumerate(mistakes)}
    assert complaints(directory, wrong).count("error TS") >= len(mistakes)


def complaints(directory: Path, dashboards: dict[str, str]) -> str:
    script = 'import type { Dashboard } from "@grafana/schema";\n'
    script += "".join(f"export const {name}: Dashboard = {text};\n" for name, text in dashboards.items())
    (directory / "dashboards.ts").write_text(script)
    options = ["--noEmit", "--strict", "--skipLibCheck", "--module", "esnext", "--moduleResolution", "bundler"]
    command = ["node", "node_modules/typescript/bin/tsc", *options, "dashboards.ts"]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False, timeout=120).stdout
