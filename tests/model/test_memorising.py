"""Twenty random lines are known by heart, whatever learns them: a method that cannot do that learns nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from model.adapter_config import AdapterConfig, sites_of
from model.training.checkpoint import load_network
from model.training.dataset import Example, Preference
from model.training.distill import Distiller, make_student
from model.training.job import Distillation
from model.training.lora import add_lora
from model.training.network import Network
from model.training.preference import PreferenceLoss, without_lora
from model.training.prepare import _untied
from model.training.tuner import Objective, Recipe, Tuner, cross_entropy

Make = Callable[..., tuple[Path, GPT2LMHeadModel]]
KNOWN = 0.05  # nats a token


def line(seed: int, answer: int = 0) -> Example:
    """Three random tokens, and three that they are answered with."""
    given = np.random.default_rng(seed).integers(503, size=3)
    said = np.random.default_rng((seed, answer)).integers(503, size=3)
    return Example(np.concatenate([given, said]).astype(np.int32), np.arange(6) >= 3)


LINES = [line(seed) for seed in range(20)]


def adapted(network: Network) -> Network:
    """Random embeddings, which stay frozen, are made long enough that a likely token can be very likely."""
    with torch.no_grad():
        network.transformer.wte.weight *= 8
    targets = sites_of(["c_attn", "c_proj", "c_fc"])
    add_lora(network, AdapterConfig(rank=16, alpha=32.0, targets=targets), torch.Generator().manual_seed(1))
    return network


def learn(network: Network, rate: float, steps: int, objective: Objective = cross_entropy) -> float:
    """The loss of the lines in the end."""
    recipe = Recipe(steps=steps, batch_size=20, rate=rate, weight_decay=0.0, micro_batch_tokens=512)
    tuner = Tuner(network, objective, LINES, LINES, recipe, torch.device("cpu"))
    while not tuner.finished:
        tuner.train_step()
    found = tuner.validate()
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("prepare", "rate"),
    [(lambda network: network, 3e-3), (adapted, 1e-2), (_untied, 5e-2)],
    ids=["full", "lora", "head"],
)
def test_twenty_random_lines_are_known_by_heart(
    prepare: Callable[[Network], Network], rate: float, make_checkpoint: Make
) -> None:
    directory, _ = make_checkpoint()
    assert learn(prepare(load_network(directory)), rate, 250) < KNOWN


def test_a_student_knows_by_heart_what_its_teacher_does(make_checkpoint: Make) -> None:
    directory, _ = make_checkpoint()
    teacher = load_network(directory)
    assert learn(teacher, 3e-3, 250) < KNOWN
    objective = Distiller(teacher, Distillation(teacher="", temperature=1.0))
    assert learn(make_student(teacher, 1), 3e-3, 300, objective) < KNOWN


def test_twenty_preferences_are_known_by_heart(make_checkpoint: Make) -> None:
    directory, _ = make_checkpoint()
    network = adapted(load_network(directory))
    pairs = [Preference(each, line(seed, 1)) for seed, each in enumerate(LINES)]
    objective = PreferenceLoss(network, 0.1, partial(without_lora, network))
    recipe = Recipe(steps=200, batch_size=20, rate=1e-2, weight_decay=0.0, micro_batch_tokens=512)
    tuner = Tuner(network, objective, pairs, pairs, recipe, torch.device("cpu"))
    while not tuner.finished:
        tuner.train_step()
    found = tuner.validate()
    assert found is not None
    assert found < KNOWN
    assert tuner.valid_accuracy == 1.0
