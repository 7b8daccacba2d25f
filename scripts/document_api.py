"""Writes the tables of fields into docs/api.md, from the very schemas that requests are read with.

    python scripts/document_api.py [--print]

Between `<!-- fields: NAME -->` and `<!-- end -->` the page is ours; the rest is written by hand.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from server.api.batches import BatchBody
from server.api.chat_schemas import ChatBody
from server.api.fine_tuning_schemas import (
    DistillationBody,
    FineTuneBody,
    FineTuningBody,
    HyperparametersBody,
    SupervisedBody,
)
from server.api.limits import Limits
from server.api.schemas import (
    StreamOptions,
    completion_schema,
    detokenize_schema,
    embedding_schema,
    request_schema,
    tokenize_schema,
)

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
SECTION = re.compile(r"(<!-- fields: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
LIMITS = Limits(max_model_len=1024, vocab_size=50257)
SCHEMAS: dict[str, dict[str, Any]] = {
    "completions": completion_schema(LIMITS),
    "stream_options": request_schema(StreamOptions),
    "chat": request_schema(ChatBody),
    "fine_tuning": request_schema(FineTuningBody),
    "supervised": request_schema(SupervisedBody),
    "distillation": request_schema(DistillationBody),
    "hyperparameters": request_schema(HyperparametersBody),
    "fine_tune": request_schema(FineTuneBody),
    "embeddings": embedding_schema(LIMITS),
    "batches": request_schema(BatchBody),
    "tokenize": tokenize_schema(),
    "detokenize": detokenize_schema(LIMITS),
}
BOUNDS = (
    ("minimum", "≥ {}"), ("exclusiveMinimum", "> {}"), ("maximum", "≤ {}"), ("minLength", "at least {} characters"),
    ("maxLength", "at most {} characters"), ("minItems", "at least {} items"), ("maxItems", "at most {} items"),
    ("maxProperties", "at most {} entries"), ("pattern", "`{}`"),
)  # fmt: skip


def page(text: str) -> str:
    """The page with its tables made anew."""
    return SECTION.sub(lambda found: found[1] + table(SCHEMAS[found[2]]) + found[3], text)


def table(schema: dict[str, Any]) -> str:
    rows = ["| field | type and range | default | |", "| --- | --- | --- | --- |"]
    for name, field in schema["properties"].items():
        options = [option for option in field.get("anyOf", [field]) if option != {"type": "null"}]
        kinds = " or ".join(dict.fromkeys(_kind(option) for option in options))
        required = name in schema.get("required", ())
        default = "required" if required else f"`{json.dumps(field.get('default'))}`"
        rows.append(f"| `{name}` | {_cell(kinds)} | {default} | {_cell(field.get('description', ''))} |")
    return "\n".join(rows) + "\n"


def _kind(option: dict[str, Any]) -> str:
    if "enum" in option or "const" in option:
        return ", ".join(f"`{json.dumps(value)}`" for value in option.get("enum", [option.get("const")]))
    kind = str(option.get("type", "any"))
    if kind == "array" and "items" in option:
        inner = _kind(option["items"])
        kind = f"array of ({inner})" if " " in inner else f"array of {inner}"
    bounds = [text.format(_number(option[name])) for name, text in BOUNDS if name in option]
    return f"{kind} {', '.join(bounds)}" if bounds else kind


def _number(value: object) -> str:
    names = {2**63 - 1: "2⁶³ - 1", -(2**63): "-2⁶³", 2**31 - 1: "2³¹ - 1", -(2**31): "-2³¹"}
    return names.get(value, str(value)) if isinstance(value, int) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    made = page(PAGE.read_text("utf-8"))
    if "--print" in sys.argv:
        sys.stdout.write(made)
    else:
        PAGE.write_text(made, "utf-8")
