"""Byte-level BPE from a checkpoint's own vocabulary files, run by tiktoken. Imports no torch.

Knows nothing of streams or of text offsets: it turns text into ids, and ids into bytes and characters. It is the fast
path: a vocabulary for which tiktoken is not proven to give what the library `tokenizers` gives is left to that one.
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any

import tiktoken

from model.errors import TokenizerError
from model.files import is_file
from model.tokenizer_files import AddedToken, TokenizerFiles, is_vocab, read_json, read_text
from model.vocabulary import Ends, decide_ends, embeds_all

# GPT-2's pre-tokenizer (Radford et al. 2019), with possessive quantifiers so that no text backtracks.
SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# sha256 of the merges of OpenAI's own GPT-2, one a line
OPENAI_PAIRS = "04e3597d7996f292ca9b8b7285ca4d58a6ae171ac47d73fc7140ceb0c7a6bbc0"
ADDED_MAX = 64  # added tokens that are held against each other
_utf8 = codecs.getincrementaldecoder("utf-8")


class ByteLevelTokenizer:
    """Text to token ids and back to bytes. A literal added token in a text, `<|endoftext|>`, is one token."""

    kind = "GPT2Tokenizer"
    byte_level = True

    def __init__(
        self,
        ranks: dict[bytes, int],
        added: Mapping[str, int],
        ends: Ends | Sequence[str],
        vocab_size: int,
        *,
        plain: Iterable[str] = (),
        named: Mapping[str, str] | None = None,
        options: Mapping[str, Any] | None = None,
        unmade: Mapping[str, int] | None = None,
    ) -> None:
        """`ranks` maps each token's bytes to its id, ids in the order of their merges; `vocab_size` is the model's.

        ends: or their texts. plain: which of the added tokens are no special ones. unmade: tokens that no text becomes.
        """
        if not isinstance(ends, Ends):
            named = dict.fromkeys(("bos_token", "eos_token", "unk_token"), ends[0])
            ids = tuple(added[text] for text in ends)
            ends = Ends(ids, (), ids[0])
        self._ranks = ranks
        self._added = dict(added)
        self._bytes: list[bytes] = [b""] * vocab_size  # ids the model has and the vocabulary lacks decode to nothing
        for token, id_ in ranks.items():
            self._bytes[id_] = token
        alphabet = byte_alphabet()
        for text, id_ in {**(unmade or {}), **added}.items():
            if id_ < vocab_size:
                self._bytes[id_] = bytes_of(text, alphabet)
        self._beyond = {id_: bytes_of(text, alphabet) for text, id_ in added.items() if id_ >= vocab_size}
        self.special_tokens = frozenset(added) - frozenset(plain)
        self.special_ids = frozenset(added[text] for text in self.special_tokens)
        self._kept = frozenset(plain)
        self.ends = ends
        self.eos_token_ids = ends.ids
        self.eos_token_id = next(iter(ends.ids), None)
        self.start_id = ends.start
        self.named = named or {}
        self.options = options or {}
        self.vocab_size = vocab_size

    @cached_property
    def _encoding(self) -> tiktoken.Encoding:
        """Some 25 MB, made for the first text: a process that turns ids into text alone does without."""
        return tiktoken.Encoding("gpt2", pat_str=SPLIT, mergeable_ranks=self._ranks, special_tokens=self._added)

    def encode(self, text: str) -> list[int]:
        """Raises UnicodeEncodeError for a lone surrogate; parsing keeps those out."""
        return self._encoding.encode(text, allowed_special="all")

    encode_prompt = encode  # nothing is put around a text

    def encode_plain(self, text: str) -> list[int]:
        """Names of special tokens are text like any other."""
        if not self._kept:
            return self._encoding.encode_ordinary(text)
        return self._encoding.encode(text, allowed_special=self._kept, disallowed_special=())

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        table = self._bytes
        return b"".join([table[id_] if id_ < len(table) else self._beyond.get(id_, b"") for id_ in ids])

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


def read_byte_level(
    files: TokenizerFiles, vocab_size: int, declared: Sequence[int], *, forced: bool = False
) -> ByteLevelTokenizer | None:
    """None where tiktoken is not proven to give what the library would. Raises TokenizerError."""
    if not _is_simple(files):
        return None
    vocab = read_vocab(files)
    ranks = _ranks(vocab, files)
    added = None if ranks is None else _added(vocab, ranks, files.added)
    if ranks is None or added is None:
        return None
    embeds_all((id_ for text, id_ in vocab.items() if text not in added), vocab_size)
    plain = [token.content for token in files.added if not token.special]
    special = frozenset(id_ for text, id_ in added.items() if text not in plain)
    ends = decide_ends(files.named, {**vocab, **added}, special, vocab_size, declared, forced=forced)
    made = set(ranks.values())
    unmade = {text: id_ for text, id_ in vocab.items() if id_ not in made and text not in added}
    return ByteLevelTokenizer(
        ranks, added, ends, vocab_size, plain=plain, named=files.named, options=files.options, unmade=unmade
    )


def _is_simple(files: TokenizerFiles) -> bool:
    """No option and no added token asks for more than tiktoken does."""
    options = files.options
    changes = ("add_prefix_space", "add_bos_token", "add_eos_token", "split_special_tokens")
    around = files.json.get("post_processor") if files.json is not None else None
    texts = [token.content for token in files.added]
    return (
        files.kind.value == ByteLevelTokenizer.kind
        and not any(options.get(name) for name in changes)
        and (around is None or (isinstance(around, dict) and around.get("type") == "ByteLevel"))
        and len(texts) <= ADDED_MAX
        and all(token.plain and token.content for token in files.added)
        and not any(_overlap(left, right) for left in texts for right in texts if left != right)
    )


def _overlap(left: str, right: str) -> bool:
    """Whether the two can share characters of a text: then which is found first depends on who looks."""
    return right in left or any(left.endswith(right[:size]) for size in range(1, min(len(left), len(right))))


def _ranks(vocab: dict[str, int], files: TokenizerFiles) -> dict[bytes, int] | None:
    """The tokens that BPE can make, as bytes; None where tiktoken could make others of a text.

    tiktoken joins the two neighbours whose joint bytes are the lowest token. That is BPE where each token is what one
    merge makes, ids rise in the order of the merges from the single bytes on, and each token's own bytes become it.
    """
    alphabet = byte_alphabet()
    if not vocab.keys() >= alphabet.keys():
        return None
    made = {vocab[character] for character in alphabet}
    previous = max(made)
    for left, right in read_merges(files):
        id_ = vocab.get(left + right)
        if id_ is None or left not in vocab or right not in vocab:
            raise TokenizerError("the merges make a token that the vocabulary does not have")
        if id_ <= previous or vocab[left] not in made or vocab[right] not in made:
            return None
        made.add(id_)
        previous = id_
    if _merges_digest(files) != OPENAI_PAIRS and not _all_are_reached(vocab, files):
        return None
    table = str.maketrans({character: chr(value) for character, value in alphabet.items()})
    return {text.translate(table).encode("latin-1"): id_ for text, id_ in vocab.items() if id_ in made}


def _merges_digest(files: TokenizerFiles) -> str:
    """sha256 of all merges, one a line. The file has that form already, below a line with a version."""
    if files.json is not None:
        text = "\n".join(" ".join(pair) for pair in read_merges(files))
    else:
        text = read_text(files.directory / "merges.txt")
        text = (text.partition("\n")[2] if text.startswith("#version") else text).strip("\n")
    return hashlib.sha256(text.encode()).hexdigest()


def _all_are_reached(vocab: Mapping[str, int], files: TokenizerFiles) -> bool:
    """Whether the bytes of each token, by themselves, become that token: no merge across its two halves comes sooner.

    The walk down the border of the halves is that of Neubeck and van Antwerpen (2024, "So many tokens, so little
    time").
    """
    pairs = {(vocab[left], vocab[right]): vocab[left + right] for left, right in read_merges(files)}
    halves = {token: pair for pair, token in pairs.items()}
    for (left, right), token in pairs.items():
        limit, a, b = token, left, right
        while pairs.get((a, b), limit) >= limit:
            if a > b and a in halves:
                limit, a = a, halves[a][1]
            elif b in halves:
                limit, b = b + 1, halves[b][0]
            else:
                break
        else:
            return False
    return True


def _added(vocab: Mapping[str, int], ranks: Mapping[bytes, int], tokens: Iterable[AddedToken]) -> dict[str, int] | None:
    """Ids of added tokens: the vocabulary's, or the next ones; None where one is also what BPE makes."""
    alphabet = byte_alphabet()
    added: dict[str, int] = {}
    for token in tokens:
        if bytes_of(token.content, alphabet) in ranks or token.content.encode() in ranks:
            return None
        largest = max(added.values(), default=-1)
        fresh = largest + 1 if largest >= len(vocab) else len(vocab)
        added[token.content] = vocab.get(token.content, fresh)
    return added


def byte_alphabet() -> dict[str, int]:
    """GPT-2 writes each byte as a printable character; printable bytes stand for themselves, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    alphabet = {chr(value): value for value in printable}
    alphabet.update({chr(0x100 + i): value for i, value in enumerate(others)})
    return alphabet


def bytes_of(piece: str, alphabet: Mapping[str, int]) -> bytes:
    """Of a piece that is not written in the alphabet alone, its UTF-8, as the library decodes it."""
    values = [alphabet.get(character) for character in piece]
    return piece.encode() if None in values else bytes(value for value in values if value is not None)


# === Files ===


def read_vocab(files: TokenizerFiles) -> dict[str, int]:
    """Raises TokenizerError."""
    if files.json is None:
        if not all(is_file(files.directory / name) for name in ("vocab.json", "merges.txt")):
            raise TokenizerError(
                "the checkpoint has neither vocab.json and merges.txt nor tokenizer.json, vocab.txt or spiece.model"
            )
        return read_json(files.directory / "vocab.json")
    model = files.json.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, dict) or not is_vocab(vocab):
        raise TokenizerError("tokenizer.json does not hold a vocabulary")
    return vocab


def read_merges(files: TokenizerFiles) -> Iterator[tuple[str, str]]:
    """One by one: all of them are 10 MB that would stay with the process. Raises TokenizerError."""
    if files.json is None:
        yield from _read_merges(files.directory / "merges.txt")
        return
    merges = files.json["model"].get("merges", [])
    if not isinstance(merges, list):
        raise TokenizerError("tokenizer.json is not a BPE tokenizer")
    for pair in merges:
        if isinstance(pair, str):
            yield _pair(pair)
        elif isinstance(pair, list) and len(pair) == 2 and all(isinstance(half, str) for half in pair):
            yield pair[0], pair[1]
        else:
            raise TokenizerError("tokenizer.json: a merge is not a pair of tokens")


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
