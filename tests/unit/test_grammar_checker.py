"""The process that compiles grammars: what hurts it hurts nobody else."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
from collections.abc import Callable

import pytest
from test_grammar import small

from model.grammar import Vocabulary
from server.engine import checker
from server.engine.checker import judge, judge_apart, to_grammar
from server.engine.grammars import GrammarChecker, GrammarKind, GrammarSource, Verdict, checker_command
from server.errors import InvalidRequest


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(small())


def source(kind: GrammarKind, text: str) -> GrammarSource:
    return GrammarSource(kind, text, "x")


def spin() -> None:
    while True:
        pass


@pytest.mark.parametrize("harm", [
    spin, lambda: time.sleep(60), lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: bytearray(4 << 30),
], ids=["burns the processor", "hangs", "crashes", "eats memory"])  # fmt: skip
def test_harm_ends_with_the_fork(
    harm: Callable[[], object], vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checker, "judge", lambda *_: harm())
    began = time.monotonic()
    verdict = judge_apart(vocabulary, source(GrammarKind.REGEX, "a"))
    assert verdict == Verdict(error=checker.TOO_EXPENSIVE)
    assert time.monotonic() - began < 1.5
    monkeypatch.undo()
    assert judge_apart(vocabulary, source(GrammarKind.REGEX, "a")).grammar is not None


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


def test_choices_are_taken_literally(vocabulary: Vocabulary) -> None:
    choices = ['a"b', "x\ny", "\x01é\\", "a.*|b", "/", "\u2028", "\x7f𝒳", "[", "tab\t "]
    grammar = judge(vocabulary, source(GrammarKind.CHOICE, json.dumps(choices))).grammar
    assert grammar is not None
    for choice in choices:
        matcher = vocabulary.compile(grammar)
        matcher.advance(small().encode(choice))
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
