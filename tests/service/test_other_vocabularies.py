"""Whole servers on WordPiece and unigram vocabularies: the same rules for text, streams, offsets and stop strings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import RunningServer, serving, start
from vocabularies import write_model, write_unigram, write_wordpiece

from model.tokenizer import Tokenizer, read_tokenizer

TEXTS = st.sampled_from(
    ["", "the sea", "今天天气很好，", "hello world", "東京です", "no such word ☃", "a</s>b", "[CLS]大海"]
)
STOPS = st.sampled_from([" ", "a", "e", "，", "天", "です", "[UNK]", "s t", "\ufffd"])


@pytest.fixture(scope="module", params=["wordpiece", "unigram"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    if request.param == "wordpiece":
        write_model(directory, write_wordpiece(directory) + 2)  # ids without a piece are generated too
    else:
        write_model(directory, write_unigram(directory) + 2, eos_token_id=2)
    return directory


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[RunningServer]:
    with serving(checkpoint, "--threads", "1") as running:
        yield running


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    config = json.loads((checkpoint / "config.json").read_text())
    return read_tokenizer(checkpoint, config["vocab_size"], (config.get("eos_token_id", 3),))


@st.composite
def requests_drawn(draw: st.DrawFn) -> dict[str, Any]:
    fields = {
        "echo": st.booleans(),
        "logprobs": st.sampled_from([0, 2, 20]),
        "stop": STOPS | st.lists(STOPS, max_size=3),
        "temperature": st.sampled_from([0, 1, 2]),
        "include_stop_str_in_output": st.booleans(),
        "skip_special_tokens": st.booleans(),
        "ignore_eos": st.booleans(),
        "return_token_ids": st.booleans(),
        "n": st.sampled_from([1, 2]),
    }
    request = {"prompt": draw(TEXTS | st.lists(st.integers(0, 100), min_size=1, max_size=8))}
    request |= {"seed": draw(st.integers(0, 999)), "max_tokens": draw(st.integers(1, 24))}
    for name in draw(st.lists(st.sampled_from(sorted(fields)), max_size=5, unique=True)):
        request[name] = draw(fields[name])
    return request


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(request=requests_drawn())
def test_streams_equal_answers(server: RunningServer, request: dict[str, Any]) -> None:
    whole = server.complete(**request)["choices"]
    joined: dict[int, dict[str, Any]] = {choice["index"]: {"text": "", "rows": [], "offsets": []} for choice in whole}
    for chunk in server.stream(**request):
        (piece,) = chunk["choices"]
        mine = joined[piece["index"]]
        mine["text"] += piece["text"]
        if piece["logprobs"]:
            mine["rows"] += piece["logprobs"]["tokens"]
            mine["offsets"] += piece["logprobs"]["text_offset"]
        if piece["finish_reason"]:
            assert (piece["finish_reason"], piece["stop_reason"]) == (
                whole[piece["index"]]["finish_reason"],
                whole[piece["index"]]["stop_reason"],
            )
    for choice in whole:
        assert joined[choice["index"]]["text"] == choice["text"]
        rows = choice["logprobs"] or {"tokens": [], "text_offset": []}
        assert (joined[choice["index"]]["rows"], joined[choice["index"]]["offsets"]) == (
            rows["tokens"],
            rows["text_offset"],
        )


def test_text_is_what_the_tokens_say_after_the_prompt(server: RunningServer, tokenizer: Tokenizer) -> None:
    for seed, prompt in enumerate(["the sea", "今天", "hello", "東京", ""]):
        choice = server.complete(prompt=prompt, max_tokens=30, seed=seed, return_token_ids=True)["choices"][0]
        assert choice["prompt_token_ids"] == (tokenizer.encode_prompt(prompt) or [tokenizer.start_id])
        decoder = tokenizer.decoder(choice["prompt_token_ids"])
        said = [id_ for id_ in choice["token_ids"] if id_ not in tokenizer.special_ids]
        assert choice["text"] == "".join(map(decoder.push, said)) + decoder.flush()


def test_offsets_are_where_the_tokens_stand(server: RunningServer, tokenizer: Tokenizer) -> None:
    ask = {"prompt": "hello the sea", "max_tokens": 25, "seed": 4, "logprobs": 1, "echo": True, "ignore_eos": True}
    choice = server.complete(**ask, skip_special_tokens=False)["choices"][0]
    offsets = choice["logprobs"]["text_offset"]
    assert offsets[0] == 0
    assert offsets == sorted(offsets)
    assert offsets[-1] <= len(choice["text"])
    for name, at in zip(choice["logprobs"]["tokens"], offsets, strict=True):
        if name in tokenizer.special_tokens and name not in choice["text"]:
            continue  # put around the prompt by the tokenizer
        word = name.strip(" ").removeprefix("##")
        if not name.startswith("bytes:") and word:
            # what is left of a broken character stands before the token that breaks it
            assert choice["text"][at:].lstrip(" \ufffd").startswith(word), (name, at)


def test_a_stop_string_across_tokens(server: RunningServer) -> None:
    whole = server.complete(prompt="the", max_tokens=40, seed=8, ignore_eos=True)["choices"][0]["text"]
    stop = whole[10:14]
    cut = server.complete(prompt="the", max_tokens=40, seed=8, ignore_eos=True, stop=stop)["choices"][0]
    assert cut["text"] == whole[: whole.index(stop)]
    assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", stop)


def test_prompt_scoring(server: RunningServer, tokenizer: Tokenizer) -> None:
    got = server.complete(prompt="hello the sea", max_tokens=0, echo=True, logprobs=1)
    choice = got["choices"][0]
    assert choice["text"] == "hello the sea"
    assert len(choice["logprobs"]["tokens"]) == len(tokenizer.encode_prompt("hello the sea"))
    assert got["usage"]["completion_tokens"] == 0


def test_bad_words_and_breakers(server: RunningServer, tokenizer: Tokenizer) -> None:
    fields = {"prompt": "the", "max_tokens": 60, "seed": 3, "ignore_eos": True, "return_token_ids": True}
    said = server.complete(**fields)["choices"][0]["token_ids"]
    words = sorted({tokenizer.name(id_) for id_ in said if [id_] in tokenizer.runs(tokenizer.name(id_))})[-5:]
    assert len(words) == 5
    without = server.complete(**fields, bad_words=words, dry_multiplier=1.0)["choices"][0]["token_ids"]
    for word in words:
        for run in tokenizer.runs(word):
            assert not any(without[at : at + len(run)] == run for at in range(len(without)))


def test_structured_output_says_why_not(server: RunningServer) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "guided_regex": "a+"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("guided_regex", "unsupported_parameter")
    assert "byte-level" in error["message"]


def test_tokenize_and_back(server: RunningServer, tokenizer: Tokenizer) -> None:
    for text in ("hello world", "今天天气", "東京です"):
        ids = _ids(server, text)
        assert ids == tokenizer.encode_prompt(text)
        back = httpx.post(f"{server.url}/detokenize", json={"tokens": ids}).json()["prompt"]
        assert back == tokenizer.decode(ids)
    info = httpx.get(f"{server.url}/tokenizer_info").json()
    assert (info["tokenizer_class"], info["eos_token"]) == (tokenizer.kind, tokenizer.named.get("eos_token"))


def _ids(server: RunningServer, text: str) -> list[int]:
    ids: list[int] = httpx.post(f"{server.url}/tokenize", json={"prompt": text}).json()["tokens"]
    return ids


def test_without_the_library_the_server_says_what_to_install(tmp_path: Path) -> None:
    write_model(tmp_path, write_unigram(tmp_path))
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "sentencepiece.py").write_text("raise ImportError\n")
    process = start(tmp_path, env={"PYTHONPATH": f"{tmp_path / 'hidden'}:{Path.cwd()}"})
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 78
    assert said.startswith("gpt2-server: this vocabulary needs the package sentencepiece")
    assert said.count("\n") == 1
