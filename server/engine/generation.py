"""A running request: its candidates, the deltas that wait to be read, and its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from server.engine.candidate import Candidate
from server.engine.request import ChoiceDelta, GenerationRequest, Usage
from server.errors import ServerError
from server.worker.messages import SequenceOutput


class RunningGeneration:
    """Iterate it to the end, or close it."""

    def __init__(
        self,
        request: GenerationRequest,
        candidates: list[Candidate],
        close: Callable[[RunningGeneration], None],
    ) -> None:
        """candidates: best_of for each prompt, in order. close: told once, when the reader is done with it."""
        self.request = request
        self.candidates = candidates
        self.due = list(candidates)  # those the engine has yet to be told of; whoever takes them clears them
        self.expiry: asyncio.TimerHandle | None = None  # of the deadline, if it has one
        self._close: Callable[[RunningGeneration], None] | None = close
        # A delta of much text is written when it is read, each in a turn of the event loop of its own.
        self._deltas: asyncio.Queue[ChoiceDelta | Callable[[], ChoiceDelta] | ServerError] = asyncio.Queue()
        self._kept: dict[int, list[ChoiceDelta]] = {}  # of candidates that may yet lose
        self._unfinished = len(request.prompts) * request.n  # choices whose last delta was not read

    @property
    def started(self) -> bool:
        return any(candidate.tokens or candidate.finish for candidate in self.candidates)

    @property
    def live(self) -> list[Candidate]:
        return [candidate for candidate in self.candidates if candidate.finish is None]

    @property
    def usage(self) -> Usage:
        firsts = self.candidates[:: self.request.best_of]
        return Usage(
            prompt_tokens=self.request.prompt_tokens,
            completion_tokens=sum(len(candidate.tokens) for candidate in self.candidates),
            cached_tokens=sum(candidate.cached_tokens for candidate in firsts),
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max((len(candidate.tokens) for candidate in self.candidates), default=0)

    def take(self, candidate: Candidate, said: SequenceOutput) -> None:
        for delta in candidate.take(said):
            if self.request.best_of == self.request.n:
                self._deltas.put_nowait(delta)
            else:
                self._kept.setdefault(candidate.id, []).append(delta)
        if candidate.finish is not None and self._kept:
            self._settle(self.candidates.index(candidate) // self.request.best_of)

    def _settle(self, prompt: int) -> None:
        """Once all candidates of a prompt have ended, the n most likely ones become its choices."""
        n, best_of = self.request.n, self.request.best_of
        rivals = self.candidates[prompt * best_of : (prompt + 1) * best_of]
        if any(rival.finish is None for rival in rivals):
            return
        rivals.sort(key=lambda rival: -rival.mean_logprob)  # stable: among equals the earlier sample wins
        for rank, winner in enumerate(rivals[:n]):
            for delta in self._kept[winner.id]:
                self._deltas.put_nowait(replace(delta, index=prompt * n + rank))

    def fail(self, error: ServerError) -> None:
        self._deltas.put_nowait(error)

    def __aiter__(self) -> RunningGeneration:
        return self

    async def __anext__(self) -> ChoiceDelta:
        """Raises the ServerError the request failed with."""
        if not self._unfinished:
            raise StopAsyncIteration
        delta = await self._deltas.get()
        if isinstance(delta, ServerError):
            raise delta
        if not isinstance(delta, ChoiceDelta):
            await asyncio.sleep(0)
            delta = delta()
        self._unfinished -= delta.finish_reason is not None
        return delta

    async def aclose(self) -> None:
        close, self._close = self._close, None
        if close is not None:
            close(self)
