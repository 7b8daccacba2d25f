"""The network against transformers' GPT2LMHeadModel, which we did not write."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from driving import Generator, Network, greedy
from torch import Tensor
from transformers import GPT2LMHeadModel

Make = Callable[..., tuple[Path, GPT2LMHeadModel]]
TOLERANCE = 1e-4
SHAPES: dict[str, dict[str, Any]] = {
    "small": {},
    "one wide head": {"n_head": 1, "n_embd": 128},
    "odd width": {"n_head": 3, "n_embd": 60},
    "narrow mlp": {"n_inner": 100},
    "relu": {"activation_function": "relu"},
    "silu": {"activation_function": "silu"},
    "exact gelu": {"activation_function": "gelu"},
    "unscaled attention": {"scale_attn_weights": False},
    "attention scaled by layer": {"scale_attn_by_inverse_layer_idx": True, "n_layer": 4},
    "upcast attention": {"reorder_and_upcast_attn": True},
    "untied head": {"tie_word_embeddings": False},
    "another epsilon": {"layer_norm_epsilon": 1e-3},
    "deep": {"n_layer": 12, "n_embd": 32},
}
GPT2_124M = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257}


def random_tokens(count: int, vocab: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(vocab), k=count)


def their_logits(network: GPT2LMHeadModel, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = network(torch.tensor([tokens])).logits[0]
    return logits


def check_every_path(directory: Path, theirs: GPT2LMHeadModel, length: int) -> None:
    ours = Network(directory)
    tokens = random_tokens(length, theirs.config.vocab_size)
    expected = their_logits(theirs, tokens)
    whole = ours.logits([(0, tokens, 0)])
    torch.testing.assert_close(whole, expected, atol=TOLERANCE, rtol=0)

    third = length // 3
    borders = [0, 1, third, third + 1, length - 2, length - 1, length]
    chunked = [ours.logits([(1, tokens[a:b], a)]) for a, b in itertools.pairwise(borders)]
    torch.testing.assert_close(torch.cat(chunked), expected, atol=TOLERANCE, rtol=0)

    # Three sequences in one step: a decode, a chunk over a cache, and a fresh prompt.
    other = random_tokens(third, theirs.config.vocab_size, seed=1)
    ours.logits([(2, tokens[:-1], 0), (3, tokens[:third], 0)])
    batched = ours.logits([(2, tokens[-1:], length - 1), (3, tokens[third:], third), (4, other, 0)])
    wanted = torch.cat((expected[-1:], expected[third:], their_logits(theirs, other)))
    torch.testing.assert_close(batched, wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_agree_at_every_position(shape: str, make_checkpoint: Make) -> None:
    directory, theirs = make_checkpoint(**SHAPES[shape])
    check_every_path(directory, theirs, length=100)


def their_greedy(network: GPT2LMHeadModel, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = network.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
    generated: list[int] = out[0, len(prompt) :].tolist()
    return generated


def our_greedy(directory: Path, prompts: list[list[int]], count: int, chunk: int) -> list[list[int]]:
    outputs = Generator(directory, num_blocks=1024).generate(prompts, [greedy(count)] * len(prompts), chunk)
    return [[sampled.token for sampled in output] for output in outputs]


def test_greedy_text_is_identical_over_fifty_prompts(make_checkpoint: Make) -> None:
    directory, theirs = make_checkpoint()
    prompts = [random_tokens(1 + i, 503, seed=i) for i in range(50)]
    expected = [their_greedy(theirs, prompt, 64) for prompt in prompts]
    assert our_greedy(directory, prompts, 64, chunk=1000) == expected
    assert our_greedy(directory, prompts, 64, chunk=7) == expected


@pytest.fixture(scope="module")
def gpt2_124m(make_checkpoint: Make) -> tuple[Path, GPT2LMHeadModel]:
    return make_checkpoint(**GPT2_124M)


def test_logits_agree_at_124m(gpt2_124m: tuple[Path, GPT2LMHeadModel]) -> None:
    check_every_path(*gpt2_124m, length=200)


def test_greedy_text_is_identical_at_124m(gpt2_124m: tuple[Path, GPT2LMHeadModel]) -> None:
    directory, theirs = gpt2_124m
    prompts = [random_tokens(4 + i, 50257, seed=i) for i in range(50)]
    ours = our_greedy(directory, prompts, 64, chunk=32)
    # One forward pass of theirs a prompt, not 64: greedy text is identical exactly if every token of it is the argmax
    # of their logits before it.
    for prompt, output in zip(prompts, ours, strict=True):
        logits = their_logits(theirs, prompt + output[:-1])[len(prompt) - 1 :]
        assert logits.argmax(dim=-1).tolist() == output
    assert len({token for output in ours for token in output}) > 100  # no model that says one word for ever
