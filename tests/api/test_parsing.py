"""Bytes in, one right request or InvalidRequest out; nothing else, whatever the bytes."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from asking import LIMITS
from hypothesis import given
from hypothesis import strategies as st
from pydantic import create_model

from model.dry import DryParams
from model.sampling_params import SamplingParams
from server.api.limits import Limits
from server.api.parsing import CompletionRequest, parse_completion
from server.api.reading import read_body_fields
from server.api.schemas import INT64_MAX, CompletionBody, Wire, completion_schema
from server.api.unsupported import KNOWN
from server.engine.grammars import GrammarKind
from server.engine.request import BeamParams, EarlyStopping
from server.errors import InvalidRequest

MADE = {"choice", "dry", "grammar", "min_p_last", "pooled"}  # of several fields, or not of any
PROPERTIES = completion_schema(LIMITS)["properties"]


def parse(**fields: Any) -> CompletionRequest:
    return parse_completion(json.dumps(fields).encode(), LIMITS)


def refusal(limits: Limits = LIMITS, **fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse_completion(json.dumps(fields).encode(), limits)
    return caught.value


def number_fields() -> list[str]:
    return [name for name, shape in PROPERTIES.items() if shape["anyOf"][0].get("type") in {"integer", "number"}]


def test_sampling_fields_agree_with_the_engines() -> None:
    """Each of them exists once on the wire and once in SamplingParams, by one name and with one default."""
    for field in dataclasses.fields(SamplingParams):
        if field.name in MADE:
            continue
        assert field.name in CompletionBody.model_fields
    request = parse(prompt="a")
    defaults = SamplingParams(seed=request.params.seed)
    assert request.params == defaults


def test_every_sampling_field_reaches_the_engine() -> None:
    values: dict[str, Any] = {
        "seed": 7, "max_tokens": 5, "min_tokens": 2, "temperature": 0.5, "top_p": 0.25, "top_k": 3, "min_p": 0.125,
        "presence_penalty": -1.0, "frequency_penalty": 1.5, "repetition_penalty": 1.25, "logit_bias": {"3": -2.0},
        "allowed_token_ids": [5, 4, 5], "stop_token_ids": [9, 8], "ignore_eos": True, "logprobs": 2,
        "prompt_logprobs": 4, "logprob_token_ids": [7, 6], "repetition_penalty_range": 9, "temperature_last": True,
        "typical_p": 0.75, "xtc_probability": 0.5, "xtc_threshold": 0.25,
    }  # fmt: skip
    assert set(values) | {"bad_words"} == {field.name for field in dataclasses.fields(SamplingParams)} - MADE
    lists = {
        "logit_bias": ((3, -2.0),),
        "allowed_token_ids": (4, 5),
        "stop_token_ids": (8, 9),
        "logprob_token_ids": (6, 7),
    }
    assert parse(prompt="a", **values).params == SamplingParams(**{**values, **lists})


def test_dry_is_on_with_a_multiplier_and_a_window() -> None:
    fields = {"prompt": "a", "dry_multiplier": 0.8, "dry_base": 2.0, "dry_allowed_length": 3}
    on = DryParams(multiplier=0.8, base=2.0, allowed_length=3)
    assert parse(**fields).params.dry == on
    assert parse(**fields, dry_penalty_last_n=64).params.dry == dataclasses.replace(on, last_n=64)
    assert parse(**fields, dry_penalty_last_n=0).params.dry is None
    assert parse(prompt="a", dry_base=3.0).params.dry is None


SCHEMA = {"type": "string"}
SCHEMA_TEXT = '{"type":"string"}'


@pytest.mark.parametrize(("fields", "kind", "text"), [
    ({"response_format": {"type": "json_object"}}, GrammarKind.JSON_SCHEMA, '{"type":"object"}'),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
     GrammarKind.JSON_SCHEMA, SCHEMA_TEXT),
    ({"guided_json": SCHEMA}, GrammarKind.JSON_SCHEMA, SCHEMA_TEXT),
    ({"guided_json": '{ "type": "string" }'}, GrammarKind.JSON_SCHEMA, SCHEMA_TEXT),
    ({"json_schema": SCHEMA, "response_format": {"type": "text"}}, GrammarKind.JSON_SCHEMA, SCHEMA_TEXT),
    ({"structured_outputs": {"json": SCHEMA, "regex": None}}, GrammarKind.JSON_SCHEMA, SCHEMA_TEXT),
    ({"structured_outputs": {"json_object": True}}, GrammarKind.JSON_SCHEMA, '{"type":"object"}'),
    ({"guided_regex": "a+"}, GrammarKind.REGEX, "a+"),
    ({"structured_outputs": {"regex": "a+"}}, GrammarKind.REGEX, "a+"),
    ({"guided_choice": ["a", "é"]}, GrammarKind.CHOICE, '["a", "é"]'),
    ({"guided_grammar": "start: x"}, GrammarKind.GRAMMAR, "start: x"), ({"grammar": "y"}, GrammarKind.GRAMMAR, "y"),
])  # fmt: skip
def test_every_name_of_a_structure(fields: dict[str, Any], kind: GrammarKind, text: str) -> None:
    structure = parse(prompt="a", **fields).structure
    assert structure is not None
    assert (structure.kind, structure.text) == (kind, text)
    assert structure.param in fields


@pytest.mark.parametrize("fields", [
    {}, {"response_format": {"type": "text"}}, {"guided_json": None}, {"grammar": ""},
    {"guided_whitespace_pattern": " "},
])  # fmt: skip
def test_no_structure(fields: dict[str, Any]) -> None:
    assert parse(prompt="a", **fields).structure is None


@pytest.mark.parametrize("fields", [
    {"response_format": {"type": "json"}}, {"response_format": {"type": "json_schema"}}, {"response_format": "json"},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, {"response_format": {}},
    {"structured_outputs": {}}, {"structured_outputs": {"json": SCHEMA, "regex": "a"}},
    {"structured_outputs": {"structural_tag": "x"}}, {"structured_outputs": {"json_object": 1}},
    {"guided_json": "no JSON"}, {"guided_json": []}, {"guided_json": True}, {"guided_json": {"enum": ["x" * 70_000]}},
    {"guided_regex": 5}, {"guided_regex": "x" * 65_537}, {"guided_choice": []}, {"guided_choice": "a"},
    {"guided_choice": ["a", ""]}, {"guided_choice": ["a"] * 1025}, {"guided_grammar": {}}, {"json_schema": 1},
    {"bad_words": [""]}, {"bad_words": ["x"] * 129}, {"bad_words": ["x" * 257]}, {"bad_words": "x"},
    {"dry_sequence_breakers": ["x" * 41]}, {"dry_sequence_breakers": ["x"] * 17}, {"dry_base": 0.5}, {"typical_p": 0},
], ids=lambda fields: str(fields)[:60])  # fmt: skip
def test_a_structure_or_sampler_that_is_wrong_is_refused_by_name(fields: dict[str, Any]) -> None:
    assert refusal(prompt="a", **fields).param == next(iter(fields))


def test_two_structures_or_one_without_an_end_are_refused() -> None:
    assert refusal(prompt="a", guided_regex="a", guided_json={}).param == "guided_regex"
    assert refusal(prompt="a", guided_regex="a", ignore_eos=True).param == "ignore_eos"


def test_beams() -> None:
    request = parse(
        prompt="a", use_beam_search=True, n=2, best_of=4, length_penalty=2, early_stopping="never", stream=True
    )
    assert request.beam == BeamParams(length_penalty=2.0, early_stopping=EarlyStopping.NEVER)
    assert (request.body.n, request.best_of) == (2, 4)
    assert parse(prompt="a", use_beam_search=True, temperature=0, seed=3).beam == BeamParams()
    assert parse(prompt="a", use_beam_search=False, length_penalty=1.0, early_stopping=False).beam is None


@pytest.mark.parametrize("fields", [
    {"temperature": 0.5}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"typical_p": 0.5}, {"presence_penalty": 1},
    {"repetition_penalty": 1.1}, {"logit_bias": {"5": 1}}, {"bad_words": ["a"]}, {"guided_regex": "a"}, {"stop": "a"},
    {"allowed_token_ids": [1]}, {"dry_multiplier": 1}, {"xtc_probability": 0.5}, {"prompt_logprobs": 1},
    {"logprobs": 1, "echo": True}, {"max_tokens": 0, "echo": True}, {"stop_token_ids": list(range(65))},
    {"early_stopping": 1}, {"early_stopping": "yes"}, {"length_penalty": 11},
], ids=str)  # fmt: skip
def test_what_changes_the_distribution_does_not_go_with_beams(fields: dict[str, Any]) -> None:
    assert refusal(prompt="a", use_beam_search=True, **fields).param == next(iter(fields))


def test_echo_with_logprobs_scores_the_prompt() -> None:
    assert parse(prompt="a", echo=True, logprobs=2).params.prompt_logprobs == 2
    assert parse(prompt="a", echo=True, logprobs=2, prompt_logprobs=5).params.prompt_logprobs == 5
    assert parse(prompt="a", echo=True).params.prompt_logprobs is None


@pytest.mark.parametrize("off", [0, -1, None])
def test_top_k_off(off: int | None) -> None:
    assert parse(prompt="a", top_k=off).params.top_k is None


def test_json_has_one_kind_of_number() -> None:
    request = parse(prompt="a", max_tokens=4.0, n=2.0, temperature=1)
    assert (request.params.max_tokens, request.body.n, request.params.temperature) == (4, 2, 1.0)
    assert type(request.params.max_tokens) is int
    assert type(request.params.temperature) is float


def every_body(kind: type[Wire] = Wire) -> Iterator[type[Wire]]:
    for each in kind.__subclasses__():
        yield each
        yield from every_body(each)


def integers_of(body: type[Wire]) -> Iterator[str]:
    """Its fields that take an integer, and have no further form."""
    for name, shape in body.model_json_schema()["properties"].items():
        kinds = {option.get("type") for option in shape.get("anyOf", [shape])}
        if "integer" in kinds and kinds <= {"integer", "null"}:
            yield name


def test_an_integer_with_a_point_is_one_in_every_body() -> None:
    """16.0 is 16; 16.5 and true are not."""
    tried = 0
    for body in every_body():
        for name in integers_of(body):
            one = create_model(
                "One", __base__=Wire, **{name: (body.model_fields[name].annotation, body.model_fields[name])}
            )  # type: ignore[call-overload]
            value = 3600 if body.__name__ == "OutputExpiry" else 16
            read = getattr(read_body_fields(one, {name: float(value)}), name)
            assert (read, type(read)) == (value, int), (body, name)
            for wrong in (value + 0.5, True, str(value)):
                with pytest.raises(InvalidRequest):
                    read_body_fields(one, {name: wrong})
            tried += 1
    assert tried > 25


@pytest.mark.parametrize("name", ["prompt", "stop_token_ids", "allowed_token_ids"])
def test_a_token_id_is_written_as_an_integer(name: str) -> None:
    """It is a name and no amount."""
    assert parse(**{"prompt": "a", name: [16]})
    for wrong in (16.0, True, 1.5):
        assert refusal(**{"prompt": "a", name: [wrong]}).param == name


@pytest.mark.parametrize("name", ["prompt", "stop_token_ids", "allowed_token_ids"])
@pytest.mark.parametrize("token", [2 * 10**12, INT64_MAX])
def test_a_wrong_token_id_is_shown_as_it_was_sent(name: str, token: int) -> None:
    assert f" {token} " in refusal(**{"prompt": "a", name: [token]}).message


def test_bounds_are_shown_to_the_last_digit() -> None:
    """Those of each integer field."""
    tried = 0
    for body in every_body():
        for name in integers_of(body):
            shape = body.model_json_schema()["properties"][name]
            option = shape.get("anyOf", [shape])[0]
            for key, beyond in (("le", 1), ("maximum", 1), ("ge", -1), ("minimum", -1)):
                if key not in option or abs(option[key] + beyond) > INT64_MAX + 1:
                    continue
                with pytest.raises(InvalidRequest) as caught:
                    read_body_fields(body, {name: option[key] + beyond})
                if caught.value.param == name:
                    assert f"= {option[key]}, but got {option[key] + beyond} instead" in caught.value.message
                    tried += 1
    assert tried > 25


def test_the_last_of_duplicate_keys_counts() -> None:
    assert parse_completion(b'{"n": 1, "n": 2}', LIMITS).body.n == 2


@pytest.mark.parametrize(("fields", "param", "code", "message"), [
    ({"temperature": 2.5}, "temperature", "decimal_above_max_value",
     "Invalid 'temperature': decimal above maximum value. Expected a value <= 2, but got 2.5 instead."),
    ({"top_p": -0.5}, "top_p", "decimal_below_min_value",
     "Invalid 'top_p': decimal below minimum value. Expected a value >= 0, but got -0.5 instead."),
    ({"n": 0}, "n", "integer_below_min_value",
     "Invalid 'n': integer below minimum value. Expected a value >= 1, but got 0 instead."),
    ({"logprobs": 21}, "logprobs", "integer_above_max_value",
     "Invalid 'logprobs': integer above maximum value. Expected a value <= 20, but got 21 instead."),
    ({"max_tokens": False}, "max_tokens", "invalid_type",
     "Invalid type for 'max_tokens': expected an integer, but got a boolean instead."),
    ({"prompt": "a", "stop": ["a"] * 17}, "stop", "array_above_max_length",
     "Invalid 'stop': array too long. Expected an array with maximum length 16, but got an array with length 17 "
     "instead."),
    ({"n": 3, "best_of": 2}, "best_of", None,
     "You requested that the server return more choices than it will generate (HINT: you must set 'n' (currently 3) to "
     "be at most 'best_of' (currently 2), or omit either parameter if you don't specifically want to use them.)"),
    ({"stream_options": {}}, "stream_options", None, "Stream options can only be defined when `stream=True`."),
    ({"prompt": {}}, "prompt", None,
     "Invalid 'prompt': expected a string, an array of strings, or an array of token ids or of arrays of them."),
])  # fmt: skip
def test_wording(fields: dict[str, Any], param: str, code: str | None, message: str) -> None:
    error = refusal(**fields)
    assert (error.message, error.param, error.code) == (message, param, code)


@pytest.mark.parametrize("fields", [
    {"best_of": 0}, {"best_of": 21}, {"n": 129}, {"prompt": ["a"] * 65, "n": 2}, {"prompt": ["a"] * 129},
    {"stream": True, "best_of": 2}, {"min_tokens": 17}, {"min_tokens": 5, "max_tokens": 4}, {"allowed_token_ids": []},
    {"allowed_token_ids": [301]}, {"stop_token_ids": [-1]}, {"stop_token_ids": [True]}, {"truncate_prompt_tokens": 0},
    {"truncate_prompt_tokens": -2}, {"cache_salt": ""}, {"request_id": "a b"}, {"request_id": "a" * 65},
    {"stream": True, "prompt_logprobs": 1}, {"prompt_logprobs": -1}, {"logprobs": -1}, {"repetition_penalty": 0},
    {"logit_bias": {str(i): 1 for i in range(1025)}}, {"stream": True, "stream_options": {"include_usage": 1}},
    {"stream": True, "stream_options": []}, {"priority": 2**31}, {"min_p": 1.5}, {"top_k": -2}, {"suffix": 5},
])  # fmt: skip
def test_refused(fields: dict[str, Any]) -> None:
    assert refusal(**{"prompt": "a", **fields}).param is not None


@pytest.mark.parametrize("fields", [
    {"best_of": 20, "n": 20}, {"prompt": ["a"] * 64, "n": 2}, {"prompt": ["a"] * 128}, {"stream": True, "best_of": 1},
    {"min_tokens": 16}, {"logprobs": 20}, {"stop": ["a" * 256] * 16}, {"seed": -(2**63)}, {"seed": 2**63 - 1},
    {"temperature": 2}, {"logit_bias": {"300": 100}}, {"truncate_prompt_tokens": -1}, {"request_id": "a" * 64},
])  # fmt: skip
def test_the_last_value_that_is_allowed(fields: dict[str, Any]) -> None:
    assert parse(**{"prompt": "a", **fields}).prompts


@pytest.mark.parametrize("name", number_fields())
def test_the_document_states_the_ranges_that_hold(name: str) -> None:
    """One beyond each bound is refused under the field's own name."""
    shape = PROPERTIES[name]["anyOf"][0]
    for bound, step in (("minimum", -1), ("maximum", 1)):
        if bound in shape:
            assert refusal(prompt="a", echo=True, **{name: shape[bound] + step}).param == name


def test_the_document_describes_every_field() -> None:
    assert set(PROPERTIES) == set(CompletionBody.model_fields)
    for name, shape in PROPERTIES.items():
        assert shape["anyOf"][-1] == {"type": "null"}, name
        assert "default" in shape, name
        assert "$ref" not in json.dumps(shape)
    assert not KNOWN & set(PROPERTIES)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
bodies = st.dictionaries(st.sampled_from([*CompletionBody.model_fields, *sorted(KNOWN), "x"]), json_values, max_size=6)


@given(bodies)
def test_any_json_is_a_right_request_or_refused(body: dict[str, Any]) -> None:
    _parse_or_refuse(json.dumps(body).encode())


@given(st.binary(max_size=200) | bodies.map(lambda body: json.dumps(body, ensure_ascii=False).encode(errors="replace")))
def test_any_bytes_are_a_right_request_or_refused(raw: bytes) -> None:
    _parse_or_refuse(raw)


def _parse_or_refuse(raw: bytes) -> None:
    try:
        request = parse_completion(raw, LIMITS)
    except InvalidRequest as error:
        refused = error.message
    else:
        _check(request)
        return
    assert 0 < len(refused) < 600
    assert re.fullmatch(r"[ -~]*", refused), refused


def _check(request: CompletionRequest) -> None:
    params = request.params
    for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
        assert math.isfinite(getattr(params, name))
    assert 1 <= request.body.n <= request.best_of <= LIMITS.max_choices
    assert len(request.prompts) * request.best_of <= LIMITS.max_sequences
    assert all(request.stop)
    tokens = [id_ for prompt in request.prompts if not isinstance(prompt, str) for id_ in prompt]
    tokens += [*params.stop_token_ids, *(params.allowed_token_ids or ()), *(id_ for id_, _ in params.logit_bias)]
    assert all(type(id_) is int and 0 <= id_ < LIMITS.vocab_size for id_ in tokens)


@pytest.mark.parametrize("body", [
    {f"k{i}": 0 for i in range(80_000)}, {"prompt": [["x"]] * 128}, {"prompt": [0] * 400_000},
    {"prompt": [["x"]] * 200_000}, {"stop": ["x"] * 200_000},
    {"logit_bias": {str(i): 1 for i in range(80_000)}}, {"stop_token_ids": ["x"] * 200_000},
    {"stream": True, "stream_options": {f"k{i}": 0 for i in range(80_000)}}, {"temperature": "x" * 1_000_000},
    {"model": "x" * 1_000_000},
], ids=lambda body: ascii(body)[:24])  # fmt: skip
def test_large_bodies_are_read_quickly(body: dict[str, Any]) -> None:
    raw = json.dumps(body).encode()
    gc.collect()
    gc.freeze()  # as the server does: what tests have loaded is not to be walked through again and again
    began = time.process_time()
    _parse_or_refuse(raw)
    spent = time.process_time() - began
    gc.unfreeze()
    assert spent < 0.5  # tens of milliseconds where nothing else runs
