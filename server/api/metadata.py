"""What clients write on their objects for themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import WithJsonSchema

from server.errors import InvalidRequest

PAIRS_MAX = 16
KEY_MAX = 64  # characters
VALUE_MAX = 512
SCHEMA = {
    "type": "object",
    "maxProperties": PAIRS_MAX,
    "additionalProperties": {"type": "string", "maxLength": VALUE_MAX},
}
Metadata = Annotated[Any, WithJsonSchema(SCHEMA)]


def read_metadata(value: Any) -> dict[str, str] | None:
    """Raises InvalidRequest."""
    if value is None:
        return None
    if not isinstance(value, Mapping) or len(value) > PAIRS_MAX or not all(map(_is_pair, value, value.values())):
        raise InvalidRequest(
            f"Invalid 'metadata': {PAIRS_MAX} texts at most, of {VALUE_MAX} characters, with names of {KEY_MAX}.",
            "metadata",
        )
    return dict(value)


def _is_pair(key: str, text: Any) -> bool:
    return 0 < len(key) <= KEY_MAX and isinstance(text, str) and len(text) <= VALUE_MAX
