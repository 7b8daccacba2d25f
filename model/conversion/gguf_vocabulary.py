"""A byte-level BPE tokenizer as llama.cpp keeps it: tokens by id, their types, and merges."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.config import ModelConfig
from model.errors import ConversionError
from model.files import CONFIG_BYTES, VOCABULARY_BYTES, read_object, read_text

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_OTHER = "llama.cpp reads a GPT-2 with GPT-2's kind of tokenizer, byte-level BPE, and this model has another"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    tokens: list[str]
    types: list[int]
    merges: list[str]
    end: int | None
    prefix_space: bool
    begins: bool  # whether a text begins with the end token

    def write(self, writer: Any) -> None:
        """writer: gguf's GGUFWriter."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        writer.add_add_bos_token(self.begins)
        writer.add_add_space_prefix(self.prefix_space)
        if self.end is not None:
            writer.add_bos_token_id(self.end)
            writer.add_eos_token_id(self.end)


def read_vocabulary(directory: Path, config: ModelConfig) -> Vocabulary:
    """Raises ConversionError where it is another kind."""
    settings = _object(directory / "tokenizer_config.json", CONFIG_BYTES)
    described = _object(directory / "tokenizer.json", VOCABULARY_BYTES)
    if described:
        ids, merges = _of_tokenizer_json(described)
    elif (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        ids = _object(directory / "vocab.json", VOCABULARY_BYTES)
        lines = read_text(directory / "merges.txt", VOCABULARY_BYTES, ConversionError).split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
    else:
        raise ConversionError(_OTHER)
    added = _added(directory, settings, described)
    tokens = [f"[PAD{i}]" for i in range(config.vocab_size)]  # as llama.cpp's own converter calls rows without a token
    types = [_UNUSED] * config.vocab_size
    entries = [(token, i, _NORMAL) for token, i in ids.items()]
    entries += [(token, i, _CONTROL if special else _USER_DEFINED) for i, (token, special) in added.items()]
    for token, i, type_ in entries:
        if not isinstance(i, int) or not 0 <= i < config.vocab_size:
            raise ConversionError("the tokenizer has tokens that the model has not")
        tokens[i], types[i] = token, type_
    ends = [*config.eos_token_ids]
    if ends and types[ends[0]] == _NORMAL:
        types[ends[0]] = _CONTROL
    return Vocabulary(
        tokens,
        types,
        merges,
        ends[0] if ends else None,
        settings.get("add_prefix_space") is True,
        settings.get("add_bos_token") is True,
    )


def _object(path: Path, at_most: int) -> dict[str, Any]:
    return read_object(path, at_most, ConversionError) if path.is_file() else {}


def _of_tokenizer_json(described: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    model, splitter = described.get("model"), described.get("pre_tokenizer")
    if not isinstance(model, dict) or not isinstance(splitter, dict):
        raise ConversionError(_OTHER)
    plain = splitter.get("type") == "ByteLevel" and splitter.get("use_regex", True) is True
    if model.get("type") != "BPE" or not plain or described.get("normalizer") is not None:
        raise ConversionError(_OTHER)
    ids, merges = model.get("vocab"), model.get("merges")
    if not isinstance(ids, dict) or not isinstance(merges, list):
        raise ConversionError(_OTHER)
    return ids, [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def _added(directory: Path, settings: dict[str, Any], described: dict[str, Any]) -> dict[int, tuple[str, bool]]:
    """Tokens beside the vocabulary, by id, and whether each is special."""
    found = {i: (token, False) for token, i in _object(directory / "added_tokens.json", VOCABULARY_BYTES).items()}
    decoder = settings.get("added_tokens_decoder")
    listed = list(decoder.items()) if isinstance(decoder, dict) else []
    listed += [(entry.get("id"), entry) for entry in described.get("added_tokens") or [] if isinstance(entry, dict)]
    for i, entry in listed:
        if isinstance(entry, dict) and str(i).isdigit() and isinstance(entry.get("content"), str):
            found[int(i)] = (entry["content"], entry.get("special") is True)
    return found
