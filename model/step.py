"""What the scheduler asks of the runner in one step, and what comes back. Imports no torch.

The runner keeps a row of state (tokens, sampling state, block table) for every sequence between `added` and `removed`,
so a plan names only what changed. A preempted sequence is removed, and added again with the tokens it has by then.

A chunk may read blocks that an earlier chunk of the same plan fills (the samples of one prompt share its blocks from
the first step on): write a layer's keys and values for all chunks before any attends, or run the chunks in order.

What there is one of for every sequence in every step is a msgspec struct: made in a tenth of a dataclass's time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import msgspec

from model.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class NewSequence:
    """A sequence the runner has no row for: a fresh one, or one that resumes with `output` generated before."""

    id: int
    prompt: list[int]
    output: list[int]
    params: SamplingParams  # the samples of a request share the object
    variant: str | None = None  # of the network, by its key; None for the network itself
    choice: int = 0  # which of the n (or best_of) samples of its prompt
    seed: int | None = None  # in place of that of the parameters


class ScheduledChunk(msgspec.Struct, frozen=True):
    """Compute tokens [start, start + count) of a sequence; their keys and values go to its block table."""

    id: int
    start: int
    count: int
    first_block: int  # block_table[first_block:] = blocks, before the step runs
    blocks: list[int]
    samples: bool  # the chunk reaches the sequence's last token, and a next one is wanted
    copied: tuple[int, int] | None = None  # from which block to which, whole, before any chunk of the step is computed
    drafts: int = 0  # guesses of what follows that may be computed on top, and sampled after; there are blocks for them


@dataclass(frozen=True, slots=True)
class StepPlan:
    removed: list[int]
    added: list[NewSequence]
    chunks: list[ScheduledChunk]

    @property
    def tokens(self) -> int:
        """Known ones: how many guesses there are on top, the result says."""
        return sum(chunk.count for chunk in self.chunks)

    @property
    def decodes(self) -> bool:
        """It computes no prompts: every row of it is sampled, guesses too."""
        return all(chunk.samples and chunk.count == 1 for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Raw log-softmax of the model's logits: the token's own, and the most likely ones in falling order, or those of
    the params' logprob_token_ids."""

    logprob: float
    top: list[tuple[int, float]]
    rank: int | None = None  # 1 + how many tokens are likelier; None where nobody counted


class GrammarState(Enum):
    """Where a token has led in the sequence's grammar."""

    OPEN = "open"
    COMPLETE = "complete"  # matched, and nothing but the end can follow
    LOST = "lost"  # a step took more than its limits, or nothing can follow although it is not matched


class SampledToken(msgspec.Struct, frozen=True):
    id: int  # of the sequence
    token: int | None  # None where the sequence's own bans leave no token: it ends without one
    logprobs: TokenLogprobs | None = None
    grammar: GrammarState | None = None  # None without a grammar


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Scores of prompt tokens [start, start + len(rows)); the very first token of a prompt has none and no row."""

    id: int
    start: int
    rows: list[TokenLogprobs]


@dataclass(frozen=True, slots=True)
class StepResult:
    """Each chunk that samples has one token or, after guesses that were right, up to 1 + drafts of them in a row."""

    sampled: list[SampledToken] = field(default_factory=list)  # those of one sequence in their order
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    drafted: dict[int, int] = field(default_factory=dict)  # guesses made for a sequence, if any
    drafting: float = 0.0  # seconds that making them took
    pooled: dict[int, bytes] = field(default_factory=dict)  # (n_embd,) float32, little-endian, by sequence


class Pending(Protocol):
    """A step that was launched."""

    def result(self) -> StepResult:
        """Waits for it. May be asked again."""
        ...


@dataclass(frozen=True, slots=True)
class Done:
    """A step that was over when it had been launched."""

    outcome: StepResult

    def result(self) -> StepResult:
        return self.outcome
