"""How long the scheduler itself takes, without a network: `python -m benchmarks.scheduler`.

An operation is one `add`, `abort`, `schedule` or `update`. The lines to hold: 20,000 operations a second, and
`schedule` within 2 ms at 256 running and 1,000 waiting. Medians, since the machine may be busy with other things.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter

from model.sampling_params import SamplingParams
from model.step import SampledToken, StepPlan, StepResult
from server.worker.block_pool import BlockPool
from server.worker.messages import Add
from server.worker.scheduler import Scheduler

Row = tuple[str, float, str]


def new_scheduler(num_blocks: int, max_num_seqs: int = 256) -> Scheduler:
    return Scheduler(
        BlockPool(num_blocks, 16),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=2048,
        max_model_len=1024,
        eos_token_ids=(50256,),
    )


def new_message(id_: int, prompt: int, max_tokens: int, prefix: tuple[int, ...] = ()) -> Add:
    """A prompt like no other's, but for its prefix."""
    tokens = [*prefix, *((id_ * 1024 + i) % 50256 for i in range(prompt))]
    return Add(id=id_, prompt=tokens, params=SamplingParams(seed=id_, max_tokens=max_tokens))


def next_plan(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule()
    if plan is None:
        raise SystemExit("the benchmark ran out of work")
    return plan


def answer(plan: StepPlan) -> StepResult:
    return StepResult(sampled=[SampledToken(chunk.id, 7) for chunk in plan.chunks if chunk.samples])


def timed(call: Callable[[], object]) -> float:
    began = perf_counter()
    call()
    return perf_counter() - began


def crowded(waiting: int) -> Scheduler:
    """256 decoding, and so many behind them."""
    scheduler = new_scheduler(num_blocks=32768)
    for i in range(256):
        scheduler.add(new_message(i, 64, 900))
    chunks = 0
    while chunks < 256:
        plan = next_plan(scheduler)
        scheduler.update(plan, answer(plan))
        chunks = len(plan.chunks)
    for i in range(waiting):
        scheduler.add(new_message(1000 + i, 256, 64))
    return scheduler


def decode_steps() -> list[Row]:
    scheduler = crowded(waiting=1000)
    schedule, update = [], []
    for _ in range(400):
        began = perf_counter()
        plan = next_plan(scheduler)
        planned = perf_counter()
        result = answer(plan)
        answered = perf_counter()
        scheduler.update(plan, result)
        update.append(perf_counter() - answered)
        schedule.append(planned - began)
    return [
        ("schedule, 256 decoding and 1,000 waiting", median(schedule) * 1e3, "ms"),
        ("  the slowest of 400", max(schedule) * 1e3, "ms"),
        ("update, 256 decoding", median(update) * 1e3, "ms"),
    ]


def admissions() -> list[Row]:
    """Seats for all: each step admits as many of 1,000 waiting as the budget takes, 256 others decoding."""
    times = []
    for _ in range(5):
        scheduler = crowded(waiting=1000)
        scheduler.max_num_seqs = 2000
        for _ in range(20):
            began = perf_counter()
            plan = next_plan(scheduler)
            times.append(perf_counter() - began)
            scheduler.update(plan, answer(plan))
    return [("schedule, 256 decoding and 8 of 1,000 admitted", median(times) * 1e3, "ms")]


def operations(name: str, shared: int) -> list[Row]:
    """A hundred streams come one a step, decode, and are aborted or end; twenty times over."""
    prefix = tuple(range(shared))
    scheduler = new_scheduler(num_blocks=4096)
    rates = []
    for start in range(0, 2000, 100):
        messages = [new_message(start + i, 32, 24, prefix) for i in range(100)]
        done, seconds = 0, 0.0
        while messages or not scheduler.idle:
            if messages:
                message = messages.pop()
                seconds += timed(partial(scheduler.add, message))
                done += 1
                if message.id % 10 == 0:
                    seconds += timed(partial(scheduler.abort, message.id + 5))
                    done += 1
            began = perf_counter()
            plan = scheduler.schedule()
            seconds += perf_counter() - began
            done += 1
            if plan is not None:
                seconds += timed(partial(scheduler.update, plan, answer(plan)))
                done += 1
        rates.append(done / seconds)
    return [(name, median(rates), "operations/s")]


def overload() -> list[Row]:
    """Demand of four pools, the worst of it: all the same length. What preemption costs."""

    def run(num_blocks: int) -> tuple[int, int, int]:
        scheduler = new_scheduler(num_blocks)
        for i in range(256):
            scheduler.add(new_message(i, 64, 192))  # 16 blocks each
        steps = tokens = 0
        while (plan := scheduler.schedule()) is not None:
            steps, tokens = steps + 1, tokens + plan.tokens
            scheduler.update(plan, answer(plan))
        return steps, tokens, scheduler.preemptions

    _, least, _ = run(4096)
    steps, tokens, preemptions = run(1024)
    return [
        ("demand of 4 pools: preemptions of 256 sequences", preemptions, ""),
        ("  tokens computed, over those without shortage", tokens / least, "times"),
        ("  steps, over four times one answer's", steps / (4 * 192), "times"),
    ]


def main() -> None:
    rows = [
        *decode_steps(),
        *admissions(),
        *operations("operations, about 24 streams", 0),
        *operations("operations, with a shared prefix of 512 tokens", 512),
        *overload(),
    ]
    for name, value, unit in rows:
        print(f"{name:<52}{value:>12,.3f} {unit}" if value < 100 else f"{name:<52}{value:>12,.0f} {unit}")


if __name__ == "__main__":
    main()
