"""What is sent to other servers means the same here, or is refused by name; and front ends work as they come."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import front_ends
import pytest
from asking import LIMITS, Api, error_of, events_of, make_api
from peers import PEERS

from server.api.aliases import ALIASES, CONTEXTS
from server.api.chat_template import ChatTemplate
from server.api.limits import Limits
from server.api.parsing import CompletionRequest, parse_completion
from server.api.sampler_order import ORDERS
from server.api.schemas import CompletionBody
from server.api.unsupported import DEPENDENT, HARMLESS, KNOWN, OFF_UP_TO, REFUSABLE, UNSUPPORTED
from server.errors import InvalidRequest

ROOMY = Limits(max_model_len=1024, vocab_size=301)
HONOURED = {*CompletionBody.model_fields, *ALIASES, *CONTEXTS, *ORDERS}
TEMPLATE = ChatTemplate("{{ messages[0].content }}", named={"eos_token": "<|endoftext|>"})


def parse(limits: Limits = ROOMY, **fields: Any) -> CompletionRequest:
    return parse_completion(json.dumps(fields).encode(), limits)


def refusal(limits: Limits = ROOMY, **fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(limits, **fields)
    return caught.value


@pytest.mark.parametrize("peer", PEERS)
def test_every_field_of_a_peer_is_honoured_refused_or_harmless(peer: str) -> None:
    for name in PEERS[peer].fields:
        assert name in HONOURED | KNOWN, name
        assert parse_or_refuse(name) in {name, None}


def parse_or_refuse(name: str) -> str | None:
    """What is refused where the field holds something; None where it is taken, and nobody calls it ignored."""
    try:
        request = parse(**{"prompt": "a", name: {"some": "thing"}})
    except InvalidRequest as error:
        return error.param
    assert request.ignored == ()
    assert name in DEPENDENT | HARMLESS | {"response_format", "grammar", "json_schema", "guided_json"}, name
    return None


@pytest.mark.parametrize("name", sorted(REFUSABLE))
def test_what_is_not_honoured_is_refused_by_name_unless_it_asks_for_nothing(name: str) -> None:
    error = refusal(prompt="a", **{name: {"some": "thing"}})
    assert (error.param, error.code) == (name, "unsupported_parameter")
    assert f"'{name}'" in error.message
    for idle in (*UNSUPPORTED.get(name, ()), *([OFF_UP_TO[name], -1] if name in OFF_UP_TO else [])):
        assert parse(prompt="a", **{name: idle}).ignored == ()
    if name in OFF_UP_TO:
        assert refusal(prompt="a", **{name: OFF_UP_TO[name] + 0.5}).param == name


def test_a_field_has_one_fate() -> None:
    assert not HONOURED & KNOWN
    assert not REFUSABLE & (DEPENDENT | HARMLESS)


@pytest.mark.parametrize("name", sorted(HARMLESS))
def test_what_can_change_no_answer_changes_none(name: str) -> None:
    plain = parse(prompt="a", seed=1)
    for value in (True, 5, "x", ["x"], {"x": 1}):
        assert parse(prompt="a", seed=1, **{name: value}) == plain


def test_the_page_lists_what_can_change_no_answer() -> None:
    page = (Path(__file__).parents[2] / "docs" / "clients.md").read_text("utf-8")
    for name in HARMLESS | REFUSABLE | set(ALIASES) | set(CONTEXTS) | set(ORDERS):
        assert f"`{name}`" in page, name


# alias: a value, and what it means by our names
MEANINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "n_predict": (7, {"max_tokens": 7}), "num_predict": (7, {"max_tokens": 7}),
    "max_new_tokens": (7, {"max_tokens": 7}),
    "max_completion_tokens": (7, {"max_tokens": 7}), "max_length": (7, {"max_tokens": 7}), "n_cmpl": (2, {"n": 2}),
    "n_probs": (2, {"logprobs": 2}), "repeat_penalty": (1.5, {"repetition_penalty": 1.5}),
    "rep_pen": (1.5, {"repetition_penalty": 1.5}), "repeat_last_n": (64, {"repetition_penalty_range": 64}),
    "rep_pen_range": (64, {"repetition_penalty_range": 64}), "min_new_tokens": (3, {"min_tokens": 3}),
    "min_length": (3, {"min_tokens": 3}), "do_sample": (False, {"temperature": 0.0}),
    "truncate": (3, {"truncate_prompt_tokens": 3}), "return_full_text": (True, {"echo": True}),
    "regex": ("a+", {"guided_regex": "a+"}), "ebnf": ('root ::= "a"', {"guided_grammar": 'root ::= "a"'}),
    "grammar_string": ('root ::= "a"', {"guided_grammar": 'root ::= "a"'}),
    "no_stop_trim": (True, {"include_stop_str_in_output": True}),
    "trim_stop": (False, {"include_stop_str_in_output": True}), "rid": ("job-7", {"request_id": "job-7"}),
    "stopping_strings": (["x"], {"stop": ["x"]}), "stop_sequence": (["x"], {"stop": ["x"]}),
    "typical": (0.5, {"typical_p": 0.5}), "typ_p": (0.5, {"typical_p": 0.5}), "sampler_seed": (5, {"seed": 5}),
    "add_bos_token": (True, {"add_special_tokens": True}), "render_special": (True, {"skip_special_tokens": False}),
}  # fmt: skip
SILENT = {"n_predict": -1, "num_predict": -1, "n_probs": 0, "repeat_last_n": -1, "do_sample": True, "regex": "",
          "ebnf": "", "grammar_string": "", "sampler_seed": -1}  # fmt: skip


def test_every_alias_has_a_meaning() -> None:
    assert MEANINGS.keys() == ALIASES.keys()


@pytest.mark.parametrize("name", sorted(ALIASES))
def test_another_name_means_the_same(name: str) -> None:
    value, ours = MEANINGS[name]
    base: dict[str, Any] = {"prompt": "a", "seed": 1}
    base = base if "seed" not in ours else {"prompt": "a"}
    assert parse(**base, **{name: value}) == parse(**base, **ours)
    assert parse(**base, **{name: value}, **ours) == parse(**base, **ours)  # both, and they agree
    if name != "add_bos_token":
        assert parse(**base, **ours) != parse(**base, **({} if "seed" not in ours else {"seed": 6}))


@pytest.mark.parametrize("name", sorted(ALIASES))
def test_two_names_with_different_values_are_refused(name: str) -> None:
    ours = ALIASES[name].name
    others = {"max_tokens": 9, "n": 3, "logprobs": 1, "repetition_penalty": 1.25, "repetition_penalty_range": 9,
              "min_tokens": 1, "temperature": 0.5, "truncate_prompt_tokens": 9, "echo": False, "guided_regex": "b",
              "guided_grammar": 'root ::= "b"', "include_stop_str_in_output": False, "request_id": "b", "stop": ["b"],
              "typical_p": 0.25, "seed": 9, "add_special_tokens": False, "skip_special_tokens": True}  # fmt: skip
    error = refusal(prompt="a", **{name: MEANINGS[name][0], ours: others[ours]})
    assert error.param == name
    assert f"'{ours}'" in error.message


@pytest.mark.parametrize("name", ["n_predict", "repeat_penalty", "min_new_tokens", "typical", "n_probs", "rid"])
def test_what_is_wrong_with_an_alias_is_said_of_the_name_that_was_sent(name: str) -> None:
    error = refusal(prompt="a", **{name: "no number!"})
    assert error.param == name
    assert f"'{name}'" in error.message
    assert f"'{ALIASES[name].name}'" not in error.message


def test_minus_one_token_fills_the_context() -> None:
    for name in ("n_predict", "num_predict"):
        request = parse(prompt="a", **{name: -1})
        assert (request.body.max_tokens, request.params.max_tokens) == (None, ROOMY.max_model_len)
        assert parse(prompt="a", max_tokens=3, **{name: -1}).params.max_tokens == 3


def test_a_seed_of_minus_one_is_none(api: Api) -> None:
    api.complete(prompt=["a", "a"], seed=-1)
    first, second = api.engine.requests[-1].seeds
    assert first != second
    api.complete(prompt=["a", "a"], seed=5)
    assert (api.engine.requests[-1].seeds, api.engine.requests[-1].params.seed) == ((), 5)


def test_a_window_of_no_tokens_is_refused_where_there_is_a_penalty() -> None:
    assert refusal(prompt="a", repeat_last_n=0, repeat_penalty=1.1).param == "repeat_last_n"
    assert parse(prompt="a", repeat_last_n=0).ignored == ()
    assert parse(prompt="a", repeat_last_n=0, repetition_penalty_range=0, repeat_penalty=1.1).ignored == ()


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_smaller_context_keeps_the_last_of_a_prompt(name: str) -> None:
    assert parse(prompt="a", max_tokens=10, **{name: 100}).keep == 90
    assert parse(prompt="a", max_tokens=100, **{name: 100}).keep == 1
    for roomy in (0, 1024, 10**9):
        assert parse(prompt="a", **{name: roomy}).keep is None
    for wrong in ("x", -1, 1.5, True):
        assert refusal(prompt="a", **{name: wrong}).param == name


def test_truncation_side_says_which_end_is_kept(api: Api) -> None:
    for side, kept in (("left", [98, 99]), ("right", [97, 98])):
        api.complete(prompt="abc", truncate_prompt_tokens=2, truncation_side=side)
        assert api.engine.requests[-1].prompts[0].token_ids == kept
    assert api.error(prompt="a", truncation_side="middle")["param"] == "truncation_side"


def test_named_tokens_are_scored_at_each_position(api: Api) -> None:
    assert api.error(prompt="a", logprob_token_ids=[5])["param"] == "logprob_token_ids"
    assert api.error(prompt="a", logprobs=1, logprob_token_ids=[])["param"] == "logprob_token_ids"
    assert api.error(prompt="a", logprobs=1, logprob_token_ids=[301])["param"] == "logprob_token_ids"
    assert api.error(prompt="a", logprobs=1, logprob_token_ids=list(range(21)))["param"] == "logprob_token_ids"
    api.complete(prompt="a", logprobs=0, logprob_token_ids=[9, 5])
    assert api.engine.requests[-1].params.logprob_token_ids == (5, 9)


BREAKERS = ["\n", ":", '"', "*"]


@pytest.mark.parametrize("text", ['["\\n", ":", "\\"", "*"]', '"\\n", ":", "\\"", "*"'])
def test_breakers_may_come_as_the_text_of_json(text: str) -> None:
    assert parse(prompt="a", dry_sequence_breakers=text).body.dry_sequence_breakers == BREAKERS
    for wrong in ("not json", '{"a": 1}', "[1]", '"a', "[" * 100_000, "[" * 200 + "]" * 200):
        assert refusal(prompt="a", dry_sequence_breakers=wrong).param == "dry_sequence_breakers"


def test_biases_may_come_as_pairs() -> None:
    assert parse(prompt="a", logit_bias=[[5, 1.5], [7, False]]).params.logit_bias == ((5, 1.5), (7, -100.0))
    assert parse(prompt="a", logit_bias=[]).params.logit_bias == ()
    for wrong in ([[5]], [["x", 1]], [5], [[5, True]], [[301, 1]]):
        assert refusal(prompt="a", logit_bias=wrong).param == "logit_bias"


def test_a_chat_reads_other_names_too_and_refuses_those_of_what_it_has_not() -> None:
    api = make_api(limits=ROOMY, chat_template=TEMPLATE)
    hi: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}

    def ask(**fields: Any) -> Any:
        return api.post("/v1/chat/completions", **hi, **fields)

    assert ask(n_predict=3, rep_pen=1.5, sampler_seed=4).status_code == 200
    params = api.engine.requests[-1].params
    assert (params.max_tokens, params.repetition_penalty, params.seed) == (3, 1.5, 4)
    assert ask(logprobs=True, logprob_token_ids=[5, 9]).status_code == 200
    assert api.engine.requests[-1].params.logprob_token_ids == (5, 9)
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert ask(tools=tools, tool_choice="none").status_code == 200
    assert error_of(ask(tools=tools), 400)["param"] == "tools"
    for name, value in (("return_full_text", True), ("truncate", 4), ("num_ctx", 100), ("truncation_side", "right")):
        assert error_of(ask(**{name: value}), 400)["param"] == name
    for name, value in (("return_full_text", False), ("num_ctx", 8192)):
        assert ask(**{name: value}).status_code == 200


def test_tools_that_must_not_be_called_ask_for_nothing() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert parse(prompt="a", tools=tools, tool_choice="none").ignored == ()
    assert refusal(prompt="a", tools=tools, tool_choice="auto").param == "tools"
    assert refusal(prompt="a", tools=tools).param == "tools"


@pytest.mark.parametrize(("order", "active", "last"), [
    ({"samplers": ["top_k", "typ_p", "top_p", "temperature"]}, {"top_p": 0.9}, (True, False)),
    ({"samplers": "kypmt"}, {"top_p": 0.9, "min_p": 0.1}, (True, True)),
    ({"samplers": "ektmp"}, {"top_p": 0.9, "min_p": 0.1}, (False, False)),
    ({"samplers": "kt"}, {"top_k": 5}, (False, False)),
    ({"sampler_order": [6, 0, 1, 3, 4, 2, 5]}, {"top_p": 0.9}, (True, False)),
    ({"sampler_order": [6, 5, 0, 1, 3, 4, 2]}, {"top_p": 0.9, "min_p": 0.1}, (False, True)),
    ({"sampler_priority": "temperature\ntop_p,min_p"}, {"top_p": 0.9, "temperature_last": True}, (True, False)),
    ({"sampler_priority": ["top_p_top_k", "temperature"]}, {"top_p": 0.9, "top_k": 5}, (True, False)),
    ({"samplers": ["top_p", "top_k", "temperature"]}, {"top_p": 0.9}, (True, False)),
])  # fmt: skip
def test_an_order_of_samplers_is_kept(order: dict[str, Any], active: dict[str, Any], last: tuple[bool, bool]) -> None:
    params = parse(prompt="a", temperature=0.7, **order, **active).params
    assert (params.temperature_last, params.min_p_last) == last


@pytest.mark.parametrize(("order", "active"), [
    ({"samplers": ["top_p", "top_k", "temperature"]}, {"top_p": 0.9, "top_k": 5}),
    ({"samplers": ["top_p", "temperature", "min_p"]}, {"top_p": 0.9, "min_p": 0.1}),
    ({"samplers": ["top_p"]}, {"top_p": 0.9}),  # without temperature, which is on
    ({"samplers": ["typ_p", "top_p", "temperature"]}, {"top_p": 0.9, "typical_p": 0.5}),
    ({"sampler_priority": ["temperature", "top_p", "penalties"]}, {"top_p": 0.9, "presence_penalty": 1}),
    ({"sampler_order": {"a": 1}}, {"top_p": 0.9}), ({"samplers": 7}, {"top_p": 0.9}),
])  # fmt: skip
def test_an_order_that_cannot_be_kept_is_refused_by_name(order: dict[str, Any], active: dict[str, Any]) -> None:
    assert refusal(prompt="a", temperature=0.7, **order, **active).param == next(iter(order))


# === Front ends, as they come ===


def roomy_api(**parts: Any) -> Api:
    return make_api(limits=replace(ROOMY, clamp_max_tokens=True), **parts)


BODIES = {
    "mikupad": front_ends.MIKUPAD,
    "mikupad with all samplers": front_ends.MIKUPAD_ALL_SAMPLERS,
    "koboldai lite": front_ends.KOBOLDAI_LITE,
    "koboldai lite on this machine": front_ends.KOBOLDAI_LITE_ON_THIS_MACHINE,
    "text-generation-webui": front_ends.TEXT_GENERATION_WEBUI,
    "llama.cpp's simple chat": front_ends.LLAMA_CPP_SIMPLE_CHAT,
    "promptfoo": front_ends.PROMPTFOO,
    **{f"sillytavern, {name}": body for name, body in front_ends.SILLY_TAVERN.items()},
}
# What no server knows any more, or a front end tells itself: named in x-ignored-fields.
LEFTOVERS = {"penalize_nl", "api_type", "api_server"}


@pytest.mark.parametrize("name", BODIES)
def test_a_front_end_works_as_it_comes(name: str) -> None:
    api, body = roomy_api(), BODIES[name]
    answer = api.post(**body)
    assert answer.status_code == 200, answer.text
    assert set(answer.headers.get("x-ignored-fields", "").split(", ")) - {""} == LEFTOVERS & body.keys()
    if body.get("stream"):
        assert events_of(answer.text)[-1] == "[DONE]"
    else:
        assert answer.json()["choices"][0]["text"] == "hello"


@pytest.mark.parametrize("body", [front_ends.LLAMA_CPP_CHAT, front_ends.LLAMA_CPP_CHAT_WITH_ALL_SETTINGS])
def test_llama_cpps_page_works_as_it_comes(body: dict[str, Any]) -> None:
    api = roomy_api(chat_template=TEMPLATE)
    answer = api.post("/v1/chat/completions", **body)
    assert answer.status_code == 200, answer.text
    assert "x-ignored-fields" not in answer.headers
    params = api.engine.requests[-1].params
    assert params.max_tokens == ROOMY.max_model_len - len(b"hi")
    assert params.temperature_last is params.min_p_last is ("samplers" in body)


def test_the_fields_of_koboldai_lite_itself_work_but_for_the_slope() -> None:
    body = dict(front_ends.KOBOLDAI_LITE_NON_STANDARD)
    assert error_of(roomy_api().post(**body), 400)["param"] == "rep_pen_slope"
    assert roomy_api().post(**{**body, "rep_pen_slope": 1}).status_code == 200


@pytest.mark.parametrize("name", ["mikupad", "koboldai lite on this machine", "llama.cpp's simple chat", "promptfoo"])
def test_the_error_of_a_front_end_that_asks_for_too_much_names_the_setting(name: str) -> None:
    error = error_of(make_api(limits=ROOMY).post(**BODIES[name]), 400)
    assert error["code"] == "context_length_exceeded"
    assert "--clamp-max-tokens" in error["message"]


def test_one_grammar_by_two_names_is_one_grammar() -> None:
    structure = parse(**front_ends.GUIDANCE).structure
    assert structure is not None
    assert structure.text == front_ends.GUIDANCE["guided_grammar"]
    other = {**front_ends.GUIDANCE, "guided_grammar": 'start: "c"'}
    assert "cannot be given together" in refusal(**other).message


@pytest.mark.parametrize("path", ["/completion", "/infill", "/api/generate", "/api/v1/generate"])
def test_routes_of_other_protocols_are_not_found(path: str) -> None:
    assert error_of(make_api(limits=LIMITS).post(path, prompt="a"), 404)["message"].startswith("Invalid URL")
