"""The process that compiles grammars, so that none can hurt anything else: each in a fork, with little time and memory.

Started by the api process as `python -m server.engine.checker DIRECTORY VOCAB_SIZE EOS`; a line of JSON in, a line of
JSON out. It ends when its input does.
"""

from __future__ import annotations

import json
import os
import re
import resource
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
from llguidance import LLMatcher, regex_to_lark

from model.errors import GrammarError
from model.grammar import Vocabulary
from model.tokenizer import read_tokenizer
from server import logs
from server.engine.dead_ends import find_dead_ends
from server.engine.gbnf import is_gbnf
from server.engine.gbnf_lark import gbnf_to_lark
from server.engine.grammars import READY, GrammarKind, GrammarSource, Verdict, Whitespace

CPU_SECONDS = 0.3  # a worker will spend as much on it, once
BOUNDED_WHITESPACE = r"[ ]|\n(?: {0,16}|\t{0,8})"  # what json.dumps writes, four levels deep with an indent of four
SECONDS = 5.0  # by the clock, which on a busy machine runs on while the compiler does not
MEMORY_MAX = 1 << 30
SHOWN = 200  # characters of the compiler's own words
# A client's Lark may have a lexeme that takes what was to follow it and has to go on for ever, and the library follows
# what is forced to its end before it answers. Behind the client's text, so that places in it stay right.
NOT_FORCED = '\n%llguidance {"no_forcing": true}\n'
TOO_EXPENSIVE = "compiling it takes too much time or memory"


def to_grammar(source: GrammarSource, whitespace: Whitespace = Whitespace.BOUNDED) -> str:
    """whitespace: of JSON, where the source does not say. Raises GrammarError, or what llguidance's own do."""
    match source.kind:
        case GrammarKind.JSON_SCHEMA:
            return LLMatcher.grammar_from_json_schema(source.text, overrides=_json_options(source, whitespace))
        case GrammarKind.REGEX:
            return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(_unanchored(source.text), 'dws')}/")
        case GrammarKind.CHOICE:
            words = "|".join(map(_literal, json.loads(source.text)))
            return LLMatcher.grammar_from_lark(f"start: /{words}/")
        case GrammarKind.GRAMMAR:
            lark = gbnf_to_lark(source.text) if is_gbnf(source.text) else source.text + NOT_FORCED
            return LLMatcher.grammar_from_lark(lark)


def _json_options(source: GrammarSource, whitespace: Whitespace) -> Any:
    """They have the last word over a schema's own x-guidance: what is not implemented is refused, never passed over."""
    flexible = source.whitespace and (whitespace is not Whitespace.NONE or source.whitespace_pattern is not None)
    options: dict[str, Any] = {"lenient": False, "coerce_one_of": False, "whitespace_flexible": flexible}
    if flexible and source.whitespace_pattern is not None:
        options["whitespace_pattern"] = source.whitespace_pattern
    elif flexible and whitespace is Whitespace.BOUNDED:
        options["whitespace_pattern"] = BOUNDED_WHITESPACE
    return options


def _unanchored(regex: str) -> str:
    """The whole output has to match anyway."""
    if regex.endswith("$") and (len(regex) - len(regex[:-1].rstrip("\\"))) % 2 == 1:
        regex = regex[:-1]
    return regex.removeprefix("^")


def _literal(text: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def judge(vocabulary: Vocabulary, source: GrammarSource, whitespace: Whitespace = Whitespace.BOUNDED) -> Verdict:
    try:
        grammar = to_grammar(source, whitespace)
        find_dead_ends(vocabulary.compile(grammar), vocabulary)
    except GrammarError as error:
        return Verdict(error=_reason(str(error)))
    except Exception:  # of the converters, which have no error of their own
        return Verdict(error="it is not well formed")
    return Verdict(grammar=grammar)


def _reason(said: str) -> str:
    """The first line of what llguidance says, or the regex parser's verdict, without the regex."""
    if "invalid regex" in said:
        verdict = re.search(r"^error: ([\w ,-]+)", said, re.MULTILINE)
        return verdict[1] if verdict else "it is not a regular expression that is supported"
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in said.partition("\n")[0][:SHOWN])


def judge_apart(vocabulary: Vocabulary, source: GrammarSource, whitespace: Whitespace = Whitespace.BOUNDED) -> Verdict:
    """In a fork, which may take its time and memory, or crash. Only its own time and memory are held against a grammar:
    where the clock runs out first, or there is no fork to be had, the machine is too busy."""
    ours, theirs = os.pipe()
    try:
        child = os.fork()
    except OSError:
        os.close(ours)
        os.close(theirs)
        return Verdict(busy=True)
    if child == 0:
        os.close(ours)
        _as_child(vocabulary, source, whitespace, theirs)
    os.close(theirs)
    try:
        answer, whole = _read(ours, time.monotonic() + SECONDS)
    finally:
        os.close(ours)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if not whole:
        return Verdict(busy=True)
    try:
        return msgspec.json.decode(answer, type=Verdict)
    except msgspec.DecodeError:  # cut short by its own limits, or by a crash
        return Verdict(error=TOO_EXPENSIVE)


def _as_child(vocabulary: Vocabulary, source: GrammarSource, whitespace: Whitespace, pipe: int) -> None:
    try:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # SIGPROF ends it
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_MAX, MEMORY_MAX))
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno()
        )  # a crash's last words are about the client's text
        with os.fdopen(pipe, "wb") as stream:
            stream.write(msgspec.json.encode(judge(vocabulary, source, whitespace)))
    finally:
        os._exit(0)


def _read(pipe: int, deadline: float) -> tuple[bytes, bool]:
    """Until its end, or the deadline; and whether that was its end."""
    parts: list[bytes] = []
    while select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
        part = os.read(pipe, 1 << 16)
        if not part:
            return b"".join(parts), True
        parts.append(part)
    return b"".join(parts), False


def main() -> None:
    logs.configure("info")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the api process says when to end, by closing the pipe
    directory, vocab_size, whitespace, *eos_token_ids = sys.argv[1:]
    ends = tuple(map(int, eos_token_ids))
    tokenizer = read_tokenizer(Path(directory), int(vocab_size), ends, forced=True)
    tokenizer.encode_plain("a")  # what it needs for that is made here once, and not in every fork
    vocabulary = Vocabulary(tokenizer)
    sys.stdout.buffer.write(READY)
    sys.stdout.buffer.flush()
    for line in sys.stdin.buffer:
        verdict = judge_apart(vocabulary, msgspec.json.decode(line, type=GrammarSource), Whitespace(whitespace))
        sys.stdout.buffer.write(msgspec.json.encode(verdict) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
