"""Distillation: its losses against autograd's, the student's layers, and that a student learns from its teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_embedding_loss, cross_entropy, kl_div, log_softmax
from transformers import GPT2LMHeadModel

from model.errors import JobError
from model.training.checkpoint import load_network
from model.training.dataset import Example
from model.training.distill import Distiller, check_pair, copied_layers, make_student
from model.training.job import Distillation
from model.training.network import Network
from model.training.packing import Packed, pack
from model.training.tuner import Recipe, Tuner

Make = Callable[..., tuple[Path, GPT2LMHeadModel]]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def examples(count: int = 5) -> list[Example]:
    made = []
    for i in range(count):
        tokens = np.random.default_rng(i).integers(503, size=6 + 5 * i).astype(np.int32)
        made.append(Example(tokens, np.arange(len(tokens)) >= 1 + i))
    return made


def reference(teacher: Network, student: Network, batch: Packed, job: Distillation) -> Tensor:
    """Term by term, from whole matrices of logits and of attention."""
    losses: dict[str, Tensor] = {}
    with torch.no_grad():
        taught = teacher.packed(batch)
        teacher_logits = taught @ teacher.head.t()
    hidden = student.packed(batch)
    logits = hidden @ student.head.t()
    t = job.temperature
    losses["soft"] = t**2 * kl_div(
        log_softmax(logits / t, 1), log_softmax(teacher_logits / t, 1), log_target=True, reduction="batchmean"
    )
    losses["hard"] = cross_entropy(logits, batch.targets)
    losses["hidden"] = cosine_embedding_loss(hidden, taught, torch.ones(len(hidden)))
    losses["attention"] = torch.stack(
        [_attention_term(teacher, student, batch, layer) for layer in range(student.config.n_layer)]
    ).mean()
    weights = {name: getattr(job, name) for name in losses}
    return torch.stack([weights[name] * loss for name, loss in losses.items()]).sum() / sum(weights.values())


def _attention_term(teacher: Network, student: Network, batch: Packed, layer: int) -> Tensor:
    source = copied_layers(teacher.config.n_layer, student.config.n_layer)[layer]
    pairs = [_probabilities(network, batch, i) for network, i in ((teacher, source), (student, layer))]
    wanted, got = pairs[0].detach(), pairs[1]
    total = torch.where(wanted > 0, wanted * (wanted.clamp_min(1e-30).log() - got.clamp_min(1e-30).log()), 0.0)
    return total.sum(-1).mean(1)[batch.owners >= 0].mean()


def _probabilities(network: Network, batch: Packed, layer: int) -> Tensor:
    """(rows, heads, length, length) of one layer, recomputed from its input."""
    body = network.transformer
    x = body.wte(batch.tokens) + body.wpe(batch.positions)
    for block in body.h[:layer]:
        x = block(x, batch.mask())
    block = body.h[layer]
    rows, length, width = x.shape
    q, k, _ = block.attn.c_attn(block.ln_1(x)).view(rows, length, 3, block.attn.heads, -1).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-1, -2) / (width // block.attn.heads) ** 0.5
    return scores.masked_fill(~batch.mask(), -torch.inf).softmax(-1)


TERMS = {
    "soft": {},
    "cool": {"temperature": 0.7},
    "hard": {"soft": 0.0, "hard": 1.0},
    "all": {"soft": 5.0, "hard": 2.0, "hidden": 1.0, "attention": 0.5},
}


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS.keys())
def test_the_loss_and_its_gradients_are_autograds(make_checkpoint: Make, terms: dict[str, float]) -> None:
    job = Distillation(teacher="", **terms)
    teacher = load_network(make_checkpoint(n_layer=4)[0])
    student = make_student(teacher, 2)
    (batch,) = pack(examples(), 10_000)
    ours = Distiller(teacher, job)(student, batch, torch.float32)
    ours.backward()
    gradients = {name: each.grad.clone() for name, each in student.named_parameters() if each.grad is not None}
    student.zero_grad()
    expected = reference(teacher, student, batch, job)
    expected.backward()
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("have", "layers", "copied"),
    [(12, 6, [0, 2, 4, 7, 9, 11]), (6, 3, [0, 3, 5]), (6, 6, [0, 1, 2, 3, 4, 5]), (5, 2, [0, 4]), (4, 1, [0])],
)
def test_a_student_takes_layers_evenly(have: int, layers: int, copied: list[int]) -> None:
    assert copied_layers(have, layers) == copied


def test_a_student_is_the_teacher_with_layers_left_out(make_checkpoint: Make) -> None:
    teacher = load_network(make_checkpoint(n_layer=5)[0])
    student = make_student(teacher, None)
    assert student.config.n_layer == 2
    theirs, ours = teacher.state_dict(), student.state_dict()
    assert torch.equal(ours["transformer.h.1.mlp.c_fc.weight"], theirs["transformer.h.4.mlp.c_fc.weight"])
    assert torch.equal(ours["transformer.wte.weight"], theirs["transformer.wte.weight"])
    with pytest.raises(JobError, match="6 layers cannot be copied from a teacher of 5"):
        make_student(teacher, 6)


def test_pairs_that_cannot_be_are_refused(make_checkpoint: Make) -> None:
    config = load_network(make_checkpoint()[0]).config
    for change, terms, message in (
        ({"vocab_size": 9}, {}, "503 tokens, the student 9"),
        ({"n_positions": 999}, {}, "128 positions, the student 999"),
        ({"n_embd": 32}, {"hidden": 1.0}, "one width"),
        ({"n_head": 2}, {"attention": 1.0}, "as many heads"),
        ({"n_layer": 9}, {"attention": 1.0}, "as many layers"),
    ):
        with pytest.raises(JobError, match=message):
            check_pair(config, replace(config, **change), Distillation(teacher="", **terms))
    check_pair(config, replace(config, n_embd=32, n_head=2, n_layer=9), Distillation(teacher=""))


def test_a_student_of_soft_targets_comes_nearer_to_its_teacher(make_checkpoint: Make) -> None:
    teacher = load_network(make_checkpoint(n_layer=4)[0])
    recipe = Recipe(steps=60, batch_size=5, rate=1e-3)
    (batch,) = pack(examples(), 10_000)

    def divergence(student: Network) -> float:
        with torch.no_grad():
            return float(Distiller(teacher, Distillation(teacher="", temperature=1.0))(student, batch, torch.float32))

    def taught(job: Distillation) -> float:
        student = make_student(teacher, 2)
        tuner = Tuner(student, Distiller(teacher, job), examples(), [], recipe, CPU)
        while not tuner.finished:
            tuner.train_step()
        return divergence(student)

    before = divergence(make_student(teacher, 2))
    assert taught(Distillation(teacher="", temperature=1.0)) < 0.2 * before
    assert taught(Distillation(teacher="", soft=0.0, hard=1.0)) > before  # five texts are no teacher
