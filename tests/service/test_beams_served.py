"""Beam search by the whole service, against transformers' on the same checkpoint."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import RunningServer
from transformers import GPT2LMHeadModel

PROMPT = [1212, 318, 257, 1332]
EOS = 50256


@pytest.fixture(scope="module")
def network(tiny: Path) -> GPT2LMHeadModel:
    return GPT2LMHeadModel.from_pretrained(tiny).eval()


def theirs(network: GPT2LMHeadModel, width: int, n: int, ends: list[int], **options: Any) -> list[list[int]]:
    got = network.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
        num_beams=width,
        num_return_sequences=n,
        do_sample=False,
        eos_token_id=[EOS, *ends],
        pad_token_id=0,
        **options,
    )
    sequences = []
    for row in got[:, len(PROMPT) :].tolist():
        end = next((i for i, token in enumerate(row) if token in (EOS, *ends)), len(row) - 1)
        sequences.append(row[: end + 1])
    return sequences


# Tokens that the tiny model likes at some place of this prompt's continuations, so that beams do end.
CASES: list[dict[str, Any]] = [
    {"width": 4, "n": 4, "max_tokens": 12},
    {"width": 3, "n": 1, "max_tokens": 40, "length_penalty": 0.0},
    {"width": 5, "n": 3, "max_tokens": 20, "ends": 6, "length_penalty": 2.0},
    {"width": 5, "n": 5, "max_tokens": 20, "ends": 20, "early_stopping": True},
    {"width": 4, "n": 2, "max_tokens": 20, "ends": 20, "early_stopping": "never", "length_penalty": -0.5},
    {"width": 4, "n": 4, "max_tokens": 15, "ends": 20, "min_tokens": 6},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_beams_are_those_of_transformers(case: dict[str, Any], idle: RunningServer, network: GPT2LMHeadModel) -> None:
    options = {key: case[key] for key in ("length_penalty", "early_stopping") if key in case}
    likely = network(torch.tensor([PROMPT])).logits[0, -1].topk(64).indices.tolist()
    ends = sorted(likely[3 : 3 + case.get("ends", 0)])
    expected = theirs(
        network, case["width"], case["n"], ends, max_new_tokens=case["max_tokens"],
        min_new_tokens=case.get("min_tokens", 0), **options,
    )  # fmt: skip
    got = idle.complete(
        prompt=PROMPT, use_beam_search=True, best_of=case["width"], n=case["n"], max_tokens=case["max_tokens"],
        min_tokens=case.get("min_tokens", 0), stop_token_ids=ends, return_token_ids=True, **options,
    )  # fmt: skip
    assert [choice["token_ids"] for choice in got["choices"]] == expected
    if case.get("ends") == 20:
        assert min(map(len, expected)) < case["max_tokens"], "the case says nothing of how beams end"
    for choice in got["choices"]:
        last = choice["token_ids"][-1]
        assert choice["finish_reason"] == ("stop" if last in (EOS, *ends) else "length")
        assert choice["stop_reason"] == (last if last in ends else None)


def test_streamed_it_comes_at_the_end_and_is_the_same(idle: RunningServer) -> None:
    request = {"prompt": ["Once", "a b"], "use_beam_search": True, "n": 2, "best_of": 3, "max_tokens": 8, "echo": True}
    whole = idle.complete(**request)
    texts = ["", "", "", ""]
    for chunk in idle.stream(**request):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert texts[0].startswith("Once")
    assert whole["usage"]["completion_tokens"] == 2 * 3 * 8


def test_logprobs_are_those_of_scoring_the_text(idle: RunningServer) -> None:
    request = {"prompt": PROMPT, "use_beam_search": True, "best_of": 3, "max_tokens": 6, "logprobs": 2}
    choice = idle.complete(**request, return_token_ids=True)["choices"][0]
    scored = idle.complete(prompt=PROMPT + choice["token_ids"], max_tokens=0, echo=True, logprobs=2)["choices"][0]
    expected = scored["logprobs"]["token_logprobs"][len(PROMPT) :]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=1e-5)
    assert len(choice["logprobs"]["top_logprobs"]) == 6


def test_alone_or_among_others_the_same(idle: RunningServer) -> None:
    requests = [{"prompt": "a" * i, "use_beam_search": True, "n": 3, "max_tokens": 10} for i in range(1, 5)]
    alone = [idle.complete(**request)["choices"] for request in requests]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda request: idle.complete(**request)["choices"], requests)) == alone


def test_up_to_the_end_of_the_context(idle: RunningServer) -> None:
    request = {"use_beam_search": True, "n": 2, "max_tokens": None}
    got = idle.complete(prompt=[[5] * 1020, [5] * 10], **request)
    assert got["usage"]["completion_tokens"] == 2 * 2 * 4
