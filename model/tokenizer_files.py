"""What the files of a checkpoint say of its tokenizer, read as transformers 5 reads them. Imports no torch.

`tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json` and `tokenizer.json` overlap: which of them is
believed, and in which order tokens are added, is `PreTrainedTokenizerBase._from_pretrained`'s rule. Nothing in them is
ever resolved as a name to import: a class that is not understood is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from model import files as model_files
from model.errors import TokenizerError
from model.files import VOCABULARY_BYTES, is_file

END_OF_TEXT = "<|endoftext|>"  # GPT-2's own
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
SPIECE_NAMES = ("spiece.model", "tokenizer.model", "sentencepiece.model")


class Kind(Enum):
    """transformers' classes that are understood. All but the last put the tokenizer together from its vocabulary."""

    GPT2 = "GPT2Tokenizer"
    BERT = "BertTokenizer"
    T5 = "T5Tokenizer"
    JSON = "TokenizersBackend"  # as tokenizer.json says, and nothing else


_CLASSES = {kind.value: kind for kind in Kind} | {
    "PreTrainedTokenizer": Kind.JSON,
    "PreTrainedTokenizerFast": Kind.JSON,
    "PreTrainedTokenizerBase": Kind.JSON,
    "PythonBackend": Kind.JSON,
}
_DEFAULTS: dict[Kind, dict[str, Any]] = {
    Kind.GPT2: dict.fromkeys(("unk_token", "bos_token", "eos_token"), END_OF_TEXT),
    Kind.BERT: {
        "unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]",
    },
    Kind.T5: {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    Kind.JSON: {},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A text that is one token, wherever it stands. `lstrip` and `rstrip` take the spaces beside it along."""

    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = True  # looked for in the text as the normalizer leaves it
    special: bool = False

    @property
    def plain(self) -> bool:
        return not (self.lstrip or self.rstrip or self.single_word)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFiles:
    directory: Path
    kind: Kind
    options: Mapping[str, Any]  # what tokenizer_config.json says beside tokens
    added: tuple[AddedToken, ...]  # in the order in which they are added to the vocabulary
    named: Mapping[str, str]  # a role, as eos_token, and its text
    has_extra: bool  # special tokens beside those that have a role
    json: Mapping[str, Any] | None  # tokenizer.json, where the directory has one


def read_files(directory: Path) -> TokenizerFiles:
    """Raises TokenizerError: a file that is no JSON, a token that is none, a class that is not understood."""
    options = _object(directory / "tokenizer_config.json")
    whole = _object(directory / "tokenizer.json") or None
    kind = _kind(directory, options, whole)
    if whole is not None:
        options.pop("add_bos_token", None)
        options.pop("add_eos_token", None)
    extra, named = _extra(options), {key: options.pop(key) for key in list(options) if _is_role(key, options[key])}
    if isinstance(extra, dict):
        named |= extra
        extra = []
    known: dict[int, AddedToken] = {}
    late: dict[str, list[Any]] = {}
    if "added_tokens_decoder" in options:
        known = {_id(id_): _token(value) for id_, value in _mapping(options.pop("added_tokens_decoder")).items()}
    else:
        for key, value in _object(directory / "special_tokens_map.json").items():
            if key in ("extra_special_tokens", "additional_special_tokens"):
                late[key] = value if isinstance(value, list) else []
            elif isinstance(value, (str, dict)):
                named[key] = value
        extra = [*extra, *late.get("extra_special_tokens", [])]
        texts = {_text(value) for value in [*named.values(), *extra] if value is not None}
        for text, id_ in _object(directory / "added_tokens.json").items():
            known[_id(id_)] = AddedToken(text, normalized=text not in texts, special=text in texts)
        if whole is not None:
            for value in _list(whole.get("added_tokens", [])):
                known[_id(_mapping(value).get("id"))] = _token(value)
    extra = extra or late.get("additional_special_tokens", [])  # special where nothing else says what they are
    for role, text in _DEFAULTS[kind].items():
        named.setdefault(role, text)
    ordered = {role: named[role] for role in (*NAMED, *named) if named.get(role) is not None}
    return TokenizerFiles(
        directory=directory,
        kind=kind,
        options=options,
        added=_in_order(known, ordered, extra),
        named={role: _text(value) for role, value in ordered.items()},
        has_extra=bool(extra),
        json=whole,
    )


def _kind(directory: Path, options: Mapping[str, Any], whole: Mapping[str, Any] | None) -> Kind:
    name = options.get("tokenizer_class") or _object(directory / "config.json").get("tokenizer_class")
    kind = _CLASSES.get(str(name).removesuffix("Fast") if name != "PreTrainedTokenizerFast" else str(name))
    if name is not None and kind is None:
        raise TokenizerError(
            f"its tokenizer is of the class {str(name)[:40]!r}, which is none of {', '.join(k.value for k in Kind)}; "
            "saved as tokenizer.json alone (PreTrainedTokenizerFast of transformers) it can be served"
        )
    if kind is None and whole is None and not is_file(directory / "vocab.json"):
        kind = Kind.BERT if is_file(directory / "vocab.txt") else kind
    if kind is Kind.JSON and whole is None:
        return Kind.GPT2  # which transformers refuses; the files of byte-level BPE leave nothing to guess
    if whole is not None and kind in (None, Kind.GPT2) and not _of_bytes(whole):
        return Kind.JSON  # transformers puts such a vocabulary, as KoGPT2's, together as if it were one of bytes
    return kind or Kind.GPT2


def _of_bytes(whole: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is byte-level BPE."""
    model = whole.get("model")
    is_bpe = isinstance(model, dict) and ("merges" in model if model.get("type") is None else model["type"] == "BPE")
    return is_bpe and any("ByteLevel" in _types(whole.get(part)) for part in ("pre_tokenizer", "decoder"))


def _types(part: object) -> set[str]:
    """The types in a part of a tokenizer.json, which may be a sequence of others."""
    if isinstance(part, list):
        return set().union(*map(_types, part))
    if not isinstance(part, dict):
        return set()
    return {str(part.get("type"))}.union(*(_types(value) for value in part.values() if isinstance(value, list)))


def _in_order(
    known: Mapping[int, AddedToken], named: Mapping[str, Any], extra: Iterable[Any]
) -> tuple[AddedToken, ...]:
    by_text = {token.content: token for token in known.values()}
    roles = {_text(value) for value in named.values()}
    tokens = [known[id_] for id_ in sorted(known)]
    seen = set(by_text)
    for value in [*named.values(), *extra]:
        text = _text(value)
        if text not in seen:
            seen.add(text)
            tokens.append(
                _token(value) if isinstance(value, dict) else AddedToken(text, False, False, False, False, True)
            )
    return tuple(replace(token, special=True) if token.content in roles else token for token in tokens)


def _extra(options: dict[str, Any]) -> Any:
    old, new = options.pop("additional_special_tokens", None), options.pop("extra_special_tokens", None)
    value = new or old or []
    if not isinstance(value, (list, dict)):
        raise TokenizerError("tokenizer_config.json: the extra special tokens are no list")
    return value


def _is_role(key: str, value: object) -> bool:
    return key in NAMED or (key.endswith("_token") and isinstance(value, (str, dict)))


def _token(value: object) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value)
    entry = _mapping(value)
    flags = {name: entry[name] for name in FLAGS if name in entry}
    if not isinstance(entry.get("content"), str) or not all(isinstance(flag, bool) for flag in flags.values()):
        raise TokenizerError("an added token of the tokenizer has no text, or a flag that is neither true nor false")
    return AddedToken(entry["content"], **{"normalized": not flags.get("special", False), **flags})


def _text(value: object) -> str:
    return value if isinstance(value, str) else _token(value).content


def _id(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, str)) or not str(value).isdecimal():
        raise TokenizerError("an added token of the tokenizer has an id that is no number")
    return int(value)


def _mapping(value: object) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise TokenizerError("an added token of the tokenizer is no object")
    return value


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise TokenizerError("tokenizer.json: the added tokens are no list")
    return value


def _object(path: Path) -> dict[str, Any]:
    """Empty where there is no such file."""
    return read_json(path) if is_file(path) else {}


def read_text(path: Path) -> str:
    return model_files.read_text(path, VOCABULARY_BYTES, TokenizerError)


def read_json(path: Path) -> dict[str, Any]:
    value = model_files.read_json(path, VOCABULARY_BYTES, TokenizerError)
    if not isinstance(value, dict) or (path.name == "vocab.json" and not is_vocab(value)):
        raise TokenizerError(f"{path.name} does not hold a vocabulary")
    return value


def is_vocab(value: object) -> bool:
    return (
        isinstance(value, dict)
        and len(value) > 1
        and all(type(id_) is int and id_ >= 0 for id_ in value.values())  # a boolean is no id
        and len(set(value.values())) == len(value)
    )
