"""What the api asks of the engine, and what it gets back. Token ids and text; nothing of JSON or HTTP."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Protocol

from model.sampling_params import SamplingParams
from model.step import TokenLogprobs
from server.engine.variants import Variant
from server.worker.messages import BACKGROUND, FinishReason


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: list[int]  # never empty
    text: str  # as echo shows it: decoded ids, bytes that are no UTF-8 as U+FFFD


class EarlyStopping(Enum):
    """When a beam search with enough finished beams ends; the names are transformers'."""

    NO = False  # when no running beam is likely to beat them
    YES = True  # at once
    NEVER = "never"  # when no running beam can


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamParams:
    length_penalty: float = 1.0  # a beam's score is its log-probability / length ^ length_penalty
    early_stopping: EarlyStopping = EarlyStopping.NO


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One completion call, tokenised and right by construction. It has len(prompts) x n choices."""

    id: str  # "cmpl-…"
    prompts: list[Prompt]
    params: SamplingParams  # of choice 0 of the first prompt; choice k differs by `choice` alone
    seeds: tuple[int, ...] = ()  # of each prompt; none where all have that of `params`
    n: int = 1
    best_of: int = 1  # >= n; the n of best mean log-probability are returned. With beams: how many are kept
    beam: BeamParams | None = None  # search instead of sampling
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    echo: bool = False
    skip_special_tokens: bool = True  # generated special tokens show no text
    tokens_as_ids: bool = False  # logprob rows name tokens "token_id:N"
    priority: int = 0  # lower runs first; from BACKGROUND on, after all that somebody waits for
    salt: bytes = b""
    variant: Variant | None = None  # of the model; None for the model itself
    key_name: str = ""  # whose request it is, for metrics and per-key limits; "" without keys

    @property
    def background(self) -> bool:
        """Nobody waits for it: no queue, quota or deadline is for it."""
        return self.priority >= BACKGROUND

    @property
    def prompt_tokens(self) -> int:
        """Each prompt once, however many choices."""
        return sum(len(prompt.token_ids) for prompt in self.prompts)

    @property
    def most_tokens(self) -> int:
        """What it may use, prompts and completions together."""
        return self.prompt_tokens + len(self.prompts) * self.best_of * self.params.max_tokens

    @property
    def cache_salt(self) -> bytes:
        """Of the prefix cache: what a variant computes is another's than the model's."""
        return self.salt if self.variant is None else self.salt + self.variant.salt

    @property
    def candidate_params(self) -> SamplingParams:
        """With the scores that best_of ranks by."""
        scored = self.best_of > self.n and self.params.logprobs is None
        return replace(self.params, logprobs=0) if scored else self.params


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """One row of the legacy logprobs object."""

    token: str  # its text, or "bytes:\\xNN…" where the bytes are no UTF-8 by themselves
    token_id: int
    logprob: float | None  # None for the first token of an echoed prompt
    top: dict[str, float] | None  # None where alternatives were not asked for, and beside a None logprob
    text_offset: int  # completed characters before it, counted from the start of the prompt


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What one choice gained. The deltas of a choice, joined, are its answer; the last one has a finish reason."""

    index: int  # prompt * n + k
    text: str
    token_ids: list[int]
    tokens: list[TokenInfo] | None  # rows for logprobs, where asked for
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or the token id that ended it; None for EOS
    prompt_logprobs: list[TokenLogprobs] | None = None  # of prompt[1:], with a choice's first delta, if params ask
    pooled: bytes | None = None  # the prompt's embedding as little-endian float32, if params ask


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int  # each prompt once, however many choices
    completion_tokens: int  # all candidates, the losers of best_of too
    cached_tokens: int


class Generation(Protocol):
    """A running request. Iterate it to the end, or close it: leaving it is what frees its blocks."""

    def __aiter__(self) -> Generation: ...
    async def __anext__(self) -> ChoiceDelta: ...
    @property
    def usage(self) -> Usage:
        """What has been used so far; final after the last delta."""
        ...

    async def aclose(self) -> None:
        """Aborts what still runs. Idempotent; called in a `finally` by whoever iterates."""
        ...


class GenerationEngine(Protocol):
    """What the api needs of the engine. Tests put a scripted one in its place."""

    def submit(self, request: GenerationRequest) -> Generation:
        """Admit the request or refuse it, before any work is done.

        Raises server.errors.Overloaded (queue full, draining, no worker yet) or RateLimited.
        """
        ...

    def check_quota(self, key_name: str) -> None:
        """Asked before a prompt is read, which is work. Raises RateLimited."""
        ...

    def charge(self, key_name: str, tokens: int) -> None:
        """For a prompt that was read and then refused."""
        ...

    @property
    def ready(self) -> bool: ...

    @property
    def healthy(self) -> bool: ...
