"""From rows of logits to tokens and their scores. Every row is decided by itself, from its own numbers alone.

logits.py has the steps before temperature, picking.py those from there on. Log-probabilities are those of the raw
logits. Knows nothing of sequences, blocks or clocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from model.logits import adjust, nothing_left
from model.picking import pick
from model.sampling_row import SamplingRow
from model.scores import Scores, score
from model.step import TokenLogprobs

Choose = Callable[[Tensor, list[SamplingRow]], list[int | None]]
Score = Callable[[Tensor, Tensor, list[int]], Scores]


def choose(logits: Tensor, rows: list[SamplingRow]) -> list[int | None]:
    """Each row's token; None where the row's own bans leave none: see logits.py. logits: (len(rows), vocab) fp32."""
    adjusted = adjust(logits, rows)
    empty = nothing_left(adjusted, rows)
    return [None if i in empty else pick(adjusted[i], row) for i, row in enumerate(rows)]


def sample(
    logits: Tensor, rows: list[SamplingRow], choose: Choose = choose, score: Score = score
) -> tuple[list[int | None], list[TokenLogprobs | None]]:
    """logits: (len(rows), vocab) fp32, left as they were. Returns each row's token, and its scores where asked for.

    choose, score: other ways to compute what the functions of that name compute.
    """
    tokens = choose(logits, rows)
    scored = [i for i, row in enumerate(rows) if row.params.logprobs is not None and tokens[i] is not None]
    scores: list[TokenLogprobs | None] = [None] * len(rows)
    if scored:
        own = logits if len(scored) == len(rows) else logits[scored]
        picked = torch.tensor([tokens[i] for i in scored], device=logits.device)
        found = score(own, picked, [rows[i].params.logprobs or 0 for i in scored]).rows()
        for i, each in zip(scored, found, strict=True):
            scores[i] = _asked(logits[i], tokens[i], each, rows[i].params.logprob_token_ids)
    return tokens, scores


def _asked(
    logits: Tensor, token: int | None, scores: TokenLogprobs | None, ids: tuple[int, ...]
) -> TokenLogprobs | None:
    """The scores, with those of `ids` in place of the most likely tokens', if there are any. logits: (vocab,)."""
    if not ids or scores is None or token is None:
        return scores
    total = logits[token] - scores.logprob  # the log of the sum of all exponentials
    return replace(scores, top=list(zip(ids, (logits[list(ids)] - total).tolist(), strict=True)))


def token_logprobs(logits: Tensor, tokens: Tensor, tops: list[int]) -> list[TokenLogprobs]:
    """Raw log-softmax of each row's token and of its `tops[i]` most likely ones. logits: (rows, vocab)."""
    scored = score(logits, tokens, tops).rows()
    return [each for each in scored if each is not None]
