"""Running batches: a few at once, a few lines of them at once, behind everybody who waits for an answer.

A batch may be left at any moment, by a cancelled task or a killed process, and is taken up where its outcomes say it
is. Lines that had none by then are answered again; nobody has seen the answer they would have had.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from server.errors import NotFound, RequestError, StorageError, TryLater
from server.jobs.batch_input import LINES_MAX, Call, InputCheck, Line, parse_line, read_lines
from server.jobs.batches import Batch, BatchStore, LeaseLostError, Outcome, Status
from server.jobs.database import new_id
from server.jobs.files import FileStore

log = logging.getLogger(__name__)

BATCHES_AT_ONCE = 4
LOOK = 1.0  # seconds between looks at whether a batch was cancelled, which renew its lease too
IDLE = 5.0  # seconds between looks for work that another server was told of, or has left
GIVE_WAY = 0.02  # seconds between looks at whether somebody waits
RETRY_MAX = 5.0  # seconds
AT_ONCE = 0.002  # seconds of checking lines before others get a turn
RECORDED_AT_ONCE = 512  # lines that were not run
PURPOSE = "batch_output"
OK = 200  # of HTTP
INPUT_GONE = ("The input file cannot be read: it was deleted, or has expired.", "input_file_id", "input_file_gone")
EXPIRED = ("batch_expired", "This request could not be executed before the completion window expired.")
CANCELLED = ("batch_cancelled", "This request was not executed because the batch was cancelled.")


@dataclass(frozen=True, slots=True, kw_only=True)
class LineAnswer:
    """What the API answers to a line's body."""

    status: int  # of HTTP
    request_id: str
    body: bytes  # JSON, of one line
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0


class Answerer(Protocol):
    max_body_bytes: int

    def check(self, body: Mapping[str, Any]) -> str:
        """Returns the name of the model that will answer. Raises RequestError."""
        ...

    async def answer(self, body: Mapping[str, Any], owner: str) -> LineAnswer:
        """Whatever comes of it. Raises TryLater where it has to be asked again."""
        ...


class InputGoneError(Exception):
    """The input file was deleted, or has expired."""


class BatchRunner:
    def __init__(
        self,
        store: BatchStore,
        files: FileStore,
        answerers: Mapping[str, Answerer],
        *,
        lines_at_once: int,
        crowded: Callable[[], bool],
        on_line: Callable[[bool], None] = lambda succeeded: None,
    ) -> None:
        """answerers: by endpoint. crowded: whether somebody waits for what lines would compete for.

        on_line: told of each line once it has an outcome.
        """
        self._store = store
        self._files = files
        self._answerers = answerers
        self._slots = asyncio.Semaphore(lines_at_once)
        self._crowded = crowded
        self._on_line = on_line
        self._told = asyncio.Event()
        self._running: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None
        store.changed = self._told.set

    def start(self) -> None:
        self._task = asyncio.create_task(self.run())

    async def stop(self) -> None:
        """Nothing of it runs any more when this returns. Idempotent."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def run(self) -> None:
        """Until it is cancelled; then what runs is left as it is, for the next one."""
        try:
            while True:
                self._told.clear()
                with suppress(StorageError):  # which was logged
                    await self._begin()
                with suppress(TimeoutError):
                    async with asyncio.timeout(IDLE):
                        await self._told.wait()
        finally:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)
            with suppress(StorageError):  # then leases end by themselves
                await self._store.release_ours()

    async def _begin(self) -> None:
        while len(self._running) < BATCHES_AT_ONCE and (batch := await self._store.claim()) is not None:
            task = asyncio.create_task(self._carry(batch))
            self._running.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._told.set()

    # === One batch ===

    async def _carry(self, batch: Batch) -> None:
        """To its end. Where something fails, it is let go after a while, and begun again where it is by then."""
        try:
            while (phase := self._phase(batch)) is not None:
                batch = await self._watch(phase, batch)
        except LeaseLostError:
            log.warning("another server has taken a batch", extra={"batch": batch.id})
        except StorageError:
            await asyncio.sleep(RETRY_MAX)
        except Exception:
            log.exception("batch %s stumbled", batch.id)
            await asyncio.sleep(RETRY_MAX)
        finally:
            with suppress(StorageError):
                await self._store.release(batch)

    def _phase(self, batch: Batch) -> Phase | None:
        """What has to be done now. None: it has ended."""
        if batch.status is Status.CANCELLING:
            return self._cancel
        if batch.status in {Status.VALIDATING, Status.IN_PROGRESS} and time.time() >= batch.expires_at:
            return self._expire
        phases = {
            Status.VALIDATING: self._validate,
            Status.IN_PROGRESS: self._answer_all,
            Status.FINALIZING: self._complete,
        }
        return phases.get(batch.status)

    async def _watch(self, phase: Phase, batch: Batch) -> Batch:
        """Work at a phase until it is done, or another is due. Returns the batch as it is then."""
        work = asyncio.ensure_future(phase(batch))
        try:
            while self._phase(batch) == phase and not work.done():
                await asyncio.wait({work}, timeout=LOOK)
                batch = await self._store.renew(batch)
            if work.done():
                work.result()
            return batch
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def _validate(self, batch: Batch) -> None:
        check, models = InputCheck(batch.endpoint), set[str]()
        answerer = self._answerers[batch.endpoint]
        rest = time.monotonic()
        try:
            async with aclosing(self._lines(batch)) as lines:
                async for line in lines:
                    if check.total == LINES_MAX:
                        check.refuse(None, f"The file has more than {LINES_MAX} requests.", None, "too_many_tasks")
                        break
                    call = check.take(line)
                    try:
                        models |= set() if call is None else {answerer.check(call.body)}
                    except RequestError as error:
                        check.refuse(line.number, error.message, _within("body", error.param), error.code)
                    if time.monotonic() - rest > AT_ONCE:
                        await asyncio.sleep(0)
                        rest = time.monotonic()
        except InputGoneError:
            check.refuse(None, *INPUT_GONE)
        errors = check.finish()
        if errors:
            await self._store.advance(batch, Status.FAILED, errors=errors)
        else:
            model = models.pop() if len(models) == 1 else None
            await self._store.advance(batch, Status.IN_PROGRESS, total=check.total, model=model)

    async def _answer_all(self, batch: Batch) -> None:
        try:
            async with aclosing(self._undone(batch)) as undone, asyncio.TaskGroup() as group:
                async for line in undone:
                    call = parse_line(line, batch.endpoint)
                    await self._slot()
                    answering = group.create_task(self._answer(batch, line.number, call))
                    answering.add_done_callback(lambda _: self._slots.release())
        except* InputGoneError:
            message, param, code = INPUT_GONE
            errors = [{"code": code, "message": message, "param": param, "line": None}]
            await self._leave_files(batch)
            await self._store.advance(batch, Status.FAILED, errors=errors)
        except* LeaseLostError:
            raise LeaseLostError from None
        else:
            await self._store.advance(batch, Status.FINALIZING)

    async def _complete(self, batch: Batch) -> None:
        await self._leave_files(batch)
        await self._store.advance(batch, Status.COMPLETED)

    async def _expire(self, batch: Batch) -> None:
        await self._cut(batch, *EXPIRED)
        await self._store.advance(batch, Status.EXPIRED)

    async def _cancel(self, batch: Batch) -> None:
        await self._cut(batch, *CANCELLED)
        await self._store.advance(batch, Status.CANCELLED)

    async def _cut(self, batch: Batch, code: str, message: str) -> None:
        """What has no outcome will have none but this."""
        if batch.in_progress_at is None:  # nobody knows its lines
            return
        error = json.dumps({"code": code, "message": message})
        outcomes: list[Outcome] = []
        with suppress(InputGoneError):
            async with aclosing(self._undone(batch)) as undone:
                async for line in undone:
                    custom_id = parse_line(line, batch.endpoint).custom_id
                    output = _output(custom_id, "null", error)
                    outcomes.append(Outcome(number=line.number, succeeded=False, output=output))
                    if len(outcomes) == RECORDED_AT_ONCE:
                        await self._record(batch, outcomes)
                        outcomes = []
        if outcomes:
            await self._record(batch, outcomes)
        await self._leave_files(batch)

    async def _leave_files(self, batch: Batch) -> None:
        for succeeded, column in ((True, "output_file_id"), (False, "error_file_id")):
            page = await self._store.outputs(batch, succeeded=succeeded, after=0)
            if not page or getattr(batch, column) is not None:  # we were here before
                continue
            async with self._files.draft(bounded=False) as draft:
                while page:
                    await draft.write("".join(f"{output}\n" for _, output in page).encode())
                    page = await self._store.outputs(batch, succeeded=succeeded, after=page[-1][0])
                await draft.keep(
                    filename=f"{batch.id}_{'output' if succeeded else 'error'}.jsonl",
                    purpose=PURPOSE,
                    owner=batch.owner,
                    expires_after=batch.output_expires_after,
                    also=partial(self._store.point, batch, column),
                )

    # === Its lines ===

    async def _lines(self, batch: Batch) -> AsyncGenerator[Line, None]:
        """Raises InputGoneError."""
        try:
            path = self._files.path(await self._files.find(batch.input_file_id, batch.owner))
            async with aclosing(read_lines(path, self._answerers[batch.endpoint].max_body_bytes)) as lines:
                async for line in lines:
                    yield line
        except (NotFound, OSError):
            raise InputGoneError from None

    async def _undone(self, batch: Batch) -> AsyncGenerator[Line, None]:
        """Those that have no outcome yet. Raises InputGoneError."""
        done = await self._store.done(batch)
        async for line in self._lines(batch):
            if line.number not in done:
                yield line

    async def _slot(self) -> None:
        """Returns when one more line may run: there is a place, and nobody waits. To be released."""
        await self._slots.acquire()
        try:
            while self._crowded():
                await asyncio.sleep(GIVE_WAY)
        except BaseException:
            self._slots.release()
            raise

    async def _answer(self, batch: Batch, number: int, call: Call) -> None:
        answer = await self._ask(batch, call)
        head = f'"status_code": {answer.status}, "request_id": "{answer.request_id}"'
        response = f'{{{head}, "body": {answer.body.decode()}}}'
        outcome = Outcome(
            number=number,
            succeeded=answer.status == OK,
            output=_output(call.custom_id, response, "null"),
            input_tokens=answer.input_tokens,
            cached_tokens=answer.cached_tokens,
            output_tokens=answer.output_tokens,
        )
        await self._record(batch, [outcome])

    async def _ask(self, batch: Batch, call: Call) -> LineAnswer:
        while True:
            try:
                return await self._answerers[batch.endpoint].answer(call.body, batch.owner)
            except TryLater as error:
                await asyncio.sleep(min(error.retry_after, RETRY_MAX))

    async def _record(self, batch: Batch, outcomes: list[Outcome]) -> None:
        """However long the store cannot be written. Raises LeaseLostError."""
        while True:
            try:
                await _whole(self._write(batch, outcomes))
                break
            except StorageError:
                await asyncio.sleep(LOOK)

    async def _write(self, batch: Batch, outcomes: list[Outcome]) -> None:
        await self._store.record(batch, outcomes)
        for outcome in outcomes:
            self._on_line(outcome.succeeded)


Phase = Callable[[Batch], Awaitable[None]]


async def _whole(work: Coroutine[Any, Any, None]) -> None:
    """All of it, even where who waits for it is cancelled: a database does not stop half-way either."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


def _within(name: str, param: str | None) -> str:
    return name if param is None else f"{name}.{param}"


def _output(custom_id: str, response: str, error: str) -> str:
    """A line of an output or error file. response, error: JSON."""
    shown = json.dumps(custom_id, ensure_ascii=False)
    return f'{{"id": "{new_id("batch_req_")}", "custom_id": {shown}, "response": {response}, "error": {error}}}'
