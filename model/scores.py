"""Log-probabilities of tokens that were decided, in two halves: on the device, and on the host once they are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from model.step import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Scores:
    """Of every row of a step; on the host once the step is over."""

    own: Tensor  # (rows,)
    ranks: Tensor  # (rows,), from 1
    values: Tensor  # (rows, most), falling
    ids: Tensor  # (rows, most)
    tops: Sequence[int | None]  # how many of the most likely each row asked for; None for no scores at all

    def rows(self) -> list[TokenLogprobs | None]:
        columns = self.own.tolist(), self.ranks.tolist(), self.ids.tolist(), self.values.tolist()
        return [
            None if top is None else TokenLogprobs(own, list(zip(ids[:top], values[:top], strict=True)), rank)
            for own, rank, ids, values, top in zip(*columns, self.tops, strict=True)
        ]


def score(logits: Tensor, tokens: Tensor, tops: Sequence[int | None]) -> Scores:
    """Raw log-softmax of each row's token and of its most likely ones. logits: (rows, vocab), tokens: (rows,)."""
    logprobs = logits.log_softmax(dim=-1)
    best = logprobs.topk(max(top or 0 for top in tops), dim=-1)
    own = logprobs.gather(1, tokens[:, None])  # (rows, 1)
    ranks = 1 + (logprobs > own).sum(dim=-1)
    return Scores(_home(own[:, 0]), _home(ranks), _home(best.values), _home(best.indices), tops)


def _home(part: Tensor) -> Tensor:
    """To memory that the device writes while the host goes on: readable once the step is over."""
    return part.to("cpu", non_blocking=True)
