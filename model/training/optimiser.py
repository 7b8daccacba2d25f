"""Muon for the matrices inside the blocks, AdamW for everything else.

Muon (Jordan et al., 2024) replaces a matrix's momentum by the nearest orthogonal matrix, so that every direction
learns at one rate; small models need markedly fewer tokens with it than with AdamW alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

MUON_MOMENTUM = 0.95
MUON_DECAY = 0.01
ADAM_BETAS = (0.9, 0.98)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Each of `(count, rows, columns)` with its singular values brought to about 1: five Newton-Schulz steps.

    In the dtype it is given: bfloat16 does, as the iteration pulls its own rounding back (Jordan et al., 2024).
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    result: Tensor = x.mT if tall else x
    return result


class Muon:
    """Momentum, orthogonalised in `dtype`; matrices of one shape are handled together."""

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], rate: float, dtype: torch.dtype) -> None:
        self._parameters = dict(parameters)
        self._rate = rate
        self._dtype = dtype
        self._momenta = {name: torch.zeros_like(parameter) for name, parameter in self._parameters.items()}

    def step(self, scale: float) -> None:
        by_shape: dict[torch.Size, list[str]] = {}
        for name, parameter in self._parameters.items():
            by_shape.setdefault(parameter.shape, []).append(name)
        for names in by_shape.values():
            self._step_together(names, self._rate * scale)

    @torch.no_grad()
    def _step_together(self, names: list[str], rate: float) -> None:
        directions = []
        for name in names:
            grad = self._parameters[name].grad
            assert grad is not None
            momentum = self._momenta[name].lerp_(grad, 1 - MUON_MOMENTUM)
            directions.append(grad.lerp(momentum, MUON_MOMENTUM))  # Nesterov
        stacked = torch.stack(directions)  # (matrices, inputs, outputs)
        inputs, outputs = stacked.shape[1:]
        parts = 3 if names[0].endswith("c_attn.weight") else 1  # query, key and value are three maps, not one
        outputs //= parts
        split = stacked.unflatten(2, (parts, outputs)).transpose(1, 2).flatten(0, 1)
        directed = orthogonalise(split.to(self._dtype)).float()
        updates = directed.unflatten(0, (len(names), parts)).transpose(1, 2).flatten(2)
        gain = max(1.0, outputs / inputs) ** 0.5
        for name, update in zip(names, updates, strict=True):
            self._parameters[name].mul_(1 - rate * MUON_DECAY).add_(update, alpha=-rate * gain)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The state that a checkpoint keeps, by name."""
        for name, momentum in self._momenta.items():
            yield f"muon.{name}", momentum


class Adam:
    """torch's AdamW, under the names of its parameters. Matrices decay, if any do; biases and norms never."""

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        rate: float,
        *,
        betas: tuple[float, float] = ADAM_BETAS,
        epsilon: float = 1e-10,
        decay: float = 0.0,
    ) -> None:
        self._parameters = dict(parameters)
        self._rate = rate
        matrices = [parameter for parameter in self._parameters.values() if parameter.dim() == 2]
        others = [parameter for parameter in self._parameters.values() if parameter.dim() != 2]
        groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
        self._adam = torch.optim.AdamW(groups, lr=rate, betas=betas, eps=epsilon, fused=True)
        for parameter in self._parameters.values():  # torch would make these at the first step; a resume needs them now
            self._adam.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def step(self, scale: float) -> None:
        for group in self._adam.param_groups:
            group["lr"] = self._rate * scale
        self._adam.step()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The state that a checkpoint keeps, by name."""
        for name, parameter in self._parameters.items():
            for key, value in self._adam.state[parameter].items():
                yield f"adam.{key}.{name}", value


class Optimiser:
    """Both, as one: steps a network's parameters, and lists the state to keep."""

    def __init__(
        self, network: nn.Module, muon_rate: float, adam_rate: float, dtype: torch.dtype = torch.float32
    ) -> None:
        self._network = network
        named = list(network.named_parameters())
        inner = {name for name, parameter in named if ".h." in name and parameter.dim() == 2}
        self._muon = Muon(((name, parameter) for name, parameter in named if name in inner), muon_rate, dtype)
        self._adam = Adam(((name, parameter) for name, parameter in named if name not in inner), adam_rate)

    def step(self, scale: float) -> None:
        """One update at `scale` times the base rates, from gradients clipped to norm 1, which are then dropped."""
        nn.utils.clip_grad_norm_(self._network.parameters(), 1.0)
        self._muon.step(scale)
        self._adam.step(scale)
        self._network.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        return dict([*self._muon.tensors(), *self._adam.tensors()])
