"""One choice of one prompt, as the worker sees it: tokens, how many are computed, where they lie, when it ends.

Knows nothing of text (stop strings are the engine's), of the network, or of other sequences.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum

from model.sampling_params import SamplingParams
from model.step import GrammarState
from server.worker.block_pool import BlockKey, block_keys, root_digest
from server.worker.messages import BACKGROUND, Add, FinishReason


class Status(Enum):
    WAITING = "waiting"  # holds no blocks; the runner has no row for it
    RUNNING = "running"
    FINISHED = "finished"  # ended or aborted


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """`computed` tokens chase `total` tokens; where they meet, the next one is sampled."""

    id: int
    params: SamplingParams
    tokens: list[int]  # the prompt, then the output
    prompt_length: int
    limit: int  # tokens it may grow to: prompt + max_tokens, or the context
    ends: Collection[int]  # tokens that end it, beside its stop tokens
    choice: int
    seed: int
    rank: tuple[int, int]  # the lowest runs first and is preempted last
    owner: str
    continued: bool
    salt: bytes
    variant: str | None = None
    background: bool = False  # nobody waits for it: it makes way

    status: Status = Status.WAITING
    computed: int = 0  # their keys and values are in the blocks, once the plans in flight have run
    in_flight: int = 0  # tokens that plans in flight will sample: they exist, their ids are not known yet
    block_table: list[int] = field(default_factory=list)
    keys: list[BlockKey] = field(default_factory=list)  # of its leading full blocks, as far as was asked for
    registered: int = 0  # leading blocks known to the prefix index
    drafting: int = 0  # guesses that a plan in flight may add: until it is known which are right, nothing is planned
    borrowed: int = 0  # blocks at the end of the table that it holds for these guesses alone
    acceptance: float | None = None  # how likely a guess is right; None before the first was thought of
    copy_from: int | None = None  # the block that its first chunk's first block begins as; then None
    preemptions: int = 0
    scored: int = 0  # prompt positions before it need no logprobs row (any more)
    cached_tokens: int | None = None  # prompt tokens found cached at first admission; told once, then None

    @classmethod
    def from_message(
        cls, message: Add, *, rank: tuple[int, int], max_model_len: int, eos_token_ids: frozenset[int]
    ) -> Sequence:
        params = message.params
        length = len(message.prompt)
        return cls(
            id=message.id,
            params=params,
            tokens=message.prompt + message.output,
            prompt_length=length,
            limit=min(length + params.max_tokens, max_model_len),
            ends=() if params.ignore_eos else eos_token_ids,
            choice=message.choice,
            seed=params.seed if message.seed is None else message.seed,
            rank=rank,
            owner=message.owner,
            continued=message.continued,
            salt=message.salt,
            variant=message.variant,
            background=message.priority >= BACKGROUND,
            scored=length if params.prompt_logprobs is None else 1,  # a prompt's first token has no score
        )

    @property
    def total(self) -> int:
        return len(self.tokens) + self.in_flight

    @property
    def remaining(self) -> int:
        """Tokens still to be computed. The last token a sequence may have is never computed: nothing follows it."""
        total = len(self.tokens) + self.in_flight
        return 0 if self.drafting or (self.in_flight and total >= self.limit) else total - self.computed

    @property
    def samples(self) -> bool:
        """Whether a token is wanted where computed tokens meet total tokens."""
        return self.params.max_tokens > 0

    @property
    def reusable(self) -> int:
        """How many leading tokens may come from the prefix cache.

        Not the last, whose logits are wanted, nor, where the prompt's logprobs are wanted, what has not been scored;
        and none where every hidden state is wanted.
        """
        if self.params.pooled:
            return 0
        return self.total - 1 if self.scored >= self.prompt_length else self.scored - 1

    def append(self, token: int, grammar: GrammarState | None = None) -> FinishReason | None:
        """Take the next token, and where it has led in the grammar; say whether it is the last."""
        self.tokens.append(token)
        if grammar is GrammarState.COMPLETE:
            return FinishReason.STOP
        if self._stops_at(token) and len(self.tokens) - self.prompt_length > self.params.min_tokens:
            return FinishReason.STOP
        if len(self.tokens) >= self.limit:
            return FinishReason.LENGTH
        return FinishReason.DEAD_END if grammar is GrammarState.LOST else None

    @property
    def stop_token(self) -> int | None:
        """The last token, if it is one that ends a sequence; a grammar may end it with any."""
        return self.tokens[-1] if self._stops_at(self.tokens[-1]) else None

    def _stops_at(self, token: int) -> bool:
        return token in self.ends or self.params.stops_at(token)

    def tail_key(self, count: int, block_size: int) -> BlockKey | None:
        """The key of the last of the blocks that hold the first `count` tokens; None where it is full."""
        assert count <= len(self.tokens)
        full = count // block_size
        if full * block_size == count:
            return None
        leading = self.leading_keys(full, block_size)
        parent = leading[-1].digest if leading else root_digest(self.salt)
        return block_keys(parent, self.tokens[full * block_size : count], block_size)[0]

    def leading_keys(self, count: int, block_size: int) -> list[BlockKey]:
        """The keys of the first `count` blocks, all of them full of known tokens."""
        assert count * block_size <= len(self.tokens)
        known = len(self.keys)
        if count > known:
            parent = self.keys[-1].digest if self.keys else root_digest(self.salt)
            self.keys += block_keys(parent, self.tokens[known * block_size : count * block_size], block_size)
        return self.keys[:count]
