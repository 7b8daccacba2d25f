"""One line, in JSON, with what happened; nothing a client said, even where an exception quotes it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from typing import Any

from server.logs import JSONFormatter

SECRET = "a client's words"


def line_of(error: BaseException | None = None, message: str = "it failed", **extra: Any) -> dict[str, Any]:
    info = None if error is None else (type(error), error, error.__traceback__)
    record = logging.makeLogRecord({"name": "server.x", "levelno": 40, "levelname": "ERROR", "msg": message, **extra})
    record.exc_info = info
    written = JSONFormatter().format(record)
    assert "\n" not in written
    decoded: dict[str, Any] = json.loads(written)
    return decoded


def raised() -> Exception:
    try:
        try:
            raise KeyError(SECRET)
        except KeyError as inner:
            raise ValueError(SECRET) from inner
    except ValueError as error:
        return error


def test_fields() -> None:
    line = line_of(requests=3)
    assert list(line) == ["time", "level", "logger", "message", "requests"]
    assert (line["level"], line["logger"], line["message"], line["requests"]) == ("error", "server.x", "it failed", 3)
    assert line["time"].endswith("+00:00")


def test_an_exception_is_told_by_its_type_and_place() -> None:
    line = line_of(raised())
    assert [each["type"] for each in line["exception"]] == ["ValueError", "KeyError"]
    assert line["exception"][0]["at"][0].startswith("tests/unit/test_logs.py:")
    assert SECRET not in json.dumps(line)


def test_the_operating_system_may_speak() -> None:
    line = line_of(OSError(28, "No space left on device", "/some/where"))
    assert line["exception"] == [{"type": "OSError", "said": "No space left on device", "at": []}]


def test_pytorch_may_speak_one_line() -> None:
    line = line_of(RuntimeError("can't allocate 7 bytes\nand a stack"))
    assert line["exception"][0]["said"] == "can't allocate 7 bytes"


def test_what_follows_the_first_line_of_a_message_is_dropped() -> None:
    assert line_of(message=f"Task exception was never retrieved\n{SECRET}")["message"].endswith("retrieved")


def test_what_nobody_caught_is_a_line_too() -> None:
    script = f"from server import logs; logs.configure('info'); raise ValueError({SECRET!r})"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    (written,) = ended.stderr.splitlines()
    assert json.loads(written)["exception"][0]["type"] == "ValueError"
    assert SECRET not in written
