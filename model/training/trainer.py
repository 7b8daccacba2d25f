"""The training loop: batches in, steps of the optimiser, a log, checkpoints that survive kill -9.

A step is a function of the weights, the optimiser's state, the step's number, the tokens used and the fraction of the
run that is over; a checkpoint holds these five, so a run counted in steps ends with the same bits however often it
was killed. A run counted in seconds sees a real clock and is merely as good.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.config import ModelConfig
from model.training.checkpoint import export, load_network, load_state, save_state
from model.training.data import Batch, TokenArray, Windows
from model.training.log import Log, Row
from model.training.loss import CandidateSampler, linear_cross_entropy
from model.training.network import Network
from model.training.optimiser import Optimiser
from model.training.schedule import Progress, Schedule

STATE = "state.safetensors"
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything about a run but its text, its network's shape and its length."""

    batch_tokens: int = 8192
    shorter: int = 4  # windows are this part of the context until the schedule says long
    candidates: int = 4096
    muon_rate: float = 0.02
    adam_rate: float = 6e-3
    seed: int = 1
    half_precision: bool = True  # matrix products in bfloat16; weights, sums and norms stay in fp32
    validate_every: int = 250
    validation_windows: int = 16
    schedule: Schedule = field(default_factory=Schedule)


class Trainer:
    """One network being trained on one token stream."""

    def __init__(
        self, config: ModelConfig, recipe: Recipe, train: TokenArray, valid: TokenArray, progress: Progress
    ) -> None:
        if config.n_positions % recipe.shorter or recipe.batch_tokens % config.n_positions:
            raise ValueError("a batch must be whole contexts, and a context whole short windows")
        self.network = Network(config)
        self.network.initialise(torch.Generator().manual_seed(recipe.seed))
        self.progress = progress
        self.step = 0
        self.tokens = 0
        self.recipe = recipe
        self._valid = valid
        self._optimiser = Optimiser(self.network, recipe.muon_rate, recipe.adam_rate, self._dtype)
        self._windows = Windows(train, config.n_positions, recipe.seed)
        counts = np.bincount(train, minlength=config.vocab_size)
        self._sampler = CandidateSampler(torch.from_numpy(counts), recipe.candidates)

    def train_step(self) -> float:
        """One batch, one update; the loss before it, in nats a token. The caller advances the progress."""
        recipe, fraction = self.recipe, self.progress.fraction
        length = self.network.config.n_positions // (1 if recipe.schedule.is_long(fraction) else recipe.shorter)
        batch = self._windows.batch(self.tokens // length, recipe.batch_tokens // length, length)
        loss = self._loss(batch, full=recipe.schedule.is_full_softmax(fraction))
        loss.backward()
        self._optimiser.step(recipe.schedule.rate(fraction))
        self.step += 1
        self.tokens += recipe.batch_tokens
        return float(loss.detach())

    def _loss(self, batch: Batch, *, full: bool) -> Tensor:
        network, dtype = self.network, self._dtype
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.half_precision):
            hidden = network(torch.from_numpy(batch.inputs), torch.from_numpy(batch.starts)).flatten(0, 1)
        targets = torch.from_numpy(batch.targets).flatten()
        if full:
            return linear_cross_entropy(hidden, network.head, targets, dtype=dtype)
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.step)
        drawn = self._sampler.draw(targets, generator)
        return linear_cross_entropy(hidden, network.head[drawn.ids], drawn.targets, drawn.shift, dtype)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.recipe.half_precision else torch.float32

    def validate(self) -> float:
        """Full-softmax loss over evenly spread windows of whole contexts of the validation text."""
        context = self.network.config.n_positions
        begins = np.linspace(0, len(self._valid) - context - 1, self.recipe.validation_windows).astype(np.int64)
        losses = [evaluate(self.network, self._valid[begin : begin + context + 1], self._dtype) for begin in begins]
        return float(np.mean(losses))

    def save(self, out: Path) -> None:
        """Writes `state.safetensors`, to resume from, and the model itself."""
        state = {"step": self.step, "tokens": self.tokens, "done": self.progress.done}
        save_state(out / STATE, self._tensors(), state)
        export(self.network, out)

    def resume(self, out: Path) -> None:
        state = load_state(out / STATE, self._tensors())
        self.step, self.tokens, self.progress.done = state["step"], state["tokens"], state["done"]

    def begin_from(self, checkpoint: Path, tokens: int) -> None:
        """Takes the weights of a model of this shape that has seen `tokens`; the text goes on where it stopped.

        Raises ConfigError or WeightsError, and RuntimeError where it has another shape.
        """
        self.network.load_state_dict(load_network(checkpoint).state_dict())
        self.tokens = tokens

    def _tensors(self) -> dict[str, Tensor]:
        return {**self.network.state_dict(), **self._optimiser.tensors()}


@torch.no_grad()
def evaluate(network: Network, tokens: TokenArray, dtype: torch.dtype = torch.float32) -> float:
    """Mean nats a token of `tokens[1:]`, each given all before it; no more than a context and one."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        hidden = network(ids[:-1].unsqueeze(0)).squeeze(0)
    return float(linear_cross_entropy(hidden, network.head.detach(), ids[1:], dtype=dtype))


def run(
    trainer: Trainer, out: Path, log: Log, *, timed: bool, save_every: float, clock: Clock = time.monotonic
) -> None:
    """Trains until the progress is finished, leaving the state and the exported model in `out`.

    Progress counts seconds of the clock if `timed`, else steps. State and model are written every `save_every` seconds.
    """
    last = saved = clock()
    while not trainer.progress.finished:
        loss = trainer.train_step()
        valid = trainer.validate() if trainer.step % trainer.recipe.validate_every == 0 else None
        now = clock()
        trainer.progress.advance(now - last if timed else 1.0)
        log.write(Row(trainer.step, trainer.tokens, trainer.progress.done, loss, valid, now - last))
        last = now
        if now - saved >= save_every and not trainer.progress.finished:
            trainer.save(out)
            saved = now
    trainer.save(out)
