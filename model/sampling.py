"""From rows of logits to tokens and their scores. Every row is decided by itself, from its own numbers alone.

logits.py has the steps before temperature, picking.py those from there on. Log-probabilities are those of the raw
logits. Knows nothing of sequences, blocks or clocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.logits import adjust
from model.picking import pick
from model.sampling_row import SamplingRow
from model.scores import score
from model.step import TokenLogprobs


def sample(logits: Tensor, rows: list[SamplingRow]) -> tuple[list[int], list[TokenLogprobs | None]]:
    """logits: (len(rows), vocab) fp32, left as they were. Returns each row's token, and its scores where asked for."""
    scored = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    tokens = pick(adjust(logits, rows), rows)
    scores: list[TokenLogprobs | None] = [None] * len(rows)
    if scored:
        tops = [rows[i].params.logprobs or 0 for i in scored]
        picked = torch.tensor([tokens[i] for i in scored], device=logits.device)
        for i, found in zip(scored, token_logprobs(logits[scored], picked, tops), strict=True):
            scores[i] = found
    return tokens, scores


def token_logprobs(logits: Tensor, tokens: Tensor, tops: list[int]) -> list[TokenLogprobs]:
    """Raw log-softmax of each row's token and of its `tops[i]` most likely ones. logits: (rows, vocab)."""
    scored = score(logits, tokens, tops).rows()
    return [each for each in scored if each is not None]
