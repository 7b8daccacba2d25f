"""The tokenizer of a model of other origin: the one beside it, the one that was named, or GPT-2's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from model.conversion.layout import GPT2_TOKENS, Source
from model.errors import ConversionError
from model.files import CONFIG_BYTES, VOCABULARY_BYTES, read_bytes, read_object

EMBEDDED = Path(__file__).parents[1] / "default"
VOCABULARY_FILES = (
    "vocab.json", "tokenizer.json", "vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.model",
)  # fmt: skip
TOKENIZER_FILES = (
    *VOCABULARY_FILES, "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "generation_config.json",
)  # fmt: skip
_OPENAI = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}  # what GPT-2's own release calls them


def read_description(file: Path) -> dict[str, Any]:
    """The config.json beside a file. Raises ConversionError."""
    path = file.with_name("config.json")
    if not path.exists():
        raise ConversionError(f"beside {file.name} there is no config.json, which says how many heads the model has")
    return read_object(path, CONFIG_BYTES, ConversionError)


def settle_tokenizer(source: Source, named: Path | None) -> None:
    """Gives the model a tokenizer, where its own file had none. Raises ConversionError where there is none for it."""
    if named is not None:
        source.tokenizer = _beside(named)
        if not source.tokenizer:
            raise ConversionError(f"{named.name} holds no tokenizer")
    if source.tokenizer:
        return
    source.tokenizer = _beside(source.files[0].parent)
    if any(name in source.tokenizer for name in VOCABULARY_FILES):
        return
    tokens = source.config.get("vocab_size")
    if tokens != GPT2_TOKENS:
        raise ConversionError(
            f"it has {tokens} tokens, so its tokenizer is not GPT-2's, and none is beside it: "
            "name a directory that holds it (--tokenizer DIR)"
        )
    source.tokenizer |= {name: (EMBEDDED / name).read_bytes() for name in ("vocab.json", "merges.txt")}
    source.tokenizer.setdefault("tokenizer_config.json", (EMBEDDED / "tokenizer_config.json").read_bytes())


def _beside(directory: Path) -> dict[str, bytes]:
    found = {
        name: read_bytes(directory / name, VOCABULARY_BYTES, ConversionError)
        for name in TOKENIZER_FILES
        if (directory / name).exists()
    }
    for theirs, ours in _OPENAI.items():
        if (directory / theirs).exists():
            found.setdefault(ours, read_bytes(directory / theirs, VOCABULARY_BYTES, ConversionError))
    return found
