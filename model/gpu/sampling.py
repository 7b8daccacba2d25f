"""picking.py's rules for a whole batch at once, on the device, without a word to the host.

Every row is decided as it would be alone: which of the ways below it takes follows from its own parameters. What needs
more than numbers of the row itself (penalties, biases, bans, grammars, typical_p, xtc) is not done here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.gpu.accelerator import Accelerator
from model.picking import coarse
from model.sampling_params import SamplingParams

HEAD = 256  # candidates that a row of a small top_k is picked from
SLICE = 64  # rows of the vocabulary sorted, or summed in float64, at a time: it bounds the memory


Draw = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], Tensor]  # as triton_sampling.draw


class Way(IntEnum):
    GREEDY = 0
    WHOLE = 1  # no filter: the inverse of the cumulative distribution in token order
    HEAD = 2  # top_k of at most HEAD, perhaps with others
    SORTED = 3  # other filters


def on_device(params: SamplingParams) -> bool:
    """Whether this module can decide such a row."""
    return not (
        params.logit_bias
        or params.allowed_token_ids is not None
        or params.bad_words
        or params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty != 1
        or params.dry is not None
        or params.grammar is not None
        or params.min_tokens
        or params.temperature_last
        or params.min_p_last
        or params.logprob_token_ids
        or params.typical_p < 1
        or params.xtc_probability > 0
    )


def way(params: SamplingParams) -> Way:
    if params.greedy:
        return Way.GREEDY
    if params.top_k is not None and params.top_k <= HEAD:
        return Way.HEAD
    return Way.SORTED if params.top_p < 1 or params.min_p > 0 or params.top_k is not None else Way.WHOLE


@dataclass(frozen=True, slots=True)
class Controls:
    """Of a batch, on the device: (rows, 1) float64 each."""

    uniform: Tensor
    ways: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor

    def rows(self, start: int, stop: int) -> Controls:
        parts = self.uniform, self.ways, self.temperature, self.top_k, self.top_p, self.min_p
        return Controls(*(part[start:stop] for part in parts))


class Sampler:
    """Knows the parameters of each seat, and owns the buffers they travel in, two in turn on the host's side."""

    def __init__(self, accelerator: Accelerator, seats: int, vocab_size: int, draw: Draw | None = None) -> None:
        """draw: decides rows of Way.WHOLE; None for PyTorch's way."""
        size = 6 * seats
        self._draw = draw
        self._vocab_size = vocab_size
        self._seats: npt.NDArray[np.float64] = np.zeros((seats, 5))  # way, temperature, top_k, top_p, min_p
        self._host = [accelerator.host_buffer(size, torch.float64) for _ in range(2)]
        self._device = torch.zeros(size, dtype=torch.float64, device=accelerator.device)
        self._turn = 0

    def keep(self, seat: int, params: SamplingParams) -> None:
        """Decide what sits there by these from now on."""
        top_k = self._vocab_size if params.top_k is None else params.top_k
        temperature = 1.0 if params.greedy else params.temperature
        self._seats[seat] = way(params), temperature, top_k, params.top_p, params.min_p

    def drawn(self, seats: npt.NDArray[np.int64]) -> list[int]:
        """Which of these rows need a random number."""
        return np.flatnonzero(self._seats[seats, 0] != Way.GREEDY).tolist()

    def refine(
        self, logits: Tensor, greedy: Tensor, seats: npt.NDArray[np.int64], uniforms: npt.NDArray[np.float64]
    ) -> Tensor:
        """The rows' tokens, (rows,). logits: (rows, vocab) fp32; greedy: (rows,), their largest.

        seats, uniforms: (rows,); the latter in [0, 1), and anything where the row is not drawn.
        """
        ways = {Way(each) for each in np.unique(self._seats[seats, 0])} - {Way.GREEDY}
        controls, rows, tokens = self._load(seats, uniforms), len(seats), greedy
        if self._draw is not None and Way.WHOLE in ways:
            ways -= {Way.WHOLE}
            given = controls.ways, controls.uniform, controls.temperature
            tokens = self._draw(logits, tokens, *given, Way.WHOLE)
        if not ways:
            return tokens
        pieces = []
        for start in range(0, rows, SLICE):
            stop = min(start + SLICE, rows)
            pieces.append(_pick(logits[start:stop], tokens[start:stop], controls.rows(start, stop), ways))
        return torch.cat(pieces)

    def _load(self, seats: npt.NDArray[np.int64], uniforms: npt.NDArray[np.float64]) -> Controls:
        self._turn = 1 - self._turn
        host, rows = self._host[self._turn], len(seats)
        table = host.numpy()[: 6 * rows].reshape(6, rows)
        table[0] = uniforms
        table[1:] = self._seats[seats].T
        device = self._device[: 6 * rows]
        device.copy_(host[: 6 * rows], non_blocking=True)
        return Controls(*device.view(6, rows, 1).unbind(0))


def _pick(logits: Tensor, tokens: Tensor, controls: Controls, ways: set[Way]) -> Tensor:
    inverse = 1 / controls.temperature.float()
    weights = ((logits - logits.amax(dim=-1, keepdim=True)) * inverse).exp()
    choices: dict[Way, Callable[[Tensor, Controls], Tensor]] = {
        Way.WHOLE: _draw,
        Way.HEAD: _pick_head,
        Way.SORTED: _pick_sorted,
    }
    for each in sorted(ways):
        tokens = torch.where(controls.ways[:, 0] == each, choices[each](weights, controls), tokens)
    return tokens


def _grains(weights: Tensor, vocab_size: int) -> Tensor:
    large = coarse(vocab_size)
    return weights.double() + large - large


def _draw(weights: Tensor, controls: Controls) -> Tensor:
    """In token order, where the running sum exceeds uniform * sum. weights: (rows, vocab)."""
    mass = _grains(weights, weights.shape[-1]).cumsum(dim=-1)
    return torch.searchsorted(mass, controls.uniform * mass[:, -1:], right=True)[:, 0]


def _pick_head(weights: Tensor, controls: Controls) -> Tensor:
    head = weights.topk(min(HEAD, weights.shape[-1]), dim=-1)
    return _pick_of(weights, head.values, head.indices, controls)


def _pick_sorted(weights: Tensor, controls: Controls) -> Tensor:
    return _pick_of(weights, *weights.sort(dim=-1, descending=True, stable=True), controls)


def _pick_of(weights: Tensor, values: Tensor, ids: Tensor, controls: Controls) -> Tensor:
    """values: (rows, candidates) in falling order. min_p and top_k, then top_p of what they left, then the draw."""
    masses = _grains(values, weights.shape[-1])
    likely = ((values >= controls.min_p.float()) & (masses > 0)).sum(dim=-1, keepdim=True)
    kept = torch.minimum(likely, controls.top_k.long()).clamp(1, values.shape[-1])
    mass = masses.cumsum(dim=-1)
    reached = (mass < controls.top_p * mass.gather(1, kept - 1)).sum(dim=-1, keepdim=True) + 1
    kept = torch.where(controls.top_p < 1, torch.minimum(kept, reached), kept)
    inside = torch.arange(values.shape[-1], device=values.device) < kept
    left = torch.zeros_like(weights).scatter(1, ids, torch.where(inside, values, 0.0))
    return _draw(left, controls)
