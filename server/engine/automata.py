"""What texts a piece of a grammar without recursion matches, as an automaton: how they begin, and how they go on."""

from __future__ import annotations

from dataclasses import dataclass, field

from server.engine.gbnf import Characters, Choice, Node, Ranges, Reference, Repeat, Series

STATES_MAX = 2000

Firsts = set[tuple[int, int]]  # ranges of characters


class TooLarge(Exception):  # noqa: N818
    """It would need more states than are worth it."""


@dataclass(slots=True)
class Automaton:
    """Thompson's (1968): state 0 is the start, `end` accepts."""

    moves: list[list[tuple[Ranges, int]]] = field(default_factory=lambda: [[]])
    empty: list[list[int]] = field(default_factory=lambda: [[]])  # moves that read nothing
    end: int = 0
    first: Firsts = field(default_factory=set)
    nullable: bool = False

    @classmethod
    def of(cls, node: Node, rules: dict[str, Node]) -> Automaton:
        """Raises TooLarge."""
        automaton = cls()
        automaton.end = automaton._build(node, 0, rules)
        reached = automaton.closure(0)
        automaton.nullable = automaton.end in reached
        automaton.first = {each for state in reached for ranges, _ in automaton.moves[state] for each in ranges}
        return automaton

    def _state(self) -> int:
        if len(self.moves) >= STATES_MAX:
            raise TooLarge
        self.moves.append([])
        self.empty.append([])
        return len(self.moves) - 1

    def _build(self, node: Node, start: int, rules: dict[str, Node]) -> int:
        """Returns the state behind it. Every state it adds is its own, but for `start`."""
        match node:
            case Characters(ranges):
                end = self._state()
                self.moves[start].append((ranges, end))
                return end
            case Reference(name):
                return self._build(rules[name], start, rules)
            case Series(parts):
                for part in parts:
                    start = self._build(part, start, rules)
                return start
            case Choice(ways):
                end = self._state()
                for way in ways:
                    begin = self._state()
                    self.empty[start].append(begin)
                    self.empty[self._build(way, begin, rules)].append(end)
                return end
            case Repeat(inner, least, most):
                for _ in range(least):
                    start = self._build(inner, start, rules)
                return (
                    self._loop(inner, start, rules) if most is None else self._upto(inner, start, most - least, rules)
                )

    def _loop(self, node: Node, start: int, rules: dict[str, Node]) -> int:
        begin = self._state()
        self.empty[start].append(begin)
        self.empty[self._build(node, begin, rules)].append(begin)
        end = self._state()
        self.empty[begin].append(end)
        return end

    def _upto(self, node: Node, start: int, most: int, rules: dict[str, Node]) -> int:
        end = self._state()
        for _ in range(most):
            begin = self._state()
            self.empty[start].append(begin)
            self.empty[start].append(end)
            start = self._build(node, begin, rules)
        self.empty[start].append(end)
        return end

    def closure(self, state: int) -> set[int]:
        """The states that are reached without a character."""
        reached = [state]
        seen = {state}
        for each in reached:
            for more in self.empty[each]:
                if more not in seen:
                    seen.add(more)
                    reached.append(more)
        return seen


def goes_on(one: Automaton, other: Automaton, after: Firsts) -> bool:
    """Whether `other` can read a text that is all of `one`'s, and then one of the characters that may follow that."""
    if not _meet(tuple(one.first), tuple(other.first)):
        return False
    seen = {(0, 0)}
    pairs = [(0, 0)]
    for p, q in pairs:
        ours, theirs = one.closure(p), other.closure(q)
        moves = [move for state in theirs for move in other.moves[state]]
        if (p, q) != (0, 0) and one.end in ours and any(_meet(ranges, tuple(after)) for ranges, _ in moves):
            return True
        for state in ours:
            for ranges, target in one.moves[state]:
                for more in ((target, to) for read, to in moves if _meet(ranges, read)):
                    if more not in seen:
                        seen.add(more)
                        pairs.append(more)
    return False


def _meet(some: Ranges, others: Ranges) -> bool:
    return any(low <= stop and start <= high for low, high in some for start, stop in others)
