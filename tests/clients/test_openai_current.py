"""The current openai client, unmodified: sync and async, whole and streamed, raw, its errors and its retries."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from faulty import BUSY, LIMITED, refusing
from serving import RunningServer, serving

from server.errors import ServerError

ASK = {"model": "text-davinci-002", "prompt": "The tower is", "max_tokens": 20, "seed": 5}


@pytest.fixture(scope="module")
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-anything")


def test_whole(client: openai.OpenAI) -> None:
    answer = client.completions.create(**ASK)  # type: ignore[call-overload]
    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].text
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 20)


def test_streamed(client: openai.OpenAI) -> None:
    whole = client.completions.create(**ASK).choices[0].text  # type: ignore[call-overload]
    chunks = list(client.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))  # type: ignore[call-overload]
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    assert [reason for reason in reasons if reason] == ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == 23


def test_asynchronous(server: RunningServer) -> None:
    async def main() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="sk-anything") as client:
            whole = await client.completions.create(**ASK)  # type: ignore[call-overload]
            text = ""
            async for chunk in await client.completions.create(**ASK, stream=True):  # type: ignore[call-overload]
                text += chunk.choices[0].text
        return whole.choices[0].text, text

    whole, streamed = asyncio.run(main())
    assert whole == streamed


def test_raw_answer_and_request_id(client: openai.OpenAI) -> None:
    raw = client.completions.with_raw_response.create(**ASK, extra_headers={"x-request-id": "mine-1"})
    assert raw.headers["x-request-id"] == "mine-1"
    assert raw.headers["openai-model"]
    assert raw.parse().choices[0].text


def test_models(client: openai.OpenAI) -> None:
    models = [model.id for model in client.models.list()]
    assert "text-davinci-002" in models
    assert client.models.retrieve(models[0]).id == models[0]


def test_errors_are_its_own_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nope", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="ada", prompt="a", max_tokens=5000)
    assert long.value.code == "context_length_exceeded"
    assert long.value.message.startswith("Error code: 400")


@pytest.mark.parametrize("refusal", [BUSY, LIMITED], ids=["503", "429"])
def test_retries_wait_as_long_as_they_are_told(refusal: ServerError, server: RunningServer) -> None:
    with refusing(server.url, refusal) as proxy, openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="x") as client:
        assert client.completions.create(**ASK).choices[0].text  # type: ignore[call-overload]
    assert [headers["x-stainless-retry-count"] for headers in proxy.seen] == ["0", "1"]


@pytest.mark.parametrize(("refusal", "kind"), [(BUSY, openai.InternalServerError), (LIMITED, openai.RateLimitError)])
def test_refusals_end_in_its_own_exceptions(
    refusal: ServerError, kind: type[openai.APIStatusError], server: RunningServer
) -> None:
    with (
        refusing(server.url, refusal) as proxy,
        openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="x", max_retries=0) as client,
        pytest.raises(kind) as refused,
    ):
        client.completions.create(**ASK)  # type: ignore[call-overload]
    assert refused.value.response.headers["retry-after"] == "1"


def test_a_full_queue_is_waited_for(tiny: Path) -> None:
    """Four at once at a server that computes one and lets one wait: all are answered in the end."""
    narrow = ("--max-num-seqs", "1", "--max-num-queued-reqs", "1", "--threads", "1")
    with serving(tiny, *narrow) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
        patient = client.with_options(max_retries=20)

        def ask(seed: int) -> int:
            answer = patient.completions.create(model="ada", prompt="a", max_tokens=40, seed=seed)
            return answer.usage.prompt_tokens  # type: ignore[union-attr]

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(ask, range(4))) == [1] * 4
        assert sum(value for name, value in server.metrics().items() if name.startswith("gpt2_requests_rejected")) > 0
