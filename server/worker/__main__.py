"""The worker process: one loop that takes messages, plans a step, runs it and says what came of it.

Started by the supervisor as `python -m server.worker FD`, with its end of the socketpair as FD. It ends when it is told
to, and when the other end is closed: it never outlives the api process.
"""

from __future__ import annotations

import ctypes
import gc
import signal
import socket
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path

from msgspec.structs import replace

from model.errors import ModelError
from model.gpu import cuda
from model.gpu.runner import Recorded
from model.memory import give_back_code
from model.variants import Variants
from server import logs
from server.worker.budget import PREFILL_LEAST, BudgetController
from server.worker.channel import WorkerChannel
from server.worker.messages import (
    Abort,
    Failed,
    Load,
    Loaded,
    Ready,
    Received,
    Refused,
    SequenceOutput,
    Shutdown,
    Sleep,
    Slept,
    Start,
    Starting,
    Step,
    Submit,
    ToWorker,
    Unload,
    WakeUp,
    Work,
)
from server.worker.parts import (
    Networks,
    count_blocks,
    load_networks,
    make_grammars,
    make_runner,
    make_scheduler,
    make_speculation,
    make_variants,
)
from server.worker.pipeline import Pipeline

EXIT_CONFIG = 78
PARKED_POLL = 0.02  # seconds between looks for messages, while all there is waits for its grammar
PR_SET_PDEATHSIG = 1  # prctl(2)


class Worker:
    """Its controllers learn from the time of each step what the scheduler may hand out in the next."""

    def __init__(self, start: Start, channel: WorkerChannel) -> None:
        """Loads the model and says Ready. Raises ModelError."""
        began = time.perf_counter()
        teller = Teller(channel)
        self._grammars = make_grammars(start)
        vocabulary = self._grammars.begin()  # beside the weights
        self._parked: list[tuple[Future[None], Submit]] = []  # until their grammars are compiled
        self._gone: set[int] = set()  # what was aborted of these
        networks = load_networks(start, teller.read)
        self._start = start
        self._channel = channel
        self._networks: Networks | None = networks  # None in deep sleep
        self._num_blocks = count_blocks(start, networks)
        self._variants: Variants | None = make_variants(start, networks)  # None in deep sleep
        self._known: dict[str, Path] = {}  # directories of variants, by key
        self._leaving: set[str] = set()
        self._speculation = make_speculation(start, networks)
        self._scheduler = make_scheduler(start, networks, self._num_blocks, self._speculation)
        # None in any sleep
        self._pipeline: Pipeline | None = self._make_pipeline(networks, self._variants, teller.recorded)
        self._budget = _budget(start)
        if self._budget is not None:
            self._scheduler.token_budget = self._budget.budget
        self._stopping = False
        vocabulary.result()
        give_back_code()
        self._channel.send(
            Ready(
                backend=networks.backend + teller.graphs,
                block_size=start.block_size,
                num_blocks=self._num_blocks,
                load_seconds=time.perf_counter() - began,
            )
        )

    def _make_pipeline(self, networks: Networks, variants: Variants, recorded: Recorded | None = None) -> Pipeline:
        parts = self._start, networks, self._num_blocks, variants
        return Pipeline(self._scheduler, make_runner(*parts, self._grammars, recorded))

    def loop(self) -> None:
        """Until Shutdown. Raises EOFError or ConnectionError when the api process is gone."""
        self._report([])  # what came before the first step was taken in
        while not self._stopping:
            messages = self._channel.receive(wait=self._idle)
            self.handle(messages)
            self._unpark()
            if not self._step() and messages:  # nothing to run, but the books may have changed
                self._report([])

    def handle(self, messages: list[ToWorker]) -> None:
        if any(isinstance(message, Submit) for message in messages):
            self._channel.send(Received(self._channel.received))
        for message in messages:
            self._handle(message)

    def _handle(self, message: ToWorker) -> None:
        match message:
            case Submit():
                self._submit(message)
            case Abort():
                self._gone.update(message.ids if self._parked else ())
                for id_ in message.ids:
                    self._scheduler.abort(id_)
            case Load():
                self._load(message)
            case Unload():
                self._unload(message.key)
            case Sleep():
                self._sleep(deep=message.level == 2)
            case WakeUp():
                self._wake_up()
            case Shutdown():
                self._stopping = True
            case Start():
                raise AssertionError("a worker is started once")

    def _load(self, message: Load) -> None:
        self._known[message.key] = Path(message.directory)
        if self._variants is None:  # in deep sleep it is only noted, and read when it is first asked for
            self._channel.send(Loaded(message.key))
            return
        self._variants.register(message.key, self._known[message.key])
        try:
            if not message.lazy:
                self._variants.use(message.key, self._scheduler.variants, self._still_reading)
        except ModelError as error:
            self._channel.send(Loaded(message.key, str(error)))
        else:
            self._channel.send(Loaded(message.key))

    def _still_reading(self, _share: float) -> None:
        """A model beside this one takes long to read: the supervisor must not take that for being stuck."""
        self._channel.send(Starting(1.0))

    def _unload(self, key: str) -> None:
        """At once, or with the next one once nothing runs of it."""
        if self._variants is None:  # in deep sleep nothing runs, and no variant is held
            self._known.pop(key, None)
            return
        self._leaving.add(key)
        for gone in self._leaving - self._scheduler.variants:
            self._variants.forget(gone)
            self._known.pop(gone, None)
            self._leaving.discard(gone)

    def _submit(self, message: Submit) -> None:
        """At once, or once its grammar is compiled, which is nothing for a step to wait for."""
        grammar = message.params.grammar
        preparing = None if grammar is None else self._grammars.prepare(grammar)
        if preparing is None:
            self._add(message)
        else:
            self._parked.append((preparing, message))

    def _unpark(self) -> None:
        if self._parked and self._scheduler.idle:
            wait([preparing for preparing, _ in self._parked], PARKED_POLL, FIRST_COMPLETED)
        ready = [message for preparing, message in self._parked if preparing.done()]
        self._parked = [(preparing, message) for preparing, message in self._parked if not preparing.done()]
        for message in ready:
            left = [sample for sample in message.samples if sample.id not in self._gone]
            self._add(replace(message, samples=left))
        if not self._parked:
            self._gone.clear()

    def _add(self, message: Submit) -> None:
        if message.variant is not None:
            assert self._variants is not None, "work for a worker that sleeps"
            try:
                self._variants.use(message.variant, self._scheduler.variants, self._still_reading)
            except ModelError:
                for sample in message.samples:
                    self._channel.send(Refused(sample.id, unloadable=True))
                return
        for add in message.adds():
            try:
                self._scheduler.add(add)
            except ValueError:  # no reason to end for all the others
                self._channel.send(Refused(add.id))

    def _sleep(self, *, deep: bool) -> None:
        """Give back the KV pool, and if deep the weights. Nothing runs any more: the api process has seen to that."""
        self._scheduler.forget_cache()
        self._pipeline = None
        if deep:
            self._networks = None
            self._variants = None
        gc.collect()
        cuda.release()
        self._channel.send(Slept(True))

    def _wake_up(self) -> None:
        """Raises ModelError where the weights have to be read again and cannot be."""
        if self._networks is None or self._variants is None:
            self._networks = load_networks(self._start)
            self._variants = make_variants(self._start, self._networks)
            for key, directory in self._known.items():
                self._variants.register(key, directory)
        if self._pipeline is None:
            self._pipeline = self._make_pipeline(self._networks, self._variants)
        self._channel.send(Slept(False))

    @property
    def _idle(self) -> bool:
        return not self._parked and self._scheduler.idle and (self._pipeline is None or self._pipeline.empty)

    def _step(self) -> bool:
        if self._pipeline is None:
            assert self._scheduler.idle, "work for a worker that sleeps"
            return False
        landed = self._pipeline.step()
        if landed is None:
            return False
        plan, result, seconds = landed.plan, landed.result, landed.run + landed.update
        rows = plan.tokens + sum(result.drafted.values())
        if self._speculation is not None and plan.decodes:
            self._speculation.observe(rows, seconds - result.drafting)
            if result.drafted:
                self._speculation.drafted(max(result.drafted.values()), len(plan.chunks), result.drafting)
        if self._budget is not None:
            least = self._scheduler.num_running + PREFILL_LEAST
            self._scheduler.token_budget = max(self._budget.observe(rows, seconds), least)
        work = Work(
            sequences=len(plan.chunks),
            tokens=rows,
            admitted=[new.id for new in plan.added],
            schedule=landed.schedule,
            run=landed.run,
            update=landed.update,
        )
        self._report(landed.outputs, work)
        return True

    def _report(self, outputs: list[SequenceOutput], work: Work | None = None) -> None:
        if self._scheduler.idle:
            self._scheduler.check()
        self._channel.send(Step(outputs, self._scheduler.stats(), self._channel.received, work))


class Teller:
    """Says how a start goes: of the weights a hundred times at most, and of each graph."""

    def __init__(self, channel: WorkerChannel) -> None:
        self._channel = channel
        self._told = Starting(0.0)

    def read(self, share: float) -> None:
        if int(100 * share) > int(100 * self._told.share):
            self._tell(Starting(share))

    def recorded(self, done: int, of: int, seconds: float) -> None:
        self._tell(Starting(1.0, done, of, seconds))

    @property
    def graphs(self) -> str:
        """Something to end the start-up line with."""
        told = self._told
        return f", {told.recorded} CUDA graphs recorded in {told.seconds:.1f} s" if told.graphs else ""

    def _tell(self, progress: Starting) -> None:
        self._told = progress
        self._channel.send(progress)


def _budget(start: Start) -> BudgetController | None:
    if start.target_itl is None:
        return None
    return BudgetController(start.target_itl, smallest=PREFILL_LEAST, largest=start.max_num_batched_tokens)


def serve(channel: WorkerChannel) -> int:
    """Returns the exit status."""
    try:
        start, *rest = channel.receive(wait=True)
        assert isinstance(start, Start)
        worker = Worker(start, channel)
        worker.handle(rest)
        worker.loop()
    except ModelError as error:
        channel.send(Failed(str(error), EXIT_CONFIG))
        return EXIT_CONFIG
    except (EOFError, ConnectionError):  # the api process is gone; nobody is left to tell
        return 0
    return 0


def _end_with_parent() -> None:
    """Even if it is stuck in a step. Where this is not Linux, the closed socket has to be enough."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> int:
    _end_with_parent()
    # Ctrl-C reaches the whole process group; when to stop is for the api process to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logs.configure("info")
    return serve(WorkerChannel(socket.socket(fileno=int(sys.argv[1]))))


if __name__ == "__main__":
    sys.exit(main())
