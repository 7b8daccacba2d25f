"""`gpt2-server check [MODEL]`: what a model is and what it needs, or why it cannot be served.

It reads the whole checkpoint, as a worker does, but computes nothing.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

from model.config import ModelConfig, read_config
from model.errors import ModelError, WeightsError
from model.files import CONFIG_BYTES, WEIGHTS_BYTES, is_file, opened, read_text
from model.tokenizer import Tokenizer, read_tokenizer
from model.weights import as_stored, read_weights
from server.assembly import KV_CACHE_GIB
from server.checkpoint import Checkpoint, find_checkpoint
from server.commands.fetch import READ_BYTES, SUMS
from server.settings import Settings, read_settings, some_flags
from server.worker.memory import pool_size

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes of a number
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "vocab.txt", "spiece.model")
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="a directory, a Hugging Face id, or nothing: the embedded default"
    )
    some_flags(parser, "revision", "dtype", "max_model_len", "max_num_seqs", "block_size", "kv_cache_gib")


def run(arguments: argparse.Namespace) -> int:
    settings = read_settings(arguments)
    checkpoint = find_checkpoint(settings.model, settings.revision)
    config = read_config(checkpoint.directory)
    tokenizer = read_tokenizer(checkpoint.directory, config.vocab_size, config.eos_token_ids)
    tensors = read_weights(checkpoint.directory, config)
    config = as_stored(config, tensors)
    stored = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    if settings.max_model_len is not None and settings.max_model_len > config.n_positions:
        raise ModelError(f"max_model_len {settings.max_model_len} is more than its {config.n_positions} positions")
    rows = [
        ("model", checkpoint.name),
        ("revision", checkpoint.revision or "none: it is a directory"),
        ("shape", _shape(config)),
        ("parameters", f"{config.parameters:,}"),
        ("files", _files(checkpoint, stored)),
        ("digests", _digests(checkpoint.directory)),
        ("tokenizer", _tokenizer(checkpoint.directory, tokenizer)),
        *_memory(config, settings),
    ]
    for name, text in rows:
        print(f"{name:<12}{text}")
    print("It can be served.")
    return 0


def _shape(config: ModelConfig) -> str:
    head = "tied to the embeddings" if config.tie_word_embeddings else "of its own"
    return (
        f"{config.n_layer} layers of width {config.n_embd}, {config.n_head} heads, {config.n_positions:,} positions, "
        f"{config.vocab_size:,} tokens, output layer {head}"
    )


def _files(checkpoint: Checkpoint, stored: set[str]) -> str:
    files = [*filter(is_file, sorted(checkpoint.directory.glob("*.safetensors")))]
    size = sum(file.stat().st_size for file in files)
    return f"{len(files)} safetensors, {size / MIB:,.1f} MiB, {' and '.join(sorted(stored))}"


def _digests(directory: Path) -> str:
    """Of the files, held against what `fetch` recorded. Raises WeightsError."""
    if not is_file(directory / SUMS):
        return f"not recorded (gpt2-server fetch writes {SUMS})"
    lines = read_text(directory / SUMS, CONFIG_BYTES, WeightsError).splitlines()
    recorded = [line.partition("  ")[::2] for line in lines if line and not line.startswith("#")]
    for digest, name in recorded:
        if Path(name).name != name or _sha256(directory / name) != digest:
            raise WeightsError(f"{name} is not the file that was fetched: its digest differs from {SUMS}")
    return f"{len(recorded)} files are those of {SUMS}"


def _sha256(path: Path) -> str:
    """Of nothing, where there is no such file."""
    digest = hashlib.sha256()
    try:
        with opened(path, WEIGHTS_BYTES, OSError) as file:
            while data := file.read(READ_BYTES):
                digest.update(data)
    except OSError:
        return ""
    return digest.hexdigest()


def _tokenizer(directory: Path, tokenizer: Tokenizer) -> str:
    files = [name for name in TOKENIZER_FILES if is_file(directory / name)]
    source = " and ".join(files[: 2 if "merges.txt" in files else 1])
    ends = [f"{tokenizer.name(id_)} is {id_}" for id_ in tokenizer.eos_token_ids]
    return f"{tokenizer.kind}, from {source}; {', '.join(ends) or 'no token ends a text'}"


def _memory(config: ModelConfig, settings: Settings) -> list[tuple[str, str]]:
    """For the dtype that was asked for, or each. Without what Python and PyTorch take for themselves."""
    rows = []
    names = list(SIZES) if settings.dtype == "auto" else [settings.dtype]
    for size in dict.fromkeys(SIZES[name] for name in names):
        per_token = config.kv_bytes_per_token(size)
        blocks = pool_size(
            kv_cache_bytes=int((settings.kv_cache_gib or KV_CACHE_GIB) * GIB),
            bytes_per_token=per_token,
            block_size=settings.block_size,
            max_num_seqs=settings.max_num_seqs,
            max_model_len=settings.max_model_len or config.n_positions,
        )
        weights, cache = config.parameters * size, blocks * settings.block_size * per_token
        text = (
            f"{(weights + cache) / MIB:,.0f} MiB as {' or '.join(n for n in names if SIZES[n] == size)}: "
            f"weights {weights / MIB:,.0f} MiB, KV cache {cache / MIB:,.0f} MiB "
            f"for {blocks * settings.block_size:,} tokens of {per_token / KIB:,.1f} KiB"
        )
        rows.append(("memory", text))
    return rows
