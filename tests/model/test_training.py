"""The training network is GPT-2, its losses are the cross entropy, and its optimiser learns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2LMHeadModel

from model.config import ModelConfig, parse_config, read_config
from model.training import loss as loss_module
from model.training.checkpoint import export, hugging_face_config
from model.training.loss import CandidateSampler, linear_cross_entropy
from model.training.network import Network
from model.training.optimiser import Optimiser, orthogonalise
from model.training.schedule import Progress, Schedule
from model.training.trainer import Recipe, Trainer, evaluate

Make = Callable[..., tuple[Path, GPT2LMHeadModel]]

VOCABULARY = 97


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small only lose by being divided among cores, and much where others use them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_config(**changes: object) -> ModelConfig:
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32, "vocab_size": VOCABULARY, "eos_token_id": 96}
    return parse_config({**shape, **changes})


def tiny_network(**changes: object) -> Network:
    network = Network(tiny_config(**changes))
    network.initialise(torch.Generator().manual_seed(0))
    return network


@pytest.mark.parametrize(
    "changes",
    [{}, {"activation_function": "relu"}, {"n_inner": 96}, {"scale_attn_by_inverse_layer_idx": True}],
    ids=["plain", "relu", "n_inner", "inverse_layer_scale"],
)
def test_loss_and_gradients_are_those_of_transformers(make_checkpoint: Make, changes: dict[str, object]) -> None:
    directory, oracle = make_checkpoint(**changes)
    network = Network(read_config(directory))
    network.load_state_dict(load_file(directory / "model.safetensors"))
    tokens = torch.randint(503, (3, 65), generator=torch.Generator().manual_seed(1))

    expected = oracle(tokens, labels=tokens).loss
    got = linear_cross_entropy(network(tokens[:, :-1]).flatten(0, 1), network.head, tokens[:, 1:].flatten())
    assert got.item() == pytest.approx(expected.item(), abs=1e-5)

    expected.backward()
    got.backward()
    gradients = {name: parameter.grad for name, parameter in oracle.named_parameters()}
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-3)


def test_an_exported_model_is_one_that_transformers_saved(tmp_path: Path) -> None:
    network = tiny_network()
    export(network, tmp_path)
    loaded, report = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not any(report.values())
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=32).astype(np.uint16)
    ids = torch.from_numpy(tokens.astype(np.int64)).unsqueeze(0)
    assert loaded(ids, labels=ids).loss.item() == pytest.approx(evaluate(network, tokens), abs=1e-3)  # fp16 weights
    assert parse_config(hugging_face_config(network.config)) == network.config


def test_rows_may_start_anywhere_in_the_context() -> None:
    network = tiny_network()
    tokens = torch.randint(VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(1))
    whole = network(tokens)
    shifted = network(tokens, torch.tensor([0, 5]))
    assert torch.equal(whole[0], shifted[0])
    with torch.no_grad():
        network.transformer.wpe.weight[:8] = network.transformer.wpe.weight[5:13].clone()
    torch.testing.assert_close(network(tokens)[1], shifted[1])


def test_chunks_do_not_change_the_loss_or_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 3 * VOCABULARY)
    hidden, weight, targets = head_problem(tokens=10)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.t(), targets)
    wanted = torch.autograd.grad(expected, (hidden, weight))
    got = linear_cross_entropy(hidden, weight, targets)
    assert got.item() == pytest.approx(expected.item(), abs=1e-5)
    for a, b in zip(torch.autograd.grad(got, (hidden, weight)), wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def head_problem(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(tokens, 16, generator=generator).requires_grad_()
    weight = torch.randn(VOCABULARY, 16, generator=generator).mul_(0.5).requires_grad_()
    return hidden, weight, torch.randint(20, (tokens,), generator=generator)


def sampled(sampler: CandidateSampler, hidden: Tensor, weight: Tensor, targets: Tensor, seed: int) -> Tensor:
    drawn = sampler.draw(targets, torch.Generator().manual_seed(seed))
    return linear_cross_entropy(hidden, weight[drawn.ids], drawn.targets, drawn.shift)


def test_with_every_token_a_candidate_the_sampled_loss_is_the_full_one() -> None:
    hidden, weight, targets = head_problem(tokens=10)
    sampler = CandidateSampler(torch.arange(VOCABULARY), size=VOCABULARY)
    got = sampled(sampler, hidden, weight, targets, seed=0)
    assert got.item() == pytest.approx(linear_cross_entropy(hidden, weight, targets).item(), abs=1e-6)


def test_the_sampled_normaliser_is_unbiased_and_the_sampled_loss_close() -> None:
    hidden, weight, targets = head_problem(tokens=4)
    sampler = CandidateSampler(torch.arange(VOCABULARY), size=40)
    logits = (hidden @ weight.t()).detach()
    normalisers, losses = [], []
    for seed in range(400):
        drawn = sampler.draw(targets, torch.Generator().manual_seed(seed))
        normalisers.append((logits[:, drawn.ids] + drawn.shift).exp().sum(1))
        losses.append(sampled(sampler, hidden, weight, targets, seed).item())
    drawn_normalisers = torch.stack(normalisers)  # (draws, tokens)
    error = drawn_normalisers.std(0) / len(normalisers) ** 0.5
    assert ((drawn_normalisers.mean(0) - logits.exp().sum(1)).abs() < 4 * error).all()
    full = linear_cross_entropy(hidden, weight, targets).item()
    assert np.mean(losses) == pytest.approx(full, rel=0.03)
    assert np.std(losses) > 0  # they were samples


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 1000), min_size=30, max_size=30), st.sets(st.integers(0, 29), min_size=1), st.data())
def test_candidates_hold_every_target_and_honour_their_size(
    counts: list[int], certain: set[int], data: st.DataObject
) -> None:
    size = data.draw(st.integers(4, 30))
    targets = torch.tensor(sorted(certain, reverse=True))
    sampler = CandidateSampler(torch.tensor(counts), size)
    drawn = sampler.draw(targets, torch.Generator().manual_seed(0))
    assert torch.equal(drawn.ids[drawn.targets], targets)
    assert torch.equal(drawn.ids, drawn.ids.unique())
    assert bool((drawn.shift[drawn.targets] == 0).all())
    assert bool((drawn.shift >= 0).all())
    expected = min(max(size, len(certain) + size // 4), 30)
    assert abs(len(drawn.ids) - expected) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalised_matrices_have_singular_values_about_one(dtype: torch.dtype) -> None:
    matrices = torch.randn(3, 16, 48, generator=torch.Generator().manual_seed(0))
    for batch in (matrices, matrices.mT):
        values = torch.linalg.svdvals(orthogonalise(batch.to(dtype)).float())
        assert 0.3 < values.min() < values.max() < 1.4


def test_muon_treats_query_key_and_value_apart() -> None:
    """A query gradient a thousand times the value's must not decide the value's update."""
    network = tiny_network(n_layer=1)
    optimiser = Optimiser(network, muon_rate=0.1, adam_rate=0.0)
    weight = network.transformer.h[0].attn.c_attn.weight
    before = weight.detach().clone()
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    weight.grad[:, :32] *= 1000
    optimiser.step(1.0)
    query, key, value = (weight.detach() - before).chunk(3, dim=1)
    assert value.norm().item() == pytest.approx(query.norm().item(), rel=0.2)
    assert key.norm().item() == pytest.approx(query.norm().item(), rel=0.2)


def test_a_small_text_is_learnt_by_heart() -> None:
    text = np.tile(np.random.default_rng(0).permutation(VOCABULARY).astype(np.uint16), 8)
    recipe = Recipe(batch_tokens=128, shorter=2, candidates=48, half_precision=False, schedule=Schedule(warm_up=0.05))
    trainer = Trainer(tiny_config(), recipe, text, text, Progress(total=120, cap=1))
    first = trainer.train_step()
    trainer.progress.advance(1)
    while not trainer.progress.finished:
        trainer.train_step()
        trainer.progress.advance(1)
    assert first > 4.0
    assert evaluate(trainer.network, text[:33]) < 0.2


def test_progress_credits_a_pause_no_more_than_its_cap() -> None:
    progress = Progress(total=100, cap=10)
    progress.advance(4)
    progress.advance(3600)
    progress.advance(-5)
    assert progress.done == 14
    assert progress.fraction == pytest.approx(0.14)
    assert not progress.finished
    progress.done = 120
    assert (progress.fraction, progress.finished) == (1.0, True)


def test_the_rate_warms_up_stays_and_decays_to_nothing() -> None:
    schedule = Schedule(warm_up=0.1, decay_from=0.6, long_from=0.7, full_softmax_from=0.9)
    rates = [schedule.rate(fraction) for fraction in np.linspace(0, 1, 101)]
    assert 0 < rates[0] < rates[5] < rates[10] == 1.0
    assert set(rates[10:60]) == {1.0}
    assert rates[80] == pytest.approx(0.5)
    assert rates[100] == 0.0
    assert [schedule.is_long(f) for f in (0.69, 0.7)] == [False, True]
    assert [schedule.is_full_softmax(f) for f in (0.89, 0.9)] == [False, True]
