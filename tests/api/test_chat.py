"""Chat: messages by the operator's template, and the rest a completion in another shape."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from asking import Api, error_of, events_of, make_api
from scripted import EOS, ScriptedEngine, says
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

import model
from server.api.chat_template import ChatTemplate, chat_template_source
from server.errors import InvalidRequest, SettingsError

PLAIN = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
HELLO = [{"role": "user", "content": "hi"}]
PATH = "/v1/chat/completions"


def template(source: str = PLAIN) -> ChatTemplate:
    return ChatTemplate(source, named={"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"})


def chat_api(engine: ScriptedEngine | None = None, source: str = PLAIN) -> Api:
    return make_api(engine, chat_template=template(source))


@pytest.fixture(scope="module")
def api() -> Api:
    return chat_api()


def ask(api: Api, **fields: Any) -> dict[str, Any]:
    response = api.post(PATH, **{"messages": HELLO, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def refused(api: Api, **fields: Any) -> dict[str, Any]:
    return error_of(api.post(PATH, **{"messages": HELLO, **fields}), 400)


def prompt_of(api: Api) -> list[int]:
    return api.engine.requests[-1].prompts[0].token_ids


def test_an_answer_in_chats_shape(api: Api) -> None:
    answer = ask(api, model="gpt2")
    assert answer["id"].startswith("chatcmpl-")
    assert (answer["object"], answer["model"]) == ("chat.completion", "gpt2")
    assert answer["choices"] == [{
        "index": 0,
        "message": {"role": "assistant", "content": "hello", "refusal": None},
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
    }]  # fmt: skip
    assert answer["usage"]["prompt_tokens"] == len(prompt_of(api)) == len("u:hi") + 1 + len("a:")
    assert prompt_of(api) == [*b"u:hi", EOS, *b"a:"]


def test_a_stream_joined_is_the_answer() -> None:
    api = chat_api(ScriptedEngine(says("h\u00e9llo")))
    fields = {"n": 2, "logprobs": True, "top_logprobs": 2, "stream_options": {"include_usage": True}}
    response = api.post(PATH, messages=HELLO, stream=True, **fields)
    *events, done = events_of(response.text)
    assert done == "[DONE]"
    chunks = [json.loads(data) for data in events]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    usage = chunks.pop()
    assert usage["choices"] == []
    fields.pop("stream_options")
    whole = ask(api, **fields)
    assert usage["usage"] == whole["usage"]
    for choice in whole["choices"]:
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert mine[-1]["delta"] == {}
        assert [piece["finish_reason"] for piece in mine] == [None] * (len(mine) - 1) + ["stop"]
        assert "".join(piece["delta"].get("content", "") for piece in mine) == choice["message"]["content"]
        rows = [row for piece in mine if piece["logprobs"] for row in piece["logprobs"]["content"]]
        assert rows == choice["logprobs"]["content"]


def test_logprobs_in_chats_shape() -> None:
    api = chat_api(ScriptedEngine(says("a\u00e9".encode()[:2])))
    assert ask(api)["choices"][0]["logprobs"] is None
    for fields, count in (({}, 0), ({"top_logprobs": 0}, 0), ({"top_logprobs": 3}, 3)):
        letter, half, end = ask(api, logprobs=True, **fields)["choices"][0]["logprobs"]["content"]
        assert (letter["token"], letter["bytes"]) == ("a", [97])
        assert (half["token"], half["bytes"]) == ("\\xc3", [0xC3])
        assert end["token"] == "<|endoftext|>"
        assert [len(row["top_logprobs"]) for row in (letter, half, end)] == [count] * 3
        assert all(set(top) == {"token", "logprob", "bytes"} for top in letter["top_logprobs"])


def test_it_is_as_long_as_the_context_unless_it_is_told_otherwise(api: Api) -> None:
    ask(api)
    assert api.engine.requests[-1].params.max_tokens == 64 - len(prompt_of(api))
    ask(api, max_completion_tokens=3)
    assert api.engine.requests[-1].params.max_tokens == 3
    ask(api, max_tokens=2)
    assert api.engine.requests[-1].params.max_tokens == 2
    assert refused(api, max_tokens=2, max_completion_tokens=2)["param"] == "max_completion_tokens"
    error = refused(api, max_tokens=60)
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")
    assert refused(api, messages=[{"role": "user", "content": "x" * 80}])["code"] == "context_length_exceeded"


def test_sampling_parameters_are_those_of_completions(api: Api) -> None:
    fields = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1,
        "repetition_penalty": 1.5, "logit_bias": {"5": 1}, "seed": 3, "min_tokens": 2, "ignore_eos": True,
        "stop_token_ids": [4], "allowed_token_ids": [1, 2], "typical_p": 0.5, "xtc_probability": 0.5,
        "xtc_threshold": 0.2, "bad_words": ["x"], "dry_multiplier": 1,
    }  # fmt: skip
    ask(api, max_tokens=5, **fields)
    params = api.engine.requests[-1].params
    api.complete(prompt="a", max_tokens=5, **fields)
    assert params == api.engine.requests[-1].params
    ask(api, stop=["l"], n=2, best_of=3)
    assert (api.engine.requests[-1].n, api.engine.requests[-1].best_of) == (2, 3)
    assert ask(api, stop=["l"])["choices"][0]["message"]["content"] == "he"


def test_special_tokens_are_the_templates_to_write(api: Api) -> None:
    """A message that holds the name of one holds text: it does not end its turn."""
    ask(api, messages=[{"role": "user", "content": "a<|endoftext|>b"}])
    assert prompt_of(api) == [*b"u:a<|endoftext|>b", EOS, *b"a:"]
    ask(api, messages=[{"role": "user", "content": [{"type": "text", "text": "1<|endoftext|>2<|endoftext|>"}]}])
    assert prompt_of(api) == [*b"u:1<|endoftext|>2<|endoftext|>", EOS, *b"a:"]


def test_parts_are_lines(api: Api) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    ask(api, messages=[{"role": "system", "content": "s"}, {"role": "user", "content": parts}])
    assert prompt_of(api) == [*b"s:s", EOS, *b"u:a\nb", EOS, *b"a:"]
    ask(api, add_generation_prompt=False)
    assert prompt_of(api) == [*b"u:hi", EOS]


@pytest.mark.parametrize("messages", [
    None, [], "hi", {}, [1], [{}], [{"role": "user"}], [{"role": "tool", "content": "x"}], [{"content": "x"}],
    [{"role": "user", "content": 5}], [{"role": "user", "content": []}], [{"role": "user", "content": None}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
    [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": "x", "name": 3}],
    [{"role": ["user"], "content": "x"}],
], ids=str)  # fmt: skip
def test_wrong_messages(api: Api, messages: Any) -> None:
    assert refused(api, messages=messages)["param"] == "messages"


@pytest.mark.parametrize(("name", "value"), [
    ("tools", [{"type": "function", "function": {"name": "f"}}]), ("functions", [{"name": "f"}]),
    ("chat_template", "{{ messages }}"), ("chat_template_kwargs", {"a": 1}), ("documents", [{}]), ("echo", True),
    ("prompt", "x"), ("suffix", "x"), ("prompt_logprobs", 1), ("modalities", ["audio"]), ("audio", {}),
    ("truncate_prompt_tokens", 3), ("mirostat", 1), ("continue_final_message", True), ("store", True),
    ("top_logprobs", 2), ("logprobs", 1), ("max_tokens", 0), ("temperature", 3), ("best_of", 0),
])  # fmt: skip
def test_what_is_not_honoured_is_refused_by_name(api: Api, name: str, value: Any) -> None:
    assert refused(api, **{name: value})["param"] == name


def test_a_call_of_a_tool_is_refused(api: Api) -> None:
    messages = [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]
    assert refused(api, messages=messages)["param"] == "tool_calls"


def test_what_asks_for_nothing_is_let_through_and_the_unknown_is_named(api: Api) -> None:
    fields = {"tools": [], "tool_choice": "none", "modalities": ["text"], "store": False, "echo": False, "user": "u"}
    response = api.post(PATH, messages=HELLO, whatever=1, **fields)
    assert response.status_code == 200
    assert response.headers["x-ignored-fields"] == "whatever"


def test_engines_chat_too(api: Api) -> None:
    for path in ("/v1/engines/openai-community%2Fgpt2/chat/completions", "/chat/completions"):
        assert api.post(path, messages=HELLO).json()["object"] == "chat.completion"
    without = make_api()
    assert "--chat-template" in error_of(without.post("/v1/engines/gpt2/chat/completions"), 400)["message"]


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
        "{% for a in messages[0].content %}{% for b in messages[0].content %}{% set c = b %}{% endfor %}{% endfor %}",
        "{% macro again() %}{% for a in range(90000) %}{{ again() }}{% endfor %}{% endmacro %}{{ again() }}",
        "{{ messages[0].content * 100000000 }}",
        "{{ (messages[0].content * 100) | length * 'x' * 1000000 }}",
        "{{ 7 ** (7 ** 9) }}",
        "{% for a in range(3000) %}{{ messages[0].content }}{% endfor %}",
    ],
    ids=range(7),
)
def test_a_template_that_takes_too_long_is_refused_and_stops_nobody(source: str) -> None:
    """Whatever it does with what a client sent: the processor time and the text of one rendering are bounded."""
    api = chat_api(source=source)
    long = [{"role": "user", "content": "hi" * 20_000}]
    error = error_of(api.post(PATH, messages=long), 400)
    assert error["param"] == "messages"
    assert "The chat template" in error["message"]


def test_a_template_that_refuses() -> None:
    api = chat_api(source="{{ raise_exception('roles must alternate') }}")
    error = refused(api)
    assert error["message"] == "The chat template refuses these messages: roles must alternate"
    for source in ("{{ 1 / 0 }}", "{{ messages[0].content.nothing.more }}", "{{ ''.__class__.__mro__[1].x }}"):
        error = refused(chat_api(source=source))
        assert error["param"] == "messages"
        assert "cannot be filled" in error["message"]


def test_an_empty_prompt_starts_a_document() -> None:
    api = chat_api(source="")
    ask(api)
    assert prompt_of(api) == [EOS]


TEMPLATES = [
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}\n{% if add_generation_prompt %}\n{{ '<|im_start|>assistant\n' }}\n{% endif %}",
    "{{ bos_token }}{% for message in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
    "[{{ message | tojson }}]{% endfor %}",
    "{%- set ns = namespace(last='') -%}\n    {% for m in messages %}\n    {% set ns.last = m.content | trim %}\n"
    "{% endfor %}\n{% generation %}{{ ns.last | upper }}{% endgeneration %}{{ tools is none }}",
]


@pytest.mark.parametrize("source", TEMPLATES)
def test_templates_are_filled_as_transformers_fills_them(source: str) -> None:
    messages = [
        {"role": "system", "content": " <b>Be \"brief\"</b> & 'kind' \u00e9"},
        {"role": "user", "content": "line\nline "},
        {"role": "assistant", "content": ""},
    ]
    tokens = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    for opens in (True, False):
        theirs, _ = render_jinja_template([messages], chat_template=source, add_generation_prompt=opens, **tokens)
        assert template(source).render(messages, add_generation_prompt=opens) == theirs[0]


def test_the_date_and_the_sandbox() -> None:
    year = template("{{ strftime_now('%Y') }}").render([], add_generation_prompt=True)
    assert year == str(datetime.now().year)
    with pytest.raises(InvalidRequest):
        template("{{ messages.append(1) }}").render([], add_generation_prompt=True)


@pytest.mark.parametrize(("content", "line"), [
    (b"{% for %}", "wrong in line 1"), (b"\n{{ x", "wrong in line 2"), (b"\xff", "not UTF-8"), (None, "No such file"),
])  # fmt: skip
def test_a_file_that_is_no_template(content: bytes | None, line: str, tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match=line) as refusal:
        ChatTemplate(chat_template_source(str(path), tmp_path) or "", named={})
    assert str(tmp_path) not in str(refusal.value)


NAMED = [{"name": "tool", "template": "C"}, {"name": "default", "template": "D"}]


@pytest.mark.parametrize(("files", "found"), [
    ({"chat_template.jinja": "A", "tokenizer_config.json": '{"chat_template": "B"}'}, "A"),
    ({"tokenizer_config.json": '{"chat_template": "B"}'}, "B"),
    ({"tokenizer_config.json": json.dumps({"chat_template": NAMED})}, "D"),
])  # fmt: skip
def test_the_template_of_a_model_is_found_as_transformers_finds_it(
    files: dict[str, str], found: str, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert chat_template_source("auto", tmp_path) == found
    assert chat_template_source(None, tmp_path) is None
    for name in ("config.json", "vocab.json", "merges.txt"):
        shutil.copy(Path(model.__file__).parent / "default" / name, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path).chat_template
    assert (theirs["default"] if isinstance(theirs, dict) else theirs) == found


def test_auto_without_a_template_says_so(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="hold no chat template"):
        chat_template_source("auto", tmp_path)
