"""Parity and speed on one GPU: `python -m benchmarks.gpu`. Shapes have random weights, which cost what real ones do.

First the device's greedy text in float32 is held against the CPU's. Then, for each shape and number of streams, prompts
of 128 tokens and answers of 128 (a context of 256 at the end) go through the engine without HTTP:

tok/s     output tokens of all streams over the time from the first to the last decode step, prompts excluded
step      median milliseconds of a decode step
graph     milliseconds that the device takes for it: its CUDA graph, replayed again and again
busy      the share of the step that this is: what is missing, the device waits for the host
floor     a step if weights, keys and values were read once at the bandwidth measured here, and all else were free
TTFT      median milliseconds to the first token when all streams arrive at once
ITL       99th percentile of the milliseconds between two tokens of a stream

Beside it `transformers` on the same weights: `generate` with a static cache, and its continuous batching.
`--few-rows 0` does without the kernels for few rows: beside the default it says where they stop paying.
`--device cpu` runs all of it through the plain runner, to see that it works.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import platform
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter

import torch
from safetensors.torch import save_file

from model.config import ModelConfig, read_config
from model.gpu import cuda
from model.gpu.runner import GraphRunner
from model.loading import choose_device, choose_dtype
from model.sampling_params import SamplingParams
from model.weights import expected_shapes
from server.worker.messages import Add, Start
from server.worker.parts import count_blocks, load_networks, make_grammars, make_runner, make_scheduler, make_variants
from server.worker.pipeline import Pipeline

SHAPES = {  # layers, width, heads
    "tiny": (2, 64, 4),
    "gpt2": (12, 768, 12),
    "gpt2-medium": (24, 1024, 16),
    "gpt2-large": (36, 1280, 20),
    "gpt2-xl": (48, 1600, 25),
}
PROMPT, ANSWER = 128, 128
REPLAYS = 50


@contextmanager
def checkpoint(shape: str) -> Iterator[Path]:
    """Random weights whose logits are spread as a trained model's."""
    layers, width, heads = SHAPES[shape]
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": layers, "n_embd": width}
    config |= {"n_head": heads, "n_positions": 1024, "vocab_size": 50257, "eos_token_id": 50256, "bos_token_id": 50256}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "config.json").write_text(json.dumps(config))
        noise = torch.Generator().manual_seed(1)
        weights = {
            name: torch.ones(size) if ".ln_" in name or "ln_f" in name else 0.08 * torch.randn(size, generator=noise)
            for name, size in expected_shapes(read_config(directory)).items()
        }
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        yield directory


def start_of(directory: Path, device: str, dtype: str, streams: int, *, deterministic: bool = False) -> Start:
    return Start(
        model=str(directory),
        eos_token_ids=[50256],
        device=device,
        dtype=dtype,
        max_model_len=1024,
        max_num_seqs=streams,
        max_num_batched_tokens=max(8192, streams),
        target_itl=None,
        block_size=16,
        kv_cache_bytes=4 << 30,
        gpu_utilization=0.85,
        deterministic=deterministic,
        prefix_caching=False,
        kernels="auto",
        quantization=None,
        kv_cache_dtype="auto",
        threads=torch.get_num_threads(),
    )


class Engine:
    """The worker's loop, in this process."""

    def __init__(self, start: Start) -> None:
        networks = load_networks(start)
        blocks = count_blocks(start, networks)
        self.config: ModelConfig = networks.network.config
        self.itemsize = networks.kv_dtype.itemsize
        self.device = networks.device
        self._scheduler = make_scheduler(start, networks, blocks, None)
        self._runner = make_runner(start, networks, blocks, make_variants(start, networks), make_grammars(start))
        self._pipeline = Pipeline(self._scheduler, self._runner)
        self._ids = itertools.count()

    def run(self, prompts: list[list[int]], tokens: int) -> Run:
        """All at once. Greedy, never ending early."""
        began = perf_counter()
        run = Run({}, [], {})
        for prompt in prompts:
            id_ = next(self._ids)
            run.tokens[id_], run.times[id_] = [], []
            params = SamplingParams(seed=0, temperature=0.0, max_tokens=tokens, ignore_eos=True)
            self._scheduler.add(Add(id=id_, prompt=prompt, params=params))
        while (landed := self._pipeline.step()) is not None:
            now = perf_counter() - began
            if landed.plan.decodes:
                run.steps.append(now)
            for said in landed.outputs:
                if said.token is not None:
                    run.tokens[said.id].append(said.token)
                    run.times[said.id].append(now)
        return run

    def graph_seconds(self, streams: int) -> float | None:
        """Of a decode step on the device alone; None where it is not a graph. Once something has run."""
        graph = self._runner.graph(streams) if isinstance(self._runner, GraphRunner) else None
        if graph is None:
            return None

        def replay() -> None:
            for _ in range(REPLAYS):
                graph()

        return min(_seconds(self.device, replay) for _ in range(5)) / REPLAYS


@dataclass(frozen=True)
class Run:
    tokens: dict[int, list[int]]
    steps: list[float]  # when each decode step was home, in seconds
    times: dict[int, list[float]]  # when each token of a sequence was

    def gaps(self) -> list[float]:
        return [later - earlier for times in self.times.values() for earlier, later in itertools.pairwise(times)]


def prompts_of(count: int, length: int = PROMPT) -> list[list[int]]:
    numbers = random.Random(3)
    return [[numbers.randrange(50000) for _ in range(length)] for _ in range(count)]


def check_parity(device: str) -> None:
    with checkpoint("tiny") as directory:
        texts = []
        for each in ("cpu", device):
            run = Engine(start_of(directory, each, "float32", 16)).run(prompts_of(16, 100), 100)
            texts.append(list(run.tokens.values()))
    same = sum(a == b for a, b in zip(*texts, strict=True))
    print(f"Parity: {same} of 16 greedy texts of 100 tokens are the CPU's, in float32\n")
    if same < 16:
        raise SystemExit("the device does not compute what the CPU computes")


def bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of copying what no cache holds."""
    size = 1 << (31 if device.type == "cuda" else 28)
    source, target = torch.ones(size // 4, device=device), torch.empty(size // 4, device=device)
    return max(2 * size / _seconds(device, lambda: target.copy_(source)) for _ in range(5))


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    wait = cuda.Cuda(device).mark if device.type == "cuda" else lambda: lambda: None
    wait()()
    began = perf_counter()
    work()
    wait()()
    return perf_counter() - began


def measure(shape: str, directory: Path, device: str, dtype: str, streams: int, speed: float) -> str:
    engine = Engine(start_of(directory, device, dtype, streams))
    prompts = prompts_of(streams)
    engine.run(prompts, 8)
    run = engine.run(prompts, ANSWER)
    steps = [later - earlier for earlier, later in itertools.pairwise(run.steps)]
    step = median(steps)
    layers, width, _ = SHAPES[shape]
    read = engine.config.parameters * engine.itemsize
    read += streams * (PROMPT + ANSWER // 2) * 2 * layers * width * engine.itemsize
    first = median(times[0] for times in run.times.values())
    worst = quantiles(run.gaps(), n=100)[98]
    rate = streams * len(steps) / (run.steps[-1] - run.steps[0])
    graph = engine.graph_seconds(streams)
    on_device = ["–", "–"] if graph is None else [f"{1e3 * graph:.3f}", f"{graph / step:.0%}"]
    cells = [shape, str(streams), f"{rate:,.0f}", f"{1e3 * step:.3f}", *on_device, f"{1e3 * read / speed:.3f}"]
    return row([*cells, f"{1e3 * first:.1f}", f"{1e3 * worst:.2f}"])


def row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def transformers_rates(directory: Path, device: torch.device, dtype: torch.dtype, streams: int) -> list[str]:
    """Output tokens a second, prompts included, of its two ways; the reason where one does not run."""
    from transformers import GenerationConfig, GPT2LMHeadModel  # noqa: PLC0415  only this function needs the peer

    network = GPT2LMHeadModel.from_pretrained(directory, dtype=dtype).eval()
    network.to(device)
    prompts = prompts_of(streams)
    ids = torch.tensor(prompts, device=device)
    common = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER, "do_sample": False, "pad_token_id": 50256}

    def static() -> None:
        network.generate(ids, cache_implementation="static", **common)

    def continuous() -> None:
        network.generate_batch(inputs=prompts, generation_config=GenerationConfig(eos_token_id=-1, **common))

    found = []
    for way in (static, continuous):
        try:
            with torch.inference_mode():
                way()
                found.append(f"{streams * ANSWER / _seconds(device, way):,.0f}")
        except Exception as error:  # a peer may fail in any way; the table says which
            found.append(f"failed: {type(error).__name__}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[name for name in SHAPES if name != "tiny"])
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8, 32, 128, 512])
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="transformers beside it")
    parser.add_argument("--few-rows", type=int, help="the most rows that the kernels for few rows get; 0: none")
    arguments = parser.parse_args()
    if arguments.few_rows is not None:
        vars(importlib.import_module("model.gpu.few_rows"))["FEW"] = arguments.few_rows
    device = choose_device(arguments.device)
    name = cuda.describe(device) if device.type == "cuda" else platform.processor() or "CPU"
    speed = bandwidth(device)
    print(f"{name}, PyTorch {torch.__version__}, {speed / 1e9:,.0f} GB/s measured\n")
    check_parity(arguments.device)
    print(row(["shape", "streams", "tok/s", "step ms", "graph ms", "busy", "floor ms", "TTFT ms", "ITL p99 ms"]))
    print(row(["---", *["---:"] * 8]))
    peers = []
    for shape in arguments.shapes:
        with checkpoint(shape) as directory:
            for streams in arguments.streams:
                print(measure(shape, directory, arguments.device, arguments.dtype, streams, speed), flush=True)
                if arguments.peer:
                    rates = transformers_rates(directory, device, choose_dtype(arguments.dtype, device), streams)
                    peers.append(row([shape, str(streams), *rates]))
    if peers:
        print("", row(["shape", "streams", "generate, static cache, tok/s", "continuous batching, tok/s"]), sep="\n")
        print(row(["---", *["---:"] * 3]), *peers, sep="\n")


if __name__ == "__main__":
    main()
