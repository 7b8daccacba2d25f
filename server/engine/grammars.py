"""Has grammars compiled before any worker sees them, in a process of their own: see checker.py.

A grammar that cannot be compiled, takes too much of the processor or of memory, or kills its compiler is refused;
nothing else notices. The process is started for the first grammar, which waits some 0.3 s longer: a server that sees
none does without its 50 MB. One that dies is replaced, and asked again.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum

import msgspec

from server.engine.compile_queue import CompileQueue
from server.errors import EngineError, InvalidRequest, Overloaded

log = logging.getLogger(__name__)

QUEUE_MAX = 32  # grammars of a client that may wait for their turn
QUEUES_MAX = 64  # of all clients together
TRIES = 3  # checkers that a grammar is given to, where one after the other dies
REMEMBERED_MAX = 64
START_TIMEOUT = 60.0  # seconds
ANSWER_TIMEOUT = 10.0  # seconds; the checker itself answers long before, unless it is stuck
LINE_MAX = 16 << 20
READY = b"ready\n"  # the first line a checker says


class GrammarKind(Enum):
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"  # Lark in llguidance's dialect, or GBNF


class Whitespace(Enum):
    """What may stand between the tokens of JSON, where neither a request nor its pattern says."""

    BOUNDED = "bounded"  # what json.dumps writes, with or without indent: a space, or a line end and an indent
    ANY = "any"  # as much as the model likes: small ones may never come to an end
    NONE = "none"


class GrammarSource(msgspec.Struct, frozen=True):
    """What a client asked for; `param` names the field, for errors."""

    kind: GrammarKind
    text: str  # a schema and choices are JSON
    param: str
    whitespace: bool = True  # JSON may have white space between its tokens, as the server or the pattern says
    whitespace_pattern: str | None = None


class Verdict(msgspec.Struct, frozen=True):
    """The checker's answer: a grammar as llguidance takes it, or what is wrong with it."""

    grammar: str | None = None
    error: str | None = None
    busy: bool = False  # neither: the machine had no time for it


@dataclass(frozen=True, slots=True)
class _Asked:
    source: GrammarSource
    answer: asyncio.Future[Verdict]


class GrammarChecker:
    def __init__(self, command: Sequence[str]) -> None:
        """command: starts the checker."""
        self._command = command
        self._process: Process | None = None
        self._queue: CompileQueue[_Asked] = CompileQueue()
        self._working: asyncio.Task[None] | None = None  # while there is a queue
        self._remembered: OrderedDict[GrammarSource, Verdict] = OrderedDict()

    async def _start(self) -> None:
        """Returns when it has its vocabulary."""
        self._process = await asyncio.create_subprocess_exec(*self._command, stdin=PIPE, stdout=PIPE, limit=LINE_MAX)
        assert self._process.stdout is not None
        async with asyncio.timeout(START_TIMEOUT):
            if await self._process.stdout.readline() != READY:
                raise EngineError("The grammar checker did not start.")

    async def stop(self) -> None:
        working, self._working = self._working, None
        if working is not None:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
        await self._stop_process()

    async def _stop_process(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
        if process is not None:
            await process.wait()

    async def compile(self, source: GrammarSource, client: str = "") -> str:
        """The grammar as a worker takes it. client: among whom the compiler is shared.

        Raises InvalidRequest, or Overloaded where too many wait or the machine has no time for it.
        """
        verdict = self._known(source)
        if verdict is None:
            if self._queue.waiting(client) >= QUEUE_MAX or len(self._queue) >= QUEUES_MAX:
                raise Overloaded("Too many grammars are waiting to be compiled. Please try again shortly.")
            asked = _Asked(source, asyncio.get_running_loop().create_future())
            self._queue.add(client, len(source.text), asked)
            if self._working is None or self._working.done():
                self._working = asyncio.create_task(self._work())
            verdict = await asked.answer
        if verdict.busy:
            raise Overloaded("The machine has no time to compile the grammar just now. Please try again shortly.")
        if verdict.grammar is None:
            raise InvalidRequest(
                f"Invalid '{source.param}': it cannot be compiled ({verdict.error}).",
                source.param,
                "invalid_grammar",
            )
        return verdict.grammar

    def _known(self, source: GrammarSource) -> Verdict | None:
        verdict = self._remembered.get(source)
        if verdict is not None:
            self._remembered.move_to_end(source)
        return verdict

    def _remember(self, source: GrammarSource, verdict: Verdict) -> None:
        if not verdict.busy:
            self._remembered[source] = verdict
        if len(self._remembered) > REMEMBERED_MAX:
            self._remembered.popitem(last=False)

    async def _work(self) -> None:
        """Until nobody waits. A client that leaves cancels its own wait alone: the checker's answer is read here."""
        asked: _Asked | None = None
        try:
            while self._queue:
                client, asked = self._queue.take()
                began = time.monotonic()
                if not asked.answer.done():
                    await self._settle(asked)
                self._queue.spent(client, time.monotonic() - began)
        finally:
            while asked is not None:  # the checker is stopped: nobody is left to wait
                if not asked.answer.done():
                    asked.answer.set_exception(EngineError("The grammar could not be checked."))
                asked = self._queue.take()[1] if self._queue else None

    async def _settle(self, asked: _Asked) -> None:
        try:
            verdict = self._known(asked.source) or await self._ask(asked.source)
        except EngineError as error:
            if not asked.answer.done():
                asked.answer.set_exception(error)
            return
        self._remember(asked.source, verdict)
        if not asked.answer.done():
            asked.answer.set_result(verdict)

    async def _ask(self, source: GrammarSource) -> Verdict:
        """Raises EngineError where each checker dies over it."""
        line = msgspec.json.encode(source) + b"\n"
        for _ in range(TRIES - 1):
            with suppress(EngineError):
                return await self._exchange(line)
        return await self._exchange(line)

    async def _exchange(self, line: bytes) -> Verdict:
        try:
            if self._process is None or self._process.returncode is not None:
                await self._start()
            process = self._process
            assert process is not None
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(line)
            await process.stdin.drain()
            async with asyncio.timeout(ANSWER_TIMEOUT):
                answer = await process.stdout.readline()
            return msgspec.json.decode(answer, type=Verdict)
        except (OSError, TimeoutError, ValueError, EngineError) as error:
            # It is gone or stuck: what is asked next is asked of another.
            log.warning("grammar checker failed", extra={"reason": type(error).__name__})
            await self._stop_process()
            raise EngineError("The grammar could not be checked.") from None


def checker_command(
    directory: str, vocab_size: int, eos_token_ids: Sequence[int], whitespace: Whitespace = Whitespace.BOUNDED
) -> list[str]:
    """whitespace: that JSON may have where a request does not say."""
    ends = map(str, eos_token_ids)
    return [sys.executable, "-m", "server.engine.checker", directory, str(vocab_size), whitespace.value, *ends]
