"""Steps queued on a GPU without waiting for the one before: the next is planned and queued while it computes.

A token that is still being computed is known by where the device will have it, so a sequence's next step can be queued
before anybody knows what it continues. Decode steps are replayed CUDA graphs, padded to a rung of a ladder of sizes;
prompts beside them run as they are. What needs the host to see a token before the next one (grammars, penalties, and
other things of which sampling.py here says that it cannot do them) and what has more to tell than tokens (prompt
scores, pooled states) is left to the plain runner, and waited for; the others' graph runs beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from time import monotonic

import numpy as np
import torch
from torch import Tensor

from model.gpt2 import GPT2
from model.gpu.accelerator import Accelerator
from model.gpu.inputs import Chunks, Layout, StepInputs
from model.gpu.ladder import Ladder
from model.gpu.sampling import Draw, Sampler, on_device
from model.gpu.seats import Seats
from model.kv_cache import KVCache
from model.request_tables import make_tables
from model.row import Row
from model.runner import Runner
from model.sampling_params import SamplingParams
from model.scores import Scores, score
from model.step import Done, NewSequence, Pending, SampledToken, ScheduledChunk, StepPlan, StepResult

CAPTURE_SECONDS = 30.0  # rungs that are not recorded by then do without: their steps take the next larger one
NOBODY = Chunks([], *(np.zeros(0, dtype=np.int64) for _ in range(3)))

Recorded = Callable[[int, int, float], None]  # how many graphs there are, of how many, after how many seconds


@dataclass(slots=True)
class Queued:
    """A step under way. Its rows learn their tokens when it comes home, even rows that have left meanwhile."""

    wait: Callable[[], None]
    chunks: list[ScheduledChunk]
    rows: list[Row]  # theirs
    tokens: Tensor  # (chunks,) int32, on the host, once `wait` is over
    scores: Scores | None
    _result: StepResult | None = None

    def result(self) -> StepResult:
        if self._result is None:
            self.wait()
            scores = [None] * len(self.chunks) if self.scores is None else self.scores.rows()
            sampled = []
            for chunk, row, token, told in zip(self.chunks, self.rows, self.tokens.tolist(), scores, strict=True):
                if chunk.samples:
                    row.append(token)
                    sampled.append(SampledToken(chunk.id, token, told))
            self._result = StepResult(sampled)
        return self._result


@dataclass(frozen=True, slots=True)
class Beside:
    """A step of which a part is under way, and the rest is done."""

    queued: Queued
    done: StepResult

    def result(self) -> StepResult:
        return replace(self.done, sampled=self.queued.result().sampled + self.done.sampled)


class GraphRunner:
    """Plans may be launched one ahead of the last result that was taken."""

    ahead = 1

    def __init__(
        self,
        plain: Runner,
        model: GPT2,
        cache: KVCache,
        accelerator: Accelerator,
        *,
        max_rows: int,
        max_seqs: int,
        max_blocks: int,
        scratch_block: int,
        draw: Draw | None = None,
    ) -> None:
        """max_rows: of any step. scratch_block: one of the cache's that belongs to nobody. draw: the Sampler's."""
        self._plain = plain
        self._model = model
        self._cache = cache
        self._accelerator = accelerator
        self._max_blocks = max_blocks
        self._scratch_block = scratch_block
        vocab = model.config.vocab_size
        self._ladder = Ladder(max_seqs)
        self._graphs: dict[int, Callable[[], None]] = {}
        self._seats = Seats(max_seqs, max_blocks)
        self._apart: set[int] = set()  # sequences that are left to the plain runner
        largest = Layout(max(max_rows, max_seqs), max_seqs, max_blocks)
        self._inputs = StepInputs(accelerator, largest, cache.block_size, scratch_block, self._seats)
        self._sampler = Sampler(accelerator, max_seqs, vocab, draw)
        self._logits = torch.zeros(max_seqs, vocab, device=accelerator.device)
        self._home = [accelerator.host_buffer(max_seqs, torch.int32) for _ in range(2)]
        self._turn = 0
        self._queued: Queued | None = None  # the last step, for as long as its tokens may be unknown

    # === Graphs ===

    @torch.inference_mode()
    def capture(self, recorded: Recorded | None = None, seconds: float = CAPTURE_SECONDS) -> None:
        """Record a decode step for each rung, largest first, for as long as there is time. recorded: told of each."""
        began, sizes = monotonic(), self._ladder.sizes
        self._warm_up()
        for done, size in enumerate(reversed(sizes)):
            if done and monotonic() - began > seconds:
                self._ladder = self._ladder.without(below=sizes[len(sizes) - done])
                break
            layout = Layout(size, size, self._max_blocks)
            self._inputs.load(NOBODY, layout)
            self._graphs[size] = self._accelerator.capture(self._decode_step(layout))
            if recorded is not None:
                recorded(done + 1, len(sizes), monotonic() - began)

    def _warm_up(self) -> None:
        """A prompt of two tokens that belong to nobody: nobody's first one shall wait for kernels to be compiled."""
        new = NewSequence(id=-1, prompt=[0, 0], output=[], params=SamplingParams(seed=0, max_tokens=1))
        config = self._model.config
        tables = make_tables(new.params, config.vocab_size, config.eos_token_ids)
        row = Row(new, tables, len(new.prompt), self._max_blocks)
        row.blocks.fill(self._scratch_block)
        self._sampler.keep(self._seats.take(new.id, row), row.params)
        chunks = Chunks([row], self._seats.of([new.id]), np.array([0]), np.array([row.length]))
        self._run(chunks, 0)
        self._decide([], chunks)
        self._seats.leave([new.id])

    def _decode_step(self, layout: Layout) -> Callable[[], None]:
        rows = layout.rows

        def step() -> None:
            batch = self._inputs.batch(layout)
            self._logits[:rows] = self._model.logits(self._model.forward(batch, self._cache))
            self._inputs.sampled[:rows] = self._logits[:rows].argmax(dim=-1)

        return step

    @property
    def graphs(self) -> int:
        return len(self._graphs)

    def graph(self, rows: int) -> Callable[[], None] | None:
        """What a decode step of so many rows replays; None for no rows, and for more than there is a graph for."""
        rung = self._ladder.rung(rows) if rows else None
        return None if rung is None else self._graphs.get(rung)

    # === Steps ===

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Pending:
        self._plain.prepare(plan)
        self._seat(plan)
        decodes, others = self._split(plan)
        if not any(chunk.id in self._apart for chunk in others):
            return self._queue(decodes + others, len(decodes))
        if self.graph(len(decodes)) is None:
            self._come_home()
            return Done(self._plain.compute(plan))
        return Beside(self._queue(decodes, len(decodes)), self._plain.compute(StepPlan([], [], others)))

    def _split(self, plan: StepPlan) -> tuple[list[ScheduledChunk], list[ScheduledChunk]]:
        """Those that a graph can compute, and those that come after it.

        A sequence that is new may read a block which another's token completes in this very step, so it comes after.
        """
        late = self._apart.union(new.id for new in plan.added)
        first = [chunk.count == 1 and chunk.samples and chunk.id not in late for chunk in plan.chunks]
        pairs = list(zip(plan.chunks, first, strict=True))
        return [chunk for chunk, is_first in pairs if is_first], [chunk for chunk, is_first in pairs if not is_first]

    def _seat(self, plan: StepPlan) -> None:
        self._seats.leave(plan.removed)
        self._apart.difference_update(plan.removed)
        for new in plan.added:
            row = self._plain.rows[new.id]
            self._sampler.keep(self._seats.take(new.id, row), row.params)
            if not _alone(row):
                self._apart.add(new.id)

    def _come_home(self) -> None:
        if self._queued is not None:
            self._queued.result()
            self._queued = None
        self._seats.clear_places()

    def _queue(self, scheduled: list[ScheduledChunk], decodes: int) -> Queued:
        """Of every chunk the last row is decided, wanted or not. decodes: how many, the first, a graph can compute."""
        ids = [chunk.id for chunk in scheduled]
        rows = [self._plain.rows[id_] for id_ in ids]
        starts, counts = [chunk.start for chunk in scheduled], [chunk.count for chunk in scheduled]
        chunks = Chunks(rows, self._seats.of(ids), np.array(starts), np.array(counts))
        replayed = self._replay(chunks, decodes)
        if replayed < len(rows):
            self._run(chunks.part(replayed, len(rows)), replayed)
        samples = np.flatnonzero([chunk.samples for chunk in scheduled])
        self._queued = self._decide(scheduled, chunks)
        self._seats.place(chunks.seats[samples], samples)
        return self._queued

    def _replay(self, chunks: Chunks, decodes: int) -> int:
        """Let a graph compute the first so many, if there is one. Returns how many it computes.

        What is left is launched kernel by kernel, while the device computes these.
        """
        graph, rung = self.graph(decodes), self._ladder.rung(decodes)
        if graph is None or rung is None:
            return 0
        self._inputs.load(chunks.part(0, decodes), Layout(rung, rung, self._max_blocks))
        graph()
        return decodes

    def _run(self, chunks: Chunks, first: int) -> None:
        """Without a graph. Their last rows' logits and the largest of each stand from place `first` on."""
        count, stops = len(chunks.rows), chunks.stops
        places = slice(first, first + count)
        layout = Layout(int(chunks.counts.sum()), count, self._max_blocks)
        self._inputs.load(chunks, layout)
        spans = tuple(zip(chunks.counts.tolist(), stops.tolist(), strict=True))
        batch = self._inputs.batch(layout, spans)
        hidden = self._model.forward(batch, self._cache)
        self._logits[places] = self._model.logits(hidden[batch.query_starts[1:] - 1])
        self._inputs.sampled[places] = self._logits[places].argmax(dim=-1)

    def _decide(self, scheduled: list[ScheduledChunk], chunks: Chunks) -> Queued:
        """Draw what is not greedy, and send the tokens home."""
        rows, count = chunks.rows, len(chunks.rows)
        logits, tokens = self._logits[:count], self._inputs.sampled[:count]
        if drawn := self._sampler.drawn(chunks.seats):
            uniforms, stops = np.zeros(count), chunks.stops.tolist()
            uniforms[drawn] = [rows[i].uniform(stops[i]) for i in drawn]
            tokens.copy_(self._sampler.refine(logits, tokens, chunks.seats, uniforms))
        scored = [row.params.logprobs for row in rows]
        scores = None if all(top is None for top in scored) else score(logits, tokens.long(), scored)
        self._turn = 1 - self._turn
        home = self._home[self._turn][:count]
        home.copy_(tokens, non_blocking=True)
        return Queued(self._accelerator.mark(), scheduled, rows, home, scores)


def _alone(row: Row) -> bool:
    """Whether its steps have nothing to tell but tokens, these can be decided on the device, by its graphs."""
    return (
        on_device(row.params) and row.params.prompt_logprobs is None and not row.params.pooled and row.variant is None
    )
