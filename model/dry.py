"""DRY ("don't repeat yourself"): the longer a repetition a token would continue, the less likely it gets.

By p-e-w for text-generation-webui (2024), here with llama.cpp's rules: prompt and output count; a repetition reaches
back no further than the last breaker; the penalty is multiplier x base ^ (length - allowed_length). No torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LOG_FLOAT_MAX = 88.7228391  # beyond it base ** exponent is no float32


@dataclass(frozen=True, slots=True, kw_only=True)
class DryParams:
    multiplier: float
    base: float = 1.75
    allowed_length: int = 2
    last_n: int | None = None  # how many of the last tokens are looked at; None for all
    # Token sequences across which no repetition reaches: any one of some tokens, and then these.
    breakers: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()


def dry_penalties(
    tokens: Sequence[int], params: DryParams, tokens_since_breaker: Callable[[Sequence[int]], int]
) -> dict[int, float]:
    """What to take off each token's logit. tokens: prompt and output. tokens_since_breaker: of a text."""
    window = tokens[max(0, len(tokens) - params.last_n) :] if params.last_n is not None else tokens
    if len(window) <= params.allowed_length:
        return {}
    reach = tokens_since_breaker(window)
    if reach < params.allowed_length:
        return {}
    lengths: dict[int, int] = {}
    for at, length in enumerate(_suffix_matches(window)):
        repeated = min(length, reach)
        if repeated >= params.allowed_length:
            token = window[at + 1]
            lengths[token] = max(lengths.get(token, 0), repeated)
    return {token: _penalty(length - params.allowed_length, params) for token, length in lengths.items()}


def _penalty(excess: int, params: DryParams) -> float:
    if params.base > 1.000001:
        excess = min(excess, int(LOG_FLOAT_MAX / math.log(params.base)))
    return float(params.multiplier * params.base**excess)


def _suffix_matches(window: Sequence[int]) -> list[int]:
    """For each token but the last: how long a run that ends there equals the run that ends the window.

    Gusfield's Z algorithm on the reversed window: linear, whatever the repetitions.
    """
    turned = window[::-1]
    size = len(turned)
    matches = [0] * size
    left = right = 0  # the match [left, right) that reaches furthest
    for i in range(1, size):
        length = min(right - i, matches[i - left]) if i < right else 0
        while i + length < size and turned[length] == turned[i + length]:
            length += 1
        matches[i] = length
        if i + length > right:
            left, right = i, i + length
    return matches[:0:-1]
