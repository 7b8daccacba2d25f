"""openai 0.28.1, unmodified: the scripts of 2022 run with nothing changed but the base URL and the key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from outside import Environment, say
from serving import RunningServer

SETUP = """
import asyncio, json, openai
openai.api_base = {url!r} + "/v1"
openai.api_key = "sk-anything"
say = lambda value: print(json.dumps(value))
"""
SCRIPT = """
say(openai.Completion.create(engine="text-davinci-002", prompt="The tower is 324 metres (1,063 ft) tall,", temperature=0.9, max_tokens=60, top_p=1, n=1, stream=False, stop=None, logprobs=None)["choices"][0]["text"])
"""  # noqa: E501 - verbatim
Run = Callable[[str], Any]


@pytest.fixture(scope="module")
def run(server: RunningServer, environment: Environment) -> Run:
    python = environment("openai-0.28.1", "openai==0.28.1")
    return lambda script: say([python, "-c", SETUP.format(url=server.url) + script])


def test_the_script_runs_verbatim(run: Run) -> None:
    (text,) = run(SCRIPT)
    assert len(text) > 20


def test_with_a_stop_list(run: Run) -> None:
    (answer,) = run(
        'say(openai.Completion.create(engine="text-davinci-002", prompt="The tower", max_tokens=60, stop=["\\n"]))'
    )
    assert "\n" not in answer["choices"][0]["text"]


def test_streamed_text_is_the_unstreamed_text(run: Run) -> None:
    ask = 'openai.Completion.create(engine="text-davinci-002", prompt="The tower", max_tokens=60, seed=5'
    whole, streamed = run(
        f'say({ask})["choices"][0]["text"])\nsay("".join(chunk["choices"][0]["text"] for chunk in {ask}, stream=True)))'
    )
    assert len(whole) > 20
    assert streamed == whole


def test_asynchronous_streamed(run: Run) -> None:
    (text,) = run(
        """
async def main():
    text = ""
    async for chunk in await openai.Completion.acreate(model="davinci", prompt="The tower", max_tokens=9, stream=True):
        text += chunk["choices"][0]["text"]
    say(text)
asyncio.run(main())
"""
    )
    assert text


def test_logprobs_and_several_samples(run: Run) -> None:
    (answer,) = run('say(openai.Completion.create(engine="ada", prompt=["a", "b"], n=2, max_tokens=4, logprobs=2))')
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert all(len(choice["logprobs"]["tokens"]) == 4 for choice in answer["choices"])


def test_engines_and_models_can_be_listed(run: Run) -> None:
    engines, engine, models, model = run(
        """
say([each["id"] for each in openai.Engine.list()["data"]])
say(openai.Engine.retrieve("text-davinci-002")["ready"])
say([each["id"] for each in openai.Model.list()["data"]])
say(openai.Model.retrieve("text-davinci-002")["object"])
"""
    )
    assert engines == models
    assert "text-davinci-002" in engines
    assert engine is True
    assert model == "model"


def test_errors_are_its_own_exceptions(run: Run) -> None:
    said = run(
        """
for arguments in ({"engine": "nope", "prompt": "a"}, {"engine": "ada", "prompt": "a", "temperature": 3},
                  {"engine": "ada", "prompt": "a", "max_tokens": 5000}):
    try:
        openai.Completion.create(**arguments)
    except openai.error.InvalidRequestError as error:
        say([error.http_status, error.param, error.code])
"""
    )
    assert said == [
        [404, "model", "model_not_found"],
        [400, "temperature", "decimal_above_max_value"],
        [400, "prompt", "context_length_exceeded"],
    ]
