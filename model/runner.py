"""Turns a StepPlan into tensors, runs the network, samples, and returns a StepResult.

Keeps one row of state for each sequence the plan has added and not yet removed. Knows nothing of waiting requests,
priorities, or which blocks are free.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from model.adapters import AdaptedRows, Adapter
from model.gpt2 import GPT2
from model.grammar import Grammars, Matcher
from model.kv_cache import KVCache
from model.request_tables import TablesOfRequests
from model.row import Row, Span, lay_out
from model.speculative import Drafter
from model.step import (
    Done,
    NewSequence,
    Pending,
    PromptLogprobs,
    SampledToken,
    ScheduledChunk,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from model.variants import Variant, Variants

SCORED_ROWS = 64  # prompt scoring holds this many rows of logits at once, not prompt x vocabulary


class Runner:
    ahead = 0  # how many plans may be launched beyond the last one whose result was taken

    def __init__(
        self,
        model: GPT2,
        cache: KVCache,
        device: torch.device,
        max_model_len: int,
        drafter: Drafter | None = None,
        grammars: Grammars | None = None,
        variants: Variants | None = None,
    ) -> None:
        """grammars, variants: needed once a sequence has one."""
        self._model = model
        self._cache = cache
        self._device = device
        self._context = max_model_len
        self._max_blocks = -(-max_model_len // cache.block_size)
        self._drafter = drafter
        self._grammars = grammars
        self._variants = variants
        self._tables = TablesOfRequests(model.config.vocab_size, model.config.eos_token_ids)
        self.rows: dict[int, Row] = {}

    def run(self, plan: StepPlan) -> StepResult:
        return self.launch(plan).result()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Pending:
        self.prepare(plan)
        return Done(self.compute(plan))

    def prepare(self, plan: StepPlan) -> None:
        """Bring the rows up to date."""
        self.forget(plan.removed)
        for new in plan.added:
            parts = self._matcher(new), self._variant(new)
            self.rows[new.id] = Row(new, self._tables.of(new.params), self._context, self._max_blocks, *parts)
        for chunk in plan.chunks:
            if chunk.copied is not None:
                self._cache.copy(*chunk.copied)
            if chunk.blocks:
                self.rows[chunk.id].take_blocks(chunk)

    def compute(self, plan: StepPlan) -> StepResult:
        """The rest of a step, once its rows are prepared."""
        began = time.perf_counter()
        guesses = self._guesses(plan)
        drafting = time.perf_counter() - began
        spans = [self._span(chunk, len(guessed)) for chunk, guessed in zip(plan.chunks, guesses, strict=True)]
        pieces = self._forward(spans)  # (span.wanted, n_embd) each
        scored = self._score_prompts(plan, pieces)
        drafted = {chunk.id: len(guessed) for chunk, guessed in zip(plan.chunks, guesses, strict=True) if guessed}
        return StepResult(
            sampled=self._sample(plan, pieces, guesses),
            prompt_logprobs=scored,
            drafted=drafted,
            drafting=drafting,
            pooled=self._pool(plan, pieces),
        )

    def _span(self, chunk: ScheduledChunk, guesses: int) -> Span:
        row, count = self.rows[chunk.id], chunk.count + guesses
        told = row.params.prompt_logprobs is not None or row.params.pooled  # of every token
        return Span(row, chunk.start, count, count if told else (guesses + 1) * chunk.samples)

    def _matcher(self, new: NewSequence) -> Matcher | None:
        if new.params.grammar is None:
            return None
        assert self._grammars is not None
        return self._grammars.matcher(new.params.grammar, new.output)

    def _variant(self, new: NewSequence) -> Variant | None:
        if new.variant is None:
            return None
        assert self._variants is not None
        return self._variants.get(new.variant)

    def _network(self, row: Row) -> GPT2:
        return self._model if row.variant is None else row.variant.network

    def _forward(self, spans: list[Span]) -> list[Tensor]:
        """Each network computes its spans together; adapters ride along."""
        pieces: dict[int, Tensor] = {}
        for network, places in _by_network([self._network(span.row) for span in spans]):
            own = [spans[i] for i in places]
            batch = lay_out(own, self._cache.block_size, self._device)
            hidden = network.forward(batch, self._cache, _adapted(own, self._device))
            pieces.update(zip(places, hidden.split([span.wanted for span in own]), strict=True))
        return [pieces[i] for i in range(len(spans))]

    def _logits(self, hidden: Tensor, networks: list[GPT2]) -> Tensor:
        """hidden: (len(networks), n_embd), each row of the network that made it."""
        groups = _by_network(networks)
        if len(groups) == 1:
            return networks[0].logits(hidden)
        logits = torch.empty(len(networks), self._model.config.vocab_size, device=self._device)
        for network, places in groups:
            logits[places] = network.logits(hidden[places])
        return logits

    def forget(self, ids: list[int]) -> None:
        for id_ in ids:
            del self.rows[id_]
            if self._drafter is not None:
                self._drafter.forget(id_)

    def _guesses(self, plan: StepPlan) -> list[list[int]]:
        """Of each chunk, and laid down in its row."""
        if self._drafter is None:
            return [[] for _ in plan.chunks]
        guesses = self._drafter.draft(plan.chunks, self.rows)
        for i, chunk in enumerate(plan.chunks):
            row = self.rows[chunk.id]
            assert len(guesses[i]) <= chunk.drafts
            if row.matcher is not None:  # a grammar says what may follow known tokens alone
                guesses[i] = []
            row.guess(guesses[i])
        return guesses

    def _sample(self, plan: StepPlan, pieces: list[Tensor], guesses: list[list[int]]) -> list[SampledToken]:
        """Each sampling chunk's next token, and the one after each guess for as long as the guesses were right."""
        wanted = [(c, p, g) for c, p, g in zip(plan.chunks, pieces, guesses, strict=True) if c.samples]
        if not wanted:
            return []
        deciders = [
            self.rows[chunk.id].sampling_row(ahead) for chunk, _, guessed in wanted for ahead in range(len(guessed) + 1)
        ]
        hidden = torch.cat([piece[-len(guessed) - 1 :] for _, piece, guessed in wanted])
        networks = [self._network(self.rows[c.id]) for c, _, guessed in wanted for _ in range(len(guessed) + 1)]
        drawn = iter(zip(*self._model.sample(self._logits(hidden, networks), deciders), strict=True))
        sampled = []
        for chunk, _, guessed in wanted:
            own = [next(drawn) for _ in range(len(guessed) + 1)]
            right = next((i for i, guess in enumerate(guessed) if guess != own[i][0]), len(guessed))
            for token, scores in own[: right + 1]:
                state = None if token is None else self.rows[chunk.id].append(token)
                sampled.append(SampledToken(chunk.id, token, scores, state))
        return sampled

    def _pool(self, plan: StepPlan, pieces: list[Tensor]) -> dict[int, bytes]:
        """The mean of a prompt's final hidden states, where that is wanted, once its last chunk has run."""
        pooled = {}
        for chunk, piece in zip(plan.chunks, pieces, strict=True):
            row = self.rows[chunk.id]
            if row.params.pooled:
                row.hidden_sum = row.hidden_sum + self._network(row).final(piece).double().sum(0).cpu().numpy()
                if chunk.start + chunk.count == row.prompt_length:
                    pooled[chunk.id] = (row.hidden_sum / row.prompt_length).astype("<f4").tobytes()
        return pooled

    def _score_prompts(self, plan: StepPlan, pieces: list[Tensor]) -> list[PromptLogprobs]:
        scored = []
        for chunk, piece in zip(plan.chunks, pieces, strict=True):
            row = self.rows[chunk.id]
            # The hidden state at position p scores the prompt's token at p + 1.
            stop = min(chunk.start + chunk.count, row.prompt_length - 1)
            if row.params.prompt_logprobs is not None and chunk.start < stop:
                targets = torch.from_numpy(row.tokens[chunk.start + 1 : stop + 1]).to(self._device)
                network, top = self._network(row), row.params.prompt_logprobs
                scores = _score(network, piece[: stop - chunk.start], targets, top)
                scored.append(PromptLogprobs(chunk.id, chunk.start + 1, scores))
        return scored


def _score(network: GPT2, hidden: Tensor, targets: Tensor, top: int) -> list[TokenLogprobs]:
    """hidden: (rows, n_embd), targets: (rows,)."""
    scores: list[TokenLogprobs] = []
    for part, ids in zip(hidden.split(SCORED_ROWS), targets.split(SCORED_ROWS), strict=True):
        rows = network.score(network.logits(part), ids, [top] * len(ids)).rows()
        scores += [row for row in rows if row is not None]
    return scores


def _by_network(networks: list[GPT2]) -> list[tuple[GPT2, list[int]]]:
    """Each network once, with the places it has in the list."""
    places: dict[int, list[int]] = {}
    for i, network in enumerate(networks):
        places.setdefault(id(network), []).append(i)
    return [(networks[own[0]], own) for own in places.values()]


def _adapted(spans: list[Span], device: torch.device) -> list[AdaptedRows]:
    """The rows of each adapter, where spans are laid end to end."""
    adapters: dict[int, tuple[Adapter, list[int]]] = {}
    at = 0
    for span in spans:
        adapter = None if span.row.variant is None else span.row.variant.adapter
        if adapter is not None:
            adapters.setdefault(id(adapter), (adapter, []))[1].extend(range(at, at + span.count))
        at += span.count
    if len(adapters) == 1 and all(len(rows) == at for _, rows in adapters.values()):
        return [AdaptedRows(adapter, None) for adapter, _ in adapters.values()]
    return [AdaptedRows(adapter, torch.tensor(rows, device=device)) for adapter, rows in adapters.values()]
