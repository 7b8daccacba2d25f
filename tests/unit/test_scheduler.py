"""The scheduler's rules, one by one. `Simulation` checks the general promises at every step of each of them."""

from __future__ import annotations

from typing import Any

import pytest
from simulation import EOS, Simulation, alone

from model.sampling_params import SamplingParams
from model.step import NewSequence, SampledToken, ScheduledChunk, StepPlan, StepResult
from server.worker.block_pool import BlockPool
from server.worker.messages import BACKGROUND, Add, FinishReason, SequenceOutput
from server.worker.scheduler import Scheduler
from server.worker.turns import PREEMPTIONS_BEFORE_RESERVE


def params(max_tokens: int, **fields: Any) -> SamplingParams:
    return SamplingParams(seed=1, max_tokens=max_tokens, **{"ignore_eos": True, **fields})


def prompt(length: int, first: int = 1) -> list[int]:
    """Prompts of one `first` are beginnings of each other; of two, they share nothing."""
    return [first, *range(100, 99 + length)]


def added(plan: StepPlan | None) -> list[int]:
    assert plan is not None
    return [new.id for new in plan.added]


def counts(plan: StepPlan | None) -> dict[int, int]:
    assert plan is not None
    return {chunk.id: chunk.count for chunk in plan.chunks}


# === How a sequence ends ===


def generate(sampled: list[int], sampling: SamplingParams, prompt_length: int = 2, max_model_len: int = 16) -> Any:
    """Feed these tokens to a lone sequence until it ends; returns all its outputs."""
    scheduler = Scheduler(
        BlockPool(8, 4),
        max_num_seqs=1,
        max_num_batched_tokens=8,
        max_model_len=max_model_len,
        eos_token_ids=(EOS, OTHER_END),
    )
    scheduler.add(Add(id=1, prompt=prompt(prompt_length), params=sampling))
    outputs: list[SequenceOutput] = []
    tokens = iter(sampled)
    while plan := scheduler.schedule():
        wanted = [chunk.id for chunk in plan.chunks if chunk.samples]
        outputs += scheduler.update(plan, StepResult(sampled=[SampledToken(id_, next(tokens)) for id_ in wanted]))
    scheduler.check()
    assert scheduler.idle
    assert all(output.finish is None for output in outputs[:-1])
    return [output.token for output in outputs], outputs[-1].finish, outputs[-1].stop_token


STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH
OTHER_END = EOS + 1


def test_every_eos_ends_it() -> None:
    for end in (EOS, OTHER_END):
        assert generate([5, end], params(9, ignore_eos=False)) == ([5, end], STOP, end)


def test_every_eos_is_a_token_like_any_other_where_ignored() -> None:
    assert generate([EOS, OTHER_END, 6], params(3)) == ([EOS, OTHER_END, 6], LENGTH, None)


def test_a_stop_token_ends_it() -> None:
    assert generate([5, 6, 7], params(9, stop_token_ids=(7, 8))) == ([5, 6, 7], STOP, 7)


def test_eos_as_a_stop_token_ends_it_though_eos_is_ignored() -> None:
    assert generate([5, EOS], params(9, stop_token_ids=(EOS,))) == ([5, EOS], STOP, EOS)


def test_max_tokens_ends_it() -> None:
    assert generate([5, 6, 7], params(3)) == ([5, 6, 7], LENGTH, None)


def test_a_stop_token_in_the_last_place_is_a_stop() -> None:
    assert generate([5, 6, 7], params(3, stop_token_ids=(7,))) == ([5, 6, 7], STOP, 7)
    assert generate([5, EOS], params(9, ignore_eos=False), prompt_length=14) == ([5, EOS], STOP, EOS)


def test_stop_tokens_count_from_min_tokens_on() -> None:
    assert generate([7, 7, 7], params(9, min_tokens=2, stop_token_ids=(7,))) == ([7, 7, 7], STOP, 7)


@pytest.mark.parametrize(("prompt_length", "tokens"), [(13, 3), (14, 2), (15, 1)])
def test_the_context_ends_it(prompt_length: int, tokens: int) -> None:
    assert generate([5] * tokens, params(99), prompt_length) == ([5] * tokens, LENGTH, None)


@pytest.mark.parametrize(("max_tokens", "tokens"), [(1, 1), (2, 2), (3, 2)])
def test_max_tokens_one_below_at_and_one_above_what_the_context_has_left(max_tokens: int, tokens: int) -> None:
    assert generate([5] * tokens, params(max_tokens), 14) == ([5] * tokens, LENGTH, None)


@pytest.mark.parametrize("prompt_length", [1, 7, 8, 9, 15, 16])
def test_max_tokens_0_ends_when_the_prompt_is_computed(prompt_length: int) -> None:
    assert generate([], params(0), prompt_length) == ([None], LENGTH, None)


@pytest.mark.parametrize(("prompt_length", "max_tokens"), [(16, 1), (17, 0), (17, 1), (0, 4)])
def test_what_can_never_fit_is_refused_and_nothing_behind_it_waits(prompt_length: int, max_tokens: int) -> None:
    sim = Simulation(max_model_len=16)
    with pytest.raises(ValueError, match="no room"):
        sim.add(prompt(prompt_length)[:prompt_length], params(max_tokens))
    behind = sim.add(prompt(15), params(1))
    assert added(sim.schedule()) == [behind]
    sim.update()
    assert sim.scheduler.idle


def test_a_resumed_sequence_that_has_ended_already_is_refused() -> None:
    with pytest.raises(ValueError, match="no room"):
        Simulation().add(prompt(3), params(2), output=[5, 5])


def test_a_resumed_sequence_goes_on_where_it_was() -> None:
    sim = Simulation()
    message = Add(id=0, prompt=prompt(5), params=params(9))
    sim.add(message.prompt, message.params, output=alone(message, 32)[0][:6])
    assert counts(sim.schedule()) == {1: 11}
    sim.update()
    sim.step(2)
    assert sim.scheduler.idle  # Simulation has compared the answer


# === Budget and chunks ===


@pytest.mark.parametrize(
    "wrong", [{"max_num_seqs": 0}, {"budget": 0}, {"ageing_steps": 0}, {"num_blocks": 7}, {"max_model_len": 33}]
)
def test_numbers_with_which_some_sequence_could_never_run_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"at least 1|fewer than one context"):
        Simulation(**{"num_blocks": 8, **wrong})  # type: ignore[arg-type]


def test_decoding_goes_first_and_a_long_prompt_takes_what_is_left() -> None:
    sim = Simulation(max_model_len=64)
    short = [sim.add(prompt(2, first), params(30)) for first in (1, 2, 3)]
    sim.step()
    long = sim.add(prompt(40, 9), params(2))
    plans = [(counts(sim.schedule()), sim.update())[0] for _ in range(5)]
    assert [plan.pop(long) for plan in plans] == [13, 13, 13, 1, 1]
    assert plans == [dict.fromkeys(short, 1)] * 5  # none of them missed a step


def test_a_prompt_under_way_goes_before_new_ones() -> None:
    sim = Simulation(budget=10)
    first, second = sim.add(prompt(15, 1)), sim.add(prompt(15, 2))
    assert counts(sim.schedule()) == {first: 10}
    sim.update()
    assert counts(sim.schedule()) == {first: 5, second: 5}


def test_the_budget_may_change_between_steps() -> None:
    sim = Simulation(max_model_len=64)
    sim.add(prompt(40))
    assert counts(sim.schedule()) == {1: 16}
    sim.update()
    sim.scheduler.token_budget = 3
    assert counts(sim.schedule()) == {1: 3}


def test_a_budget_below_the_number_of_streams_serves_the_oldest() -> None:
    sim = Simulation()
    for first in range(4):
        sim.add(prompt(2, first))
    sim.step()
    sim.scheduler.token_budget = 2
    assert counts(sim.schedule()) == {1: 1, 2: 1}


def test_no_more_run_than_there_are_seats_and_one_that_ends_leaves_its_seat_at_once() -> None:
    sim = Simulation(max_num_seqs=2)
    for first in (1, 2, 3):
        sim.add(prompt(2, first), params(first))
    assert added(sim.schedule()) == [1, 2]
    sim.update()
    plan = sim.schedule()
    assert plan is not None
    assert plan.removed == [1]
    assert added(plan) == [3]


def test_nothing_to_do_is_no_plan() -> None:
    assert Simulation().schedule() is None


def test_the_runner_is_told_of_each_block_once() -> None:
    sim = Simulation(budget=6)
    sim.add(prompt(10), params(8))
    told: list[tuple[int, int]] = []
    while sim.live:
        plan = sim.schedule()
        assert plan is not None
        told += [(chunk.first_block, len(chunk.blocks)) for chunk in plan.chunks]
        sim.update()
    assert told == [(0, 3), (3, 0), (3, 0), (3, 0), (3, 1), (4, 0), (4, 0), (4, 0), (4, 1)]


# === Order, priority, ageing ===


def test_first_come_first_served_within_a_priority_and_lower_numbers_first() -> None:
    sim = Simulation(max_num_seqs=1)
    for priority in (1, 0, 1, 0, -1):
        sim.add(prompt(2), params(1), priority=priority)
    order = [(added(sim.schedule()), sim.update())[0] for _ in range(5)]
    assert order == [[5], [2], [4], [1], [3]]


def test_ageing_bounds_the_wait_behind_a_flood_of_higher_priority() -> None:
    sim = Simulation(max_num_seqs=1, ageing_steps=8)
    patient = sim.add(prompt(2), params(1), priority=2)
    while patient in sim.live:
        sim.add(prompt(2), params(1))
        sim.step()
    assert sim.steps == 2 * 8 + 1


def test_a_large_head_of_the_queue_is_not_overtaken_by_small_ones() -> None:
    sim = Simulation(num_blocks=8)
    sim.add(prompt(16, 1), params(8))
    sim.step()
    large, small = sim.add(prompt(31, 2), params(1)), sim.add(prompt(2, 3), params(1))
    starts: list[int] = []
    while sim.live:
        starts += added(sim.schedule())
        sim.update()
    assert starts == [large, small]


# === Preemption ===


def crowd() -> Simulation:
    """Two sequences of priority 0 and two of 1 that fill a pool of eight blocks exactly, and will want more."""
    sim = Simulation(num_blocks=8, block_size=4, budget=64)
    for priority, first in ((0, 1), (1, 2), (0, 3), (1, 4)):
        sim.add(prompt(1, first), params(20), priority=priority)
    sim.step(4)
    assert sim.pool.num_used == 4
    sim.step(4)
    assert sim.pool.num_used == 8
    return sim


def test_the_lowest_priority_goes_first_and_of_these_the_newest() -> None:
    sim = crowd()
    plan = sim.schedule()
    assert plan is not None
    assert plan.removed == [4, 2]  # the two blocks of 4 go to 1 and 3; 2 can only take its own
    assert [chunk.id for chunk in plan.chunks] == [1, 3]
    assert sim.scheduler.preemptions == 2


def test_nothing_is_admitted_in_a_step_that_preempts() -> None:
    sim = Simulation(num_blocks=8, block_size=4, budget=64, ageing_steps=100)
    sim.add(prompt(1, 1), params(20))
    large = sim.add(prompt(16, 2), params(12), priority=1)
    sim.step(8)
    assert sim.pool.num_free == 0
    small = sim.add(prompt(1, 3), params(1))
    plan = sim.schedule()
    assert plan is not None
    assert (plan.removed, plan.added, sim.pool.num_free) == ([large], [], 5)
    sim.update()
    assert added(sim.schedule()) == [small]


def test_a_preempted_sequence_resumes_with_its_tokens_before_later_ones() -> None:
    sim = Simulation(num_blocks=8, block_size=4)
    sim.add(prompt(1, 1), params(24))
    preempted = sim.add(prompt(1, 2), params(24))
    sim.step(2)
    later = sim.add(prompt(20, 3), params(1))
    resumed: list[NewSequence] = []
    while sim.live:
        plan = sim.schedule()
        assert plan is not None
        resumed += plan.added
        sim.update()
    assert [(new.id, len(new.prompt), len(new.output)) for new in resumed] == [(preempted, 1, 16), (later, 20, 0)]


def test_a_preempted_sequence_finds_again_what_nobody_took() -> None:
    sim = crowd()
    sim.step()
    assert sim.pool.num_used == 6
    sim.abort(1)
    plan = sim.schedule()
    assert plan is not None
    assert [(chunk.id, chunk.start) for chunk in plan.chunks if chunk.id != 3] == [(2, 8)]


def test_a_lone_sequence_always_fits() -> None:
    for length in (1, 30, 31):
        sim = Simulation(num_blocks=8, block_size=4, max_model_len=32)
        sim.add(prompt(length), params(99))
        sim.drain()
        assert sim.scheduler.preemptions == 0


def test_three_preemptions_reserve_the_whole_need_and_it_is_left_alone() -> None:
    sim = Simulation(num_blocks=40, block_size=1, budget=64, max_model_len=32, ageing_steps=1000)
    victim = sim.add(prompt(1, 1), params(31), priority=1)
    sim.step()
    strangers = 1

    def add_stranger(length: int, max_tokens: int) -> None:
        nonlocal strangers
        strangers += 1
        sim.add(prompt(length, strangers), params(max_tokens))

    while sim.live[victim].admissions <= PREEMPTIONS_BEFORE_RESERVE:
        if sim.running == {victim}:
            half = (sim.pool.num_free - 4) // 2
            add_stranger(half, 4)  # in a step or two nothing is left
            add_stranger(half, 4)
        sim.step()
    assert len(sim.runner.rows[victim].blocks) == 32  # all it may ever need, though it has fewer tokens as yet
    assert sim.scheduler.preemptions == PREEMPTIONS_BEFORE_RESERVE
    add_stranger(4, 8)  # eleven blocks, of eight that are left: it is the stranger who must yield
    while victim in sim.live:
        sim.step()
    assert sim.scheduler.preemptions > PREEMPTIONS_BEFORE_RESERVE
    sim.drain()


def test_demand_of_four_pools_is_met_without_waste() -> None:
    sim = Simulation(num_blocks=64, block_size=4, max_num_seqs=32, budget=64, max_model_len=64)
    for first in range(32):
        sim.add(prompt(8, first), params(24))
    sim.drain()
    assert sim.scheduler.preemptions > 0
    assert sim.steps < 4 * 24 * 1.25  # four times the pool at one token each: at least 80 % of what it could


# === What nobody waits for ===


def test_it_gives_its_seat_to_the_first_who_comes() -> None:
    sim = Simulation(max_num_seqs=2)
    lines = [sim.add(prompt(2, i), params(20), priority=BACKGROUND) for i in (1, 2)]
    sim.step(3)
    live = sim.add(prompt(2, 3), params(4))
    plan = sim.schedule()
    assert plan is not None
    assert (added(plan), plan.removed) == ([live], [lines[1]])
    sim.drain()
    assert [client.message.id for client in sim.ended] == [live, *lines]


def test_it_gives_its_blocks_and_no_more_of_them_than_are_needed() -> None:
    sim = Simulation(num_blocks=8, max_model_len=32)
    lines = [sim.add(prompt(8, i), params(4), priority=BACKGROUND) for i in (1, 2, 3)]
    sim.step(6)
    assert sim.running >= set(lines[:2])
    live = sim.add(prompt(12, 4), params(2))
    plan = sim.schedule()
    assert added(plan) == [live]
    assert lines[0] in sim.running
    sim.drain()


def test_others_do_not_make_way_for_it_nor_is_it_overtaken_by_its_like() -> None:
    sim = Simulation(max_num_seqs=1)
    running = sim.add(prompt(2, 1), params(6), priority=2)
    sim.step()
    waiting = [sim.add(prompt(2, 2), params(2), priority=BACKGROUND) for _ in range(2)]
    live = sim.add(prompt(2, 3), params(2))
    sim.drain()
    assert [client.message.id for client in sim.ended] == [running, live, *waiting]


def test_its_prompts_get_a_small_part_of_a_step_and_it_rests_while_others_compute_theirs() -> None:
    sim = Simulation(budget=16, ageing_steps=1)
    line = sim.add(prompt(20, 1), params(2), priority=BACKGROUND)
    assert counts(sim.schedule()) == {line: 2}
    sim.update()
    live = sim.add(prompt(15, 2), params(2))
    assert counts(sim.schedule()) == {live: 15}
    sim.update()
    assert counts(sim.schedule()) == {live: 1, line: 2}
    sim.drain()


def test_no_flood_of_others_has_it_age() -> None:
    sim = Simulation(max_num_seqs=1, ageing_steps=1)
    sim.add(prompt(2, 1), params(1), priority=BACKGROUND)
    for i in range(40):
        sim.add(prompt(2, i), params(1))
    sim.drain()
    assert sim.ended[-1].message.priority == BACKGROUND


# === Leaving ===


def test_an_unknown_id_is_ignored() -> None:
    Simulation().scheduler.abort(77)


def test_abort_while_waiting() -> None:
    sim = Simulation(max_num_seqs=1)
    running, waiting = sim.add(prompt(2)), sim.add(prompt(2))
    sim.step()
    sim.abort(waiting)
    sim.abort(waiting)
    assert sim.scheduler.stats().waiting == 0
    sim.drain()
    assert [client.message.id for client in sim.ended] == [running]


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_abort_in_prefill_and_in_decode_frees_its_blocks_within_the_step(steps: int) -> None:
    sim = Simulation(budget=4)
    gone = sim.add(prompt(10))
    sim.step(steps)
    assert sim.pool.num_used > 0
    sim.abort(gone)
    assert sim.pool.num_used == 0
    sim.add(prompt(2))
    plan = sim.schedule()
    assert plan is not None
    assert plan.removed == [gone]


def test_abort_while_preempted() -> None:
    sim = crowd()
    sim.step()
    sim.abort(4)
    sim.drain()


@pytest.mark.parametrize("max_tokens", [1, 8])
def test_abort_between_plan_and_result(max_tokens: int) -> None:
    sim = Simulation()
    gone, stays = sim.add(prompt(6), params(max_tokens)), sim.add(prompt(6), params(max_tokens))
    sim.schedule()
    sim.abort(gone)
    assert [output.id for output in sim.update()] == [stays]
    sim.drain()


def test_abort_after_the_end() -> None:
    sim = Simulation()
    gone = sim.add(prompt(2), params(1))
    sim.step()
    assert not sim.live
    sim.abort(gone)
    sim.drain()


def test_aborting_all_the_samples_of_a_prompt_frees_what_they_shared() -> None:
    sim = Simulation()
    ids = [sim.add(prompt(9)) for _ in range(5)]
    sim.step(2)
    for id_ in ids:
        sim.abort(id_)
    assert sim.pool.num_used == 0
    assert sim.scheduler.idle


# === The prefix cache ===


def cached(sim: Simulation, tokens: list[int], **fields: Any) -> int:
    """Run one sequence to its end; how many prompt tokens it found in the cache."""
    sim.add(tokens, fields.pop("params", params(1)), **fields)
    sim.drain()
    return sim.ended[-1].told_cached[0]


@pytest.mark.parametrize(
    ("length", "hit"), [(1, 0), (3, 0), (4, 3), (5, 4), (7, 4), (8, 7), (9, 8), (12, 11), (13, 12), (15, 12), (31, 12)]
)
def test_how_much_of_a_prompt_is_found_after_one_of_13_in_blocks_of_4(length: int, hit: int) -> None:
    sim = Simulation()
    assert cached(sim, prompt(13)) == 0
    assert cached(sim, prompt(length)) == hit  # the last token is always computed


def test_the_output_is_found_too() -> None:
    sim = Simulation()
    cached(sim, prompt(5), params=params(8))
    assert cached(sim, [*prompt(5), *sim.ended[0].output, 77]) == 12


def test_a_whole_prompt_found_costs_one_token() -> None:
    sim = Simulation()
    cached(sim, prompt(16))
    again = sim.add(prompt(16))
    assert counts(sim.schedule()) == {again: 1}


def test_salts_keep_prompts_apart() -> None:
    sim = Simulation()
    assert [cached(sim, prompt(9), salt=salt) for salt in (b"a", b"b", b"", b"a", b"b", b"")] == [0, 0, 0, 8, 8, 8]


def test_switched_off_nothing_is_found_nor_asked() -> None:
    sim = Simulation(caching=False)
    assert [cached(sim, prompt(9)) for _ in range(2)] == [0, 0]
    stats = sim.scheduler.stats()
    assert (stats.prefix_queries, stats.prefix_hits) == (0, 0)


def test_queries_and_hits_are_counted_in_prompt_tokens() -> None:
    sim = Simulation()
    for length in (9, 9, 5):
        cached(sim, prompt(length))
    stats = sim.scheduler.stats()
    assert (stats.prefix_queries, stats.prefix_hits) == (23, 12)


def test_a_prompt_whose_scores_are_wanted_is_computed_whole() -> None:
    sim = Simulation()
    cached(sim, prompt(16))
    scored = params(0, prompt_logprobs=0)
    assert [cached(sim, prompt(16), params=scored) for _ in range(2)] == [0, 0]  # Simulation has compared the scores
    assert cached(sim, prompt(16)) == 15  # and others may find it


def test_scores_are_told_once_though_preemption_computes_them_twice() -> None:
    sim = Simulation(num_blocks=8, block_size=4, budget=8, caching=False, ageing_steps=1000)
    sim.add(prompt(3, 1), params(29))
    sim.add(prompt(16, 2), params(12, prompt_logprobs=1), priority=1)
    sim.drain()
    assert sim.scheduler.preemptions > 0


@pytest.mark.parametrize(("caching", "resumed_at"), [(True, 5), (False, 0)])
def test_a_prompt_scored_in_part_goes_on_from_there_at_the_latest(caching: bool, resumed_at: int) -> None:
    sim = Simulation(num_blocks=9, block_size=4, budget=16, caching=caching)
    sim.add(prompt(15), params(8))
    sim.step()
    scored = sim.add(prompt(15), params(2, prompt_logprobs=0), priority=1)
    starts: list[int] = []
    while sim.live:
        # A token each until the first needs a block of the second, which then holds five scored tokens.
        sim.scheduler.token_budget = 16 if sim.scheduler.preemptions else 2
        plan = sim.schedule()
        assert plan is not None
        if scored in added(plan):
            starts += [chunk.start for chunk in plan.chunks if chunk.id == scored]
        sim.update()
    assert starts == [0, resumed_at]  # 5 is in the middle of a block that the first one holds


def test_n_samples_start_together_and_compute_their_prompt_once() -> None:
    sim = Simulation(budget=32)
    first, *others = [sim.add(prompt(15), params(8), choice=k) for k in range(5)]
    assert counts(sim.schedule()) == {first: 15, **dict.fromkeys(others, 3)}
    assert sim.pool.num_used == 3 + 5
    sim.update()
    sim.drain()


def test_n_samples_wait_for_a_prompt_that_takes_several_steps() -> None:
    sim = Simulation(budget=8)
    ids = [sim.add(prompt(15), params(8), choice=k) for k in range(3)]
    plans = [(counts(sim.schedule()), sim.update())[0] for _ in range(3)]
    assert plans == [{ids[0]: 8}, {ids[0]: 7, ids[1]: 1}, {ids[0]: 1, ids[1]: 2, ids[2]: 3}]  # 12 found, 3 computed


# === Planning ahead of results ===


def test_a_step_is_planned_before_the_last_ones_token_is_known() -> None:
    sim = Simulation(depth=2)
    sim.add(prompt(3), params(3))
    chunks: list[list[ScheduledChunk]] = []
    while sim.live:
        while plan := sim.schedule():
            chunks.append(plan.chunks)
        sim.update()
    assert [(chunk.start, chunk.count) for (chunk,) in chunks] == [(0, 3), (3, 1), (4, 1)]  # and none for nothing


def test_a_sequence_that_ends_while_the_next_step_computes_it_ends_once() -> None:
    sim = Simulation(depth=2)
    message = Add(id=0, prompt=prompt(3), params=params(8))
    second = alone(message, 32)[0][1]
    sim.add(message.prompt, params(8, stop_token_ids=(second,)))
    sim.schedule()
    sim.schedule()
    sim.update()
    sim.schedule()
    assert sim.update()[0].finish is FinishReason.STOP
    assert sim.pool.num_used == 0
    assert sim.update() == []


@pytest.mark.parametrize("length", [5, 7, 8, 9, 13])
def test_those_that_go_on_from_a_sequence_compute_one_token_each(length: int) -> None:
    """Beams: the last block of the one that ended is copied for each of them, full or not."""
    sim = Simulation(block_size=4, num_blocks=64, budget=64)
    sim.add(prompt(length), params(1), continued=True)
    sim.step(2)
    (ended,) = sim.ended
    for token in (ended.output[0], 9, 8):
        sim.add([*prompt(length), token], params(1), continued=True)
    plan = sim.schedule()
    assert plan is not None
    assert [(chunk.start, chunk.count) for chunk in plan.chunks] == [(length, 1)] * 3
    assert all((chunk.copied is None) is (length % 4 == 0) for chunk in plan.chunks)
    sim.drain()


def test_others_find_full_blocks_alone() -> None:
    sim = Simulation(block_size=4, num_blocks=64, budget=64)
    sim.add(prompt(7), params(1))
    sim.step(2)
    sim.add([*prompt(7), 9], params(1))
    plan = sim.schedule()
    assert plan is not None
    assert [(chunk.start, chunk.count, chunk.copied) for chunk in plan.chunks] == [(4, 4, None)]
    sim.drain()
