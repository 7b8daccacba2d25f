"""Every live request, and the worker that computes it. Knows nothing of HTTP, of processes, or of KV blocks.

All state is owned by the event loop's thread. What a worker says is matched to a candidate by id; what it says of a
candidate that has ended since is dropped.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Iterator
from pathlib import Path

from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from server.engine.admission import Admission
from server.engine.beam import BeamGeneration
from server.engine.candidate import Candidate, submission
from server.engine.generation import RunningGeneration
from server.engine.observer import Observer
from server.engine.output import ChoiceOutput, TokenTexts
from server.engine.quarantine import Quarantine
from server.engine.quota import TokenBuckets
from server.engine.request import GenerationRequest, Prompt
from server.engine.router import Router
from server.engine.variants import Variant, Variants
from server.errors import (
    Asleep,
    DeadlineExceeded,
    Draining,
    EngineError,
    GrammarDeadEnd,
    Loading,
    Overloaded,
    RateLimited,
    ServerError,
    TryLater,
    WorkerKilled,
)
from server.worker.channel import EngineChannel
from server.worker.messages import (
    Abort,
    FinishReason,
    Loaded,
    Ready,
    Received,
    Refused,
    Sleep,
    Slept,
    Step,
    Unload,
    WakeUp,
)

log = logging.getLogger(__name__)

POLL = 0.01  # seconds between looks at whether workers sleep or are awake


class Engine:
    def __init__(
        self,
        tokenizer: Tokenizer,
        admission: Admission,
        observer: Observer,
        workers: int = 1,
        buckets: TokenBuckets | None = None,
        *,
        request_timeout: float,
        stall_timeout: float,
        variants: Variants,
    ) -> None:
        """Timeouts in seconds: for a whole request; and without a step of any worker while there is work."""
        self._tokenizer = tokenizer
        self._texts = TokenTexts(tokenizer)
        self._admission = admission
        self._observer = observer
        self._buckets = buckets  # None lets every key ask for as much as it likes
        self._ids = itertools.count(1)
        self._generations: set[RunningGeneration] = set()
        self._running: dict[int, tuple[Candidate, RunningGeneration]] = {}  # by candidate id, until its last token
        self._channels: dict[int, EngineChannel] = {}  # of the workers that run, by number
        self._received: dict[int, int] = {}  # by worker: how many messages it had got when it last began on sequences
        self._router = Router(workers)
        self._quarantine = Quarantine()
        self.variants = variants
        self._request_timeout = request_timeout
        self._stall_timeout = stall_timeout
        self._last_step = 0.0  # when, or when work came after there was none
        self.worker: Ready | None = None  # what the latest worker said of itself
        self._sleep_level: int | None = None
        self._resting: set[int] = set()  # workers that sleep
        self._draining = False
        self._dead = False

    # === What the api asks ===

    @property
    def ready(self) -> bool:
        return bool(self._channels) and self.variants.complete and not self._draining and not self.asleep

    @property
    def healthy(self) -> bool:
        """What was asked for is being worked at: not a flag, for a flag says yes while everything hangs."""
        stalled = bool(self._running) and time.monotonic() - self._last_step > self._stall_timeout
        return not self._dead and not stalled

    @property
    def load(self) -> int:
        """Requests in flight."""
        return len(self._generations)

    @property
    def crowded(self) -> bool:
        """Somebody waits for a first token."""
        return any(True for _ in self._queue())

    def submit(self, request: GenerationRequest) -> RunningGeneration:
        """Raises Overloaded, Draining or RateLimited.

        A request admitted while a worker is being replaced waits for the new one.
        """
        try:
            self._admit(request)
        except TryLater as refusal:
            self._observer.rejected(refusal)
            raise
        self._charge(request, request.most_tokens)
        self._observer.entered(request)
        generation = self._generation(request)
        self._generations.add(generation)
        if not request.background:
            loop = asyncio.get_running_loop()
            generation.expiry = loop.call_later(self._request_timeout, self._expire, generation)
        self._start_due(generation)
        return generation

    def check_quota(self, key_name: str) -> None:
        """Before a prompt is read. Raises RateLimited."""
        try:
            self._refuse_spent(key_name)
        except RateLimited as refusal:
            self._observer.rejected(refusal)
            raise

    def charge(self, key_name: str, tokens: int) -> None:
        """Negative tokens come back."""
        if self._buckets is not None:
            self._buckets.take(key_name, tokens, time.monotonic())

    def _start_due(self, generation: RunningGeneration) -> None:
        if not self._running:
            self._last_step = time.monotonic()
        due, generation.due = generation.due, []
        for candidate in due:
            self._running[candidate.id] = (candidate, generation)
            self._observer.admitted(candidate)
        self._send([candidate.id for candidate in due])

    def _send(self, ids: list[int]) -> None:
        """Each to the worker that suits it best. With none about, or a killer at large, it has to wait."""
        together: dict[tuple[int, int, int], list[Candidate]] = {}  # by worker, request and parameters
        requests: dict[int, GenerationRequest] = {}
        for id_ in self._quarantine.admit(ids) if self._channels else ():
            candidate, generation = self._running[id_]
            request = generation.request
            worker = candidate.worker = self._router.choose(candidate.prompt.token_ids, request.cache_salt)
            assert worker is not None
            requests[id(request)] = request
            together.setdefault((worker, id(request), id(candidate.params)), []).append(candidate)
        for (worker, request_id, _), candidates in together.items():
            channel = self._channels[worker]
            channel.send(submission(requests[request_id], candidates))
            for candidate in candidates:
                candidate.place = channel.sent

    def _send_waiting(self) -> None:
        self._send([id_ for id_, (candidate, _) in self._running.items() if candidate.worker is None])

    def _admit(self, request: GenerationRequest) -> None:
        if self._draining:
            raise Draining("The server is shutting down and takes no new requests.")
        if self.asleep:
            raise Asleep
        if self.worker is None or self._dead:
            raise Loading
        if request.background:  # of which there are few at a time: they take nobody's place
            return
        self._refuse_spent(request.key_name)
        queued = [(each.request.key_name, each.request.prompt_tokens) for each in self._queue()]
        rate = self._observer.tokens_per_second
        self._admission.check(request.key_name, request.prompt_tokens, queued, rate)

    def _queue(self) -> Iterator[RunningGeneration]:
        return (each for each in self._generations if not each.started and not each.request.background)

    def _refuse_spent(self, key_name: str) -> None:
        wait = 0.0 if self._buckets is None else self._buckets.wait(key_name, time.monotonic())
        if wait > 0:
            raise RateLimited("This key has used up its tokens per minute. Please try again later.", retry_after=wait)

    def _charge(self, request: GenerationRequest, tokens: int) -> None:
        if not request.background:
            self.charge(request.key_name, tokens)

    def _generation(self, request: GenerationRequest) -> RunningGeneration:
        if request.beam is None:
            return RunningGeneration(request, self._candidates(request), self._close)

        def output(prompt: Prompt, index: int) -> ChoiceOutput:
            return ChoiceOutput(request, prompt, index, self._tokenizer, self._texts)

        def start(prompt: Prompt, params: SamplingParams) -> Candidate:
            candidate = Candidate(next(self._ids), prompt, params, output(prompt, 0), echo=False)
            candidate.continued = True
            return candidate

        ends = () if request.params.ignore_eos else self._tokenizer.eos_token_ids
        return BeamGeneration(request, start, output, frozenset((*request.params.stop_token_ids, *ends)), self._close)

    def _candidates(self, request: GenerationRequest) -> list[Candidate]:
        candidates, params = [], request.candidate_params
        for place, prompt in enumerate(request.prompts):
            for k in range(request.best_of):
                output = ChoiceOutput(request, prompt, place * request.n + k, self._tokenizer, self._texts)
                candidate = Candidate(next(self._ids), prompt, params, output, echo=request.echo)
                candidate.choice = k
                candidate.seed = request.seeds[place] if request.seeds else None
                candidates.append(candidate)
        return candidates

    def _close(self, generation: RunningGeneration) -> None:
        """The one place where a request leaves. What still runs of it is aborted."""
        self._generations.discard(generation)
        if generation.expiry is not None:
            generation.expiry.cancel()
        request, used = generation.request, generation.usage
        self._charge(request, used.prompt_tokens + used.completion_tokens - request.most_tokens)
        worker = next((each.worker for each in generation.candidates), None)
        self._observer.left(request, used, generation.longest, worker)
        for candidate in self._drop(generation):
            self._observer.aborted(candidate)

    def _fail(self, generation: RunningGeneration, error: ServerError) -> None:
        """What runs of it is dropped now; its reader will be told when it gets there."""
        for candidate in self._drop(generation):
            self._observer.failed(candidate)
        generation.fail(error)

    def _expire(self, generation: RunningGeneration) -> None:
        if generation.live:
            self._fail(generation, DeadlineExceeded("The request was not finished in the time a request may take."))

    def _drop(self, generation: RunningGeneration) -> list[Candidate]:
        """Returns what still ran of it."""
        left = [candidate for candidate in generation.live if self._running.pop(candidate.id, None)]
        self._abort(left)
        cleared = [self._quarantine.cleared(candidate.id) for candidate in left]
        if any(cleared):
            self._send_waiting()
        return left

    def _abort(self, candidates: list[Candidate]) -> None:
        """Tell their workers to drop them."""
        by_worker: dict[int, list[int]] = {}
        for candidate in candidates:
            if candidate.worker is not None:
                by_worker.setdefault(candidate.worker, []).append(candidate.id)
                self._router.ended(candidate.worker)
        for worker, ids in by_worker.items():
            self._channels[worker].send(Abort(ids))

    # === What the supervisor tells ===

    def worker_ready(self, worker: int, ready: Ready, channel: EngineChannel) -> None:
        """A fresh worker knows nothing: what nobody computes is sent again, with the tokens it has by now."""
        self._channels[worker] = channel
        self._received[worker] = 0
        self._observer.worker_ready(worker, ready)
        self._router.joined(worker, ready.num_blocks, ready.block_size)
        self.worker = ready
        for variant in self.variants:
            channel.send(variant.load)
        if self._sleep_level is not None and self.idle:
            channel.send(Sleep(self._sleep_level))
        self._send_waiting()

    def worker_received(self, worker: int, received: Received) -> None:
        self._received[worker] = received.messages

    def worker_step(self, worker: int, step: Step) -> None:
        now = self._last_step = time.monotonic()
        stopped: list[Candidate] = []
        if step.work is not None:
            for id_ in step.work.admitted:
                self._observer.started(id_, worker, now - step.work.seconds)
        cleared = False
        for said in step.outputs:
            candidate, generation = self._running.get(said.id, (None, None))
            if candidate is None or generation is None:
                continue
            if said.finish is FinishReason.DEAD_END:
                self._fail(generation, GrammarDeadEnd())
                continue
            generation.take(candidate, said)
            if said.token is not None:
                self._observer.token(candidate, now)
            if said.token is not None or said.finish is not None:
                cleared |= self._quarantine.cleared(said.id)
            if candidate.finish is not None:
                del self._running[candidate.id]
                self._observer.finished(candidate, now)
                self._start_due(generation)  # the next step of a beam search
                if said.finish is None:  # a stop string ended it, of which the worker knows nothing
                    stopped.append(candidate)
                else:
                    self._router.ended(worker)
        self._abort(stopped)
        if cleared:
            self._send_waiting()
        self._observer.stepped(worker, step.stats, step.work)

    def worker_refused(self, worker: int, refused: Refused) -> None:
        """It has forgotten the sequence, and no other could run it either."""
        candidate, generation = self._running.get(refused.id, (None, None))
        if candidate is not None and generation is not None:
            self._router.ended(worker)
            candidate.worker = None
            reason = "can no longer read this model" if refused.unloadable else "has no room for this request"
            self._fail(generation, EngineError(f"The engine {reason}."))

    def worker_loaded(self, worker: int, loaded: Loaded) -> str | None:
        if loaded.error is not None:
            log.error("a model cannot be loaded", extra={"key": loaded.key, "reason": loaded.error})
        return self.variants.tell(worker, loaded)

    def worker_slept(self, worker: int, slept: Slept) -> None:
        if slept.asleep:
            self._resting.add(worker)
        else:
            self._resting.discard(worker)
        self._observer.slept(worker, self._sleep_level if slept.asleep else None)

    def worker_lost(self, worker: int, *, killed: bool) -> None:
        """What it computed goes to the others, if there are any, or waits for the one that takes its place.

        killed: from outside, and not by what it computed.
        """
        received = self._received.pop(worker, 0)
        self._channels.pop(worker, None)
        self._router.left(worker)
        self._resting.discard(worker)
        self._observer.worker_lost(worker)
        lost = {id_: pair for id_, pair in self._running.items() if pair[0].worker == worker}
        for candidate, _ in lost.values():
            candidate.worker = None
        began = [id_ for id_, (candidate, _) in lost.items() if candidate.place <= received]
        killer = self._quarantine.died(list(lost), began, killed=killed)
        if killer is not None:
            log.error("a request has killed worker after worker", extra={"id": lost[killer][1].request.id})
            self._fail(lost[killer][1], WorkerKilled("The engine crashed whenever it worked on this request."))
        self._send_waiting()

    # === Models beside the model ===

    async def add_variant(
        self, name: str, directory: Path, created: int | None = None, *, lazy: bool = False
    ) -> Variant:
        """Serve an adapter on the model, or a model like it, by this name. Returns once all workers have it, or where
        it is lazy once they know where it is.

        Raises Overloaded while workers sleep, and ModelError where the name is taken or the files cannot be served.
        """
        if self.asleep:
            raise Asleep
        variant = self.variants.add(name, directory, created, lazy=lazy)
        try:
            for channel in self._channels.values():
                channel.send(variant.load)
            await self.variants.loaded(variant, max(len(self._channels), 1))  # where none is up, the next one
        except BaseException:
            self.remove_variant(name)
            raise
        return variant

    def remove_variant(self, name: str) -> None:
        """No new request can ask for it; those that run finish."""
        variant = self.variants.remove(name)
        for channel in self._channels.values():
            channel.send(Unload(variant.key))

    # === Sleep ===

    @property
    def asleep(self) -> bool:
        """Or falling asleep, or waking up: no requests are taken."""
        return self._sleep_level is not None or bool(self._resting)

    async def sleep(self, level: int, *, abort: bool) -> None:
        """Returns when all workers have given back their KV pools (level 1) or the weights too (level 2).

        No requests are taken from the first moment; those that run finish first, or are ended with an error.
        """
        if self._sleep_level is None:
            self._sleep_level = level
            if abort:
                for generation in self._generations:
                    self._fail(generation, Overloaded("The server was put to sleep before this request was finished."))
            while not self.idle:
                await asyncio.sleep(POLL)
            if self._sleep_level is None:  # woken up before it slept
                return
            for worker, channel in self._channels.items():
                self._router.forgot(worker)
                channel.send(Sleep(level))
        while self._sleep_level is not None and self._resting != self._channels.keys():
            await asyncio.sleep(POLL)

    async def wake_up(self) -> None:
        """Returns when all workers have their weights and KV pools again."""
        if self._sleep_level is not None:
            self._sleep_level = None
            for channel in self._channels.values():
                channel.send(WakeUp())
        while self._resting:
            await asyncio.sleep(POLL)

    # === The end ===

    def drain(self) -> None:
        """No new requests from now on."""
        self._draining = True

    @property
    def idle(self) -> bool:
        return not self._generations

    def fail_all(self, error: EngineError | Draining) -> None:
        """Every open request is told; none can be admitted any more."""
        self._dead = isinstance(error, EngineError)
        self._draining = True
        for generation in self._generations:
            if generation.live:
                self._fail(generation, error)

    def check(self) -> None:
        """The books: every running candidate belongs to a request that is open, and an idle engine holds nothing."""
        assert all(generation in self._generations for _, generation in self._running.values())
        assert not self.idle or not self._running
