"""The files of a model directory, opened in one way: a regular file within the size stated for its kind, or one line
that says why not. Imports no torch.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

CONFIG_BYTES = 1 << 20  # config.json, adapter_config.json, the index of shards
VOCABULARY_BYTES = 64 << 20
ADAPTER_BYTES = 4 << 30
WEIGHTS_BYTES = 64 << 30  # of one file
HEADER_BYTES = 16 << 20  # of a safetensors file: names, dtypes, shapes and offsets

Refused = Callable[[str], Exception]  # makes the error of whoever reads the file


@contextmanager
def opened(path: Path, at_most: int, refused: Refused) -> Iterator[BinaryIO]:
    """Raises refused(message) where it is no regular file of at most so many bytes, or cannot be read. The message
    names the file, never its path."""
    try:
        # Without O_NONBLOCK, to open a FIFO waits for somebody who writes to it.
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC), "rb")
        with file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise refused(f"cannot read {path.name}: it is not a regular file")
            if status.st_size > at_most:
                raise refused(f"{path.name} is larger than {at_most} bytes")
            yield file
    except IsADirectoryError:  # as Python opens no directory
        raise refused(f"cannot read {path.name}: it is not a regular file") from None
    except OSError as error:
        raise refused(f"cannot read {path.name}: {error.strerror}") from error


def read_bytes(path: Path, at_most: int, refused: Refused) -> bytes:
    with opened(path, at_most, refused) as file:
        data = file.read(at_most + 1)
    if len(data) > at_most:  # it grew, or its file system states no size
        raise refused(f"{path.name} is larger than {at_most} bytes")
    return data


def read_text(path: Path, at_most: int, refused: Refused) -> str:
    """As UTF-8, line ends as "\\n"."""
    try:
        text = read_bytes(path, at_most, refused).decode("utf-8")
    except UnicodeDecodeError as error:
        raise refused(f"{path.name} is not UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path, at_most: int, refused: Refused) -> object:
    data = read_bytes(path, at_most, refused)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise refused(f"{path.name} is not JSON") from error


def read_object(path: Path, at_most: int, refused: Refused) -> dict[str, Any]:
    """A JSON object."""
    value = read_json(path, at_most, refused)
    if not isinstance(value, dict):
        raise refused(f"{path.name} is not a JSON object")
    return value


def check_safetensors(path: Path, at_most: int, refused: Refused) -> None:
    """That the library may open it by its path: it holds a header's offsets against each other and the file's size,
    but it waits for a FIFO, and reads a header of any length.

    See https://huggingface.co/docs/safetensors: 8 bytes give the length of the JSON header that follows them.
    """
    with opened(path, at_most, refused) as file:
        length = int.from_bytes(file.read(8), "little")
    if length > HEADER_BYTES:
        raise refused(f"{path.name} is damaged or no safetensors file: its header is larger than {HEADER_BYTES} bytes")


def is_file(path: Path) -> bool:
    """False too where nobody may look."""
    try:
        return path.is_file()
    except OSError:
        return False
