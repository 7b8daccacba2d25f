"""Random completion requests that are right: the fields that change an answer, in any combination."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=24) | st.sampled_from(
    ["", "The sea", "日本語", "👩🏽‍🚀 e\u0301", "a<|endoftext|>b", "line\u2028\x85\r\n end", "\x00"]
)
IDS = st.lists(st.integers(0, 50256), min_size=1, max_size=12)
PROMPTS = (
    st.none() | TEXTS | st.lists(TEXTS, min_size=1, max_size=3) | IDS | st.lists(IDS, min_size=1, max_size=3)
)  # what a request may say of its prompt
STOPS = st.sampled_from([" ", "e", "a", "th", "\n", "\ufffd", "ing ", "<|endoftext|>", "é"])
RARE: dict[str, st.SearchStrategy[Any]] = {
    "echo": st.booleans(),
    "logprobs": st.sampled_from([None, 0, 1, 5, 20]),
    "stop": STOPS | st.lists(STOPS, max_size=5),
    "temperature": st.sampled_from([0, 0.3, 1, 1.0, 2.0]),
    "top_p": st.sampled_from([0, 0.2, 0.9, 1]),
    "top_k": st.sampled_from([-1, 0, 1, 40, 100_000]),
    "min_p": st.sampled_from([0, 0.05, 1.0]),
    "presence_penalty": st.sampled_from([-2, 0.5, 2]),
    "frequency_penalty": st.sampled_from([-2, 0.5, 2]),
    "repetition_penalty": st.sampled_from([0.5, 1.0, 1.3]),
    "repetition_penalty_range": st.sampled_from([0, 1, 5, 1000]),
    "temperature_last": st.booleans(),
    "samplers": st.just("ekpmxt"),
    "truncation_side": st.sampled_from(["left", "right"]),
    "logit_bias": st.dictionaries(st.integers(0, 50256).map(str), st.floats(-100, 100), max_size=4)
    | st.just({"50256": 8.5}),
    "ignore_eos": st.booleans(),
    "stop_token_ids": st.lists(st.integers(0, 50256), max_size=3) | st.just(list(range(400))),
    "include_stop_str_in_output": st.booleans(),
    "allowed_token_ids": st.just(list(range(300))) | st.just([50256, 64, 65, 220]),
    "return_token_ids": st.booleans(),
    "return_tokens_as_token_ids": st.booleans(),
    "truncate_prompt_tokens": st.sampled_from([-1, 1, 5]),
    "skip_special_tokens": st.booleans(),
    "priority": st.integers(-2, 2),
    "cache_salt": st.sampled_from(["x", "y"]),
    "user": st.just("somebody"),
}


@st.composite
def requests_drawn(draw: st.DrawFn) -> dict[str, Any]:
    request: dict[str, Any] = {
        "prompt": draw(PROMPTS),
        "seed": draw(st.integers(-(2**63), 2**63 - 1).filter(lambda seed: seed != -1)),  # which is none
        "max_tokens": draw(st.integers(0, 16)),
    }
    for name in draw(st.lists(st.sampled_from(sorted(RARE)), max_size=6, unique=True)):
        request[name] = draw(RARE[name])
    if request["max_tokens"] == 0:
        request["echo"] = True
    elif request.get("logprobs") is not None and draw(st.booleans()):
        request["logprob_token_ids"] = draw(st.lists(st.integers(0, 50256), min_size=1, max_size=20))
    if request["max_tokens"]:
        request["min_tokens"] = draw(st.integers(0, request["max_tokens"]) | st.just(0))
    if set(request.get("allowed_token_ids", [-1])) <= {50256, *request.get("stop_token_ids", ())}:
        request.pop("min_tokens", None)  # no token would be left
    request["n"] = draw(st.sampled_from([1, 1, 1, 2, 3]))
    return request
