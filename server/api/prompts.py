"""The four forms of a prompt, and the way from them to token ids that fit the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from server.api.aside import tokenize_aside
from server.api.limits import Limits
from server.api.reading import is_huge
from server.engine.request import Prompt
from server.errors import ContextLengthExceeded, InvalidRequest

INLINE_SIZE = 4000  # characters or token ids of all prompts together: about a millisecond; more goes to a thread
PIECE_SIZE = 65_536  # what a thread is handed at a time, where there are several prompts
DEFAULT_MAX_TOKENS = 16

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


async def tokenize(text: str, tokenizer: Tokenizer, *, add_special_tokens: bool) -> list[int]:
    """Long texts are encoded in a thread: the event loop serves everybody."""
    encode_text = tokenizer.encode_prompt if add_special_tokens else tokenizer.encode
    if len(text) <= INLINE_SIZE:
        return encode_text(text)
    return await tokenize_aside(encode_text, text)


async def encode(
    raw: Sequence[RawPrompt],
    tokenizer: Tokenizer,
    keep: int | None,
    *,
    keep_first: bool = False,
    add_special_tokens: bool = True,
) -> list[Prompt]:
    """Token ids of each prompt; of longer ones the last, or the first, `keep`. An empty text starts a new document.

    add_special_tokens: those that the tokenizer puts around a text. Prompts that are long together go to a thread,
    however short each is. Raises InvalidRequest for a token of a text that the model has no embedding of.
    """
    options = tokenizer, keep, keep_first, add_special_tokens
    if sum(map(len, raw)) <= INLINE_SIZE:
        return _encode(raw, *options)
    prompts: list[Prompt] = []
    for piece in _pieces(raw):
        prompts += await tokenize_aside(_encode, piece, *options)
    return prompts


def _pieces(raw: Sequence[RawPrompt]) -> Iterator[Sequence[RawPrompt]]:
    start = size = 0
    for place, item in enumerate(raw):
        if place > start and size + len(item) > PIECE_SIZE:
            yield raw[start:place]
            start, size = place, 0
        size += len(item)
    yield raw[start:]


def _encode(
    raw: Sequence[RawPrompt], tokenizer: Tokenizer, keep: int | None, keep_first: bool, add_special_tokens: bool
) -> list[Prompt]:
    return [_prompt(item, tokenizer, keep, keep_first, add_special_tokens) for item in raw]


def _prompt(
    item: RawPrompt, tokenizer: Tokenizer, keep: int | None, keep_first: bool, add_special_tokens: bool
) -> Prompt:
    ids = _ids_of(item, tokenizer, add_special_tokens) if isinstance(item, str) else item
    if keep is not None and len(ids) > keep:
        ids = ids[:keep] if keep_first else ids[-keep:]
        return Prompt(ids, tokenizer.decode(ids))
    if isinstance(item, str):
        return Prompt(ids, item)
    return Prompt(ids, tokenizer.decode(ids))


def _ids_of(text: str, tokenizer: Tokenizer, add_special_tokens: bool) -> list[int]:
    ids = (tokenizer.encode_prompt if add_special_tokens else tokenizer.encode)(text) or start_of(tokenizer)
    if max(ids) >= tokenizer.vocab_size:
        raise _invalid("the text holds a token that the tokenizer has and the model does not")
    return ids


def start_of(tokenizer: Tokenizer) -> list[int]:
    """What stands in place of an empty text. Raises InvalidRequest."""
    if tokenizer.start_id is None:
        raise _invalid("this model has no token that begins a text, so a prompt cannot be empty")
    return [tokenizer.start_id]


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
