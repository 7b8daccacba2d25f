"""From adjusted logits to a token, by one uniform number. Each row by itself.

This is the definition; model/kernels/sampling.h computes the same on a CPU, and model/gpu/sampling.py on a GPU.

1. Weights. t = (logit - largest logit) * (1 / temperature) and weight = exp(t), all in float32. The largest is 1.
2. Grains. A weight that is summed is first rounded to a multiple of the grain, which is 2^-52 of the smallest power of
   two that is not below the vocabulary's size. A sum of so many weights is exact in float64 then: the same number,
   whatever the order. A token whose weight rounds to zero is never picked.
3. Filters, in this order, each on what the ones before it have left:
   min_p      tokens of at least this weight
   top_k      so many of the heaviest tokens
   top_p      the heaviest tokens, until their sum reaches this share of the sum (Holtzman et al. 2020)
   typical_p  the tokens whose surprise is nearest to the mean surprise, until their sum reaches this share of the sum
              (Meister et al. 2022)
   xtc        if the row's coin says so: of the tokens of at least this share of the sum, only the lightest
   Of equals the earlier token comes first. min_p, top_k and top_p are in vLLM's order. llama.cpp, where typical_p and
   xtc come from, has temperature last and min_p after top_p; here every filter sees tempered weights, as in
   transformers.
   With min_p_last min_p comes after top_p. With temperature_last the filters see weights of temperature 1; then those
   that are left are weighed anew, t = (t - largest t of them) * (1 / temperature).
4. Draw. In token order, the first token at which the running sum exceeds uniform * sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.sampling_params import SamplingParams
from model.sampling_row import SamplingRow

XTC_THRESHOLD_MAX = 0.5  # no two tokens can reach more, so xtc would have nothing to choose


def pick(logits: Tensor, row: SamplingRow) -> int:
    """logits: (vocab,) fp32, one of them finite."""
    if row.params.greedy:
        # On a CPU NumPy's loop is seven times as fast as PyTorch's. Both take the first of equals.
        return int((logits.numpy() if logits.device.type == "cpu" else logits).argmax())
    candidates = Candidates(logits, row)
    if _filters(row):
        candidates.filter(row)
    return candidates.draw(row.uniform)


def coarse(vocab_size: int) -> float:
    """Adding and subtracting this rounds a float64 between 0 and 1 to a multiple of the grain."""
    return 2.0 ** (vocab_size - 1).bit_length()


def _excludes(row: SamplingRow) -> bool:
    """Whether xtc acts."""
    return row.coin < row.params.xtc_probability and row.params.xtc_threshold <= XTC_THRESHOLD_MAX


def _filters(row: SamplingRow) -> bool:
    params = row.params
    cuts = params.min_p > 0 or params.top_k is not None or params.top_p < 1
    return cuts or params.typical_p < 1 or _excludes(row)


def weigh(tempered: Tensor) -> Tensor:
    """The only step whose last bit depends on the library that computes it."""
    return tempered.exp()


class Candidates:
    """The tokens that may still be picked, in token order."""

    def __init__(self, logits: Tensor, row: SamplingRow) -> None:
        """logits: (vocab,)."""
        self._inverse = (1 / torch.tensor(row.params.temperature, dtype=torch.float32)).item()
        self._coarse = coarse(len(logits))
        last = row.params.temperature_last and _filters(row)
        self._tempered = (logits - logits.max()) * (1.0 if last else self._inverse)
        self._weights = weigh(self._tempered)
        self._masses = self._grains(self._weights.double())
        self._total = self._sum()
        self._ids: Tensor | None = None  # (candidates,); None for the whole vocabulary

    def draw(self, uniform: float) -> int:
        sums = self._masses.cumsum(0)
        place = int(torch.searchsorted(sums, uniform * sums[-1], right=True))
        return place if self._ids is None else int(self._ids[place])

    def filter(self, row: SamplingRow) -> None:
        params = row.params
        self._keep(((self._weights >= self._least(params)) & (self._masses > 0)).nonzero()[:, 0])
        if params.top_k is not None:
            self._keep_best(self._weights, torch.ones_like(self._masses), float(params.top_k))
        if params.top_p < 1:
            cut = (params.min_p > 0 and not params.min_p_last) or params.top_k is not None
            self._keep_best(self._weights, self._masses, params.top_p * (self._sum() if cut else self._total))
        if params.min_p_last:
            self._keep((self._weights >= params.min_p).nonzero()[:, 0])
        if params.typical_p < 1:
            self._keep_best(self._typicality(), self._masses, params.typical_p * self._sum())
        if _excludes(row):
            self._exclude_top_choices(params.xtc_threshold * self._sum())
        if params.temperature_last:
            self._temper()

    def _temper(self) -> None:
        """What the filters have left, where the temperature comes last."""
        self._tempered = (self._tempered - self._tempered.max()) * self._inverse
        self._weights = weigh(self._tempered)
        self._masses = self._grains(self._weights.double())

    def _grains(self, values: Tensor) -> Tensor:
        """values: float64."""
        return values + self._coarse - self._coarse

    def _sum(self) -> float:
        return float(self._masses.sum())

    def _least(self, params: SamplingParams) -> float:
        """A weight below which min_p, top_k and top_p keep nothing, so that there is less to sort."""
        size, least = len(self._weights), 0.0 if params.min_p_last else params.min_p
        if params.top_k is not None and params.top_k < size:
            return max(least, self._weights.topk(params.top_k).values[-1].item())
        if least == 0 and params.top_p < 1:  # all that weigh less could not make up what top_p leaves out
            return (1 - params.top_p) * self._total / size * 0.999
        return least

    def _keep(self, places: Tensor) -> None:
        """places: among the candidates, rising."""
        self._ids = places if self._ids is None else self._ids[places]
        self._tempered, self._weights, self._masses = (
            part[places] for part in (self._tempered, self._weights, self._masses)
        )

    def _keep_best(self, keys: Tensor, masses: Tensor, goal: float) -> None:
        """The candidates of the largest keys until their masses sum to `goal`."""
        order = keys.sort(descending=True, stable=True).indices
        missing = int((masses[order].cumsum(0) < goal).sum())
        self._keep(order[: missing + 1].sort().values)

    def _typicality(self) -> Tensor:
        """A token's surprise is the log of the total minus t, so the distance from its mean is |t - mean of t|."""
        mean = self._grains(self._masses * self._tempered.double()).sum() / self._masses.sum()
        return -(self._tempered - mean.float()).abs()

    def _exclude_top_choices(self, least: float) -> None:
        top = self._weights >= torch.tensor(least, dtype=torch.float32)
        if not bool(top.any()):
            return
        spared = (self._weights == self._weights[top].min()).nonzero()[-1]
        top[spared] = False
        self._keep((~top).nonzero()[:, 0])
