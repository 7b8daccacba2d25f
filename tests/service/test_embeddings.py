"""Embeddings through the whole service, against transformers' hidden states."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from serving import RunningServer, serving
from transformers import GPT2Model

IDS = [[464, 10580, 318], [50256], list(range(1000, 1300))]


def embed(server: RunningServer, **body: Any) -> dict[str, Any]:
    answer = httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    decoded: dict[str, Any] = answer.json()
    return decoded


def expected(theirs: GPT2Model, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return theirs(torch.tensor([ids])).last_hidden_state[0].mean(0)


@pytest.fixture(scope="module")
def theirs(tiny: Path) -> GPT2Model:
    return GPT2Model.from_pretrained(tiny).eval()


def test_they_are_the_mean_of_the_hidden_states(idle: RunningServer, theirs: GPT2Model) -> None:
    answer = embed(idle, input=IDS)
    assert answer["object"] == "list"
    assert answer["usage"] == {"prompt_tokens": 304, "total_tokens": 304}
    assert [each["index"] for each in answer["data"]] == [0, 1, 2]
    for each, ids in zip(answer["data"], IDS, strict=True):
        np.testing.assert_allclose(each["embedding"], expected(theirs, ids), atol=1e-4)


def test_text_and_base64_say_the_same(idle: RunningServer) -> None:
    (one,) = embed(idle, input="The tower is")["data"]
    (same,) = embed(idle, input=[464, 10580, 318])["data"]
    (coded,) = embed(idle, input=["The tower is"], encoding_format="base64")["data"]
    assert one == same
    decoded = np.frombuffer(base64.b64decode(coded["embedding"]), dtype="<f4")
    np.testing.assert_array_equal(decoded, np.float32(one["embedding"]))


def test_pieces_caches_and_neighbours_change_nothing(tiny: Path) -> None:
    """Long inputs in chunks of 16, beside others, after the same prompt has been cached: the same bytes."""
    ids = list(range(2000, 2200))
    with serving(tiny, "--threads", "1") as whole:
        alone = embed(whole, input=ids, encoding_format="base64")["data"][0]["embedding"]
    with serving(tiny, "--threads", "1", "--max-num-batched-tokens", "16") as chunked:
        chunked.complete(prompt=ids, max_tokens=4)
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: embed(chunked, input=ids, encoding_format="base64"), range(4)))
    assert {answer["data"][0]["embedding"] for answer in answers} == {alone}


def test_the_openai_client_reads_them(idle: RunningServer, theirs: GPT2Model) -> None:
    with openai.OpenAI(base_url=f"{idle.url}/v1", api_key="x") as client:
        answer = client.embeddings.create(model="davinci", input=IDS)  # asks for base64, and decodes it
    np.testing.assert_allclose(answer.data[2].embedding, expected(theirs, IDS[2]), atol=1e-4)


@pytest.mark.parametrize(("body", "param"), [
    ({}, "input"), ({"input": ""}, "input"), ({"input": []}, "input"), ({"input": [50257]}, "input"),
    ({"input": "a", "encoding_format": "int8"}, "encoding_format"), ({"input": "a", "dimensions": 8}, "dimensions"),
    ({"input": list(range(1025))}, "prompt"), ({"input": "a", "model": "none"}, "model"), ({"input": None}, "input"),
])  # fmt: skip
def test_mistakes(idle: RunningServer, body: dict[str, Any], param: str) -> None:
    answer = httpx.post(f"{idle.url}/v1/embeddings", json=body)
    assert answer.status_code == (404 if param == "model" else 400)
    assert answer.json()["error"]["param"] == param
