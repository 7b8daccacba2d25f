"""Packed text: what goes in comes out, every epoch uses all of it, and positions are where the text lies."""

from __future__ import annotations

import lzma
from pathlib import Path

import numpy as np
import pytest

from model.tokenizer import Tokenizer, read_tokenizer
from model.training.data import TokenArray, Windows, consecutive, read_documents, tokenise

VOCAB = Path(__file__).parents[2] / "model" / "default"
DOCUMENTS = ["The tower is 324 metres tall.\n\nIt stands.", "Ünïcödé 塔 🗼\r\n", " a third"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return read_tokenizer(VOCAB, 50257, (50256,))


def write_corpus(directory: Path) -> list[Path]:
    plain, packed = directory / "a.txt", directory / "b.txt.xz"
    plain.write_bytes("<|endoftext|>".join(DOCUMENTS[:2]).encode())
    packed.write_bytes(lzma.compress(DOCUMENTS[2].encode() + b"<|endoftext|>\n"))
    return [plain, packed]


def test_documents_are_tokenised_packed_and_come_back(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokens = tokenise(write_corpus(tmp_path), tokenizer, tmp_path / "cache")
    text = tokenizer.decode(tokens.tolist())
    assert text == "".join(document + "<|endoftext|>" for document in DOCUMENTS)
    assert np.count_nonzero(tokens == 50256) == 3


def test_tokens_are_reused_until_the_text_changes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    paths = write_corpus(tmp_path)
    first = tokenise(paths, tokenizer, tmp_path / "cache")
    (stored,) = (tmp_path / "cache").iterdir()
    changed = stored.stat().st_mtime_ns
    assert np.array_equal(tokenise(paths, tokenizer, tmp_path / "cache"), first)
    assert stored.stat().st_mtime_ns == changed
    paths[0].write_text("other text")
    assert not np.array_equal(tokenise(paths, tokenizer, tmp_path / "cache"), first)


def test_line_endings_are_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\rthree\n")
    assert list(read_documents(tmp_path / "a.txt")) == ["one\r\ntwo\rthree\n"]


def stream(length: int) -> TokenArray:
    return np.arange(length, dtype=np.uint16)


@pytest.mark.parametrize("length", [4, 8, 16])
def test_an_epoch_uses_every_window_once_at_its_own_position(length: int) -> None:
    windows = Windows(stream(1000), context=16, seed=3)
    count = (1000 - 1 - 16) // length
    batch = windows.batch(0, count, length)
    assert np.array_equal(batch.targets, batch.inputs + 1)  # the stream counts upwards
    begins = np.sort(batch.inputs[:, 0])
    assert np.array_equal(np.diff(begins), np.full(count - 1, length))
    phase = (batch.inputs[:, 0] - batch.starts) % 16
    assert len(set(phase.tolist())) == 1
    assert set(batch.starts.tolist()) == set(range(0, 16, length))


def test_windows_depend_on_nothing_but_their_number() -> None:
    """What makes a resumed run see the batches it would have seen."""
    whole = Windows(stream(200), context=16, seed=3).batch(0, 60, 8)  # more than two epochs
    for first in (0, 21, 22, 43, 59):
        alone = Windows(stream(200), context=16, seed=3).batch(first, 1, 8)
        assert np.array_equal(alone.inputs[0], whole.inputs[first])
        assert alone.starts[0] == whole.starts[first]
    assert not np.array_equal(whole.inputs[:22], whole.inputs[22:44])
    assert not np.array_equal(whole.inputs, Windows(stream(200), context=16, seed=4).batch(0, 60, 8).inputs)


def test_validation_reads_the_stream_in_order() -> None:
    batches = list(consecutive(stream(100), length=8, rows=5))
    read = np.concatenate([batch.targets.ravel() for batch in batches])
    assert np.array_equal(read, np.arange(1, 97))


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        Windows(stream(20), context=16, seed=0)
