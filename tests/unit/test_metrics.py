"""The metrics' identities at any moment: the engine is told things in any order, and a naive count agrees."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import vllm_dashboards
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from model.byte_level import ByteLevelTokenizer
from model.config import read_config
from model.sampling_params import SamplingParams
from server.checkpoint import EMBEDDED
from server.engine.admission import Admission
from server.engine.candidate import Candidate
from server.engine.engine import Engine
from server.engine.generation import RunningGeneration
from server.engine.observer import Observer
from server.engine.request import GenerationRequest, Prompt
from server.engine.variants import Variants
from server.errors import Overloaded
from server.metrics import PROCESS, Metrics
from server.worker.messages import (
    FinishReason,
    Ready,
    Received,
    Refused,
    SequenceOutput,
    Slept,
    Stats,
    Step,
    ToWorker,
    Work,
)

VARIANTS = Variants(read_config(EMBEDDED))
TOKENIZER = ByteLevelTokenizer(
    {bytes([value]): value for value in range(256)}, {"<|endoftext|>": 256}, ["<|endoftext|>"], 257
)
WORKERS = 2
QUEUED = 3


class Channel:
    """A worker that listens and says nothing by itself."""

    sent = 0

    def send(self, message: ToWorker) -> None:
        self.sent += 1


@dataclass
class World:
    """The engine, and all that ever was in it."""

    metrics: Metrics = field(default_factory=lambda: Metrics("m", "0", WORKERS))
    open: list[RunningGeneration] = field(default_factory=list)
    closed: list[RunningGeneration] = field(default_factory=list)
    ended: Counter[str] = field(default_factory=Counter)  # candidates, by reason
    failed: set[int] = field(default_factory=set)  # candidates that ended without a finish
    started: set[int] = field(default_factory=set)
    phases: Counter[str] = field(default_factory=Counter)
    deaths: Counter[int] = field(default_factory=Counter)  # of workers a candidate was on, since its last token
    up: set[int] = field(default_factory=set)
    channels: dict[int, Channel] = field(default_factory=dict)
    refused: int = 0

    def __post_init__(self) -> None:
        observer = Observer(self.metrics)
        admission = Admission(QUEUED, 1 << 16)
        self.engine = Engine(
            TOKENIZER,
            admission,
            observer,
            workers=WORKERS,
            request_timeout=60,
            stall_timeout=60,
            variants=VARIANTS,
        )
        for worker in range(WORKERS):
            self.join(worker)

    def join(self, worker: int) -> None:
        if worker not in self.up:
            self.up.add(worker)
            self.channels[worker] = Channel()
            self.engine.worker_ready(worker, Ready("scripted", 16, 64, 0.1), self.channels[worker])  # type: ignore[arg-type]

    def ask(self, n: int, best_of: int, prompts: int, max_tokens: int) -> None:
        params = SamplingParams(seed=1, max_tokens=max_tokens, ignore_eos=True)
        texts = [Prompt([1] * (place + 1), "") for place in range(prompts)]
        best_of = max(n, best_of)
        try:
            self.open.append(
                self.engine.submit(
                    GenerationRequest(id="cmpl-x", prompts=texts, params=params, n=n, best_of=best_of, key_name=f"k{n}")
                )
            )
        except Overloaded:
            self.refused += 1

    @property
    def everyone(self) -> list[Candidate]:
        return [candidate for generation in (*self.open, *self.closed) for candidate in generation.candidates]

    @property
    def alive(self) -> list[Candidate]:
        """They can still be computed."""
        candidates = [candidate for generation in self.open for candidate in generation.candidates]
        return [each for each in candidates if each.finish is None and each.id not in self.failed]

    def step(self, worker: int, picks: list[int], ends: bool, tokens: int) -> None:
        """A worker says a few tokens, or none, of some it computes; what they are of that is no more is passed over."""
        mine = [each for each in self.alive if each.worker == worker]
        if worker not in self.up:
            return
        chosen = list({each.id: each for pick in picks if mine for each in [mine[pick % len(mine)]]}.values())
        outputs = [SequenceOutput(10**6, token=65)]  # of a request that has left since
        for each in chosen:
            self.started.add(each.id)
            if tokens:
                del self.deaths[each.id]
            outputs += [SequenceOutput(each.id, token=65) for _ in range(tokens)]
            if ends:
                outputs.append(SequenceOutput(each.id, finish=FinishReason.LENGTH))
                self.ended["length"] += 1
        work = Work(
            sequences=len(chosen), tokens=9, admitted=[each.id for each in chosen], schedule=0.1, run=1, update=0.1
        )
        self.engine.worker_step(worker, Step(outputs, Stats(1, 0, 1, 0, 64, 0, 0, 0, 0, 0, [1]), 0, work))

    def leave(self, pick: int) -> None:
        if self.open:
            generation = self.open.pop(pick % len(self.open))
            for each in generation.candidates:
                if each.finish is None and each.id not in self.failed:
                    self.ended["abort"] += 1
                    phase = "waiting" if each.id not in self.started else "decode" if each.tokens else "prefill"
                    self.phases[phase] += 1
            self.closed.append(generation)
            asyncio.get_running_loop().create_task(generation.aclose())

    def refuse(self, pick: int) -> None:
        """A worker has no room for one of a call's samples: the whole call fails."""
        running = [each for each in self.alive if each.worker is not None]
        if running:
            one = running[pick % len(running)]
            (generation,) = (generation for generation in self.open if one in generation.candidates)
            self.fails(generation)
            assert one.worker is not None
            self.engine.worker_refused(one.worker, Refused(one.id))

    def lose(self, worker: int) -> None:
        if worker in self.up:
            self.up.discard(worker)
            lost = [each for each in self.alive if each.worker == worker]
            self.deaths.update(each.id for each in lost)
            if len(lost) == 1 and self.deaths[lost[0].id] > 1:  # all alone with the second worker that it died with
                self.fails(next(each for each in self.open if lost[0] in each.candidates))
            self.engine.worker_received(worker, Received(self.channels[worker].sent))
            self.engine.worker_lost(worker, killed=False)

    def fails(self, generation: RunningGeneration) -> None:
        for each in generation.candidates:
            if each.finish is None and each.id not in self.failed:
                self.failed.add(each.id)
                self.ended["error"] += 1

    def check(self) -> None:
        got = samples(self.metrics)
        reasons = {reason: got[f"gpt2_request_success_total finished_reason={reason}"] for reason in REASONS}
        assert reasons == {reason: self.ended[reason] for reason in REASONS}
        assert got["gpt2_requests_total"] == len(self.everyone)
        assert got["gpt2_requests_total"] == sum(reasons.values()) + got["gpt2_requests_in_flight"]
        assert got["gpt2_requests_rejected_total reason=overloaded"] == self.refused
        assert got["gpt2_e2e_request_latency_seconds_count"] == sum(reasons.values())
        phases = {phase: got[f"gpt2_request_aborts_total phase={phase}"] for phase in ("waiting", "prefill", "decode")}
        assert phases == {phase: self.phases[phase] for phase in phases}
        assert sum(phases.values()) == reasons["abort"]
        with_token = [each for each in self.everyone if each.tokens]
        assert got["gpt2_time_to_first_token_seconds_count"] == len(with_token)
        tokens = sum(len(each.tokens) for each in self.everyone)
        assert got["gpt2_generation_tokens_total"] == tokens
        assert tokens == len(with_token) + got["gpt2_inter_token_latency_seconds_count"]
        used = sum(each.usage.completion_tokens for each in self.closed)
        told = sum(value for name, value in got.items() if name.startswith("gpt2_key_tokens") and "generation" in name)
        assert told == used
        first_outputs = [each for each in self.everyone if each.tokens or each.finish is not None]
        assert got["gpt2_prompt_tokens_total"] == sum(len(each.prompt.token_ids) for each in first_outputs)
        by_source = "gpt2_prompt_tokens_by_source_total source=local_"
        computed, cached = got[by_source + "compute"], got[by_source + "cache_hit"]
        assert computed + cached == got["gpt2_prompt_tokens_total"]
        assert got["gpt2_prompt_tokens_cached_total"] == cached
        assert got["gpt2_prompt_tokens_cached_by_source_total source=device"] == cached
        assert got["gpt2_request_prefill_kv_computed_tokens_sum"] == computed
        up = sum(got[f"gpt2_engine_up engine={worker}"] for worker in range(WORKERS))
        assert up == len(self.up)
        assert got["gpt2_engine_sleep_state sleep_state=awake"] == len(self.up)


REASONS = ("stop", "length", "abort", "error")


def samples(metrics: Metrics) -> dict[str, float]:
    """By name and labels, without the model's name and without buckets; and of all workers together."""
    found: dict[str, float] = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            labels = [f"{name}={value}" for name, value in sample.labels.items() if name != "model_name"]
            if "le" not in sample.labels:
                found[" ".join([sample.name, *labels])] = sample.value
                if "engine" in sample.labels:
                    together = " ".join([sample.name, *(each for each in labels if not each.startswith("engine="))])
                    found[together] = found.get(together, 0) + sample.value
    return found


SMALL = st.integers(0, 3)
EVENTS = st.one_of(
    st.tuples(st.just("ask"), st.integers(1, 2), st.integers(1, 3), st.integers(1, 2), st.integers(1, 9)),
    st.tuples(st.just("step"), st.integers(0, 1), st.lists(SMALL, max_size=3), st.booleans(), st.integers(0, 3)),
    st.tuples(st.just("leave"), SMALL),
    st.tuples(st.just("refuse"), SMALL),
    st.tuples(st.just("lose"), st.integers(0, 1)),
    st.tuples(st.just("join"), st.integers(0, 1)),
)


@example([("ask", 1, 1, 1, 1), ("lose", 0), ("lose", 1)])  # all alone with both: it is found to kill workers
@settings(max_examples=150)
@given(st.lists(EVENTS, max_size=40))
def test_the_identities_hold_at_every_moment(events: list[tuple[Any, ...]]) -> None:
    async def live() -> None:
        world = World()
        for name, *arguments in events:
            getattr(world, name)(*arguments)
            await asyncio.sleep(0)
            world.check()
        while world.open:
            world.leave(0)
            await asyncio.sleep(0)
        world.check()
        assert samples(world.metrics)["gpt2_requests_in_flight"] == 0
        world.engine.check()

    asyncio.run(live())


def test_all_that_is_known_at_the_start_is_there_at_the_start() -> None:
    """A rate misses the first event of a series that begins with it."""
    got = samples(Metrics("m", "0", WORKERS))
    for name in (
        "gpt2_worker_restarts_total engine=1",
        "gpt2_requests_rejected_total reason=overloaded",
        "gpt2_request_success_total finished_reason=error",
        "gpt2_engine_step_part_seconds_total engine=0 part=run",
        "gpt2_kv_blocks engine=0 state=cached",
    ):
        assert got[name] == 0
    assert got.keys() >= {*PROCESS}


def test_the_table_is_what_is_scraped() -> None:
    metrics = Metrics("m", "0", WORKERS)
    families = {family.name: family for family in metrics.registry.collect() if family.name.startswith("gpt2_")}
    assert {row.name.removesuffix("_total") for row in metrics.table} == families.keys()
    for row in metrics.table:
        assert families[row.name.removesuffix("_total")].type == row.kind
        assert families[row.name.removesuffix("_total")].documentation == row.text


def test_a_request_is_told_of_the_worker_that_computed_it() -> None:
    async def live() -> None:
        world = World()
        world.ask(1, 1, 1, 9)
        (worker,) = {each.worker for each in world.alive}
        world.step(worker, [0], ends=True, tokens=3)
        got = samples(world.metrics)
        for name in ("generation_tokens_total", "time_to_first_token_seconds_count", "prompt_tokens_total"):
            assert got[f"gpt2_{name} engine={worker}"] > got[f"gpt2_{name} engine={1 - worker}"] == 0
        assert got[f"gpt2_request_success_total engine={worker} finished_reason=length"] == 1
        world.leave(0)
        await asyncio.sleep(0)
        assert samples(world.metrics)[f"gpt2_request_params_n_count engine={worker}"] == 1

    asyncio.run(live())


def test_a_refusal_is_counted_under_its_reason() -> None:
    async def live() -> None:
        metrics = Metrics("m", "0", WORKERS)
        engine = Engine(
            TOKENIZER, Admission(QUEUED, 1 << 16), Observer(metrics), workers=1, request_timeout=60, stall_timeout=60,
            variants=VARIANTS,
        )  # fmt: skip

        def refused() -> dict[str, float]:
            request = GenerationRequest(id="x", prompts=[Prompt([1], "")], params=SamplingParams(seed=1))
            with pytest.raises(Overloaded):
                engine.submit(request)
            prefix = "gpt2_requests_rejected_total reason="
            return {name.removeprefix(prefix): value for name, value in samples(metrics).items() if prefix in name}

        assert {reason for reason, count in refused().items() if count} == {"loading"}
        engine.worker_ready(0, Ready("scripted", 16, 64, 0.1), Channel())  # type: ignore[arg-type]
        sleeping = asyncio.ensure_future(engine.sleep(1, abort=False))
        await asyncio.sleep(0)
        engine.worker_slept(0, Slept(True))
        await sleeping
        assert {reason for reason, count in refused().items() if count} == {"loading", "asleep"}
        got = samples(metrics)
        assert got["gpt2_engine_up engine=0"] == 1  # it does what it was told to
        assert got["gpt2_engine_sleep_state engine=0 sleep_state=weights_offloaded"] == 1
        assert got["gpt2_engine_sleep_state engine=0 sleep_state=awake"] == 0
        assert refused()["overloaded"] == 0

    asyncio.run(live())


def test_vllm_s_dashboards_find_what_they_ask_for() -> None:
    """After `s/vllm:/gpt2_/`, by every label that they choose or group by; or there is a reason."""
    metrics = Metrics("m", "0", WORKERS)
    rows = {row.name: row for row in metrics.table}
    for name, labels in vllm_dashboards.BY_ENGINE.items():
        assert {"model_name", "engine", *labels} <= set(rows[f"gpt2_{name}"].labels), name
    for name in vllm_dashboards.PROCESS:
        assert name in samples(metrics)
    for name, reason in vllm_dashboards.ABSENT.items():
        assert f"gpt2_{name}" not in rows or name == "http_requests_total", name
        assert reason


def test_the_values_that_vllm_s_dashboards_choose_are_there_from_the_start() -> None:
    got = samples(Metrics("m", "0", WORKERS))
    for name, labels in vllm_dashboards.BY_ENGINE.items():
        for label, values in labels.items():
            for value in values:
                for worker in range(WORKERS):
                    assert f"gpt2_{name} engine={worker} {label}={value}" in got


def test_the_objectives_that_vllm_s_dashboards_offer_are_bounds_of_buckets() -> None:
    bounds: dict[str, set[str]] = {}
    for family in Metrics("m", "0").registry.collect():
        for sample in family.samples:
            bounds.setdefault(sample.name, set()).add(sample.labels.get("le", ""))
    for name, wanted in vllm_dashboards.BOUNDS.items():
        assert set(wanted) <= bounds[f"gpt2_{name}_bucket"]


def test_the_page_gives_the_reason_for_each_that_is_not_there() -> None:
    page = (Path(__file__).parents[2] / "docs" / "observability.md").read_text("utf-8")
    for name, reason in vllm_dashboards.ABSENT.items():
        assert re.search(rf"^\| `{name}` \| {re.escape(reason)} \|$", page, re.MULTILINE), name


def test_two_servers_share_nothing() -> None:
    one, other = Metrics("m", "0"), Metrics("m", "0")
    one.requests.inc()
    assert samples(other)["gpt2_requests_total"] == 0
    assert not [family for family in REGISTRY.collect() if family.name.startswith("gpt2_")]
