"""Drives the network and the runner by hand, without a scheduler: blocks in a scrambled order, chunks of any size."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.batch import Batch
from model.gpt2 import GPT2
from model.kv_cache import KVCache
from model.loading import load_model
from model.runner import Runner
from model.sampling_params import SamplingParams
from model.step import NewSequence, SampledToken, ScheduledChunk, StepPlan, StepResult

CPU = torch.device("cpu")
BLOCK_SIZE = 16


class Tables:
    """A block table for every sequence, grown as it is asked for."""

    def __init__(self, num_blocks: int) -> None:
        self.free = list(range(num_blocks))
        random.Random(1).shuffle(self.free)
        self.of: dict[int, list[int]] = {}

    def grow(self, id_: int, tokens: int) -> tuple[int, list[int]]:
        """The index of the first new block, and the new blocks."""
        table = self.of.setdefault(id_, [])
        first = len(table)
        while len(table) * BLOCK_SIZE < tokens:
            table.append(self.free.pop())
        return first, table[first:]


class Network:
    """The network alone: logits at every position, in whatever pieces."""

    def __init__(self, directory: Path, num_blocks: int = 256) -> None:
        self.model: GPT2 = load_model(directory, CPU, torch.float32)[0]
        self.cache = KVCache(self.model.config, num_blocks, BLOCK_SIZE, torch.float32, CPU)
        self.tables = Tables(num_blocks)

    @torch.inference_mode()
    def logits(self, pieces: list[tuple[int, list[int], int]]) -> Tensor:
        """One step. pieces: (sequence, tokens, position of the first). Returns (all tokens, vocab)."""
        for id_, tokens, start in pieces:
            self.tables.grow(id_, start + len(tokens))
        where = [(id_, p) for id_, tokens, start in pieces for p in range(start, start + len(tokens))]
        slots = [self.tables.of[id_][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for id_, p in where]
        width = max(len(table) for table in self.tables.of.values())
        tables = [self.tables.of[id_] + [0] * (width - len(self.tables.of[id_])) for id_, _, _ in pieces]
        counts = [len(tokens) for _, tokens, _ in pieces]
        batch = Batch(
            tokens=torch.tensor([token for _, tokens, _ in pieces for token in tokens]),
            positions=torch.tensor([p for _, p in where]),
            slots=torch.tensor(slots),
            query_starts=torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32),
            contexts=torch.tensor([start + len(tokens) for _, tokens, start in pieces], dtype=torch.int32),
            block_tables=torch.tensor(tables, dtype=torch.int32),
            spans=tuple((len(tokens), start + len(tokens)) for _, tokens, start in pieces),
        )
        return self.model.logits(self.model.forward(batch, self.cache)).clone()


class Generator:
    """The runner, fed plans: every sequence computed up to its last token, then one token a step."""

    def __init__(self, directory: Path, num_blocks: int = 256) -> None:
        self.model: GPT2 = load_model(directory, CPU, torch.float32)[0]
        config = self.model.config
        self.runner = Runner(
            self.model,
            KVCache(config, num_blocks, BLOCK_SIZE, torch.float32, CPU),
            CPU,
            config.n_positions,
        )
        self.num_blocks = num_blocks

    def generate(self, prompts: list[list[int]], params: list[SamplingParams], chunk: int) -> list[list[SampledToken]]:
        """All in one batch, prompts in chunks of `chunk` tokens, each to its max_tokens."""
        tables = Tables(self.num_blocks)
        outputs: list[list[SampledToken]] = [[] for _ in prompts]
        computed = [0] * len(prompts)
        added = [NewSequence(i, prompt, [], each) for i, (prompt, each) in enumerate(zip(prompts, params, strict=True))]
        removed: list[int] = []
        while True:
            live = [i for i in range(len(prompts)) if len(outputs[i]) < params[i].max_tokens]
            removed = [i for i in range(len(prompts)) if i not in live and i in tables.of]
            if not live:
                break
            chunks = []
            for i in live:
                total = len(prompts[i]) + len(outputs[i])
                count = min(chunk, total - computed[i])
                first, blocks = tables.grow(i, computed[i] + count)
                chunks.append(ScheduledChunk(i, computed[i], count, first, blocks, computed[i] + count == total))
                computed[i] += count
            for i in removed:
                del tables.of[i]
            for sampled in self.runner.run(StepPlan(removed, added, chunks)).sampled:
                outputs[sampled.id].append(sampled)
            added = []
        self._forget(removed)
        return outputs

    def score(self, prompt: list[int], chunk: int, top: int) -> StepResult:
        """The prompt's own log-probabilities."""
        tables, results = Tables(self.num_blocks), []
        added = [NewSequence(0, prompt, [], greedy(0, prompt_logprobs=top))]
        for start in range(0, len(prompt), chunk):
            count = min(chunk, len(prompt) - start)
            first, blocks = tables.grow(0, start + count)
            results.append(
                self.runner.run(StepPlan([], added, [ScheduledChunk(0, start, count, first, blocks, False)]))
            )
            added = []
        self._forget([0])
        return StepResult(prompt_logprobs=[each for result in results for each in result.prompt_logprobs])

    def _forget(self, ids: list[int]) -> None:
        self.runner.forget(ids)


def greedy(max_tokens: int, **changes: Any) -> SamplingParams:
    return SamplingParams(**{"seed": 0, "temperature": 0.0, "max_tokens": max_tokens, **changes})
