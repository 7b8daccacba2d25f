"""A JSON body to a typed one, and what is wrong with it in OpenAI's words. It knows the fields of no route.

Messages show numbers and kinds, never text that the client sent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import from_json

from server.api.schemas import INT64_MAX, Wire
from server.errors import InvalidRequest

NOT_JSON = (
    "We could not parse the JSON body of your request. (HINT: This likely means you aren't using your HTTP library "
    "correctly. The API expects a JSON payload, but what was sent was not valid JSON.)"
)
EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "a boolean",
    "string_type": "a string",
    "dict_type": "an object",
    "list_type": "an array",
    "model_type": "an object",
}
BOUNDS = {
    "greater_than": ("gt", "below minimum value", ">", "below_min_value"),
    "greater_than_equal": ("ge", "below minimum value", ">=", "below_min_value"),
    "less_than_equal": ("le", "above maximum value", "<=", "above_max_value"),
}
IGNORED_SHOWN = 16

Body = TypeVar("Body", bound=Wire)


def read_object(raw: bytes) -> dict[str, Any]:
    """One JSON object in UTF-8, without what is null. Of duplicate keys the last counts, as everywhere in JSON."""
    try:
        value = from_json(raw, allow_inf_nan=False)
    except ValueError:
        raise InvalidRequest(NOT_JSON) from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"The body of the request must be a JSON object, but it is {_kind(value)}.")
    return {name: item for name, item in value.items() if item is not None}


def read_body_fields(body: type[Body], fields: Mapping[str, Any]) -> Body:
    """Raises InvalidRequest."""
    known = {name: fields[name] for name in body.model_fields if name in fields}
    options = known.get("stream_options")
    if isinstance(options, dict):  # the one object inside: null is omitted there too
        known["stream_options"] = {name: item for name, item in options.items() if item is not None}
    try:
        return body.model_validate(known)
    except ValidationError as error:
        raise _explain(error) from None


def unknown_fields(fields: Iterable[str], body: type[Wire], known: frozenset[str] = frozenset()) -> tuple[str, ...]:
    """A few names at most, safe to show."""
    unknown = (name for name in fields if name not in body.model_fields and name not in known)
    return tuple(shown_name(name) for name in islice(unknown, IGNORED_SHOWN))


def shown_name(name: str) -> str:
    """With only those characters that may stand in a header. A header that ends in a space is refused by h11."""
    return re.sub(r"[^A-Za-z0-9_.-]", "?", name[:64]) or "?"


def ignored_header(names: Iterable[str]) -> dict[str, str]:
    """What an answer says of the fields that changed nothing in it."""
    shown = ", ".join(names)
    return {"x-ignored-fields": shown} if shown else {}


def _explain(error: ValidationError) -> InvalidRequest:
    """The first thing pydantic found, in OpenAI's words. Shows numbers and kinds, never text the client sent."""
    first = error.errors(include_url=False)[0]
    kind, value = first["type"], first["input"]
    param = str(first["loc"][0])
    whole = param in {"logit_bias", "early_stopping"}  # its keys are the client's own text, or it has several types
    name = param if whole else ".".join(map(str, first["loc"]))
    if kind == "missing":
        return InvalidRequest(f"Missing required parameter: '{name}'.", param, "missing_required_parameter")
    if kind == "extra_forbidden":
        *within, last = map(str, first["loc"])
        return InvalidRequest(
            f"Unknown parameter: '{'.'.join([*within, shown_name(last)])}'.", param, "unknown_parameter"
        )
    if kind in EXPECTED and not is_huge(value):
        expected = f"expected {EXPECTED[kind]}, but got {_kind(value)} instead."
        return InvalidRequest(f"Invalid type for '{name}': {expected}", param, "invalid_type")
    if kind in BOUNDS:
        bound, what, sign, code = BOUNDS[kind]
        return _out_of_range(name, param, what, sign, first["ctx"][bound], value, code)
    wanted = first["msg"].removeprefix("Input should ").removeprefix("String should ")
    return InvalidRequest(f"Invalid value for '{name}': it should {wanted}.", param, "invalid_value")


def _out_of_range(name: str, param: str, what: str, sign: str, bound: float, value: Any, code: str) -> InvalidRequest:
    """bound: an int of an integer field, a float of any other number's."""
    kind = "decimal" if isinstance(bound, float) else "integer"
    limit = f"{bound:.15g}" if isinstance(bound, float) else str(bound)
    shown = "a number beyond 64 bits" if is_huge(value) else f"{value}"
    return InvalidRequest(
        f"Invalid '{name}': {kind} {what}. Expected a value {sign} {limit}, but got {shown} instead.",
        param,
        f"{kind}_{code}",
    )


def is_huge(value: Any) -> bool:
    """No 64-bit integer: what Python would show of it may be very long."""
    return type(value) is int and abs(value) > INT64_MAX + 1


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "a boolean"
    names = {int: "an integer", float: "a decimal", str: "a string", list: "an array", dict: "an object"}
    return names.get(type(value), "null")


def bound_size(name: str, value: Any, most: int) -> None:
    """Raises InvalidRequest where an array or an object holds more than that."""
    if isinstance(value, list | dict) and len(value) > most:
        what = "array" if isinstance(value, list) else "object"
        raise InvalidRequest(
            f"Invalid '{name}': {what} too long. Expected an {what} with maximum length {most}, but got an {what} "
            f"with length {len(value)} instead.",
            name,
            f"{what}_above_max_length",
        )


def at_most(name: str, value: int | None, most: int) -> None:
    """Raises InvalidRequest."""
    if value is not None and value > most:
        _, what, sign, code = BOUNDS["less_than_equal"]
        raise _out_of_range(name, name, what, sign, most, value, code)
