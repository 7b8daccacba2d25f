"""Random JSON schemas and regexes, of the kinds people write, each a function of its random numbers."""

from __future__ import annotations

from random import Random
from typing import Any

NAMES = ["name", "age", "tags", "a b", "ключ", "x1", 'quote"d', "nested"]
FORMATS = ["date", "time", "uuid", "ipv4"]


def random_schema(chance: Random, depth: int = 3) -> dict[str, Any]:
    kinds = [_text, _integer, _number, _simple, _enum]
    if depth:
        kinds += [_object, _object, _array, _any_of]
    return chance.choice(kinds)(chance, depth)


def _text(chance: Random, _: int) -> dict[str, Any]:
    return chance.choice([
        {"type": "string", "maxLength": chance.randrange(1, 20)},
        {"type": "string", "minLength": 2, "maxLength": 9},
        {"type": "string", "pattern": "^[a-z]{1,6}(-[0-9]+)?$"},
        {"type": "string", "format": chance.choice(FORMATS)},
    ])  # fmt: skip


def _integer(chance: Random, _: int) -> dict[str, Any]:
    low = chance.randrange(-1000, 1000)
    bounds = {"minimum": low, "maximum": low + chance.randrange(0, 2000)}
    return {"type": "integer", **{key: bound for key, bound in bounds.items() if chance.random() < 0.8}}


def _number(chance: Random, _: int) -> dict[str, Any]:
    low = chance.randrange(-50, 50)
    return {"type": "number", "minimum": low, "exclusiveMaximum": low + chance.randrange(1, 100)}


def _simple(chance: Random, _: int) -> dict[str, Any]:
    return chance.choice(
        [{"type": "boolean"}, {"type": "null"}, {"const": 'ünï "c" \n'}, {"type": ["boolean", "null"]}]
    )


def _enum(chance: Random, _: int) -> dict[str, Any]:
    return {"enum": chance.sample(["red", "green", 7, 2.5, None, True, "日本", {"a": [1]}], chance.randrange(1, 5))}


def _object(chance: Random, depth: int) -> dict[str, Any]:
    names = chance.sample(NAMES, chance.randrange(0, 5))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: random_schema(chance, depth - 1) for name in names},
        "required": [name for name in names if chance.random() < 0.7],
    }
    if chance.random() < 0.7:
        schema["additionalProperties"] = chance.choice([False, {"type": "integer"}])
    return schema


def _array(chance: Random, depth: int) -> dict[str, Any]:
    least = chance.randrange(0, 3)
    bounds = {"minItems": least, "maxItems": least + chance.randrange(0, 3)}
    return {"type": "array", "items": random_schema(chance, depth - 1), **bounds}


def _any_of(chance: Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [random_schema(chance, depth - 1) for _ in range(chance.randrange(1, 4))]}


ATOMS = ["a", "xyz", "[a-f]", "[^\\W\\d_]", "\\d", "\\w", "\\s", "é", "\\.", "\\[", "/", '"', "日", "[0-9a-f]", " "]
REPEATS = ["", "", "", "?", "*", "+", "{2}", "{1,4}", "{0,3}"]


def random_regex(chance: Random, depth: int = 3) -> str:
    """Python's syntax and Rust's, with the same meaning in both when \\d, \\w and \\s are ASCII."""
    parts = []
    for _ in range(chance.randrange(1, 4)):
        if depth and chance.random() < 0.4:
            inner = "|".join(random_regex(chance, depth - 1) for _ in range(chance.randrange(1, 4)))
            parts.append(f"({chance.choice(['', '?:'])}{inner})" + chance.choice(REPEATS))
        else:
            parts.append(chance.choice(ATOMS) + chance.choice(REPEATS))
    return "".join(parts)
