"""Turns a StepPlan into tensors, runs the network, samples, and returns a StepResult.

Keeps one row of state for each sequence the plan has added and not yet removed. Knows nothing of waiting requests,
priorities, or which blocks are free.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.batch import Batch
from model.gpt2 import GPT2
from model.kv_cache import KVCache
from model.rng import uniforms
from model.sampling import SamplingRow, sample, token_logprobs
from model.sampling_params import SamplingParams
from model.step import NewSequence, PromptLogprobs, SampledToken, ScheduledChunk, StepPlan, StepResult, TokenLogprobs

UNIFORMS_AHEAD = 64
SCORED_ROWS = 64  # prompt scoring holds this many rows of logits at once, not prompt x vocabulary


class RunnerRow:
    """One sequence's tokens, block table and random numbers."""

    __slots__ = ("_uniforms", "_uniforms_from", "blocks", "length", "params", "prompt_length", "tokens")

    def __init__(self, new: NewSequence, context: int, max_blocks: int) -> None:
        known = [*new.prompt, *new.output]
        self.tokens: npt.NDArray[np.int64] = np.zeros(context, dtype=np.int64)
        self.tokens[: len(known)] = known
        self.length = len(known)
        self.prompt_length = len(new.prompt)
        self.params: SamplingParams = new.params
        self.blocks: npt.NDArray[np.int32] = np.zeros(max_blocks, dtype=np.int32)
        self._uniforms: npt.NDArray[np.float64] = np.zeros(0)
        self._uniforms_from = 0

    def uniform(self) -> float:
        """The number that picks the token at position `length`."""
        ahead = self.length - self._uniforms_from
        if not 0 <= ahead < len(self._uniforms):
            self._uniforms = uniforms(self.params.seed, self.params.choice, self.length, UNIFORMS_AHEAD)
            self._uniforms_from, ahead = self.length, 0
        return float(self._uniforms[ahead])

    def append(self, token: int) -> None:
        if self.length < len(self.tokens):  # the last token of a full context is never fed back
            self.tokens[self.length] = token
        self.length += 1


class Runner:
    def __init__(self, model: GPT2, cache: KVCache, device: torch.device, max_model_len: int) -> None:
        self._model = model
        self._cache = cache
        self._device = device
        self._context = max_model_len
        self._max_blocks = -(-max_model_len // cache.block_size)
        self._rows: dict[int, RunnerRow] = {}

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        self.forget(plan.removed)
        for new in plan.added:
            self._rows[new.id] = RunnerRow(new, self._context, self._max_blocks)
        hidden = self._model.forward(self._batch(plan.chunks), self._cache)
        scored = self._score_prompts(plan.chunks, hidden)
        return StepResult(sampled=self._sample(plan.chunks, hidden), prompt_logprobs=scored)

    def forget(self, ids: list[int]) -> None:
        for id_ in ids:
            del self._rows[id_]

    def _batch(self, chunks: list[ScheduledChunk]) -> Batch:
        rows = [self._rows[chunk.id] for chunk in chunks]
        block_size = self._cache.block_size
        total = sum(chunk.count for chunk in chunks)
        tokens = np.empty(total, dtype=np.int64)
        positions = np.empty(total, dtype=np.int64)
        slots = np.empty(total, dtype=np.int64)
        starts = np.zeros(len(chunks) + 1, dtype=np.int32)
        width = max(-(-(chunk.start + chunk.count) // block_size) for chunk in chunks)
        tables = np.empty((len(chunks), width), dtype=np.int32)
        at = 0
        for i, (chunk, row) in enumerate(zip(chunks, rows, strict=True)):
            row.blocks[chunk.first_block : chunk.first_block + len(chunk.blocks)] = chunk.blocks
            end, stop = at + chunk.count, chunk.start + chunk.count
            tokens[at:end] = row.tokens[chunk.start : stop]
            where = np.arange(chunk.start, stop)
            positions[at:end] = where
            slots[at:end] = row.blocks[where // block_size].astype(np.int64) * block_size + where % block_size
            tables[i] = row.blocks[:width]
            starts[i + 1] = at = end
        return Batch(
            tokens=self._to_device(tokens),
            positions=self._to_device(positions),
            slots=self._to_device(slots),
            query_starts=self._to_device(starts),
            block_tables=self._to_device(tables),
            spans=tuple((chunk.count, chunk.start + chunk.count) for chunk in chunks),
        )

    def _sample(self, chunks: list[ScheduledChunk], hidden: Tensor) -> list[SampledToken]:
        last = np.cumsum([chunk.count for chunk in chunks]) - 1
        wanted = [i for i, chunk in enumerate(chunks) if chunk.samples]
        if not wanted:
            return []
        logits = self._model.logits(hidden[self._to_device(last[wanted])])
        rows = [self._rows[chunks[i].id] for i in wanted]
        tokens, scores = sample(logits, [self._sampling_row(row) for row in rows])
        for row, token in zip(rows, tokens, strict=True):
            row.append(token)
        ids = [chunks[i].id for i in wanted]
        return [SampledToken(*each) for each in zip(ids, tokens, scores, strict=True)]

    def _sampling_row(self, row: RunnerRow) -> SamplingRow:
        return SamplingRow(
            params=row.params,
            uniform=0.0 if row.params.greedy else row.uniform(),
            eos_token_id=self._model.config.eos_token_id,
            prompt=self._to_device(row.tokens[: row.prompt_length]),
            output=self._to_device(row.tokens[row.prompt_length : row.length]),
        )

    def _score_prompts(self, chunks: list[ScheduledChunk], hidden: Tensor) -> list[PromptLogprobs]:
        scored = []
        at = 0
        for chunk in chunks:
            row = self._rows[chunk.id]
            # The hidden state at position p scores the prompt's token at p + 1.
            stop = min(chunk.start + chunk.count, row.prompt_length - 1)
            if row.params.prompt_logprobs is not None and chunk.start < stop:
                mine = hidden[at : at + stop - chunk.start]
                targets = self._to_device(row.tokens[chunk.start + 1 : stop + 1])
                scores = self._score(mine, targets, row.params.prompt_logprobs)
                scored.append(PromptLogprobs(chunk.id, chunk.start + 1, scores))
            at += chunk.count
        return scored

    def _score(self, hidden: Tensor, targets: Tensor, top: int) -> list[TokenLogprobs]:
        """hidden: (rows, n_embd), targets: (rows,)."""
        scores: list[TokenLogprobs] = []
        for part, ids in zip(hidden.split(SCORED_ROWS), targets.split(SCORED_ROWS), strict=True):
            scores += token_logprobs(self._model.logits(part), ids, [top] * len(ids))
        return scores

    def _to_device(self, array: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self._device)
