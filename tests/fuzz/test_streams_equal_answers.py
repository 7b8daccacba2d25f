"""Whatever is asked: the stream, joined, is the answer, byte for byte: text, logprobs, offsets, ids, ends and usage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from requests_drawn import requests_drawn
from serving import RunningServer, serving


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[RunningServer]:
    with serving(tiny, "--threads", "1") as running:
        yield running


def joined(chunks: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The choices a stream's chunks add up to, and its usage."""
    *chunks, last = chunks
    assert last["choices"] == []
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in [*chunks, last]}) == 1
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        assert chunk["usage"] is None
        (piece,) = chunk["choices"]
        whole = choices.setdefault(piece["index"], {"index": piece["index"], "text": "", "finish_reason": None})
        assert whole["finish_reason"] is None, "a chunk after a choice's last"
        whole["text"] += piece.pop("text")
        _join_rows(whole, piece)
        whole.update({name: piece[name] for name in ("finish_reason", "stop_reason") if piece.get(name) is not None})
    return [choices[index] for index in sorted(choices)], last["usage"]


def _join_rows(whole: dict[str, Any], piece: dict[str, Any]) -> None:
    if "prompt_token_ids" in piece:
        assert "prompt_token_ids" not in whole
        whole["prompt_token_ids"] = piece["prompt_token_ids"]
    if "token_ids" in piece:
        whole["token_ids"] = whole.get("token_ids", []) + piece["token_ids"]
    if piece["logprobs"] is not None:
        before = whole.get("logprobs") or {name: [] for name in piece["logprobs"]}
        whole["logprobs"] = {
            name: None if column is None else before[name] + column for name, column in piece["logprobs"].items()
        }


def check(server: RunningServer, request: dict[str, Any]) -> None:
    whole = server.complete(**request)
    choices, usage = joined(list(server.stream(**request, stream_options={"include_usage": True})))
    expected = [{name: value for name, value in choice.items() if value is not None} for choice in whole["choices"]]
    assert [{name: value for name, value in choice.items() if value is not None} for choice in choices] == expected
    for each in (usage, whole["usage"]):
        each.pop("prompt_tokens_details")  # the second finds in the cache what the first left there
    assert usage == whole["usage"]


_quietly = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=False)


@settings(_quietly, max_examples=100)
@given(request=requests_drawn())
def test_streams_equal_answers(server: RunningServer, request: dict[str, Any]) -> None:
    check(server, request)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(_quietly, max_examples=2000)
@given(request=requests_drawn())
def test_two_thousand_streams_equal_answers(server: RunningServer, request: dict[str, Any]) -> None:
    check(server, request)
