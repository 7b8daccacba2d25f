"""From adjusted logits to a token, by one uniform number. Each row by itself.

In this order: temperature, min_p, top_k, top_p (as in vLLM), then typical_p and xtc. llama.cpp, where those two come
from, has temperature last and min_p after top_p; here every filter sees the tempered distribution, as in vLLM and
transformers, and typical_p and xtc see what the others left, renormalised. With temperature_last the filters see the
distribution of temperature 1, and what they leave is tempered. With min_p_last min_p sees what top_p has left.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from model.sampling_params import SamplingParams
from model.sampling_row import SamplingRow

HEAD = 256  # candidates that decide most top_k and top_p rows; the rest need a whole sort
XTC_THRESHOLD_MAX = 0.5  # no two tokens can reach more, so xtc would have nothing to choose


def pick(logits: Tensor, rows: list[SamplingRow]) -> list[int]:
    """logits: (len(rows), vocab) fp32, with a finite one in every row."""
    greedy = [i for i, row in enumerate(rows) if row.params.greedy]
    whole = [i for i, row in enumerate(rows) if not row.params.greedy and not _filters(row.params)]
    cut = [i for i, row in enumerate(rows) if not row.params.greedy and _filters(row.params)]
    tokens = [0] * len(rows)
    for indices, choose in ((greedy, _pick_greedy), (whole, _pick_whole), (cut, _pick_cut)):
        for some in _batches(indices, logits.device):
            for i, token in zip(some, choose(_rows(logits, some), [rows[i] for i in some]), strict=True):
                tokens[i] = token
    return tokens


def _batches(indices: list[int], device: torch.device) -> Iterator[list[int]]:
    """On a CPU each row by itself: what stays in cache is done ten times as fast."""
    at_once = 1 if device.type == "cpu" else max(1, len(indices))
    return (indices[i : i + at_once] for i in range(0, len(indices), at_once))


def _rows(logits: Tensor, indices: list[int]) -> Tensor:
    whole = range(indices[0], indices[-1] + 1)
    return logits[whole.start : whole.stop] if indices == list(whole) else logits[indices]


def _filters(params: SamplingParams) -> bool:
    return params.top_p < 1 or params.top_k is not None or params.min_p > 0 or _needs_all(params)


def _needs_all(params: SamplingParams) -> bool:
    """Filters that look at the whole distribution."""
    return params.typical_p < 1 or params.xtc_probability > 0


def _pick_greedy(logits: Tensor, rows: list[SamplingRow]) -> list[int]:
    # On a CPU NumPy's loop is seven times as fast as PyTorch's. Both take the first of equals.
    best = logits.numpy() if logits.device.type == "cpu" else logits
    tokens: list[int] = best.argmax(-1).tolist()
    return tokens


def _pick_whole(logits: Tensor, rows: list[SamplingRow]) -> list[int]:
    """Inverse of the cumulative distribution over the vocabulary, in token order."""
    mass = _temper(logits, [row.params.temperature for row in rows]).softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    threshold = torch.tensor([row.uniform for row in rows], dtype=torch.float64, device=logits.device)
    found = torch.searchsorted(mass, (threshold * mass[:, -1])[:, None], right=True)
    tokens: list[int] = found[:, 0].tolist()
    return tokens


def _temper(logits: Tensor, temperatures: list[float]) -> Tensor:
    return logits / torch.tensor(temperatures, device=logits.device)[:, None]


def _pick_cut(logits: Tensor, rows: list[SamplingRow]) -> list[int]:
    """top_k, top_p and min_p: the most likely candidates first; a whole sort only for a row that needs more of them."""
    temperatures = [1.0 if row.params.temperature_last else row.params.temperature for row in rows]
    probabilities = _temper(logits, temperatures).softmax(dim=-1)
    head = probabilities.topk(min(HEAD, probabilities.shape[-1]), dim=-1)
    tokens = []
    for i, row in enumerate(rows):
        values, ids = head.values[i], head.indices[i]
        kept = None if _needs_all(row.params) else _kept(values, row.params, whole=False)
        if kept is None:
            values, ids = probabilities[i].sort(descending=True, stable=True)
            kept = _kept(values, row.params, whole=True)
        values, ids = values[:kept], ids[:kept]
        if _needs_all(row.params):
            values, ids = _exclude_top_choices(*_typical(values, ids, row.params), row)
        if row.params.temperature_last:
            values = (values.double() / values.max()) ** (1 / row.params.temperature)
        mass = values.cumsum(0, dtype=torch.float64)
        tokens.append(int(ids[torch.searchsorted(mass, row.uniform * mass[-1], right=True)]))
    return tokens


def _kept(values: Tensor, params: SamplingParams, *, whole: bool) -> int | None:
    """How many candidates stay, of probabilities in falling order; None where these are too few to tell."""
    size = len(values)
    kept = likely = size if whole else size + 1  # size + 1: more than these
    if params.min_p > 0:
        likely = int((values >= params.min_p * values[0]).sum())
        likely = likely if likely < size else kept
    if not params.min_p_last:
        kept = likely
    if params.top_k is not None:
        kept = min(kept, params.top_k)
    if params.top_p < 1:  # Holtzman et al. 2020: the smallest set whose mass reaches top_p, of what the others left
        if kept > size and (params.min_p > 0 or params.top_k is not None):
            return None
        inside = values[:kept].cumsum(0, dtype=torch.float64)
        total = inside[-1].item() if kept <= size else 1.0
        kept = min(kept, int(torch.searchsorted(inside, params.top_p * total)) + 1)
    kept = min(kept, likely)
    return kept if kept <= size else None


def _typical(values: Tensor, ids: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Meister et al. 2022: the tokens of the least unusual surprise, until their mass reaches typical_p.

    values: probabilities in falling order, as are those that are returned.
    """
    if params.typical_p >= 1:
        return values, ids
    possible = int((values > 0).sum())
    values, ids = values[:possible] / values.sum(), ids[:possible]
    surprise = -values.log()
    distance = (surprise - (values * surprise).sum()).abs()
    nearest, order = distance.sort(stable=True)
    reached = int((values[order].cumsum(0, dtype=torch.float64) < params.typical_p).sum())
    inside = distance <= nearest[min(reached, possible - 1)]
    return values[inside], ids[inside]


def _exclude_top_choices(values: Tensor, ids: Tensor, row: SamplingRow) -> tuple[Tensor, Tensor]:
    """llama.cpp's xtc: with xtc_probability, of the tokens that reach xtc_threshold only the least likely one stays."""
    params = row.params
    if row.coin >= params.xtc_probability or params.xtc_threshold > XTC_THRESHOLD_MAX:
        return values, ids
    reaching = (values > 0) & (values >= params.xtc_threshold * values.sum())
    first = max(0, int(reaching.sum()) - 1)
    return values[first:], ids[first:]
