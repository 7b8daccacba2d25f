"""Every metric's name, in one table. Suffixes and meanings are vLLM's, so that its dashboards need one substitution.

Label values come from our own constants alone: the served model's name, the names of keys, the enums below, route
templates.
"""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

PREFIX = "gpt2"
LATENCY = (
    .001, .002, .005, .01, .02, .04, .06, .08, .1, .15, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640,
)  # fmt: skip
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


class Metrics:
    """One registry for one server. Times are seconds."""

    def __init__(self, model_name: str, version: str) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name
        # Gauges: the worker's books after its latest step.
        self.running = self._gauge("num_requests_running", "Sequences being computed")
        self.waiting = self._gauge("num_requests_waiting", "Sequences waiting for a place")
        self.kv_usage = self._gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1")
        self.heartbeat = self._gauge("engine_heartbeat_timestamp_seconds", "When a worker last finished a step")
        # Requests. A request is counted when it is admitted, and once more, under its reason, when it ends.
        self.requests = self._counter("requests", "Requests admitted")
        self.success = self._counter("request_success", "Requests ended", "finished_reason")
        self.rejected = self._counter("requests_rejected", "Requests refused before any work was done", "reason")
        self.http_requests = self._counter("http_requests", "HTTP answers", "route", "status")
        self.key_requests = self._counter("key_requests", "Requests admitted, by the name of the key", "key")
        self.key_tokens = self._counter("key_tokens", "Tokens of ended requests, by the name of the key", "key", "kind")
        # Tokens.
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of ended requests")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated")
        self.preemptions = self._counter("num_preemptions", "Sequences put back to waiting for want of blocks")
        self.prefix_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache")
        self.prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache")
        self.drafted = self._counter("spec_decode_num_draft_tokens", "Guesses of speculative decoding")
        self.accepted = self._counter("spec_decode_num_accepted_tokens", "Guesses that were right")
        self.worker_restarts = self._counter("worker_restarts", "Workers started in place of dead ones")
        # Latencies, from arrival.
        self.ttft = self._histogram("time_to_first_token_seconds", "Arrival to a request's first token", LATENCY)
        self.itl = self._histogram("inter_token_latency_seconds", "Between two tokens of one sequence", LATENCY)
        self.e2e = self._histogram("e2e_request_latency_seconds", "Arrival to the end", LATENCY)
        self.step_seconds = self._histogram("engine_step_seconds", "One step of the worker", LATENCY)
        self.batch_tokens = self._histogram("batch_tokens", "Tokens computed in one step", BATCH)
        self.request_prompt_tokens = self._histogram("request_prompt_tokens", "Prompt tokens of a request", TOKENS)
        self.request_generation_tokens = self._histogram(
            "request_generation_tokens", "Tokens generated for a request", TOKENS
        )
        build = Gauge(f"{PREFIX}_build_info", "Constant 1", ["version", "model_name"], registry=self.registry)
        build.labels(version, model_name).set(1)
        start = Gauge(f"{PREFIX}_start_time_seconds", "When the server started", registry=self.registry)
        start.set(time.time())

    def answered(self, route: str, status: int) -> None:
        self.http_requests.labels(route, str(status)).inc()

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"{PREFIX}_{name}", text, ["model_name"], registry=self.registry).labels(self._model_name)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        metric = Histogram(f"{PREFIX}_{name}", text, ["model_name"], registry=self.registry, buckets=buckets)
        return metric.labels(self._model_name)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        """With labels of its own, the caller still has to name them."""
        metric = Counter(f"{PREFIX}_{name}", text, [*labels] or ["model_name"], registry=self.registry)
        return metric if labels else metric.labels(self._model_name)
