"""Pictures of what the benchmarks found: `python -m benchmarks.plots --serving FILE --steps FILE --to docs`.

The files are what `benchmarks.serving --json` and `benchmarks.steps --json` wrote.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

STREAMS = re.compile(r"128 in / 64 out, (\d+) streams?")
STYLE: dict[Any, Any] = {
    "figure.figsize": (12, 3.9),
    "figure.constrained_layout.use": True,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 9,
    "figure.dpi": 110,
}


def by_server(results: dict[str, dict[str, list[dict[str, Any]]]], field: str) -> dict[str, dict[int, float]]:
    """The median of a field, by server and number of streams; servers that do not have it are left out."""
    found: dict[str, dict[int, float]] = {}
    for load, servers in results.items():
        if streams := STREAMS.fullmatch(load):
            for server, rounds in servers.items():
                values = [each[field] for each in rounds if field in each]
                if values:
                    found.setdefault(server, {})[int(streams[1])] = median(values)
    return found


def lines(axes: Axes, found: dict[str, dict[int, float]], title: str, factor: float = 1.0) -> None:
    for server, points in found.items():
        style = "-" if server.startswith("gpt2-server") else "--"
        ordered = sorted(points.items())
        axes.plot([x for x, _ in ordered], [factor * y for _, y in ordered], style, marker="o", ms=3, label=server)
    axes.set(title=title, xlabel="streams", xscale="log", yscale="log")
    ticks = sorted({streams for points in found.values() for streams in points})
    axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
    axes.minorticks_off()


def serving(data: dict[str, Any], to: Path) -> None:
    """Throughput and latency against concurrency."""
    figure, (speed, ttft, itl) = plt.subplots(1, 3)
    lines(speed, by_server(data["results"], "tokens_per_second"), "output tokens/s, 128 in / 64 out")
    lines(ttft, by_server(data["results"], "ttft_mean"), "mean time to first token, ms", 1e3)
    lines(itl, by_server(data["results"], "itl_median"), "median time between tokens, ms", 1e3)
    figure.legend(*speed.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    save(figure, to / "throughput.png")


def memory(starts: dict[str, dict[str, float]], to: Path) -> None:
    """Resident after the load, and the bound: 1.3 times the weights, the KV pool and 250 MB."""
    figure, axes = plt.subplots(figsize=(6, 3.4))
    names = list(starts)
    axes.bar(names, [starts[name]["resident_mib"] for name in names], width=0.5, label="resident, all processes")
    for place, name in enumerate(names):
        bound = starts[name]["bound_mib"]
        axes.hlines(bound, place - 0.3, place + 0.3, color="black", label="bound" if place == 0 else "_")
    axes.set(title="memory after the load", ylabel="MiB")
    axes.legend()
    save(figure, to / "memory.png")


def steps(data: dict[str, Any], to: Path) -> None:
    """A decode step against context and against batch, and what it is made of."""
    figure, (context, batch, parts) = plt.subplots(1, 3)
    formats = [name for name in data if isinstance(data[name], dict)]
    for name in formats:
        of = data[name]
        context.plot([int(c) for c in of["contexts"]], list(of["contexts"].values()), "o", ms=3, label=name)
        slope, at, value = of["microseconds_per_position"] / 1e3, *_middle(of["contexts"])
        context.plot([0, 1024], [value - slope * at, value + slope * (1024 - at)], "-", lw=0.8, color="grey")
        batch.plot([int(b) for b in of["batches"]], list(of["batches"].values()), "o-", ms=3, label=name)
    first = data[formats[0]]
    context.set(title=f"ms of a decode step, {first['streams']} streams", xlabel="context", ylim=(0, None))
    batch.set(title=f"ms of a decode step, {first['context']} tokens of context", xlabel="streams", ylim=(0, None))
    bottom = [0.0] * len(formats)
    for part in first["parts"]:
        shares = [100 * data[name]["parts"][part] / sum(data[name]["parts"].values()) for name in formats]
        parts.bar(formats, shares, bottom=bottom, width=0.5, label=part)
        bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
    parts.set(title="where the worker's time goes, %", xlim=(-0.5, len(formats) + 1.6))
    for axes in (context, batch, parts):
        axes.legend(fontsize=7)
    save(figure, to / "steps.png")


def _middle(points: dict[str, float]) -> tuple[float, float]:
    """Where the line of least squares goes through."""
    return sum(map(int, points)) / len(points), sum(points.values()) / len(points)


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serving", type=Path, help="throughput and latency against concurrency")
    parser.add_argument("--steps", type=Path, help="a step against context and batch")
    parser.add_argument("--memory", type=Path, help="resident memory and its bound, by name")
    parser.add_argument("--to", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    plt.rcParams.update(STYLE)
    for draw, path in ((serving, arguments.serving), (steps, arguments.steps), (memory, arguments.memory)):
        if path is not None:
            draw(json.loads(path.read_text()), arguments.to)


if __name__ == "__main__":
    main()
