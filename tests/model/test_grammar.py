"""What the matcher allows, against Python's `re` over the vocabulary written out; and that it can be had again."""

from __future__ import annotations

import random
import re
from functools import cache
from pathlib import Path

import pytest

import model
from model.byte_level import ByteLevelTokenizer
from model.errors import GrammarError
from model.grammar import Grammars, Matcher, Vocabulary
from model.step import GrammarState
from model.tokenizer import read_tokenizer

WORDS = [b"ab", b"abc", b"ba", b"cab", b"aa", "é".encode(), b"a b"]
EOS = 256 + len(WORDS)


def small() -> ByteLevelTokenizer:
    ranks = {bytes([value]): value for value in range(256)} | {word: 256 + i for i, word in enumerate(WORDS)}
    return ByteLevelTokenizer(ranks, {"<|endoftext|>": EOS}, ["<|endoftext|>"], EOS + 3)  # two ids that no token has


@cache
def vocabulary() -> Vocabulary:
    return Vocabulary(small())


def allowed(matcher: Matcher) -> set[int]:
    assert matcher.allowed is not None
    bits = int.from_bytes(matcher.allowed, "little")
    return {token for token in range(EOS + 3) if bits >> token & 1}


def finite(regex: str) -> set[bytes]:
    """Every text over a small alphabet that matches."""
    texts, layer = set(), {""}
    for _ in range(7):
        texts |= {text for text in layer if re.fullmatch(regex, text)}
        layer = {text + c for text in layer for c in "abcé "}
    return {text.encode() for text in texts}


@pytest.mark.parametrize("regex", ["a(b|c)?a", "(ab|é){1,2}c", "a{2,4}", "(a b|cab)+c?"])
def test_a_token_is_allowed_where_a_match_can_go_on_with_it(regex: str) -> None:
    """In every state that the first tokens lead to. The alternatives are finite, or their starts are."""
    tokenizer, texts = small(), finite(regex)
    open_ended = "+" in regex
    chance = random.Random(1)
    for _ in range(20):
        matcher, said = vocabulary().compile(f"start: /{regex}/"), b""
        while matcher.state is GrammarState.OPEN and len(said) < 3:
            now = allowed(matcher)
            for token in range(EOS):
                new = said + tokenizer.token_bytes(token)
                can_go_on = any(text.startswith(new) for text in texts)
                assert (token in now) <= can_go_on or open_ended, (said, token)
            assert (EOS in now) == (said in texts)
            token = chance.choice(sorted(now))
            matcher.advance([token])
            if token != EOS:
                said += tokenizer.token_bytes(token)
        if matcher.state is GrammarState.COMPLETE:
            assert said in texts


def test_it_is_complete_with_the_token_after_which_nothing_can_follow() -> None:
    matcher = vocabulary().compile("start: /abc?/")
    matcher.advance([256])
    assert matcher.state is GrammarState.OPEN
    assert allowed(matcher) == {ord("c"), EOS}
    matcher.advance([ord("c")])
    assert matcher.state is GrammarState.COMPLETE
    assert allowed(matcher) == {EOS}


def test_the_end_completes_it_and_a_stranger_loses_it() -> None:
    ended, strayed = vocabulary().compile("start: /a*/"), vocabulary().compile("start: /a*/")
    ended.advance([97, EOS])
    strayed.advance([97, 98])
    assert (ended.state, strayed.state) == (GrammarState.COMPLETE, GrammarState.LOST)


def test_copies_go_their_own_ways() -> None:
    first = vocabulary().compile("start: /ab|ac/")
    second = first.copy()
    first.advance([97, 98])
    second.advance([97])
    assert first.state is GrammarState.COMPLETE
    assert allowed(second) == {98, 99}


def test_a_matcher_can_be_had_again_from_the_output() -> None:
    grammars = Grammars(vocabulary)
    grammar = "start: /(ab|c){3,9}é/"
    chance, output = random.Random(3), list[int]()
    matcher = grammars.matcher(grammar, [])
    while matcher.state is GrammarState.OPEN:
        token = chance.choice(sorted(allowed(matcher)))
        output.append(token)
        matcher.advance([token])
        again = grammars.matcher(grammar, output)
        assert (again.state, again.allowed) == (matcher.state, matcher.allowed)


def test_a_worker_that_sees_no_grammar_makes_no_vocabulary() -> None:
    made: list[Vocabulary] = []

    def load() -> Vocabulary:
        made.append(vocabulary())
        return made[-1]

    grammars = Grammars(load)
    assert not made
    for grammar in ("start: /a/", "start: /b/"):
        assert grammars.matcher(grammar, []).state is GrammarState.OPEN
    assert len(made) == 1


def test_what_cannot_be_compiled_is_an_error_here_and_lost_in_a_worker() -> None:
    with pytest.raises(GrammarError):
        vocabulary().compile("start: /(/")
    with pytest.raises(GrammarError):
        vocabulary().compile("start: start")
    assert Grammars(vocabulary).matcher("start: /(/", []).state is GrammarState.LOST


def test_the_true_vocabulary() -> None:
    directory = Path(model.__file__).parent / "default"
    tokenizer = read_tokenizer(directory, 50257, (50256,))
    matcher = Vocabulary(tokenizer).compile("start: /[^<]*<\\|endoftext\\|>/")
    assert matcher.allowed is not None
    bits = int.from_bytes(matcher.allowed, "little")
    assert not bits >> 50256 & 1, "the end of text is not its name"
    assert bits >> tokenizer.encode(" the")[0] & 1
    matcher.advance(tokenizer.encode("x") + [tokenizer.encode(c)[0] for c in "<|endoftext|>"])
    assert matcher.state is GrammarState.COMPLETE


def test_every_end_is_allowed_where_a_grammar_is_matched_and_ends_it() -> None:
    ranks = {bytes([value]): value for value in range(256)}
    ends = {"<|endoftext|>": 256, "<|stop|>": 257}
    both = Vocabulary(ByteLevelTokenizer(ranks, {**ends, "<|im_start|>": 258}, list(ends), 260))
    for end in ends.values():
        matcher = both.compile("start: /ab?/")
        assert not {256, 257, 258} & allowed(matcher)
        matcher.advance([ord("a")])
        assert allowed(matcher) == {ord("b"), 256, 257}
        assert matcher.state is GrammarState.OPEN
        matcher.copy().advance([end])
        matcher.advance([end])
        assert matcher.state is GrammarState.COMPLETE
    matcher = both.compile("start: /ab?/")
    matcher.advance([ord("a"), ord("b")])
    assert matcher.state is GrammarState.COMPLETE
