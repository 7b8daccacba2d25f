"""Whoever kills workers is found, alone fails, and costs no more than four deaths; nobody else fails at all."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from server.engine.quarantine import Quarantine

TOKENS = 6  # of each sequence
DEATHS_PER_KILLER = 4


@dataclass
class Service:
    """An engine with workers that compute one token of each of `seats` sequences in a step."""

    kills_at: dict[int, int | None]  # by sequence: the token at which it kills its worker, if any
    workers: int = 1
    seats: int = 64
    quarantine: Quarantine = field(default_factory=Quarantine)
    tokens: dict[int, int] = field(default_factory=dict)  # of sequences that are neither done nor failed
    at: dict[int, int] = field(default_factory=dict)  # by sequence: the worker that has it
    done: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    deaths: int = 0

    def arrive(self, id_: int) -> None:
        self.tokens[id_] = 0
        self.send([id_])

    def send(self, ids: list[int]) -> None:
        for id_ in self.quarantine.admit(ids):
            loads = [list(self.at.values()).count(worker) for worker in range(self.workers)]
            self.at[id_] = loads.index(min(loads))

    def send_waiting(self) -> None:
        self.send([id_ for id_ in self.tokens if id_ not in self.at])

    def leave(self, id_: int) -> None:
        """Done, failed, or the client has gone."""
        del self.tokens[id_]
        self.at.pop(id_, None)
        if self.quarantine.cleared(id_):
            self.send_waiting()

    def die(self, worker: int) -> None:
        self.deaths += 1
        lost = [id_ for id_, where in self.at.items() if where == worker]
        for id_ in lost:
            del self.at[id_]
        killer = self.quarantine.died(lost, lost, killed=False)
        if killer is not None:
            self.failed.add(killer)
            self.leave(killer)
        self.send_waiting()

    def step(self, worker: int) -> None:
        batch = [id_ for id_, where in self.at.items() if where == worker][: self.seats]
        if any(self.kills_at[id_] == self.tokens[id_] for id_ in batch):
            self.die(worker)
            return
        for id_ in batch:
            self.tokens[id_] += 1
            cleared = self.quarantine.cleared(id_)
            if self.tokens[id_] == TOKENS:
                self.done.add(id_)
                self.leave(id_)
            if cleared:
                self.send_waiting()


killers = st.lists(st.one_of(st.none(), st.none(), st.integers(0, TOKENS - 1)), min_size=1, max_size=12)


@given(killers, st.integers(1, 3), st.integers(1, 12), st.data())
def test_all_innocents_finish_and_every_killer_fails(
    kills: list[int | None], workers: int, seats: int, data: st.DataObject
) -> None:
    service = Service(dict(enumerate(kills)), workers, seats)
    arrivals = data.draw(st.lists(st.integers(0, 30), min_size=len(kills), max_size=len(kills)))
    for moment in range(400):
        for id_, when in enumerate(arrivals):
            if when == moment:
                service.arrive(id_)
        service.step(moment % workers)
    guilty = {id_ for id_, at in enumerate(kills) if at is not None}
    assert service.failed == guilty
    assert service.done == set(range(len(kills))) - guilty
    assert service.deaths <= DEATHS_PER_KILLER * len(guilty)
    assert service.at == {}


@given(killers, st.lists(st.sampled_from(["step", "step", "die", "leave"]), max_size=60), st.data())
def test_deaths_from_outside_and_clients_that_leave_keep_nobody_waiting(
    kills: list[int | None], events: list[str], data: st.DataObject
) -> None:
    service = Service(dict(enumerate(kills)))
    for id_ in range(len(kills)):
        service.arrive(id_)
    for event in events:
        if event == "die":
            service.die(0)
        elif event == "leave" and service.tokens:
            service.leave(data.draw(st.sampled_from(sorted(service.tokens))))
        else:
            service.step(0)
    for _ in range(400):
        service.step(0)
    assert not service.tokens


def test_a_worker_killed_from_outside_after_every_step_makes_nobody_guilty() -> None:
    service = Service(dict.fromkeys(range(8)))
    for id_ in range(8):
        service.arrive(id_)
    for _ in range(2 * TOKENS):
        service.die(0)
        service.step(0)
    assert service.done == set(range(8))


def test_the_usual_case_costs_three_deaths() -> None:
    service = Service({id_: 2 if id_ == 7 else None for id_ in range(8)})
    for id_ in range(8):
        service.arrive(id_)
    for _ in range(100):
        service.step(0)
    assert service.failed == {7}
    assert service.deaths == 3


def test_a_worker_that_had_not_begun_on_a_sequence_says_nothing_about_it() -> None:
    quarantine = Quarantine()
    for _ in range(9):
        assert quarantine.died([1], [], killed=True) is None
        assert quarantine.admit([1, 2]) == [1, 2]
    assert quarantine.died([1, 2], [1], killed=False) is None
    assert quarantine.died([1, 2], [1], killed=False) == 1


def test_killers_that_the_kernel_ends_for_their_memory_are_found_too() -> None:
    quarantine, deaths = Quarantine(), 0
    waiting = list(range(8))
    while True:
        here = quarantine.admit(waiting)
        if 7 not in here:
            for id_ in here:
                quarantine.cleared(id_)
                waiting.remove(id_)
            continue
        deaths += 1
        if (killer := quarantine.died(here, here, killed=True)) is not None:
            break
    assert killer == 7
    assert deaths == 4
