"""A checkpoint's tokenizer run by the library `tokenizers`, put together as transformers 5 puts it together.

Text comes back as the library decodes it. A stream decodes the latest tokens again with the new one behind them, and
hands out what has been added once no later token can change it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from model.byte_level import ByteDecoder, byte_alphabet, bytes_of, name_of, read_merges, read_vocab
from model.errors import TokenizerError
from model.files import VOCABULARY_BYTES, is_file, read_bytes, read_text
from model.sentencepiece_file import read_pieces
from model.tokenizer_files import AddedToken, Kind, TokenizerFiles
from model.vocabulary import Ends, decide_ends, embeds_all

CONTEXT = 8  # tokens that are decoded again: what a token says depends on the one before it, or on a few bytes
SPACE = "\u2581"
REPLACEMENT = "\ufffd"
UNKNOWN = "\U0010fffd ☃"  # characters that hardly a vocabulary has
APOSTROPHE = " '"  # which cleaning up joins to what follows
CLEANED = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (APOSTROPHE + " ", "'"), (" n't", "n't"),
    (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


class LibraryTokenizer:
    """As Tokenizer of tokenizer.py."""

    def __init__(self, files: TokenizerFiles, vocab_size: int, declared: Sequence[int], *, forced: bool) -> None:
        """Raises TokenizerError."""
        self._whole = whole = build(files)
        added = whole.get_added_tokens_decoder()
        self.kind = files.kind.value
        self.vocab_size = vocab_size
        self.special_ids = frozenset(id_ for id_, token in added.items() if token.special)
        self.special_tokens = frozenset(token.content for token in added.values() if token.special)
        vocab = whole.get_vocab(with_added_tokens=True)
        embeds_all((id_ for piece, id_ in vocab.items() if id_ not in added and "<extra_id_" not in piece), vocab_size)
        self._pieces = _in_order(vocab, vocab_size)
        self.ends: Ends = decide_ends(files.named, vocab, self.special_ids, vocab_size, declared, forced=forced)
        self.eos_token_ids = self.ends.ids
        self.eos_token_id = next(iter(self.eos_token_ids), None)
        self.start_id = self.ends.start
        self.named = files.named
        self.options = files.options
        self._decoder = type(whole.decoder).__name__ if whole.decoder is not None else ""
        self.byte_level = self._decoder == "ByteLevel"
        cleans = files.options.get("clean_up_tokenization_spaces") is True
        self._cleans = cleans and type(whole.model).__name__ != "BPE"

    # === Text to tokens ===

    def encode(self, text: str) -> list[int]:
        return list(self._whole.encode(text, add_special_tokens=False).ids)

    def encode_prompt(self, text: str) -> list[int]:
        return list(self._whole.encode(text, add_special_tokens=True).ids)

    def encode_plain(self, text: str) -> list[int]:
        return list(self._plain.encode(text, add_special_tokens=False).ids)

    @cached_property
    def _plain(self) -> Any:
        """A copy that takes the names of special tokens for text: the switch is no argument of a call."""
        copy = tokenizers.Tokenizer.from_str(self._whole.to_str())
        copy.encode_special_tokens = True
        return copy

    def runs(self, word: str) -> list[list[int]]:
        """The word as it starts a text, and as it stands after a space or inside a word, where that is written
        otherwise."""
        bare = word.lstrip(" ")
        runs = [self.encode(bare), self.encode(" " + bare)]
        if self._decoder == "Metaspace" and runs[0]:
            first, *rest = runs[0]
            inside = self._pieces[first].removeprefix(SPACE)
            if not inside:
                runs.append(rest)
            elif inside in self._by_piece:
                runs.append([self._by_piece[inside], *rest])
        return [run for place, run in enumerate(runs) if run and run not in runs[:place]]

    @cached_property
    def _by_piece(self) -> dict[str, int]:
        return {piece: id_ for id_, piece in enumerate(self._pieces)}

    # === Tokens to text ===

    def decode(self, ids: Iterable[int]) -> str:
        text: str = self._whole.decode(list(ids), skip_special_tokens=False)
        return clean_up(text) if self._cleans else text

    def decoder(self, after: Sequence[int]) -> ByteDecoder | LibraryDecoder:
        if self.byte_level:
            return ByteDecoder(self._bytes)
        return LibraryDecoder(self, [id_ for id_ in after if id_ not in self.special_ids][-CONTEXT:])

    def token_bytes(self, id_: int) -> bytes:
        if self.byte_level:
            return self._bytes[id_]
        if id_ in self.special_ids:
            return self._pieces[id_].encode()
        anchor, before = self._anchor
        return self.decode([anchor, id_])[len(before) :].encode()

    def name(self, id_: int) -> str:
        return self._names[id_] if id_ < len(self._names) else ""

    @cached_property
    def _bytes(self) -> list[bytes]:
        alphabet = byte_alphabet()
        return [bytes_of(piece, alphabet) for piece in self._pieces]

    @cached_property
    def _anchor(self) -> tuple[int, str]:
        """An ordinary token, and its text."""
        texts = ((id_, self.decode([id_])) for id_ in range(self.vocab_size) if id_ not in self.special_ids)
        return next(((id_, text) for id_, text in texts if text.isalpha()), (0, self.decode([0])))

    @cached_property
    def _names(self) -> list[str]:
        shown = [self._shown(id_, piece) for id_, piece in enumerate(self._pieces)]
        met = [name for name in shown if name]
        return shown if len(set(met)) == len(met) else self._pieces

    def _shown(self, id_: int, piece: str) -> str:
        if self.byte_level:
            return name_of(self._bytes[id_])
        return piece if self._decoder == "WordPiece" else piece.replace(SPACE, " ")


class LibraryDecoder:
    """Text of tokens as they come, after `context`."""

    def __init__(self, tokenizer: LibraryTokenizer, context: list[int]) -> None:
        self._tokenizer = tokenizer
        self._context = context
        self._before = tokenizer.decode(context)
        self._held: list[int] = []

    def push(self, id_: int) -> str:
        self._held.append(id_)
        text = self._tokenizer.decode([*self._context, *self._held])
        if text.endswith((REPLACEMENT, APOSTROPHE)) and len(self._held) < CONTEXT:
            return ""
        return self._take(text)

    def flush(self) -> str:
        return self._take(self._tokenizer.decode([*self._context, *self._held])) if self._held else ""

    def _take(self, text: str) -> str:
        """What `text` has more than was handed out: where the two part, from there on."""
        new = text[len(self._before) :] if text.startswith(self._before) else text[_common(text, self._before) :]
        self._context = [*self._context, *self._held][-CONTEXT:]
        self._before, self._held = self._tokenizer.decode(self._context), []
        return new


def _common(left: str, right: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def clean_up(text: str) -> str:
    """transformers' clean_up_tokenization."""
    for spaced, joined in CLEANED:
        text = text.replace(spaced, joined)
    return text


def _in_order(vocab: dict[str, int], vocab_size: int) -> list[str]:
    """Pieces by id, of those that the model has; an id that none has is empty."""
    pieces = [""] * vocab_size
    for piece, id_ in vocab.items():
        if id_ < vocab_size:
            pieces[id_] = piece
    return pieces


# === Putting it together: TokenizersBackend of transformers 5 ===


def build(files: TokenizerFiles) -> Any:
    """A `tokenizers.Tokenizer`. Raises TokenizerError."""
    try:
        whole = _BUILDERS[files.kind](files)
        whole.no_truncation()
        whole.no_padding()
        if files.json is not None and files.kind is not Kind.JSON:
            whole.post_processor = _processor_of(files.json)
        explicit = "add_bos_token" in files.options or "add_eos_token" in files.options
        renews = explicit or whole.post_processor is None
        more = _extra_of_t5(files) if files.kind is Kind.T5 else ()
        whole.add_tokens([_library_token(token) for token in (*files.added, *more)])
        whole.encode_special_tokens = files.options.get("split_special_tokens") is True
        if renews:
            whole.post_processor = _around(whole, files)
        if files.kind is Kind.BERT:
            cls, sep = files.named.get("cls_token", "None"), files.named.get("sep_token", "None")
            ids = _id(whole, files, "cls_token", 2), _id(whole, files, "sep_token", 3)
            whole.post_processor = processors.TemplateProcessing(
                single=f"{cls}:0 $A:0 {sep}:0", special_tokens=list(zip((cls, sep), ids, strict=True))
            )
        if files.kind is Kind.T5:
            whole.post_processor = processors.TemplateProcessing(
                single=["$A", "</s>"], special_tokens=[("</s>", _id(whole, files, "eos_token", 1))]
            )
        whole.encode(UNKNOWN)
    except TokenizerError:
        raise
    except Exception as error:  # the library raises nothing narrower, and its words are about its own insides
        raise TokenizerError(f"its files make no {files.kind.value} that the library tokenizers takes") from error
    return whole


def _library_token(token: Any) -> Any:
    flags = {name: getattr(token, name) for name in ("lstrip", "rstrip", "single_word", "normalized", "special")}
    return tokenizers.AddedToken(token.content, **flags)


def _around(whole: Any, files: TokenizerFiles) -> Any:
    """What bos and eos tokens the options put around a text."""
    bos, eos = files.named.get("bos_token"), files.named.get("eos_token")
    bos = bos if files.options.get("add_bos_token") is True else None
    eos = eos if files.options.get("add_eos_token") is True else None
    single = (f"{bos}:0 " if bos else "") + "$A:0" + (f" {eos}:0" if eos else "")
    used = [(text, _id(whole, files, role, 0)) for role, text in (("bos_token", bos), ("eos_token", eos)) if text]
    return processors.TemplateProcessing(single=single, special_tokens=used)


def _id(whole: Any, files: TokenizerFiles, role: str, default: int) -> int:
    for name in (role, "unk_token"):
        id_ = whole.token_to_id(files.named[name]) if name in files.named else None
        if id_ is not None:
            return int(id_)
    return default


def _processor_of(whole: Any) -> Any:
    """A tokenizer.json's post-processor, without reading its vocabulary."""
    part = whole.get("post_processor")
    if part is None:
        return None
    empty = tokenizers.Tokenizer(models.BPE())
    text = empty.to_str().replace('"post_processor":null', '"post_processor":' + json.dumps(part), 1)
    return tokenizers.Tokenizer.from_str(text).post_processor


def _from_json(files: TokenizerFiles) -> Any:
    return tokenizers.Tokenizer.from_buffer(
        read_bytes(files.directory / "tokenizer.json", VOCABULARY_BYTES, TokenizerError)
    )


def _gpt2(files: TokenizerFiles) -> Any:
    vocab, merges = read_vocab(files), list(read_merges(files))
    bpe = models.BPE(vocab=vocab, merges=merges, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False)
    whole = tokenizers.Tokenizer(bpe)
    prefix = files.options.get("add_prefix_space") is True
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    whole.decoder = decoders.ByteLevel()
    return whole


def _bert(files: TokenizerFiles) -> Any:
    vocab = files.json["model"]["vocab"] if files.json else _lines(files)
    whole = tokenizers.Tokenizer(models.WordPiece(vocab=vocab, unk_token=files.named.get("unk_token", "None")))
    whole.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=files.options.get("tokenize_chinese_chars", True),
        strip_accents=files.options.get("strip_accents"),
        lowercase=files.options.get("do_lower_case", True),
    )
    whole.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    whole.decoder = decoders.WordPiece(prefix="##")
    return whole


def _extra_of_t5(files: TokenizerFiles) -> Iterator[AddedToken]:
    """What T5Tokenizer adds to what its files name: the control tokens of spiece.model, and its sentinels."""
    if files.has_extra:
        return
    if files.json is None:
        for text, special in read_pieces(_spiece(files)).added:
            yield AddedToken(text, normalized=False, special=special)
    for i in range(files.options.get("extra_ids", 100)):
        yield AddedToken(f"<extra_id_{i}>", normalized=False, special=True)


def _lines(files: TokenizerFiles) -> dict[str, int]:
    text = read_text(files.directory / "vocab.txt", VOCABULARY_BYTES, TokenizerError)
    return {line.rstrip(): id_ for id_, line in enumerate(text.removesuffix("\n").split("\n"))}


def _t5(files: TokenizerFiles) -> Any:
    extra = files.options.get("extra_ids", 100)
    if files.json is not None:
        pieces = [(piece, score) for piece, score in files.json["model"]["vocab"]]
        charsmap = None
    else:
        proto = read_pieces(_spiece(files))
        pieces = [*proto.pieces, *((f"<extra_id_{i}>", 0.0) for i in range(extra - 1, -1, -1))]
        charsmap = proto.charsmap
    whole = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    if charsmap:
        whole.normalizer = normalizers.Precompiled(charsmap)
    whole.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(),
        pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=True),
    ])  # fmt: skip
    whole.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always", split=True)
    return whole


def _spiece(files: TokenizerFiles) -> Path:
    """Raises TokenizerError."""
    path = files.directory / "spiece.model"
    if not is_file(path):
        raise TokenizerError("the checkpoint has neither tokenizer.json nor spiece.model for its T5Tokenizer")
    return path


_BUILDERS = {Kind.GPT2: _gpt2, Kind.BERT: _bert, Kind.T5: _t5, Kind.JSON: _from_json}
