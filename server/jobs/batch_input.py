"""The lines of a batch's input: read a few at a time, each checked by itself and against those before it.

Knows nothing of what a body means; whoever answers the lines says whether it can.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from pydantic_core import from_json

from server.errors import InvalidRequest

LINES_MAX = 50_000
ERRORS_MAX = 100  # that are shown
ID_LENGTH = 256  # characters of a custom_id
CHUNK_BYTES = 256 << 10  # read at once, or one line if that is longer
REST = 1024  # bytes of a line beside its body


@dataclass(frozen=True, slots=True)
class Line:
    number: int  # from 1, blank ones counted
    raw: bytes | None  # None: longer than a line may be


@dataclass(frozen=True, slots=True)
class Call:
    """What a line asks for."""

    custom_id: str
    body: dict[str, Any]  # without what is null


async def read_lines(path: Path, max_body_bytes: int) -> AsyncGenerator[Line, None]:
    """But for the blank ones. Raises OSError."""
    with path.open("rb") as file:
        number = 0
        while chunk := await asyncio.to_thread(_read_chunk, file, max_body_bytes + REST):
            for raw in chunk:
                number += 1
                if raw is None or raw.strip():
                    yield Line(number, raw)


def _read_chunk(file: BinaryIO, most: int) -> list[bytes | None]:
    """Empty at the end of the file."""
    lines: list[bytes | None] = []
    size = 0
    while size < CHUNK_BYTES and (raw := file.readline(most + 1)):
        lines.append(raw if len(raw) <= most else None)
        size += len(raw)
        while len(raw) > most and not raw.endswith(b"\n"):  # the rest of it is passed over
            raw = file.readline(most + 1)
            size += len(raw)
    return lines


def parse_line(line: Line, endpoint: str) -> Call:
    """Raises InvalidRequest."""
    if line.raw is None:
        raise InvalidRequest("This line is too long.", None, "line_too_long")
    try:
        value = from_json(line.raw.strip(), allow_inf_nan=False)
    except ValueError:
        raise InvalidRequest("This line is not parseable as valid JSON.", None, "invalid_json_line") from None
    if not isinstance(value, dict):
        raise InvalidRequest("This line is no JSON object.", None, "invalid_json_line")
    custom_id, method, url, body = (_member(value, name) for name in ("custom_id", "method", "url", "body"))
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= ID_LENGTH:
        message = f"The custom_id must be a text of 1 to {ID_LENGTH} characters."
        raise InvalidRequest(message, "custom_id", "invalid_custom_id")
    if method != "POST":
        raise InvalidRequest("The method must be POST.", "method", "invalid_method")
    if url != endpoint:
        raise InvalidRequest("The URL of this request is not the endpoint of the batch.", "url", "invalid_url")
    if not isinstance(body, dict):
        raise InvalidRequest("The body of this request must be a JSON object.", "body", "invalid_request")
    return Call(custom_id, {name: item for name, item in body.items() if item is not None})


def _member(value: Mapping[str, Any], name: str) -> Any:
    if value.get(name) is None:
        raise InvalidRequest(f"Missing required parameter: '{name}'.", name, "missing_required_parameter")
    return value[name]


@dataclass(slots=True)
class InputCheck:
    """What is wrong with a file, as it is read."""

    endpoint: str
    total: int = 0
    errors: list[dict[str, Any]] = field(default_factory=list)
    left_out: int = 0  # errors beyond those that are shown
    _seen: set[str] = field(default_factory=set)

    def take(self, line: Line) -> Call | None:
        """None: it is wrong."""
        self.total += 1
        try:
            call = parse_line(line, self.endpoint)
            if call.custom_id in self._seen:
                raise InvalidRequest(
                    "The custom_id for this request is a duplicate of another request. The custom_id parameter must be "
                    "unique for each request in a batch.",
                    "custom_id",
                    "duplicate_custom_id",
                )
        except InvalidRequest as error:
            self.refuse(line.number, error.message, error.param, error.code)
            return None
        self._seen.add(call.custom_id)
        return call

    def refuse(self, number: int | None, message: str, param: str | None, code: str | None) -> None:
        """number: of a line; None: the file as a whole."""
        if len(self.errors) == ERRORS_MAX:
            self.left_out += 1
            return
        self.errors.append({"code": code or "invalid_request", "message": message, "param": param, "line": number})

    def finish(self) -> list[dict[str, Any]]:
        """All that is wrong; empty where nothing is."""
        if not self.total and not self.errors:
            self.refuse(None, "The input file has no requests.", "input_file_id", "empty_file")
        if self.left_out:
            more = {"code": "too_many_errors", "message": f"{self.left_out} more lines are wrong."}
            return [*self.errors, {**more, "param": None, "line": None}]
        return self.errors
