"""Beam search: the most likely continuations that a search of some width finds, instead of samples.

The search itself is transformers' (Wu et al. 2016 for the length penalty). It runs here, in the api process: each step
asks the worker for one token of every beam, as an ordinary sequence of which the prefix cache holds nearly all, so the
worker knows nothing of beams, and one that dies costs a step. Metrics see each of those as a request of one token.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from model.sampling_params import SamplingParams
from model.step import TokenLogprobs
from server.engine.candidate import Candidate
from server.engine.generation import RunningGeneration
from server.engine.output import ChoiceOutput
from server.engine.request import BeamParams, ChoiceDelta, EarlyStopping, GenerationRequest, Prompt, Usage
from server.worker.messages import FinishReason, SequenceOutput

# What a beam would cost with one more token (minus its log-probability), then the beam's place and the token's rank
# among those that may follow it, by which equals are ordered; and the token, and its own log-probability.
Continuation = tuple[float, int, int, int, float]


@dataclass(frozen=True, slots=True)
class Beam:
    tokens: tuple[int, ...] = ()
    rows: tuple[TokenLogprobs, ...] = ()  # one for each token
    logprob: float = 0.0  # of all tokens together

    def extended(self, token: int, logprob: float, top: list[tuple[int, float]]) -> Beam:
        row = TokenLogprobs(logprob, top)
        return Beam((*self.tokens, token), (*self.rows, row), self.logprob + logprob)


@dataclass(slots=True, kw_only=True)
class BeamSearch:
    """One prompt's search. Pure: it is told what may follow each running beam, and says what runs next."""

    width: int
    max_tokens: int
    min_tokens: int
    ends: frozenset[int]  # tokens that finish a beam
    params: BeamParams
    shown: int = 0  # of the most likely tokens at each place, so many are kept, to be told
    running: list[Beam] = field(default_factory=lambda: [Beam()])  # best first
    finished: list[tuple[float, Beam]] = field(default_factory=list)  # by score, best first; at most `width`
    done: bool = False

    @property
    def top(self) -> int:
        """How many of each beam's next tokens are enough: the best `width`, even if all ends are among them."""
        return self.width + len(self.ends)

    def advance(self, scores: list[TokenLogprobs]) -> None:
        """scores: for each running beam, its `top` most likely next tokens, in falling order.

        Of these width x (width + ends) continuations only those are made that go on or finish.
        """
        length = len(self.running[0].tokens) + 1
        shown = [row.top[: self.shown] for row in scores]
        running: list[Beam] = []
        for rank, (_, place, _, token, logprob) in enumerate(self._best_first(scores)):
            if rank >= self.width and len(running) == self.width:
                break
            ends = token in self.ends
            finishes = rank < self.width and (ends or length == self.max_tokens)  # further down is not good enough
            goes_on = not ends and len(running) < self.width
            if finishes or goes_on:
                beam = self.running[place].extended(token, logprob, shown[place])
                if finishes:
                    self.finished.append((beam.logprob / length**self.params.length_penalty, beam))
                if goes_on:
                    running.append(beam)
        self.finished.sort(key=lambda scored: -scored[0])
        del self.finished[self.width :]
        self.running = running
        self.done = length == self.max_tokens or not self.running or self._cannot_improve(length)

    def _best_first(self, scores: list[TokenLogprobs]) -> Iterator[Continuation]:
        return heapq.merge(*(self._continuations(place, row) for place, row in enumerate(scores)))

    def _continuations(self, place: int, row: TokenLogprobs) -> Iterator[Continuation]:
        """Of one beam, best first."""
        beam = self.running[place]
        may_end = len(beam.tokens) >= self.min_tokens
        for rank, (token, logprob) in enumerate(row.top):
            if may_end or token not in self.ends:
                yield -(beam.logprob + logprob), place, rank, token, logprob

    def _cannot_improve(self, length: int) -> bool:
        if len(self.finished) < self.width:
            return False
        early = self.params.early_stopping
        if early is EarlyStopping.YES:
            return True
        penalty = self.params.length_penalty
        reach = self.max_tokens if early is EarlyStopping.NEVER and penalty > 0 else length
        return bool(self.running[0].logprob / reach**penalty <= self.finished[-1][0])


class BeamGeneration(RunningGeneration):
    """A request by beam search. Its candidates are those of the step under way, and its choices come at the end."""

    def __init__(
        self,
        request: GenerationRequest,
        start: Callable[[Prompt, SamplingParams], Candidate],
        output: Callable[[Prompt, int], ChoiceOutput],
        ends: frozenset[int],
        close: Callable[[RunningGeneration], None],
    ) -> None:
        """start: makes the candidate that computes one token. output: makes the text of a choice."""
        super().__init__(request, [], close)
        assert request.beam is not None
        self._start = start
        self._output = output
        self._searches = [
            BeamSearch(
                width=request.best_of,
                max_tokens=request.params.max_tokens,
                min_tokens=request.params.min_tokens,
                ends=ends,
                params=request.beam,
                shown=request.params.logprobs or 0,
            )
            for _ in request.prompts
        ]
        self._steps: list[dict[int, TokenLogprobs | None]] = [{} for _ in request.prompts]  # by candidate, in order
        self._cached_tokens = 0
        for place in range(len(request.prompts)):
            self._step(place)

    @property
    def started(self) -> bool:
        return any(search.finished or search.running[0].tokens for search in self._searches)

    @property
    def usage(self) -> Usage:
        """Of tokens, those of the beams that were kept to the end."""
        beams = [beam for search in self._searches if search.done for _, beam in search.finished]
        return Usage(
            prompt_tokens=self.request.prompt_tokens,
            completion_tokens=sum(len(beam.tokens) for beam in beams),
            cached_tokens=self._cached_tokens,
        )

    def take(self, candidate: Candidate, said: SequenceOutput) -> None:
        for _ in candidate.take(said):
            pass
        place = next(place for place, step in enumerate(self._steps) if candidate.id in step)
        step, search = self._steps[place], self._searches[place]
        if not search.running[0].tokens:
            self._cached_tokens += said.cached_tokens or 0
        if candidate.finish is None:
            return
        step[candidate.id] = said.logprobs
        scores = [scores for scores in step.values() if scores is not None]
        if len(scores) < len(step):
            return
        self.candidates = [each for each in self.candidates if each.id not in step]
        search.advance(scores)
        if search.done:
            self._tell(place)
        else:
            self._step(place)

    def _step(self, place: int) -> None:
        """Have one more token computed of every beam of a prompt."""
        prompt, search = self.request.prompts[place], self._searches[place]
        count = max(search.top, self.request.params.logprobs or 0)
        params = SamplingParams(seed=0, max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=count)
        beams = [Prompt([*prompt.token_ids, *beam.tokens], "") for beam in search.running]
        started = [self._start(beam, params) for beam in beams]
        self._steps[place] = {candidate.id: None for candidate in started}
        self.candidates += started
        self.due += started

    def _tell(self, place: int) -> None:
        """The n best beams of a prompt become its choices, which are written when they are read."""
        search = self._searches[place]
        for k, (_, beam) in enumerate(search.finished[: self.request.n]):
            output = self._output(self.request.prompts[place], place * self.request.n + k)
            if self.request.echo:
                self._deltas.put_nowait(output.echo(None))
            self._deltas.put_nowait(partial(_written, output, beam, ended=beam.tokens[-1] in search.ends))


def _written(output: ChoiceOutput, beam: Beam, *, ended: bool) -> ChoiceDelta:
    reason = FinishReason.STOP if ended else FinishReason.LENGTH
    return output.push(list(beam.tokens), list(beam.rows), reason, beam.tokens[-1] if ended else None)
