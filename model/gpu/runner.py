"""Steps queued on a GPU without waiting for the one before: the next is planned and queued while it computes.

A token that is still being computed is known by where the device will have it, so a sequence's next step can be queued
before anybody knows what it continues. Steps that only decode are replayed CUDA graphs, padded to a rung of a ladder of
sizes; others run as they are. What needs the host to see a token before the next one (grammars, penalties, and other
things of which sampling.py here says that it cannot do them) and what has more to tell than tokens (prompt scores,
pooled states) is left to the plain runner, after everything queued has come home.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

import torch
from torch import Tensor

from model.gpt2 import GPT2
from model.gpu.accelerator import Accelerator
from model.gpu.inputs import Layout, StepInputs
from model.gpu.ladder import Ladder
from model.gpu.sampling import Draw, Sampler, on_device
from model.kv_cache import KVCache
from model.row import Row, Span
from model.runner import Runner
from model.scores import Scores, score
from model.step import Done, Pending, SampledToken, ScheduledChunk, StepPlan, StepResult

CAPTURE_SECONDS = 30.0  # rungs that are not recorded by then do without: their steps take the next larger one


@dataclass(slots=True)
class Queued:
    """A step under way. Its rows learn their tokens when it comes home, even rows that have left meanwhile."""

    wait: Callable[[], None]
    chunks: list[ScheduledChunk]  # those that sample
    rows: list[Row]
    tokens: Tensor  # (chunks,) int64, on the host, once `wait` is over
    scores: Scores | None
    _result: StepResult | None = None

    def result(self) -> StepResult:
        if self._result is None:
            self.wait()
            scores = [None] * len(self.chunks) if self.scores is None else self.scores.rows()
            tokens = self.tokens.tolist()
            for row, token in zip(self.rows, tokens, strict=True):
                row.append(token)
            told = zip(self.chunks, tokens, scores, strict=True)
            self._result = StepResult([SampledToken(chunk.id, token, score) for chunk, token, score in told])
        return self._result


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
    ) -> None:
        """max_rows: of any step. scratch_block: one of the cache's that belongs to nobody."""
        self._plain = plain
        self._model = model
        self._cache = cache
        self._accelerator = accelerator
        self._max_blocks = max_blocks
        vocab = model.config.vocab_size
        self._ladder = Ladder(max_seqs)
        self._graphs: dict[int, Callable[[], None]] = {}
        self._inputs = StepInputs(
            accelerator, Layout(max(max_rows, max_seqs), max_seqs, max_blocks), cache.block_size, scratch_block
        )
        self._sampler = Sampler(accelerator, max_seqs, vocab)
        self._logits = torch.zeros(max_seqs, vocab, device=accelerator.device)
        self._sampled = torch.zeros(max_seqs, dtype=torch.int64, device=accelerator.device)
        self._home = [accelerator.host_buffer(max_seqs, torch.int64) for _ in range(2)]
        self._turn = 0
        self._queued: Queued | None = None  # the last step, for as long as its tokens may be unknown

    # === Graphs ===

    @torch.inference_mode()
    def capture(self, progress: Callable[[int, int], None], seconds: float = CAPTURE_SECONDS) -> None:
        """Record a decode step for each rung, largest first, for as long as there is time. progress: (done, of all)."""
        began, sizes = monotonic(), self._ladder.sizes
        for done, size in enumerate(reversed(sizes)):
            if done and monotonic() - began > seconds:
                self._ladder = self._ladder.without(below=sizes[len(sizes) - done])
                break
            layout = Layout(size, size, self._max_blocks)
            self._inputs.load([], {}, layout)
            self._graphs[size] = self._accelerator.capture(self._decode_step(layout))
            progress(done + 1, len(sizes))

    def _decode_step(self, layout: Layout) -> Callable[[], None]:
        rows = layout.rows

        def step() -> None:
            batch = self._inputs.batch(layout, self._sampled)
            self._logits[:rows] = self._model.logits(self._model.forward(batch, self._cache))
            self._sampled[:rows] = self._logits[:rows].argmax(dim=-1)

        return step

    @property
    def graphs(self) -> int:
        return len(self._graphs)

    # === Steps ===

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Pending:
        self._plain.prepare(plan)
        rows = [self._plain.rows[chunk.id] for chunk in plan.chunks]
        if not all(_alone(row) for row in rows):
            self._come_home()
            return Done(self._plain.compute(plan))
        return self._queue(plan, rows)

    def forget(self, ids: list[int]) -> None:
        self._plain.forget(ids)

    def _come_home(self) -> None:
        if self._queued is not None:
            self._queued.result()
            self._queued = None

    def _queue(self, plan: StepPlan, rows: list[Row]) -> Queued:
        spans = [Span(row, chunk.start, chunk.count, chunk.count) for row, chunk in zip(rows, plan.chunks, strict=True)]
        sources = self._sources(plan.chunks, rows)
        rung = self._ladder.rung(len(spans)) if plan.decodes else None
        sampling = [i for i, chunk in enumerate(plan.chunks) if chunk.samples]
        if rung is not None and rung in self._graphs:
            self._inputs.load(spans, sources, Layout(rung, rung, self._max_blocks))
            self._graphs[rung]()
        else:
            self._run(spans, sources, sampling)
        queued = self._sample([plan.chunks[i] for i in sampling], [rows[i] for i in sampling])
        self._queued = queued
        return queued

    def _sources(self, chunks: list[ScheduledChunk], rows: list[Row]) -> dict[int, int]:
        """Where the device has the last token of chunks whose rows do not know it yet."""
        if self._queued is None:
            return {}
        places = {id(row): place for place, row in enumerate(self._queued.rows)}
        ends = [chunk.start + chunk.count for chunk in chunks]
        pairs = enumerate(zip(rows, ends, strict=True))
        return {i: places[id(row)] for i, (row, end) in pairs if end > row.length}

    def _run(self, spans: list[Span], sources: dict[int, int], sampling: list[int]) -> None:
        """A step that no graph has: its last rows' logits and their largest, where a graph would leave them."""
        size = self._cache.block_size
        width = max(-(-(span.start + span.count) // size) for span in spans)
        layout = Layout(sum(span.count for span in spans), len(spans), width)
        self._inputs.load(spans, sources, layout)
        counts = tuple((span.count, span.start + span.count) for span in spans)
        batch = self._inputs.batch(layout, self._sampled, counts)
        hidden = self._model.forward(batch, self._cache)
        if sampling:
            pieces = hidden.split([span.count for span in spans])
            logits = self._model.logits(torch.cat([pieces[i][-1:] for i in sampling]))
            self._logits[: len(sampling)] = logits
            self._sampled[: len(sampling)] = logits.argmax(dim=-1)

    def _sample(self, chunks: list[ScheduledChunk], rows: list[Row]) -> Queued:
        """Decide what is not greedy, and send the tokens home."""
        count = len(chunks)
        logits, tokens = self._logits[:count], self._sampled[:count]
        ends = [chunk.start + chunk.count for chunk in chunks]
        draws = [Draw(row.params, row.uniform(end)) for row, end in zip(rows, ends, strict=True)]
        chosen = self._sampler.refine(logits, tokens, draws) if draws else tokens
        if chosen is not tokens:
            tokens.copy_(chosen)
        scored = [row.params.logprobs for row in rows]
        scores = None if all(top is None for top in scored) else score(logits, tokens, scored)
        self._turn = 1 - self._turn
        home = self._home[self._turn][:count]
        home.copy_(tokens, non_blocking=True)
        return Queued(self._accelerator.mark(), chunks, rows, home, scores)


def _alone(row: Row) -> bool:
    """Whether its steps have nothing to tell but tokens, these can be decided on the device, by its graphs."""
    return (
        on_device(row.params) and row.params.prompt_logprobs is None and not row.params.pooled and row.variant is None
    )
