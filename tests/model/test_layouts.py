"""Every layout of a checkpoint against what transformers makes of the same directory: ids, text, numbers."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from driving import Generator, Network, greedy
from layouts import LAYOUTS, SENTENCES, SPECIAL
from transformers import AutoTokenizer, GPT2LMHeadModel

from model.config import read_config
from model.tokenizer import Tokenizer, read_tokenizer

PIECES = [
    *SPECIAL, *SENTENCES, "hello", "he", "abc", " the", "sea is calm", "今天", "天", "é", "e\u0301", "  ", "\n", "\t",
    " ", "ﬁ", "Ⅷ", "½", "123", "İ", "👩🏽‍🚀", "\u00a0", "\u200b", "\u3000", "'s", "can't", " n't .", "<|", "|>", "</",
    "[CLS]", "[SEP]", "<extra_id_0>", "▁", "##s", "<0x41>", "\x00", "﻿", ".", " ?", "Ġ",
]  # fmt: skip


def texts(count: int) -> list[str]:
    """Added tokens with and without spaces around them, Chinese, emoji, special tokens inside a text."""
    chance = Random(7)
    fixed = [*SENTENCES, *PIECES, *(f"a {token} b" for token in SPECIAL), *(f"a{token}b" for token in SPECIAL)]
    drawn = ["".join(chance.choices(PIECES, k=chance.randrange(1, 7))) for _ in range(300)]
    return chance.sample(fixed, len(fixed))[: count // 2] + drawn[: count - count // 2]


@pytest.fixture(scope="module", params=sorted(LAYOUTS))
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("layout")
    LAYOUTS[request.param](path)
    shutil.rmtree(path / "source", ignore_errors=True)
    return path


def ours_of(directory: Path) -> Tokenizer:
    config = read_config(directory)
    return read_tokenizer(directory, config.vocab_size, config.eos_token_ids)


def check_text(directory: Path, count: int) -> None:
    ours, theirs = ours_of(directory), AutoTokenizer.from_pretrained(directory)
    assert ours.special_ids == {id_ for id_, token in theirs.added_tokens_decoder.items() if token.special}
    assert ours.kind == type(theirs).__name__
    for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
        assert ours.named.get(role) == getattr(theirs, role)
    for text in texts(count):
        assert ours.encode_prompt(text) == theirs(text)["input_ids"], text
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
        assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text)), text
    chance = Random(5)
    for _ in range(count):
        ids = [chance.randrange(ours.vocab_size) for _ in range(chance.randrange(1, 9))]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False), ids
        check_stream(ours, ids, theirs.decode(ids, skip_special_tokens=True))


def check_stream(ours: Tokenizer, ids: list[int], expected: str) -> None:
    """Text as it comes, with special tokens left out; bytes that are no text may be told apart otherwise."""
    decoder = ours.decoder(())
    text = "".join(decoder.push(id_) for id_ in ids if id_ not in ours.special_ids) + decoder.flush()
    assert text == expected or "\ufffd" in expected, ids


def check_numbers(directory: Path, count: int) -> None:
    theirs: Any = GPT2LMHeadModel.from_pretrained(directory).eval().float()
    chance = Random(9)
    prompts = [chance.choices(range(theirs.config.vocab_size), k=1 + 7 * i) for i in range(4)]
    network = Network(directory)
    with torch.no_grad():
        for place, prompt in enumerate(prompts):
            expected = theirs(torch.tensor([prompt])).logits[0].log_softmax(-1)
            got = network.logits([(place, prompt, 0)]).log_softmax(-1)
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)
        for prompt, said in zip(prompts, Generator(directory).generate(prompts, [greedy(count)] * 4, 64), strict=True):
            tokens = [sampled.token for sampled in said]
            logits = theirs(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
            assert logits.argmax(-1).tolist() == tokens


def test_a_layout_is_served_as_transformers_reads_it(directory: Path) -> None:
    check_text(directory, 300)
    check_numbers(directory, 48)


def test_there_are_enough_layouts() -> None:
    assert len(LAYOUTS) >= 60
