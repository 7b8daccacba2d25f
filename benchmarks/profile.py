"""Where a server's time goes under a load: its own clocks, and the cores its processes took.

What a step is made of the server counts at /metrics; what its `run` is made of, `benchmarks.steps` measures in this
process, on the same checkpoint in the same format. Knows nothing of loads.
"""

from __future__ import annotations

import re
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.formats import FLAGS, load
from benchmarks.machine import family
from benchmarks.steps import SCHEDULING, profile

PART = re.compile(r'^gpt2_engine_step_part_seconds_total\{.*part="(\w+)".*\} (\S+)$', re.MULTILINE)
WORKERS, API, CLIENT, REST = "workers", "api process", "load generator", "idle, or others'"
BESIDE = "HTTP, detokenising, messages, waiting"


@dataclass(frozen=True, slots=True)
class Clocks:
    """Seconds so far."""

    wall: float
    cores: dict[str, float]  # by kind of process: user and system time
    parts: dict[str, float]  # of all steps of all workers


def read(url: str, process: psutil.Process) -> Clocks:
    """url: with /v1; process: the api process of the server there."""
    with urllib.request.urlopen(f"{url.removesuffix('/v1')}/metrics", timeout=10) as answer:  # noqa: S310 - our own
        text = answer.read().decode()
    parts: dict[str, float] = {}
    for name, seconds in PART.findall(text):
        parts[name] = parts.get(name, 0.0) + float(seconds)
    cores = {WORKERS: 0.0, API: 0.0, CLIENT: sum(psutil.Process().cpu_times()[:2])}
    for each in family(process):
        cores[WORKERS if "server.worker" in each.cmdline() else API] += sum(each.cpu_times()[:2])
    return Clocks(time.perf_counter(), cores, parts)


@dataclass(frozen=True, slots=True)
class Profile:
    """Shares of 1."""

    wall: dict[str, float]  # of the time a worker's loop had
    cores: dict[str, float]  # of what all cores could have done

    def table(self, title: str) -> str:
        lines = [f"| {title} | share |", "| --- | --- |"]
        lines += [f"| {name} | {100 * share:.1f} % |" for name, share in self.wall.items()]
        lines += ["", "| of all cores' time | share |", "| --- | --- |"]
        return "\n".join(lines + [f"| {name} | {100 * share:.1f} % |" for name, share in self.cores.items()])


def measured(before: Clocks, after: Clocks, run: dict[str, float]) -> Profile:
    """run: the parts of a step's `run`, as shares of it."""
    wall = after.wall - before.wall
    parts = {name: (seconds - before.parts.get(name, 0.0)) / wall for name, seconds in after.parts.items()}
    shares = {name: share * parts["run"] for name, share in run.items()}
    shares[SCHEDULING] = parts["schedule"] + parts["update"]
    shares[BESIDE] = 1 - sum(parts.values())
    count = psutil.cpu_count() or 1
    cores = {name: (seconds - before.cores[name]) / wall / count for name, seconds in after.cores.items()}
    return Profile(shares, cores | {REST: 1 - sum(cores.values())})


def parts_of_run(directory: Path, flags: list[str], streams: int) -> dict[str, float]:
    """Shares of a step's `run`, for the format that these flags of a server ask for."""
    given = " ".join(flags).replace("=", " ")
    format_ = next(name for name, wanted in reversed(FLAGS.items()) if " ".join(wanted) in given)
    seconds = profile(load(directory, format_, psutil.cpu_count() or 1), streams)
    del seconds[SCHEDULING]
    return {name: part / sum(seconds.values()) for name, part in seconds.items()}
