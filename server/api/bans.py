"""Whether a request leaves any token to be sampled.

Knows nothing of grammars, nor of bans that depend on what was said before: the sampler ends a choice there.
"""

from __future__ import annotations

from collections.abc import Iterable

from model.sampling_params import BAN, SamplingParams
from server.errors import InvalidRequest

NONE_LEFT = "No token is left to be sampled: {} allow none that is not banned."


def check_any_left(params: SamplingParams, ends: Iterable[int], vocab_size: int) -> None:
    """ends: the end-of-text tokens. Raises InvalidRequest where what is asked for bans every token from the start."""
    by_field = {
        "logit_bias": {id_ for id_, bias in params.logit_bias if bias <= BAN},
        "bad_words": {word[0] for word in params.bad_words if len(word) == 1},
        "min_tokens": {*ends, *params.stop_token_ids} if params.min_tokens else set(),
    }
    banned = set().union(*by_field.values())
    if not banned or params.max_tokens == 0:
        return
    allowed = params.allowed_token_ids
    left = vocab_size - len(banned) if allowed is None else any(id_ not in banned for id_ in allowed)
    if not left:
        fields = ["allowed_token_ids"] * (allowed is not None) + [name for name, ids in by_field.items() if ids]
        raise InvalidRequest(NONE_LEFT.format(" and ".join(f"'{name}'" for name in fields)), fields[0])
