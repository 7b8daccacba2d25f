"""What one key's requests may do to another's: the scheduler, the queue, and the counters that say whose turn it is."""

from __future__ import annotations

from collections import Counter

import pytest
from simulation import Simulation

from model.sampling_params import SamplingParams
from server.engine.admission import Admission
from server.errors import Overloaded
from server.worker.shares import Shares

HUGE = 2**31
RICH = {"num_blocks": 512, "max_model_len": 64, "max_num_seqs": 8, "budget": 32}


def wish(tokens: int) -> SamplingParams:
    return SamplingParams(seed=1, max_tokens=tokens, ignore_eos=True)


def prompt(seed: int, length: int) -> list[int]:
    return [1 + (seed * 7 + i * i) % 10 for i in range(length)]


def steps_until_ended(sim: Simulation, id_: int, most: int) -> int:
    for step in range(most):
        sim.step()
        if id_ not in sim.live:
            return step + 1
    raise AssertionError("it waits for others")


@pytest.mark.parametrize("priority", [0, -HUGE])
@pytest.mark.parametrize("length", [3, 40])
def test_one_request_among_five_hundred_of_another_key_is_served_as_if_there_were_few(
    priority: int, length: int
) -> None:
    sim = Simulation(**RICH)  # type: ignore[arg-type]
    for i in range(500):
        sim.add(prompt(i, length), wish(20), owner="crowd", priority=priority)
    sim.step(5)
    id_ = sim.add(prompt(0, length), wish(5), owner="one")
    # Its prompt, five tokens, and now and then a step that computes a prompt of the other.
    assert steps_until_ended(sim, id_, 20) <= 6 + -(-length // 16)
    sim.step(30)
    assert sim.scheduler.preemptions <= 2, "a seat is taken from another once, and not with every token"


def test_two_keys_that_ask_for_more_than_there_is_get_the_same() -> None:
    sim = Simulation(**RICH)  # type: ignore[arg-type]
    for i in range(120):
        sim.add(prompt(i, 9), wish(20), owner="many")
    sim.step(10)
    for i in range(40):
        sim.add(prompt(i, 9), wish(20), owner="few")
    before = tokens_by_owner(sim)
    sim.step(150)
    gained = tokens_by_owner(sim) - before
    assert 0.8 < gained["few"] / gained["many"] < 1.25


def test_a_key_alone_has_all_of_it() -> None:
    sim = Simulation(**RICH)  # type: ignore[arg-type]
    sim.add(prompt(0, 3), wish(3), owner="gone")
    sim.step(8)
    assert not sim.live
    for i in range(20):
        sim.add(prompt(i, 3), wish(20), owner="alone")
    sim.step(4)
    assert len(sim.running) == 8
    assert sim.scheduler.preemptions == 0


def test_a_priority_orders_the_requests_of_its_own_key() -> None:
    sim = Simulation(**RICH)  # type: ignore[arg-type]
    for i in range(20):
        sim.add(prompt(i, 9), wish(10), owner="a")
        sim.add(prompt(i, 9), wish(10), owner="b")
    late = sim.add(prompt(0, 9), wish(10), owner="a", priority=-1)
    urgent = sim.add(prompt(0, 9), wish(10), owner="a", priority=-HUGE)
    waiting_of_a = [id_ for id_ in sim.live if sim.live[id_].message.owner == "a" and id_ not in {late, urgent}]
    ended: list[int] = []
    while sim.live:
        before = list(sim.live)
        sim.step()
        ended += [id_ for id_ in before if id_ not in sim.live]
    order = {id_: place for place, id_ in enumerate(ended)}
    assert order[urgent] < order[waiting_of_a[8]]
    assert order[late] < order[waiting_of_a[8]]


def test_nobody_saves_up_a_claim_while_away() -> None:
    shares = Shares()
    shares.joined("here")
    shares.charge("here", 1000)
    shares.joined("new")
    assert shares.served("new") == 1000
    shares.charge("new", 10)
    shares.left("new")
    shares.charge("here", 500)
    shares.joined("new")
    assert shares.served("new") == 1500
    shares.left("here")
    shares.joined("here")
    assert shares.served("here") == 1500, "nor does leaving wipe out what one has had"


def tokens_by_owner(sim: Simulation) -> Counter[str]:
    tokens: Counter[str] = Counter()
    for client in [*sim.live.values(), *sim.ended]:
        tokens[client.message.owner] += len(client.output)
    return tokens


def test_a_full_queue_still_takes_another_keys_share_of_it() -> None:
    admission = Admission(max_queued_requests=8, max_queued_tokens=800)
    full = [("crowd", 100)] * 8
    for queued in (full, [*full, ("one", 100)], [*full, *[("one", 100)] * 3]):
        with pytest.raises(Overloaded):
            admission.check("crowd", 1, queued, 1.0)
        admission.check("one", 100, queued, 1.0)
    with pytest.raises(Overloaded):
        admission.check("one", 1, [*full, *[("one", 100)] * 4], 1.0)
    admission.check("third", 700, [*full, ("one", 100)], 1.0)  # all that it asks for
    with pytest.raises(Overloaded):
        admission.check("", 1, [("", 100)] * 8, 1.0)
    admission.check("", 799, [("", 1)], 1.0)
    with pytest.raises(Overloaded):
        admission.check("", 800, [("", 1)], 1.0)
