"""DPO against TRL: the loss, its gradients, and whole steps, of pairs that are packed and of pairs that are not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import GPT2LMHeadModel, GPT2TokenizerFast
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from model.adapter_config import AdapterConfig, sites_of
from model.training.checkpoint import load_network
from model.training.dataset import Example, Preference
from model.training.lora import add_lora
from model.training.loss import Tally
from model.training.network import Network
from model.training.packing import arrange
from model.training.preference import PreferenceLoss, without_lora
from model.training.tuner import Recipe, Tuner
from server.checkpoint import EMBEDDED

Make = Callable[..., tuple[Path, GPT2LMHeadModel]]
CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pair(seed: int, prompt: int, chosen: int, rejected: int) -> Preference:
    ids = np.random.default_rng(seed).integers(503, size=prompt + chosen + rejected).astype(np.int32)
    given, first, second = np.split(ids, [prompt, prompt + chosen])

    def answered(answer: Any) -> Example:
        return Example(np.concatenate([given, answer]), np.arange(prompt + len(answer)) >= prompt)

    return Preference(answered(first), answered(second))


PAIRS = [pair(i, *sizes) for i, sizes in enumerate([(3, 6, 2), (10, 21, 4), (1, 3, 9), (16, 1, 1), (2, 12, 30)])]
PARTS = [part for each in PAIRS for part in each.parts]


def their_inputs() -> dict[str, Tensor]:
    rows = []
    for each in PAIRS:
        start = int(each.chosen.learnt.argmax())
        chosen, rejected = each.chosen.tokens.tolist(), each.rejected.tokens.tolist()
        rows.append({"prompt_ids": chosen[:start], "chosen_ids": chosen[start:], "rejected_ids": rejected[start:]})
    inputs: dict[str, Tensor] = DataCollatorForPreference(pad_token_id=0)(rows)
    return inputs


@pytest.fixture
def theirs(make_checkpoint: Make, tmp_path: Path) -> tuple[Path, Any]:
    """A checkpoint, and TRL's trainer of another network against it."""
    directory, reference = make_checkpoint()
    torch.manual_seed(5)
    model = GPT2LMHeadModel(reference.config)
    model.load_state_dict({name: each + 0.02 * torch.randn_like(each) for name, each in reference.state_dict().items()})
    tokenizer = GPT2TokenizerFast(str(EMBEDDED / "vocab.json"), str(EMBEDDED / "merges.txt"), pad_token="<|endoftext|>")
    for each in (model, reference):
        each.config._name_or_path = str(directory)
    trainer = DPOTrainer(
        model, reference.eval(),
        args=DPOConfig(output_dir=str(tmp_path / "trl"), beta=0.3, use_cpu=True, report_to=[], bf16=False,
                       gradient_checkpointing=False, disable_dropout=True),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=tokenizer,
    )  # fmt: skip
    return directory, trainer


def ours_of(model: GPT2LMHeadModel, directory: Path) -> Network:
    network = load_network(directory)
    network.load_state_dict({name: each for name, each in model.state_dict().items() if name in network.state_dict()})
    return network


@pytest.mark.parametrize("room", [10_000, 64, 1])
def test_the_loss_and_its_gradients_are_trls(room: int, theirs: tuple[Path, Any]) -> None:
    directory, trainer = theirs
    model: GPT2LMHeadModel = trainer.model
    network = ours_of(model, directory)
    loss = trainer._compute_loss(model, their_inputs(), return_outputs=False)
    loss.backward()
    objective, tally, total = PreferenceLoss(load_network(directory), 0.3), Tally(), 0.0
    rectangles = arrange(PARTS, room, objective.parts)
    assert (len(rectangles) == 1) == (room == 10_000)
    for rectangle in rectangles:
        batch = rectangle.lay_out(PARTS)
        share = objective.size(batch) / len(PAIRS)
        part = objective(network, batch, torch.float32, tally) * share
        part.backward()
        total += float(part.detach())
    assert total == pytest.approx(float(loss), abs=1e-5)
    assert tally.of == len(PAIRS)
    wanted = {name: each.grad for name, each in model.named_parameters()}
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-5, rtol=1e-4)


def test_an_adapter_is_measured_against_the_network_without_it(make_checkpoint: Make) -> None:
    directory, _ = make_checkpoint()
    losses = []
    for shared in (True, False):
        network = load_network(directory)
        targets = sites_of(["c_attn", "c_fc"])
        add_lora(network, AdapterConfig(rank=4, alpha=8.0, targets=targets), torch.Generator().manual_seed(1))
        reference, inside = (network, partial(without_lora, network)) if shared else (load_network(directory), None)
        objective = PreferenceLoss(reference, 0.5, *([inside] if inside else []))
        recipe = Recipe(steps=6, batch_size=2, rate=1e-2, micro_batch_tokens=64)
        tuner = Tuner(network, objective, PAIRS, PAIRS, recipe, CPU)
        first = tuner.train_step()
        assert first == pytest.approx(np.log(2))  # nothing has moved
        steps = [tuner.train_step() for _ in range(5)]
        losses.append([*steps, tuner.validate()])
        assert tuner.valid_loss is not None
        assert tuner.valid_loss < 0.6
        assert tuner.valid_accuracy is not None
        assert tuner.valid_accuracy > 0.5
    assert losses[0] == losses[1]
