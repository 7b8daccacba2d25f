"""Looks for places in a grammar where nothing can follow although it is not matched, by walking through it at random.

What it does not find, a worker may: such a request ends with an error there.
"""

from __future__ import annotations

import random
import time

from model.errors import GrammarError
from model.grammar import Matcher, Vocabulary
from model.step import GrammarState

WALKS = 12
STEPS = 48  # of each
CPU_SECONDS = 0.04  # for all: a walk that takes longer is not gone to its end
DEAD_END = "it leads to where nothing can follow although it is not matched, or where finding out takes too long"
TOO_SLOW = "finding out what may follow takes too long"
STEP_CPU_SECONDS = 0.1  # that finding out what may follow may take at any place
LIKELY = b'"}],:0a]}" \n'  # what brings a walk on: the ends of texts, lists and objects


def find_dead_ends(start: Matcher, vocabulary: Vocabulary) -> None:
    """Raises GrammarError where it finds one."""
    chance = random.Random(0)  # noqa: S311  the same walks for the same grammar
    until = time.process_time() + CPU_SECONDS
    likely = [vocabulary.tokens_of(LIKELY), vocabulary.tokens_of(bytes(range(256))), []]
    for _ in range(WALKS):
        matcher = start.copy()
        for _ in range(STEPS):
            began = time.thread_time()
            allowed = matcher.allowed
            if time.thread_time() - began > STEP_CPU_SECONDS:
                raise GrammarError(TOO_SLOW)
            if matcher.state is GrammarState.LOST:
                raise GrammarError(DEAD_END)
            if allowed is None or matcher.state is GrammarState.COMPLETE or time.process_time() > until:
                break
            matcher.advance([_choose(allowed, chance.choice(likely), chance)])


def _choose(allowed: bytes, likely: list[int], chance: random.Random) -> int:
    """One of the allowed tokens, and one of the likely ones where it can be."""
    bits = int.from_bytes(allowed, "little")
    open_ways = [token for token in likely if bits >> token & 1]
    if open_ways:
        return chance.choice(open_ways)
    place = chance.randrange(bits.bit_length())
    above = bits >> place
    return place + (above & -above).bit_length() - 1
