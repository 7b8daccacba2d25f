"""The routes beside completions, and the document that describes them all."""

from __future__ import annotations

import json
import re

import pytest
from asking import Api, error_of, make_api
from prometheus_client import CollectorRegistry, Counter
from scripted import CONTEXT, EOS, ScriptedEngine

from server.api.errors import STATUS, status_of
from server.errors import Draining, EngineError, ModelNotFound, ServerError


def test_health_and_readiness_follow_the_engine() -> None:
    api = make_api(ScriptedEngine(ready=False))
    assert api.client.get("/health").json() == {"status": "ok"}
    assert api.client.get("/ping").status_code == api.client.post("/ping").status_code == 200
    assert error_of(api.client.get("/ready"), 503)["type"] == "overloaded_error"
    assert api.client.get("/v1/engines").json()["data"][0]["ready"] is False
    api.engine.healthy, api.engine.ready = False, True
    for path in ("/health", "/ping"):
        response = api.client.get(path)
        error_of(response, 503)
        assert response.headers["retry-after"] == "1"
    assert api.client.get("/ready").status_code == 200


def test_engines_answer_as_openai_0_28_expects(api: Api) -> None:
    engine = {
        "id": "gpt2", "object": "engine", "owner": "gpt2-server", "ready": True, "created": None, "permissions": None,
    }  # fmt: skip
    assert api.client.get("/v1/engines/gpt2").json() == engine
    listed = api.client.get("/v1/engines").json()
    assert (listed["object"], listed["data"][0]) == ("list", engine)


def test_model_object(api: Api) -> None:
    assert api.client.get("/v1/models/gpt2").json() == {
        "id": "gpt2", "object": "model", "created": 1700000000, "owned_by": "gpt2-server", "root": "gpt2",
        "parent": None, "max_model_len": CONTEXT, "permission": [],
    }  # fmt: skip
    assert api.client.get("/v1/models/text-davinci-002").json()["parent"] == "gpt2"


def test_metrics_version_and_load() -> None:
    registry = CollectorRegistry()
    Counter("gpt2_things", "Things", registry=registry).inc()
    client = make_api(registry=registry).client
    metrics = client.get("/metrics")
    assert "gpt2_things_total 1.0" in metrics.text
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert client.get("/version").json() == {"version": "0"}
    assert client.get("/load").json() == {"server_load": 0}


@pytest.mark.parametrize("name", ["prompt", "content", "text"])
def test_tokenize_and_back(api: Api, name: str) -> None:
    answer = api.post("/tokenize", **{name: "hello 适<|endoftext|>"}, return_token_strs=True).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == CONTEXT
    assert answer["tokens"][-1] == EOS
    assert answer["token_strs"][:2] == ["he", "llo"]
    assert api.post("/detokenize", tokens=answer["tokens"]).json() == {"prompt": "hello 适<|endoftext|>"}


@pytest.mark.parametrize(("path", "fields"), [
    ("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [97]}), ("/v1/completions", {"prompt": "a"}),
    ("/v1/embeddings", {"input": "a"}),
])  # fmt: skip
def test_every_answer_names_the_fields_that_it_ignored(api: Api, path: str, fields: dict) -> None:
    answer = api.post(path, **fields, odd=1, **{"a b\n": 2})
    assert (answer.status_code, answer.headers["x-ignored-fields"]) == (200, "odd, a?b?")
    assert "x-ignored-fields" not in api.post(path, **fields).headers


def test_every_route_is_counted_by_its_own_name() -> None:
    api = make_api(playground=True)
    document = api.client.get("/openapi.json").json()["paths"]
    paths = [path for path, methods in document.items() if "get" in methods and "{" not in path]
    assert len(paths) > 8
    for path in ("/openapi.json", "/", *paths):
        api.client.get(path)
        assert api.answers[-1][0] == path


def test_tokenize_as_the_evaluation_harness_asks(api: Api) -> None:
    answer = api.post("/tokenize", prompt="test", add_special_tokens=False).json()
    assert (answer["tokens"], answer["token_strs"]) == (list(b"test"), None)
    assert api.client.get("/tokenizer_info").json()["eos_token"] == "<|endoftext|>"
    assert api.post("/tokenize", prompt="").json()["tokens"] == []


@pytest.mark.parametrize(("path", "fields", "param"), [
    ("/tokenize", {}, "prompt"), ("/tokenize", {"prompt": "a", "text": "b"}, "prompt"),
    ("/tokenize", {"prompt": 5}, "prompt"), ("/tokenize", {"prompt": ["a"]}, "prompt"),
    ("/detokenize", {}, "tokens"), ("/detokenize", {"tokens": [301]}, "tokens"),
    ("/detokenize", {"tokens": [-1]}, "tokens"), ("/detokenize", {"tokens": ["a"]}, "tokens"),
    ("/detokenize", {"tokens": [True]}, "tokens"), ("/detokenize", {"tokens": [2**70]}, "tokens"),
])  # fmt: skip
def test_wrong_tokens(api: Api, path: str, fields: dict, param: str) -> None:
    assert error_of(api.post(path, **fields), 400)["param"] == param


def test_chat_says_why_not(api: Api) -> None:
    error = error_of(api.client.post("/v1/chat/completions", content=b"whatever"), 400)
    assert "chat template" in error["message"]


def test_every_answer_carries_its_id_and_time(api: Api) -> None:
    answers = [api.post(prompt="a"), api.post(prompt="a", stream=True), api.client.get("/nowhere"), api.post(n=0)]
    for response in answers:
        assert re.fullmatch(r"req_[0-9a-f]{32}", response.headers["x-request-id"])
        assert float(response.headers["openai-processing-ms"]) >= 0
        assert response.headers["openai-version"] == "2020-10-01"


@pytest.mark.parametrize(("sent", "kept"), [
    ("abc-1.2_Z", True), ("a" * 64, True), ("a" * 65, False), ("a b", False), ("", False), ("a/b", False), ("é", False),
])  # fmt: skip
def test_a_clients_request_id_is_kept_when_it_is_safe(api: Api, sent: str, kept: bool) -> None:
    response = api.client.get("/version", headers={"x-request-id": sent.encode()})
    assert (response.headers["x-request-id"] == sent) is kept


@pytest.mark.parametrize("path", ["/v1/" + "x" * 5000, "/v1/%0a%0d", "/v1/%e9", "/%00"])
def test_an_unknown_url_is_shown_within_bounds(api: Api, path: str) -> None:
    message = error_of(api.client.get(path), 404)["message"]
    assert re.fullmatch(r"[ -~]{1,300}", message)


def all_errors(kind: type[ServerError] = ServerError) -> list[type[ServerError]]:
    return [kind, *(each for child in kind.__subclasses__() for each in all_errors(child))]


def test_every_error_has_a_status_and_none_is_409() -> None:
    statuses = {kind: status_of(kind.__new__(kind))[0] for kind in all_errors()}
    assert statuses[ModelNotFound] == 404
    assert statuses[EngineError] == 500
    assert statuses[Draining] == 503
    assert set(statuses.values()) == {status for status, _ in STATUS.values()}
    assert 409 not in statuses.values()


def test_a_leaving_server_says_so(api: Api) -> None:
    api.engine.refusal = Draining("The server is shutting down.")
    response = api.post(prompt="a")
    error_of(response, 503)
    assert response.headers["connection"] == "close"


def test_the_document_is_whole(api: Api) -> None:
    document = api.client.get("/openapi.json").json()
    assert {
        "/v1/completions", "/v1/engines/{engine_id}/completions", "/v1/models", "/v1/models/{model_id}", "/v1/engines",
        "/v1/engines/{engine_id}", "/health", "/ready", "/ping", "/version", "/load", "/metrics", "/tokenize",
        "/detokenize", "/tokenizer_info", "/v1/chat/completions", "/v1/embeddings",
        "/v1/engines/{engine_id}/embeddings",
    } == set(document["paths"])  # fmt: skip
    operation = document["paths"]["/v1/completions"]["post"]
    properties = operation["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert properties["temperature"]["anyOf"][0] == {"type": "number", "minimum": 0, "maximum": 2}
    assert properties["temperature"]["default"] == 1.0
    assert set(operation["responses"]) >= {"200", "400", "401", "404", "413", "429", "500", "503"}
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert references <= set(document["components"]["schemas"])
    assert "HTTPValidationError" not in json.dumps(document)


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models", "/v1/models/gpt2", "/metrics", "/none"])
def test_head_is_get_without_the_body(api: Api, path: str) -> None:
    head, get = api.client.head(path), api.client.get(path)
    assert head.status_code == get.status_code
    assert head.content == b""
    assert head.headers["content-length"] == get.headers["content-length"]


def test_a_wrong_method_is_told_every_right_one(api: Api) -> None:
    assert api.client.put("/ping").headers["allow"] == "GET, POST"
    assert api.client.put("/v1/completions").headers["allow"] == "POST"
    assert api.client.head("/v1/completions").status_code == 405
    assert api.client.put("/v1/models/gpt2").headers["allow"] == "GET, DELETE"
    assert api.post("/v1/engines/gpt2/generate").headers["allow"] == "GET"


def test_what_no_job_has_made_cannot_be_deleted(api: Api) -> None:
    assert error_of(api.client.delete("/v1/models/text-davinci-002"), 403)["message"].startswith("Only models")
    assert error_of(api.client.delete("/v1/models/nope"), 404)["code"] == "model_not_found"


def test_the_name_that_sagemaker_has_for_completions(api: Api) -> None:
    assert api.post("/invocations", prompt="a").json()["choices"][0]["text"] == "hello"


def test_a_field_without_a_name_is_ignored_under_a_name(api: Api) -> None:
    response = api.post(prompt="a", **{"": 1, "x": 2, " ": 3})
    assert response.headers["x-ignored-fields"] == "?, x, ?"
