"""The traps that other servers fell into, one test each, as far as they lie above the engine. Numbered as the
list of promises numbers them: how the answer is given (15 to 30)."""

from __future__ import annotations

import json

import pytest
from asking import Api, error_of, events_of, join, make_api
from scripted import VOCAB_SIZE, ScriptedEngine, says

from server.api.limits import Limits
from server.errors import EngineError, Overloaded, RateLimited


def test_15_the_shape_of_a_stream(api: Api) -> None:
    response = api.post(prompt="a", stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    *events, done = events_of(response.text)
    assert done == "[DONE]"
    assert all(events)
    assert '"error"' not in response.text
    choices = [json.loads(data)["choices"][0] for data in events]
    assert [(choice["text"], choice["finish_reason"]) for choice in choices] == [
        *[(letter, None) for letter in "hello"], ("", "length"),
    ]  # fmt: skip


def test_15_no_line_is_longer_than_old_clients_can_read() -> None:
    context = 6000
    from_long = make_api(limits=Limits(max_model_len=context, vocab_size=VOCAB_SIZE))
    prompt = "\x00é" * (context // 3 - 10)
    response = from_long.post(prompt=prompt, stream=True, echo=True, logprobs=20, max_tokens=1)
    events = events_of(response.text)
    assert max(len(data.encode()) for data in events) < 128 << 10
    streamed = join([json.loads(data) for data in events[:-1]])
    whole = from_long.complete(prompt=prompt, echo=True, logprobs=20, max_tokens=1)["choices"][0]
    assert streamed[0] == whole


def test_16_usage_is_null_on_chunks_only_when_asked_for(api: Api) -> None:
    assert not any("usage" in chunk for chunk in api.chunks(prompt="a"))
    without = api.chunks(prompt="a", stream_options={"continuous_usage_stats": True})
    assert not any("usage" in chunk for chunk in without)
    *chunks, last = api.chunks(prompt="a", stream_options={"include_usage": True})
    assert {chunk["usage"] for chunk in chunks} == {None}
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 6
    assert {key: last[key] for key in ("id", "object", "created", "model")} == {
        key: chunks[0][key] for key in ("id", "object", "created", "model")
    }
    running = api.chunks(prompt="a", stream_options={"include_usage": True, "continuous_usage_stats": True})
    assert [chunk["usage"]["completion_tokens"] for chunk in running] == [1, 2, 3, 4, 5, 5, 5]


@pytest.mark.parametrize("script", [says("ab"), says("abX", eos=False)])
def test_17_an_end_on_the_last_allowed_token_is_a_stop(api: Api, script: object) -> None:
    api.engine.script = script  # type: ignore[assignment]
    choice = api.complete(prompt="a", max_tokens=3, stop="X")["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "stop")


def test_18_the_error_object_on_every_path(api: Api) -> None:
    client = api.client
    assert error_of(client.get("/nowhere"), 404)["message"] == "Invalid URL (GET /nowhere)"
    response = client.get("/v1/completions")
    assert "POST" in response.headers["allow"]
    assert error_of(response, 405)["message"].startswith("Not allowed to GET on /v1/completions. (HINT: ")
    error_of(client.post("/v1/models"), 405)
    error_of(client.get("/v1/models/none"), 404)
    error_of(client.get("/v1/engines/none"), 404)
    error_of(client.post("/v1/chat/completions", json={"messages": []}), 400)
    big = client.post("/v1/completions", content=b" " * ((1 << 20) + 1))
    assert error_of(big, 413)["type"] == "invalid_request_error"
    api.engine.refusal = KeyError("/secret/path")
    error = error_of(api.post(prompt="a"), 500)
    assert (error["type"], error["code"]) == ("server_error", None)
    assert "secret" not in error["message"]


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"5", b"null", b'"a"', b'{"temperature": NaN}', b'{"temperature": Infinity}', b'{"n": -Infinity}',
    b'{"temperature": 1e999}', b'{"prompt": "\\ud83d"}', b'{"\\ud83d": 1}', b'{"user": "\\udc00"}',
    b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b'{"max_tokens": ' + b"9" * 5000 + b"}",
    b'{"max_tokens": 9223372036854775808}', b'{"max_tokens": ' + b"9" * 4000 + b"}",
    b'{"temperature": ' + b"9" * 4000 + b"}", b'{"seed": 9223372036854775808}', b'{"prompt": "\xff"}',
    b"\xef\xbb\xbf{}", '{"prompt": "a"}'.encode("utf-16"), b'{"max_tokens": "7"}', b'{"max_tokens": true}',
    b'{"max_tokens": 1.5}',
    b'{"temperature": true}', b'{"stream": 1}', b'{"stream": "true"}', b'{"stop": [null]}', b'{"n": 0}', b'{"n": 129}',
    b'{"logit_bias": {"a": 1}}', b'{"logit_bias": {"-1": 1}}', b'{"logit_bias": [1]}', b'{"model": 5}', b"{}trailing",
], ids=lambda body: ascii(body[:24]))  # fmt: skip
def test_18_hostile_bodies_are_400(api: Api, body: bytes) -> None:
    error = error_of(api.client.post("/v1/completions", content=body), 400)
    assert error["type"] == "invalid_request_error"
    assert not api.engine.requests


def test_18_many_unknown_keys_are_named_up_to_a_bound(api: Api) -> None:
    body = json.dumps({"prompt": "a", **{f"key\n{i}": None if i % 2 else i for i in range(50_000)}})
    response = api.client.post("/v1/completions", content=body)
    assert response.status_code == 200
    ignored = response.headers["x-ignored-fields"].split(", ")
    assert len(ignored) == 16
    assert ignored[0] == "key?0"


def test_19_refusals_come_before_the_headers_and_failures_after_them_are_an_event(api: Api) -> None:
    assert error_of(api.post(stream=True, prompt="a", max_tokens=-1), 400)
    api.engine.refusal = Overloaded("busy")
    assert error_of(api.post(stream=True, prompt="a"), 503)
    api.engine.refusal = None
    for failure, code in ((EngineError(), "engine_error"), (ValueError("/secret"), None)):
        api.engine.failure, api.engine.fails_after = failure, 2
        response = api.post(stream=True, prompt="a")
        assert response.status_code == 200
        *chunks, last = events_of(response.text)
        assert len(chunks) == 2
        error = json.loads(last)["error"]
        assert (error["type"], error["code"]) == ("server_error", code)
        assert "secret" not in response.text
        assert "[DONE]" not in response.text
    api.engine.failure, api.engine.fails_after = EngineError(), 2
    assert error_of(api.post(prompt="a"), 500)["code"] == "engine_error"


@pytest.mark.parametrize(("path", "served"), [
    ("/v1/engines/text-davinci-002/completions", True), ("/v1/engines/openai-community%2Fgpt2/completions", True),
    ("/v1/engines/openai-community/gpt2/completions", True), ("/v1/engines/a+b/completions", True),
    ("/engines/gpt2/completions", True), ("/completions", True), ("/v1/engines/none/completions", False),
])  # fmt: skip
def test_20_routes_to_the_model(api: Api, path: str, served: bool) -> None:
    response = api.post(path, prompt="a")
    if served:
        assert response.json()["model"] == response.headers["openai-model"] == "gpt2"
    else:
        assert error_of(response, 404)["code"] == "model_not_found"


def test_20_models_answer_without_a_redirect(api: Api) -> None:
    for path in ("/v1/models", "/v1/engines", "/v1/models/openai-community%2Fgpt2", "/v1/models/openai-community/gpt2"):
        assert api.client.get(path, follow_redirects=False).status_code == 200
    data = api.client.get("/v1/models").json()["data"]
    assert [(entry["id"], entry["root"], entry["parent"]) for entry in data[:2]] == [
        ("gpt2", "gpt2", None), ("text-davinci-002", "gpt2", "gpt2"),
    ]  # fmt: skip


def test_21_keys() -> None:
    opened = make_api().client
    assert opened.get("/v1/models", headers={"authorization": "Bearer "}).status_code == 200
    client = make_api(keys={"a": "sk-first", "b": "sk-second"}).client
    assert client.get("/health").status_code == client.get("/ready").status_code == 200
    assert client.options("/v1/completions").status_code == 405
    for path in ("/v1/models", "/metrics", "/tokenizer_info", "/version", "/openapi.json", "/nowhere", "/ping"):
        assert error_of(client.get(path), 401)["code"] is None
        wrong = client.get(path, headers={"authorization": "Bearer sk-third"})
        assert error_of(wrong, 401)["code"] == "invalid_api_key"
        assert "third" not in wrong.text
    for headers in (
        {"authorization": "Bearer sk-first"}, {"authorization": "bearer  sk-second "}, {"x-api-key": "sk-first"},
    ):  # fmt: skip
        assert client.get("/v1/models", headers=headers).status_code == 200
    for headers in ({"authorization": "Basic sk-first"}, {"authorization": "sk-first"}, {"authorization": "Bearer "}):
        assert client.get("/v1/models", headers=headers).status_code == 401
    assert client.get("/v1/models", headers={"host": "x/health?"}).status_code == 401  # CVE-2026-48746


def test_21_cors_is_off_until_asked_for() -> None:
    preflight = {"origin": "https://a.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in make_api().client.options("/v1/completions", headers=preflight).headers
    client = make_api(keys={"a": "sk-first"}, cors_origins=["https://a.example"]).client
    allowed = client.options("/v1/completions", headers=preflight)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://a.example"
    strange = client.options("/v1/completions", headers={**preflight, "origin": "https://b.example"})
    assert error_of(strange, 400)["message"] == "Disallowed CORS origin."


def test_21_a_page_that_is_let_in_may_reach_a_private_network() -> None:
    client = make_api(cors_origins=["https://a.example"]).client
    asked = {"access-control-request-method": "POST", "access-control-request-private-network": "true"}
    allowed = client.options("/v1/completions", headers={**asked, "origin": "https://a.example"})
    assert (allowed.status_code, allowed.headers["access-control-allow-private-network"]) == (200, "true")
    refused = client.options("/v1/completions", headers={**asked, "origin": "https://b.example"})
    assert error_of(refused, 400)["type"] == "invalid_request_error"


def test_21_options_tells_no_route_without_a_key() -> None:
    client = make_api(keys={"a": "sk-first"}).client
    answers = [client.options(path) for path in ("/v1/completions", "/v1/models", "/nowhere", "/tokenize")]
    assert {(each.status_code, each.headers["allow"], each.text) for each in answers} == {
        (405, "GET, POST, DELETE, OPTIONS", answers[0].text)
    }
    key = {"authorization": "Bearer sk-first"}
    assert client.options("/nowhere", headers=key).status_code == 404
    assert client.options("/v1/models", headers={"authorization": "Bearer sk-wrong"}).status_code == 401


@pytest.mark.parametrize(("seconds", "header"), [(0.0, "1"), (0.2, "1"), (7.01, "8"), (1e9, "60")])
def test_22_retry_after(api: Api, seconds: float, header: str) -> None:
    for kind, status in ((Overloaded, 503), (RateLimited, 429)):
        error = kind("later", retry_after=seconds)
        api.engine.refusal = error
        response = api.post(prompt="a")
        error_of(response, status)
        assert response.headers["retry-after"] == header
        assert "x-should-retry" not in response.headers
    api.engine.refusal = RuntimeError()
    assert api.post(prompt="a").headers["x-should-retry"] == "false"


def test_24_minus_infinity_is_a_number() -> None:
    api = make_api(ScriptedEngine(script=says("a", eos=False)))
    assert "Infinity" not in api.post(prompt="a", logprobs=20).text


def test_25_the_paths_engine_wins_over_the_bodys_model(api: Api) -> None:
    assert api.post("/v1/engines/gpt2/completions", prompt="a").status_code == 200
    assert api.post("/v1/engines/gpt2/completions", prompt="a", model="none").status_code == 200
    assert api.complete(prompt="a", model="")["model"] == "gpt2"
    assert error_of(api.post(prompt="a", model="none"), 404)["message"] == (
        "The model `none` does not exist or you do not have access to it."
    )


def test_26_logit_bias(api: Api) -> None:
    api.complete(prompt="a", logit_bias={"300": -100, "5": 1.5})
    assert api.engine.requests[-1].params.logit_bias == ((5, 1.5), (300, -100.0))
    for bias in ({"301": 1}, {"5": 100.5}, {"5": -101}, {"x": 1}, {"5": "1"}, {"5": True}, {"٣": 1}, {"5.0": 1}):
        assert api.error(prompt="a", logit_bias=bias)["param"] == "logit_bias"


def test_27_id_and_created_are_constant(api: Api) -> None:
    chunks = api.chunks(prompt=["a", "b"], stream_options={"include_usage": True})
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert chunks[0]["id"].startswith("cmpl-")
    assert len(chunks[0]["id"]) == len("cmpl-") + 28
    assert chunks[0]["object"] == "text_completion"
    assert chunks[0]["system_fingerprint"] == api.complete(prompt="a")["system_fingerprint"] == "fp_test"
    assert api.complete(prompt="a", request_id="job-7")["id"] == "cmpl-job-7"


@pytest.mark.parametrize(("name", "value"), [
    ("suffix", "x"), ("guided_json", {}), ("mirostat", 2), ("length_penalty", 2.0), ("early_stopping", True),
    ("structured_outputs", {"regex": "a"}), ("messages", [{"role": "user", "content": "x"}]),
    ("logits_processors", ["x"]), ("structural_tag", {}),
    ("guided_decoding_backend", "outlines"),
])  # fmt: skip
def test_28_what_we_know_and_do_not_honour_is_refused_by_name(api: Api, name: str, value: object) -> None:
    error = api.error(prompt="a", **{name: value})
    assert error["param"] == name
    assert f"'{name}'" in error["message"]


def test_28_what_asks_for_nothing_is_accepted(api: Api) -> None:
    idle = {"suffix": "", "use_beam_search": False, "mirostat": 0, "length_penalty": 1.0, "typical_p": 1}
    response = api.post(prompt="a", guided_json=None, mirostat_tau=5.0, metadata={"a": 1}, odd="x", **idle)
    assert response.headers["x-ignored-fields"] == "metadata, odd"
    assert "x-ignored-fields" not in api.post(prompt="a").headers
    response = api.post(prompt="a", stream=True, stream_options={"include_usage": True, "more": 1})
    assert response.headers["x-ignored-fields"] == "stream_options.more"


def test_29_top_p_0_and_tiny_temperatures_are_greedy(api: Api) -> None:
    for fields in ({"top_p": 0}, {"temperature": 1e-6}, {"temperature": 0}, {"top_k": 1}):
        api.complete(prompt="a", **fields)
        assert api.engine.requests[-1].params.greedy


def test_30_nulls_are_as_good_as_nothing(api: Api) -> None:
    assert api.error(prompt="a", stream_options={"include_usage": True})["param"] == "stream_options"
    api.complete(prompt="a", stream=None, n=None, stop=None, logit_bias=None, temperature=None, user=None, seed=None)
    api.complete(prompt="a", logit_bias={}, best_of=None, stream_options=None, top_k=None, request_id=None)
    assert "usage" not in api.chunks(prompt="a", stream_options={"include_usage": None})[0]
