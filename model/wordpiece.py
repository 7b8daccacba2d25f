"""WordPiece from `vocab.txt`, as Chinese GPT-2s have it: BERT's tokenizer, run by the library `tokenizers`.

The text that was encoded cannot be had back: spaces are lost, and often case. What is written instead is decided from
one token and the one before it, so that a stream never takes anything back:

- a piece with `##` goes on with the word before it;
- there is no space before `.`, `?`, `!`, `,` and the ends of English contractions, as in the library's own decoder;
- there is none between two characters of Chinese or Japanese, nor between one of them and a punctuation mark, where the
  library has one;
- there is one everywhere else.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path

from model.byte_level import read_text
from model.errors import TokenizerError
from model.pieces import PieceTokenizer, from_json, library, names_in, read_options

MORE = "##"
CLINGING = (".", "?", "!", ",", "n't", "'m", "'s", "'ve", "'re")
WIDE = (
    (0x2E80, 0x30FF),  # radicals, punctuation of Chinese and Japanese, kana
    (0x31C0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0xFE30, 0xFE4F),
    (0xFF00, 0xFFEF),  # full-width forms
    (0x20000, 0x3FFFF),
)
ROLES = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]"}


class WordPieceTokenizer(PieceTokenizer):
    kind = "BertTokenizer"

    def decoder(self, after: Sequence[int]) -> WordPieceDecoder:
        last = after[-1] if after else None
        return WordPieceDecoder(self.pieces, "" if last is None or last in self.special_ids else self.pieces[last])

    def shown(self, id_: int) -> str:
        return self.pieces[id_]

    def token_bytes(self, id_: int) -> bytes:
        piece = self.pieces[id_]
        return (piece.removeprefix(MORE) if is_more(piece) else space_between("a", piece) + piece).encode()


class WordPieceDecoder:
    def __init__(self, pieces: Sequence[str], before: str) -> None:
        """before: the piece that the text follows; empty at the start of a text."""
        self._pieces = pieces
        self._before = before

    def push(self, id_: int) -> str:
        piece = self._pieces[id_]
        if not piece:
            return ""
        before, self._before = self._before, piece
        if is_more(piece):
            return piece.removeprefix(MORE)
        return space_between(before, piece) + piece

    def flush(self) -> str:
        return ""


def is_more(piece: str) -> bool:
    return piece.startswith(MORE) and len(piece) > len(MORE)


def space_between(left: str, right: str) -> str:
    if not left or not right or right.startswith(CLINGING):
        return ""
    kinds = {_kind(left[-1]), _kind(right[0])}
    return "" if "wide" in kinds and "letter" not in kinds else " "


def _kind(character: str) -> str:
    code = ord(character)
    if any(low <= code <= high for low, high in WIDE):
        return "wide"
    return "mark" if unicodedata.category(character)[0] in "PS" else "letter"


def read_wordpiece(directory: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> WordPieceTokenizer:
    """From vocab.txt, and what tokenizer_config.json says of it. Raises TokenizerError."""
    pieces = [line.rstrip("\r") for line in read_text(directory / "vocab.txt").removesuffix("\n").split("\n")]
    vocab = {piece: id_ for id_, piece in enumerate(pieces)}
    options = {**ROLES, **read_options(directory)}
    names = names_in(options, vocab)
    if "unk_token" not in names:
        raise TokenizerError(f"vocab.txt has no {str(options['unk_token'])[:40]}")
    tokenizers = library("tokenizers")
    whole = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token=names["unk_token"]))
    whole.normalizer = tokenizers.normalizers.BertNormalizer(
        lowercase=bool(options.get("do_lower_case", True)),
        strip_accents=accents if isinstance(accents := options.get("strip_accents"), bool) else None,
        handle_chinese_chars=bool(options.get("tokenize_chinese_chars", True)),
    )
    whole.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    special = {name: vocab[name] for name in names.values()}
    roles = {"bos_token": names.get("bos_token", names.get("cls_token", "")), "unk_token": names["unk_token"]}
    return WordPieceTokenizer(
        pieces,
        lambda text: list(whole.encode(text, add_special_tokens=False).ids),
        special,
        {role: name for role, name in roles.items() if name},
        vocab_size,
        eos_token_ids,
    )


def wordpiece_from_json(directory: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> WordPieceTokenizer:
    """From tokenizer.json. Raises TokenizerError."""
    pieces, encode, special = from_json(directory, vocab_size)
    names = names_in({**ROLES, **read_options(directory)}, {piece: id_ for id_, piece in enumerate(pieces)})
    return WordPieceTokenizer(pieces, encode, special, names, vocab_size, eos_token_ids)
