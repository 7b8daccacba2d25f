"""Where a step's time goes, and how it grows: `python -m benchmarks.steps [MODEL] [--json FILE]`.

In one process, without HTTP: the worker's parts under 128 in / 64 out, and a decode step's time against the context
of its sequences and against their number. Everything is the median of several goes.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import linear_regression, median
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor

import model
from benchmarks.engine import BLOCK_SIZE, Engine, Way
from benchmarks.formats import FORMATS, Loaded, load
from benchmarks.machine import machine
from model.adapters import AdaptedRows
from model.batch import Batch
from model.gpt2 import GPT2
from model.kernels.structs import Op
from model.kv_cache import KVCache

CONTEXTS = (64, 128, 256, 384, 512, 640, 768, 896, 1008)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
STREAMS_OF_CONTEXTS = 16
CONTEXT_OF_BATCHES = 160
GOES = 7
LINEAR, ATTENTION, SMALL = "linear layers and head", "attention and its cache", "norms and embedding"
SAMPLING, SCHEDULING, BETWEEN = "laying out and sampling", "scheduling", "between Python and C"
KERNELS = {LINEAR: (Op.LINEAR,), ATTENTION: (Op.ATTENTION, Op.WRITE_KV), SMALL: (Op.NORM, Op.EMBED)}


class Timed:
    """A network that counts the seconds spent in it."""

    def __init__(self, network: GPT2) -> None:
        self._network = network
        self.config = network.config
        self.seconds = 0.0

    def forward(self, batch: Batch, cache: KVCache, adapted: Sequence[AdaptedRows] = ()) -> Tensor:
        return self._count(lambda: self._network.forward(batch, cache, adapted))

    def logits(self, hidden: Tensor) -> Tensor:
        return self._count(lambda: self._network.logits(hidden))

    def _count(self, compute: Callable[[], Tensor]) -> Tensor:
        began = perf_counter()
        result = compute()
        self.seconds += perf_counter() - began
        return result


class TimedEngine(Engine):
    """The worker's loop, its parts timed."""

    def __init__(self, network: Timed, device: torch.device, way: Way) -> None:
        super().__init__(cast(GPT2, network), device, way)  # it does what a runner asks of one
        self.spent: dict[str, float] = defaultdict(float)

    def step(self) -> bool:
        began = perf_counter()
        plan = self._scheduler.schedule()
        planned = perf_counter()
        if plan is None:
            return False
        result = self._runner.run(plan)
        ran = perf_counter()
        for said in self._scheduler.update(plan, result):
            if said.token is not None:
                self.outputs[said.id].append(said.token)
        self.spent["runner"] += ran - planned
        self.spent[SCHEDULING] += planned - began + perf_counter() - ran
        return True


def profile(loaded: Loaded, streams: int) -> dict[str, float]:
    """Seconds in each part while `streams` closed-loop clients are served 128 in / 64 out, twice each."""
    dice = random.Random(streams)
    timed, kernels = Timed(loaded.network), loaded.ops.kernels
    engine = TimedEngine(timed, torch.device("cpu"), Way(caching=False, kv_dtype=loaded.kv_dtype))

    def add() -> int:
        return engine.add([dice.randrange(50256) for _ in range(128)], 64)

    before = kernels.seconds()
    running, left = [add() for _ in range(streams)], streams
    while engine.step():
        for id_ in [id_ for id_ in running if len(engine.outputs[id_]) == 64]:
            running.remove(id_)
            if left:
                running.append(add())
                left -= 1
    after = kernels.seconds()
    parts = {name: sum(after[op] - before[op] for op in ops_) for name, ops_ in KERNELS.items()}
    parts[BETWEEN] = timed.seconds - sum(parts.values())
    parts[SAMPLING] = engine.spent["runner"] - timed.seconds
    parts[SCHEDULING] = engine.spent[SCHEDULING]
    return parts


class Decoder:
    """Decode steps of sequences whose contexts were never computed: their keys and values are noise."""

    def __init__(self, loaded: Loaded, num_blocks: int) -> None:
        self._network = loaded.network
        self._cache = KVCache(self._network.config, num_blocks, BLOCK_SIZE, loaded.kv_dtype, torch.device("cpu"))
        for layer in self._cache.layers:  # memory never written reads as one page of zeros, out of the nearest cache
            layer.keys.normal_(0, 0.1)
            layer.values.normal_(0, 0.1)
        self._blocks = torch.randperm(num_blocks).int()

    @torch.inference_mode()
    def step(self, sequences: int, context: int) -> float:
        """Seconds, the logits included."""
        width = -(-context // BLOCK_SIZE)
        tables = self._blocks[: sequences * width].view(sequences, width)
        last = context - 1
        batch = Batch(
            tokens=torch.randint(50256, (sequences,)),
            positions=torch.full((sequences,), last),
            slots=tables[:, last // BLOCK_SIZE].long() * BLOCK_SIZE + last % BLOCK_SIZE,
            query_starts=torch.arange(sequences + 1, dtype=torch.int32),
            contexts=torch.full((sequences,), context, dtype=torch.int32),
            block_tables=tables.contiguous(),
            spans=tuple((1, context) for _ in range(sequences)),
        )
        began = perf_counter()
        self._network.logits(self._network.forward(batch, self._cache))
        return perf_counter() - began

    def median(self, sequences: int, context: int) -> float:
        return median(self.step(sequences, context) for _ in range(GOES))


def growth(loaded: Loaded) -> dict[str, Any]:
    """Milliseconds of a decode step, and the line through those against the context."""
    longest = CONTEXTS[-1] // BLOCK_SIZE * STREAMS_OF_CONTEXTS
    decoder = Decoder(loaded, max(longest, BATCHES[-1] * CONTEXT_OF_BATCHES // BLOCK_SIZE))
    decoder.step(STREAMS_OF_CONTEXTS, CONTEXTS[0])
    contexts = [decoder.median(STREAMS_OF_CONTEXTS, context) for context in CONTEXTS]
    batches = [decoder.median(batch, CONTEXT_OF_BATCHES) for batch in BATCHES]
    slope, intercept = linear_regression(CONTEXTS, contexts)
    mean = sum(contexts) / len(contexts)
    left = sum((t - slope * c - intercept) ** 2 for c, t in zip(CONTEXTS, contexts, strict=True))
    kv_bytes = loaded.network.config.kv_bytes_per_token(loaded.kv_dtype.itemsize) * STREAMS_OF_CONTEXTS
    return {
        "contexts": dict(zip(CONTEXTS, (1e3 * t for t in contexts), strict=True)),
        "streams": STREAMS_OF_CONTEXTS,
        "batches": dict(zip(BATCHES, (1e3 * t for t in batches), strict=True)),
        "context": CONTEXT_OF_BATCHES,
        "r_squared": 1 - left / sum((t - mean) ** 2 for t in contexts),
        "microseconds_per_position": 1e6 * slope,
        "gigabytes_per_second": kv_bytes / slope / 1e9,
    }


def show(name: str, parts: dict[str, float], grown: dict[str, Any]) -> None:
    whole = sum(parts.values())
    print(f"{name}: {whole:.1f} s in all")
    for part, seconds in parts.items():
        print(f"  {part:<26}{100 * seconds / whole:6.1f} %")
    slope, speed = grown["microseconds_per_position"], grown["gigabytes_per_second"]
    print(f"  against context, {grown['streams']} streams: {slope:.1f} us a position, KV read at {speed:.1f} GB/s")
    print("  " + ", ".join(f"{c}: {ms:.1f} ms" for c, ms in grown["contexts"].items()), f"R2 {grown['r_squared']:.4f}")
    print(f"  against streams, context {grown['context']}: ", end="")
    print(", ".join(f"{b}: {ms:.1f} ms" for b, ms in grown["batches"].items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=Path(model.__file__).parent / "default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--json", type=Path, help="file for every figure")
    arguments = parser.parse_args()
    said: dict[str, Any] = {"machine": machine(), "threads": arguments.threads}
    for name in FORMATS:
        loaded = load(arguments.model, name, arguments.threads)
        parts, grown = profile(loaded, arguments.streams), growth(loaded)
        show(f"{name}, {arguments.streams} streams, 128 in / 64 out", parts, grown)
        said[name] = {"parts": parts, **grown}
    if arguments.json:
        arguments.json.write_text(json.dumps(said, indent=1))


if __name__ == "__main__":
    main()
