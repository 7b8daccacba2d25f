"""The traps that other servers fell into, one test each, as far as they lie above the engine. Numbered as the
list of promises numbers them: what an answer holds (1 to 14)."""

from __future__ import annotations

from dataclasses import replace

import pytest
from asking import LIMITS, Api, join, make_api
from scripted import CONTEXT, EOS, logprobs_of, says


def logprobs_in(answer: dict, choice: int = 0) -> dict:
    return answer["choices"][choice]["logprobs"]


def test_01_text_offset_starts_at_the_prompts_end_without_echo(api: Api) -> None:
    api.engine.script = says("é!" + "适", eos=False)
    for fields in ({"prompt": "天气非常好"}, {"prompt": list("天气非常好".encode())}):
        assert logprobs_in(api.complete(logprobs=0, **fields))["text_offset"] == [5, 5, 6, 7, 7, 7]
        echoed = logprobs_in(api.complete(logprobs=0, echo=True, **fields))["text_offset"]
        assert (echoed[0], echoed[-6:]) == (0, [5, 5, 6, 7, 7, 7])
        streamed = join(api.chunks(logprobs=0, echo=True, **fields))
        assert streamed[0]["logprobs"]["text_offset"] == echoed


def test_02_logprobs_0_is_on_null_is_off_true_is_wrong(api: Api) -> None:
    logprobs = logprobs_in(api.complete(prompt="a", logprobs=0))
    assert logprobs["tokens"] == list("hello")
    assert logprobs["top_logprobs"] is None
    assert len(logprobs["token_logprobs"]) == 5
    assert logprobs_in(api.complete(prompt="a", logprobs=None)) is None
    assert "logprobs" in api.complete(prompt="a")["choices"][0]
    assert api.error(prompt="a", logprobs=True)["param"] == "logprobs"


def test_03_partial_characters_are_named_by_their_bytes(api: Api) -> None:
    api.engine.script = says("适", eos=False)
    logprobs = logprobs_in(api.complete(prompt="a", logprobs=1))
    assert logprobs["tokens"] == ["bytes:\\xe9", "bytes:\\x80", "bytes:\\x82"]
    assert all(token in top for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True))


def test_04_a_tokens_score_and_its_entry_are_the_same_float(api: Api) -> None:
    logprobs = logprobs_in(api.complete(prompt="hello there", logprobs=3, echo=True))
    columns = zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
    assert all(top[token] == value for token, value, top in list(columns)[1:])


def test_05_eos_keeps_its_entry(api: Api) -> None:
    api.engine.script = says("hi")
    answer = api.complete(prompt="a", logprobs=1)
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("hi", "stop", None)
    assert choice["logprobs"]["tokens"] == ["h", "i", "<|endoftext|>"]
    assert choice["logprobs"]["text_offset"] == [1, 2, 3]
    assert answer["usage"]["completion_tokens"] == 3
    one = logprobs_in(api.complete(prompt="ab", logprobs=1, max_tokens=1, echo=True))
    assert [len(column) for column in one.values()] == [3, 3, 3, 3]  # exactly one entry was generated


@pytest.mark.parametrize("n", [1, 3])
def test_06_prompt_scoring(api: Api, n: int) -> None:
    prompts = ["hello", " the cat"]
    answer = api.complete(prompt=prompts, logprobs=2, echo=True, max_tokens=0, n=n)
    assert [choice["text"] for choice in answer["choices"]] == ["hello"] * n + [" the cat"] * n
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    assert answer["usage"]["completion_tokens"] == 0
    first, first_ids = logprobs_in(answer), api.engine.requests[-1].prompts[0].token_ids
    assert first["tokens"] == ["he", "llo"]
    assert first["token_logprobs"][0] is None
    assert first["top_logprobs"][0] is None
    assert first["token_logprobs"][1:] == [logprobs_of(first_ids[1], 1, 2).logprob]
    streamed = join(api.chunks(prompt=prompts, logprobs=2, echo=True, max_tokens=0, n=n))
    assert [choice["logprobs"] for choice in streamed] == [choice["logprobs"] for choice in answer["choices"]]


def test_07_max_tokens(api: Api) -> None:
    error = api.error(prompt="a", max_tokens=0)
    assert error["message"].startswith("You requested a length 0 completion, but you did not set the 'echo' parameter.")
    assert (error["param"], error["code"]) == (None, None)
    api.complete(prompt="a", max_tokens=None)
    assert api.engine.requests[-1].params.max_tokens == 16
    assert api.error(prompt="a", max_tokens=-1)["code"] == "integer_below_min_value"


def test_08_choices_are_sorted_and_their_streams_interleave(api: Api) -> None:
    api.engine.script = lambda prompt, params: [*prompt.token_ids, EOS]
    answer = api.complete(prompt=["a", "bb", "ccc"], n=2)
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "a"), (1, "a"), (2, "bb"), (3, "bb"), (4, "ccc"), (5, "ccc"),
    ]  # fmt: skip
    chunks = api.chunks(prompt=["a", "bb", "ccc"], n=2, stream_options={"include_usage": True})
    ends = [choice["index"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    assert sorted(ends) == [0, 1, 2, 3, 4, 5]
    assert [chunk["usage"] is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    order = [choice["index"] for chunk in chunks for choice in chunk["choices"]]
    assert order != sorted(order)


def test_09_usage_counts_each_prompt_once_and_every_candidate(api: Api) -> None:
    api.engine.cached_tokens = 2
    usage = api.complete(prompt=["aaa", "bbbb"], n=2, best_of=3, max_tokens=5)["usage"]
    assert usage["prompt_tokens"] == 7
    assert usage["completion_tokens"] == 2 * (2 * 5 + 1)  # a loser of this engine has one token
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 4}


def test_10_n_with_temperature_0_is_legal_and_the_seed_is_passed_on(api: Api) -> None:
    api.complete(prompt="a", n=3, temperature=0)
    assert api.engine.requests[-1].params.greedy
    api.complete(prompt="a", seed=-5)
    assert api.engine.requests[-1].params.seed == -5
    drawn = set()
    for _ in range(8):
        api.complete(prompt="a")
        drawn.add(api.engine.requests[-1].params.seed)
    assert len(drawn) == 8
    assert all(0 <= seed < 2**63 for seed in drawn)


@pytest.mark.parametrize(("prompt", "ids"), [
    (None, [[EOS]]), ("", [[EOS]]), ([""], [[EOS]]), ("<|endoftext|>", [[EOS]]), ("a", [[97]]),
    ("a<|endoftext|>b", [[97, EOS, 98]]), (["a", ""], [[97], [EOS]]), ([97, 98], [[97, 98]]),
    ([[97], [98]], [[97], [98]]),
])  # fmt: skip
def test_11_prompts_become_ids(api: Api, prompt: object, ids: list[list[int]]) -> None:
    api.complete(prompt=prompt)
    assert [prompt.token_ids for prompt in api.engine.requests[-1].prompts] == ids


@pytest.mark.parametrize("prompt", [
    [], [[]], [[1], []], [301], [-1], [[1], [301]], [True, False], [1.0, 2], [[True]], [[1.5]], ["a", 1], [1, "a"],
    [["a"]], [None], {}, 5, True, [2**70], [[1], "a"], [{}],
])  # fmt: skip
def test_11_wrong_prompts(api: Api, prompt: object) -> None:
    assert api.error(prompt=prompt)["param"] == "prompt"


def test_11_ids_outside_the_vocabulary_are_named(api: Api) -> None:
    assert api.error(prompt=[1, 301])["message"] == "Token id 301 is out of vocabulary"


def test_12_the_context_is_filled_to_the_last_token_and_no_further(api: Api) -> None:
    api.complete(prompt="a" * (CONTEXT - 10), max_tokens=10)
    error = api.error(prompt="a" * (CONTEXT - 10), max_tokens=11)
    assert error["message"] == (
        f"This model's maximum context length is {CONTEXT} tokens, however you requested {CONTEXT + 1} tokens "
        f"({CONTEXT - 10} in your prompt; 11 for the completion). Please reduce your prompt; or completion length."
        " (HINT: an operator can have 'max_tokens' cut to what is left, by --clamp-max-tokens.)"
    )
    assert error["code"] == "context_length_exceeded"
    assert api.error(prompt=["a", "a" * CONTEXT], max_tokens=1)["code"] == "context_length_exceeded"
    api.complete(prompt="a" * CONTEXT, max_tokens=0, echo=True)
    api.complete(prompt="a" * (CONTEXT - 3))  # the default takes what is left
    assert api.engine.requests[-1].params.max_tokens == 3
    assert api.error(prompt="a" * CONTEXT)["code"] == "context_length_exceeded"


def test_12_max_tokens_is_clamped_to_what_is_left_where_the_operator_says_so() -> None:
    api = make_api(limits=replace(LIMITS, clamp_max_tokens=True))
    api.complete(prompt="a" * (CONTEXT - 10), max_tokens=100 * CONTEXT)
    assert api.engine.requests[-1].params.max_tokens == 10
    api.complete(prompt=["a", "a" * 20], max_tokens=CONTEXT, min_tokens=CONTEXT)
    assert api.engine.requests[-1].params.max_tokens == CONTEXT - 1  # each ends at the end of its own context
    api.complete(prompt="a" * CONTEXT, max_tokens=0, echo=True)
    error = api.error(prompt="a" * CONTEXT, max_tokens=1)
    assert error["code"] == "context_length_exceeded"
    assert "--clamp-max-tokens" not in error["message"]  # it would not help


def test_13_stop_strings(api: Api) -> None:
    api.engine.script = says("one two three")
    for stop in (" t", [" t"], ["zzz", " t"]):
        choice = api.complete(prompt="a t", stop=stop)["choices"][0]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("one", "stop", " t")
    echoed = api.complete(prompt="a t", stop=" t", echo=True)["choices"][0]
    assert echoed["text"] == "a tone"
    api.engine.burst = 20
    assert api.complete(prompt="a", stop=["three", "two"], logprobs=0)["choices"][0]["logprobs"]["tokens"][-1] == "o"
    kept = api.complete(prompt="a", stop="o th", include_stop_str_in_output=True)["choices"][0]
    assert (kept["text"], kept["stop_reason"]) == ("one two th", "o th")
    assert api.complete(prompt="a", stop=["three!"])["choices"][0]["text"] == "one two three"  # held, then let go
    assert api.complete(prompt="a", stop=[])["choices"][0]["text"] == "one two three"
    for stop in ("", [""], [1], 5, ["x"] * 17, "x" * 257, True, {}):
        assert api.error(prompt="a", stop=stop)["param"] == "stop"
    assert api.error(prompt="a", stop=["x"] * 17)["code"] == "array_above_max_length"


def test_13_text_is_held_no_longer_than_it_must(api: Api) -> None:
    api.engine.script = says("abxaby", eos=False)
    chunks = api.chunks(prompt="p", stop=["aby!", "zzzzzzzz"])
    assert [choice["text"] for chunk in chunks for choice in chunk["choices"]] == ["abx", "aby", ""]


def test_14_streams_never_split_a_character(api: Api) -> None:
    raw = "👩‍👩‍👧 é 天".encode() + "天".encode()[:2]
    api.engine.script = says(raw, eos=False)
    whole = api.complete(prompt="a", max_tokens=len(raw))["choices"][0]["text"]
    assert whole == raw.decode(errors="replace")
    pieces = [choice["text"] for chunk in api.chunks(prompt="a", max_tokens=len(raw)) for choice in chunk["choices"]]
    assert "".join(pieces) == whole
    assert [piece for piece in pieces if "\ufffd" in piece] == ["\ufffd"]
