"""Our encoding against Hugging Face's own tokenizer, on the true GPT-2 vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as TheirTokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, GPT2Config

import model
from model import byte_level
from model.byte_level import ByteLevelTokenizer
from model.errors import TokenizerError
from model.tokenizer import read_tokenizer

DEFAULT = Path(model.__file__).parent / "default"
OURS = read_tokenizer(DEFAULT, 50257, (50256,))


def theirs() -> TheirTokenizer:
    tokenizer = TheirTokenizer(BPE.from_file(str(DEFAULT / "vocab.json"), str(DEFAULT / "merges.txt")))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


THEIRS = theirs()
SINGLE_BYTES = {OURS.token_bytes(id_)[0]: id_ for id_ in range(50257) if len(OURS.token_bytes(id_)) == 1}
PIECES = [
    "a",
    "b",
    " ",
    "  ",
    "\n",
    "'s",
    "'LL",
    "1",
    "²",
    "é",
    "e\u0301",
    "字",
    "👩🏽‍🚀",
    "<|endoftext|>",
    "<|",
    "\u00a0",
]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.lists(
    st.sampled_from(PIECES), max_size=30
).map("".join)


@given(TEXTS)
def test_ids_are_those_of_hugging_face(text: str) -> None:
    assert OURS.encode(text) == THEIRS.encode(text).ids


@given(TEXTS)
def test_text_comes_back(text: str) -> None:
    assert b"".join(map(OURS.token_bytes, OURS.encode(text))) == text.encode()


@given(st.binary(max_size=40))
def test_bytes_that_are_no_text_decode_as_python_decodes_them(data: bytes) -> None:
    assert OURS.decode([SINGLE_BYTES[value] for value in data]) == data.decode("utf-8", errors="replace")


def test_end_of_text_is_one_token() -> None:
    assert OURS.encode("a<|endoftext|>b") == [64, 50256, 65]
    assert OURS.eos_token_id == 50256
    assert OURS.decode([50256]) == "<|endoftext|>"


def test_the_published_example() -> None:
    assert OURS.encode("Hello world") == [15496, 995]


def test_every_token_has_bytes_of_its_own() -> None:
    assert len({OURS.token_bytes(id_) for id_ in range(50257)}) == 50257


def test_tokenizer_json_alone_is_enough(tmp_path: Path) -> None:
    THEIRS.save(str(tmp_path / "tokenizer.json"))
    tokenizer = read_tokenizer(tmp_path, 50257, (50256,))
    for text in ("Hello world", "naïve 👩🏽‍🚀 <|endoftext|>", "  \n\n x"):
        assert tokenizer.encode(text) == OURS.encode(text)


def write(directory: Path, vocab: object, merges: str) -> None:
    (directory / "vocab.json").write_text(json.dumps(vocab), "utf-8")
    (directory / "merges.txt").write_text(merges, "utf-8")


ALPHABET = {character: i for i, character in enumerate(sorted(ByteLevel.alphabet()))}


@pytest.mark.parametrize(
    ("vocab", "merges", "line"),
    [
        ([], "", "does not hold a vocabulary"),
        ({**ALPHABET, "ab": True, "<|endoftext|>": 257}, "", "does not hold a vocabulary"),
        ({**ALPHABET, "ab": 256, "<|endoftext|>": 257}, "a b c", "a line is not a pair"),
        ({**ALPHABET, "ab": 256, "<|endoftext|>": 257}, "a c", "does not have"),
        ({**ALPHABET, "ab": 300, "<|endoftext|>": 257}, "a b", "has token 300"),
    ],
)
def test_broken_vocabularies_are_refused(vocab: object, merges: str, line: str, tmp_path: Path) -> None:
    write(tmp_path, vocab, merges)
    with pytest.raises(TokenizerError, match=line):
        read_tokenizer(tmp_path, 259, (257,))


def test_no_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"neither vocab\.json and merges\.txt nor tokenizer\.json"):
        read_tokenizer(tmp_path, 10, (9,))


def test_a_long_word_takes_no_quadratic_time() -> None:
    assert isinstance(OURS, ByteLevelTokenizer)
    assert len(OURS.encode("a" * 500_000)) < 500_000


@pytest.mark.parametrize(
    ("vocab", "merges", "fast"),
    [
        ({**ALPHABET, "ab": 256, "<|endoftext|>": 257}, "a b", True),
        ({**ALPHABET, "字": 256, "<|endoftext|>": 257}, "", True),  # no text becomes it
        ({**ALPHABET, "ab": 257, "cd": 256, "<|endoftext|>": 258}, "a b\nc d", False),  # ids in another order
        ({**ALPHABET, "bc": 256, "ab": 257, "abc": 258}, "b c\na b\nab c", False),  # no text becomes abc
        ({**ALPHABET, "bc": 256, "ab": 257, "abc": 258}, "b c\na b\na bc", True),
        ({**dict(list(ALPHABET.items())[1:]), "ab": 256, "<|endoftext|>": 257}, "a b", False),  # a byte is missing
    ],
)
def test_the_fast_path_is_taken_where_it_gives_the_same(
    vocab: dict[str, int], merges: str, fast: bool, tmp_path: Path
) -> None:
    write(tmp_path, vocab, merges)
    ours = read_tokenizer(tmp_path, 300, ())
    assert isinstance(ours, ByteLevelTokenizer) is fast
    theirs = AutoTokenizer.from_pretrained(tmp_path, config=GPT2Config())
    for text in ("abcabc", "cdab 字", "a b c <|endoftext|>d"):
        assert ours.encode(text) == theirs.encode(text)


def test_every_token_of_gpt2_is_what_its_bytes_become(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the digest of its merges stands for."""
    monkeypatch.setattr(byte_level, "OPENAI_PAIRS", "")
    assert isinstance(read_tokenizer(DEFAULT, 50257, (50256,)), ByteLevelTokenizer)
