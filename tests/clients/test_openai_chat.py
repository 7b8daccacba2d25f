"""Chat with the current openai client, unmodified, and how a server with a template starts."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from serving import RunningServer, serving, start

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
ASK: dict[str, Any] = {
    "model": "gpt-3.5-turbo-instruct",
    "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is the sea?"}],
    "seed": 5,
}


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    template = tmp_path_factory.mktemp("chat") / "chat.jinja"
    template.write_text(TEMPLATE)
    with serving(tiny, "--threads", "1", "--chat-template", str(template)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-anything")


def test_whole_and_streamed(client: openai.OpenAI, server: RunningServer) -> None:
    fields = {**ASK, "max_completion_tokens": 20, "logprobs": True, "top_logprobs": 2, "n": 2}
    whole = client.chat.completions.create(**fields)
    assert whole.object == "chat.completion"
    texts, rows = {0: "", 1: ""}, {0: 0, 1: 0}
    for chunk in client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            rows[choice.index] += len(choice.logprobs.content) if choice.logprobs else 0
    assert [choice.message.content for choice in whole.choices] == [texts[0], texts[1]]
    assert [len(choice.logprobs.content) for choice in whole.choices] == [rows[0], rows[1]]
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
    prompt = "system: Be brief.\nuser: Where is the sea?\nassistant:"
    same = server.complete(prompt=prompt, max_tokens=20, seed=5, n=2)
    assert [choice["text"] for choice in same["choices"]] == [texts[0], texts[1]]
    assert whole.usage.prompt_tokens == same["usage"]["prompt_tokens"]


def test_asynchronous(server: RunningServer) -> None:
    async def main() -> str:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
            stream = await client.chat.completions.create(**ASK, max_tokens=10, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(main())


def test_the_clients_own_helper_for_streams(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(**ASK, stop="a", logit_bias={"64": 100}) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].finish_reason == "stop"  # it raises where the length ends an answer
    assert final.choices[0].message.role == "assistant"


def test_response_format(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"], "additionalProperties": False}
    format_: Any = {"type": "json_schema", "json_schema": {"name": "p", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(**ASK, max_tokens=60, response_format=format_)
    assert answer.choices[0].finish_reason == "stop"
    assert json.loads(answer.choices[0].message.content or "")["x"] in (1, 2)


def test_tools_are_refused_by_name(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**ASK, tools=[tool])
    assert refused.value.param == "tools"


def test_a_template_with_a_fault_stops_the_start(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text("{% if %}")
    process = start(tiny, "--chat-template", str(path))
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 78
    assert re.fullmatch(r"gpt2-server: the chat template is wrong in line 1: .*\n", said), said
