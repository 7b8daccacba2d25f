"""The whole service on real input: batching, text, seeds, and clients that leave."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from serving import RunningServer

MIXED = [
    {
        "prompt": " ".join(["word", "tree", "sea"][: 1 + i % 3] * (1 + i)),
        "max_tokens": 5 + 3 * (i % 11),
        "temperature": [0.0, 0.7, 1.0, 1.4][i % 4],
        "top_p": [1.0, 0.9][i % 2],
        "seed": i,
        "logprobs": [None, 0, 3][i % 3],
    }
    for i in range(32)
]


def answer(server: RunningServer, request: dict[str, Any]) -> list[dict[str, Any]]:
    choices: list[dict[str, Any]] = server.complete(**request)["choices"]
    return choices


def test_thirty_two_requests_get_what_each_gets_alone_and_share_their_steps(idle: RunningServer) -> None:
    """They arrive one by one while a long one streams, ride along in its steps, and add hardly a step of their own."""
    alone = [answer(idle, request) for request in MIXED]
    before = idle.metrics()["gpt2_engine_step_seconds_count"]
    long = {"prompt": "a", "max_tokens": 900, "stream": True, "seed": 1, "ignore_eos": True}
    together = []
    with (
        ThreadPoolExecutor(32) as pool,
        httpx.stream("POST", f"{idle.url}/v1/completions", json=long, timeout=60) as stream,
    ):
        chunks = (line for line in stream.iter_lines() if line)
        for count, _ in enumerate(chunks):
            if count % 10 == 0 and len(together) < len(MIXED):
                together.append(pool.submit(answer, idle, MIXED[len(together)]))
    assert [future.result() for future in together] == alone
    steps = idle.metrics()["gpt2_engine_step_seconds_count"] - before
    assert 900 <= steps < 950


def test_a_running_batch_is_joined_and_left_at_once(idle: RunningServer) -> None:
    """A short request that arrives while a long one runs is answered long before the long one's end."""
    with httpx.stream(
        "POST", f"{idle.url}/v1/completions", json={"prompt": "a", "max_tokens": 900, "stream": True, "seed": 1}
    ) as long:
        chunks = (line for line in long.iter_lines() if line)
        next(chunks)
        answer(idle, {"prompt": "b", "max_tokens": 3, "seed": 1})
        left = sum(1 for _ in chunks)
    assert left > 300


TEXTS = [
    "plain",
    "naïve café — “quotes”",
    "e\u0301 a\u0308 combining",
    "日本語のテキスト、中文字符",
    "👩🏽‍🚀🇺🇳 emoji 🏳️‍🌈",
    "עברית العربية",
    "".join(chr(value) for value in range(1, 256)),
]


@pytest.mark.parametrize("prompt", TEXTS)
def test_streamed_text_joined_is_the_unstreamed_text(prompt: str, idle: RunningServer) -> None:
    request = {"prompt": prompt, "max_tokens": 40, "temperature": 1.5, "seed": 3, "echo": True}
    whole = idle.complete(**request)["choices"][0]["text"]
    assert whole.startswith(prompt)
    assert "".join(chunk["choices"][0]["text"] for chunk in idle.stream(**request)) == whole


def test_every_single_byte_can_be_said_and_streamed(idle: RunningServer) -> None:
    """Each byte's own token, forced by a bias; what is no UTF-8 by itself becomes one replacement character."""
    vocabulary = {}
    for token in range(256):  # GPT-2's first 256 tokens are the bytes, in an order of its own
        row = httpx.post(f"{idle.url}/v1/completions", json={"prompt": [token], "max_tokens": 0, "echo": True}).json()
        vocabulary[token] = row["choices"][0]["text"]
    assert sorted(text for text in vocabulary.values() if text != "\ufffd") == [chr(value) for value in range(128)]
    for token in (0, 100, 187, 188, 222, 255):
        request = {"prompt": "x", "max_tokens": 1, "temperature": 0, "logit_bias": {str(token): 100}}
        assert idle.complete(**request)["choices"][0]["text"] == vocabulary[token]
        assert "".join(chunk["choices"][0]["text"] for chunk in idle.stream(**request)) == vocabulary[token]


def test_a_character_of_many_tokens_comes_whole(idle: RunningServer) -> None:
    """Echoed from its ids: no replacement character stands inside it, in whatever pieces it comes."""
    text = "say 👩🏽‍🚀字é"
    tokens = httpx.post(f"{idle.url}/tokenize", json={"prompt": text}).json()["tokens"]
    chunks = idle.stream(prompt=tokens, max_tokens=1, seed=1, echo=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks).startswith(text)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_frees_its_blocks(stream: bool, n: int, idle: RunningServer) -> None:
    before = idle.metrics().get('gpt2_request_success_total{finished_reason="abort"}', 0)
    where = urlsplit(idle.url)
    assert where.hostname is not None
    body = json.dumps({"prompt": "a b c d e f", "max_tokens": 1000, "stream": stream, "n": n, "ignore_eos": True})
    with socket.create_connection((where.hostname, where.port or 80)) as client:
        client.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        deadline = time.monotonic() + 10
        while idle.metrics()["gpt2_num_requests_running"] < n:
            assert time.monotonic() < deadline
        assert idle.metrics()["gpt2_kv_cache_usage_perc"] > 0
    now = idle.wait_until_idle()
    assert now['gpt2_request_success_total{finished_reason="abort"}'] == before + n


def test_samples_differ_and_can_be_had_again(idle: RunningServer) -> None:
    request = {"prompt": "Once", "n": 4, "max_tokens": 12, "seed": 11}
    first, second = (answer(idle, request) for _ in range(2))
    assert first == second
    assert len({choice["text"] for choice in first}) == 4
    assert answer(idle, {**request, "n": 2}) == first[:2]


def test_equal_prompts_without_a_seed_are_sampled_apart_and_with_one_alike(idle: RunningServer) -> None:
    request = {"prompt": ["Once"] * 3, "max_tokens": 12}
    assert len({choice["text"] for choice in answer(idle, request)}) == 3
    (alone,) = answer(idle, {**request, "prompt": "Once", "seed": 11})
    assert [choice["text"] for choice in answer(idle, {**request, "seed": 11})] == [alone["text"]] * 3


def test_named_tokens_are_scored_beside_each_of_the_output(idle: RunningServer) -> None:
    request = {"prompt": "Once upon a time", "max_tokens": 6, "temperature": 0}
    likely = answer(idle, {**request, "logprobs": 20})[0]["logprobs"]["top_logprobs"]
    named = answer(
        idle, {**request, "logprobs": 0, "logprob_token_ids": [262, 290], "return_tokens_as_token_ids": True}
    )
    rows = named[0]["logprobs"]
    assert len(rows["top_logprobs"]) == len(likely) == 6
    for row, token, twenty in zip(rows["top_logprobs"], rows["tokens"], likely, strict=True):
        assert row.keys() == {"token_id:262", "token_id:290", token}
        for name, text in (("token_id:262", " the"), ("token_id:290", " and")):
            assert row[name] <= 0
            assert text not in twenty or row[name] == pytest.approx(twenty[text], abs=1e-5)


def test_another_order_of_samplers_is_another_sample_and_can_be_had_again(idle: RunningServer) -> None:
    request = {"prompt": "Once", "max_tokens": 24, "seed": 3, "temperature": 1.8, "top_p": 0.9, "min_p": 0.02}
    first = answer(idle, request)
    last = answer(idle, {**request, "samplers": ["top_p", "min_p", "temperature"]})
    assert last == answer(idle, {**request, "samplers": ["top_p", "min_p", "temperature"]})
    assert first[0]["text"] != last[0]["text"]


def test_best_of_returns_the_most_likely(idle: RunningServer) -> None:
    request = {"prompt": "Once", "max_tokens": 12, "seed": 11, "logprobs": 0}
    every = answer(idle, {**request, "n": 5})

    def mean(choice: dict[str, Any]) -> float:
        values = choice["logprobs"]["token_logprobs"]
        return sum(values) / len(values)

    ranked = sorted(every, key=mean, reverse=True)
    got = idle.complete(**request, n=2, best_of=5)
    assert [choice["text"] for choice in got["choices"]] == [choice["text"] for choice in ranked[:2]]
    assert got["usage"]["completion_tokens"] == sum(len(choice["logprobs"]["tokens"]) for choice in every)


def test_prompt_scoring_is_one_pass_and_generates_nothing(idle: RunningServer) -> None:
    ids = [1212, 318, 257, 1332]
    before = idle.metrics()
    got = idle.complete(prompt=[ids, ids[:2]], max_tokens=0, echo=True, logprobs=2)
    after = idle.metrics()
    assert after["gpt2_engine_step_seconds_count"] == before["gpt2_engine_step_seconds_count"] + 1
    assert got["usage"]["completion_tokens"] == 0
    assert [len(choice["logprobs"]["tokens"]) for choice in got["choices"]] == [4, 2]
    assert {choice["finish_reason"] for choice in got["choices"]} == {"length"}
    first = got["choices"][0]["logprobs"]
    assert first["token_logprobs"][0] is None
    # Scored as a prompt, or drawn one by one: the same model, the same numbers.
    for cut in range(1, 4):
        forced = {"prompt": ids[:cut], "max_tokens": 1, "logprobs": 2, "logit_bias": {str(ids[cut]): 100}}
        (value,) = idle.complete(**forced, temperature=0)["choices"][0]["logprobs"]["token_logprobs"]
        assert first["token_logprobs"][cut] == pytest.approx(value, abs=1e-5)


def test_prompt_logprobs_without_echo(idle: RunningServer) -> None:
    choice = idle.complete(prompt="a b c d", max_tokens=1, prompt_logprobs=1)["choices"][0]
    assert choice["prompt_logprobs"][0] is None
    assert len(choice["prompt_logprobs"]) == 4
    assert choice["logprobs"] is None
    many = idle.complete(prompt="a b c d", max_tokens=1, prompt_logprobs=20)["choices"][0]["prompt_logprobs"]
    for few, more in zip(choice["prompt_logprobs"][1:], many[1:], strict=True):
        assert sorted(scored["rank"] for scored in more.values())[:20] == list(range(1, 21))
        assert all(more[token] == scored for token, scored in few.items())
        assert max(scored["rank"] for scored in more.values()) <= 50257
