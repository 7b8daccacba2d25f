"""The steps between raw logits and temperature. Each row by itself, from its own numbers alone.

In this order: allowed tokens, biases, what min_tokens and bad_words ban (all as in vLLM), repetition, presence and
frequency penalties, DRY, and last the grammar, which nothing overrules: where the bans leave none of the tokens it
allows, they and the penalties are void for this row and the grammar alone decides.

A row without a grammar in which no token is left stays so: it is -inf throughout, `nothing_left` names it, and `sample`
returns None for its token. A token that is forbidden is never sampled.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.dry import dry_penalties
from model.request_tables import unpack
from model.sampling_params import BAN
from model.sampling_row import SamplingRow


def adjust(logits: Tensor, rows: list[SamplingRow]) -> Tensor:
    """logits: (len(rows), vocab) fp32, left as they were. Returns them, or a copy where any row changes something.

    A row in which no token is left is -inf throughout.
    """
    changed = [i for i, row in enumerate(rows) if _changes(row)]
    if not changed:
        return logits
    adjusted = logits.clone()
    for i in changed:
        _adjust_row(adjusted[i], rows[i])
        if rows[i].grammar is not None and adjusted[i].max() == -torch.inf:
            adjusted[i] = logits[i]
            _mask(adjusted[i], rows[i])
    return adjusted


def nothing_left(adjusted: Tensor, rows: list[SamplingRow]) -> set[int]:
    """The rows in which no token is left. adjusted: (len(rows), vocab), as `adjust` returned them."""
    return {i for i, row in enumerate(rows) if _bans(row) and adjusted[i].max() == -torch.inf}


def _bans(row: SamplingRow) -> bool:
    """Whether it can have no token left."""
    params = row.params
    banned = params.allowed_token_ids is not None or params.bad_words or len(row.output) < params.min_tokens
    return bool(banned) or any(bias <= BAN for _, bias in params.logit_bias)


def _changes(row: SamplingRow) -> bool:
    params = row.params
    return (
        bool(params.logit_bias)
        or params.allowed_token_ids is not None
        or bool(params.bad_words)
        or params.presence_penalty != 0
        or params.frequency_penalty != 0
        or params.repetition_penalty != 1
        or params.dry is not None
        or row.grammar is not None
        or len(row.output) < params.min_tokens
    )


def _adjust_row(logits: Tensor, row: SamplingRow) -> None:
    """In place. logits: (vocab,)."""
    _allow_and_bias(logits, row)
    _ban(logits, row)
    _penalise(logits, row)
    _mask(logits, row)


def _allow_and_bias(logits: Tensor, row: SamplingRow) -> None:
    tables = row.tables
    allowed = tables.allowed_bits()
    if allowed is not None:
        _forbid(logits, allowed)
    if tables.bias_ids is not None and tables.bias_values is not None:
        logits[_place(tables.bias_ids, logits)] += torch.from_numpy(tables.bias_values).to(logits.device)


def _ban(logits: Tensor, row: SamplingRow) -> None:
    tables = row.tables
    if tables.ends is not None and len(row.output) < row.params.min_tokens:
        logits.index_fill_(0, _place(tables.ends, logits), -torch.inf)
    if tables.bad_ids is not None:
        logits.index_fill_(0, _place(tables.bad_ids, logits), -torch.inf)
    if tables.bad_runs and len(row.output):
        runs = tables.bad_runs.get(int(row.output[-1]), ())
        logits[[run[-1] for run in runs if tuple(row.output[1 - len(run) :].tolist()) == run[:-1]]] = -torch.inf


def _place(ids: npt.NDArray[np.integer[Any]], logits: Tensor) -> Tensor:
    return torch.from_numpy(ids).to(logits.device).long()


def _penalise(logits: Tensor, row: SamplingRow) -> None:
    params = row.params
    last = params.repetition_penalty_range or 0  # text-generation-webui's window; [-0:] is all of them
    output = row.output[-last:]
    if params.repetition_penalty != 1:  # Keskar et al. 2019 (CTRL), as transformers and vLLM apply it
        seen = torch.from_numpy(np.unique(row.known[-last:])).to(logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if (params.presence_penalty or params.frequency_penalty) and len(output):
        seen, counts = (_place(each, logits) for each in np.unique(output, return_counts=True))
        logits[seen] -= counts * params.frequency_penalty + params.presence_penalty
    if params.dry is not None and row.tables.breakers is not None:
        penalties = dry_penalties(row.known.tolist(), params.dry, row.tables.breakers.tokens_since)
        if penalties:
            ids = torch.tensor(list(penalties), device=logits.device)
            logits[ids] -= torch.tensor(list(penalties.values()), dtype=logits.dtype, device=logits.device)


def _mask(logits: Tensor, row: SamplingRow) -> None:
    if row.grammar is not None:
        _forbid(logits, unpack(row.grammar, len(logits)))


def _forbid(logits: Tensor, allowed: npt.NDArray[np.bool_]) -> None:
    """In place, all that is not allowed."""
    logits.masked_fill_(~torch.from_numpy(allowed).to(logits.device), -torch.inf)
