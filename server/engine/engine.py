"""Every live request, and the worker that computes it. Knows nothing of HTTP, of processes, or of KV blocks.

All state is owned by the event loop's thread. What a worker says is matched to a candidate by id; what it says of a
candidate that has ended since is dropped.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from server.engine.admission import Admission
from server.engine.candidate import Candidate
from server.engine.generation import RunningGeneration
from server.engine.observer import Observer
from server.engine.output import ChoiceOutput, TokenTexts
from server.engine.request import GenerationRequest
from server.errors import Draining, EngineError, Overloaded, TryLater
from server.worker.channel import EngineChannel
from server.worker.messages import Abort, Ready, Step


class Engine:
    def __init__(self, tokenizer: Tokenizer, admission: Admission, observer: Observer) -> None:
        self._tokenizer = tokenizer
        self._texts = TokenTexts(tokenizer)
        self._admission = admission
        self._observer = observer
        self._ids = itertools.count(1)
        self._generations: set[RunningGeneration] = set()
        self._running: dict[int, tuple[Candidate, RunningGeneration]] = {}  # by candidate id, until its last token
        self._channel: EngineChannel | None = None
        self.worker: Ready | None = None  # what the latest worker said of itself
        self._draining = False
        self._dead = False

    # === What the api asks ===

    @property
    def ready(self) -> bool:
        return self._channel is not None and not self._draining

    @property
    def healthy(self) -> bool:
        return not self._dead

    @property
    def load(self) -> int:
        """Requests in flight."""
        return len(self._generations)

    def submit(self, request: GenerationRequest) -> RunningGeneration:
        """Raises Overloaded or Draining. A request admitted while a worker is being replaced waits for the new one."""
        try:
            self._admit(request)
        except TryLater as refusal:
            self._observer.rejected(refusal)
            raise
        generation = RunningGeneration(request, self._candidates(request), self._close)
        self._generations.add(generation)
        for candidate in generation.candidates:
            self._running[candidate.id] = (candidate, generation)
            self._observer.admitted(candidate)
            if self._channel is not None:
                self._channel.send(candidate.add_message(request.priority, request.salt))
        return generation

    def _admit(self, request: GenerationRequest) -> None:
        if self._draining:
            raise Draining("The server is shutting down and takes no new requests.")
        if self.worker is None or self._dead:
            raise Overloaded("The model is still loading. Please try again shortly.")
        queued = [_prompt_tokens(each.request) for each in self._generations if not each.started]
        self._admission.check(_prompt_tokens(request), queued, self._observer.tokens_per_second)

    def _candidates(self, request: GenerationRequest) -> list[Candidate]:
        candidates = []
        for place, prompt in enumerate(request.prompts):
            for k in range(request.best_of):
                output = ChoiceOutput(request, prompt, place * request.n + k, self._tokenizer, self._texts)
                params = _params_of(request, k)
                candidates.append(Candidate(next(self._ids), prompt, params, output, echo=request.echo))
        return candidates

    def _close(self, generation: RunningGeneration) -> None:
        """The one place where a request leaves. What still runs of it is aborted."""
        self._generations.discard(generation)
        left = [candidate for candidate in generation.live if self._running.pop(candidate.id, None)]
        for candidate in left:
            self._observer.aborted(candidate)
        if left and self._channel is not None:
            self._channel.send(Abort([candidate.id for candidate in left]))

    # === What the supervisor tells ===

    def worker_ready(self, ready: Ready, channel: EngineChannel) -> None:
        """A fresh worker knows nothing: it gets every live candidate, with the tokens it has by now."""
        self._channel = channel
        self.worker = ready
        for candidate, generation in self._running.values():
            channel.send(candidate.add_message(generation.request.priority, generation.request.salt))

    def worker_step(self, step: Step) -> None:
        now = time.monotonic()
        stopped = []
        for said in step.outputs:
            candidate, generation = self._running.get(said.id, (None, None))
            if candidate is None or generation is None:
                continue
            generation.take(candidate, said)
            if said.token is not None:
                self._observer.token(candidate, now)
            if candidate.finish is not None:
                del self._running[candidate.id]
                self._observer.finished(candidate, now)
                if said.finish is None:  # a stop string ended it, of which the worker knows nothing
                    stopped.append(candidate.id)
        if stopped and self._channel is not None:
            self._channel.send(Abort(stopped))
        self._observer.stepped(step.stats)

    def worker_lost(self) -> None:
        self._channel = None
        self._observer.worker_lost()

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
        for candidate, _ in self._running.values():
            self._observer.failed(candidate)
        self._running.clear()
        for generation in self._generations:
            if generation.live:
                generation.fail(error)

    def check(self) -> None:
        """The books: every running candidate belongs to a request that is open, and an idle engine holds nothing."""
        assert all(generation in self._generations for _, generation in self._running.values())
        assert not self.idle or not self._running


def _prompt_tokens(request: GenerationRequest) -> int:
    return sum(len(prompt.token_ids) for prompt in request.prompts)


def _params_of(request: GenerationRequest, k: int) -> SamplingParams:
    """Of candidate k: its own random numbers, and the scores that best_of ranks by."""
    params = replace(request.params, choice=k)
    if request.best_of > request.n and params.logprobs is None:
        params = replace(params, logprobs=0)
    return params
