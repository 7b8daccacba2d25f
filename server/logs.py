"""JSON lines on standard error: what happened, to which request, how much. Never text, token ids or keys.

What an exception says of itself may quote what a client sent. So a line has its type and where it was raised, and its
own words only where they come from the operating system or, as RuntimeErrors do, from PyTorch.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}
_ROOT = f"{Path(__file__).parents[1]}/"
FRAMES_SHOWN = 24  # of an exception, the innermost
SAID_SHOWN = 200


class JSONFormatter(logging.Formatter):
    """A record's `extra` fields become fields of the line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage().partition("\n")[0],  # asyncio has more to say after it, of what a task held
        }
        line |= {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = list(_chain(record.exc_info[1]))
        return json.dumps(line, default=str)


def _chain(error: BaseException) -> Iterator[dict[str, Any]]:
    """The exception, and those that led to it."""
    cause: BaseException | None = error
    while cause is not None:
        entry: dict[str, Any] = {"type": type(cause).__qualname__}
        if isinstance(cause, OSError) and cause.strerror:
            entry["said"] = cause.strerror
        elif isinstance(cause, RuntimeError):
            entry["said"] = str(cause).partition("\n")[0][:SAID_SHOWN]
        frames = traceback.extract_tb(cause.__traceback__)[-FRAMES_SHOWN:]
        entry["at"] = [f"{_short(frame.filename)}:{frame.lineno} {frame.name}" for frame in frames]
        yield entry
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)


def _short(filename: str) -> str:
    return filename.removeprefix(_ROOT).rpartition("site-packages/")[2]


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    logging.getLogger(__name__).critical("the process ends", exc_info=(kind, error, trace))


def configure(level: str) -> None:
    """For a whole process: what no one catches is a line too."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    # What uvicorn says of starting and stopping, lifecycle says; and a line for whatever is no HTTP is a line too many.
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
