"""Weights in fewer bits, behind a whole server: close to fp32, and the same bytes whatever else is computed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest
from serving import RunningServer, serving

from model.kernels.library import KernelsUnavailableError, load

SCORED: dict[str, Any] = {"prompt": "It was the best of times, it was the worst of times", "echo": True, "logprobs": 0}
FORMATS = {"int8": ["--quantization", "int8"], "fp16": ["--dtype", "float16"]}
TOLERANCES = {"int8": 0.5, "fp16": 0.01}  # of a log-probability; random weights make a wide distribution


@pytest.fixture(scope="module", params=FORMATS)
def format_(request: pytest.FixtureRequest) -> str:
    try:
        load(threads=1)
    except KernelsUnavailableError as error:
        pytest.skip(str(error))
    return str(request.param)


@pytest.fixture(scope="module")
def small(format_: str, tiny: Path) -> Iterator[RunningServer]:
    with serving(tiny, "--threads", "1", "--no-enable-prefix-caching", *FORMATS[format_]) as running:
        yield running


def test_the_start_line_names_the_format(format_: str, small: RunningServer) -> None:
    assert any(f"cpu, {format_}, C kernels (" in line for line in small.lines)


def test_scores_are_close_to_those_in_fp32(format_: str, small: RunningServer, server: RunningServer) -> None:
    scores = []
    for each in (small, server):
        answer = each.complete(**SCORED, max_tokens=0)
        scores.append(answer["choices"][0]["logprobs"]["token_logprobs"][1:])
    assert scores[0] != scores[1]
    assert scores[0] == pytest.approx(scores[1], abs=TOLERANCES[format_])


def test_a_crowd_changes_no_byte(small: RunningServer) -> None:
    random = Random(1)
    requests: list[dict[str, Any]] = [
        {
            "prompt": [random.randrange(50256) for _ in range(random.randrange(1, 90))],
            "max_tokens": random.randrange(4, 30),
            "temperature": random.choice([0, 0, 1]),
            "seed": number,
            "logprobs": 2,
            "ignore_eos": True,
        }
        for number in range(16)
    ]
    alone = [small.complete(**request)["choices"] for request in requests]
    with ThreadPoolExecutor(len(requests)) as pool:
        crowded = [answer["choices"] for answer in pool.map(lambda request: small.complete(**request), requests)]
    assert crowded == alone
