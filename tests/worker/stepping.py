"""A scheduler and a runner without a process around them: what the worker's loop does, one step at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from model.gpt2 import GPT2
from model.kv_cache import KVCache
from model.loading import load_model
from model.runner import Runner
from model.sampling_params import SamplingParams
from model.speculative import Drafter, DraftModel, PromptLookup
from model.step import TokenLogprobs
from server.worker.block_pool import BlockPool
from server.worker.messages import Add, FinishReason
from server.worker.scheduler import Scheduler
from server.worker.speculation import SpeculationController

CPU = torch.device("cpu")


def load(directory: Path, kernels: str = "auto", quantization: str | None = None) -> GPT2:
    return load_model(directory, CPU, torch.float32, kernels, quantization)[0]


@dataclass(frozen=True)
class Shape:
    """How a request is computed, which must not show in what it gets."""

    num_blocks: int = 256
    block_size: int = 16
    max_num_seqs: int = 64
    budget: int = 4096
    caching: bool = True
    method: str = "off"  # off, ngram, model
    drafts: int = 4
    kv_dtype: torch.dtype = torch.float32


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: FinishReason | None = None


class Eager(SpeculationController):
    """A length that never adapts, so that tests see as many guesses as there can be."""

    def length(self, acceptance: float, streams: int) -> int:
        return self._most


class Stepper:
    def __init__(self, network: GPT2, shape: Shape, max_model_len: int, draft: GPT2 | None = None) -> None:
        def cache(of: GPT2) -> KVCache:
            return KVCache(of.config, shape.num_blocks, shape.block_size, shape.kv_dtype, CPU)

        drafter: Drafter | None = None
        if shape.method == "model":
            assert draft is not None
            drafter = DraftModel(draft, cache(draft), CPU)
        elif shape.method == "ngram":
            drafter = PromptLookup()
        self.scheduler = Scheduler(
            BlockPool(shape.num_blocks, shape.block_size, enable_prefix_caching=shape.caching),
            max_num_seqs=shape.max_num_seqs,
            max_num_batched_tokens=shape.budget,
            max_model_len=max_model_len,
            eos_token_ids=network.config.eos_token_ids,
            speculation=None if drafter is None else Eager(shape.drafts, cost=0.0),
        )
        self._runner = Runner(network, cache(network), CPU, max_model_len, drafter=drafter)
        self.answers: dict[int, Answer] = {}
        self.steps = 0

    def add(self, prompt: list[int], params: SamplingParams, priority: int = 0) -> int:
        id_ = len(self.answers) + 1
        self.answers[id_] = Answer()
        self.scheduler.add(Add(id=id_, prompt=prompt, params=params, priority=priority))
        return id_

    def step(self) -> bool:
        plan = self.scheduler.schedule()
        if plan is None:
            return False
        self.steps += 1
        for said in self.scheduler.update(plan, self._runner.run(plan)):
            answer = self.answers[said.id]
            if said.token is not None:
                answer.tokens.append(said.token)
            if said.logprobs is not None:
                answer.logprobs.append(said.logprobs)
            if said.prompt_logprobs is not None:
                answer.prompt_logprobs += said.prompt_logprobs.rows
            answer.finish = said.finish
        return True

    def drain(self) -> list[Answer]:
        while self.step():
            pass
        self.scheduler.check()
        assert self.scheduler.idle
        assert self.scheduler.pool.num_used == 0
        return list(self.answers.values())
