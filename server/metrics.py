"""Every metric's name, in one table. Suffixes and meanings are vLLM's, so that its dashboards need one substitution.

A request is what vLLM counts as one: a single sample of a single prompt. Label values come from our own constants
alone: the served model's name, the enums below, the numbers of workers, names of keys, route templates. What is known
of them at the start is there from the start, at 0: a rate misses the first event of a series that begins with it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import product
from platform import python_version
from typing import Generic, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)

# One more series for each that we have, and no dashboard asks when a counter was made.
disable_created_metrics()  # type: ignore[no-untyped-call]

PREFIX = "gpt2"
LATENCY = (
    .001, .002, .005, .01, .02, .04, .06, .08, .1, .15, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640,
)  # fmt: skip
PER_TOKEN = (
    .001, .002, .005, .01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
SAMPLES = (1, 2, 5, 10, 20, 50, 100)
PROCESS = (  # what prometheus_client says of the api process, under its own names
    "process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds", "process_max_fds",
)  # fmt: skip


class Finished(Enum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"  # its client left
    ERROR = "error"


class Rejection(Enum):
    OVERLOADED = "overloaded"
    ASLEEP = "asleep"
    LOADING = "loading"
    DRAINING = "draining"
    RATE_LIMITED = "rate_limited"


class Phase(Enum):
    """How far a request has come."""

    WAITING = "waiting"
    PREFILL = "prefill"  # some of its prompt was computed
    DECODE = "decode"  # it has a token


class Part(Enum):
    """What the time of a step goes into."""

    SCHEDULE = "schedule"
    RUN = "run"  # the network and the sampler
    UPDATE = "update"


class TokenKind(Enum):
    PROMPT = "prompt"
    GENERATION = "generation"


class WaitingFor(Enum):
    CAPACITY = "capacity"  # a place in the batch, or KV blocks
    DEFERRED = "deferred"  # vLLM knows requests that something else holds back; here there are none


class LineEnd(Enum):
    COMPLETED = "completed"
    FAILED = "failed"  # refused, or never run


class Source(Enum):
    LOCAL_COMPUTE = "local_compute"
    LOCAL_CACHE_HIT = "local_cache_hit"
    EXTERNAL_KV_TRANSFER = "external_kv_transfer"  # vLLM knows caches outside the server; here there are none


class SleepState(Enum):
    """vLLM's names."""

    AWAKE = "awake"
    WEIGHTS_OFFLOADED = "weights_offloaded"  # level 1; here the weights stay, and the KV pool is given back
    DISCARD_ALL = "discard_all"  # level 2


class CacheSource(Enum):
    """vLLM knows further ones: host, disk, and other servers."""

    DEVICE = "device"  # where the network is computed


class BlockState(Enum):
    USED = "used"  # some sequence holds it
    CACHED = "cached"  # nobody does, but its tokens can still be found
    FREE = "free"


M = TypeVar("M", Counter, Gauge, Histogram)
Labels = dict[str, list[str]] | tuple[str, ...]  # with all their values, or by name alone


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    name: str  # as it is scraped; a histogram's without _bucket, _sum and _count
    kind: str
    text: str
    labels: tuple[str, ...]


class Family(Generic[M]):
    """The series of one metric, by the values of its labels beside the model's name."""

    def __init__(self, metric: M, model_name: str) -> None:
        self._metric: M = metric
        self._model_name = model_name
        self._series: dict[tuple[str, ...], M] = {}

    def __call__(self, *values: str) -> M:
        """Bound once: prometheus_client takes a lock and a microsecond to find a series by its labels."""
        series = self._series.get(values)
        if series is None:
            series = self._series[values] = self._metric.labels(self._model_name, *values)
        return series


class Metrics:
    """One registry for one server. Times are seconds. `engine` is the number of a worker, as vLLM has it."""

    def __init__(self, model_name: str, version: str, workers: int = 1) -> None:
        self.registry = CollectorRegistry()
        self.table: list[Row] = []
        self._model_name = model_name
        self._engines = [str(worker) for worker in range(workers)]
        self._declare_workers()
        self._declare_requests()
        self._declare_tokens()
        self._declare_latencies()
        self._declare_process(version)

    def _declare_workers(self) -> None:
        """The worker's books after its latest step; counters run from the server's start, over all its workers."""
        gauge, counter, engines = self._gauges, self._counters, {"engine": self._engines}
        self.running = gauge("num_requests_running", "Requests being computed", engines)
        self.waiting = gauge("num_requests_waiting", "Requests waiting for a place", engines)
        self.waiting_for = gauge(
            "num_requests_waiting_by_reason", "What they wait for", {**engines, "reason": _values(WaitingFor)}
        )
        self.kv_usage = gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1", engines)
        self.kv_blocks = gauge(
            "kv_blocks",
            "KV blocks: in use; free but still to be found; free",
            {**engines, "state": _values(BlockState)},
        )
        labels = ("engine", "block_size", "num_gpu_blocks")
        self.cache_config = gauge("cache_config_info", "Constant 1: the KV cache's size in blocks", labels)
        self.up = gauge("engine_up", "Whether a worker is there, asleep or awake", engines)
        self.sleep_state = gauge(
            "engine_sleep_state", "1 for the state that a worker is in", {**engines, "sleep_state": _values(SleepState)}
        )
        self.heartbeat = gauge("engine_heartbeat_timestamp_seconds", "When a worker last finished a step", engines)
        self.restarts = counter("worker_restarts", "Workers lost, each of which is replaced", engines)
        self.step_seconds = self._histograms("engine_step_seconds", "One step of a worker", engines, LATENCY)
        self.step_parts = counter(
            "engine_step_part_seconds", "What the time of steps went into", {**engines, "part": _values(Part)}
        )
        self.batch_size = self._histograms("batch_size", "Requests in one step", engines, BATCH)
        self.batch_tokens = self._histograms("batch_tokens", "Tokens computed in one step, guesses too", engines, BATCH)
        self.preemptions = counter("num_preemptions", "Requests put back to waiting for want of blocks", engines)
        self.prefix_queries = counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache", engines)
        self.prefix_hits = counter("prefix_cache_hits", "Prompt tokens found in the prefix cache", engines)
        self.drafts = counter("spec_decode_num_drafts", "Runs of guesses of speculative decoding", engines)
        self.drafted = counter("spec_decode_num_draft_tokens", "Guesses", engines)
        self.accepted = counter("spec_decode_num_accepted_tokens", "Guesses that were right", engines)
        self.accepted_at = counter(
            "spec_decode_num_accepted_tokens_per_pos", "Guesses that were right, by place in their run",
            ("engine", "position"),
        )  # fmt: skip

    def _declare_requests(self) -> None:
        """A request is counted when it is admitted, and once more, under its reason, when it ends.

        engine: the worker that computed it last; 0 where none did.
        """
        engines = {"engine": self._engines}
        self.requests = self._counter("requests", "Requests admitted")
        self.in_flight = self._gauge("requests_in_flight", "Requests admitted that have not ended")
        self.success = self._counters(
            "request_success", "Requests ended, by how", {**engines, "finished_reason": _values(Finished)}
        )
        self.aborts = self._counters(
            "request_aborts", "Requests whose clients left, by how far they had come", {"phase": _values(Phase)}
        )
        self.rejected = self._counters(
            "requests_rejected", "Calls refused before any work was done", {"reason": _values(Rejection)}
        )
        self.http_requests = self._counters("http_requests", "HTTP answers", ("route", "status"))
        self.key_requests = self._counters("key_requests", "Calls admitted, by key", ("key",))
        self.batch_lines = self._counters(
            "batch_lines", "Lines of /v1/batches that have their outcome", {"outcome": _values(LineEnd)}
        )
        self.params_n = self._histograms("request_params_n", "n of a call that ended", engines, SAMPLES)
        self.params_max_tokens = self._histograms(
            "request_params_max_tokens", "max_tokens of a request", engines, TOKENS
        )

    def _declare_tokens(self) -> None:
        engines = {"engine": self._engines}
        counter, histogram = self._counters, self._histograms
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests that got their first output", engines)
        self.prompt_tokens_by_source = counter(
            "prompt_tokens_by_source", "Where they came from", {**engines, "source": _values(Source)}
        )
        self.prompt_tokens_cached = counter("prompt_tokens_cached", "Those found in a cache", engines)
        self.prompt_tokens_cached_by_source = counter(
            "prompt_tokens_cached_by_source", "In which cache", {**engines, "source": _values(CacheSource)}
        )
        self.generation_tokens = counter("generation_tokens", "Tokens generated", engines)
        self.key_tokens = counter("key_tokens", "Usage told to calls that ended, by key", ("key", "kind"))
        self.request_prompt_tokens = histogram("request_prompt_tokens", "Prompt tokens of a request", engines, TOKENS)
        self.request_prefill_computed = histogram(
            "request_prefill_kv_computed_tokens", "Prompt tokens of a request that no cache had", engines, TOKENS
        )
        self.request_generation_tokens = histogram(
            "request_generation_tokens", "Tokens generated for a request", engines, TOKENS
        )
        self.max_generation_tokens = histogram(
            "request_max_num_generation_tokens", "The longest of a call's samples", engines, TOKENS
        )

    def _declare_latencies(self) -> None:
        """Of requests. All but the first two are told when a request ends, as far as it came."""

        def histogram(name: str, text: str, buckets: tuple[float, ...] = LATENCY) -> Family[Histogram]:
            return self._histograms(name, text, {"engine": self._engines}, buckets)

        self.ttft = histogram("time_to_first_token_seconds", "Arrival to the first token")
        self.itl = histogram("inter_token_latency_seconds", "Between two tokens", PER_TOKEN)
        self.tpot = histogram(
            "request_time_per_output_token_seconds", "A request's mean time between tokens", PER_TOKEN
        )
        self.e2e = histogram("e2e_request_latency_seconds", "Arrival to the end")
        self.queue_time = histogram("request_queue_time_seconds", "Arrival to the first step")
        self.prefill_time = histogram("request_prefill_time_seconds", "First step to the first token")
        self.decode_time = histogram("request_decode_time_seconds", "First token to the last")
        self.inference_time = histogram("request_inference_time_seconds", "First step to the last token")

    def _declare_process(self, version: str) -> None:
        self.loop_lag = self._histogram(
            "event_loop_lag_seconds", "By how much the api process is late for a timer", LATENCY
        )
        build = self._gauges("build_info", "Constant 1", ("version", "python"))
        build(version, python_version()).set(1)
        self._gauge("start_time_seconds", "When the server started").set(time.time())
        ProcessCollector(registry=self.registry)

    def answered(self, route: str, status: int) -> None:
        self.http_requests(route, str(status)).inc()

    def batch_line(self, succeeded: bool) -> None:
        self.batch_lines((LineEnd.COMPLETED if succeeded else LineEnd.FAILED).value).inc()

    # === One row each ===

    def _row(self, name: str, kind: str, text: str, labels: Sequence[str]) -> tuple[str, list[str]]:
        full = f"{PREFIX}_{name}"
        self.table.append(Row(f"{full}_total" if kind == "counter" else full, kind, text, ("model_name", *labels)))
        return full, ["model_name", *labels]

    def _gauges(self, name: str, text: str, labels: Labels) -> Family[Gauge]:
        full, names = self._row(name, "gauge", text, tuple(labels))
        return self._family(Gauge(full, text, names, registry=self.registry), labels)

    def _gauge(self, name: str, text: str) -> Gauge:
        return self._gauges(name, text, ())()

    def _counters(self, name: str, text: str, labels: Labels) -> Family[Counter]:
        full, names = self._row(name, "counter", text, tuple(labels))
        return self._family(Counter(full, text, names, registry=self.registry), labels)

    def _counter(self, name: str, text: str) -> Counter:
        return self._counters(name, text, ())()

    def _histograms(self, name: str, text: str, labels: Labels, buckets: tuple[float, ...]) -> Family[Histogram]:
        full, names = self._row(name, "histogram", text, tuple(labels))
        return self._family(Histogram(full, text, names, registry=self.registry, buckets=buckets), labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return self._histograms(name, text, (), buckets)()

    def _family(self, metric: M, labels: Labels) -> Family[M]:
        family = Family(metric, self._model_name)
        if isinstance(labels, dict):  # all values are known: all series are there at once
            for values in product(*labels.values()):
                family(*values)
        return family


def _values(kind: type[Enum]) -> list[str]:
    return [each.value for each in kind]
