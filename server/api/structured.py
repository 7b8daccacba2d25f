"""What a client wants its answer to look like, from the fields of OpenAI, vLLM and llama.cpp to one grammar source.

Whether it can be compiled is found out later, by the engine's grammar checker.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from msgspec import structs
from pydantic_core import from_json

from server.engine.grammars import GrammarKind, GrammarSource
from server.errors import InvalidRequest

TEXT_MAX = 1 << 16  # characters of a schema, regex or grammar
CHOICES_MAX = 1024
ANY_OBJECT = '{"type":"object"}'

WRAPPER = frozenset({"name", "description", "schema", "strict"})  # of OpenAI's `json_schema`; all are strict here
# fields of `structured_outputs` that say how, not what
HOW = ("disable_any_whitespace", "whitespace_pattern", "disable_fallback")


def read_structure(fields: Mapping[str, Any]) -> GrammarSource | None:
    """fields: the body's, without what is null. Raises InvalidRequest."""
    pattern = fields.get("guided_whitespace_pattern")
    asked = [name for name in READERS if name in fields and fields[name] not in IDLE.get(name, ())]
    sources = [READERS[name](name, fields[name], pattern) for name in asked]
    if any(not _same(source, sources[0]) for source in sources):
        raise InvalidRequest(f"'{asked[0]}' and '{asked[1]}' cannot be given together.", asked[1])
    return sources[0] if sources else None


def _same(one: GrammarSource | None, other: GrammarSource | None) -> bool:
    """Clients that know two versions of a server send the same by two names."""
    return one == (other if one is None or other is None else structs.replace(other, param=one.param))


def _response_format(name: str, value: Any, pattern: str | None) -> GrammarSource | None:
    format_ = _object(name, value)
    kind = format_.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        schema = ANY_OBJECT if format_.get("schema") is None else format_["schema"]
        return _schema(f"{name}.schema", schema, pattern)
    if kind == "json_schema" and format_.get("json_schema") is None and format_.get("schema") is not None:
        return _schema(f"{name}.schema", format_["schema"], pattern)
    if kind == "json_schema":
        wrapper = _object(f"{name}.json_schema", format_.get("json_schema"))
        if format_.get("schema") is not None:
            raise InvalidRequest(f"'{name}.json_schema' and '{name}.schema' cannot be given together.", name)
        return _schema(f"{name}.json_schema.schema", wrapper.get("schema"), pattern)
    message = f"Invalid value for '{name}.type': supported values are 'text', 'json_object' and 'json_schema'."
    raise InvalidRequest(message, name, "invalid_value")


def unknown_keys(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of what is in `response_format` and not looked at."""
    format_ = fields.get("response_format")
    if not isinstance(format_, dict):
        return ()
    kind, wrapper = str(format_.get("type")), format_.get("json_schema")
    known = {"json_object": {"type", "schema"}, "json_schema": {"type", "schema", "json_schema"}}.get(kind, {"type"})
    inside = wrapper if kind == "json_schema" and isinstance(wrapper, dict) else {}
    return (
        *(f"response_format.{name}" for name, value in format_.items() if name not in known and value is not None),
        *(f"response_format.json_schema.{name}" for name in inside if name not in WRAPPER),
    )


def _structured_outputs(name: str, value: Any, pattern: str | None) -> GrammarSource | None:
    options = {key: item for key, item in _object(name, value).items() if item is not None and item is not False}
    unknown = [key for key in options if key not in OUTPUTS and key not in HOW]
    if unknown:
        raise InvalidRequest(f"'{name}' can hold one of {', '.join(OUTPUTS)}.", name, "unsupported_parameter")
    wanted = [key for key in options if key in OUTPUTS]
    if len(wanted) != 1:
        raise InvalidRequest(f"'{name}' must hold exactly one of {', '.join(OUTPUTS)}.", name)
    source = OUTPUTS[wanted[0]](f"{name}.{wanted[0]}", options[wanted[0]], options.get("whitespace_pattern", pattern))
    if source is None or not options.get("disable_any_whitespace"):
        return source
    return GrammarSource(source.kind, source.text, source.param, whitespace=False)


def _schema(name: str, value: Any, pattern: str | None) -> GrammarSource:
    """A schema as an object, or as the text of one."""
    if isinstance(value, str):
        try:
            value = from_json(_bounded(name, value), allow_inf_nan=False)
        except ValueError:
            raise _wrong_type(name, "a JSON schema") from None
    schema = _object(name, value)
    if pattern is not None:
        _bounded("guided_whitespace_pattern", pattern)
    text = _bounded(name, json.dumps(schema, ensure_ascii=False, separators=(",", ":")))
    return GrammarSource(GrammarKind.JSON_SCHEMA, text, _param(name), whitespace_pattern=pattern)


def _regex(name: str, value: Any, _: str | None) -> GrammarSource:
    return GrammarSource(GrammarKind.REGEX, _bounded(name, value), _param(name))


def _grammar(name: str, value: Any, _: str | None) -> GrammarSource:
    return GrammarSource(GrammarKind.GRAMMAR, _bounded(name, value), _param(name))


def _choice(name: str, value: Any, _: str | None) -> GrammarSource:
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
        raise _wrong_type(name, "an array of texts, none of them empty")
    if len(value) > CHOICES_MAX:
        raise InvalidRequest(
            f"Invalid '{name}': at most {CHOICES_MAX} choices.", _param(name), "array_above_max_length"
        )
    return GrammarSource(GrammarKind.CHOICE, _bounded(name, json.dumps(value, ensure_ascii=False)), _param(name))


def _any_object(name: str, value: Any, _: str | None) -> GrammarSource:
    if value is not True:
        raise _wrong_type(name, "a boolean")
    return GrammarSource(GrammarKind.JSON_SCHEMA, ANY_OBJECT, _param(name))


def _object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong_type(name, "an object")
    return value


def _bounded(name: str, text: Any) -> str:
    if not isinstance(text, str):
        raise _wrong_type(name, "a string")
    if len(text) > TEXT_MAX:
        raise InvalidRequest(
            f"Invalid '{name}': it is {len(text)} characters long, and the maximum is {TEXT_MAX}.",
            _param(name),
            "string_above_max_length",
        )
    return text


def _wrong_type(name: str, expected: str) -> InvalidRequest:
    return InvalidRequest(f"Invalid type for '{name}': expected {expected}.", _param(name), "invalid_type")


def _param(name: str) -> str:
    return name.partition(".")[0]


Reader = Callable[[str, Any, str | None], GrammarSource | None]
OUTPUTS: dict[str, Reader] = {
    "json": _schema,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
    "json_object": _any_object,
}
READERS: dict[str, Reader] = {
    "response_format": _response_format,
    "structured_outputs": _structured_outputs,
    "guided_json": _schema,
    "guided_regex": _regex,
    "guided_choice": _choice,
    "guided_grammar": _grammar,
    "grammar": _grammar,
    "json_schema": _schema,
}
IDLE: dict[str, tuple[Any, ...]] = {"grammar": ("",), "guided_grammar": ("",), "response_format": ({"type": "text"},)}
