"""Which sequences compute how many tokens in the next step. Pure: no torch, no clock, no I/O.

One idea: every sequence has computed tokens that chase its total tokens, and a step hands out a budget of tokens.
Prefill, chunked prefill, prefix-cache hits, decoding and resumption after preemption are this one case.

One order: a sequence's rank is the step it arrived at plus `ageing_steps` for each unit of its priority. It says who is
admitted first, who is served first and (from the other end) who is preempted first. Within a priority this is first
come, first served; between two, the later one may overtake for `ageing_steps` steps per unit and no longer. The lowest
rank always advances, so every sequence ends.

`schedule` may be called again before `update` of the plan before (so that a device need not wait for us), under three
rules: every plan handed out is run, plans are run and updated in order, and ids are never used twice. Blocks that are
freed while a plan uses them are then safe: whoever gets them writes them in a later plan. For the same reason a block
may be found in the prefix cache as soon as the chunk that fills it is planned, even by a later chunk of the same plan,
so that the n samples of one prompt start together and compute it once. Only full blocks are shared: the tail of a
prompt, shorter than a block, is computed by each sibling. Where sequences go on from one that has ended, one token each
(`continued`: beams), its last block is found too, and copied for each of them.

Owners (keys of the API) have equal shares, by tokens: see turns.py. A rank, and so a priority, orders an owner's own
sequences.

Sequences that nobody waits for (`background`) rank behind all others, and more: they give their seats and blocks to the
first of the others that would have to wait for one, they rest in steps that compute prompts of others, and their own
prompts get a small part of a step, so that a step which somebody comes to wait for is a short one.

Guesses (speculative decoding) ride along with the chunks that sample, in what is left of the budget and of the free
blocks once everything else has its share. Those that were right are computed tokens; the others never happened, and the
blocks borrowed for them go back. Until that is known, the sequence is left out of further plans.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from itertools import pairwise
from operator import attrgetter

from msgspec.structs import replace

from model.step import NewSequence, SampledToken, ScheduledChunk, StepPlan, StepResult
from server.worker.block_pool import BlockPool
from server.worker.messages import Add, FinishReason, SequenceOutput, Stats
from server.worker.outputs import output, told, unseen
from server.worker.prefixes import Prefixes
from server.worker.sequence import Sequence, Status
from server.worker.speculation import SpeculationController
from server.worker.turns import PREEMPTIONS_BEFORE_RESERVE, Turns

BACKGROUND_SHARE = 8  # one token in so many of a step's may be of prompts that nobody waits for

_rank = attrgetter("rank")


class Scheduler:
    """Owns every sequence of a worker and the block pool. One thread calls it."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        eos_token_ids: Iterable[int],
        ageing_steps: int = 256,
        speculation: SpeculationController | None = None,
    ) -> None:
        """Raises ValueError for numbers with which some sequence could never run."""
        capacity = pool.num_blocks * pool.block_size
        if capacity < max_model_len:
            raise ValueError(f"the KV cache holds {capacity} tokens, fewer than one context of {max_model_len}")
        if max_num_seqs < 1 or max_num_batched_tokens < 1 or ageing_steps < 1:
            raise ValueError("max_num_seqs, max_num_batched_tokens and ageing_steps must be at least 1")
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.token_budget = max_num_batched_tokens  # of one step; may be changed between steps, never below 1
        self.max_model_len = max_model_len
        self.eos_token_ids = frozenset(eos_token_ids)
        self.ageing_steps = ageing_steps
        self._speculation = speculation
        self._turns = Turns(pool, max_num_seqs)
        self._prefixes = Prefixes(pool)
        self.preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.drafts = 0
        self.drafted = 0
        self.accepted_at: list[int] = []  # right guesses, by place in their run
        self._steps = 0
        self._arrivals = 0
        self._sequences: dict[int, Sequence] = {}
        self._waiting: list[Sequence] = []  # both in order of rank
        self._running: list[Sequence] = []
        self._removed: list[int] = []  # rows the runner still has and should not

    # === Coming and going ===

    def add(self, message: Add) -> None:
        """Queue a sequence, fresh or resumed. Raises ValueError where it leaves no room for what it asks.

        The api process refuses such a request long before; nothing else can make a sequence that never runs.
        """
        assert message.id not in self._sequences, "sequence ids are never used twice"
        rank = (self._steps + message.priority * self.ageing_steps, self._arrivals)
        sequence = Sequence.from_message(
            message, rank=rank, max_model_len=self.max_model_len, eos_token_ids=self.eos_token_ids
        )
        if not message.prompt or sequence.total + sequence.samples > sequence.limit:
            raise ValueError(f"a sequence of {sequence.total} tokens has no room below its limit of {sequence.limit}")
        self._arrivals += 1
        self._sequences[sequence.id] = sequence
        insort(self._waiting, sequence, key=_rank)
        if not sequence.background:
            self._turns.shares.joined(sequence.owner)

    def abort(self, sequence_id: int) -> None:
        """Drop a sequence in whatever phase it is. An id that is unknown, or known no more, is ignored."""
        if sequence_id in self._sequences:
            self._end(self._sequences[sequence_id])

    def _end(self, sequence: Sequence) -> None:
        del self._sequences[sequence.id]
        self._leave(sequence, Status.FINISHED)
        if not sequence.background:
            self._turns.shares.left(sequence.owner)

    def _preempt(self, sequence: Sequence) -> None:
        """Take its blocks; it will be computed again, as far as they are not found in the cache by then."""
        self._leave(sequence, Status.WAITING)
        insort(self._waiting, sequence, key=_rank)
        sequence.preemptions += 1
        self.preemptions += 1

    def _leave(self, sequence: Sequence, status: Status) -> None:
        """Take a sequence off the queue it is in. All blocks are freed here, but those lent to guesses."""
        queue = self._running if sequence.status is Status.RUNNING else self._waiting
        if sequence.continued and status is Status.FINISHED:
            self._prefixes.register_tail(sequence)
        del queue[bisect_left(queue, sequence.rank, key=_rank)]
        if sequence.status is Status.RUNNING:
            self._removed.append(sequence.id)
        self.pool.free(sequence.block_table)
        sequence.block_table = []
        sequence.computed = sequence.drafting = sequence.borrowed = 0
        sequence.status = status

    def forget_cache(self) -> None:
        """The KV pool is about to be given back, and the runner's rows with it. Only an idle scheduler can."""
        assert self.idle
        self._removed.clear()
        self.pool.forget()

    # === A step ===

    def schedule(self) -> StepPlan | None:
        """Plan a step: decoding first, then prompts under way, then new ones. None when there is nothing to run."""
        due = self._make_way()
        budget = self.token_budget
        preemptions = self.preemptions
        chunks: list[ScheduledChunk] = []
        added: list[NewSequence] = []
        for background in (False, True):
            prefills: list[Sequence] = []
            for sequence in self._turns.in_turn(self._running):  # oldest first; victims come from the other end
                remaining = sequence.remaining if sequence.background is background else 0
                if remaining > 1:
                    prefills.append(sequence)
                elif remaining == 1 and budget > 0 and sequence.status is Status.RUNNING:
                    known = len(sequence.block_table)
                    if self._grow(sequence, chunks):
                        chunks.append(self._chunk(sequence, 1, known))
                        budget -= 1
            decoding = len(chunks)
            left = min(budget, max(self.token_budget // BACKGROUND_SHARE, 1)) if background else budget
            budget -= left
            prefills = self._turns.in_turn(prefills)  # their blocks they have had since admission
            admitting = self.preemptions == preemptions
            while left > 0 and (prefills or admitting):
                first = self._next_to_admit(prefills, due) if admitting else None
                admitted = None if first is None else self._admit(first, background)
                if admitted is not None:
                    due = None
                    added.append(_for_runner(admitted))
                    chunks.append(self._chunk(admitted, min(admitted.remaining, left), 0))
                    left -= chunks[-1].count
                    continue
                admitting = admitting and first is None and bool(prefills)
                if prefills and (sequence := prefills.pop(0)).status is Status.RUNNING:
                    chunks.append(self._chunk(sequence, min(sequence.remaining, left), len(sequence.block_table)))
                    left -= chunks[-1].count
            budget += left
            if len(chunks) > decoding:  # somebody waits for a first token: the step shall be no longer than that takes
                break
        if not chunks:
            return None
        if self._speculation is not None:
            self._allow_drafts(chunks, budget, self._speculation)
        self._steps += 1
        removed, self._removed = self._removed, []
        return StepPlan(removed=removed, added=added, chunks=chunks)

    def _next_to_admit(self, prefills: list[Sequence], due: Sequence | None) -> Sequence | None:
        """Who comes before the prompts under way, if any are left; due: somebody made way for this one."""
        first = due or self._turns.first(self._waiting)
        before = due is not None or not prefills or self._turns.had_fewer(first, prefills[0])
        return first if before else None

    def _grow(self, sequence: Sequence, chunks: list[ScheduledChunk]) -> bool:
        """Make room for one more token, if need be at the cost of the newest. False if that was the sequence itself.

        chunks: of this plan. Whoever has one keeps its blocks: another's chunk may not write what this one writes.
        """
        if sequence.total <= len(sequence.block_table) * self.pool.block_size:
            return True
        while self.pool.num_free == 0:
            victim = self._turns.victim(self._running, sequence, chunks)
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.block_table += self.pool.allocate(1)
        return True

    def _make_way(self) -> Sequence | None:
        """Until the first of the queue has a seat and blocks, or nobody is left who has to give up his.

        Returns the one for which another owner's made way, which is admitted before any other.
        """
        due = None
        while (first := self._turns.first(self._waiting)) is not None and not first.background:
            if self._has_seat and self._fits(first):
                break
            if self._running and self._running[-1].background:
                self._preempt(self._running[-1])
            elif (victim := self._turns.beyond_its_share(self._running, first, seat=not self._has_seat)) is not None:
                self._preempt(victim)
                due = first
            else:
                break
        return due

    @property
    def _has_seat(self) -> bool:
        return len(self._running) < self.max_num_seqs

    def _room(self, sequence: Sequence, cached: list[int]) -> int | None:
        """Blocks it needs beside those that are cached; None where there are not so many."""
        reserve = sequence.preemptions >= PREEMPTIONS_BEFORE_RESERVE
        need = self.pool.blocks_for(sequence.limit if reserve else sequence.total) - len(cached)
        fits = need + len(self._running) <= self.pool.available(cached)  # each running one will soon need a block
        return need if fits else None

    def _fits(self, sequence: Sequence) -> bool:
        return self._room(sequence, self._prefixes.full_blocks(sequence)) is not None

    def _admit(self, sequence: Sequence, background: bool) -> Sequence | None:
        """Start the first of the queue, if it is of this kind and there is a seat and blocks for all its tokens."""
        if not self._has_seat or sequence.background is not background:
            return None
        if sequence.in_flight:  # preempted while a plan was to sample its next token: wait for that
            return None
        cached = self._prefixes.full_blocks(sequence)
        need = self._room(sequence, cached)
        if need is None:
            return None
        del self._waiting[bisect_left(self._waiting, sequence.rank, key=_rank)]
        insort(self._running, sequence, key=_rank)
        tail = self._prefixes.tail(sequence, len(cached)) if sequence.continued else None
        self.pool.share(cached)
        sequence.status = Status.RUNNING
        sequence.block_table = cached + self.pool.allocate(need)
        sequence.registered = len(cached)
        sequence.computed = min(len(cached) * self.pool.block_size, sequence.reusable)
        if sequence.continued and tail is not None:
            sequence.computed = sequence.reusable
            sequence.copy_from = tail
        self._count_hits(sequence)
        return sequence

    def _count_hits(self, sequence: Sequence) -> None:
        if sequence.preemptions == 0:  # finding its own blocks again is no hit
            sequence.cached_tokens = min(sequence.computed, sequence.prompt_length)
            if self.pool.enable_prefix_caching:
                self.prefix_queries += sequence.prompt_length
                self.prefix_hits += sequence.cached_tokens

    def _chunk(self, sequence: Sequence, count: int, known_blocks: int) -> ScheduledChunk:
        """Hand a sequence `count` tokens of the budget; the runner knows the first `known_blocks` of its table."""
        start = sequence.computed
        sequence.computed += count
        if not sequence.background:
            self._turns.shares.charge(sequence.owner, count)
        samples = sequence.samples and sequence.computed == sequence.total
        self._prefixes.register(sequence)
        sequence.in_flight += samples
        copied, sequence.copy_from = self._copy(sequence, start), None
        blocks = sequence.block_table[known_blocks:]
        return ScheduledChunk(sequence.id, start, count, known_blocks, blocks, samples, copied=copied)

    def _copy(self, sequence: Sequence, start: int) -> tuple[int, int] | None:
        """From which block to which, for a sequence that was admitted with another's last block."""
        if sequence.copy_from is None:
            return None
        return sequence.copy_from, sequence.block_table[start // self.pool.block_size]

    def _allow_drafts(self, chunks: list[ScheduledChunk], budget: int, speculation: SpeculationController) -> None:
        """Let chunks that sample take guesses along, as far as budget and free blocks go: nobody yields to a guess."""
        for i, chunk in enumerate(chunks):
            sequence = self._sequences[chunk.id]
            if not chunk.samples or sequence.in_flight > 1 or sequence.params.grammar is not None:
                continue
            known, table = len(sequence.tokens), sequence.block_table
            if sequence.acceptance is None:
                sequence.acceptance = speculation.first(greedy=sequence.params.greedy)
            wanted = speculation.length(sequence.acceptance, len(chunks))
            if wanted == 0:
                sequence.acceptance = speculation.rested(sequence.acceptance)
            room = (len(table) + self.pool.num_free) * self.pool.block_size - known
            drafts = min(wanted, budget, room, sequence.limit - known - 1)  # after each guess one more is sampled
            if drafts > 0:
                sequence.drafting = drafts
                sequence.borrowed = max(self.pool.blocks_for(known + drafts) - len(table), 0)
                borrowed = self.pool.allocate(sequence.borrowed)
                table += borrowed
                chunks[i] = replace(chunk, blocks=chunk.blocks + borrowed, drafts=drafts)
                budget -= drafts

    # === What came of it ===

    def update(self, plan: StepPlan, result: StepResult) -> list[SequenceOutput]:
        """Take in a step's tokens and end what is at its end. What has been aborted meanwhile is passed over."""
        sampled: dict[int, list[SampledToken]] = {}
        for sample in result.sampled:
            sampled.setdefault(sample.id, []).append(sample)
        scores = {rows.id: rows for rows in result.prompt_logprobs}
        outputs: list[SequenceOutput] = []
        for chunk in plan.chunks:
            sequence = self._sequences.get(chunk.id)
            if sequence is None:
                continue
            rows = unseen(sequence, scores.get(chunk.id))
            if chunk.samples:
                sequence.in_flight -= 1
                if chunk.drafts:
                    self._settle(sequence, result.drafted.get(chunk.id, 0), len(sampled[chunk.id]) - 1)
                outputs += told(sequence, sampled[chunk.id], rows)
            elif not sequence.samples and chunk.start + chunk.count == sequence.prompt_length:
                outputs.append(output(sequence, None, rows, FinishReason.LENGTH, result.pooled.get(chunk.id)))
            elif rows is not None:
                outputs.append(output(sequence, None, rows, None))
            else:
                continue
            if outputs[-1].finish is not None:
                self._end(sequence)
        return outputs

    def _settle(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        """Guesses that were right are computed tokens now; the blocks that were lent to the others go back."""
        assert self._speculation is not None
        assert sequence.acceptance is not None
        self.drafts += drafted > 0
        self.drafted += drafted
        self.accepted_at += [0] * (accepted - len(self.accepted_at))
        for place in range(accepted):
            self.accepted_at[place] += 1
        before, greedy = sequence.acceptance, sequence.params.greedy
        sequence.acceptance = self._speculation.learned(before, drafted, accepted, greedy=greedy)
        if sequence.status is Status.RUNNING:  # else its blocks are gone, and it computes these tokens again
            sequence.computed += accepted
            table = sequence.block_table
            kept = max(self.pool.blocks_for(sequence.computed), len(table) - sequence.borrowed)
            self.pool.free(table[kept:])
            del table[kept:]
        sequence.drafting = sequence.borrowed = 0

    # === The books ===

    @property
    def idle(self) -> bool:
        return not self._sequences

    @property
    def variants(self) -> set[str]:
        """Keys of those that something here asks for."""
        return {sequence.variant for sequence in self._sequences.values() if sequence.variant is not None}

    @property
    def num_running(self) -> int:
        return len(self._running)

    def stats(self) -> Stats:
        return Stats(
            running=len(self._running),
            waiting=len(self._waiting),
            used_blocks=self.pool.num_used,
            cached_blocks=self.pool.num_cached,
            num_blocks=self.pool.num_blocks,
            preemptions=self.preemptions,
            prefix_queries=self.prefix_queries,
            prefix_hits=self.prefix_hits,
            drafts=self.drafts,
            drafted=self.drafted,
            accepted_at=list(self.accepted_at),
        )

    def check(self) -> None:
        """Prove the books: every sequence in one queue, every block accounted for, nothing beyond its bounds."""
        for queue, status in ((self._waiting, Status.WAITING), (self._running, Status.RUNNING)):
            assert all(s.status is status and self._sequences[s.id] is s for s in queue), "a queue with a stranger"
            assert all(a.rank < b.rank for a, b in pairwise(queue)), "a queue out of order"
        assert len(self._waiting) + len(self._running) == len(self._sequences), "a sequence in no queue"
        assert len(self._running) <= self.max_num_seqs, "more sequences run than there are seats"
        assert not any(s.block_table or s.computed for s in self._waiting), "a waiting sequence holds blocks"
        for s in self._running:
            assert s.computed <= s.total <= s.limit, "a sequence beyond its end"
            assert s.computed <= len(s.block_table) * self.pool.block_size, "a computed token without a block"
        self.pool.check(s.block_table for s in self._running)


def _for_runner(sequence: Sequence) -> NewSequence:
    prompt, output = sequence.tokens[: sequence.prompt_length], sequence.tokens[sequence.prompt_length :]
    own = sequence.variant, sequence.choice, sequence.seed
    return NewSequence(sequence.id, prompt, output, sequence.params, *own)
