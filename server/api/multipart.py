"""Reading a form that brings a file (RFC 7578), as it comes: small fields are kept, the file goes where it is told to.

starlette's own form would put the file into a temporary one, of any size, before anybody has seen it.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import anyio
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.datastructures import Headers
from starlette.types import Receive

from server.api.body import ClientGone
from server.errors import BodyTimeout, InvalidRequest

FIELDS_MAX = 32
FIELD_BYTES_MAX = 64 << 10  # of all fields together
BYTES_PER_SECOND = 16 << 10  # an upload has to be this fast, once its first seconds are over
NOT_A_FORM = "The body of the request must be a multipart form with a 'file' and its 'purpose'."


class Sink(Protocol):
    async def write(self, data: bytes) -> None: ...


@dataclass(slots=True)
class Form:
    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None  # of the part named `file`; None: it has not come


@dataclass(slots=True)
class _Part:
    name: str = ""
    is_file: bool = False


async def read_form(headers: Headers, chunks: AsyncIterator[bytes], sink: Sink) -> Form:
    """The part named `file` is written to the sink. Raises InvalidRequest, and what reading or writing raises."""
    kind, options = parse_options_header(headers.get("content-type", ""))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise InvalidRequest(NOT_A_FORM)
    reader = _Reader()
    try:
        parser = MultipartParser(options[b"boundary"], reader.callbacks)
        async for chunk in chunks:
            parser.write(chunk)
            for data in reader.take():
                await sink.write(data)
        parser.finalize()
    except FormParserError:
        raise InvalidRequest(NOT_A_FORM) from None
    if not reader.ended:
        raise InvalidRequest(NOT_A_FORM)
    return reader.form


async def body_chunks(receive: Receive, patience: float) -> AsyncIterator[bytes]:
    """patience: seconds, beyond the time that so many bytes may take. Raises BodyTimeout or ClientGone."""
    began, received, more = time.monotonic(), 0, True
    while more:
        left = began + patience + received / BYTES_PER_SECOND - time.monotonic()
        with anyio.move_on_after(left) as scope:
            message = await receive()
        if scope.cancelled_caught:
            raise BodyTimeout("The body of the request did not arrive in time.")
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk = message.get("body", b"")
        received += len(chunk)
        more = message.get("more_body", False)
        yield chunk


class _Reader:
    """What the parser calls. It cannot wait for anybody, so the file's bytes are fetched from here after each chunk."""

    def __init__(self) -> None:
        self.form = Form()
        self.ended = False
        self._part = _Part()
        self._header, self._value = bytearray(), bytearray()
        self._text = bytearray()
        self._texts_size = 0
        self._pending: list[bytes] = []

    @property
    def callbacks(self) -> Any:
        names = ("part_begin", "part_data", "part_end", "header_field", "header_value", "header_end", "end")
        return {f"on_{name}": getattr(self, f"_{name}") for name in names}

    def take(self) -> list[bytes]:
        pending, self._pending = self._pending, []
        return pending

    def _part_begin(self) -> None:
        self._part, self._text = _Part(), bytearray()

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        name, value = bytes(self._header).lower(), bytes(self._value)
        self._header, self._value = bytearray(), bytearray()
        if name == b"content-disposition":
            self._describe(parse_options_header(value)[1])

    def _describe(self, options: dict[bytes, bytes]) -> None:
        self._part.name = options.get(b"name", b"").decode("utf-8", "replace")
        if self._part.name == "file" and b"filename" in options:
            if self.form.filename is not None:
                raise InvalidRequest("One file at a time can be uploaded.", "file")
            self._part.is_file = True
            self.form.filename = options[b"filename"].decode("utf-8", "replace")

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._part.is_file:
            self._pending.append(data[start:end])
            return
        self._texts_size += end - start
        if self._texts_size > FIELD_BYTES_MAX:
            raise InvalidRequest("The form has fields that are too long.")
        self._text += data[start:end]

    def _part_end(self) -> None:
        if not self._part.is_file:
            self.form.fields[self._part.name] = self._text.decode("utf-8", "replace")
            if len(self.form.fields) > FIELDS_MAX:
                raise InvalidRequest("The form has too many fields.")

    def _end(self) -> None:
        self.ended = True
