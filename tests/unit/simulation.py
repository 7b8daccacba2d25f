"""A scheduler driven against a network of one line, with every promise checked after every operation.

The network's keys and values are fingerprints of all tokens up to a position. A chunk that attends to a block which
holds anything but its own sequence's past, under its own salt, is caught in the act.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from random import Random

from model.sampling_params import SamplingParams
from model.step import (
    NewSequence,
    PromptLogprobs,
    SampledToken,
    ScheduledChunk,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from server.worker.block_pool import BlockPool
from server.worker.messages import BACKGROUND, Add, FinishReason, SequenceOutput
from server.worker.scheduler import Scheduler
from server.worker.speculation import SpeculationController
from server.worker.turns import PREEMPTIONS_BEFORE_RESERVE

EOS = 0
VOCABULARY = 12
MODULUS = (1 << 61) - 1


def fingerprint(before: int, token: int) -> int:
    return (before * 1_000_003 + token + 1) % MODULUS


def next_token(context: int, params: SamplingParams, choice: int) -> int:
    """The network and its sampler: what follows tokens whose fingerprint is `context`."""
    return fingerprint(context, params.seed * 131 + choice) % 10_007 % VOCABULARY


@dataclass
class Row:
    tokens: list[int]
    prompt_length: int
    params: SamplingParams
    choice: int
    past: list[int]  # past[p]: the fingerprint of tokens[:p], the salt before them
    blocks: list[int] = field(default_factory=list)

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self.past.append(fingerprint(self.past[-1], token))


class FakeRunner:
    """Follows the contract of model.step to the letter, and insists that the scheduler does."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.guessing = Random(1)
        self.cache = [[-1] * block_size for _ in range(num_blocks)]
        self.rows: dict[int, Row] = {}
        self.salts: dict[int, bytes] = {}  # a real runner does not know them

    def run(self, plan: StepPlan) -> StepResult:
        for id_ in plan.removed:
            del self.rows[id_]
        for new in plan.added:
            assert new.id not in self.rows
            self.rows[new.id] = self._row(new)
        for source, target in (chunk.copied for chunk in plan.chunks if chunk.copied is not None):
            self.cache[target] = list(self.cache[source])
        sampled: list[SampledToken] = []
        scored: list[PromptLogprobs] = []
        drafted: dict[int, int] = {}
        for chunk in plan.chunks:
            row = self.rows[chunk.id]
            assert 0 <= chunk.first_block <= len(row.blocks)
            row.blocks[chunk.first_block :] = chunk.blocks
            self._compute(chunk, row)
            stop = min(chunk.start + chunk.count, row.prompt_length - 1)
            if row.params.prompt_logprobs is not None and chunk.start < stop:
                rows = [TokenLogprobs(float(row.past[p]), []) for p in range(chunk.start + 1, stop + 1)]
                scored.append(PromptLogprobs(chunk.id, chunk.start + 1, rows))
            if chunk.samples:
                assert chunk.start + chunk.count == len(row.tokens)
                drafted[chunk.id] = self._guess(chunk, row)
                right = 0 if drafted[chunk.id] == 0 else self.guessing.randint(0, drafted[chunk.id])
                for _ in range(1 + right):
                    token = next_token(row.past[-1], row.params, row.choice)
                    row.append(token)
                    sampled.append(SampledToken(chunk.id, token))
                self._keep(row, right)
        return StepResult(sampled=sampled, prompt_logprobs=scored, drafted=drafted)

    def _guess(self, chunk: ScheduledChunk, row: Row) -> int:
        """As many guesses as it pleases, at most those allowed; all wrong until `_keep` says otherwise."""
        count = self.guessing.randint(0, chunk.drafts) if chunk.drafts else 0
        for position in range(len(row.tokens), len(row.tokens) + count):
            self.cache[row.blocks[position // self.block_size]][position % self.block_size] = -2
        return count

    def _keep(self, row: Row, right: int) -> None:
        """The guesses that were right have been computed; the very last token has not."""
        for position in range(len(row.tokens) - 1 - right, len(row.tokens) - 1):
            self.cache[row.blocks[position // self.block_size]][position % self.block_size] = row.past[position + 1]

    def _row(self, new: NewSequence) -> Row:
        row = Row([], len(new.prompt), new.params, new.choice, [int.from_bytes(self.salts[new.id], "big") + 7])
        for token in [*new.prompt, *new.output]:
            row.append(token)
        return row

    def _compute(self, chunk: ScheduledChunk, row: Row) -> None:
        size, end = self.block_size, chunk.start + chunk.count
        assert 0 <= chunk.start < end <= len(row.tokens)
        for position in range(chunk.start, end):
            self.cache[row.blocks[position // size]][position % size] = row.past[position + 1]
        for i in range(-(-end // size)):
            expected = row.past[i * size + 1 : min((i + 1) * size, end) + 1]
            assert self.cache[row.blocks[i]][: len(expected)] == expected, "a chunk attends to what is not its own past"


def alone(message: Add, max_model_len: int) -> tuple[list[int], FinishReason]:
    """The oracle: what a sequence generates with nobody else about, and how it ends."""
    params = message.params
    context = int.from_bytes(message.salt, "big") + 7
    for token in message.prompt:
        context = fingerprint(context, token)
    output: list[int] = []
    while True:
        if len(output) == params.max_tokens or len(message.prompt) + len(output) == max_model_len:
            return output, FinishReason.LENGTH
        output.append(next_token(context, params, message.choice))
        context = fingerprint(context, output[-1])
        if len(output) > params.min_tokens and (
            output[-1] in params.stop_token_ids or (output[-1] == EOS and not params.ignore_eos)
        ):
            return output, FinishReason.STOP


class Eager(SpeculationController):
    """A length that never adapts, so that tests see as many guesses as there can be."""

    def length(self, acceptance: float, streams: int) -> int:
        return self._most


@dataclass
class Client:
    """What the other end knows of a sequence, and what it has received."""

    message: Add
    order: tuple[int, int]  # arrival step + priority * ageing, then arrival
    output: list[int]
    scores: list[TokenLogprobs] = field(default_factory=list)
    admissions: int = 0
    told_cached: list[int] = field(default_factory=list)
    finish: FinishReason | None = None


class Simulation:
    """The worker's loop in slow motion. `depth` is how many plans may be out before the first one's result is taken."""

    def __init__(
        self,
        *,
        num_blocks: int = 32,
        block_size: int = 4,
        max_num_seqs: int = 8,
        budget: int = 16,
        max_model_len: int = 32,
        ageing_steps: int = 8,
        caching: bool = True,
        depth: int = 1,
        speculation: SpeculationController | None = None,
        owners: Collection[str] = ("",),
    ) -> None:
        self.owners = tuple(owners)
        self.pool = BlockPool(num_blocks, block_size, enable_prefix_caching=caching)
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=max_model_len,
            eos_token_ids=(EOS,),
            ageing_steps=ageing_steps,
            speculation=speculation,
        )
        self.runner = FakeRunner(num_blocks, block_size)
        self.depth = depth
        self.live: dict[int, Client] = {}
        self.ended: list[Client] = []
        self.in_flight: deque[tuple[StepPlan, StepResult]] = deque()
        self.running: set[int] = set()  # as the plans tell it
        self.steps = 0
        self.operations = 0
        self._ids = 0

    def add(self, prompt: list[int], params: SamplingParams | None = None, **fields: object) -> int:
        """Queue a sequence; `fields` are those of Add."""
        self._ids += 1
        params = params or SamplingParams(seed=self._ids, max_tokens=8, ignore_eos=True)
        message = Add(id=self._ids, prompt=prompt, params=params, **fields)  # type: ignore[arg-type]
        self.scheduler.add(message)
        self.runner.salts[self._ids] = message.salt
        order = (self.steps + message.priority * self.scheduler.ageing_steps, self._ids)
        self.live[self._ids] = Client(message, order, list(message.output))
        self._checked()
        return self._ids

    def abort(self, id_: int) -> None:
        self.scheduler.abort(id_)
        self.live.pop(id_, None)
        self._checked()

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            if self.live:
                self.schedule()
                self.update()

    def schedule(self) -> StepPlan | None:
        """Plan one more step and have it run, if not too many are out; its result waits for `update`."""
        if len(self.in_flight) == self.depth:
            return None
        preemptions = self.scheduler.preemptions
        plan = self.scheduler.schedule()
        assert plan or self.in_flight or not self.live, "there is work, and nothing is done"
        if plan is not None:
            self._check_plan(plan, self.scheduler.preemptions > preemptions)
            self.steps += 1
            self.in_flight.append((plan, self.runner.run(plan)))
        self._checked()
        return plan

    def update(self) -> list[SequenceOutput]:
        """Take in the oldest result."""
        if not self.in_flight:
            return []
        outputs = self.scheduler.update(*self.in_flight.popleft())
        for output in outputs:
            self._receive(output)
        self._checked()
        return outputs

    def drain(self) -> None:
        """Run until all have ended, in no more steps than there are tokens to compute, and find the books empty."""
        most = sum(
            (PREEMPTIONS_BEFORE_RESERVE + 1) * (len(c.message.prompt) + c.message.params.max_tokens)
            for c in self.live.values()
        )
        for _ in range(2 * most + self.depth):  # each of these is one step planned, or one taken in, or both
            if self.schedule() is None or len(self.in_flight) == self.depth:
                self.update()
        assert not self.live, "a sequence waits for ever"
        assert not self.in_flight
        assert self.scheduler.idle
        assert self.pool.num_free == self.pool.num_blocks

    def _checked(self) -> None:
        self.operations += 1
        self.scheduler.check()
        assert self.pool.num_free + self.pool.num_used == self.pool.num_blocks

    def _check_plan(self, plan: StepPlan, preempted: bool) -> None:
        ids = [chunk.id for chunk in plan.chunks]
        self.running.difference_update(plan.removed)
        self.running.update(new.id for new in plan.added)
        assert ids, "an empty plan"
        assert len(set(ids)) == len(ids)
        assert self.running.issuperset(ids)
        assert plan.tokens + sum(chunk.drafts for chunk in plan.chunks) <= self.scheduler.token_budget
        assert all(chunk.samples or not chunk.drafts for chunk in plan.chunks)
        assert all(chunk.count > 0 for chunk in plan.chunks)
        assert len(self.running) <= self.scheduler.max_num_seqs
        assert self.running <= self.live.keys()
        if preempted and plan.added:  # somebody who waits was made way for
            made_way = [id_ for id_ in plan.removed if id_ in self.live]
            assert made_way, "admitted in a step that preempted"
            owners = {self.live[new.id].message.owner for new in plan.added}
            for id_ in made_way:
                another = owners - {self.live[id_].message.owner}
                assert self._background(id_) or another, "made way for a sequence of its own owner"
            assert not any(self._background(new.id) for new in plan.added), "made way for what nobody waits for"
        self._check_order(plan, preempted)

    def _check_order(self, plan: StepPlan, preempted: bool) -> None:
        """Of one owner: first come, first served within a priority; no overtaking for longer than ageing allows; newest
        out first."""
        waiting = [self.live[id_] for id_ in self.live.keys() - self.running]
        for new in plan.added:
            client = self.live[new.id]
            client.admissions += 1
            assert client.admissions <= 1 + PREEMPTIONS_BEFORE_RESERVE or self._background(new.id)
            rivals = [each.order for each in waiting if each.message.owner == client.message.owner]
            assert all(client.order < order for order in rivals), "overtook one that waits"
        if not preempted:
            return
        out = [self.live[id_] for id_ in plan.removed if id_ in self.live]
        for chunk in plan.chunks:
            client = self.live[chunk.id]
            spared = client.admissions > PREEMPTIONS_BEFORE_RESERVE
            # One that made way for another owner's may find room again in the very step.
            rivals = [each.order for each in out if each.message.owner == client.message.owner and each is not client]
            assert spared or all(client.order < order for order in rivals), "preempted the wrong one"

    def _background(self, id_: int) -> bool:
        return self.live[id_].message.priority >= BACKGROUND

    def _receive(self, output: SequenceOutput) -> None:
        client = self.live[output.id]
        if output.cached_tokens is not None:
            client.told_cached.append(output.cached_tokens)
        if output.token is not None:
            client.output.append(output.token)
        if output.prompt_logprobs is not None:
            assert output.prompt_logprobs.start == len(client.scores) + 1, "a score twice, or left out"
            client.scores += output.prompt_logprobs.rows
        if output.finish is not None:
            client.finish = output.finish
            self._check_answer(client, output.stop_token)
            self.ended.append(self.live.pop(output.id))

    def _check_answer(self, client: Client, stop_token: int | None) -> None:
        message = client.message
        expected, finish = alone(message, self.scheduler.max_model_len)
        assert client.output == expected, "its batch-mates changed an answer"
        assert client.finish is finish
        assert stop_token == (expected[-1] if finish is FinishReason.STOP else None)
        assert len(client.told_cached) == 1
        assert client.told_cached[0] < len(message.prompt) + len(message.output)
        wanted = len(message.prompt) - 1 if message.params.prompt_logprobs is not None else 0
        assert len(client.scores) == wanted
        past = int.from_bytes(message.salt, "big") + 7
        for token, score in zip(message.prompt, [None, *client.scores], strict=False):
            assert score is None or score.logprob == float(past)
            past = fingerprint(past, token)
