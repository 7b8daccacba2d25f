"""From a row of logits to a token. Every row is decided by itself, from its own numbers alone.

Order of the steps, as in vLLM: allowed tokens, biases, bans before min_tokens, penalties, temperature, min_p, top_k,
top_p. Log-probabilities are those of the raw logits. Knows nothing of sequences, blocks or clocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.sampling_params import SamplingParams
from model.step import TokenLogprobs

BAN = -100.0  # a logit_bias this low bans the token outright, as OpenAI documents
HEAD = 256  # candidates that decide most top_k and top_p rows; the rest need a whole sort


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What one row of logits is decided by, beside the logits."""

    params: SamplingParams
    uniform: float  # in [0, 1)
    eos_token_id: int
    prompt: Tensor  # (n,) int64, on the logits' device; read for repetition_penalty alone
    output: Tensor  # (m,) int64, the tokens generated so far


def sample(logits: Tensor, rows: list[SamplingRow]) -> tuple[list[int], list[TokenLogprobs | None]]:
    """logits: (len(rows), vocab) fp32, left as they were. Returns each row's token, and its scores where asked for."""
    scored = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    adjusted = _adjust(logits, rows)
    tokens = _pick(adjusted, rows)
    scores: list[TokenLogprobs | None] = [None] * len(rows)
    if scored:
        tops = [rows[i].params.logprobs or 0 for i in scored]
        picked = torch.tensor([tokens[i] for i in scored], device=logits.device)
        for i, score in zip(scored, token_logprobs(logits[scored], picked, tops), strict=True):
            scores[i] = score
    return tokens, scores


def token_logprobs(logits: Tensor, tokens: Tensor, tops: list[int]) -> list[TokenLogprobs]:
    """Raw log-softmax of each row's token and of its `tops[i]` most likely ones. logits: (rows, vocab)."""
    scores = torch.log_softmax(logits, dim=-1)
    own = scores.gather(1, tokens[:, None])[:, 0].tolist()
    most = max(tops)
    if most == 0:
        return [TokenLogprobs(value, []) for value in own]
    values, ids = scores.topk(most, dim=-1)  # falling order
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return [
        TokenLogprobs(value, list(zip(row_ids[:top], row_values[:top], strict=True)))
        for value, top, (row_ids, row_values) in zip(own, tops, pairs, strict=True)
    ]


# === Adjusting ===


def _adjust(logits: Tensor, rows: list[SamplingRow]) -> Tensor:
    """The logits after every step that comes before temperature; a copy if any row asked for one."""
    changed = [i for i, row in enumerate(rows) if _changes(row)]
    if not changed:
        return logits
    logits = logits.clone()
    for i in changed:
        _adjust_row(logits[i], rows[i])
    return logits


def _changes(row: SamplingRow) -> bool:
    params = row.params
    return (
        bool(params.logit_bias)
        or params.allowed_token_ids is not None
        or params.presence_penalty != 0
        or params.frequency_penalty != 0
        or params.repetition_penalty != 1
        or row.output.numel() < params.min_tokens
    )


def _adjust_row(logits: Tensor, row: SamplingRow) -> None:
    """In place. logits: (vocab,)."""
    params = row.params
    if params.allowed_token_ids is not None:
        allowed = torch.tensor(params.allowed_token_ids, device=logits.device)
        kept = logits[allowed]
        logits.fill_(-torch.inf)
        logits[allowed] = kept
    if params.logit_bias:
        ids = torch.tensor([id_ for id_, _ in params.logit_bias], device=logits.device)
        biases = torch.tensor([-torch.inf if bias <= BAN else bias for _, bias in params.logit_bias])
        logits[ids] += biases.to(logits.device)
    if row.output.numel() < params.min_tokens:
        logits[[row.eos_token_id, *params.stop_token_ids]] = -torch.inf
    if params.repetition_penalty != 1:  # Keskar et al. 2019 (CTRL), as transformers and vLLM apply it
        seen = torch.unique(torch.cat((row.prompt, row.output)))
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if (params.presence_penalty or params.frequency_penalty) and row.output.numel():
        seen, counts = torch.unique(row.output, return_counts=True)
        logits[seen] -= counts * params.frequency_penalty + params.presence_penalty


# === Picking ===


def _pick(logits: Tensor, rows: list[SamplingRow]) -> list[int]:
    greedy = [i for i, row in enumerate(rows) if row.params.greedy]
    whole = [i for i, row in enumerate(rows) if not row.params.greedy and not _filters(row.params)]
    cut = [i for i, row in enumerate(rows) if not row.params.greedy and _filters(row.params)]
    tokens = [0] * len(rows)
    for indices, pick in ((greedy, _pick_greedy), (whole, _pick_whole), (cut, _pick_cut)):
        if indices:
            chosen = logits if len(indices) == len(rows) else logits[indices]
            for i, token in zip(indices, pick(chosen, [rows[i] for i in indices]), strict=True):
                tokens[i] = token
    return tokens


def _filters(params: SamplingParams) -> bool:
    return params.top_p < 1 or params.top_k is not None or params.min_p > 0


def _pick_greedy(logits: Tensor, rows: list[SamplingRow]) -> list[int]:
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    return tokens


def _pick_whole(logits: Tensor, rows: list[SamplingRow]) -> list[int]:
    """Inverse of the cumulative distribution over the vocabulary, in token order."""
    mass = _temper(logits, rows).softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    threshold = torch.tensor([row.uniform for row in rows], dtype=torch.float64, device=logits.device)
    found = torch.searchsorted(mass, (threshold * mass[:, -1])[:, None], right=True)
    tokens: list[int] = found[:, 0].tolist()
    return tokens


def _temper(logits: Tensor, rows: list[SamplingRow]) -> Tensor:
    temperatures = torch.tensor([row.params.temperature for row in rows], device=logits.device)
    return logits / temperatures[:, None]


def _pick_cut(logits: Tensor, rows: list[SamplingRow]) -> list[int]:
    """top_k, top_p and min_p: the most likely candidates first; a whole sort only for a row that needs more of them."""
    probabilities = _temper(logits, rows).softmax(dim=-1)
    head = probabilities.topk(min(HEAD, probabilities.shape[-1]), dim=-1)
    tokens = []
    for i, row in enumerate(rows):
        values, ids = head.values[i], head.indices[i]
        kept = _kept(values, row.params, whole=False)
        if kept is None:
            values, ids = probabilities[i].sort(descending=True, stable=True)
            kept = _kept(values, row.params, whole=True)
        mass = values[:kept].cumsum(0, dtype=torch.float64)
        tokens.append(int(ids[torch.searchsorted(mass, row.uniform * mass[-1], right=True)]))
    return tokens


def _kept(values: Tensor, params: SamplingParams, *, whole: bool) -> int | None:
    """How many candidates stay, of probabilities in falling order; None where these are too few to tell."""
    size = len(values)
    kept = size if whole else size + 1  # size + 1: more than these
    if params.min_p > 0:
        likely = int((values >= params.min_p * values[0]).sum())
        kept = likely if likely < size else kept
    if params.top_k is not None:
        kept = min(kept, params.top_k)
    if params.top_p < 1:  # Holtzman et al. 2020: the smallest set whose mass reaches top_p, of what the others left
        if kept > size and (params.min_p > 0 or params.top_k is not None):
            return None
        inside = values[:kept].cumsum(0, dtype=torch.float64)
        total = inside[-1].item() if kept <= size else 1.0
        kept = min(kept, int(torch.searchsorted(inside, params.top_p * total)) + 1)
    return kept if kept <= size else None
