"""The process that compiles grammars: what hurts it hurts nobody else."""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from msgspec import structs
from test_grammar import small

from model.grammar import Matcher, Vocabulary
from model.step import GrammarState
from server.api.errors import status_of
from server.engine import checker
from server.engine.checker import judge, judge_apart, to_grammar
from server.engine.grammars import (
    QUEUE_MAX,
    GrammarChecker,
    GrammarKind,
    GrammarSource,
    Verdict,
    Whitespace,
    checker_command,
)
from server.errors import EngineError, InvalidRequest, Overloaded


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(small())


def source(kind: GrammarKind, text: str) -> GrammarSource:
    return GrammarSource(kind, text, "x")


def spin() -> None:
    while True:
        pass


@pytest.mark.parametrize("harm", [
    spin, lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: bytearray(4 << 30),
], ids=["burns the processor", "crashes", "eats memory"])  # fmt: skip
def test_harm_ends_with_the_fork(
    harm: Callable[[], object], vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checker, "judge", lambda *_: harm())
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    verdict = judge_apart(vocabulary, source(GrammarKind.REGEX, "a"))
    assert verdict == Verdict(error=checker.TOO_EXPENSIVE)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1.0
    monkeypatch.undo()
    assert judge_apart(vocabulary, source(GrammarKind.REGEX, "a")).grammar is not None


def test_only_its_own_time_is_held_against_a_grammar(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine the clock runs on while the compiler waits for a processor."""
    trivial = source(GrammarKind.REGEX, "a")
    monkeypatch.setattr(checker, "judge", lambda *asked: (time.sleep(1.0), judge(*asked))[1])
    assert judge_apart(vocabulary, trivial).grammar is not None
    monkeypatch.setattr(checker, "SECONDS", 0.2)
    assert judge_apart(vocabulary, trivial) == Verdict(busy=True)
    monkeypatch.undo()
    monkeypatch.setattr(os, "fork", no_fork)
    assert judge_apart(vocabulary, trivial) == Verdict(busy=True)


def no_fork() -> int:
    raise BlockingIOError


def test_a_grammar_that_the_machine_has_no_time_for_is_to_be_tried_again() -> None:
    async def run() -> None:
        grammars = GrammarChecker(["false"])
        verdicts = [Verdict(busy=True), Verdict(grammar="start: /a/")]

        async def ask(_: GrammarSource) -> Verdict:
            return verdicts.pop(0)

        grammars._ask = ask  # type: ignore[method-assign]
        with pytest.raises(Overloaded) as refused:
            await grammars.compile(source(GrammarKind.REGEX, "a"))
        assert status_of(refused.value)[0] == 503
        assert await grammars.compile(source(GrammarKind.REGEX, "a")) == "start: /a/"

    asyncio.run(run())


def test_a_checker_killed_with_twelve_grammars_in_flight_fails_none_of_them() -> None:
    async def run() -> None:
        grammars = GrammarChecker(checker_command("model/default", 50257, (50256,)))
        try:
            await grammars.compile(source(GrammarKind.REGEX, "a"))
            asking = [asyncio.create_task(grammars.compile(source(GrammarKind.REGEX, f"a{i}"))) for i in range(12)]
            await asyncio.sleep(0.02)
            assert grammars._process is not None
            grammars._process.kill()
            assert await asyncio.gather(*asking) == [f"start: /a{i}/" for i in range(12)]
        finally:
            await grammars.stop()

    asyncio.run(run())


def test_a_checker_that_never_starts_fails_what_waits_and_the_next_is_tried_again() -> None:
    async def run() -> None:
        grammars = GrammarChecker(["false"])
        results = await asyncio.gather(
            *(grammars.compile(source(GrammarKind.REGEX, f"a{i}")) for i in range(3)), return_exceptions=True
        )
        assert all(isinstance(result, EngineError) for result in results)
        with pytest.raises(EngineError):
            await grammars.compile(source(GrammarKind.REGEX, "b"))
        await grammars.stop()

    asyncio.run(run())


def test_one_client_with_forty_expensive_grammars_keeps_no_other_waiting() -> None:
    """Each takes as long as the longest that may be; whoever comes then waits for the one under way, and no more."""
    order = []

    async def run() -> None:
        grammars = GrammarChecker(["false"])

        async def ask(asked: GrammarSource) -> Verdict:
            order.append(asked.text)
            await asyncio.sleep(0.02 if asked.text.startswith("expensive") else 0)
            return Verdict(grammar="start: /a/")

        grammars._ask = ask  # type: ignore[method-assign]
        greedy = [
            asyncio.create_task(grammars.compile(source(GrammarKind.REGEX, f"expensive {i}"), "greedy"))
            for i in range(40)
        ]
        await asyncio.sleep(0.03)
        for client in ("one", "two"):
            for text in ("cheap", "cheaper"):
                await grammars.compile(source(GrammarKind.REGEX, f"{text} {client}"), client)
        assert len(order) <= 2 + 4 + 4, order
        refused = await asyncio.gather(*greedy, return_exceptions=True)
        assert sum(isinstance(each, Overloaded) for each in refused) == 40 - QUEUE_MAX

    asyncio.run(run())


@pytest.mark.parametrize(("kind", "text", "reason"), [
    (GrammarKind.REGEX, "(a", "unclosed group"), (GrammarKind.REGEX, "a\\b", "not a regular expression"),
    (GrammarKind.REGEX, "(?=secret)", "look-around"), (GrammarKind.GRAMMAR, "nonsense", "1(9)"),
    (GrammarKind.GRAMMAR, "start: x", ""), (GrammarKind.JSON_SCHEMA, '{"enum": []}', "Unsatisfiable"),
    (GrammarKind.JSON_SCHEMA, '{"not": {}, "x-guidance": {"lenient": true}}', "Unimplemented keys"),
    (GrammarKind.JSON_SCHEMA, '{"$ref": "file:///etc/passwd"}', "does not fetch"),
])  # fmt: skip
def test_reasons_are_short_and_plain(kind: GrammarKind, text: str, reason: str, vocabulary: Vocabulary) -> None:
    verdict = judge(vocabulary, source(kind, text))
    assert verdict.grammar is None
    assert verdict.error is not None
    assert reason in verdict.error
    assert re.fullmatch(r"[ -~]{1,200}", verdict.error)
    assert "secret" not in verdict.error


@pytest.mark.parametrize(("regex", "inside"), [
    ("^ab$", "ab"), ("ab", "ab"), ("a\\$", "a\\$"), ("a\\\\$", "a\\\\"), ("$", ""), ("^", ""), ("a/b", "a\\/b"),
])  # fmt: skip
def test_anchors_that_say_nothing_are_taken_off(regex: str, inside: str) -> None:
    assert to_grammar(source(GrammarKind.REGEX, regex)) == f"start: /{inside}/"


DEAD_ENDS = [
    "start: /[a-z]{3}/ D\nD: /1/ & /2/",
    'start: "a" ("b" D | "c")\nD: /1/ & /2/',
    'start: /[a-z]+/ ("1" D | "2")\nD: /1/ & /2/',
]


@pytest.mark.parametrize("grammar", DEAD_ENDS)
def test_a_grammar_that_can_come_to_a_dead_end_is_refused(grammar: str, vocabulary: Vocabulary) -> None:
    verdict = judge(vocabulary, source(GrammarKind.GRAMMAR, grammar))
    assert "nothing can follow" in str(verdict.error)


def steps(matcher: Matcher, text: str) -> bool:
    """Whether a text can be written, by its own tokens."""
    for token in small().encode_plain(text):
        if matcher.allowed is None or not int.from_bytes(matcher.allowed, "little") >> token & 1:
            return False
        matcher.advance([token])
    return matcher.state is not GrammarState.LOST


DOCUMENT = {"ab": {"ba": [1, "a b"]}, "cab": "é"}
SCHEMA = json.dumps({"type": "object"})


@pytest.mark.parametrize("how", [
    {}, {"indent": 4}, {"indent": 2}, {"indent": "\t"}, {"separators": (",", ":")}, {"indent": 0},
], ids=str)  # fmt: skip
def test_json_has_the_white_space_that_dumps_writes(how: dict[str, Any], vocabulary: Vocabulary) -> None:
    text = json.dumps(DOCUMENT, ensure_ascii=False, **how)
    compact = how == {"separators": (",", ":")}
    for whitespace in Whitespace:
        grammar = judge(vocabulary, source(GrammarKind.JSON_SCHEMA, SCHEMA), whitespace).grammar
        assert grammar is not None
        assert steps(vocabulary.compile(grammar), text) is (compact or whitespace is not Whitespace.NONE)


@pytest.mark.parametrize(
    "start",
    ["{\n\n", "{  ", "{ \n", "{\n \n", '{"ab":\n\n', '{"ab" \t', "{\r", "{\n" + " " * 17],
)
def test_json_never_has_two_line_ends_in_a_row_unless_that_is_asked_for(start: str, vocabulary: Vocabulary) -> None:
    """As a matter of course, by a pattern of the request's, and by the setting."""
    schema = source(GrammarKind.JSON_SCHEMA, SCHEMA)
    opened = structs.replace(schema, whitespace_pattern=r"\s*")
    for asked, whitespace, expected in (
        (schema, Whitespace.BOUNDED, False), (opened, Whitespace.BOUNDED, True), (schema, Whitespace.ANY, True),
        (opened, Whitespace.NONE, True), (structs.replace(schema, whitespace=False), Whitespace.ANY, False),
    ):  # fmt: skip
        grammar = judge(vocabulary, asked, whitespace).grammar
        assert grammar is not None
        assert steps(vocabulary.compile(grammar), start) is expected


def test_choices_are_taken_literally(vocabulary: Vocabulary) -> None:
    choices = ['a"b', "x\ny", "\x01é\\", "a.*|b", "/", "\u2028", "\x7f𝒳", "[", "tab\t ", "a<|endoftext|>b"]
    grammar = judge(vocabulary, source(GrammarKind.CHOICE, json.dumps(choices))).grammar
    assert grammar is not None
    for choice in choices:
        matcher = vocabulary.compile(grammar)
        matcher.advance(small().encode_plain(choice))
        assert matcher.state.value == "complete", choice


def test_a_checker_that_dies_is_replaced_and_a_client_that_leaves_mixes_nothing_up() -> None:
    async def run() -> None:
        grammars = GrammarChecker(checker_command("model/default", 50257, (50256,)))
        try:
            assert grammars._process is None, "nobody has asked for a grammar yet"
            assert await grammars.compile(source(GrammarKind.REGEX, "a")) == "start: /a/"
            assert grammars._process is not None
            grammars._process.kill()
            await grammars._process.wait()
            leaving = asyncio.create_task(grammars.compile(source(GrammarKind.REGEX, "b")))
            await asyncio.sleep(0.01)
            leaving.cancel()
            assert await grammars.compile(source(GrammarKind.REGEX, "c")) == "start: /c/"
            with pytest.raises(InvalidRequest, match="unclosed group") as caught:
                await grammars.compile(source(GrammarKind.REGEX, "("))
            assert caught.value.param == "x"
        finally:
            await grammars.stop()

    asyncio.run(run())
