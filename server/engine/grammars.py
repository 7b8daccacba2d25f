"""Has grammars compiled before any worker sees them, in a process of their own: see checker.py.

A grammar that cannot be compiled, takes too long or kills its compiler is refused; nothing else notices. The process is
started for the first grammar, which waits some 0.3 s longer: a server that sees none does without its 50 MB.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from asyncio.subprocess import PIPE, Process
from collections import OrderedDict
from collections.abc import Sequence
from enum import Enum

import msgspec

from server.errors import EngineError, InvalidRequest, Overloaded

log = logging.getLogger(__name__)

QUEUE_MAX = 32  # grammars that may wait for their turn
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


class GrammarSource(msgspec.Struct, frozen=True):
    """What a client asked for; `param` names the field, for errors."""

    kind: GrammarKind
    text: str  # a schema and choices are JSON
    param: str
    whitespace: bool = True  # JSON may have white space between its tokens
    whitespace_pattern: str | None = None


class Verdict(msgspec.Struct, frozen=True):
    """The checker's answer: a grammar as llguidance takes it, or what is wrong with it."""

    grammar: str | None = None
    error: str | None = None


class GrammarChecker:
    def __init__(self, command: Sequence[str]) -> None:
        """command: starts the checker."""
        self._command = command
        self._process: Process | None = None
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._remembered: OrderedDict[GrammarSource, str] = OrderedDict()

    async def _start(self) -> None:
        """Returns when it has its vocabulary."""
        self._process = await asyncio.create_subprocess_exec(*self._command, stdin=PIPE, stdout=PIPE, limit=LINE_MAX)
        assert self._process.stdout is not None
        async with asyncio.timeout(START_TIMEOUT):
            if await self._process.stdout.readline() != READY:
                raise EngineError("The grammar checker did not start.")

    async def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
        if process is not None:
            await process.wait()

    async def compile(self, source: GrammarSource) -> str:
        """The grammar as a worker takes it. Raises InvalidRequest or Overloaded."""
        known = self._remembered.get(source)
        if known is not None:
            self._remembered.move_to_end(source)
            return known
        if self._waiting >= QUEUE_MAX:
            raise Overloaded("Too many grammars are waiting to be compiled. Please try again shortly.")
        # Shielded: a client that leaves must not leave its answer to the next one.
        verdict = await asyncio.shield(self._ask(source))
        if verdict.grammar is None:
            raise InvalidRequest(
                f"Invalid '{source.param}': it cannot be compiled ({verdict.error}).",
                source.param,
                "invalid_grammar",
            )
        self._remembered[source] = verdict.grammar
        if len(self._remembered) > REMEMBERED_MAX:
            self._remembered.popitem(last=False)
        return verdict.grammar

    async def _ask(self, source: GrammarSource) -> Verdict:
        self._waiting += 1
        try:
            async with self._turn:
                return await self._exchange(msgspec.json.encode(source) + b"\n")
        finally:
            self._waiting -= 1

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
            # It is gone or stuck: the next grammar gets another.
            log.warning("grammar checker failed", extra={"reason": type(error).__name__})
            await self.stop()
            raise EngineError("The grammar could not be checked.") from None


def checker_command(directory: str, vocab_size: int, eos_token_ids: Sequence[int]) -> list[str]:
    return [sys.executable, "-m", "server.engine.checker", directory, str(vocab_size), *map(str, eos_token_ids)]
