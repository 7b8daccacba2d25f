"""What happens to candidates, as metrics. The engine tells; nothing here decides anything."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from server.engine.candidate import Candidate
from server.engine.request import Usage
from server.errors import Draining, RateLimited, TryLater
from server.metrics import Metrics
from server.worker.messages import Stats

RATE_WINDOW = 10.0  # seconds


@dataclass(slots=True)
class _Times:
    arrival: float
    last_token: float | None = None


class Observer:
    """Times are this process's monotonic clock; a worker's own counters start again with each worker."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._times: dict[int, _Times] = {}
        self._last_stats: dict[int, Stats] = {}  # by worker
        self._recent: deque[tuple[float, int]] = deque()  # (when, tokens computed) of recent steps

    @property
    def tokens_per_second(self) -> float:
        """Computed lately, prompts included; 0 when nothing was."""
        if len(self._recent) < 2:
            return 0.0
        span = self._recent[-1][0] - self._recent[0][0]
        return sum(tokens for _, tokens in self._recent) / max(span, 1e-3)

    def rejected(self, refusal: TryLater) -> None:
        match refusal:
            case Draining():
                reason = "draining"
            case RateLimited():
                reason = "rate_limited"
            case _:
                reason = "overloaded"
        self._metrics.rejected.labels(reason).inc()

    def entered(self, key_name: str) -> None:
        if key_name:
            self._metrics.key_requests.labels(key_name).inc()

    def left(self, key_name: str, used: Usage) -> None:
        if key_name:
            self._metrics.key_tokens.labels(key_name, "prompt").inc(used.prompt_tokens)
            self._metrics.key_tokens.labels(key_name, "generation").inc(used.completion_tokens)

    def admitted(self, candidate: Candidate) -> None:
        self._times[candidate.id] = _Times(time.monotonic())
        self._metrics.requests.inc()

    def token(self, candidate: Candidate, now: float) -> None:
        times = self._times[candidate.id]
        if times.last_token is None:
            self._metrics.ttft.observe(now - times.arrival)
        else:
            self._metrics.itl.observe(now - times.last_token)
        times.last_token = now
        self._metrics.generation_tokens.inc()

    def finished(self, candidate: Candidate, now: float) -> None:
        assert candidate.finish is not None
        self._end(candidate, candidate.finish.value, now)

    def aborted(self, candidate: Candidate) -> None:
        self._end(candidate, "abort", time.monotonic())

    def failed(self, candidate: Candidate) -> None:
        self._end(candidate, "error", time.monotonic())

    def _end(self, candidate: Candidate, reason: str, now: float) -> None:
        times = self._times.pop(candidate.id)
        self._metrics.success.labels(reason).inc()
        self._metrics.e2e.observe(now - times.arrival)
        self._metrics.prompt_tokens.inc(len(candidate.prompt.token_ids))
        self._metrics.request_prompt_tokens.observe(len(candidate.prompt.token_ids))
        self._metrics.request_generation_tokens.observe(len(candidate.tokens))

    def stepped(self, worker: int, stats: Stats) -> None:
        metrics, last = self._metrics, self._last_stats.get(worker)
        self._last_stats[worker] = stats
        self._add_up()
        metrics.heartbeat.set_to_current_time()
        metrics.preemptions.inc(stats.preemptions - (last.preemptions if last else 0))
        metrics.drafted.inc(stats.drafted - (last.drafted if last else 0))
        metrics.accepted.inc(stats.accepted - (last.accepted if last else 0))
        metrics.prefix_queries.inc(stats.prefix_queries - (last.prefix_queries if last else 0))
        metrics.prefix_hits.inc(stats.prefix_hits - (last.prefix_hits if last else 0))
        if stats.step_tokens:
            metrics.step_seconds.observe(stats.step_seconds)
            metrics.batch_tokens.observe(stats.step_tokens)
            self._remember(stats.step_tokens)

    def _remember(self, tokens: int) -> None:
        now = time.monotonic()
        self._recent.append((now, tokens))
        while now - self._recent[0][0] > RATE_WINDOW:
            self._recent.popleft()

    def worker_lost(self, worker: int) -> None:
        """Its books died with it."""
        self._last_stats.pop(worker, None)
        self._metrics.worker_restarts.inc()
        self._add_up()

    def _add_up(self) -> None:
        """Gauges are of all workers together."""
        books = self._last_stats.values()
        self._metrics.running.set(sum(stats.running for stats in books))
        self._metrics.waiting.set(sum(stats.waiting for stats in books))
        num_blocks = sum(stats.num_blocks for stats in books)
        self._metrics.kv_usage.set(sum(stats.used_blocks for stats in books) / max(num_blocks, 1))
