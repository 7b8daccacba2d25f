"""A step of ours is the step that transformers, peft and torch make of the same batch."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from model.adapter_config import AdapterConfig, sites_of
from model.training.checkpoint import export_weights, load_network
from model.training.dataset import Example
from model.training.lora import add_lora, export_lora, load_lora, merge_lora, merged_weights
from model.training.network import Network
from model.training.packing import arrange, pack
from model.training.prepare import _untied
from model.training.tuner import Recipe, Tuner, cross_entropy

Make = Callable[..., tuple[Path, GPT2LMHeadModel]]
STEPS = 10
RECIPE = Recipe(steps=12, batch_size=5, rate=1e-3, warm_up=1, micro_batch_tokens=48)
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def example(seed: int, length: int, prompt: int) -> Example:
    tokens = np.random.default_rng(seed).integers(503, size=length).astype(np.int32)
    return Example(tokens, np.arange(length) >= max(prompt, 1))


EXAMPLES = [
    example(i, length, prompt) for i, (length, prompt) in enumerate([(9, 3), (31, 10), (4, 1), (17, 16), (12, 0)])
]


def reference_loss(model: nn.Module, examples: Sequence[Example]) -> Tensor:
    """Each example by itself, with transformers' own loss; their mean over all that is learnt."""
    total = torch.zeros(())
    for each in examples:
        ids = torch.from_numpy(each.tokens.astype(np.int64)).unsqueeze(0)
        labels = ids.masked_fill(~torch.from_numpy(each.learnt).unsqueeze(0), -100)
        total = total + model(input_ids=ids, labels=labels).loss * each.targets
    return total / sum(each.targets for each in examples)


def reference_steps(model: nn.Module, parameters: list[nn.Parameter], count: int) -> list[float]:
    """torch's AdamW on the schedule of the recipe; matrices decay."""
    matrices = [each for each in parameters if each.dim() == 2]
    others = [each for each in parameters if each.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=RECIPE.rate)
    losses = []
    for step in range(count):
        loss = reference_loss(model, EXAMPLES)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimiser.param_groups:
            group["lr"] = RECIPE.rate * RECIPE.scale(step)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def tuner(network: Network) -> Tuner:
    return Tuner(network, cross_entropy, EXAMPLES, [], RECIPE, CPU)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_of_all_weights_is_transformers_and_torchs(make_checkpoint: Make, recompute: bool) -> None:
    directory, reference = make_checkpoint()
    network = load_network(directory)
    network.transformer.recompute = recompute
    ours = tuner(network)
    losses = [ours.train_step() for _ in range(STEPS)]
    reference.train()
    for module in reference.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    expected = reference_steps(reference, list(reference.parameters()), STEPS)
    assert losses == pytest.approx(expected, abs=5e-6)
    wanted = reference.state_dict()
    for name, tensor in network.state_dict().items():
        differs = (tensor - wanted[name]).abs()
        if name.endswith(
            "c_attn.bias"
        ):  # adding to all keys changes nothing: no gradient but rounding, which Adam scales
            differs.chunk(3)[1].zero_()
        assert differs.max() < 1e-5


def test_a_step_of_the_output_layer_is_transformers_and_torchs(make_checkpoint: Make, tmp_path: Path) -> None:
    directory, _ = make_checkpoint()
    network = _untied(load_network(directory))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    export_weights(before, network.config, tmp_path, torch.float32)
    reference = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert not reference.config.tie_word_embeddings
    reference.requires_grad_(False)
    reference.lm_head.weight.requires_grad_(True)
    ours = tuner(network)
    losses = [ours.train_step() for _ in range(STEPS)]
    expected = reference_steps(reference, [reference.lm_head.weight], STEPS)
    assert losses == pytest.approx(expected, abs=5e-6)
    after = network.state_dict()
    torch.testing.assert_close(after["lm_head.weight"], reference.lm_head.weight, atol=1e-5, rtol=0)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name != "lm_head.weight")


@pytest.mark.parametrize(
    ("targets", "stabilised"), [(("c_attn",), False), (("c_attn", "c_proj", "c_fc"), False), (("mlp.c_proj",), True)]
)
def test_a_step_of_lora_is_pefts(
    make_checkpoint: Make, tmp_path: Path, targets: tuple[str, ...], stabilised: bool
) -> None:
    directory, base = make_checkpoint()
    network = load_network(directory)
    config = AdapterConfig(
        rank=4, alpha=6.0, targets=sites_of(targets), rank_stabilised=stabilised, base=str(directory)
    )
    add_lora(network, config, torch.Generator().manual_seed(3))
    ours = tuner(network)
    export_lora(network, config, tmp_path / "begun")
    reference = PeftModel.from_pretrained(base, tmp_path / "begun", is_trainable=True)
    learning = [each for each in reference.parameters() if each.requires_grad]
    assert sum(each.numel() for each in learning) == sum(e.numel() for e in network.parameters() if e.requires_grad)
    losses = [ours.train_step() for _ in range(STEPS)]
    assert losses == pytest.approx(reference_steps(reference, learning, STEPS), abs=5e-6)
    export_lora(network, config, tmp_path / "learnt")
    reference.save_pretrained(tmp_path / "peft")
    assert_same_adapter(load_network(directory), tmp_path / "learnt", tmp_path / "peft")


def assert_same_adapter(network: Network, one: Path, other: Path) -> None:
    found = []
    for directory in (one, other):
        fresh = Network(network.config)
        fresh.load_state_dict(network.state_dict())
        load_lora(fresh, directory)
        found.append(fresh.state_dict())
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], atol=1e-5, rtol=0)


def test_an_adapter_of_pefts_gives_pefts_logits_merged_or_beside(make_checkpoint: Make, tmp_path: Path) -> None:
    directory, base = make_checkpoint()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    peft_model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, weight in peft_model.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.05 * torch.randn_like(weight))
    peft_model.save_pretrained(tmp_path)
    ids = torch.arange(40).unsqueeze(0)
    with torch.no_grad():
        expected = peft_model(input_ids=ids).logits
        network = load_network(directory)
        load_lora(network, tmp_path)
        torch.testing.assert_close(network(ids) @ network.head.t(), expected, atol=1e-4, rtol=0)
        weights = merged_weights(network)
        merge_lora(network)
        torch.testing.assert_close(network(ids) @ network.head.t(), expected, atol=1e-4, rtol=0)
    assert weights.keys() == network.state_dict().keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())


def test_a_hundred_thousand_lines_are_arranged_in_a_moment() -> None:
    """Looking through all rows for each line would take a quarter of an hour."""
    chance = np.random.default_rng(1)
    tokens = np.zeros(129, dtype=np.int32)
    lines = [Example(tokens[:size], tokens[:size] == 1) for size in chance.integers(2, 129, size=100_000)]
    signal.alarm(60)
    try:
        rows = [row for rectangle in arrange(lines, 4096) for row in rectangle.rows]
    finally:
        signal.alarm(0)
    assert sorted(i for row in rows for i in row) == list(range(len(lines)))
    used = sum(len(lines[i].tokens) - 1 for row in rows for i in row)
    assert used / (128 * len(rows)) > 0.99


@given(
    sizes=st.lists(st.tuples(st.integers(2, 40), st.integers(0, 39)), min_size=1, max_size=12), room=st.integers(1, 200)
)
@settings(max_examples=60, deadline=None)
def test_packing_holds_every_example_once_and_apart(sizes: list[tuple[int, int]], room: int) -> None:
    examples = [example(i, length, min(prompt, length - 1)) for i, (length, prompt) in enumerate(sizes)]
    learnt, seen = 0, []
    for batch in pack(examples, room):
        rows, length = batch.tokens.shape
        assert rows == 1 or rows * length <= room
        mask = batch.mask()[:, 0]
        for row, owners in enumerate(batch.owners):
            for owner in owners[owners >= 0].unique():
                (at,) = torch.nonzero(owners == owner, as_tuple=True)
                assert batch.positions[row, at].tolist() == list(range(len(at)))
                assert mask[row][at].nonzero()[:, 1].unique().tolist() == at.tolist()  # it sees itself alone
                seen.append(batch.tokens[row, at].tolist())
        learnt += len(batch.targets)
    assert sorted(seen) == sorted(each.tokens[:-1].tolist() for each in examples)
    assert learnt == sum(each.targets for each in examples)
