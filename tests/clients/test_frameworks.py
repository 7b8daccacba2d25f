"""LangChain, LlamaIndex and LiteLLM, unmodified, in one environment: what each sends and makes of the answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from outside import Environment, say
from serving import RunningServer

SETUP = """
import asyncio, json, warnings
warnings.simplefilter("ignore")
base = {url!r} + "/v1"
say = lambda value: print(json.dumps(value))
"""
Run = Callable[[str], list[Any]]


@pytest.fixture(scope="module")
def run(server: RunningServer, environment: Environment) -> Run:
    wanted = ("langchain-openai>=1", "llama-index-llms-openai-like>=0.8", "litellm>=1.100")
    python = environment("frameworks", *wanted)
    return lambda script: say([python, "-c", SETUP.format(url=server.url) + script])


def test_langchain(run: Run) -> None:
    whole, streamed, batch, usage, apart, many, error = run(
        """
from langchain_openai import OpenAI
llm = OpenAI(base_url=base, api_key="x", model="gpt-3.5-turbo-instruct", max_tokens=20, seed=5, temperature=0.7)
say(llm.invoke("The tower is"))
say("".join(llm.stream("The tower is")))
result = llm.generate(["The tower is", "a"] * 12, stop=["zzz"])
say([each[0].text for each in result.generations])
say(result.llm_output["token_usage"]["prompt_tokens"])
say(asyncio.run(llm.ainvoke("The tower is")))
many = OpenAI(base_url=base, api_key="x", model="ada", max_tokens=8, n=2, best_of=3, logit_bias={"50256": -100.0})
say([len(each) for each in many.generate(["a", "b"]).generations])
try:
    llm.invoke("word " * 1100)
except Exception as raised:
    say("context_length_exceeded" in str(raised))
"""
    )
    assert whole
    assert whole == streamed == apart
    assert batch == [whole, batch[1]] * 12
    assert usage == 12 * 4
    assert many == [2, 2]
    assert error is True


def test_llama_index(run: Run) -> None:
    whole, streamed, scores = run(
        """
from llama_index.llms.openai_like import OpenAILike
llm = OpenAILike(model="text-davinci-003", api_base=base, api_key="x", is_chat_model=False, max_tokens=20,
                 additional_kwargs={"seed": 5})
say(llm.complete("The tower is").text)
say("".join(chunk.delta for chunk in llm.stream_complete("The tower is")))
scored = OpenAILike(model="ada", api_base=base, api_key="x", max_tokens=4, logprobs=True, top_logprobs=2)
say([[each.token for each in row] for row in scored.complete("The tower is").logprobs])
"""
    )
    assert whole
    assert streamed == whole
    assert len(scores) == 4
    assert all(len(row) >= 2 for row in scores)


def test_litellm(run: Run) -> None:
    whole, streamed, ids, errors = run(
        """
import litellm
litellm.suppress_debug_info = True
ask = dict(model="text-completion-openai/text-davinci-002", api_base=base, api_key="x", max_tokens=20, seed=5)
whole = litellm.text_completion(prompt="The tower is", **ask)
say([whole.choices[0].text, whole.choices[0].finish_reason, whole.usage.prompt_tokens])
say("".join(chunk.choices[0].text or "" for chunk in litellm.text_completion(prompt="The tower is", stream=True, **ask)))
say(litellm.text_completion(prompt=[464, 10580, 318], **ask).choices[0].text)
said = []
for wrong, kind in (({"prompt": "word " * 1100}, litellm.ContextWindowExceededError),
                    ({"prompt": "a", "temperature": 7}, litellm.BadRequestError)):
    try:
        litellm.text_completion(**{**ask, **wrong})
    except kind as error:
        said.append(kind.__name__)
say(said)
"""  # noqa: E501
    )
    assert whole[0]
    assert whole[1:] == ["length", 3]
    assert streamed == whole[0] == ids
    assert errors == ["ContextWindowExceededError", "BadRequestError"]
