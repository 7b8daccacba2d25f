"""An answer does not depend on how it was computed: alone or in a crowd, whole or in pieces, guessed or not.

With the C kernels this holds bit for bit, log-probabilities included. PyTorch's own attention has no fixed order of
sums, so there the tokens are the same and the log-probabilities agree to 1e-5.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import save_file
from stepping import Answer, Shape, Stepper, load

from model.config import read_config
from model.errors import DeviceError
from model.gpt2 import GPT2
from model.kernels.library import KernelsUnavailableError
from model.kernels.library import load as load_kernels
from model.sampling_params import SamplingParams
from model.step import TokenLogprobs
from model.weights import expected_shapes

CONTEXT = 96
VOCABULARY = 61
NETWORK = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": CONTEXT}
REQUESTS = 32


def make(directory: Path, noise: float) -> Path:
    """A network that says something different everywhere; with noise, one that resembles it."""
    directory.mkdir()
    config = {**NETWORK, "vocab_size": VOCABULARY, "eos_token_id": VOCABULARY - 1}
    (directory / "config.json").write_text(json.dumps(config))
    draw, wrong = torch.Generator().manual_seed(7), torch.Generator().manual_seed(8)
    tensors = {}
    for name, shape in expected_shapes(read_config(directory)).items():
        weight = torch.randn(shape, generator=draw) + noise * torch.randn(shape, generator=wrong)
        tensors[name] = 1 + 0.1 * weight if ".ln_" in name and name.endswith("weight") else 0.25 * weight
    save_file(tensors, directory / "model.safetensors")
    return directory


class Networks:
    def __init__(self, root: Path, kernels: str, quantization: str | None = None) -> None:
        self.network: GPT2 = load(make(root / "network", 0.0), kernels, quantization)
        self.draft: GPT2 = load(make(root / "draft", 0.1), kernels, quantization)
        self.kv_dtype = torch.float16 if quantization else torch.float32
        self.alone = cache(self._alone)

    def stepper(self, shape: Shape) -> Stepper:
        return Stepper(self.network, replace(shape, kv_dtype=self.kv_dtype), CONTEXT, self.draft)

    def _alone(self, number: int) -> Answer:
        stepper = self.stepper(Shape(caching=False))
        stepper.add(*request(number))
        return stepper.drain()[0]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Networks:
    try:
        load_kernels()
    except KernelsUnavailableError as error:
        pytest.skip(str(error))
    return Networks(tmp_path_factory.mktemp("networks"), "auto")


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Networks:
    """Weights in int8, keys and values in fp16."""
    try:
        return Networks(tmp_path_factory.mktemp("networks"), "auto", "int8")
    except DeviceError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Networks:
    return Networks(tmp_path_factory.mktemp("networks"), "off")


def request(number: int) -> tuple[list[int], SamplingParams]:
    """Greedy and sampled, scored or not, with every way to end; prompts that share beginnings, and some that repeat."""
    random = Random(number)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9] * 3 if number % 2 else [random.randrange(60) for _ in range(20)]
    prompt = prompt[: random.randrange(1, len(prompt))] + [random.randrange(60) for _ in range(random.randrange(8))]
    fields: dict[str, Any] = {
        "temperature": random.choice([0.0, 0.0, 0.3, 1.0]),
        "top_p": random.choice([1.0, 1.0, 0.9]),
        "top_k": random.choice([None, None, 20]),
        "presence_penalty": random.choice([0.0, 0.0, 0.8]),
        "repetition_penalty": random.choice([1.0, 1.0, 1.2]),
        "min_tokens": random.choice([0, 0, 5]),
        "stop_token_ids": random.choice([(), (), (11, 12, 13)]),
        "ignore_eos": random.random() < 0.8,
        "logprobs": random.choice([None, 0, 3]),
        "prompt_logprobs": random.choice([None, None, 2]),
        "max_tokens": random.choice([1, 8, 30, 60]),
    }
    return prompt, SamplingParams(seed=number, **fields)


def crowd(networks: Networks, shape: Shape, seed: int, *, exact: bool = True) -> Stepper:
    """All requests, in an order and at moments drawn from the seed; each must get what it gets alone."""
    random = Random(seed)
    stepper = networks.stepper(shape)
    order = list(range(REQUESTS))
    random.shuffle(order)
    for number in order:
        stepper.add(*request(number), priority=random.choice([0, 0, 1]))
        for _ in range(random.choice([0, 0, 0, 1, 3])):
            stepper.step()
    for number, answer in zip(order, stepper.drain(), strict=True):
        expected = networks.alone(number)
        if exact:
            assert answer == expected
        else:
            assert (answer.tokens, answer.finish) == (expected.tokens, expected.finish)
            compare(answer.logprobs, expected.logprobs)
            compare(answer.prompt_logprobs, expected.prompt_logprobs)
    return stepper


def compare(got: list[TokenLogprobs], expected: list[TokenLogprobs]) -> None:
    assert [row.logprob for row in got] == pytest.approx([row.logprob for row in expected], abs=1e-5)
    for ours, theirs in zip(got, expected, strict=True):
        assert [value for _, value in ours.top] == pytest.approx([value for _, value in theirs.top], abs=1e-5)


def tight(block_size: int) -> int:
    """A pool that holds one context and half of another."""
    return 3 * CONTEXT // block_size // 2


SHAPES = {
    "whole": Shape(),
    "chunked": Shape(budget=7),
    "without prefix cache": Shape(caching=False),
    "preempted": Shape(num_blocks=tight(4), block_size=4),
    "prompt lookup": Shape(method="ngram"),
    "draft model": Shape(method="model"),
    "draft model, chunked and preempted": Shape(num_blocks=tight(8), block_size=8, budget=13, method="model"),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_request_gets_among_31_strangers_what_it_gets_alone(shape: Shape, compiled: Networks) -> None:
    stepper = crowd(compiled, shape, seed=1)
    scheduler = stepper.scheduler
    assert (scheduler.preemptions > 0) == (shape.num_blocks < 100), "pools are short where they are meant to be"
    assert (scheduler.prefix_hits > 0) == shape.caching
    assert (scheduler.accepted_at != []) == (shape.method != "off")
    assert (scheduler.drafted > sum(scheduler.accepted_at)) == (shape.method != "off")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_quantised_too(shape: Shape, quantised: Networks) -> None:
    crowd(quantised, shape, seed=2)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_in_pytorch_alone_the_tokens_are_the_same(shape: Shape, plain: Networks) -> None:
    crowd(plain, shape, seed=1, exact=False)


shapes = st.builds(
    lambda block_size, room, **fields: Shape(
        num_blocks=-(-CONTEXT // block_size) + room * CONTEXT // block_size // 4, block_size=block_size, **fields
    ),
    block_size=st.sampled_from([8, 16, 32]),
    room=st.integers(0, 16),
    max_num_seqs=st.sampled_from([1, 3, 32]),
    budget=st.sampled_from([1, 5, 16, 64, 4096]),
    caching=st.booleans(),
    method=st.sampled_from(["off", "ngram", "model"]),
    drafts=st.integers(1, 9),
)


def any_order(networks: Networks, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(shape=shapes, seed=st.integers(0, 1 << 30))
    def run(shape: Shape, seed: int) -> None:
        crowd(networks, shape, seed)

    run()


def test_whatever_the_order_of_arrivals_the_pool_the_budget_and_the_blocks(compiled: Networks) -> None:
    any_order(compiled, 6)


@pytest.mark.slow
def test_the_same_many_times(compiled: Networks) -> None:
    any_order(compiled, 200)


def test_a_good_drafter_saves_steps(compiled: Networks) -> None:
    prompt, params = [1, 2, 3], SamplingParams(seed=3, max_tokens=90, ignore_eos=True)
    steps = {}
    for method in ("off", "model"):
        stepper = compiled.stepper(Shape(method=method))
        stepper.add(prompt, params)
        stepper.drain()
        steps[method] = stepper.steps
    assert steps["off"] == 90
    assert steps["model"] < 70


def test_guesses_keep_the_distribution(compiled: Networks) -> None:
    """Chi-square of the first two tokens of 20,000 samples, both guessed at, against the network's probabilities."""
    samples, prompt = 20_000, [5, 17, 3]
    stepper = compiled.stepper(Shape(num_blocks=4096, max_num_seqs=512, method="model"))
    for seed in range(samples):
        stepper.add(prompt, SamplingParams(seed=seed, max_tokens=3, ignore_eos=True, temperature=1.5, top_k=4))
    answers = stepper.drain()
    assert sum(stepper.scheduler.accepted_at) > samples / 10
    firsts = Counter(answer.tokens[0] for answer in answers)
    common = firsts.most_common(1)[0][0]
    for context, drawn in (
        (prompt, [answer.tokens[0] for answer in answers]),
        ([*prompt, common], [answer.tokens[1] for answer in answers if answer.tokens[0] == common]),
    ):
        chances = probabilities(compiled, context, temperature=1.5, top_k=4)
        counts = Counter(drawn)
        assert counts.keys() <= chances.keys()
        statistic = sum((counts[t] - len(drawn) * p) ** 2 / (len(drawn) * p) for t, p in chances.items())
        assert statistic < 21.1  # three degrees of freedom: passed by chance but once in ten thousand


def probabilities(networks: Networks, context: list[int], temperature: float, top_k: int) -> dict[int, float]:
    stepper = networks.stepper(Shape())
    stepper.add(context, SamplingParams(seed=0, temperature=0.0, max_tokens=1, logprobs=top_k))
    (row,) = stepper.drain()[0].logprobs
    weights = {token: math.exp(value / temperature) for token, value in row.top}
    return {token: weight / sum(weights.values()) for token, weight in weights.items()}
