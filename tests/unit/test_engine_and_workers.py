"""The engine against workers that are scripted: refusals, deadlines, deaths, and what /health may say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import msgspec
import pytest

from model.byte_level import ByteLevelTokenizer
from model.config import read_config
from model.errors import ModelError
from model.sampling_params import SamplingParams
from server.checkpoint import EMBEDDED
from server.engine.admission import Admission
from server.engine.engine import Engine
from server.engine.generation import RunningGeneration
from server.engine.observer import Observer
from server.engine.request import GenerationRequest, Prompt
from server.engine.variants import Variant, Variants
from server.errors import DeadlineExceeded, EngineError, Overloaded, WorkerKilled
from server.metrics import Metrics
from server.worker.messages import (
    Abort,
    Load,
    Loaded,
    Ready,
    Received,
    Refused,
    SequenceOutput,
    Stats,
    Step,
    Submit,
    ToWorker,
    Unload,
)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Its description; the weights nobody here looks at."""
    described = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["c_attn"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(described))
    return tmp_path


@dataclass
class Worker:
    """Its channel, and what it says."""

    engine: Engine
    number: int = 0
    told: list[ToWorker] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.engine.worker_ready(self.number, Ready("scripted", 16, 64, 0.1), self)  # type: ignore[arg-type]

    @property
    def sent(self) -> int:
        return len(self.told)

    def send(self, message: ToWorker) -> None:
        self.told.append(message)

    def dies(self, *, killed: bool = False, idle: bool = False) -> None:
        """While it works on what it was told; or, if idle, before it has begun to."""
        if not idle:
            self.engine.worker_received(self.number, Received(self.sent))
        self.engine.worker_lost(self.number, killed=killed)

    @property
    def added(self) -> list[int]:
        return [each.id for message in self.told if isinstance(message, Submit) for each in message.samples]

    @property
    def aborted(self) -> list[int]:
        return [id_ for message in self.told if isinstance(message, Abort) for id_ in message.ids]

    @property
    def loads(self) -> list[Load]:
        return [message for message in self.told if isinstance(message, Load)]

    def says(self, *ids: int) -> None:
        """A token for each of these."""
        stats = Stats(len(ids), 0, 0, 0, 64, 0, 0, 0, 0, 0, [])
        self.engine.worker_step(self.number, Step([SequenceOutput(id_, token=65) for id_ in ids], stats, 0))


def make_engine(request_timeout: float = 60, stall_timeout: float = 60, queued: int = 256, workers: int = 1) -> Engine:
    tokenizer = ByteLevelTokenizer(
        {bytes([value]): value for value in range(256)}, {"<|endoftext|>": 256}, ["<|endoftext|>"], 257
    )
    observer = Observer(Metrics("m", "0"))
    admission = Admission(queued, 1 << 16)
    return Engine(
        tokenizer,
        admission,
        observer,
        workers,
        request_timeout=request_timeout,
        stall_timeout=stall_timeout,
        variants=Variants(read_config(EMBEDDED)),
    )


def ask(engine: Engine, n: int = 1, variant: Variant | None = None) -> RunningGeneration:
    params = SamplingParams(seed=1, max_tokens=9, ignore_eos=True)
    return engine.submit(
        GenerationRequest(id="cmpl-x", prompts=[Prompt([1, 2], "")], params=params, n=n, variant=variant, best_of=n)
    )


def engine_test(body: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @wraps(body)
    def run(**fixtures: Any) -> None:
        asyncio.run(body(**fixtures))

    return run


async def fails_with(generation: RunningGeneration, error: type[Exception]) -> None:
    with pytest.raises(error):
        async for _ in generation:
            pass
    await generation.aclose()


@engine_test
async def test_a_refused_sequence_fails_its_request_alone() -> None:
    engine = make_engine()
    worker = Worker(engine)
    bad, good = ask(engine, n=2), ask(engine)
    engine.worker_refused(0, Refused(worker.added[1]))
    await fails_with(bad, EngineError)
    assert worker.aborted == [worker.added[0]]  # its sibling; the refused one the worker has forgotten
    worker.says(worker.added[2])
    assert (await anext(good)).text == "A"
    await good.aclose()
    engine.check()


@engine_test
async def test_what_the_samples_of_a_request_have_in_common_crosses_to_the_worker_once() -> None:
    engine = make_engine()
    worker = Worker(engine)
    whole = tuple(range(257))
    params = SamplingParams(seed=1, max_tokens=9, ignore_eos=True, allowed_token_ids=whole, stop_token_ids=whole)
    prompts = [Prompt([1, 2], ""), Prompt([3], "")]
    generation = engine.submit(GenerationRequest(id="cmpl-x", prompts=prompts, params=params, n=64, best_of=64))
    (told,) = worker.told
    assert isinstance(told, Submit)
    assert told.prompts == [[1, 2], [3]]
    assert [(each.prompt, each.choice) for each in told.samples] == [(p, k) for p in range(2) for k in range(64)]
    assert len(msgspec.msgpack.encode(told)) < 8_192
    shared = {id(add.params) for add in msgspec.msgpack.decode(msgspec.msgpack.encode(told), type=Submit).adds()}
    assert len(shared) == 1
    await generation.aclose()
    engine.check()


@engine_test
async def test_a_deadline_ends_what_runs_and_tells_the_worker_at_once() -> None:
    engine = make_engine(request_timeout=0.05)
    worker = Worker(engine)
    generation = ask(engine, n=2)
    worker.says(worker.added[0])
    await asyncio.sleep(0.1)
    assert worker.aborted == worker.added  # before anybody read on
    assert (await anext(generation)).text == "A"  # what came in time is not lost
    await fails_with(generation, DeadlineExceeded)
    engine.check()


@engine_test
async def test_a_deadline_is_forgotten_with_its_request() -> None:
    engine = make_engine(request_timeout=0.05)
    worker = Worker(engine)
    generation = ask(engine)
    await generation.aclose()
    await asyncio.sleep(0.1)
    assert worker.aborted == worker.added
    engine.check()


@engine_test
async def test_health_follows_the_steps() -> None:
    engine = make_engine(stall_timeout=0.05)
    assert engine.healthy
    worker = Worker(engine)
    generation = ask(engine)
    assert engine.healthy
    await asyncio.sleep(0.1)
    assert not engine.healthy
    worker.says(*worker.added)
    assert engine.healthy
    await generation.aclose()
    await asyncio.sleep(0.1)
    assert engine.healthy  # nothing waits


@engine_test
async def test_the_killer_fails_and_the_others_are_sent_again_one_by_one() -> None:
    engine = make_engine()
    worker = Worker(engine)
    generations = [ask(engine) for _ in range(3)]
    for _ in range(2):  # together
        assert len(worker.added) == 3
        worker.dies()
        worker = Worker(engine)
    (killer,) = worker.added  # alone
    late = ask(engine)
    assert worker.added == [killer]  # newcomers wait, out of harm's way
    worker.dies()
    worker = Worker(engine)
    (second,) = worker.added
    worker.says(second)
    assert len(worker.added) == 2
    worker.says(worker.added[1])
    assert len(worker.added) == 3  # nobody is suspected any more
    await fails_with(generations[2], WorkerKilled)
    for generation in (*generations[:2], late):
        await generation.aclose()
    engine.check()


@engine_test
async def test_workers_killed_at_the_same_moment_convict_nobody() -> None:
    """The second one was dead before it had begun on what the first one's death sent to it."""
    engine = make_engine(workers=3)
    for _ in range(5):
        workers = [Worker(engine, number) for number in range(3)]
        if engine.idle:
            generation = ask(engine)
        (first,) = (worker for worker in workers if worker.added)
        first.dies(killed=True)
        for worker in workers:
            if worker is not first:
                worker.dies(killed=True, idle=True)
        (survivor,) = [worker for worker in [Worker(engine)] if worker.added]
        survivor.says(*survivor.added)
        survivor.dies(killed=True, idle=True)
    assert (await anext(generation)).text == "A"
    await generation.aclose()
    engine.check()


@engine_test
async def test_a_lone_request_outlives_three_workers_killed_from_outside_and_is_found_guilty_of_the_fourth() -> None:
    engine = make_engine()
    worker = Worker(engine)
    generation = ask(engine)
    for _ in range(4):
        assert worker.added == [generation.candidates[0].id]
        worker.dies(killed=True)
        worker = Worker(engine)
    await fails_with(generation, WorkerKilled)
    engine.check()


@engine_test
async def test_a_lone_request_is_found_guilty_of_the_second_worker_that_crashed() -> None:
    engine = make_engine()
    worker = Worker(engine)
    generation = ask(engine)
    for _ in range(2):
        assert worker.added == [generation.candidates[0].id]
        worker.dies()
        worker = Worker(engine)
    await fails_with(generation, WorkerKilled)
    engine.check()


@engine_test
async def test_a_suspect_that_leaves_makes_way() -> None:
    engine = make_engine()
    worker = Worker(engine)
    generations = [ask(engine) for _ in range(2)]
    for _ in range(2):
        worker.dies()
        worker = Worker(engine)
    await generations[1].aclose()
    assert worker.added == [2, 1]
    await generations[0].aclose()
    engine.check()


@engine_test
async def test_retry_after_is_what_the_queue_takes_at_the_speed_measured() -> None:
    engine = make_engine(queued=2)
    Worker(engine)
    for _ in range(2):
        ask(engine)
    with pytest.raises(Overloaded) as refused:
        ask(engine)
    assert refused.value.retry_after == 4.0  # four tokens wait, and nothing was computed yet: one a second


@engine_test
async def test_a_model_beside_the_model_is_served_once_every_worker_has_it(adapter: Path) -> None:
    engine = make_engine()
    workers = [Worker(engine), Worker(engine, 1)]
    adding = asyncio.create_task(engine.add_variant("mine", adapter))
    await asyncio.sleep(0)
    (load,) = workers[0].loads
    assert workers[1].loads == [load]
    engine.worker_loaded(0, Loaded(load.key))
    await asyncio.sleep(0)
    assert not adding.done()
    engine.worker_loaded(1, Loaded(load.key))
    variant = await adding
    generation, plain = ask(engine, variant=variant), ask(engine)
    messages = [each for worker in workers for each in worker.told if isinstance(each, Submit)]
    assert sorted((each.variant or "", bool(each.salt)) for each in messages) == [("", False), (load.key, True)]
    workers[0].dies()
    assert Worker(engine).told[0] == load  # before anything that needs it
    engine.remove_variant("mine")
    assert workers[1].told[-1] == Unload(load.key)
    assert engine.variants.find("mine") is None
    for each in (generation, plain):
        await each.aclose()


@engine_test
async def test_a_model_is_loaded_though_workers_die_over_it(adapter: Path) -> None:
    engine = make_engine(workers=2)
    workers = [Worker(engine), Worker(engine, 1)]
    adding = asyncio.create_task(engine.add_variant("mine", adapter))
    await asyncio.sleep(0)
    (load,) = workers[0].loads
    engine.worker_loaded(0, Loaded(load.key))
    workers[0].dies(killed=True)
    assert Worker(engine).loads == [load]
    engine.worker_loaded(0, Loaded(load.key))
    await asyncio.sleep(0)
    assert not adding.done(), "the other one has not loaded it"
    workers[1].dies(killed=True)
    assert Worker(engine, 1).loads == [load]
    engine.worker_loaded(1, Loaded(load.key))
    assert (await adding).name == "mine"


@engine_test
async def test_a_model_that_comes_while_no_worker_is_up_is_checked_by_the_next(adapter: Path) -> None:
    engine = make_engine()
    Worker(engine).dies(killed=True)
    adding = asyncio.create_task(engine.add_variant("mine", adapter))
    await asyncio.sleep(0)
    assert not adding.done()
    (load,) = Worker(engine).loads
    engine.worker_loaded(0, Loaded(load.key, "the adapter does not fit the model"))
    with pytest.raises(ModelError, match="does not fit"):
        await adding
    assert engine.variants.find("mine") is None


@engine_test
async def test_a_model_that_a_worker_cannot_load_is_not_served(adapter: Path) -> None:
    engine = make_engine()
    worker = Worker(engine)
    adding = asyncio.create_task(engine.add_variant("mine", adapter))
    await asyncio.sleep(0)
    engine.worker_loaded(0, Loaded(worker.loads[0].key, "the adapter does not fit the model"))
    with pytest.raises(ModelError, match="does not fit"):
        await adding
    assert engine.variants.find("mine") is None
    assert worker.told[-1] == Unload(worker.loads[0].key)
    again = asyncio.create_task(engine.add_variant("mine", adapter))
    await asyncio.sleep(0)
    assert worker.loads[1].key != worker.loads[0].key
    with pytest.raises(ModelError, match="served already"):
        await engine.add_variant("mine", adapter)
    again.cancel()
