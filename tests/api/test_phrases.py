"""Bad words and breakers as token sequences, against the definitions of vLLM and llama.cpp written out."""

from __future__ import annotations

import pytest
from scripted import VOCAB_SIZE, tokenizer

from server.api.phrases import Phrases

TOKENIZER = tokenizer()  # bytes, " t" 256, " th" 257, " the" 258, "he" 259, "ll" 260, "llo" 261, " w" 262, "é" 263, …


@pytest.mark.parametrize(("word", "runs"), [
    ("the", [(116, 259)]),  # " the" is one token where "the" is two: vLLM leaves it out
    ("he", [(259,)]), ("x", [(120,)]), ("w", [(119,), (262,)]), (" w", [(119,), (262,)]), (" ", [(32,)]),
    ("<|endoftext|>", [(300,)]), ("\n", [(10,)]), ("\t", [(9,)]), ("  ", [(32, 32)]), ("\nhe", [(10, 259)]),
    ("\u3000w", [(0xE3, 0x80, 0x80, 119)]), (" \n", [(10,)]),
])  # fmt: skip
def test_bad_words(word: str, runs: list[tuple[int, ...]]) -> None:
    assert [tuple(run) for run in TOKENIZER.runs(word)] == runs


def naive_breaker(text: str) -> set[tuple[int, ...]]:
    raw, runs = text.encode(), set()
    for id_ in range(VOCAB_SIZE):
        word = TOKENIZER.token_bytes(id_)
        if raw in word:
            runs.add((id_,))
        for cut in range(1, len(raw)):
            if word.endswith(raw[:cut]):
                try:
                    tail = tuple(TOKENIZER.encode(raw[cut:].decode()))
                except UnicodeDecodeError:
                    tail = tuple(raw[cut:])
                runs.add((id_, *tail))
    return runs


@pytest.mark.parametrize("text", ["\n", "l", "he", "ello", " the", "é", "適x", "hello <|endoftext|>", "\u00ff"])
def test_breakers(text: str) -> None:
    phrases = Phrases(TOKENIZER)
    found = [(head, *tail) for heads, tail in phrases.breaker(text) for head in heads]
    assert set(found) == naive_breaker(text)
    assert phrases.breaker(text) is phrases.breaker(text)
