"""How soon a server is ready, and what it keeps in memory: `python -m benchmarks.starting DIR [--json FILE]`.

In each format: started several times, the files warm; then so much is asked of it that every block of its KV pool was
used. The bound is 1.3 times the weights, the pool, and 250 MB.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from statistics import median

import psutil

import model
from benchmarks.formats import FLAGS, FORMATS
from benchmarks.machine import machine, resident_mib
from model.config import read_config
from model.weights import expected_shapes
from server.load import Workload, bodies, closed_loop, started

MIB = 1 << 20
POOL_GIB = 0.5
LOAD = Workload("", 128, 64, 32, 64)
LONG = Workload("", 900, 1, 4, 0)  # prompts that fill the pool, twice over


@dataclass(frozen=True, slots=True)
class Started:
    ready_seconds: list[float]
    weights_mib: float
    pool_mib: float
    ready_mib: float  # resident, of all processes
    resident_mib: float  # after the load
    bound_mib: float


def weights_mib(directory: Path, format_: str) -> float:
    """Of the matrices in the format, and of the rest in fp32."""
    dtype, quantization = FORMATS[format_]
    size = 1 if quantization else dtype.itemsize
    shapes = expected_shapes(read_config(directory)).items()
    return sum(prod(shape) * (size if len(shape) == 2 and "wpe" not in name else 4) for name, shape in shapes) / MIB


def measure(directory: Path, format_: str, rounds: int) -> Started:
    flags = [*FLAGS[format_], "--kv-cache-gib", str(POOL_GIB)]
    seconds, ready, after = [], [], 0.0
    for turn in range(rounds):
        with started(str(directory), flags) as (server, took, pid):
            process = psutil.Process(pid)
            seconds.append(took)
            ready.append(resident_mib(process))
            if turn == rounds - 1:
                asyncio.run(closed_loop(server, bodies(LOAD, seed=1), LOAD.concurrency))
                asyncio.run(closed_loop(server, bodies(filling(directory, format_), seed=2), LONG.concurrency))
                after = resident_mib(process)
    weights, pool = weights_mib(directory, format_), POOL_GIB * 1024
    return Started(seconds, weights, pool, median(ready), after, 1.3 * weights + pool + 250e6 / MIB)


def filling(directory: Path, format_: str) -> Workload:
    itemsize = 4 if format_ == "fp32" else 2  # of the cache that goes with the weights
    tokens = POOL_GIB * (1 << 30) / read_config(directory).kv_bytes_per_token(itemsize)
    return Workload("", LONG.prompt, LONG.output, LONG.concurrency, int(2 * tokens / LONG.prompt))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=Path(model.__file__).parent / "default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file for every figure")
    arguments = parser.parse_args()
    found = {name: measure(arguments.model, name, arguments.rounds) for name in FORMATS}
    print(f"{machine()}; {time.strftime('%Y-%m-%d')}; a KV pool of {POOL_GIB} GiB, all of it used; MiB\n")
    print("| format | ready, s | weights | resident when ready | after the load | bound |\n" + "| --- " * 6 + "|")
    for name, of in found.items():
        sizes = (of.weights_mib, of.ready_mib, of.resident_mib, of.bound_mib)
        print(f"| {name} | {median(of.ready_seconds):.1f} | " + " | ".join(f"{size:.0f}" for size in sizes) + " |")
    if arguments.json:
        arguments.json.write_text(json.dumps({name: asdict(of) for name, of in found.items()}, indent=1))


if __name__ == "__main__":
    main()
