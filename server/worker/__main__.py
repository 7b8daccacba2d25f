"""The worker process: one loop that takes messages, plans a step, runs it and says what came of it.

Started by the supervisor as `python -m server.worker FD`, with its end of the socketpair as FD. It ends when it is told
to, and when the other end is closed: it never outlives the api process.
"""

from __future__ import annotations

import signal
import socket
import sys
import time
from math import prod
from pathlib import Path

import torch

from model.config import read_config
from model.errors import ModelError
from model.gpt2 import GPT2
from model.grammar import Grammars, Vocabulary
from model.kv_cache import KVCache
from model.loading import choose_device, choose_dtype, load_model
from model.runner import Runner
from model.speculative import Drafter, DraftModel, PromptLookup
from model.tokenizer import read_tokenizer
from model.weights import expected_shapes
from server.worker.block_pool import BlockPool
from server.worker.budget import BudgetController
from server.worker.channel import WorkerChannel
from server.worker.memory import pool_size
from server.worker.messages import (
    Abort,
    Add,
    Failed,
    Ready,
    SequenceOutput,
    Shutdown,
    Start,
    Step,
    ToWorker,
)
from server.worker.scheduler import Scheduler
from server.worker.speculation import SpeculationController

EXIT_CONFIG = 78
PREFILL_LEAST = 16  # tokens of prompts that a step may take, however many streams run and however slow the machine is


class Worker:
    def __init__(
        self,
        channel: WorkerChannel,
        scheduler: Scheduler,
        runner: Runner,
        budget: BudgetController | None = None,
        speculation: SpeculationController | None = None,
    ) -> None:
        """The controllers learn from the time of each step what the scheduler may hand out in the next."""
        self._channel = channel
        self._scheduler = scheduler
        self._runner = runner
        self._budget = budget
        self._speculation = speculation
        self._stopping = False

    def loop(self) -> None:
        """Until Shutdown. Raises EOFError or ConnectionError when the api process is gone."""
        while not self._stopping:
            messages = self._channel.receive(wait=self._scheduler.idle)
            self.handle(messages)
            if not self._step() and messages:  # nothing to run, but the books may have changed
                self._report([], 0.0, 0)

    def handle(self, messages: list[ToWorker]) -> None:
        for message in messages:
            self._handle(message)

    def _handle(self, message: ToWorker) -> None:
        match message:
            case Add():
                self._scheduler.add(message)
            case Abort():
                for id_ in message.ids:
                    self._scheduler.abort(id_)
            case Shutdown():
                self._stopping = True
            case Start():
                raise AssertionError("a worker is started once")

    def _step(self) -> bool:
        plan = self._scheduler.schedule()
        if plan is None:
            return False
        began = time.perf_counter()
        result = self._runner.run(plan)
        outputs = self._scheduler.update(plan, result)
        seconds = time.perf_counter() - began
        rows = plan.tokens + sum(result.drafted.values())
        if self._speculation is not None:
            self._speculation.observe(rows, seconds)
        if self._budget is not None:
            least = self._scheduler.num_running + PREFILL_LEAST
            self._scheduler.token_budget = max(self._budget.observe(rows, seconds), least)
        self._report(outputs, seconds, rows)
        return True

    def _report(self, outputs: list[SequenceOutput], seconds: float, tokens: int) -> None:
        if self._scheduler.idle:
            self._scheduler.check()
        self._channel.send(Step(outputs, self._scheduler.stats(step_seconds=seconds, step_tokens=tokens)))


def build(start: Start, channel: WorkerChannel) -> Worker:
    """Loads the model and says Ready. Raises ModelError."""
    began = time.perf_counter()
    torch.set_num_threads(start.threads)
    device = choose_device(start.device)
    dtype = choose_dtype(start.dtype, device)
    grammars = Grammars(lambda: _vocabulary(Path(start.model)))
    network, ops = load_model(Path(start.model), device, dtype, kernels=start.kernels)
    draft = load_model(Path(start.draft_model), device, dtype, kernels=start.kernels)[0] if start.draft_model else None
    networks = [network] if draft is None else [network, draft]
    num_blocks = pool_size(
        kv_cache_bytes=start.kv_cache_bytes,
        bytes_per_token=sum(each.config.kv_bytes_per_token(dtype.itemsize) for each in networks),
        block_size=start.block_size,
        max_num_seqs=start.max_num_seqs,
        max_model_len=start.max_model_len,
    )
    budget = _budget(start)
    cache, *draft_cache = [KVCache(each.config, num_blocks, start.block_size, dtype, device) for each in networks]
    drafter: Drafter | None = None
    if start.drafts:
        drafter = PromptLookup() if draft is None else DraftModel(draft, draft_cache[0], device)
    speculation = _speculation(start.drafts, networks)
    scheduler = Scheduler(
        BlockPool(num_blocks, start.block_size, enable_prefix_caching=start.prefix_caching),
        max_num_seqs=start.max_num_seqs,
        max_num_batched_tokens=start.max_num_batched_tokens if budget is None else budget.budget,
        max_model_len=start.max_model_len,
        eos_token_id=network.config.eos_token_id,
        speculation=speculation,
    )
    channel.send(
        Ready(
            backend=f"{device}, {ops.describe()}",
            block_size=start.block_size,
            num_blocks=num_blocks,
            load_seconds=time.perf_counter() - began,
        )
    )
    runner = Runner(network, cache, device, start.max_model_len, drafter=drafter, grammars=grammars)
    return Worker(channel, scheduler, runner, budget, speculation)


def _speculation(drafts: int, networks: list[GPT2]) -> SpeculationController | None:
    """A drafter's step costs what it reads: its weights, next to the network's."""
    weights = [sum(map(prod, expected_shapes(each.config).values())) for each in networks]
    return SpeculationController(drafts, cost=sum(weights[1:]) / weights[0]) if drafts else None


def _budget(start: Start) -> BudgetController | None:
    if start.target_itl is None:
        return None
    return BudgetController(start.target_itl, smallest=PREFILL_LEAST, largest=start.max_num_batched_tokens)


def _vocabulary(directory: Path) -> Vocabulary:
    config = read_config(directory)
    return Vocabulary(read_tokenizer(directory, config.vocab_size, config.eos_token_id))


def serve(channel: WorkerChannel) -> int:
    """Returns the exit status."""
    try:
        start, *rest = channel.receive(wait=True)
        assert isinstance(start, Start)
        worker = build(start, channel)
        worker.handle(rest)
        worker.loop()
    except ModelError as error:
        channel.send(Failed(str(error), EXIT_CONFIG))
        return EXIT_CONFIG
    except (EOFError, ConnectionError):  # the api process is gone; nobody is left to tell
        return 0
    return 0


def main() -> int:
    # Ctrl-C reaches the whole process group; when to stop is for the api process to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return serve(WorkerChannel(socket.socket(fileno=int(sys.argv[1]))))


if __name__ == "__main__":
    sys.exit(main())
