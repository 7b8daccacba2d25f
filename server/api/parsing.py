"""Raw body bytes to one frozen request: every type, range, limit and cross-field rule is checked here, once.

It knows nothing of HTTP. What needs the tokenizer (does the prompt fit the context?) is in prompts.py.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model.dry import DryParams
from model.sampling_params import SamplingParams
from server.api.aliases import CONTEXTS, RANDOM, endless, read_context, translate
from server.api.limits import Limits
from server.api.prompts import DEFAULT_MAX_TOKENS, RawPrompt, read_ids, read_prompts
from server.api.reading import (
    IGNORED_SHOWN,
    at_most,
    bound_size,
    read_body_fields,
    read_object,
    shown_name,
    unknown_fields,
)
from server.api.sampler_order import ORDERS, SamplerOrder, read_order
from server.api.schemas import CompletionBody, StreamOptions
from server.api.structured import read_structure, unknown_keys
from server.api.unsupported import KNOWN, refuse_unsupported
from server.engine.grammars import GrammarSource
from server.engine.request import BeamParams, EarlyStopping
from server.errors import InvalidRequest

NO_DATA = (
    "You requested a length 0 completion, but you did not set the 'echo' parameter. That means that we will return no "
    "data to you. (HINT: set 'echo' to true in order for the API to echo back the prompt to you.)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest:
    """Right by construction, but for the length of its prompts in tokens."""

    body: CompletionBody
    prompts: tuple[RawPrompt, ...]
    params: SamplingParams  # not yet fitted to the context, and without what needs the tokenizer or a compiler
    keep: int | None  # how many tokens of a longer prompt stay; None for all
    structure: GrammarSource | None  # what the answer has to match
    beam: BeamParams | None  # search instead of sampling
    best_of: int
    stop: tuple[str, ...]
    stream_options: StreamOptions
    ignored: tuple[str, ...]  # names of fields nobody knows, made safe to show

    @property
    def alternatives(self) -> int | None:
        """How many tokens are scored beside each of the output; None without logprobs."""
        named = self.params.logprob_token_ids
        return len(named) if named else self.params.logprobs


def parse_completion(raw: bytes, limits: Limits) -> CompletionRequest:
    """Raises InvalidRequest."""
    return parse_fields(read_object(raw), limits, DEFAULT_MAX_TOKENS)


def parse_fields(fields: Mapping[str, Any], limits: Limits, default_max_tokens: int) -> CompletionRequest:
    """fields: the body's, without what is null. Raises InvalidRequest."""
    refuse_unsupported(fields)
    translation = translate(fields)
    default = limits.max_model_len if endless(fields) else default_max_tokens
    try:
        return _parse(translation.fields, limits, default)
    except InvalidRequest as error:
        raise translation.named(error) from None


def _parse(fields: Mapping[str, Any], limits: Limits, default_max_tokens: int) -> CompletionRequest:
    """fields: by our names."""
    _bound_sizes(fields, limits)
    body = read_body_fields(CompletionBody, fields)
    stop = _read_stop(body.stop, limits)
    prompts = read_prompts(body.prompt, limits)
    best_of = _check_choices(body, len(prompts), limits)
    max_tokens = default_max_tokens if body.max_tokens is None else body.max_tokens
    _check_together(body, best_of, max_tokens, limits)
    structure = read_structure(fields)
    if structure is not None and body.ignore_eos:
        raise InvalidRequest(f"'ignore_eos' and '{structure.param}' cannot be given together.", "ignore_eos")
    return CompletionRequest(
        body=body,
        prompts=prompts,
        params=_sampling_params(body, max_tokens, limits, read_order(fields, body)),
        keep=_read_keep(fields, body, max_tokens, limits),
        structure=structure,
        beam=_beam_params(body, structure),
        best_of=best_of,
        stop=stop,
        stream_options=body.stream_options or StreamOptions(),
        ignored=_ignored(fields),
    )


def _read_keep(fields: Mapping[str, Any], body: CompletionBody, max_tokens: int, limits: Limits) -> int | None:
    keep, context = body.truncate_prompt_tokens, read_context(fields, max_tokens, limits)
    if keep == -1:
        keep = max(1, limits.max_model_len - max_tokens)
    return min((size for size in (keep, context) if size is not None), default=None)


def _ignored(fields: Mapping[str, Any]) -> tuple[str, ...]:
    options = unknown_fields(fields.get("stream_options", {}), StreamOptions)
    inside = (*(f"stream_options.{name}" for name in options), *map(shown_name, unknown_keys(fields)))
    return (*unknown_fields(fields, CompletionBody, UNDERSTOOD), *inside[:IGNORED_SHOWN])


def _bound_sizes(fields: Mapping[str, Any], limits: Limits) -> None:
    """Before pydantic walks them."""
    bound_size("logit_bias", fields.get("logit_bias"), limits.max_logit_bias)
    for name in ("stop_token_ids", "allowed_token_ids"):
        bound_size(name, fields.get(name), limits.vocab_size)
    bound_size("logprob_token_ids", fields.get("logprob_token_ids"), limits.max_logprobs)
    bound_size("stop", fields.get("stop"), limits.max_stop_strings)
    bound_size("bad_words", fields.get("bad_words"), limits.max_bad_words)
    bound_size("dry_sequence_breakers", fields.get("dry_sequence_breakers"), limits.max_breakers)


def _read_stop(value: Any, limits: Limits) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        message = "Invalid type for 'stop': expected a string or an array of strings."
        raise InvalidRequest(message, "stop", "invalid_type")
    for stop in stops:
        if not stop:
            raise InvalidRequest("Invalid 'stop': a stop string cannot be empty.", "stop", "empty_string")
        if len(stop) > limits.max_stop_length:
            raise InvalidRequest(
                f"Invalid 'stop': string too long. Expected a string with maximum length {limits.max_stop_length}, "
                f"but got a string with length {len(stop)} instead.",
                "stop",
                "string_above_max_length",
            )
    return tuple(stops)


def _check_choices(body: CompletionBody, prompts: int, limits: Limits) -> int:
    """Counts sequences before anything is copied. Returns best_of."""
    at_most("n", body.n, limits.max_choices)
    at_most("best_of", body.best_of, limits.max_best_of)
    best_of = body.n if body.best_of is None else body.best_of
    if body.n > best_of:
        raise InvalidRequest(
            "You requested that the server return more choices than it will generate (HINT: you must set 'n' "
            f"(currently {body.n}) to be at most 'best_of' (currently {best_of}), or omit either parameter if you "
            "don't specifically want to use them.)",
            "best_of",
        )
    if body.stream and best_of > body.n and not body.use_beam_search:
        raise InvalidRequest("'best_of' above 'n' cannot be streamed: the best is known only at the end.", "best_of")
    if prompts * best_of > limits.max_sequences:
        raise InvalidRequest(
            f"You requested {prompts * best_of} sequences (prompts x max(n, best_of)), and the maximum in one request "
            f"is {limits.max_sequences}.",
            "n" if best_of > 1 else "prompt",
        )
    return best_of


def _check_together(body: CompletionBody, best_of: int, max_tokens: int, limits: Limits) -> None:
    at_most("logprobs", body.logprobs, limits.max_logprobs)
    at_most("prompt_logprobs", body.prompt_logprobs, limits.max_logprobs)
    if body.suffix:
        raise InvalidRequest("'suffix' is not supported: this model does not insert text.", "suffix")
    if max_tokens == 0 and not body.echo:
        raise InvalidRequest(NO_DATA)
    if body.min_tokens > max_tokens:
        raise InvalidRequest(
            f"'min_tokens' must be less than or equal to 'max_tokens' ({max_tokens}), but it is {body.min_tokens}.",
            "min_tokens",
        )
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("Stream options can only be defined when `stream=True`.", "stream_options")
    if body.prompt_logprobs is not None and body.stream:
        raise InvalidRequest("`prompt_logprobs` are not available when `stream=True`.", "prompt_logprobs")
    if body.allowed_token_ids is not None and not body.allowed_token_ids:
        raise InvalidRequest("'allowed_token_ids' must not be empty.", "allowed_token_ids")
    if body.logprob_token_ids is not None and body.logprobs is None:
        raise InvalidRequest("'logprob_token_ids' needs 'logprobs'.", "logprob_token_ids")
    _check_lengths("bad_words", body.bad_words, limits.max_stop_length)
    _check_lengths("dry_sequence_breakers", body.dry_sequence_breakers, limits.max_breaker_length)
    if body.truncate_prompt_tokens == 0:
        raise InvalidRequest("'truncate_prompt_tokens' must be -1 or at least 1.", "truncate_prompt_tokens")


UNDERSTOOD = KNOWN.union(ORDERS, CONTEXTS)  # beside the schema's fields
SAMPLED = (
    "top_p", "top_k", "min_p", "typical_p", "xtc_probability", "dry_multiplier", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "logit_bias", "allowed_token_ids", "bad_words", "stop",
    "prompt_logprobs", "logprob_token_ids",
)  # fmt: skip
BEAM_ENDS_MAX = 64


def _beam_params(body: CompletionBody, structure: GrammarSource | None) -> BeamParams | None:
    """Beams are ranked by what the model itself says: nothing that changes its distribution goes with them."""
    if not body.use_beam_search:
        for name in ("length_penalty", "early_stopping"):
            if getattr(body, name) != CompletionBody.model_fields[name].default:
                raise InvalidRequest(f"'{name}' is only defined with 'use_beam_search'.", name)
        return None
    other = [name for name in SAMPLED if getattr(body, name) != CompletionBody.model_fields[name].default]
    if body.temperature not in {0, 1}:
        other.append("temperature")
    if body.echo and body.logprobs is not None:
        other.append("logprobs")
    if structure is not None:
        other.append(structure.param)
    if other:
        raise InvalidRequest(f"'{other[0]}' and 'use_beam_search' cannot be given together.", other[0])
    if body.max_tokens == 0:
        raise InvalidRequest("'use_beam_search' needs 'max_tokens' of at least 1.", "max_tokens")
    if len(body.stop_token_ids) > BEAM_ENDS_MAX:
        message = f"'stop_token_ids' can hold {BEAM_ENDS_MAX} tokens at most with 'use_beam_search'."
        raise InvalidRequest(message, "stop_token_ids")
    return BeamParams(length_penalty=body.length_penalty, early_stopping=EarlyStopping(body.early_stopping))


def _check_lengths(name: str, texts: list[str], most: int) -> None:
    if any(len(text.encode()) > most for text in texts):
        raise InvalidRequest(
            f"Invalid '{name}': each can be {most} bytes long at most.", name, "string_above_max_length"
        )


def _sampling_params(body: CompletionBody, max_tokens: int, limits: Limits, order: SamplerOrder) -> SamplingParams:
    allowed = body.allowed_token_ids
    scored = [count for count in (body.prompt_logprobs, body.logprobs if body.echo else None) if count is not None]
    return SamplingParams(
        seed=secrets.randbits(63) if body.seed is None or body.seed == RANDOM else body.seed,
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        temperature=body.temperature,
        temperature_last=order.temperature_last,
        top_p=body.top_p,
        top_k=min(body.top_k, limits.vocab_size) if body.top_k > 0 else None,
        min_p=body.min_p,
        min_p_last=order.min_p_last,
        typical_p=body.typical_p,
        xtc_probability=body.xtc_probability,
        xtc_threshold=body.xtc_threshold,
        dry=_dry_params(body),
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        repetition_penalty_range=body.repetition_penalty_range or None,
        logit_bias=_read_bias(body.logit_bias, limits),
        allowed_token_ids=None if allowed is None else _token_set("allowed_token_ids", allowed, limits),
        stop_token_ids=_token_set("stop_token_ids", body.stop_token_ids, limits),
        ignore_eos=body.ignore_eos,
        logprobs=body.logprobs,
        logprob_token_ids=_token_set("logprob_token_ids", body.logprob_token_ids or [], limits),
        prompt_logprobs=max(scored, default=None),
    )


def _dry_params(body: CompletionBody) -> DryParams | None:
    if body.dry_multiplier == 0 or body.dry_penalty_last_n == 0:
        return None
    return DryParams(
        multiplier=body.dry_multiplier,
        base=body.dry_base,
        allowed_length=body.dry_allowed_length,
        last_n=None if body.dry_penalty_last_n == -1 else body.dry_penalty_last_n,
    )


def _token_set(name: str, ids: list[int], limits: Limits) -> tuple[int, ...]:
    return tuple(sorted(set(read_ids(ids, limits, name))))


def _read_bias(bias: Mapping[str, float], limits: Limits) -> tuple[tuple[int, float], ...]:
    by_token: dict[int, float] = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise InvalidRequest("Invalid key in 'logit_bias': it should be a token id in decimal.", "logit_bias")
        token = int(key)
        if token >= limits.vocab_size:
            raise InvalidRequest(f"Token id {token} in 'logit_bias' is out of vocabulary", "logit_bias")
        by_token[token] = value
    return tuple(sorted(by_token.items()))
