"""What the host does for a step of a GPU: `python -m benchmarks.host [--http]`. Needs no GPU.

The whole engine runs, graphs and queue included, on a device that does nothing and takes no time. What is left is what
Python does for each decode step: planning, laying out, launching, taking in, and packing the message to the api
process. A device is busy all the time only if that is shorter than its own step; no engine is faster than its host.

--http: the whole server around such an engine, and clients that stream from it on the same machine. The tokens it
sends a second, and the processor time that the api process takes for each.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import msgspec
import psutil
import torch
from torch import Tensor

from benchmarks.gpu import checkpoint
from benchmarks.machine import machine
from model.config import read_config
from model.gpt2 import GPT2
from model.gpu.attention import GatheredAttention
from model.gpu.ops import GpuOps
from model.gpu.runner import GraphRunner, Recorded
from model.grammar import Grammars
from model.kv_cache import KVCache
from model.runner import Runner
from model.sampling_params import SamplingParams
from model.variants import Variants
from model.weights import read_weights
from server.load import Workload, bodies, closed_loop, started
from server.worker.block_pool import BlockPool
from server.worker.messages import Add, Start, Step
from server.worker.parts import Networks
from server.worker.pipeline import Pipeline
from server.worker.scheduler import Scheduler

CPU = torch.device("cpu")
PROMPT, ANSWER, CONTEXT, BLOCK_SIZE = 16, 240, 1024, 16
HTTP_ROUNDS = 3
HTTP_KV_BYTES = 24 * 1024  # of a token, in the embedded model: more than it needs


class Nothing:
    """An Accelerator that records what it is told, and then does none of it."""

    @property
    def device(self) -> torch.device:
        return CPU

    def host_buffer(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype)

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        step()
        return lambda: None

    def mark(self) -> Callable[[], None]:
        return lambda: None


def load(directory: Path) -> GPT2:
    config = read_config(directory)
    with torch.inference_mode():
        ops = GpuOps(CPU, torch.float32, GatheredAttention(), deterministic=False)
        return GPT2(config, read_weights(directory, config), ops)


def make_idle_runner(
    start: Start,
    networks: Networks,
    num_blocks: int,
    variants: Variants,
    grammars: Grammars,
    recorded: Recorded | None = None,
) -> GraphRunner:
    """As server.worker.parts.make_runner. The prompts' steps are computed, on the CPU."""
    network = load(Path(start.model))
    cache = KVCache(network.config, num_blocks + 1, start.block_size, torch.float32, CPU)
    runner = GraphRunner(
        Runner(network, cache, CPU, start.max_model_len, grammars=grammars), network, cache, Nothing(),
        max_rows=start.max_num_batched_tokens, max_seqs=start.max_num_seqs,
        max_blocks=-(-start.max_model_len // start.block_size), scratch_block=num_blocks,
    )  # fmt: skip
    runner.capture(recorded)
    return runner


def make(network: GPT2, streams: int) -> tuple[Scheduler, Pipeline]:
    blocks = max(CONTEXT // BLOCK_SIZE, streams * (PROMPT + ANSWER) // BLOCK_SIZE) + streams
    cache = KVCache(network.config, blocks + 1, BLOCK_SIZE, torch.float32, CPU)
    runner = GraphRunner(
        Runner(network, cache, CPU, CONTEXT), network, cache, Nothing(),
        max_rows=8192, max_seqs=streams, max_blocks=CONTEXT // BLOCK_SIZE, scratch_block=blocks,
    )  # fmt: skip
    runner.capture()
    scheduler = Scheduler(
        BlockPool(blocks, BLOCK_SIZE, enable_prefix_caching=True),
        max_num_seqs=streams,
        max_num_batched_tokens=8192,
        max_model_len=CONTEXT,
        eos_token_ids=network.config.eos_token_ids,
    )
    return scheduler, Pipeline(scheduler, runner)


def measure(network: GPT2, streams: int) -> list[float]:
    """Milliseconds of a decode step: in all, planning, laying out and launching, taking in, packing."""
    scheduler, pipeline = make(network, streams)
    noise, encoder = random.Random(1), msgspec.msgpack.Encoder()
    for id_ in range(streams):
        params = SamplingParams(seed=id_, temperature=0.0, max_tokens=ANSWER, ignore_eos=True)
        prompt = [noise.randrange(50000) for _ in range(PROMPT)]
        scheduler.add(Add(id=id_, prompt=prompt, params=params))
    found = []
    while True:
        began = perf_counter()
        landed = pipeline.step()
        if landed is None:
            break
        stepped = perf_counter()
        encoder.encode(Step(landed.outputs, scheduler.stats(), 0, None))
        packed = perf_counter()
        if landed.plan.decodes:
            found.append((packed - began, landed.schedule, landed.run, landed.update, packed - stepped))
    return [1e3 * median(column) for column in zip(*found, strict=True)]


def measure_http(streams: int) -> list[float]:
    """Tokens a second that clients get, and microseconds of the api process for each: medians of some rounds."""
    load_ = Workload("", prompt=8, output=504, concurrency=streams, requests=streams)
    here = Path(__file__).parent
    os.environ["PYTHONPATH"] = f"{here / 'idle'}{os.pathsep}{here.parent}"
    flags = ["--max-num-seqs", str(streams), "--kv-cache-gib", str(streams * 512 * HTTP_KV_BYTES / (1 << 30))]
    rates, costs = [], []
    with started(None, flags) as (server, _, pid):
        process = psutil.Process(pid)
        for turn in range(HTTP_ROUNDS + 1):
            before = sum(process.cpu_times()[:2])
            result = asyncio.run(closed_loop(server, bodies(load_, turn), streams))
            spent = sum(process.cpu_times()[:2]) - before
            assert not result.failures
            if turn > 0:  # the first one touches the memory of the KV cache
                rates.append(result.tokens_per_second)
                costs.append(1e6 * spent / (load_.output * streams))
    return [median(rates), median(costs)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8, 32, 128, 512])
    parser.add_argument("--http", action="store_true", help="the whole server, at each number of streams")
    arguments = parser.parse_args()
    print(f"{machine()}, PyTorch {torch.__version__}\n")
    if arguments.http:
        print("| streams | tok/s over HTTP | µs of the api process a token |")
        print("| ---: | ---: | ---: |")
        for streams in arguments.streams:
            rate, cost = measure_http(streams)
            print(f"| {streams} | {rate:,.0f} | {cost:.1f} |", flush=True)
        return
    print("| streams | ms a step | planning | launching | taking in | packing | tok/s at most |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    with checkpoint("tiny") as directory:
        network = load(directory)
        for streams in arguments.streams:
            times = measure(network, streams)
            cells = [str(streams), *(f"{each:.3f}" for each in times), f"{1e3 * streams / times[0]:,.0f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
