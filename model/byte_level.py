"""Byte-level BPE from a checkpoint's own vocabulary files, run by tiktoken. Imports no torch.

Knows nothing of streams or of text offsets: it turns text into ids, and ids into bytes and characters.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any

import tiktoken

from model import files
from model.errors import TokenizerError

# GPT-2's pre-tokenizer (Radford et al. 2019), with possessive quantifiers so that no text backtracks.
SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
END_OF_TEXT = "<|endoftext|>"
_utf8 = codecs.getincrementaldecoder("utf-8")


class ByteLevelTokenizer:
    """Text to token ids and back to bytes. A literal special token in a text, `<|endoftext|>`, is one token."""

    kind = "GPT2Tokenizer"
    byte_level = True

    def __init__(
        self, ranks: dict[bytes, int], special: dict[str, int], eos_tokens: Sequence[str], vocab_size: int
    ) -> None:
        """`ranks` maps each token's bytes to its id, ids in the order of their merges; `vocab_size` is the model's."""
        if not eos_tokens or not special.keys() >= set(eos_tokens):
            raise TokenizerError("the vocabulary has no end-of-text token")
        largest = max(*ranks.values(), *special.values())
        if largest >= vocab_size:
            raise TokenizerError(f"the vocabulary has token {largest}, the model's {vocab_size} embeddings do not")
        self._ranks = ranks
        self._special = special
        self._bytes: list[bytes] = [b""] * vocab_size  # ids the model has and the vocabulary lacks decode to nothing
        for token, id_ in ranks.items():
            self._bytes[id_] = token
        for text, id_ in special.items():
            self._bytes[id_] = text.encode()
        self.special_tokens = frozenset(special)
        self.special_ids = frozenset(special.values())
        self.eos_token_ids = tuple(special[token] for token in eos_tokens)
        self.eos_token, self.eos_token_id = eos_tokens[0], self.eos_token_ids[0]
        self.bos_token = self.unk_token = self.eos_token  # GPT-2 has one token for all of it
        self.vocab_size = vocab_size

    @cached_property
    def _encoding(self) -> tiktoken.Encoding:
        """Some 25 MB, made for the first text: a process that turns ids into text alone does without."""
        return tiktoken.Encoding("gpt2", pat_str=SPLIT, mergeable_ranks=self._ranks, special_tokens=self._special)

    def encode(self, text: str) -> list[int]:
        """Raises UnicodeEncodeError for a lone surrogate; parsing keeps those out."""
        return self._encoding.encode(text, allowed_special=self.special_tokens)

    def encode_plain(self, text: str) -> list[int]:
        """Names of special tokens are text like any other."""
        return self._encoding.encode_ordinary(text)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        table = self._bytes
        return b"".join([table[id_] for id_ in ids])

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decoder(self, after: Sequence[int]) -> ByteDecoder:
        return ByteDecoder(self._bytes)

    def token_bytes(self, id_: int) -> bytes:
        return self._bytes[id_]

    def name(self, id_: int) -> str:
        return name_of(self._bytes[id_])

    def runs(self, word: str) -> list[list[int]]:
        """As vLLM: the word as it starts a text, and after a space where that makes another token of it.

        Only spaces before a word do not count: any other white space is what the client has written, and so is a word
        of spaces alone.
        """
        bare = word.lstrip(" ")
        if not bare:
            return [run for run in [self.encode(word)] if run]
        plain, spaced = self.encode(bare), self.encode(" " + bare)
        return [plain, spaced] if spaced[0] != plain[0] and len(spaced) == len(plain) else [plain]


class ByteDecoder:
    """Bytes to characters, as they become whole; what is none is U+FFFD."""

    def __init__(self, table: Sequence[bytes]) -> None:
        self._table = table
        self._decoder = _utf8("replace")

    def push(self, id_: int) -> str:
        return self._decoder.decode(self._table[id_])

    def flush(self) -> str:
        return self._decoder.decode(b"", True)


def name_of(raw: bytes) -> str:
    """A token's bytes as the logprobs object shows them: distinct bytes have distinct names."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def read_byte_level(directory: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> ByteLevelTokenizer:
    """From vocab.json + merges.txt, or tokenizer.json. Raises TokenizerError."""
    if files.is_file(directory / "vocab.json") and files.is_file(directory / "merges.txt"):
        vocab = read_json(directory / "vocab.json")
        merges: Iterable[tuple[str, str]] = _read_merges(directory / "merges.txt")
        special = {token: id_ for token, id_ in vocab.items() if id_ in eos_token_ids}
    elif files.is_file(directory / "tokenizer.json"):
        vocab, merges, special = _read_tokenizer_json(directory / "tokenizer.json")
    else:
        raise TokenizerError("the checkpoint has neither vocab.json and merges.txt nor tokenizer.json")
    names = {id_: token for token, id_ in special.items()}
    ends = [names[id_] for id_ in eos_token_ids if id_ in names] or [END_OF_TEXT]
    return ByteLevelTokenizer(_ranks(vocab, merges, special), special, ends, vocab_size)


def _ranks(vocab: dict[str, int], merges: Iterable[tuple[str, str]], special: dict[str, int]) -> dict[bytes, int]:
    """The vocabulary as bytes. tiktoken merges the pair of lowest id first, so ids must rise in merge order."""
    alphabet = _byte_alphabet()
    previous = -1
    for left, right in merges:
        id_ = vocab.get(left + right)
        if id_ is None:
            raise TokenizerError("merges.txt makes a token that the vocabulary does not have")
        if id_ < previous:
            raise TokenizerError("the vocabulary's ids are not in the order of its merges")
        previous = id_
    try:
        ranks = {
            bytes(alphabet[character] for character in token): id_
            for token, id_ in vocab.items()
            if token not in special
        }
    except KeyError as error:
        raise TokenizerError("the vocabulary is not byte-level BPE") from error
    if any(bytes([value]) not in ranks for value in range(256)):
        raise TokenizerError("the vocabulary does not hold all 256 bytes")
    return ranks


def _byte_alphabet() -> dict[str, int]:
    """GPT-2 writes each byte as a printable character; printable bytes stand for themselves, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    alphabet = {chr(value): value for value in printable}
    alphabet.update({chr(0x100 + i): value for i, value in enumerate(others)})
    return alphabet


def read_text(path: Path) -> str:
    return files.read_text(path, files.VOCABULARY_BYTES, TokenizerError)


def read_json(path: Path) -> dict[str, Any]:
    value = files.read_json(path, files.VOCABULARY_BYTES, TokenizerError)
    if not isinstance(value, dict) or (path.name == "vocab.json" and not _is_vocab(value)):
        raise TokenizerError(f"{path.name} does not hold a vocabulary")
    return value


def _is_vocab(value: object) -> bool:
    return (
        isinstance(value, dict)
        and len(value) > 256
        and all(type(id_) is int and id_ >= 0 for id_ in value.values())  # a boolean is no id
        and len(set(value.values())) == len(value)
    )


def _read_merges(path: Path) -> Iterator[tuple[str, str]]:
    """One by one: all of them are 10 MB that would stay with the process."""
    for line in StringIO(read_text(path)):
        if line.strip("\n") and not line.startswith("#version"):
            yield _pair(line)


def _pair(line: str) -> tuple[str, str]:
    left, _, right = line.rstrip("\r\n").partition(" ")
    if not left or not right or " " in right:
        raise TokenizerError("merges.txt: a line is not a pair of tokens")
    return left, right


def _read_tokenizer_json(path: Path) -> tuple[dict[str, int], list[tuple[str, str]], dict[str, int]]:
    raw = read_json(path)
    try:
        model = raw["model"]
        vocab = model["vocab"]
        merges = [_pair(pair) if isinstance(pair, str) else (pair[0], pair[1]) for pair in model["merges"]]
        added = [(each["content"], each["id"]) for each in raw.get("added_tokens", []) if each["special"]]
        kind = model.get("type", "BPE")
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise TokenizerError("tokenizer.json is not a BPE tokenizer") from error
    texts = [text for pair in merges for text in pair] + [content for content, _ in added]
    ids = [id_ for _, id_ in added]
    if kind != "BPE" or not _is_vocab(vocab) or not all(isinstance(text, str) and text for text in texts):
        raise TokenizerError("tokenizer.json is not a BPE tokenizer")
    special = dict(added)
    taken = {id_ for token, id_ in vocab.items() if token not in special}
    if not all(type(id_) is int and id_ >= 0 and id_ not in taken for id_ in ids) or len(set(ids)) < len(ids):
        raise TokenizerError("tokenizer.json: an added token has no id of its own")
    return vocab, merges, special
