"""openai for node, unmodified: whole, streamed, raw, its errors and its retries."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faulty import BUSY, refusing
from outside import say
from serving import RunningServer

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")

SETUP = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: %s + "/v1", apiKey: "sk-anything" });
const say = (value) => console.log(JSON.stringify(value));
const ask = { model: "text-davinci-002", prompt: "The tower is", max_tokens: 20, seed: 5 };
"""
Run = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def run(server: RunningServer, node_modules: Callable[..., Path]) -> Run:
    directory = node_modules("node", "openai@6.49.0")

    def run_script(script: str, url: str = server.url) -> list[Any]:
        return say(["node", "--input-type=module", "--eval", SETUP % json.dumps(url) + script], directory)

    return run_script


def test_whole_and_streamed_say_the_same(run: Run) -> None:
    whole, request_id, streamed, usage = run(
        """
const { data, response } = await client.completions.create(ask).withResponse();
say(data.choices[0].text);
say([response.headers.get("x-request-id"), data._request_id]);
let text = "", last;
const stream = await client.completions.create({ ...ask, stream: true, stream_options: { include_usage: true } });
for await (const chunk of stream) { last = chunk; for (const choice of chunk.choices) text += choice.text; }
say(text);
say([last.usage.prompt_tokens, last.usage.completion_tokens]);
"""
    )
    assert whole
    assert whole == streamed
    assert request_id[0] == request_id[1]
    assert usage == [3, 20]


def test_errors_models_and_a_stream_that_is_left(run: Run) -> None:
    said = run(
        """
for (const wrong of [{ model: "nope" }, { max_tokens: 5000 }]) {
  try { await client.completions.create({ ...ask, ...wrong }); }
  catch (error) { say([error.status, error.constructor.name, error.code]); }
}
const names = [];
for await (const model of client.models.list()) names.push(model.id);
say(names.includes("davinci"));
say((await client.models.retrieve(names[0])).id === names[0]);
const stream = await client.completions.create({ ...ask, max_tokens: 900, stream: true });
for await (const chunk of stream) { stream.controller.abort(); break; }
say("left");
"""
    )
    assert said == [
        [404, "NotFoundError", "model_not_found"],
        [400, "BadRequestError", "context_length_exceeded"],
        True,
        True,
        "left",
    ]


def test_retries_wait_as_long_as_they_are_told(run: Run, server: RunningServer) -> None:
    with refusing(server.url, BUSY) as proxy:
        (text,) = run("say((await client.completions.create(ask)).choices[0].text);", proxy.url)
    assert text
    assert [headers["x-stainless-retry-count"] for headers in proxy.seen] == ["0", "1"]
