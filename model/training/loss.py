"""The language-model loss, over the whole vocabulary or over a sample of it.

A small GPT-2 spends most of its time on the 50,257 logits of its head. The normaliser `Z = sum_v exp(l_v)` can be
estimated from a candidate set instead: every token that is a target in the batch, taken with certainty, and others
drawn with known inclusion probabilities `pi_v`. `sum_v exp(l_v) / pi_v` over the candidates is the Horvitz-Thompson
estimate of `Z`: unbiased, so that adding `-log pi_v` to each candidate's logit gives a loss that tends to the full one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 21  # logits held at once: 8 MB in fp32, so that they stay in the last-level cache


@dataclass(slots=True)
class Tally:
    """How often the network was right, of how often it was asked."""

    right: int = 0
    of: int = 0

    def add(self, right: int, of: int) -> None:
        self.right += right
        self.of += of

    @property
    def share(self) -> float | None:
        return self.right / self.of if self.of else None


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross entropy of `hidden @ weight.T + shift` in chunks of rows, its gradients computed on the way."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, shift: Tensor | None, dtype: torch.dtype,
        tally: Tally | None,
    ) -> Tensor:  # fmt: skip
        tokens = hidden.shape[0]
        columns = weight.to(dtype)
        inputs = hidden.to(dtype)
        learns_hidden, learns_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(inputs) if learns_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if learns_weight else None
        total = torch.zeros((), dtype=torch.float32, device=weight.device)
        chunk = max(1, CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, tokens, chunk):
            rows = slice(start, min(start + chunk, tokens))
            logits = (inputs[rows] @ columns.t()).float()  # (chunk, candidates)
            if shift is not None:
                logits += shift
            wanted = targets[rows].unsqueeze(1)
            normaliser = torch.logsumexp(logits, dim=1, keepdim=True)
            total += (normaliser - logits.gather(1, wanted)).sum()
            if tally is not None:
                tally.add(int((logits.gather(1, wanted) == logits.amax(1, keepdim=True)).sum()), len(wanted))
            if grad_hidden is None and grad_weight is None:
                continue
            logits.sub_(normaliser).exp_()
            logits.scatter_add_(1, wanted, torch.full_like(normaliser, -1.0))
            grad = logits.to(dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ columns
            if grad_weight is not None:
                grad_weight += grad.t() @ inputs[rows]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.tokens = tokens
        ctx.hidden_dtype = hidden.dtype
        return total / tokens

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = outputs[0] / ctx.tokens
        to_hidden = None if grad_hidden is None else grad_hidden.to(ctx.hidden_dtype) * scale
        return to_hidden, None if grad_weight is None else grad_weight * scale, None, None, None, None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, shift: Tensor | None = None, dtype: torch.dtype = torch.float32,
    tally: Tally | None = None,
) -> Tensor:  # fmt: skip
    """Mean cross entropy in nats, never holding more than a chunk of the logits.

    `hidden` is `(tokens, width)`, `weight` `(candidates, width)`, `targets` `(tokens,)` indices into the candidates,
    `shift` `(candidates,)` is added to every row of logits and must be zero at each target. Matrix products run in
    `dtype`, sums in fp32. tally: told how many targets were the most likely ones.
    """
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, shift, dtype, tally)  # type: ignore[no-untyped-call]
    return loss


class _LinearLogProbabilities(torch.autograd.Function):
    """Of `hidden @ weight.T`, of one target a row, in chunks of rows, which are computed again for the gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.dtype = dtype
        found = torch.empty(len(targets), device=hidden.device)
        for rows, logits in _chunks(hidden.to(dtype), weight.to(dtype)):
            found[rows] = logits.gather(1, targets[rows].unsqueeze(1)).squeeze(1) - torch.logsumexp(logits, dim=1)
        return found

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        columns, inputs = weight.to(ctx.dtype), hidden.to(ctx.dtype)
        learns_hidden, learns_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if learns_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if learns_weight else None
        for rows, logits in _chunks(inputs, columns):
            scale = outputs[0][rows].unsqueeze(1)  # (chunk, 1)
            grad = logits.softmax(dim=1).mul_(-scale).scatter_add_(1, targets[rows].unsqueeze(1), scale).to(ctx.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = (grad @ columns).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight += grad.t() @ inputs[rows]
        return grad_hidden, grad_weight, None, None


def _chunks(inputs: Tensor, columns: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows, and their logits in fp32: (chunk, candidates)."""
    chunk = max(1, CHUNK_ELEMENTS // len(columns))
    for start in range(0, len(inputs), chunk):
        rows = slice(start, start + chunk)
        yield rows, (inputs[rows] @ columns.t()).float()


def linear_log_probabilities(hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """`(tokens,)` in nats; arguments as `linear_cross_entropy`'s."""
    found: Tensor = _LinearLogProbabilities.apply(hidden, weight, targets, dtype)  # type: ignore[no-untyped-call]
    return found


@dataclass(frozen=True, slots=True)
class Candidates:
    """A sample of the vocabulary that holds every target of a batch."""

    ids: Tensor  # (candidates,) token ids, ascending
    shift: Tensor  # (candidates,) minus the log of each one's inclusion probability
    targets: Tensor  # (tokens,) where in `ids` each target is


class CandidateSampler:
    """Draws candidates: a batch's targets for certain, then others in proportion to a power of their frequency."""

    def __init__(self, counts: Tensor, size: int) -> None:
        self._weights = (counts.double() + 1.0).pow(0.75)  # word2vec's exponent; +1 lets unseen tokens be drawn
        self._size = size

    def draw(self, targets: Tensor, generator: torch.Generator) -> Candidates:
        """Candidates for `targets` `(tokens,)`: as many as the sampler's size, or more where the targets fill it."""
        certain = torch.unique(targets)
        inclusion = self._inclusion(certain)
        ids = _systematic_sample(inclusion, generator)
        shift = -inclusion[ids].log().float()
        return Candidates(ids=ids, shift=shift, targets=torch.searchsorted(ids, targets))

    def _inclusion(self, certain: Tensor) -> Tensor:
        """Each token's probability of being drawn: 1 for `certain`, else proportional to weight and at most 1."""
        inclusion = torch.zeros_like(self._weights)
        inclusion[certain] = 1.0
        others = max(self._size - certain.numel(), self._size // 4)  # never none: the normaliser needs the rest of it
        size = certain.numel() + others
        while size < inclusion.numel():
            free = inclusion < 1.0
            share = self._weights * ((size - int((~free).sum())) / float(self._weights[free].sum()))
            sure = free & (share >= 1.0)
            if not bool(sure.any()):
                return torch.where(free, share, inclusion)
            inclusion[sure] = 1.0
        return torch.ones_like(inclusion)


def _systematic_sample(inclusion: Tensor, generator: torch.Generator) -> Tensor:
    """Ascending indices, each present with exactly its probability (Madow, 1949).

    One uniform offset and unit steps along the running sum: an index is taken when a step falls inside its interval,
    so the size of the sample is the sum of the probabilities, rounded up or down.
    """
    edges = inclusion.cumsum(0)
    offset = torch.rand((), generator=generator, dtype=torch.float64)
    below = (edges + offset).floor()
    taken = torch.diff(below, prepend=offset.floor().unsqueeze(0)) > 0
    return torch.nonzero(taken | (inclusion >= 1.0)).squeeze(1)
