"""What happens to requests and workers, as metrics. The engine tells; nothing here decides anything.

These hold at any moment: requests admitted = requests ended + in flight; first tokens = requests that have a token;
tokens generated = first tokens + tokens after them.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from server.engine.candidate import Candidate
from server.engine.request import GenerationRequest, Usage
from server.errors import Asleep, Draining, Loading, RateLimited, TryLater
from server.metrics import (
    BlockState,
    CacheSource,
    Finished,
    Metrics,
    Part,
    Phase,
    Rejection,
    SleepState,
    Source,
    TokenKind,
    WaitingFor,
)
from server.worker.messages import FinishReason, Ready, Stats, Work

SLEEP = {1: SleepState.WEIGHTS_OFFLOADED, 2: SleepState.DISCARD_ALL}
FIRST = "0"  # the worker that is named for what no worker computed
RATE_WINDOW = 10.0  # seconds
NO_KEY = "default"  # whose a call is on a server without keys
FINISHED = {FinishReason.STOP: Finished.STOP, FinishReason.LENGTH: Finished.LENGTH}


@dataclass(slots=True)
class _Life:
    """When what happened to a request; None where it has not."""

    arrival: float
    engine: str = FIRST  # the number of the worker that computed it last
    started: float | None = None  # its first step began
    first_token: float | None = None
    last_token: float = 0.0

    @property
    def phase(self) -> Phase:
        if self.started is None:
            return Phase.WAITING
        return Phase.PREFILL if self.first_token is None else Phase.DECODE


class Observer:
    """Times are this process's monotonic clock; a worker's own counters start again with each worker."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._lives: dict[int, _Life] = {}  # by candidate
        self._last_stats: dict[int, Stats] = {}  # by worker
        self._recent: deque[tuple[float, int]] = deque()  # (when, tokens computed) of recent steps
        metrics.in_flight.set_function(lambda: len(self._lives))

    @property
    def tokens_per_second(self) -> float:
        """Computed lately, prompts included; 0 when nothing was."""
        if len(self._recent) < 2:
            return 0.0
        span = self._recent[-1][0] - self._recent[0][0]
        return sum(tokens for _, tokens in self._recent) / max(span, 1e-3)

    # === Requests ===

    def rejected(self, refusal: TryLater) -> None:
        match refusal:
            case Draining():
                reason = Rejection.DRAINING
            case Asleep():
                reason = Rejection.ASLEEP
            case Loading():
                reason = Rejection.LOADING
            case RateLimited():
                reason = Rejection.RATE_LIMITED
            case _:
                reason = Rejection.OVERLOADED
        self._metrics.rejected(reason.value).inc()

    def entered(self, request: GenerationRequest) -> None:
        self._metrics.key_requests(request.key_name or NO_KEY).inc()

    def left(self, request: GenerationRequest, used: Usage, longest: int, worker: int | None) -> None:
        """longest: of its samples, in tokens. worker: of its first sample."""
        engine = FIRST if worker is None else str(worker)
        key = request.key_name or NO_KEY
        self._metrics.key_tokens(key, TokenKind.PROMPT.value).inc(used.prompt_tokens)
        self._metrics.key_tokens(key, TokenKind.GENERATION.value).inc(used.completion_tokens)
        self._metrics.params_n(engine).observe(request.n)
        self._metrics.max_generation_tokens(engine).observe(longest)

    def admitted(self, candidate: Candidate) -> None:
        self._lives[candidate.id] = _Life(time.monotonic())
        self._metrics.requests.inc()

    def started(self, candidate_id: int, worker: int, at: float) -> None:
        """It is in a step of the worker that began at that time. Told again when it resumes."""
        life = self._lives.get(candidate_id)
        if life is not None:
            life.engine = str(worker)
            life.started = max(at, life.arrival) if life.started is None else life.started

    def token(self, candidate: Candidate, now: float) -> None:
        metrics, life = self._metrics, self._lives[candidate.id]
        if life.first_token is None:
            life.first_token = now
            metrics.ttft(life.engine).observe(now - life.arrival)
            self._prompt_done(candidate)
        else:
            metrics.itl(life.engine).observe(now - life.last_token)
        life.last_token = now
        metrics.generation_tokens(life.engine).inc()

    def finished(self, candidate: Candidate, now: float) -> None:
        assert candidate.finish is not None
        if self._lives[candidate.id].first_token is None:  # a prompt was scored, and no token wanted
            self._prompt_done(candidate)
        self._end(candidate, FINISHED[candidate.finish], now)

    def aborted(self, candidate: Candidate) -> None:
        self._metrics.aborts(self._lives[candidate.id].phase.value).inc()
        self._end(candidate, Finished.ABORT, time.monotonic())

    def failed(self, candidate: Candidate) -> None:
        self._end(candidate, Finished.ERROR, time.monotonic())

    def _prompt_done(self, candidate: Candidate) -> None:
        metrics, engine = self._metrics, self._lives[candidate.id].engine
        cached = candidate.cached_tokens
        computed = len(candidate.prompt.token_ids) - cached
        metrics.prompt_tokens(engine).inc(computed + cached)
        metrics.prompt_tokens_by_source(engine, Source.LOCAL_COMPUTE.value).inc(computed)
        metrics.prompt_tokens_by_source(engine, Source.LOCAL_CACHE_HIT.value).inc(cached)
        metrics.prompt_tokens_cached(engine).inc(cached)
        metrics.prompt_tokens_cached_by_source(engine, CacheSource.DEVICE.value).inc(cached)
        metrics.request_prefill_computed(engine).observe(computed)

    def _end(self, candidate: Candidate, reason: Finished, now: float) -> None:
        metrics, life = self._metrics, self._lives.pop(candidate.id)
        engine = life.engine
        metrics.success(engine, reason.value).inc()
        metrics.e2e(engine).observe(now - life.arrival)
        metrics.request_prompt_tokens(engine).observe(len(candidate.prompt.token_ids))
        metrics.request_generation_tokens(engine).observe(len(candidate.tokens))
        metrics.params_max_tokens(engine).observe(candidate.params.max_tokens)
        if life.started is not None:
            metrics.queue_time(engine).observe(life.started - life.arrival)
        if life.started is not None and life.first_token is not None:
            decoding = life.last_token - life.first_token
            metrics.prefill_time(engine).observe(life.first_token - life.started)
            metrics.decode_time(engine).observe(decoding)
            metrics.inference_time(engine).observe(life.last_token - life.started)
            if len(candidate.tokens) > 1:
                metrics.tpot(engine).observe(decoding / (len(candidate.tokens) - 1))

    # === Workers ===

    def worker_ready(self, worker: int, ready: Ready) -> None:
        engine = str(worker)
        self._metrics.up(engine).set(1)
        self.slept(worker, None)
        self._metrics.cache_config(engine, str(ready.block_size), str(ready.num_blocks)).set(1)
        self._metrics.kv_blocks(engine, BlockState.FREE.value).set(ready.num_blocks)

    def slept(self, worker: int, level: int | None) -> None:
        """level: None where it is awake."""
        now = SleepState.AWAKE if level is None else SLEEP[level]
        for state in SleepState:
            self._metrics.sleep_state(str(worker), state.value).set(state is now)

    def stepped(self, worker: int, stats: Stats, work: Work | None) -> None:
        engine = str(worker)
        self._count(engine, stats, self._last_stats.get(worker))
        self._last_stats[worker] = stats
        self._show_books(engine, stats)
        self._metrics.heartbeat(engine).set_to_current_time()
        if work is not None:
            self._metrics.step_seconds(engine).observe(work.seconds)
            self._metrics.batch_size(engine).observe(work.sequences)
            self._metrics.batch_tokens(engine).observe(work.tokens)
            for part, seconds in ((Part.SCHEDULE, work.schedule), (Part.RUN, work.run), (Part.UPDATE, work.update)):
                self._metrics.step_parts(engine, part.value).inc(seconds)
            self._remember(work.tokens)

    def worker_lost(self, worker: int) -> None:
        """Its books died with it."""
        engine = str(worker)
        self._last_stats.pop(worker, None)
        self._metrics.up(engine).set(0)
        for state in SleepState:
            self._metrics.sleep_state(engine, state.value).set(0)
        self._metrics.restarts(engine).inc()
        self._show_books(engine, NO_BOOKS)

    def _count(self, engine: str, stats: Stats, last: Stats | None) -> None:
        """What has been added to the worker's counters since it was last heard of."""
        metrics, last = self._metrics, last or NO_BOOKS
        metrics.preemptions(engine).inc(stats.preemptions - last.preemptions)
        metrics.prefix_queries(engine).inc(stats.prefix_queries - last.prefix_queries)
        metrics.prefix_hits(engine).inc(stats.prefix_hits - last.prefix_hits)
        metrics.drafts(engine).inc(stats.drafts - last.drafts)
        metrics.drafted(engine).inc(stats.drafted - last.drafted)
        metrics.accepted(engine).inc(sum(stats.accepted_at) - sum(last.accepted_at))
        for place, accepted in enumerate(stats.accepted_at):
            before = last.accepted_at[place] if place < len(last.accepted_at) else 0
            metrics.accepted_at(engine, str(place)).inc(accepted - before)

    def _show_books(self, engine: str, stats: Stats) -> None:
        metrics = self._metrics
        metrics.running(engine).set(stats.running)
        metrics.waiting(engine).set(stats.waiting)
        metrics.waiting_for(engine, WaitingFor.CAPACITY.value).set(stats.waiting)
        metrics.kv_usage(engine).set(stats.used_blocks / max(stats.num_blocks, 1))
        metrics.kv_blocks(engine, BlockState.USED.value).set(stats.used_blocks)
        metrics.kv_blocks(engine, BlockState.CACHED.value).set(stats.cached_blocks)
        free = stats.num_blocks - stats.used_blocks - stats.cached_blocks
        metrics.kv_blocks(engine, BlockState.FREE.value).set(free)

    def _remember(self, tokens: int) -> None:
        now = time.monotonic()
        self._recent.append((now, tokens))
        while now - self._recent[0][0] > RATE_WINDOW:
            self._recent.popleft()


NO_BOOKS = Stats(
    running=0, waiting=0, used_blocks=0, cached_blocks=0, num_blocks=0, preemptions=0, prefix_queries=0, prefix_hits=0,
    drafts=0, drafted=0, accepted_at=[],
)  # fmt: skip
