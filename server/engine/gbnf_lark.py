"""GBNF to llguidance's Lark, meaning for meaning.

GBNF is a grammar of characters. llguidance reads lexemes, each as long as it can be, which is not the same: of
`"a"* "ab"` its first lexeme would take every a. So a piece of a grammar becomes a lexeme only where nothing that may
follow it could be read as more of a lexeme; elsewhere it is taken apart, in the end to single characters, which are
always safe. A grammar without recursion is one lexeme, and safe: nothing follows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from model.errors import GrammarError
from server.engine.automata import Automaton, Firsts, TooLarge, goes_on
from server.engine.gbnf import Characters, Choice, Node, Ranges, Reference, Repeat, Series, read_gbnf, walk


@dataclass(frozen=True, slots=True)
class Lexeme:
    node: Node


Plan = Lexeme | Node  # references in it are to rules that stay rules


def gbnf_to_lark(text: str) -> str:
    """Raises GrammarError."""
    return _Converter(read_gbnf(text)).lark()


class _Converter:
    def __init__(self, rules: dict[str, Node]) -> None:
        self._rules = rules
        self._reached = self._reach()
        self._check_endings()
        self._below = {name: self._names_below(name) for name in self._reached}
        self._apart: set[Node] = set()  # no lexemes

    # === Rules ===

    def _reach(self) -> list[str]:
        """The rules that root needs, itself first. Raises GrammarError for one that is not there."""
        found = ["root"]
        for name in found:
            for each in _references(self._rules[name]):
                if each not in self._rules:
                    raise GrammarError(f"rule '{each}' is not defined")
                if each not in found:
                    found.append(each)
        return found

    def _check_endings(self) -> None:
        """Raises GrammarError for a rule that no text matches, since it never ends."""
        ending: set[str] = set()
        while more := [name for name in self._reached if name not in ending and _ends(self._rules[name], ending)]:
            ending.update(more)
        for name in self._reached:
            if name not in ending:
                raise GrammarError(f"nothing matches rule '{name}': it never ends")

    def _names_below(self, name: str) -> set[str]:
        found = [*_references(self._rules[name])]
        for each in found:
            found += [more for more in _references(self._rules[each]) if more not in found]
        return set(found)

    def _recursive(self, name: str) -> bool:
        """Whether it, or a rule that it needs, needs itself."""
        return any(each in self._below[each] for each in {name, *self._below[name]})

    def _regular(self, node: Node) -> bool:
        return not any(self._recursive(name) for name in _references(node))

    # === Lexemes ===

    def lark(self) -> str:
        if not self._recursive("root"):
            return _write({"root": Lexeme(Reference("root"))}, self._rules)
        while True:
            plans = {name: self._plan(self._rules[name]) for name in self._reached if self._recursive(name)}
            unsafe = self._unsafe(plans)
            if not unsafe:
                return _write(plans, self._rules)
            self._apart |= unsafe

    def _plan(self, node: Node) -> Plan:
        """The largest lexemes that are not to be taken apart."""
        if self._regular(node) and node not in self._apart:
            return Lexeme(node)
        match node:
            case Reference(name):
                return node if self._recursive(name) else self._plan(self._rules[name])
            case Series(parts):
                return Series(tuple(self._plans(parts, Series)))  # type: ignore[arg-type]
            case Choice(ways):
                return Choice(tuple(self._plans(ways, Choice)))  # type: ignore[arg-type]
            case Repeat(inner, least, most):
                return Repeat(self._plan(inner), least, most)  # type: ignore[arg-type]
        return node

    def _plans(self, nodes: tuple[Node, ...], kind: type[Series | Choice]) -> Iterator[Plan]:
        """Regular neighbours become one lexeme."""
        run: list[Node] = []
        for node in (*nodes, None):
            if node is not None and self._regular(node):
                run.append(node)
                continue
            together = kind(tuple(run))
            if len(run) > 1 and together not in self._apart:
                yield Lexeme(together)
            else:
                yield from map(self._plan, run)
            run = []
            if node is not None:
                yield self._plan(node)

    def _unsafe(self, plans: dict[str, Plan]) -> set[Node]:
        """Lexemes that could go on with what follows another, or themselves."""
        automata: dict[Node, Automaton] = {}
        unsafe: set[Node] = set()
        for node in _lexemes(plans):
            try:
                automata[node] = Automaton.of(node, self._rules)
            except TooLarge:
                unsafe.add(node)
        if unsafe:
            return unsafe
        follow = _Follow(plans, automata).of_lexemes
        for longer, automaton in automata.items():
            if not isinstance(longer, Characters) and any(
                goes_on(each, automaton, follow[node]) for node, each in automata.items()
            ):
                unsafe.add(longer)
        return unsafe


def _references(node: Node) -> list[str]:
    found: list[str] = []
    walk(node, lambda each: found.append(each.name) if isinstance(each, Reference) else None)
    return found


def _ends(node: Node, ending: set[str]) -> bool:
    match node:
        case Reference(name):
            return name in ending
        case Series(parts):
            return all(_ends(part, ending) for part in parts)
        case Choice(ways):
            return any(_ends(way, ending) for way in ways)
        case Repeat(inner, least, _):
            return least == 0 or _ends(inner, ending)
    return True


def _lexemes(plans: dict[str, Plan]) -> list[Node]:
    found: dict[Node, None] = {}

    def visit(plan: Plan) -> None:
        if isinstance(plan, Lexeme):
            found[plan.node] = None

    for plan in plans.values():
        walk(plan, visit)  # type: ignore[arg-type]
    return list(found)


# === What may follow a lexeme ===


class _Follow:
    """First and following characters, by the usual fixed points (Aho et al., Compilers, 4.4)."""

    def __init__(self, plans: dict[str, Plan], automata: dict[Node, Automaton]) -> None:
        self._automata = automata
        self._firsts: dict[str, tuple[Firsts, bool]] = {name: (set(), False) for name in plans}
        self._of_rules: dict[str, Firsts] = {name: set() for name in plans}
        self.of_lexemes: dict[Node, Firsts] = {node: set() for node in automata}
        while True:
            now = {name: self._first(plan) for name, plan in plans.items()}
            if now == self._firsts:
                break
            self._firsts = now
        sizes: list[int] = []
        while True:
            for name, plan in plans.items():
                self._spread(plan, set(self._of_rules[name]))
            before, sizes = sizes, [len(each) for each in (*self._of_rules.values(), *self.of_lexemes.values())]
            if sizes == before:
                break

    def _first(self, plan: Plan) -> tuple[Firsts, bool]:
        """The characters it may begin with, and whether it may be empty."""
        match plan:
            case Lexeme(node):
                return self._automata[node].first, self._automata[node].nullable
            case Reference(name):
                return self._firsts[name]
            case Choice(ways):
                each = [self._first(way) for way in ways]
                return set[tuple[int, int]]().union(*(first for first, _ in each)), any(empty for _, empty in each)
            case Repeat(inner, least, _):
                first, empty = self._first(inner)
                return first, empty or least == 0
            case Series(parts):
                found: Firsts = set()
                for part in parts:
                    first, empty = self._first(part)
                    found |= first
                    if not empty:
                        return found, False
                return found, True
        raise AssertionError("characters are lexemes")

    def _spread(self, plan: Plan, after: Firsts) -> None:
        match plan:
            case Lexeme(node):
                self.of_lexemes[node] |= after
            case Reference(name):
                self._of_rules[name] |= after
            case Choice(ways):
                for way in ways:
                    self._spread(way, after)
            case Repeat(inner, _, most):
                self._spread(inner, after if most == 1 else after | self._first(inner)[0])
            case Series(parts):
                for part in reversed(parts):
                    self._spread(part, after)
                    first, empty = self._first(part)
                    after = first | after if empty else first


# === Writing ===


def _write(plans: dict[str, Plan], rules: dict[str, Node]) -> str:
    """`start`, a rule for each plan, and a terminal for each lexeme and for each rule that lexemes need."""
    names = {name: f"r{place}" for place, name in enumerate(plans)}
    lexemes = {node: f"L{place}" for place, node in enumerate(_lexemes(plans))}
    terminals: dict[str, str] = {}
    for node in lexemes:
        needed = _references(node)
        for each in needed:
            if each not in terminals:
                terminals[each] = f"T{len(terminals)}"
                needed += _references(rules[each])
    lines = [f"start: {names['root']}"]
    lines += [f"{names[name]}: {_text(plan, names, lexemes)}" for name, plan in plans.items()]
    lines += [f"{lexeme}: {_text(node, terminals, {})}" for node, lexeme in lexemes.items()]
    lines += [f"{terminal}: {_text(rules[name], terminals, {})}" for name, terminal in terminals.items()]
    return "\n".join(lines) + "\n"


def _text(plan: Plan, names: dict[str, str], lexemes: dict[Node, str]) -> str:
    match plan:
        case Lexeme(node):
            return lexemes[node]
        case Characters(ranges):
            return f"/{_class(ranges)}/"
        case Reference(name):
            return names[name]
        case Series(parts):
            return "(" + " ".join(_joined_text(parts, names, lexemes)) + ")" if parts else '""'
        case Choice(ways):
            return "(" + " | ".join(_text(way, names, lexemes) for way in ways) + ")"
        case Repeat(inner, least, most):
            return f"({_text(inner, names, lexemes)}){_times(least, most)}"


def _joined_text(parts: tuple[Plan, ...], names: dict[str, str], lexemes: dict[Node, str]) -> Iterator[str]:
    """Characters that follow each other inside a lexeme as one regex."""
    run = ""
    for part in parts:
        if isinstance(part, Characters):
            run += _class(part.ranges)
            continue
        if run:
            yield f"/{run}/"
        run = ""
        yield _text(part, names, lexemes)
    if run:
        yield f"/{run}/"


def _class(ranges: Ranges) -> str:
    if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
        return _character(ranges[0][0])
    return "[" + "".join(f"{_character(low)}-{_character(high)}" for low, high in ranges) + "]"


def _character(code: int) -> str:
    character = chr(code)
    return character if character.isascii() and character.isalnum() else f"\\x{{{code:x}}}"


def _times(least: int, most: int | None) -> str:
    signs = {(0, None): "*", (1, None): "+", (0, 1): "?"}
    return signs.get((least, most)) or f"{{{least},{'' if most is None else most}}}"
