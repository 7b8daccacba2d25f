"""What the engine's scheduling is worth, without HTTP: `python -m benchmarks.engine [MODEL] [--threads N]`.

Four questions, each asked of two ways to run the same work, in turn and several times over; medians are compared, so
that a busy machine disturbs both sides alike. The last column is the line to hold.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch

import model
from model.gpt2 import GPT2
from model.kv_cache import KVCache
from model.loading import choose_device, choose_dtype, load_model
from model.runner import Runner
from model.sampling_params import SamplingParams
from model.speculative import PromptLookup
from server.worker.block_pool import BlockPool
from server.worker.budget import PREFILL_LEAST, BudgetController
from server.worker.messages import Add
from server.worker.scheduler import Scheduler
from server.worker.speculation import SpeculationController

BLOCK_SIZE = 16
SEATS = 64
REPEATING = [464, 3797, 3332, 319, 262, 2603, 290, 262, 3290, 3332, 319, 262, 11845, 13] * 12


@dataclass(frozen=True)
class Way:
    """One way to run the engine."""

    num_blocks: int = 4096
    budget: int = 512
    caching: bool = True
    guesses: int = 0
    target_itl: float | None = None
    kv_dtype: torch.dtype = torch.float32


class Engine:
    """The worker's loop, in this process."""

    def __init__(self, network: GPT2, device: torch.device, way: Way) -> None:
        context = network.config.n_positions
        self._speculation = SpeculationController(way.guesses, cost=0.0) if way.guesses else None
        self._scheduler = Scheduler(
            BlockPool(way.num_blocks, BLOCK_SIZE, enable_prefix_caching=way.caching),
            max_num_seqs=SEATS,
            max_num_batched_tokens=way.budget,
            max_model_len=context,
            eos_token_ids=network.config.eos_token_ids,
            speculation=self._speculation,
        )
        self._budget: BudgetController | None = None
        if way.target_itl is not None:
            self._budget = BudgetController(way.target_itl, smallest=PREFILL_LEAST, largest=way.budget)
        cache = KVCache(network.config, way.num_blocks, BLOCK_SIZE, way.kv_dtype, device)
        drafter = PromptLookup() if way.guesses else None
        self._runner = Runner(network, cache, device, context, drafter=drafter)
        self._ids = itertools.count()
        self.outputs: dict[int, list[int]] = {}
        self.times: dict[int, list[float]] = {}  # when each token of a sequence was there

    @property
    def preemptions(self) -> int:
        return self._scheduler.preemptions

    def add(self, prompt: list[int], max_tokens: int, **fields: Any) -> int:
        """fields: of SamplingParams; greedy without any."""
        id_ = next(self._ids)
        fields = fields or {"temperature": 0.0}
        params = SamplingParams(seed=id_, max_tokens=max_tokens, ignore_eos=True, **fields)
        self._scheduler.add(Add(id=id_, prompt=prompt, params=params))
        self.outputs[id_], self.times[id_] = [], []
        return id_

    def step(self) -> bool:
        plan = self._scheduler.schedule()
        if plan is None:
            return False
        began = perf_counter()
        result = self._runner.run(plan)
        said = self._scheduler.update(plan, result)
        now = perf_counter()
        rows = plan.tokens + sum(result.drafted.values())
        if self._speculation is not None and plan.decodes:
            self._speculation.observe(rows, now - began)
        if self._budget is not None:
            least = self._scheduler.num_running + PREFILL_LEAST
            self._scheduler.token_budget = max(self._budget.observe(rows, now - began), least)
        for output in said:
            if output.token is not None:
                self.outputs[output.id].append(output.token)
                self.times[output.id].append(now)
        return True

    def run(self, work: list[tuple[list[int], int]]) -> float:
        """Tokens a second of a batch that arrives at once."""
        began = perf_counter()
        ids = [self.add(prompt, max_tokens) for prompt, max_tokens in work]
        while self.step():
            pass
        return sum(len(self.outputs[id_]) for id_ in ids) / (perf_counter() - began)


@dataclass(frozen=True)
class Row:
    name: str
    base: str
    other: str
    ratio: float
    line: str
    holds: bool


class Bench:
    def __init__(self, network: GPT2, device: torch.device, rounds: int) -> None:
        self._network = network
        self._device = device
        self._rounds = rounds
        self._noise = random.Random(1)

    def engine(self, way: Way) -> Engine:
        return Engine(self._network, self._device, way)

    def prompt(self, length: int) -> list[int]:
        return [self._noise.randrange(50256) for _ in range(length)]

    def compare(self, first: Callable[[], float], second: Callable[[], float]) -> tuple[float, float, float]:
        """Medians of both, and of their ratio, taken in turn."""
        pairs = [(first(), second()) for _ in range(self._rounds)]
        ratio = median(b / a for a, b in pairs)
        return median(a for a, _ in pairs), median(b for _, b in pairs), ratio

    def shared_prefix(self) -> Row:
        prefix = self.prompt(512)
        work = [(prefix + self.prompt(8), 8) for _ in range(64)]
        base, other, ratio = self.compare(
            lambda: self.engine(Way(caching=False)).run(work), lambda: self.engine(Way()).run(work)
        )
        name = "(a) 64 requests, 512 shared + 8 own tokens, 8 out: prefix cache off, on"
        return Row(name, f"{base:.0f} tok/s", f"{other:.0f} tok/s", ratio, ">= 5", ratio >= 5)

    def prompts_beside_streams(self) -> Row:
        quiet, loud = [], []
        for _ in range(self._rounds):
            gaps, target = self._gaps(Way(), prompts=False), None
            target = 1.5 * median(gaps)
            quiet.append(_p99(gaps))
            loud.append(_p99(self._gaps(Way(target_itl=target), prompts=True)))
        ratio = median(b / a for a, b in zip(quiet, loud, strict=True))
        name = "(b) p99 between tokens of 8 streams: quiet, with a 1,000-token prompt each second"
        return Row(name, f"{median(quiet) * 1e3:.1f} ms", f"{median(loud) * 1e3:.1f} ms", ratio, "<= 2", ratio <= 2)

    def _gaps(self, way: Way, *, prompts: bool, seconds: float = 4.0) -> list[float]:
        """Between tokens of eight streams, over some seconds."""
        engine = self.engine(way)
        streams = [engine.add(self.prompt(16), 900) for _ in range(8)]
        while len(engine.outputs[streams[-1]]) < 8:
            engine.step()
        began = perf_counter()
        due = began
        while perf_counter() - began < seconds:
            if prompts and perf_counter() >= due:
                engine.add(self.prompt(1000), 1)
                due += 1.0
            engine.step()
            streams = [s if len(engine.outputs[s]) < 900 else engine.add(self.prompt(16), 900) for s in streams]
        times = [[t for t in engine.times[s] if t >= began] for s in engine.times if len(engine.times[s]) > 8]
        return [b - a for stream in times for a, b in itertools.pairwise(stream)]

    def repetition(self, streams: int, tokens: int, least: float) -> Row:
        work = [(REPEATING[i % 14 :], tokens) for i in range(streams)]
        base, other, ratio = self.compare(
            lambda: self.engine(Way(caching=False)).run(work),
            lambda: self.engine(Way(caching=False, guesses=5)).run(work),
        )
        name = f"(c) repetitive text, {streams} stream(s): prompt lookup off, on"
        return Row(name, f"{base:.0f} tok/s", f"{other:.0f} tok/s", ratio, f">= {least}", ratio >= least)

    def overload(self) -> Row:
        work = [(self.prompt(32), 96) for _ in range(SEATS)]  # eight blocks each
        texts: list[list[list[int]]] = []
        preemptions = []

        def run(num_blocks: int) -> float:
            engine = self.engine(Way(num_blocks=num_blocks))
            rate = engine.run(work)
            texts.append(list(engine.outputs.values()))
            preemptions.append(engine.preemptions)
            return rate

        base, other, ratio = self.compare(lambda: run(SEATS * 8), lambda: run(SEATS * 2))
        same = all(text == texts[0] for text in texts) and all(len(t) == 96 for t in texts[0])
        name = f"(d) a pool of all they need, of a quarter ({preemptions[1]} preemptions, same text: {same})"
        return Row(name, f"{base:.0f} tok/s", f"{other:.0f} tok/s", ratio, ">= 0.8", ratio >= 0.8 and same)


def _p99(values: list[float]) -> float:
    return quantiles(values, n=100)[98]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, default=Path(model.__file__).parent / "default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="abcd", help="which of the four")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = choose_device("auto")
    network, ops = load_model(arguments.model, device, choose_dtype("auto", device))
    bench = Bench(network, device, arguments.rounds)
    bench.engine(Way()).run([(bench.prompt(64), 8)] * 4)  # warm up
    print(
        f"{device}, {ops.describe()}, {arguments.threads} thread(s), {platform.machine()}; medians of {bench._rounds}"
    )
    rows = {
        "a": [bench.shared_prefix],
        "b": [bench.prompts_beside_streams],
        "c": [lambda: bench.repetition(1, 400, 2.0), lambda: bench.repetition(32, 64, 0.95)],
        "d": [bench.overload],
    }
    for question in arguments.only:
        for ask in rows[question]:
            row = ask()
            verdict = "holds" if row.holds else "MISSED"
            print(f"{row.name:<86}{row.base:>12}{row.other:>13}{row.ratio:>8.2f}x  {row.line:<8} {verdict}", flush=True)


if __name__ == "__main__":
    main()
