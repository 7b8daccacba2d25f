"""Direct preference optimisation (Rafailov et al. 2023): of two answers the preferred one becomes likelier, the other
less likely, as measured against the network that training began with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from model.training.lora import LoraConv1D
from model.training.loss import Tally, linear_log_probabilities
from model.training.network import Network
from model.training.packing import Packed


class PreferenceLoss:
    """`tuner.Objective`: the mean of `-log sigmoid(beta * margin)` over pairs, whose first answer is the preferred one.

    The margin is by how much more the preferred answer's log-probability has risen than the other's.
    """

    parts = 2

    def __init__(
        self, reference: Network, beta: float, as_reference: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        """reference: may be the network itself, where it is the reference inside `as_reference()`."""
        self._reference = reference
        self._beta = beta
        self._as_reference = as_reference

    def size(self, batch: Packed) -> int:
        return len(torch.unique(batch.owners[batch.owners >= 0])) // 2

    def __call__(self, network: Network, batch: Packed, dtype: torch.dtype, tally: Tally | None = None) -> Tensor:
        with torch.no_grad(), self._as_reference():
            before = _answers(self._reference, batch, dtype)
        chosen, rejected = (_answers(network, batch, dtype) - before).view(-1, 2).unbind(1)  # each (pairs,)
        margins = self._beta * (chosen - rejected)
        if tally is not None:
            tally.add(int((margins.detach() > 0).sum()), len(margins))
        return -F.logsigmoid(margins).mean()


def _answers(network: Network, batch: Packed, dtype: torch.dtype) -> Tensor:
    """(examples,): the log-probability of each one's answer, in the order of their numbers."""
    found = linear_log_probabilities(network.packed(batch), network.head, batch.targets, dtype)
    owners = batch.owners.flatten()[batch.predicts]
    examples, numbers = torch.unique(owners, return_inverse=True)
    return torch.zeros(len(examples), device=found.device).index_add(0, numbers, found)


@contextmanager
def without_lora(network: Network) -> Iterator[None]:
    """The network as it was before adapters that began at nothing were put beside it; without dropout."""
    adapted = [module for module in network.modules() if isinstance(module, LoraConv1D)]
    training = network.training
    network.eval()
    for module in adapted:
        module.on = False
    try:
        yield
    finally:
        network.train(training)
        for module in adapted:
            module.on = True
