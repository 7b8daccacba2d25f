"""What no error body may say: where our files are, what our memory looks like, what the interpreter said."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

FORBIDDEN = re.compile(
    r"0x[0-9a-f]{4,}|Traceback|File \"|site-packages|\.py\b|object at|<class|pydantic|starlette|Exception\b|Error:"
)
PLACES = [str(Path.home()), str(Path(__file__).parents[1]), "/usr/", "/home/", "/root", "/tmp", "/proc"]
OURS = re.compile(
    r"The model `.*` does not exist|Invalid URL \(.*\)|Not allowed to .* on .*?\. \(HINT|/v1/[a-z/]+|/wake_up",
    re.DOTALL,
)


def check_message(message: str) -> None:
    """A URL is the client's own, or one of ours, and so is a model's name; any other slash would be a path."""
    said = OURS.sub("", message)
    assert not FORBIDDEN.search(said), message
    assert not any(place in said for place in PLACES), message
    assert "/" not in said, message


def check_error(body: str | bytes) -> dict[str, Any]:
    """Four keys, and nothing in them that is none of a client's business."""
    decoded = json.loads(body)
    assert decoded.keys() == {"error"}, body
    error: dict[str, Any] = decoded["error"]
    assert error.keys() == {"message", "type", "param", "code"}, body
    assert error["param"] is None or isinstance(error["param"], str), body
    assert error["code"] is None or re.fullmatch(r"[a-z0-9_]+", error["code"]), body
    check_message(error["message"])
    return error
