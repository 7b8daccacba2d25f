"""Panels of Grafana dashboards whose queries can name nothing but what server/metrics.py's table holds.

An expression says a metric by its name in the table, and what it is summed by: a name, a label or a kind that is not
there raises a LookupError.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent.parent))

from server.metrics import PREFIX, PROCESS, Metrics

DOCKER = Path(__file__).parent.parent / "docker"
SELECTED = 'job=~"$job", model_name=~"$model_name", instance=~"$instance"'
INSTANCES = 'job=~"$job", instance=~"$instance"'  # for what is not of a model
WINDOW = "$__rate_interval"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH = 24  # of a dashboard, in Grafana's columns

TABLE = {row.name: row for row in Metrics("", "").table}
GROUPS = yaml.safe_load((DOCKER / "recording.yml").read_text("utf-8"))["groups"]
RECORDED = {rule["record"] for group in GROUPS for rule in group["rules"]}


# === Expressions ===


def gauge(name: str, *by: str, of: str = "sum") -> str:
    return f"{of} by ({_labels(name, 'gauge', by)}) ({PREFIX}_{name}{{{SELECTED}}})"


def rate(name: str, *by: str) -> str:
    """Of a counter, per second."""
    return _rate(f"{name}_total", "counter", "", by)


def events(name: str, *by: str) -> str:
    """Of what a histogram counts, per second."""
    return _rate(name, "histogram", "_count", by)


def quantile(q: float, name: str, *by: str) -> str:
    return f"histogram_quantile({q}, {_rate(name, 'histogram', '_bucket', (*by, 'le'))})"


def buckets(name: str) -> str:
    """For a heatmap."""
    return f"sum by (le) (increase({known(name, 'histogram')}_bucket{{{SELECTED}}}[{WINDOW}]))"


def mean(name: str, *by: str) -> str:
    return f"{_rate(name, 'histogram', '_sum', by)} / {_rate(name, 'histogram', '_count', by)}"


def share(part: str, *wholes: str) -> str:
    """No value rather than 0 / 0."""
    return f"({part}) / (({' + '.join(wholes)}) > 0)"


def recorded(name: str) -> str:
    _need(name in RECORDED, f"{name} is in no rule")
    return f'{name}{{job=~"$job"}}'


def process(name: str) -> str:
    _need(name in PROCESS, f"{name} is not measured")
    series = f"{name}{{{INSTANCES}}}"
    return f"rate({series}[{WINDOW}])" if name.endswith("_total") else series


def _rate(name: str, kind: str, suffix: str, by: tuple[str, ...]) -> str:
    labels = _labels(name, kind, tuple(label for label in by if label != "le"))
    labels = ", ".join(filter(None, (labels, "le" if "le" in by else "")))
    return f"sum by ({labels}) (rate({PREFIX}_{name}{suffix}{{{SELECTED}}}[{WINDOW}]))"


def _labels(name: str, kind: str, by: tuple[str, ...]) -> str:
    row = TABLE[known(name, kind)]
    _need({*by} <= {*row.labels, "instance"}, f"{row.name} has not all labels of {by}")
    return ", ".join(by)


def known(name: str, kind: str) -> str:
    """The full name of a metric of the table."""
    full = f"{PREFIX}_{name}"
    _need(full in TABLE and TABLE[full].kind == kind, f"{full} is no {kind} of the table")
    return full


def _need(condition: bool, otherwise: str) -> None:
    if not condition:
        raise LookupError(otherwise)


# === Panels ===


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    title: str
    shows: dict[str, str]  # expressions by their legends
    unit: str = "short"
    kind: str = "timeseries"  # or stat, heatmap
    width: int = 8
    stacked: bool = False
    text: str = ""
    most: float | None = None  # the top of the axis

    @property
    def height(self) -> int:
        return 4 if self.kind == "stat" else 8


def stat(title: str, expression: str, unit: str = "short", text: str = "") -> Panel:
    return Panel(title=title, shows={"": expression}, unit=unit, kind="stat", width=4, text=text)


def quantiles(title: str, name: str, *by: str, text: str = "") -> Panel:
    legend = "".join(f" {{{{{label}}}}}" for label in by)
    shows = {f"p{round(q * 100)}{legend}": quantile(q, name, *by) for q in (0.5, 0.95, 0.99)}
    return Panel(title=title, shows=shows, unit="s", text=text)


def heatmap(title: str, name: str, unit: str = "short") -> Panel:
    return Panel(title=title, shows={"{{le}}": buckets(name)}, unit=unit, kind="heatmap")


# === JSON ===


def panel_json(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.most is not None:
        defaults["max"] = panel.most
    if panel.kind == "timeseries":
        defaults["custom"] = {"fillOpacity": 20 if panel.stacked else 0, "showPoints": "never"}
        if panel.stacked:
            defaults["custom"]["stacking"] = {"mode": "normal", "group": "A"}
    heated = panel.kind == "heatmap"
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height},
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "datasource": DATASOURCE,
                "expr": expression,
                "legendFormat": legend,
                "range": True,
                **({"format": "heatmap"} if heated else {}),
            }
            for i, (legend, expression) in enumerate(panel.shows.items())
        ],
        "fieldConfig": {"defaults": {} if heated else defaults, "overrides": []},
        "options": _options(panel),
    }


def _options(panel: Panel) -> dict[str, Any]:
    match panel.kind:
        case "stat":
            return {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "none", "graphMode": "area"}
        case "heatmap":
            return {"calculate": False, "yAxis": {"unit": panel.unit}, "color": {"mode": "scheme", "scheme": "Oranges"}}
    return {"tooltip": {"mode": "multi", "sort": "desc"}, "legend": {"displayMode": "list", "placement": "bottom"}}


def placed(panels: list[Panel]) -> Iterator[dict[str, Any]]:
    """In rows from left to right; the panels of a row are of one height."""
    x = y = height = 0
    for number, panel in zip(count(1), panels, strict=False):
        if x + panel.width > WIDTH:
            x, y = 0, y + height
        yield panel_json(panel, number, x, y)
        x, height = x + panel.width, panel.height
