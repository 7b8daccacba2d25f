"""Fine-tuning: steps of AdamW over seeded epochs of examples, until they are over or validation stops falling.

A step is a function of the weights, the optimiser's moments and the step's number, and a saved state holds all of them,
so a run that was killed and resumed ends with the weights of one that was not. Knows nothing of files of text, of what
the loss is, or of who watches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from model.errors import JobError, TrainingError
from model.training.checkpoint import load_state, save_state
from model.training.dataset import Example, Preference
from model.training.loss import Tally, linear_cross_entropy
from model.training.network import Network
from model.training.optimiser import Adam
from model.training.packing import Packed, arrange

STATE = "state.safetensors"
BETAS = (0.9, 0.999)
EPSILON = 1e-8
KEPT = (
    "step",
    "tokens",
    "loss",
    "accuracy",
    "valid_loss",
    "valid_accuracy",
    "measured",
    "best",
    "waited",
)  # of a tuner, beside its tensors


class Objective(Protocol):
    """What a step lowers: a mean over a batch, in nats where it is a cross entropy."""

    @property
    def parts(self) -> int:
        """Examples that have to be in one batch."""
        ...

    def size(self, batch: Packed) -> int:
        """What the mean is over, targets or pairs."""
        ...

    def __call__(self, network: Network, batch: Packed, dtype: torch.dtype, tally: Tally | None = None) -> Tensor:
        """tally: told what was right, the most likely tokens or the pairs."""
        ...


class CrossEntropy:
    """With the text itself, over its targets."""

    parts = 1

    def size(self, batch: Packed) -> int:
        return len(batch.targets)

    def __call__(self, network: Network, batch: Packed, dtype: torch.dtype, tally: Tally | None = None) -> Tensor:
        return linear_cross_entropy(network.packed(batch), network.head, batch.targets, dtype=dtype, tally=tally)


cross_entropy = CrossEntropy()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The numbers of a run, none of them left to choose."""

    steps: int
    batch_size: int
    rate: float
    warm_up: int = 0  # steps
    rate_floor: float = 0.0
    weight_decay: float = 0.01
    clip: float = 1.0
    patience: int | None = None  # validations without a better loss; None: to the end
    seed: int = 1
    micro_batch_tokens: int = 4096
    half_precision: bool = False  # matrix products in bfloat16; weights, sums and norms stay in fp32

    def scale(self, step: int) -> float:
        """What the learning rate is multiplied with: a line up, then a cosine down."""
        if step < self.warm_up:
            return (step + 1) / self.warm_up
        way = (step - self.warm_up) / max(self.steps - self.warm_up, 1)
        return self.rate_floor + (1 - self.rate_floor) * 0.5 * (1 + math.cos(math.pi * way))


class Tuner:
    """One network, of which those parameters learn that ask for gradients."""

    def __init__(
        self,
        network: Network,
        objective: Objective,
        examples: Sequence[Example | Preference],
        valid: Sequence[Example | Preference],
        recipe: Recipe,
        device: torch.device,
    ) -> None:
        """What is validated is the objective where it is one of pairs, else the cross entropy with the text."""
        self.network = network.to(device)
        self.recipe = recipe
        self.step = 0
        self.tokens = 0  # targets learnt from
        self.loss: float | None = None  # of the last step, before it
        self.valid_loss: float | None = None  # measured last
        self.measured = 0  # the step after which that was
        self.accuracy: float | None = None  # of the last step, before it: of its targets, or of its pairs
        self.valid_accuracy: float | None = None
        self.best: float | None = None  # the lowest measured
        self.waited = 0  # validations since
        self._objective = objective
        self._examples = examples
        self._valid = [part for each in valid for part in each.parts]
        self._measure = objective if objective.parts > 1 else cross_entropy
        self._rectangles = arrange(self._valid, recipe.micro_batch_tokens, objective.parts) if valid else []
        self._device = device
        self._learning = {name: each for name, each in network.named_parameters() if each.requires_grad}
        self._adam = Adam(self._learning.items(), recipe.rate, betas=BETAS, epsilon=EPSILON, decay=recipe.weight_decay)
        keeps = recipe.patience is not None
        self._best = {name: each.detach().clone() for name, each in self._learning.items()} if keeps else {}

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self._examples) // self.recipe.batch_size)

    @property
    def finished(self) -> bool:
        patience = self.recipe.patience
        return self.step >= self.recipe.steps or (patience is not None and self.waited >= patience)

    def train_step(self, stopping: Callable[[], bool] = lambda: False) -> float | None:
        """One batch, one update; returns the loss before it. None, and nothing done, if `stopping` says so midway.

        Raises TrainingError where the loss is no number.
        """
        chosen = self._batch()
        parts = [part for each in chosen for part in each.parts]
        rectangles = arrange(parts, self.recipe.micro_batch_tokens, self._objective.parts)
        batches = [rectangle.lay_out(parts) for rectangle in rectangles]
        whole = sum(map(self._objective.size, batches))
        total, tally = 0.0, Tally()
        for number, batch in enumerate(batches):
            if stopping():
                self.network.zero_grad(set_to_none=True)
                return None
            self._seed(number)
            loss = self._loss(batch, tally) * (self._objective.size(batch) / whole)
            loss.backward()
            total += float(loss.detach())
        self._update(total)
        self.tokens += sum(example.targets for example in chosen)
        self.loss, self.accuracy = total, tally.share
        return total

    def _seed(self, number: int) -> None:
        """What dropout draws is a function of the run's seed, the step and the rectangle."""
        if self.network.dropout:
            torch.manual_seed(hash((self.recipe.seed, self.step, number)))

    def _batch(self) -> list[Example | Preference]:
        epoch, step = divmod(self.step, self.steps_per_epoch)
        order = np.random.default_rng((self.recipe.seed, epoch)).permutation(len(self._examples))
        size = self.recipe.batch_size
        return [self._examples[i] for i in order[step * size : (step + 1) * size]]

    def _loss(self, batch: Packed, tally: Tally) -> Tensor:
        with self._autocast():
            return self._objective(self.network, batch.to(self._device), self._dtype, tally)

    def _update(self, loss: float) -> None:
        norm = nn.utils.clip_grad_norm_(self._learning.values(), self.recipe.clip)
        if not math.isfinite(loss) or not bool(torch.isfinite(norm)):
            raise TrainingError(f"the loss of step {self.step + 1} is no finite number; a lower learning rate may help")
        self._adam.step(self.recipe.scale(self.step))
        self.network.zero_grad(set_to_none=True)
        self.step += 1

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.recipe.half_precision else torch.float32

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self.recipe.half_precision)

    # === Validation ===

    @torch.no_grad()
    def validate(
        self, stopping: Callable[[], bool] = lambda: False, watch: Callable[[float], None] = lambda part: None
    ) -> float | None:
        """Mean loss of the validation examples, in nats a token or of pairs; remembers the weights where it is lowest.

        None, and nothing remembered, if `stopping` says so midway. watch: told the part that is done, from 0 to 1.
        Raises TrainingError where it is no number.
        """
        total, size, tally = 0.0, 0, Tally()
        self.network.eval()  # without dropout
        for number, rectangle in enumerate(self._rectangles, start=1):
            if stopping():
                self.network.train()
                return None
            batch = rectangle.lay_out(self._valid)
            with self._autocast():
                loss = self._measure(self.network, batch.to(self._device), self._dtype, tally)
            size += self._measure.size(batch)
            total += float(loss) * self._measure.size(batch)
            watch(number / len(self._rectangles))
        self.network.train()
        mean = total / size
        if not math.isfinite(mean):
            raise TrainingError(f"the validation loss after step {self.step} is no finite number")
        self._remember(mean)
        self.valid_loss, self.valid_accuracy, self.measured = mean, tally.share, self.step
        return mean

    def _remember(self, loss: float) -> None:
        if self.best is not None and loss >= self.best:
            self.waited += 1
            return
        self.best, self.waited = loss, 0
        for name, kept in self._best.items():
            kept.copy_(self._learning[name])

    @torch.no_grad()
    def take_best(self) -> None:
        """With early stopping, the weights of the lowest validation loss are the result."""
        if self.best is not None:
            for name, kept in self._best.items():
                self._learning[name].copy_(kept)

    # === State ===

    def save(self, out: Path, fingerprint: str) -> None:
        state = {"job": fingerprint, **{name: getattr(self, name) for name in KEPT}}
        save_state(out / STATE, self._tensors(), state)

    def resume(self, out: Path, fingerprint: str) -> None:
        """Raises JobError where the state is of another job or damaged."""
        try:
            state = load_state(out / STATE, self._tensors())
        except (ValueError, OSError, KeyError) as error:
            raise JobError(f"cannot resume: {error}") from None
        if state["job"] != fingerprint:
            raise JobError("cannot resume: the directory holds the state of another job")
        for name in KEPT:
            setattr(self, name, state[name])

    def _tensors(self) -> dict[str, Tensor]:
        weights = {f"weight.{name}": tensor for name, tensor in self._learning.items()}
        best = {f"best.{name}": tensor for name, tensor in self._best.items()}
        return {**weights, **best, **dict(self._adam.tensors())}
