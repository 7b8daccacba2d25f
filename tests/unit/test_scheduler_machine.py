"""Arrivals, aborts, steps and budgets in any order: whatever happens, the promises of `Simulation` hold."""

from __future__ import annotations

from random import Random
from typing import ClassVar

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from simulation import Eager, Simulation, alone

from model.sampling_params import SamplingParams
from server.worker.messages import BACKGROUND, Add

SHARED = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4]  # prompts are its beginnings
MAX_MODEL_LEN = 40


def family(sim: Simulation, random: Random, siblings: int) -> None:
    """Queue the `siblings` choices of one prompt; now and then as a worker that died left them."""
    shared = random.randrange(len(SHARED))
    prompt = SHARED[:shared] + [random.randrange(1, 10) for _ in range(random.randrange(0 if shared else 1, 4))]
    prompt = prompt[: sim.scheduler.max_model_len - 1]
    scored = random.random() < 0.2
    params = {
        "seed": random.randrange(1000),
        "max_tokens": random.choice([0, 1, 5, 12, 30]) if scored else random.choice([1, 5, 12, 30, 30]),
        "min_tokens": random.choice([0, 0, 1, 4]),
        "stop_token_ids": random.choice([(), (), (7,), (3, 7)]),
        "ignore_eos": random.random() < 0.7,
        "prompt_logprobs": 1 if scored else None,
    }
    owner, continued = random.choice(sim.owners), random.random() < 0.3
    priority, salt = random.choice([0, 0, 0, 1, -1, 2, BACKGROUND]), random.choice([b"", b"", b"a"])
    for choice in range(siblings):
        whole = Add(id=0, prompt=prompt, params=SamplingParams(**params), choice=choice, salt=salt)  # type: ignore[arg-type]
        output, _ = alone(whole, sim.scheduler.max_model_len)
        kept = random.randrange(len(output)) if output and not scored and random.random() < 0.1 else 0
        sim.add(
            prompt,
            whole.params,
            choice=choice,
            output=output[:kept],
            priority=priority,
            owner=owner,
            continued=continued,
            salt=salt,
        )


def new_simulation(random: Random) -> Simulation:
    block_size = random.choice([1, 2, 3, 4, 8])
    least = -(-MAX_MODEL_LEN // block_size)
    return Simulation(
        owners=random.choice(["", "", "ab", "abc"]) or ("",),
        num_blocks=least + random.choice([0, 1, least // 2, least, 3 * least]),
        block_size=block_size,
        max_num_seqs=random.choice([1, 4, 12, 12, 12]),
        budget=random.choice([5, 16, 64]),
        max_model_len=MAX_MODEL_LEN,
        ageing_steps=random.choice([1, 4, 20]),
        caching=random.random() < 0.8,
        depth=random.choice([1, 1, 2, 3]),
        speculation=Eager(random.choice([1, 3, 8]), cost=0.0) if random.random() < 0.5 else None,
    )


class SchedulerMachine(RuleBasedStateMachine):
    operations: ClassVar[int] = 0
    preemptions: ClassVar[int] = 0
    hits: ClassVar[int] = 0
    accepted: ClassVar[int] = 0

    @initialize(random=st.randoms(use_true_random=True))
    def start(self, random: Random) -> None:
        self.sim = new_simulation(random)

    @precondition(lambda self: len(self.sim.live) < 30)
    @rule(random=st.randoms(use_true_random=True), families=st.lists(st.integers(1, 6), min_size=1, max_size=5))
    def arrive(self, random: Random, families: list[int]) -> None:
        for siblings in families:
            family(self.sim, random, siblings)

    @rule(which=st.integers(min_value=0))
    def abort(self, which: int) -> None:
        ids = [0, *self.sim.live, *(client.message.id for client in self.sim.ended[-2:])]  # strangers and the dead too
        self.sim.abort(ids[which % len(ids)])

    @precondition(lambda self: self.sim.live)
    @rule(count=st.integers(1, 12))
    def run(self, count: int) -> None:
        self.sim.step(count)

    @precondition(lambda self: self.sim.live)
    @rule()
    def run_ahead(self) -> None:
        self.sim.schedule()

    @precondition(lambda self: self.sim.in_flight)
    @rule()
    def catch_up(self) -> None:
        self.sim.update()

    @rule(budget=st.sampled_from([64, 16, 5, 2, 1]))
    def set_budget(self, budget: int) -> None:
        self.sim.scheduler.token_budget = budget

    def teardown(self) -> None:
        if hasattr(self, "sim"):
            self.sim.scheduler.token_budget = max(self.sim.scheduler.token_budget, 16)  # spend the time elsewhere
            self.sim.drain()
            SchedulerMachine.operations += self.sim.operations
            SchedulerMachine.preemptions += self.sim.scheduler.preemptions
            SchedulerMachine.hits += self.sim.scheduler.prefix_hits
            SchedulerMachine.accepted += sum(self.sim.scheduler.accepted_at)


def run_machine(examples: int, at_least: int) -> None:
    SchedulerMachine.operations = SchedulerMachine.preemptions = SchedulerMachine.hits = SchedulerMachine.accepted = 0
    run_state_machine_as_test(
        SchedulerMachine,
        settings=settings(
            max_examples=examples, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
    assert SchedulerMachine.operations >= at_least
    assert SchedulerMachine.preemptions > at_least / 20_000, "the pools were never short"
    assert SchedulerMachine.hits > at_least / 100, "nothing was shared"
    assert SchedulerMachine.accepted > at_least / 1000, "no guess was right"


def test_every_promise_holds_over_100_000_operations() -> None:
    run_machine(examples=75, at_least=100_000)


@pytest.mark.slow
def test_every_promise_holds_over_a_million_operations() -> None:
    run_machine(examples=750, at_least=1_000_000)
