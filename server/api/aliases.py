"""Other servers' names for what this one has, and other forms of its own fields.

Two names of one parameter may come together where they agree; which of two different values was meant nobody can know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from server.api.limits import Limits
from server.api.unsupported import refusal
from server.errors import InvalidRequest

ENDLESS = -1  # of n_predict and num_predict: as many tokens as the context has room for
RANDOM = -1  # of a seed


def _same(value: Any) -> Any:
    return value


def _opposite(value: Any) -> Any:
    return not value if isinstance(value, bool) else value


def _unless(*idle: Any) -> Callable[[Any], Any]:
    """The same, but nothing for these values."""
    return lambda value: None if any(value == each and type(value) is type(each) for each in idle) else value


def _sampling(value: Any) -> Any:
    """do_sample: without it the most likely token is taken."""
    return {True: None, False: 0.0}[value] if isinstance(value, bool) else value


@dataclass(frozen=True, slots=True)
class Alias:
    name: str  # ours
    read: Callable[[Any], Any] = _same  # their value as ours; what is wrong stays as it is; None asks for nothing


ALIASES: dict[str, Alias] = {
    # llama.cpp, LM Studio, Ollama, mikupad
    "n_predict": Alias("max_tokens", _unless(ENDLESS)),
    "num_predict": Alias("max_tokens", _unless(ENDLESS)),
    "max_completion_tokens": Alias("max_tokens"),
    "n_cmpl": Alias("n"),
    "n_probs": Alias("logprobs", _unless(0)),
    "repeat_penalty": Alias("repetition_penalty"),
    "repeat_last_n": Alias("repetition_penalty_range", _unless(-1)),
    # transformers and text-generation-inference
    "max_new_tokens": Alias("max_tokens"),
    "min_new_tokens": Alias("min_tokens"),
    "do_sample": Alias("temperature", _sampling),
    "truncate": Alias("truncate_prompt_tokens"),
    "return_full_text": Alias("echo"),
    # SGLang
    "regex": Alias("guided_regex", _unless("")),
    "ebnf": Alias("guided_grammar", _unless("")),
    "no_stop_trim": Alias("include_stop_str_in_output"),
    "rid": Alias("request_id"),
    # text-generation-webui, KoboldAI, SillyTavern
    "grammar_string": Alias("guided_grammar", _unless("")),
    "stopping_strings": Alias("stop"),
    "stop_sequence": Alias("stop"),
    "typical": Alias("typical_p"),
    "typ_p": Alias("typical_p"),
    "rep_pen": Alias("repetition_penalty"),
    "rep_pen_range": Alias("repetition_penalty_range"),
    "min_length": Alias("min_tokens"),
    "max_length": Alias("max_tokens"),
    "sampler_seed": Alias("seed"),
    "add_bos_token": Alias("add_special_tokens"),
    "trim_stop": Alias("include_stop_str_in_output", _opposite),
    "render_special": Alias("skip_special_tokens", _opposite),
}
# Sizes of the context: the prompt keeps the last of them that the completion leaves.
CONTEXTS = ("truncation_length", "num_ctx", "max_context_length")


@dataclass(frozen=True, slots=True)
class Translation:
    fields: dict[str, Any]  # by our names
    sent: dict[str, str]  # our name: the one the client used

    def named(self, error: InvalidRequest) -> InvalidRequest:
        """The error, of the field that the client sent."""
        name = self.sent.get(error.param or "")
        if name is None:
            return error
        return InvalidRequest(error.message.replace(f"'{error.param}'", f"'{name}'"), name, error.code)


def translate(fields: Mapping[str, Any]) -> Translation:
    """fields: the body's, without what is null. Raises InvalidRequest where two names of one parameter differ."""
    ours = {name: FORMS.get(name, _same)(value) for name, value in fields.items() if name not in ALIASES}
    sent: dict[str, str] = {}
    for name, alias in ALIASES.items():
        if name not in fields:
            continue
        value = alias.read(fields[name])
        if name == "repeat_last_n" and value == 0 and alias.name not in ours:
            _refuse_no_window(fields)
        elif value is None:
            continue
        elif alias.name not in ours:
            ours[alias.name], sent[alias.name] = value, name
        elif ours[alias.name] != value:
            other = sent.get(alias.name, alias.name)
            raise InvalidRequest(f"'{name}' and '{other}' are two names of one parameter, and they differ.", name)
    return Translation(ours, sent)


PENALTIES = {
    "repetition_penalty": 1, "repeat_penalty": 1, "rep_pen": 1, "presence_penalty": 0, "frequency_penalty": 0,
}  # fmt: skip


def _refuse_no_window(fields: Mapping[str, Any]) -> None:
    """llama.cpp's penalties look at no token then, where the other servers' look at all. Raises InvalidRequest."""
    if any(fields.get(name, off) != off for name, off in PENALTIES.items()):
        raise refusal("repeat_last_n")


def endless(fields: Mapping[str, Any]) -> bool:
    """Whether the completion may fill the context."""
    return "max_tokens" not in fields and ENDLESS in (fields.get("n_predict"), fields.get("num_predict"))


def read_context(fields: Mapping[str, Any], max_tokens: int, limits: Limits) -> int | None:
    """How many of a prompt's last tokens stay, where a client thinks of a smaller context. Raises InvalidRequest."""
    sizes = []
    for name in CONTEXTS:
        size = fields.get(name, 0)
        if type(size) is not int or size < 0:
            raise InvalidRequest(f"Invalid type for '{name}': expected an integer, 0 or more.", name, "invalid_type")
        sizes.append(size or limits.max_model_len)
    smallest = min(sizes)
    return None if smallest >= limits.max_model_len else max(1, smallest - max_tokens)


def _breakers(value: Any) -> Any:
    """The text of a JSON array, with its brackets or without, as text-generation-webui takes it."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    try:
        return from_json(text if text.startswith("[") else f"[{text}]")
    except ValueError:
        return value


def _biases(value: Any) -> Any:
    """llama.cpp's pairs of a token id and a bias, of which false bans."""
    if not isinstance(value, list):
        return value
    biases = {}
    for pair in value:
        if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) is not int:
            return value
        biases[str(pair[0])] = -100.0 if pair[1] is False else pair[1]
    return biases


FORMS: dict[str, Callable[[Any], Any]] = {"dry_sequence_breakers": _breakers, "logit_bias": _biases}
