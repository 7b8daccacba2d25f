"""Who may enter, decided before any work is done. Knows nothing of workers; counts what the engine shows it."""

from __future__ import annotations

from dataclasses import dataclass

from server.errors import Overloaded

RETRY_AFTER_MAX = 60.0


@dataclass(frozen=True, slots=True)
class Admission:
    max_queued_requests: int
    max_queued_tokens: int

    def check(self, prompt_tokens: int, queued: list[int], tokens_per_second: float) -> None:
        """queued: the prompt tokens of each request that waits for its first token. Raises Overloaded.

        An empty queue takes any request: what fits the model must be answerable on an idle server.
        """
        waiting = sum(queued)
        full = len(queued) >= self.max_queued_requests or waiting + prompt_tokens > self.max_queued_tokens
        if queued and full:
            raise Overloaded(
                "The engine is currently busy and cannot accept new requests. Please try again later.",
                retry_after=min(max(waiting / max(tokens_per_second, 1.0), 1.0), RETRY_AFTER_MAX),
            )
