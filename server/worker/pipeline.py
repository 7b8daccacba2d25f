"""Steps under way: planned, launched, and taken in again in order. Knows nothing of messages."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from model.step import Pending, StepPlan, StepResult
from server.worker.messages import SequenceOutput
from server.worker.scheduler import Scheduler


class StepRunner(Protocol):
    @property
    def ahead(self) -> int:
        """How many plans may be launched beyond the last one whose result was taken: 0 where launching is running."""
        ...

    def launch(self, plan: StepPlan) -> Pending: ...


@dataclass(frozen=True, slots=True)
class Flight:
    plan: StepPlan
    pending: Pending
    schedule: float  # seconds
    launch: float


@dataclass(frozen=True, slots=True)
class Landed:
    """A step that is over, what it said, and the seconds it took from us."""

    plan: StepPlan
    result: StepResult
    outputs: list[SequenceOutput]
    schedule: float
    run: float  # launching it, and waiting for it
    update: float


class Pipeline:
    def __init__(
        self, scheduler: Scheduler, runner: StepRunner, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._clock = clock
        self._flying: deque[Flight] = deque()

    @property
    def empty(self) -> bool:
        return not self._flying

    def step(self) -> Landed | None:
        """Launch what there is to launch, and take in the oldest step once enough are ahead of it. None when idle."""
        while len(self._flying) <= self._runner.ahead:
            began = self._clock()
            plan = self._scheduler.schedule()
            if plan is None:
                break
            planned = self._clock()
            pending = self._runner.launch(plan)
            self._flying.append(Flight(plan, pending, planned - began, self._clock() - planned))
        return self._land(self._flying.popleft()) if self._flying else None

    def _land(self, flight: Flight) -> Landed:
        began = self._clock()
        result = flight.pending.result()
        arrived = self._clock()
        outputs = self._scheduler.update(flight.plan, result)
        run, update = flight.launch + arrived - began, self._clock() - arrived
        return Landed(flight.plan, result, outputs, flight.schedule, run, update)
