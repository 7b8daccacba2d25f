"""llama.cpp's samplers and bad words by the whole service: they act, and change nothing for anybody else."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from serving import RunningServer

LETTERS = list(range(64, 80))  # the tokens a to p: texts of these repeat themselves
BASE: dict[str, Any] = {
    "prompt": "one two one two", "max_tokens": 60, "seed": 5, "ignore_eos": True, "allowed_token_ids": LETTERS
}  # fmt: skip
SAMPLERS: list[dict[str, Any]] = [
    {"typical_p": 0.3},
    {"xtc_probability": 0.5, "xtc_threshold": 0.0},
    {"dry_multiplier": 50.0, "dry_allowed_length": 1, "temperature": 0},
    {"bad_words": ["e", "a", "the", " of"], "temperature": 0},
    {"typical_p": 0.8, "top_k": 50, "xtc_probability": 1.0, "xtc_threshold": 0.01, "dry_multiplier": 1.0},
]


def choice(server: RunningServer, **fields: Any) -> dict[str, Any]:
    answer: dict[str, Any] = server.complete(**BASE, **fields, return_token_ids=True)["choices"][0]
    return answer


def test_each_acts_and_can_be_had_again_in_any_company(idle: RunningServer) -> None:
    alone = [choice(idle, **fields) for fields in SAMPLERS]
    with ThreadPoolExecutor(10) as pool:
        assert list(pool.map(lambda fields: choice(idle, **fields), SAMPLERS * 2)) == alone * 2
    plain, greedy = choice(idle), choice(idle, temperature=0)
    for fields, answer in zip(SAMPLERS, alone, strict=True):
        assert answer["token_ids"] != (greedy if "temperature" in fields else plain)["token_ids"], fields


def test_bad_words_are_never_said(idle: RunningServer) -> None:
    """As the runs of tokens that they are: "no" is one token, and says nothing of an n before an o."""
    text = choice(idle, temperature=0)["text"]
    pairs = {text[i : i + 2] for i in range(len(text) - 1)}
    pair = next(pair for pair in sorted(pairs) if len(_tokens(idle, pair)) == 2)
    letter = next(c for c in text if c not in pair)
    again = choice(idle, temperature=0, bad_words=[pair, letter])["text"]
    assert pair not in again
    assert letter not in again
    assert len(again) == len(text)


def _tokens(server: RunningServer, text: str) -> list[int]:
    tokens: list[int] = httpx.post(f"{server.url}/tokenize", json={"prompt": text}).json()["tokens"]
    return tokens


def test_dry_says_nothing_twice(idle: RunningServer) -> None:
    """With a penalty that nothing outweighs, no pair of tokens comes again but across a breaker."""
    strong = {"dry_multiplier": 100.0, "dry_allowed_length": 1, "dry_sequence_breakers": [], "temperature": 0}
    ids = idle.complete(prompt="a", max_tokens=200, ignore_eos=True, return_token_ids=True, **strong)["choices"][0]
    pairs = list(zip(ids["token_ids"], ids["token_ids"][1:], strict=False))
    assert len(pairs) == len(set(pairs))


def test_breakers_reach_the_sampler(idle: RunningServer) -> None:
    """Where every token breaks a repetition, dry does nothing."""
    strong = {"dry_multiplier": 100.0, "dry_allowed_length": 1, "temperature": 0}
    letters = [chr(ord("a") + i) for i in range(16)]
    plain = choice(idle, temperature=0)["text"]
    assert choice(idle, **strong, dry_sequence_breakers=letters)["text"] == plain
    assert choice(idle, **strong, dry_sequence_breakers=[])["text"] != plain


BANNED: list[tuple[str, dict[str, Any]]] = [
    ("allowed_token_ids", {"allowed_token_ids": [262], "bad_words": [" the"]}),
    ("allowed_token_ids", {"allowed_token_ids": [262], "bad_words": ["the"]}),
    ("allowed_token_ids", {"allowed_token_ids": [262, 9], "logit_bias": {"262": -100, "9": -100}}),
    ("allowed_token_ids", {"allowed_token_ids": [50256], "min_tokens": 1}),
    ("allowed_token_ids", {"allowed_token_ids": [5, 6], "min_tokens": 3, "stop_token_ids": [5, 6]}),
]


@pytest.mark.parametrize(("param", "fields"), BANNED, ids=str)
def test_a_request_that_bans_every_token_is_refused(param: str, fields: dict[str, Any], idle: RunningServer) -> None:
    answer = httpx.post(f"{idle.url}/v1/completions", json={"prompt": "a", **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_a_choice_ends_where_nothing_may_follow_and_says_nothing_forbidden(idle: RunningServer) -> None:
    """The one token that is allowed may not follow itself."""
    (allowed,) = _tokens(idle, " a")
    fields = {"prompt": "one", "allowed_token_ids": [allowed], "bad_words": [" a a"], "max_tokens": 9}
    for more in ({}, {"n": 3, "logprobs": 2}, {"min_tokens": 5, "temperature": 0}, {"stop_token_ids": [9]}):
        for answer in idle.complete(**fields, **more, return_token_ids=True)["choices"]:
            assert answer["token_ids"] == [allowed]
            assert (answer["text"], answer["finish_reason"], answer["stop_reason"]) == (" a", "stop", None)
    pieces = [chunk["choices"][0] for chunk in idle.stream(**fields)]
    assert ("".join(piece["text"] for piece in pieces), pieces[-1]["finish_reason"]) == (" a", "stop")


def test_a_line_end_among_the_bad_words_bans_line_ends(idle: RunningServer) -> None:
    (end,), (space,) = _tokens(idle, "\n"), _tokens(idle, " ")
    fields = {"prompt": "one", "allowed_token_ids": [end, space], "bad_words": ["\n"], "max_tokens": 9}
    assert set(idle.complete(**fields, return_token_ids=True)["choices"][0]["token_ids"]) == {space}
