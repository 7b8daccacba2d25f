"""What the matcher allows, against Python's `re` over the vocabulary written out; and that it can be had again."""

from __future__ import annotations

import random
import re
import threading
import time
from functools import cache
from pathlib import Path

import pytest

import model
from model import grammar
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
    written = "start: /(ab|c){3,9}é/"
    chance, output = random.Random(3), list[int]()
    matcher = grammars.matcher(written, [])
    while matcher.state is GrammarState.OPEN:
        token = chance.choice(sorted(allowed(matcher)))
        output.append(token)
        matcher.advance([token])
        again = grammars.matcher(written, output)
        assert (again.state, again.allowed) == (matcher.state, matcher.allowed)


def test_a_worker_that_sees_no_grammar_makes_no_vocabulary() -> None:
    made: list[Vocabulary] = []

    def load() -> Vocabulary:
        made.append(vocabulary())
        return made[-1]

    grammars = Grammars(load)
    assert not made
    for written in ("start: /a/", "start: /b/"):
        assert grammars.matcher(written, []).state is GrammarState.OPEN
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


def test_neither_the_vocabulary_nor_a_grammar_is_made_by_the_thread_that_computes_steps() -> None:
    made: list[int] = []

    def load() -> Vocabulary:
        made.append(threading.get_ident())
        return vocabulary()

    grammars = Grammars(load)
    grammars.begin().result(60)
    assert made
    assert made[0] != threading.get_ident()
    preparing = grammars.prepare("start: /ab*/")
    assert preparing is not None
    preparing.result(60)
    assert grammars.prepare("start: /ab*/") is None, "it is compiled"
    assert grammars.matcher("start: /ab*/", []).state is GrammarState.OPEN
    assert len(made) == 1


def test_a_mask_that_takes_long_is_computed_beside_what_its_asker_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is the same one."""
    computed: list[str] = []
    compute = Matcher._compute

    def recorded(matcher: Matcher) -> bytes:
        computed.append(threading.current_thread().name)
        return compute(matcher)

    plain = vocabulary().compile("start: /(ab|c){3,9}é/")
    monkeypatch.setattr(grammar, "SLOW", 0.0)
    monkeypatch.setattr(Matcher, "_compute", recorded)
    matcher = Grammars(vocabulary).matcher("start: /(ab|c){3,9}é/", [])
    computed.clear()
    chance = random.Random(1)
    while plain.state is GrammarState.OPEN:
        token = chance.choice(sorted(allowed(plain)))
        plain.advance([token])
        matcher.advance([token])
        assert (matcher.allowed, matcher.state) == (plain.allowed, plain.state)
        computed = [name for name in computed if name != threading.current_thread().name]
    assert any(name.startswith("masks") for name in computed)


def test_the_samples_of_a_request_share_the_first_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = Grammars(vocabulary)
    first = grammars.matcher("start: /a[bc]+/", [])
    assert first.allowed is not None
    monkeypatch.setattr(Matcher, "_compute", None)
    assert all(grammars.matcher("start: /a[bc]+/", []).allowed is first.allowed for _ in range(8))


def test_a_step_of_an_ambiguous_grammar_takes_a_bounded_time_or_is_refused() -> None:
    """Its states grow with the text: what they may grow to is bounded."""
    endless = "start: x\nx: x x x | x x | /[a-z]/ | /[a-z ]/"
    started = time.thread_time()
    try:
        matcher = vocabulary().compile(endless)
        for _ in range(30):
            if matcher.allowed is None:
                break
            matcher.advance([97])
    except GrammarError:
        pass
    assert time.thread_time() - started < 5, "of processor time; without a bound it took minutes"


def test_a_lost_matcher_stays_lost_whatever_comes() -> None:
    matcher = Grammars(vocabulary).matcher("start: /(/", [])
    matcher.advance([97])
    assert (matcher.state, matcher.allowed) == (GrammarState.LOST, None)
