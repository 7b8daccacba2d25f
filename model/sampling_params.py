"""How one sequence's tokens are chosen. Imports no torch; knows nothing of stop strings, which are text."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from model.dry import DryParams

BAN = -100.0  # a logit_bias this low bans the token outright, as OpenAI documents
GREEDY_BELOW = 1e-5  # a smaller temperature would overflow the division; it means argmax anyway


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """The engine's copy of the wire's sampling fields; ranges were checked when the request was parsed.

    The uniform number that picks the token at a position is a function of (seed, choice, position) and of nothing
    else, so a sequence can be replayed, preempted or batched without changing a byte of it. The choice (which of the n
    samples of a prompt) is the sequence's own, and so may be its seed; all the rest the samples of a request share.
    """

    seed: int  # 64 bits, signed or not; drawn at admission when the client gave none
    max_tokens: int = 16
    min_tokens: int = 0  # EOS and stop_token_ids cannot be sampled before it
    temperature: float = 1.0
    temperature_last: bool = False  # after the filters that follow, which then see the distribution of temperature 1
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    min_p_last: bool = False  # after top_p, not before
    typical_p: float = 1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    repetition_penalty_range: int | None = None  # latest tokens that the three penalties look at; None for all
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()  # no output holds one of these runs of tokens
    dry: DryParams | None = None
    grammar: str | None = None  # for model.grammar: the output matches it where it ends by itself
    stop_token_ids: tuple[int, ...] = ()  # rising
    ignore_eos: bool = False
    logprobs: int | None = None  # 0 is on: the sampled token's alone
    logprob_token_ids: tuple[int, ...] = ()  # scored at each position in place of the most likely ones
    prompt_logprobs: int | None = None
    pooled: bool = False  # wanted: the mean of the prompt's final hidden states, and no tokens (max_tokens 0)

    def stops_at(self, token: int) -> bool:
        """Whether it is one of stop_token_ids."""
        at = bisect_left(self.stop_token_ids, token)
        return at < len(self.stop_token_ids) and self.stop_token_ids[at] == token

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW or self.top_p == 0.0 or self.top_k == 1
