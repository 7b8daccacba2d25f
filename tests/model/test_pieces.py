"""WordPiece and unigram vocabularies against transformers' own tokenizers; what differs is said here."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as TheirTokenizer
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace
from transformers import BertTokenizer
from vocabularies import BERT, write_unigram, write_wordpiece

from model import unigram as unigram_module
from model.config import read_config
from model.errors import TokenizerError
from model.tokenizer import Tokenizer, read_tokenizer

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.lists(
    st.sampled_from(
        ["the sea", " ", "Hello", "今天天气", "[SEP]", "</s>", "2026", "，", "東京です", "é", "un", "\n", "known"]
    )
).map("".join)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bert")
    write_wordpiece(directory)
    return directory


@pytest.fixture(scope="module")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("spiece")
    write_unigram(directory)
    return directory


def wordpiece(directory: Path) -> Tokenizer:
    return read_tokenizer(directory, 200, (3,))


def unigram(directory: Path) -> Tokenizer:
    return read_tokenizer(directory, 500, (2,))


@given(TEXTS)
def test_wordpiece_ids_are_those_of_transformers(bert: Path, text: str) -> None:
    theirs = _once(BertTokenizer, bert)
    assert _once(wordpiece, bert).encode(text) == theirs.encode(text, add_special_tokens=False)


def test_wordpiece_text_is_that_of_transformers(bert: Path) -> None:
    ours, theirs = wordpiece(bert), BertTokenizer.from_pretrained(bert)
    chance = Random(3)
    for _ in range(2000):
        ids = [chance.randrange(5, len(theirs)) for _ in range(chance.randrange(1, 9))]
        assert ours.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize(("text", "written"), [
    ("今天天气很好，你好。", "今 天 天 气 很 好 ， 你 好 。"), ("Hello , world .", "hello, world."),
    ("no unknowns", "no unknowns"), ("hello[SEP]world", "hello [SEP] world"), ("☃", "[UNK]"),
])  # fmt: skip
def test_where_wordpiece_has_spaces(text: str, written: str, bert: Path) -> None:
    ours = wordpiece(bert)
    assert ours.decode(ours.encode(text)) == written


@given(TEXTS)
def test_unigram_ids_and_text_are_the_librarys(spiece: Path, text: str) -> None:
    ours, theirs = _once(unigram, spiece), _once(_processor, spiece)
    assert ours.encode_plain(text) == theirs.encode(text)
    assert ours.decode(ours.encode_plain(text)) == theirs.decode(theirs.encode(text))


def test_unigram_text_of_any_ids_is_the_librarys(spiece: Path) -> None:
    """But for bytes that are no UTF-8: one U+FFFD for each run that could have been a character, theirs one a byte."""
    ours, theirs, chance = unigram(spiece), _processor(spiece), Random(5)
    for _ in range(3000):
        ids = [chance.randrange(3, theirs.get_piece_size()) for _ in range(chance.randrange(1, 8))]
        mine = ours.decode(ids)
        assert mine == theirs.decode(ids) or "\ufffd" in mine


def hugging_face(directory: Path) -> TheirTokenizer:
    """The same vocabulary, run by the other library, as transformers runs T5's."""
    model = _processor(directory)
    scores = [(model.id_to_piece(id_), model.get_score(id_)) for id_ in range(model.get_piece_size())]
    theirs = TheirTokenizer(Unigram(scores, unk_id=0, byte_fallback=True))
    theirs.pre_tokenizer = Metaspace(replacement="\u2581", prepend_scheme="always")
    theirs.decoder = MetaspaceDecoder(replacement="\u2581", prepend_scheme="always")
    theirs.add_special_tokens(["<unk>", "<s>", "</s>"])
    return theirs


def test_unigram_ids_and_text_are_those_of_hugging_face(spiece: Path) -> None:
    ours, theirs = unigram(spiece), hugging_face(spiece)
    for text in ("the sea", "東京ですさくら", "hello world 日本", "over under", "catdog"):
        assert ours.encode(text) == theirs.encode(text).ids
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text).ids) == text


@pytest.mark.parametrize("make", [wordpiece, unigram])
def test_text_comes_piece_by_piece_and_goes_on_from_a_prompt(make: Any, bert: Path, spiece: Path) -> None:
    ours, chance = make(bert if make is wordpiece else spiece), Random(7)
    known = [id_ for id_ in range(ours.vocab_size) if ours.name(id_) and id_ not in ours.special_ids]
    for _ in range(500):
        ids = chance.choices(known, k=8)
        decoder = ours.decoder(())
        assert "".join([decoder.push(id_) for id_ in ids]) + decoder.flush() == ours.decode(ids)
        whole, start = ours.decode(ids), ours.decode(ids[:4])
        after = ours.decoder(ids[:4])
        rest = "".join([after.push(id_) for id_ in ids[4:]]) + after.flush()
        assert start + rest == whole or "\ufffd" in start + rest  # a character that the prompt's end cuts is two halves


@pytest.mark.parametrize("make", [wordpiece, unigram])
def test_names_are_distinct_and_special_tokens_are_tokens(make: Any, bert: Path, spiece: Path) -> None:
    ours = make(bert if make is wordpiece else spiece)
    names = [ours.name(id_) for id_ in range(ours.vocab_size) if ours.name(id_)]
    assert len(set(names)) == len(names)
    for name in ours.special_tokens:
        (id_,) = ours.encode(name)
        assert id_ in ours.special_ids
        assert ours.decode([id_]) == name
        assert id_ not in ours.encode_plain(name) or name == ours.named["unk_token"] or make is wordpiece
    assert ours.decode([ours.vocab_size - 1]) == ""  # the model has it, the vocabulary does not


def test_wordpiece_special_names_can_be_plain_text(bert: Path) -> None:
    ours = wordpiece(bert)
    assert not {2, 3, 4} & set(ours.encode_plain("[CLS][SEP][MASK]"))
    assert set(BERT) == ours.special_tokens


def test_bad_words_are_banned_at_the_start_and_inside(spiece: Path) -> None:
    ours = unigram(spiece)
    runs = [ours.decode(run) for run in ours.runs("東京")]
    assert runs.count("東京") == len(runs) == 2


def test_the_end_of_a_document_is_bert_s_where_the_config_has_none(tmp_path: Path) -> None:
    write_wordpiece(tmp_path)
    shape = '"n_layer": 1, "n_head": 1, "n_embd": 4, "n_positions": 8, "vocab_size": 200'
    for eos, expected in (("", 3), (', "eos_token_id": 50256', 3), (', "eos_token_id": 2', 2)):
        (tmp_path / "config.json").write_text(f"{{{shape}{eos}}}")
        assert read_config(tmp_path).eos_token_ids == (expected,)


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_tokenizer_json_alone_is_enough(kind: str, bert: Path, spiece: Path, tmp_path: Path) -> None:
    if kind == "wordpiece":
        BertTokenizer.from_pretrained(bert).save_pretrained(tmp_path)
        (tmp_path / "vocab.txt").unlink(missing_ok=True)
        same = TheirTokenizer.from_file(str(tmp_path / "tokenizer.json"))
        ours = wordpiece(tmp_path)
    else:
        same = hugging_face(spiece)
        same.save(str(tmp_path / "tokenizer.json"))
        ours = unigram(tmp_path)
    assert not (tmp_path / "vocab.txt").exists()
    for text in ("the sea", "hello 今天 東京です", "hello[SEP]world", "the sea</s>", "unknowns, 2026"):
        assert ours.encode(text) == same.encode(text, add_special_tokens=False).ids, text
        assert ours.decode(ours.encode(text)) == same.decode(ours.encode(text), skip_special_tokens=False)


def test_without_the_library_one_line_says_what_to_install(spiece: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(unigram_module.importlib, "import_module", missing)
    line = r"needs the package sentencepiece: pip install 'gpt2-server\[sentencepiece\]'"
    with pytest.raises(TokenizerError, match=line):
        read_tokenizer(spiece, 500, (2,))


@pytest.mark.parametrize(("name", "content", "line"), [
    ("vocab.txt", b"a\nb\n", "make no BertTokenizer"), ("vocab.txt", b"\xff", "not UTF-8"),
    ("spiece.model", b"junk", "not a Sent"),
    ("vocab.txt", b"[UNK]\n" + b"\n".join(map(bytes, zip(b"abcdefghij", strict=True))), "token 10, the model's 10"),
    ("tokenizer.json", b'{"model": {"type": "Unigram"}}', "make no TokenizersBackend"),
    ("spiece.model", b"", "is empty"),
])  # fmt: skip
def test_broken_vocabularies_are_refused(name: str, content: bytes, line: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=line):
        read_tokenizer(tmp_path, 10, (9,))


def _processor(directory: Path) -> Any:
    return sentencepiece.SentencePieceProcessor(model_file=str(directory / "spiece.model"))


_made: dict[tuple[Any, Path], Any] = {}


def _once(make: Any, directory: Path) -> Any:
    if (make, directory) not in _made:
        _made[make, directory] = (make.from_pretrained if make is BertTokenizer else make)(directory)
    return _made[make, directory]
