"""llama.cpp's grammars (GBNF), read into a tree.

By its grammars/README.md and the parser of its src/llama-grammar.cpp: what that takes is taken here, but for tokens
(`<think>`, `<[1000]>`) and for classes that no character is in. Knows nothing of how a grammar is run.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from model.errors import GrammarError

MOST_REPEATS = 2000  # as llama.cpp: more is refused where it has to be, and is no bound where it may be
DEPTH_MAX = 100  # of parentheses
LAST_CHARACTER = 0x10FFFF
SURROGATES = (0xD800, 0xDFFF)

GBNF = re.compile(r"(?:\s|#[^\n]*(?:\n|$)|//[^\n]*(?:\n|$))*[A-Za-z0-9_-]+[ \t]*::=")
NAME = re.compile(r"[A-Za-z0-9_-]+")
NUMBER = re.compile(r"[0-9]{1,9}")
SPACE = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
SPACE_AND_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
ESCAPE = re.compile(r'\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([trn\\"\[\]-]))')
CONTROLS = {"t": "\t", "r": "\r", "n": "\n"}

Ranges = tuple[tuple[int, int], ...]  # of code points, both ends included, in order and apart


@dataclass(frozen=True, slots=True)
class Characters:
    """One character of a class."""

    ranges: Ranges


@dataclass(frozen=True, slots=True)
class Reference:
    name: str  # of a rule


@dataclass(frozen=True, slots=True)
class Series:
    """One after the other; of no parts the empty text."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    ways: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    node: Node
    least: int
    most: int | None  # None for no bound


Node = Characters | Reference | Series | Choice | Repeat


def is_gbnf(text: str) -> bool:
    """Whether the first thing in it is a rule of GBNF; Lark has `:` where GBNF has `::=`."""
    return GBNF.match(text) is not None


def read_gbnf(text: str) -> dict[str, Node]:
    """Its rules by name; of two with one name the later one counts, as in llama.cpp. Raises GrammarError."""
    reader = _Reader(text)
    reader.skip(SPACE_AND_LINES)
    rules: dict[str, Node] = {}
    while not reader.ended:
        name, node = reader.rule()
        rules[name] = node
    if "root" not in rules:
        raise GrammarError("no rule is called 'root'")
    return rules


class _Reader:
    """Where it is in the text. Every method leaves it behind what it has read, and raises GrammarError."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0

    @property
    def ended(self) -> bool:
        return self._at >= len(self._text)

    def skip(self, pattern: re.Pattern[str]) -> None:
        found = pattern.match(self._text, self._at)
        self._at = self._at if found is None else found.end()

    def rule(self) -> tuple[str, Node]:
        name = self._take(NAME, "the name of a rule")
        self.skip(SPACE)
        if not self._next("::="):
            raise self._error("expected '::='")
        self.skip(SPACE_AND_LINES)
        node = self._choice()
        if not self.ended and not self._next("\r\n") and not self._next("\n") and not self._next("\r"):
            raise self._error("expected the end of the line")
        self.skip(SPACE_AND_LINES)
        return name, node

    def _choice(self) -> Node:
        ways = [self._series()]
        while self._next("|"):
            self.skip(SPACE_AND_LINES)
            ways.append(self._series())
        return ways[0] if len(ways) == 1 else Choice(tuple(ways))

    def _series(self) -> Node:
        parts: list[Node] = []
        while (part := self._part()) is not None:
            self._space()
            while (times := self._times()) is not None:
                part = Series(()) if times == (0, 0) else part if times == (1, 1) else Repeat(part, *times)
                self._space()
            parts.append(part)
        return parts[0] if len(parts) == 1 else Series(tuple(parts))

    def _part(self) -> Node | None:
        if self._next('"'):
            return self._literal()
        if self._next("["):
            return self._class()
        if self._next("("):
            return self._group()
        if self._next("."):
            return Characters(_others([]))
        if self._peek() in {"<", "!"}:
            raise self._error("tokens are not supported")
        if NAME.match(self._text, self._at):
            return Reference(self._take(NAME, "a name"))
        return None

    def _group(self) -> Node:
        self._depth += 1
        if self._depth > DEPTH_MAX:
            raise self._error("parentheses are nested too deeply")
        self.skip(SPACE_AND_LINES)
        node = self._choice()
        if not self._next(")"):
            raise self._error("expected ')'")
        self._depth -= 1
        return node

    def _literal(self) -> Node:
        parts = []
        while not self._next('"'):
            code = self._character()
            parts.append(Characters(((code, code),)))
        return parts[0] if len(parts) == 1 else Series(tuple(parts))

    def _class(self) -> Node:
        negated = self._next("^")
        ranges = []
        while not self._next("]"):
            low = high = self._character()
            if self._peek() == "-" and self._peek(1) != "]":
                self._at += 1
                high = self._character()
            if high < low:
                raise self._error("a range ends before it begins")
            ranges.append((low, high))
        if not ranges:
            raise self._error("a class of no characters")
        kept = _others(ranges) if negated else _joined(ranges)
        if not kept:
            raise self._error("a class of no characters")
        return Characters(kept)

    def _character(self) -> int:
        """The code point."""
        if self.ended:
            raise self._error("unexpected end")
        if self._peek() != "\\":
            self._at += 1
            return ord(self._text[self._at - 1])
        found = ESCAPE.match(self._text, self._at)
        if found is None:
            raise self._error("unknown escape")
        digits = found[1] or found[2] or found[3]
        code = int(digits, 16) if digits else ord(CONTROLS.get(found[4], found[4]))
        if code > LAST_CHARACTER or SURROGATES[0] <= code <= SURROGATES[1]:
            raise self._error("no such character")
        self._at = found.end()
        return code

    def _times(self) -> tuple[int, int | None] | None:
        for sign, times in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._next(sign):
                return times
        return self._braces() if self._next("{") else None

    def _braces(self) -> tuple[int, int | None]:
        self._space()
        least = self._number()
        most: int | None = least
        self._space()
        if self._next(","):
            self._space()
            most = None if self._peek() == "}" else self._number()
            self._space()
        if not self._next("}"):
            raise self._error("expected '}'")
        if least > MOST_REPEATS:
            raise self._error(f"more than {MOST_REPEATS} repetitions")
        if most is not None and most < least:
            raise self._error("the most repetitions are fewer than the least")
        return least, None if most is not None and most > MOST_REPEATS else most

    def _number(self) -> int:
        return int(self._take(NUMBER, "a number"))

    def _space(self) -> None:
        """Lines may end inside parentheses alone."""
        self.skip(SPACE_AND_LINES if self._depth else SPACE)

    def _peek(self, ahead: int = 0) -> str:
        return self._text[self._at + ahead : self._at + ahead + 1]

    def _next(self, text: str) -> bool:
        """Take it, if it comes next."""
        found = self._text.startswith(text, self._at)
        self._at += len(text) if found else 0
        return found

    def _take(self, pattern: re.Pattern[str], what: str) -> str:
        found = pattern.match(self._text, self._at)
        if found is None:
            raise self._error(f"expected {what}")
        self._at = found.end()
        return found[0]

    def _error(self, why: str) -> GrammarError:
        before = self._text[: self._at]
        line, column = before.count("\n") + 1, self._at - (before.rfind("\n") + 1) + 1
        return GrammarError(f"line {line}, column {column}: {why}")


def _joined(ranges: list[tuple[int, int]]) -> Ranges:
    """Without surrogates, which no text holds."""
    points: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        for start, stop in ((low, min(high, SURROGATES[0] - 1)), (max(low, SURROGATES[1] + 1), high)):
            if start > stop:
                continue
            if points and start <= points[-1][1] + 1:
                points[-1] = points[-1][0], max(points[-1][1], stop)
            else:
                points.append((start, stop))
    return tuple(points)


def _others(ranges: list[tuple[int, int]]) -> Ranges:
    left, at = [], 0
    for low, high in _joined(ranges):
        left.append((at, low - 1))
        at = high + 1
    left.append((at, LAST_CHARACTER))
    return _joined([(low, high) for low, high in left if low <= high])


def walk(node: Node, visit: Callable[[Node], None]) -> None:
    """Every node of a tree, itself first. References are not followed."""
    visit(node)
    inner = node.parts if isinstance(node, Series) else node.ways if isinstance(node, Choice) else ()
    for each in (node.node,) if isinstance(node, Repeat) else inner:
        walk(each, visit)
