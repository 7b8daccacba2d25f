"""openai 1.109.1, the last of the 1.x that most programs still pin: sync, async, streamed, raw, errors, retries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from faulty import BUSY, LIMITED, refusing
from outside import Environment, say
from serving import RunningServer

SETUP = """
import asyncio, json, openai
client = openai.OpenAI(base_url={url!r} + "/v1", api_key="sk-anything")
say = lambda value: print(json.dumps(value))
ask = dict(model="text-davinci-002", prompt="The tower is", max_tokens=20, seed=5)
"""
Run = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def run(server: RunningServer, environment: Environment) -> Run:
    python = environment("openai-1.109.1", "openai==1.109.1")
    return lambda script, url=server.url: say([python, "-c", SETUP.format(url=url) + script])


def test_whole_streamed_and_asynchronous_say_the_same(run: Run) -> None:
    whole, streamed, reasons, usage, apart, apart_streamed = run(
        """
say(client.completions.create(**ask).choices[0].text)
chunks = list(client.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
say("".join(choice.text for chunk in chunks for choice in chunk.choices))
say([choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason])
say([chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens])

async def main():
    async with openai.AsyncOpenAI(base_url=client.base_url, api_key="x") as other:
        say((await other.completions.create(**ask)).choices[0].text)
        text = ""
        async for chunk in await other.completions.create(**ask, stream=True):
            text += chunk.choices[0].text
        say(text)
asyncio.run(main())
"""
    )
    assert whole
    assert whole == streamed == apart == apart_streamed
    assert reasons == ["length"]
    assert usage == [3, 20]


def test_raw_answers_models_and_errors(run: Run) -> None:
    said = run(
        """
raw = client.completions.with_raw_response.create(**ask, extra_headers={"x-request-id": "mine-1"})
say([raw.headers["x-request-id"], raw.parse()._request_id, raw.parse().object])
say([client.models.list().data[0].id, client.models.retrieve("davinci").object])
for wrong, kind in (({"model": "nope"}, openai.NotFoundError), ({"max_tokens": 5000}, openai.BadRequestError)):
    try:
        client.completions.create(**{**ask, **wrong})
    except kind as error:
        say([error.code, error.param, error.type])
"""
    )
    assert said[0] == ["mine-1", "mine-1", "text_completion"]
    assert said[1][1] == "model"
    assert said[2:] == [
        ["model_not_found", "model", "invalid_request_error"],
        ["context_length_exceeded", "prompt", "invalid_request_error"],
    ]


def test_retries_wait_as_long_as_they_are_told(run: Run, server: RunningServer) -> None:
    with refusing(server.url, BUSY, LIMITED) as proxy:
        (text,) = run("say(client.completions.create(**ask).choices[0].text)", proxy.url)
    assert text
    assert [headers["x-stainless-retry-count"] for headers in proxy.seen] == ["0", "1", "2"]
