"""A stream adds up to the whole answer, byte for byte; and whoever leaves is noticed."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import anyio
import pytest
from asking import Api, error_of, events_of, join, make_api
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted import EOS, ScriptedEngine, ScriptedGeneration, tokenizer

from server.api import sse
from server.api.limits import Limits
from server.engine.request import Prompt, Usage

some_tokens = st.lists(st.integers(0, 264) | st.just(EOS), min_size=1, max_size=24)
requests = st.fixed_dictionaries(
    {"prompt": st.lists(some_tokens, min_size=1, max_size=3) | st.text("a th天👍🏽\n", max_size=12)},
    optional={
        "n": st.integers(1, 3),
        "max_tokens": st.integers(1, 24),
        "logprobs": st.integers(0, 5),
        "echo": st.booleans(),
        "stop": st.lists(st.text("a th\ufffdel", min_size=1, max_size=3), max_size=3),
        "include_stop_str_in_output": st.booleans(),
        "skip_special_tokens": st.booleans(),
        "min_tokens": st.just(1),
        "return_token_ids": st.booleans(),
        "return_tokens_as_token_ids": st.booleans(),
    },
)
SHARED = make_api()


@given(requests, some_tokens, st.integers(1, 4))
@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_stream_equals_non_stream(fields: dict[str, Any], tokens: list[int], burst: int) -> None:
    SHARED.engine.script = lambda _prompt, _params: tokens
    SHARED.engine.burst = burst
    whole = SHARED.complete(**fields)
    chunks = SHARED.chunks(stream_options={"include_usage": True}, **fields)
    streamed = join(chunks)
    for choice, parts in zip(whole["choices"], streamed, strict=True):
        assert {name: choice[name] for name in parts} == parts
        _check_shape(choice)
    assert chunks[-1]["usage"] == whole["usage"]
    assert [choice["index"] for choice in whole["choices"]] == list(range(len(whole["choices"])))


def _check_shape(choice: dict[str, Any]) -> None:
    assert choice["finish_reason"] in {"stop", "length"}
    choice["text"].encode()  # no lone surrogate
    if choice["logprobs"] is not None:
        columns = [column for column in choice["logprobs"].values() if column is not None]
        assert len({len(column) for column in columns}) == 1
        values, tops = choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]
        for value, top in zip(values, tops, strict=True) if tops else ():
            assert value is None or value in top.values()


def test_return_token_ids(api: Api) -> None:
    choice = api.complete(prompt="ab", return_token_ids=True)["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([97, 98], list(b"hello"))
    chunks = api.chunks(prompt="ab", return_token_ids=True)
    firsts = [chunk["choices"][0].get("prompt_token_ids") for chunk in chunks]
    assert firsts == [[97, 98], None, None, None, None, None]
    assert [id_ for chunk in chunks for id_ in chunk["choices"][0].get("token_ids", [])] == list(b"hello")


@pytest.mark.parametrize("count", [0, 2])
def test_every_chunk_has_what_was_asked_for(api: Api, count: int) -> None:
    """The last one too: a loop that takes tokens from each chunk meets no null."""
    chunks = api.chunks(prompt="ab", logprobs=count, return_token_ids=True)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [token for choice in choices for token in choice["logprobs"]["tokens"]] == list("hello")
    assert [token for choice in choices for token in choice["token_ids"]] == list(b"hello")
    last = choices[-1]
    assert (last["text"], last["finish_reason"]) == ("", "length")
    assert last["logprobs"] == {
        "tokens": [], "token_logprobs": [], "top_logprobs": [] if count else None, "text_offset": [],
    }  # fmt: skip
    plain = api.chunks(prompt="ab")[-1]["choices"][0]
    assert plain["logprobs"] is None
    assert "token_ids" not in plain


def test_running_usage_counts_the_tokens_told_so_far(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not those that a worker has already made: with speculation that is several steps at once."""
    monkeypatch.setattr(ScriptedGeneration, "usage", property(lambda _: Usage(2, 5, 0)))
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = api.chunks(prompt="ab", stream_options=options)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4, 5, 5, 5]
    assert all(chunk["usage"]["prompt_tokens"] == 2 for chunk in chunks)


def test_prompt_logprobs(api: Api) -> None:
    choice = api.complete(prompt="ab", prompt_logprobs=1)["choices"][0]
    assert choice["prompt_logprobs"] == [
        None,
        {
            "7": {"logprob": -0.25, "rank": 1, "decoded_token": "\x07"},
            "98": {"logprob": -9.098, "rank": 99, "decoded_token": "b"},
        },
    ]
    assert choice["logprobs"] is None


def test_truncate_prompt_tokens(api: Api) -> None:
    api.complete(prompt="abc", truncate_prompt_tokens=2)
    assert api.engine.requests[-1].prompts == [Prompt([98, 99], "bc")]
    api.complete(prompt="x" * 100 + "abc", truncate_prompt_tokens=-1, max_tokens=10)
    assert len(api.engine.requests[-1].prompts[0].token_ids) == 54
    assert api.error(prompt="x" * 100, truncate_prompt_tokens=64)["code"] is not None


def test_long_texts_are_encoded_beside_the_event_loop() -> None:
    api = make_api(limits=Limits(max_model_len=10_001, vocab_size=301))
    text = "天" * 3000 + "x" * 1000 + "!"
    assert api.complete(prompt=text, echo=True, max_tokens=0)["choices"][0]["text"] == text
    assert api.engine.requests[-1].prompts[0].token_ids == tokenizer().encode(text)


def test_salts_divide_the_cache_by_key_and_by_wish() -> None:
    api = make_api(keys={"one": "sk-1", "two": "sk-2"})
    salts = set()
    for key in ("sk-1", "sk-2"):
        for salt in (None, "x", "y"):
            headers = {"authorization": f"Bearer {key}"}
            api.client.post("/v1/completions", json={"prompt": "a", "cache_salt": salt}, headers=headers)
            salts.add((api.engine.requests[-1].key_name, api.engine.requests[-1].salt))
    assert len({salt for _, salt in salts}) == 6
    assert {name for name, _ in salts} == {"one", "two"}
    opened = make_api()
    opened.complete(prompt="a")
    assert opened.engine.requests[-1].salt == b""


def scope_of(method: str = "POST", path: str = "/v1/completions", **headers: str) -> dict[str, Any]:
    return {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": method,
        "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }  # fmt: skip


async def leave_after_a_while(api: Api, body: bytes, *, whole: bool = True) -> list[dict[str, Any]]:
    """A client that sends its request, perhaps half of it, waits a moment, and goes."""
    incoming = iter([{"type": "http.request", "body": body, "more_body": not whole}])
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        for message in incoming:
            return message
        await asyncio.sleep(0.05)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    with anyio.fail_after(5):
        await api.client.app(scope_of(), receive, send)
    return sent


@pytest.mark.parametrize("stream", [False, True])
def test_23_a_client_that_leaves_frees_what_it_held(stream: bool) -> None:
    api = make_api(ScriptedEngine(hangs=True))
    body = json.dumps({"prompt": ["a", "b"], "n": 2, "stream": stream}).encode()
    sent = asyncio.run(leave_after_a_while(api, body))
    assert api.engine.closed == [request.id for request in api.engine.requests]
    assert api.client.get("/load").json() == {"server_load": 0}
    assert api.answers[0] == ("/v1/completions", 200 if stream else 499)
    assert bool(sent) is stream


def test_23_a_client_that_leaves_in_its_body_starts_nothing() -> None:
    api = make_api()
    assert asyncio.run(leave_after_a_while(api, b'{"prompt"', whole=False)) == []
    assert not api.engine.requests
    assert api.answers == [("/v1/completions", 499)]


def exchange(api: Api, messages: list[dict[str, Any]], **headers: str) -> tuple[int, dict[bytes, bytes], bytes]:
    incoming = iter(messages)
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        for message in incoming:
            return message
        await asyncio.sleep(5)
        raise AssertionError("read on")

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(api.client.app(scope_of(**headers), receive, send))
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(message.get("body", b"") for message in sent[1:])


def test_a_body_is_counted_while_it_is_read() -> None:
    """Without a Content-Length, in tiny pieces, and never read to its end."""
    api = make_api(limits=Limits(max_model_len=64, vocab_size=301, max_body_bytes=100))
    pieces = [{"type": "http.request", "body": b" ", "more_body": True}] * 101
    status, headers, body = exchange(api, pieces)
    assert status == 413
    assert b"connection" not in headers
    assert json.loads(body)["error"]["code"] == "body_too_large"
    assert exchange(api, [], content_length="101")[0] == 413
    assert exchange(api, [], content_length="9" * 30)[0] == 413
    pieces = [{"type": "http.request", "body": b'{"prompt":"a"}', "more_body": True}, {"type": "http.request"}]
    assert exchange(api, pieces)[0] == 200


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    api = make_api(limits=Limits(max_model_len=64, vocab_size=301, body_timeout=0.02))
    status, headers, body = exchange(api, [{"type": "http.request", "body": b"{", "more_body": True}])
    assert (status, headers[b"connection"]) == (408, b"close")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_a_silent_stream_is_kept_alive_by_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "PING_SECONDS", 0.01)
    api = make_api(ScriptedEngine(hangs=True))
    sent = asyncio.run(leave_after_a_while(api, b'{"prompt": "a", "stream": true}'))
    bodies = [message["body"] for message in sent[1:]]
    assert bodies[0].startswith(b"data: {")
    assert b": ping\n\n" in bodies
    assert set(bodies[1:]) <= {b": ping\n\n", b""}


def test_a_stream_outlives_the_signal_to_stop() -> None:
    """The drain decides when streams end. sse-starlette would end them when uvicorn is told to exit."""
    from sse_starlette.sse import AppStatus  # noqa: PLC0415

    assert AppStatus.enable_automatic_graceful_drain is False


def test_failures_are_counted_under_their_route(api: Api) -> None:
    api.post(prompt="a")
    api.post(prompt=[])
    api.client.get("/nowhere/at/all")
    error_of(api.client.get("/v1/models/x/y/z"), 404)
    assert api.answers == [
        ("/v1/completions", 200), ("/v1/completions", 400), ("unmatched", 404), ("/v1/models/{model_id:path}", 404),
    ]  # fmt: skip


def test_events_are_data_lines_only(api: Api) -> None:
    api.engine.script = lambda _prompt, _params: list("a\n\ndata: x\r\n\u2028b".encode())
    events = events_of(api.post(prompt="a", stream=True, max_tokens=40).text)
    assert "".join(json.loads(data)["choices"][0]["text"] for data in events[:-1]) == "a\n\ndata: x\r\n\u2028b"
