"""Who may enter, decided before any work is done. Knows nothing of workers; counts what the engine shows it."""

from __future__ import annotations

from dataclasses import dataclass

from server.errors import Overloaded

RETRY_AFTER_MAX = 60.0


@dataclass(frozen=True, slots=True)
class Admission:
    max_queued_requests: int
    max_queued_tokens: int

    def check(self, key: str, prompt_tokens: int, queued: list[tuple[str, int]], tokens_per_second: float) -> None:
        """queued: of each request that waits for its first token, its key and prompt tokens. Raises Overloaded.

        A queue that others have filled still takes what is this key's share of it, so that no key can shut out another.
        A key that has nothing in it may queue any request: what fits the model must be answerable.
        """
        waiting = sum(tokens for _, tokens in queued)
        own = [tokens for name, tokens in queued if name == key]
        keys = len({key, *(name for name, _ in queued)})
        full = len(queued) >= self.max_queued_requests or waiting + prompt_tokens > self.max_queued_tokens
        share = (
            len(own) < self.max_queued_requests // keys and sum(own) + prompt_tokens <= self.max_queued_tokens // keys
        )
        if own and full and not share:
            raise Overloaded(
                "The engine is currently busy and cannot accept new requests. Please try again later.",
                retry_after=min(max(waiting / max(tokens_per_second, 1.0), 1.0), RETRY_AFTER_MAX),
            )
