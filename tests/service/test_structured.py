"""Structured output: what ended by itself matches what was asked for, whatever it is asked beside."""

from __future__ import annotations

import json
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema
import pytest
from grammars import random_regex, random_schema
from serving import RunningServer

FAST, ALL = 25, 200
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}, "on": {"type": "boolean"}},
    "required": ["x", "on"],
    "additionalProperties": False,
}


def ask(server: RunningServer, **fields: Any) -> dict[str, Any]:
    choice: dict[str, Any] = server.complete(**{"prompt": "a", "max_tokens": 200, "seed": 1, **fields})["choices"][0]
    return choice


def check_schema(server: RunningServer, seed: int) -> bool:
    """Whether it ended by itself."""
    schema = random_schema(random.Random(seed))
    choice = ask(server, seed=seed, guided_json=schema, max_tokens=300, temperature=0.7)
    if choice["finish_reason"] == "stop":
        jsonschema.validate(json.loads(choice["text"]), schema)
    return bool(choice["finish_reason"] == "stop")


def check_regex(server: RunningServer, seed: int) -> bool:
    regex = random_regex(random.Random(seed))
    choice = ask(server, seed=seed, guided_regex=regex, max_tokens=100)
    if choice["finish_reason"] == "stop":
        assert re.fullmatch(regex, choice["text"], re.ASCII), (regex, choice["text"])
    return bool(choice["finish_reason"] == "stop")


def all_of(check: Any, server: RunningServer, seeds: range) -> float:
    """The share that ended by itself, eight at a time."""
    with ThreadPoolExecutor(8) as pool:
        ended = list(pool.map(lambda seed: check(server, seed), seeds))
    return sum(ended) / len(ended)


def test_answers_match_their_schemas(idle: RunningServer) -> None:
    assert all_of(check_schema, idle, range(FAST)) > 0.5


def test_answers_match_their_regexes(idle: RunningServer) -> None:
    assert all_of(check_regex, idle, range(FAST)) > 0.5


@pytest.mark.slow
def test_answers_match_two_hundred_schemas(idle: RunningServer) -> None:
    assert all_of(check_schema, idle, range(ALL)) > 0.5


@pytest.mark.slow
def test_answers_match_two_hundred_regexes(idle: RunningServer) -> None:
    assert all_of(check_regex, idle, range(ALL)) > 0.5


CHOICES = ["red", 'a "b"', "naïve 日本\n", "redder", "x|y.*"]


def test_choices_are_told_apart_to_the_last_letter(idle: RunningServer) -> None:
    answers = {ask(idle, guided_choice=CHOICES, seed=seed)["text"] for seed in range(40)}
    assert answers <= set(CHOICES)
    assert len(answers) >= 3


@pytest.mark.parametrize("fields", [
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": POINT, "strict": True}}},
    {"structured_outputs": {"json": POINT}}, {"structured_outputs": {"json": json.dumps(POINT)}},
    {"structured_outputs": {"json": POINT, "disable_any_whitespace": True}}, {"json_schema": POINT},
    {"guided_json": POINT, "guided_whitespace_pattern": " "}, {"structured_outputs": {"json_object": True}},
], ids=str)  # fmt: skip
def test_the_names_of_json(fields: dict[str, Any], idle: RunningServer) -> None:
    plain = "json_object" in str(fields)
    for seed in range(3):
        choice = ask(idle, seed=seed, **fields)
        if choice["finish_reason"] == "stop":
            jsonschema.validate(json.loads(choice["text"]), {"type": "object"} if plain else POINT)
            assert "disable" not in str(fields) or not re.search(r"\s", choice["text"])


@pytest.mark.parametrize("fields", [
    {"guided_regex": "^(ab|cd)+e$"}, {"structured_outputs": {"regex": "(ab|cd)+e"}},
    {"guided_grammar": 'start: ("ab" | "cd")+ "e"'}, {"grammar": 'root ::= ("ab" | "cd")+ "e"'},
    {"structured_outputs": {"grammar": 'start: ("ab" | "cd")+ "e"'}},
], ids=str)  # fmt: skip
def test_the_names_of_grammars(fields: dict[str, Any], idle: RunningServer) -> None:
    choice = ask(idle, **fields)
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
    assert re.fullmatch("(ab|cd)+e", choice["text"])


BESIDE: list[dict[str, Any]] = [
    {"min_tokens": 60}, {"logit_bias": {"257": 100, "64": -100}}, {"bad_words": ["a", "b", "c", "e"]},
    {"allowed_token_ids": [5, 6]}, {"repetition_penalty": 2.0, "presence_penalty": 2.0}, {"temperature": 0},
    {"dry_multiplier": 5.0}, {"xtc_probability": 1.0, "xtc_threshold": 0.0}, {"typical_p": 0.2},
    {"top_k": 3, "min_p": 0.5}, {"top_p": 0.3, "temperature": 2.0},
]  # fmt: skip


@pytest.mark.parametrize("fields", BESIDE, ids=str)
def test_nothing_overrules_the_grammar(fields: dict[str, Any], idle: RunningServer) -> None:
    choice = ask(idle, guided_regex="(ab|cde?){3,9}", **fields)
    assert choice["finish_reason"] == "stop"
    assert re.fullmatch("(ab|cde?){3,9}", choice["text"])


SHORT = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 9},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("fields", [
    {"response_format": {"type": "json_schema", "json_schema": {"schema": SHORT}}}, {"guided_json": SHORT},
    {"response_format": {"type": "json_object", "schema": SHORT}}, {"json_schema": json.dumps(SHORT)},
    {"structured_outputs": {"json": SHORT}}, {"response_format": {"type": "json_schema", "schema": SHORT}},
], ids=str)  # fmt: skip
def test_json_of_bounded_texts_comes_to_its_end(fields: dict[str, Any], idle: RunningServer) -> None:
    """Whatever the model thinks of white space, of which there would be no end."""
    for seed in range(5):
        choice = ask(idle, seed=seed, max_tokens=200, **fields)
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(choice["text"]), SHORT)
        assert not re.search(r"\n\s*\n|  \S* \n", choice["text"])


@pytest.mark.parametrize(("format_", "ignored"), [
    ({"type": "json_object", "schema": SHORT, "strict": True, "name": "x"},
     "response_format.strict, response_format.name"),
    ({"type": "json_schema", "json_schema": {"schema": SHORT, "name": "x", "strict": True, "title": "y"}},
     "response_format.json_schema.title"),
    ({"type": "json_schema", "json_schema": {"schema": SHORT, "name": "x", "description": "d"}}, None),
    ({"type": "text", "schema": SHORT}, "response_format.schema"),
], ids=str)  # fmt: skip
def test_what_is_not_looked_at_in_a_response_format_is_named(
    format_: dict[str, Any], ignored: str | None, idle: RunningServer
) -> None:
    answer = httpx.post(f"{idle.url}/v1/completions", json={"prompt": "a", "max_tokens": 1, "response_format": format_})
    assert answer.status_code == 200, answer.text
    assert answer.headers.get("x-ignored-fields") == ignored


def test_a_dead_end_of_a_grammar_is_an_error_and_no_answer(idle: RunningServer) -> None:
    """It shows only after three hundred letters: nothing is both a 1 and a 2."""
    fields = {
        "prompt": "a",
        "max_tokens": 900,
        "guided_grammar": "start: /[a-z]{300}/ D\nD: /1/ & /2/",
        "temperature": 0,
    }
    answer = httpx.post(f"{idle.url}/v1/completions", json=fields, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "grammar_dead_end"), answer.text
    with httpx.stream(
        "POST", f"{idle.url}/v1/completions", json={**fields, "stream": True, "n": 2}, timeout=60
    ) as told:
        events = [line for line in told.iter_lines() if line.startswith("data:")]
    assert json.loads(events[-1].removeprefix("data:"))["error"]["code"] == "grammar_dead_end"
    assert not any('"finish_reason": "' in line or '"finish_reason":"' in line for line in events)
    shallow = httpx.post(
        f"{idle.url}/v1/completions", json={**fields, "guided_grammar": "start: /[a-z]{3}/ D\nD: /1/ & /2/"}
    )
    assert (shallow.status_code, shallow.json()["error"]["code"]) == (400, "invalid_grammar")


@pytest.mark.parametrize("fields", [
    {"guided_choice": ["a <|endoftext|> b"]}, {"guided_regex": "x<\\|endoftext\\|>y"},
    {"grammar": 'root ::= "<|endoftext|>" [0-9]'}, {"guided_json": {"const": "<|endoftext|>"}},
], ids=str)  # fmt: skip
def test_the_name_of_a_special_token_is_text_in_a_grammar(fields: dict[str, Any], idle: RunningServer) -> None:
    choice = ask(idle, skip_special_tokens=False, **fields)
    assert (choice["finish_reason"], "<|endoftext|>" in choice["text"]) == ("stop", True)


def test_it_ends_with_the_token_that_completes_it(idle: RunningServer) -> None:
    """No step is spent on an end of text that alone can follow; the last allowed token may be the one."""
    got = idle.complete(prompt="a", max_tokens=3, temperature=0, guided_regex="[a-c]{3}", logprobs=1)
    choice = got["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert got["usage"]["completion_tokens"] == len(choice["logprobs"]["tokens"]) <= 3
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]


def test_the_clients_own_ends_still_end_it(idle: RunningServer) -> None:
    choice = ask(idle, guided_regex="(ab)*c", stop="bab", logit_bias={"66": -100})
    assert (choice["text"], choice["stop_reason"]) == ("a", "bab")
    assert ask(idle, guided_regex="(ab){50}", max_tokens=4)["finish_reason"] == "length"


def test_alone_or_in_a_batch_streamed_or_not_the_same(idle: RunningServer) -> None:
    requests = [
        {"prompt": "a", "max_tokens": 60, "seed": i, "logprobs": 2, **kind}
        for i in range(4)
        for kind in ({"guided_json": POINT}, {"guided_regex": "[a-z ]{5,40}x"}, {"guided_choice": CHOICES}, {})
    ]
    alone = [idle.complete(**request)["choices"] for request in requests]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda request: idle.complete(**request)["choices"], requests)) == alone
    for request, choices in zip(requests[:8], alone, strict=False):
        chunks = [chunk["choices"][0] for chunk in idle.stream(**request)]
        assert "".join(chunk["text"] for chunk in chunks) == choices[0]["text"]
        assert chunks[-1]["finish_reason"] == choices[0]["finish_reason"]


def test_samples_of_one_grammar_differ_and_all_match(idle: RunningServer) -> None:
    choices = idle.complete(prompt="a", n=6, best_of=8, max_tokens=40, seed=3, guided_regex="[a-z]{6,20}")["choices"]
    assert all(re.fullmatch("[a-z]{6,20}", choice["text"]) for choice in choices)
    assert len({choice["text"] for choice in choices}) == 6


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def multiplied(factors: int) -> dict[str, Any]:
    """Each of them has eight ways to be, and all must be so at once."""
    ways = [
        {"anyOf": [{"type": "object", "properties": {f"a{i}{j}": {"type": "string"}}} for j in range(8)]}
        for i in range(factors)
    ]
    return {"allOf": ways}


HOSTILE: dict[str, dict[str, Any]] = {
    "30,000 parentheses": {"guided_regex": "(" * 30_000 + "a" + ")" * 30_000},
    "30,000 brackets": {"guided_regex": "[" * 30_000},
    "deep recursion": {"guided_json": nested(90)},
    "deeper than JSON goes": {"guided_json": '{"items":' * 5000 + "{}" + "}" * 5000},
    "exponential schema": {"guided_json": multiplied(6)},
    "1 MB schema": {"guided_json": {"enum": ["x" * 999_000]}},
    "schema of itself": {"guided_json": {"$ref": "#"}},
    "schema elsewhere": {"guided_json": {"$ref": "file:///etc/passwd"}},
    "nothing matches": {"guided_json": {"type": "integer", "minimum": 5, "maximum": 3}},
    "endless rule": {"guided_grammar": "start: start"},
    "deep grammar": {"guided_grammar": "start: " + "(" * 20_000 + '"a"' + ")" * 20_000},
    "deep GBNF": {"grammar": "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000},
    "white space": {"guided_grammar": " " * 60_000},
    "many spaces": {"guided_regex": "a" * 100_000},
    "look-ahead": {"guided_regex": "(?=a)b"},
    "no keyword": {"guided_json": {"not": {"type": "string"}, "x-guidance": {"lenient": True}}},
}  # fmt: skip


def test_hostile_grammars_are_refused_within_a_second_and_disturb_nobody(idle: RunningServer) -> None:
    quiet = {"prompt": "a", "max_tokens": 600, "ignore_eos": True, "seed": 1}
    expected = idle.complete(**quiet)["choices"][0]["text"]
    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=idle.url, timeout=10) as client:
        stream = pool.submit(lambda: "".join(chunk["choices"][0]["text"] for chunk in idle.stream(**quiet)))
        for name, fields in HOSTILE.items():
            began = time.monotonic()
            answer = client.post("/v1/completions", json={"prompt": "a", **fields})
            took = time.monotonic() - began
            assert answer.status_code == 400, (name, answer.text)
            assert answer.json()["error"]["param"] == next(iter(fields)), (name, answer.text)
            assert took < 1, name
        assert stream.result() == expected


@pytest.mark.parametrize(
    ("regex", "status"),
    [
        ("(a|a)*b" * 30, 200),
        ("(x+x+)+y", 200),
        ("(a|b)*a(a|b){18}", 200),
        ("((a{1,99}){1,99}){1,99}", 400),
        (".*a.{90}", 200),
    ],
)
def test_what_would_take_a_backtracker_for_ever_takes_no_time(regex: str, status: int, idle: RunningServer) -> None:
    """One of them takes too much after a few tokens, which is found out before."""
    began = time.monotonic()
    fields = {"prompt": "a", "guided_regex": regex, "max_tokens": 40}
    assert httpx.post(f"{idle.url}/v1/completions", json=fields).status_code == status
    assert time.monotonic() - began < 5
