"""Stop strings: where in a growing text the first of them is complete. Pure; knows nothing of tokens.

All stop strings of a request are one automaton (Aho and Corasick 1975), so a character costs the same however many they
are, how long, and how much each is like the text. It is made once and shared by all samples.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import lru_cache

ROOT = 0


@dataclass(frozen=True, slots=True)
class StopMatch:
    text: str  # safe to show
    stop: str | None = None  # the stop string that is complete


@dataclass(frozen=True, slots=True)
class Automaton:
    """Its states are the beginnings of the stop strings; the text leads to the longest of them that ends it."""

    next: list[dict[str, int]]  # by state: the states one character further
    fallback: list[int]  # the longest other state that ends this one
    complete: list[int | None]  # the first stop string, by its place, that ends this state
    held: list[int]  # characters at the end of the text that may yet become a stop string


@lru_cache(8)  # as long as the samples of a request come one after another, each finds its request's
def automaton(stops: tuple[str, ...]) -> Automaton:
    following: list[dict[str, int]] = [{}]
    complete: list[int | None] = [None]
    depth = [0]
    for place, stop in enumerate(stops):
        state = ROOT
        for character in stop:
            if character not in following[state]:
                following[state][character] = len(following)
                following.append({})
                complete.append(None)
                depth.append(depth[state] + 1)
            state = following[state][character]
        if complete[state] is None:
            complete[state] = place
    fallback, held = [ROOT] * len(following), [0] * len(following)
    queue = deque(following[ROOT].values())
    held[ROOT] = 0
    for state in queue:
        held[state] = depth[state] if following[state] else 0
    while queue:
        state = queue.popleft()
        for character, longer in following[state].items():
            behind = fallback[state]
            while behind and character not in following[behind]:
                behind = fallback[behind]
            behind = following[behind].get(character, ROOT)
            fallback[longer] = behind
            held[longer] = depth[longer] if following[longer] else held[behind]
            others = [each for each in (complete[longer], complete[behind]) if each is not None]
            complete[longer] = min(others, default=None)
            queue.append(longer)
    return Automaton(following, fallback, complete, held)


class StopMatcher:
    """Finds the stop string that completes first, keeping back only what may still become one."""

    def __init__(self, stops: tuple[str, ...], *, keep: bool) -> None:
        """`keep`: a match's own text is shown too."""
        self._stops = stops
        self._keep = keep
        self._automaton = automaton(stops) if stops else None
        self._state = ROOT
        self._held = ""  # the longest suffix so far that is a proper prefix of a stop

    def push(self, text: str, *, immune: bool = False) -> StopMatch:
        """immune: no stop string may end in this text."""
        if self._automaton is None:
            return StopMatch(text)
        buffer = self._held + text
        found = self._follow(self._automaton, text, immune=immune)
        if found is not None:
            place, length = found
            stop = self._stops[place]
            end = len(buffer) - len(text) + length
            self._state, self._held = ROOT, ""
            return StopMatch(buffer[: end if self._keep else end - len(stop)], stop)
        shown = len(buffer) - self._automaton.held[self._state]
        self._held = buffer[shown:]
        return StopMatch(buffer[:shown])

    def _follow(self, automaton: Automaton, text: str, *, immune: bool) -> tuple[int, int] | None:
        """The place of the stop string that is complete, and after how many characters; None where none is."""
        following, fallback, complete, state = automaton.next, automaton.fallback, automaton.complete, self._state
        for count, character in enumerate(text, 1):
            while state and character not in following[state]:
                state = fallback[state]
            state = following[state].get(character, ROOT)
            if not immune and (place := complete[state]) is not None:
                return place, count
        self._state = state
        return None

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held
