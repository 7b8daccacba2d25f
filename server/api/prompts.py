"""The four forms of a prompt, and the way from them to token ids that fit the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import anyio
import anyio.to_thread

from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from server.api.limits import Limits
from server.api.reading import is_huge
from server.engine.request import Prompt
from server.errors import ContextLengthExceeded, InvalidRequest

INLINE_CHARACTERS = 4000  # about a millisecond of tiktoken; more goes to a thread
DEFAULT_MAX_TOKENS = 16
_threads = anyio.CapacityLimiter(2)

RawPrompt = str | list[int]


def read_prompts(value: Any, limits: Limits) -> tuple[RawPrompt, ...]:
    """One entry a prompt. Raises InvalidRequest."""
    if value is None:
        return ("",)
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise _invalid("expected a string, an array of strings, or an array of token ids or of arrays of them")
    if not value:
        raise _invalid("the array is empty")
    if type(value[0]) is int:
        return (_ids(value, limits),)
    if len(value) > limits.max_prompts:
        raise InvalidRequest(
            f"Invalid 'prompt': array too long. Expected an array with maximum length {limits.max_prompts}, but got an "
            f"array with length {len(value)} instead.",
            "prompt",
            "array_above_max_length",
        )
    kinds = set(map(type, value))
    if kinds == {str}:
        return tuple(value)
    if kinds == {list}:
        return tuple(_ids(item, limits) for item in value)
    raise _invalid("all items must be strings, or all must be token ids, or all must be arrays of token ids")


def read_ids(value: Sequence[int], limits: Limits, param: str) -> list[int]:
    """Integers to token ids. Raises InvalidRequest for the first that is none."""
    for worst in (min(value, default=0), max(value, default=0)):
        if not 0 <= worst < limits.vocab_size:
            shown = "beyond 64 bits" if is_huge(worst) else worst
            raise InvalidRequest(f"Token id {shown} is out of vocabulary", param)
    return list(value)


def _ids(value: list[Any], limits: Limits) -> list[int]:
    if not value:
        raise _invalid("an array of token ids is empty")
    if set(map(type, value)) != {int}:
        raise _invalid("an array of token ids must hold integers only")
    return read_ids(value, limits, "prompt")


def _invalid(why: str) -> InvalidRequest:
    return InvalidRequest(f"Invalid 'prompt': {why}.", "prompt")


async def tokenize(text: str, tokenizer: Tokenizer) -> list[int]:
    """Long texts are encoded in a thread: the event loop serves everybody."""
    if len(text) <= INLINE_CHARACTERS:
        return tokenizer.encode(text)
    return await anyio.to_thread.run_sync(tokenizer.encode, text, limiter=_threads)


async def encode(raw: Sequence[RawPrompt], tokenizer: Tokenizer, keep_last: int | None) -> list[Prompt]:
    """Token ids of each prompt; of longer ones the last `keep_last`. An empty text starts a new document."""
    prompts = []
    for item in raw:
        ids = await tokenize(item, tokenizer) if isinstance(item, str) else item
        if keep_last is not None and len(ids) > keep_last:
            ids = ids[-keep_last:]
            prompts.append(Prompt(ids, tokenizer.decode(ids)))
        elif isinstance(item, str):
            prompts.append(Prompt(ids or [tokenizer.eos_token_id], item))
        else:
            prompts.append(Prompt(ids, tokenizer.decode(ids)))
    return prompts


def fit(
    prompts: Sequence[Prompt], params: SamplingParams, limits: Limits, *, explicit: bool, alike: bool = False
) -> SamplingParams:
    """Prompt and completion must fit the context: an explicit max_tokens as it stands unless the operator has it
    clamped, a default with what is left.

    With several prompts the default is cut for the shortest, and the engine ends each sequence at the end of its
    context; where all are to be of one length (`alike`: beams), it is cut for the longest.
    Raises ContextLengthExceeded.
    """
    lengths = [len(prompt.token_ids) for prompt in prompts]
    longest = max(lengths)
    wanted = params.max_tokens
    least = wanted if explicit and not limits.clamp_max_tokens else min(wanted, 1)
    if longest + least > limits.max_model_len:
        raise ContextLengthExceeded(limits.max_model_len, longest, wanted)
    most = min(wanted, limits.max_model_len - (longest if alike else min(lengths)))
    return replace(params, max_tokens=most, min_tokens=min(params.min_tokens, most))
