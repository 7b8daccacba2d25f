"""From rows of logits to tokens and their scores. Every row is decided by itself, from its own numbers alone.

logits.py has the steps before temperature, picking.py those from there on. Log-probabilities are those of the raw
logits. Knows nothing of sequences, blocks or clocks.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from model.logits import adjust, nothing_left
from model.picking import pick
from model.sampling_row import SamplingRow
from model.scores import score
from model.step import TokenLogprobs


def sample(logits: Tensor, rows: list[SamplingRow]) -> tuple[list[int | None], list[TokenLogprobs | None]]:
    """logits: (len(rows), vocab) fp32, left as they were. Returns each row's token, and its scores where asked for.

    The token is None, and has no scores, where the row's own bans leave none to pick: see logits.py.
    """
    tokens = _pick(adjust(logits, rows), rows)
    scored = [i for i, row in enumerate(rows) if row.params.logprobs is not None and tokens[i] is not None]
    scores: list[TokenLogprobs | None] = [None] * len(rows)
    if scored:
        tops = [rows[i].params.logprobs or 0 for i in scored]
        picked = torch.tensor([tokens[i] for i in scored], device=logits.device)
        for i, found in zip(scored, token_logprobs(logits[scored], picked, tops), strict=True):
            asked = rows[i].params.logprob_token_ids
            scores[i] = replace(found, top=_scores_of(logits[i], asked)) if asked else found
    return tokens, scores


def _pick(adjusted: Tensor, rows: list[SamplingRow]) -> list[int | None]:
    empty = nothing_left(adjusted, rows)
    if not empty:
        return [*pick(adjusted, rows)]
    tokens: list[int | None] = [None] * len(rows)
    left = [i for i in range(len(rows)) if i not in empty]
    if left:
        for i, token in zip(left, pick(adjusted[left], [rows[i] for i in left]), strict=True):
            tokens[i] = token
    return tokens


def _scores_of(logits: Tensor, ids: tuple[int, ...]) -> list[tuple[int, float]]:
    """logits: (vocab,)."""
    return list(zip(ids, logits.log_softmax(-1)[list(ids)].tolist(), strict=True))


def token_logprobs(logits: Tensor, tokens: Tensor, tops: list[int]) -> list[TokenLogprobs]:
    """Raw log-softmax of each row's token and of its `tops[i]` most likely ones. logits: (rows, vocab)."""
    scored = score(logits, tokens, tops).rows()
    return [each for each in scored if each is not None]
