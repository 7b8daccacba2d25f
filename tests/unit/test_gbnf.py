"""GBNF by llguidance against a matcher of GBNF that is written here, from llama.cpp's description of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_grammar import EOS, small

from model.errors import GrammarError
from model.grammar import Matcher, Vocabulary
from model.step import GrammarState
from server.engine.checker import NOT_FORCED, judge
from server.engine.gbnf import Characters, Choice, Node, Reference, Repeat, Series, is_gbnf, read_gbnf
from server.engine.gbnf_lark import gbnf_to_lark
from server.engine.grammars import GrammarKind, GrammarSource


@cache
def vocabulary() -> Vocabulary:
    return Vocabulary(small())


def matcher(text: str) -> Matcher:
    """Without forced tokens: texts are written byte by byte here."""
    return vocabulary().compile(NOT_FORCED + (gbnf_to_lark(text) if is_gbnf(text) else text))


def accepts(compiled: Matcher, text: str) -> tuple[bool, bool]:
    """Whether a text may be the whole output, and whether it may be how one begins. Byte by byte."""
    now = compiled.copy()
    for byte in text.encode():
        if now.state is not GrammarState.OPEN or not _allowed(now, byte):
            return False, False
        now.advance([byte])
    assert now.state is not GrammarState.LOST, "a dead end"
    return now.state is GrammarState.COMPLETE or _allowed(now, EOS), True


def _allowed(now: Matcher, token: int) -> bool:
    assert now.allowed is not None
    return bool(int.from_bytes(now.allowed, "little") >> token & 1)


class Naive:
    """All ends of what a node can match from a place, by the definitions, until nothing new is found.

    `open` says that a match ran to the end of the text and wanted more.
    """

    def __init__(self, rules: dict[str, Node], text: str) -> None:
        self._rules, self._text = rules, text
        self._known: dict[tuple[str, int], set[int]] = {}
        while True:
            self.open = False
            self._looked_at: set[tuple[str, int]] = set()  # in this round
            before = {key: set(ends) for key, ends in self._known.items()}
            self.ends = self._ends(Reference("root"), 0)
            if before == self._known:
                break

    def _ends(self, node: Node, at: int) -> set[int]:
        match node:
            case Characters(ranges):
                if at == len(self._text):
                    self.open = True
                    return set()
                return {at + 1} if any(low <= ord(self._text[at]) <= high for low, high in ranges) else set()
            case Reference(name):
                known = self._known.setdefault((name, at), set())
                if (name, at) not in self._looked_at:
                    self._looked_at.add((name, at))
                    known |= self._ends(self._rules[name], at)
                return set(known)
            case Series(parts):
                ends = {at}
                for part in parts:
                    ends = self._all_ends(part, ends)
                return ends
            case Choice(ways):
                return {end for way in ways for end in self._ends(way, at)}
            case Repeat(inner, least, most):
                ends = {at}
                for _ in range(least):
                    ends = self._all_ends(inner, ends)
                last = ends
                for _ in range(len(self._text) + 1 if most is None else most - least):
                    last = self._all_ends(inner, last) - ends
                    ends |= last
                return ends

    def _all_ends(self, node: Node, starts: set[int]) -> set[int]:
        return {end for start in starts for end in self._ends(node, start)}


def check(grammar: str, texts: list[str]) -> None:
    rules, compiled = read_gbnf(grammar), matcher(grammar)
    for text in texts:
        naive = Naive(rules, text)
        whole, begins = accepts(compiled, text)
        assert (whole, begins) == (len(text) in naive.ends, naive.open or len(text) in naive.ends), (grammar, text)


def texts_of(alphabet: str, longest: int) -> list[str]:
    return ["".join(text) for size in range(longest + 1) for text in product(alphabet, repeat=size)]


WRITTEN = [
    'root ::= "d\\u00e9cade"', 'root ::= "\\u0041bc" | "\\x41\\U00000042"', 'root ::= ("x" ([0-9]+)?)',
    'root ::= ("a"*)*', 'root ::= ("a"*)* "ab"', 'root ::= a "b"\na ::= "a" a |', 'root ::= "a" root "b" | "ab"',
    'root ::= [^a]+ | "a"', "root ::= . . # any two\n", 'root ::= x-1 _y\nx-1 ::= "a"{2}\n_y ::= "b"{0,2} | [ab-]{1,}',
    'root ::= (\n "a" # first\n | "b"\n)+ |\n "cab"', 'root ::= root "a" | "b"',
    'root ::= "(" root ")" | root "a" | "b"',
    'root ::= "" | ("a" | "ab") ("c" | "bc") root', 'root ::= [a-b\\-\\]]* "\\"" | "\\\\n"',
    'root ::= s\ns ::= "a"* s "b" | "a"+ "c"',
    'root ::= e\ne ::= t ("b" t)*\nt ::= [a]+ | "(" e ")"',
    'root ::= "a"\nroot ::= "b"', 'root ::= [a-a] "b"?\r\n',
    'root ::= ("ab" | "a" | "abc")* x\nx ::= "b" x | "c"', 'root ::= ( "a" ){1 , 3}', 'root ::= "é"+',
]  # fmt: skip


@pytest.mark.parametrize("grammar", WRITTEN)
def test_gbnf_means_what_llama_cpp_says_it_means(grammar: str) -> None:
    said = [
        "décade",
        "d\ue9cade",
        "Abc",
        "AB",
        "\u41bc",
        "x",
        "x1",
        "x12",
        "é",
        "éé",
        '"',
        '-]"',
        "\\n",
        "(b)a",
        "((a)b",
    ]
    check(grammar, texts_of("abc", 4) + texts_of("a(b)", 4) + said)


def written(node: Node) -> str:
    match node:
        case Characters(ranges):
            return "[" + "".join(f"\\U{low:08x}-\\U{high:08x}" for low, high in ranges) + "]"
        case Reference(name):
            return name
        case Series(parts):
            return "(" + " ".join(map(written, parts)) + ")"
        case Choice(ways):
            return "(" + "|".join(map(written, ways)) + ")"
        case Repeat(inner, least, most):
            return f"{written(inner)}{{{least},{'' if most is None else most}}}"


def nodes(names: list[str]) -> st.SearchStrategy[Node]:
    leaves: st.SearchStrategy[Node] = st.sampled_from(
        [Characters(((97, 97),)), Characters(((98, 98),)), Characters(((97, 98),)), *map(Reference, names * 2)]
    )
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3).map(lambda parts: Series(tuple(parts))),
            st.lists(inner, min_size=1, max_size=3).map(lambda ways: Choice(tuple(ways))),
            st.builds(Repeat, inner, st.integers(0, 2), st.none() | st.integers(2, 4)),
        ),
        max_leaves=6,
    )  # fmt: skip


@st.composite
def grammars(draw: st.DrawFn) -> str:
    names = ["root", "x", "y"][: draw(st.integers(1, 3))]
    return "\n".join(f"{name} ::= {written(draw(nodes(names)))}" for name in names)


def equal(grammar: str) -> None:
    try:
        gbnf_to_lark(grammar)
    except GrammarError:  # a rule that never ends
        return
    check(grammar, texts_of("ab", 5))


@settings(max_examples=150)
@given(grammars())
def test_random_gbnf_means_the_same_to_a_naive_matcher(grammar: str) -> None:
    equal(grammar)


@pytest.mark.slow
@settings(max_examples=5_000)
@given(grammars())
def test_five_thousand_random_gbnfs_mean_the_same_to_a_naive_matcher(grammar: str) -> None:
    equal(grammar)


@pytest.mark.parametrize(("grammar", "reason"), [
    ('root ::= "a', "line 1, column 12: unexpected end"),
    ('root ::= "a"\nx ::= (\n"b"', "line 3, column 4: expected ')'"),
    ('root ::= "\\q"', "line 1, column 11: unknown escape"), ("root ::= [b-a]", "a range ends before it begins"),
    ("root ::= x", "rule 'x' is not defined"), ('x ::= "a"', "no rule is called 'root'"),
    ("root ::= []", "no characters"),
    ('root ::= "a" root', "nothing matches rule 'root'"), ('root ::= "a" | x\nx ::= "b" x', "nothing matches rule 'x'"),
    ('root ::= "a"{2001}', "2000 repetitions"), ('root ::= "a"{3,2}', "fewer than the least"),
    ("root ::= <think>", "tokens"),
    ("root ::= [^\\x00-\\U0010ffff]", "no characters"), ('root ::= "\\ud800"', "no such character"),
    ('root ::= "a" )', "expected the end of the line"), ("root ::= *", "expected the end of the line"),
    ('root ::= ' + "(" * 101 + '"a"' + ")" * 101, "nested too deeply"), ('root = "a"\nx ::= "b"', ""),
])  # fmt: skip
def test_what_is_wrong_is_said_by_its_place_in_the_clients_text(grammar: str, reason: str) -> None:
    verdict = judge(vocabulary(), GrammarSource(GrammarKind.GRAMMAR, grammar, "grammar"))
    assert verdict.grammar is None
    assert reason in str(verdict.error)


@pytest.mark.parametrize("grammar", [
    '?start: "a" | "b"', "// ::= is GBNF's\nstart: /a|b/", 'start: x\nx: "a" | "b"', '# x ::= "c"\nstart: "a"|"b"',
])  # fmt: skip
def test_lark_is_lark(grammar: str) -> None:
    assert not is_gbnf(grammar)
    compiled = matcher(grammar)
    assert [accepts(compiled, text)[0] for text in ("a", "b", "c")] == [True, True, False]


def json_texts() -> Iterator[str]:
    yield from (
        '{"a": [1.5e-3, {}, "x\\n", []], "é": null}',
        "{}",
        '{"a":{"b":{"c":[[[1]]]}}}',
        "[",
        '{"a"',
        '{"a":01}',
    )


JSON = r"""root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws (string ":" ws value ("," ws string ":" ws value)*)? "}" ws
array  ::= "[" ws (value ("," ws value)*)? "]" ws
string ::= "\"" ([^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}))* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""


def test_llama_cpps_json_has_lexemes_of_many_characters() -> None:
    """Its strings and numbers are one each: character by character they would take a hundred times as long."""
    assert len(gbnf_to_lark(JSON).split("\n")) < 20
    check(JSON, list(json_texts()))


ENDLESS = """
from test_grammar import vocabulary
from server.engine.checker import judge
from server.engine.grammars import GrammarKind, GrammarSource
lark = "start: A B\\nA: /a*/\\nB: /ab/"
matcher = vocabulary().compile(judge(vocabulary(), GrammarSource(GrammarKind.GRAMMAR, lark, "x")).grammar)
matcher.advance([97])
print(matcher.state.value)
"""


def test_a_lexeme_that_takes_what_was_to_follow_it_stops_no_worker() -> None:
    """The library would follow the letters that it is forced to say, without an end."""
    path = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", ENDLESS]
    done = subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": path}, capture_output=True, timeout=60)
    assert done.stdout == b"open\n", done.stderr
