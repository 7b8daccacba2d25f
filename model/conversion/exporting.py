"""A model that is served, as others read it: the Hugging Face layout, llama.cpp's GGUF, nanoGPT's checkpoint."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.adapter_file import read_adapter
from model.adapter_merging import merge_adapter
from model.config import Activation, ModelConfig, read_config
from model.conversion.apart import in_place_of
from model.conversion.gguf_reading import NAMES, OUTER
from model.conversion.gguf_vocabulary import read_vocabulary
from model.conversion.layout import MATRICES, lazy
from model.conversion.libraries import needed
from model.conversion.vocabulary import TOKENIZER_FILES, VOCABULARY_FILES
from model.conversion.writing import write_safetensors
from model.errors import ConversionError
from model.files import CONFIG_BYTES, read_object
from model.weights import SINGLE_FILE, read_weights

GGUF_KINDS = {"float32": "F32", "float16": "F16", "q8_0": "Q8_0"}
_EPSILON = 1e-5  # nanoGPT's


@dataclass(frozen=True, slots=True)
class Model:
    config: ModelConfig
    weights: Mapping[str, Tensor]  # by `model.weights.expected_shapes`
    directory: Path  # of config.json
    tokenizer: Path  # of its files


def load(directory: Path, adapter: Path | None) -> Model:
    """With the adapter merged into it. Raises ModelError."""
    config = read_config(directory)
    weights: Mapping[str, Tensor] = read_weights(directory, config)
    config = replace(config, tie_word_embeddings="lm_head.weight" not in weights)
    tokenizer = directory
    if adapter is not None:
        config, weights = merge_adapter(config, weights, *read_adapter(adapter, config))
        if any((adapter / name).exists() for name in VOCABULARY_FILES):
            tokenizer = adapter  # of an adapter that brings tokens of its own
    return Model(config, weights, directory, tokenizer)


def write_hugging_face(model: Model, destination: Path) -> None:
    """Raises ModelError."""
    raw = read_object(model.directory / "config.json", CONFIG_BYTES, ConversionError)
    raw |= {"vocab_size": model.config.vocab_size, "tie_word_embeddings": model.config.tie_word_embeddings}
    named = {
        name if name == "lm_head.weight" else f"transformer.{name}": lazy(tensor)
        for name, tensor in sorted(model.weights.items())
    }
    with in_place_of(destination) as unfinished:
        write_safetensors(unfinished / SINGLE_FILE, named)
        (unfinished / "config.json").write_text(json.dumps(raw, indent=2, ensure_ascii=False) + "\n", "utf-8")
        for name in TOKENIZER_FILES:
            if (model.tokenizer / name).is_file():
                shutil.copyfile(model.tokenizer / name, unfinished / name)


# === nanoGPT ===


def write_nanogpt(model: Model, destination: Path) -> None:
    """What nanoGPT's sample.py reads. Raises ConversionError where nanoGPT has no such network."""
    config = model.config
    _check_plain(config, "nanoGPT")
    if not config.tie_word_embeddings or config.n_inner != 4 * config.n_embd or config.layer_norm_epsilon != _EPSILON:
        raise ConversionError(
            f"nanoGPT has no such network: its head is tied, its MLP 4 times as wide, its epsilon {_EPSILON}"
        )
    state = {
        f"transformer.{name}": (tensor.T if _is_matrix(name) else tensor).float().contiguous()
        for name, tensor in model.weights.items()
    }
    state["lm_head.weight"] = state["transformer.wte.weight"]
    arguments = {
        "n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd, "block_size": config.n_positions,
        "bias": True, "vocab_size": config.vocab_size, "dropout": 0.0,
    }  # fmt: skip
    with _file_in_place_of(destination) as unfinished:
        torch.save({"model": state, "model_args": arguments, "iter_num": 0, "config": {}}, unfinished)


# === llama.cpp ===


def write_gguf(model: Model, destination: Path, dtype: str) -> None:
    """dtype: of GGUF_KINDS, of matrices and embeddings; all else is fp32.

    Raises ModelError where llama.cpp has no such network or no such tokenizer.
    """
    gguf = needed("gguf")
    config = model.config
    _check_plain(config, "llama.cpp")
    if config.activation is not Activation.GELU_TANH:
        raise ConversionError(f"llama.cpp computes a GPT-2 with gelu_new, and this model has {config.activation.value}")
    vocabulary = read_vocabulary(model.tokenizer, config)
    with _file_in_place_of(destination) as unfinished:
        writer = gguf.GGUFWriter(unfinished, "gpt2")
        writer.add_context_length(config.n_positions)
        writer.add_embedding_length(config.n_embd)
        writer.add_feed_forward_length(config.n_inner)
        writer.add_block_count(config.n_layer)
        writer.add_head_count(config.n_head)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        kind = GGUF_KINDS[dtype]
        writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
        vocabulary.write(writer)
        for name, tensor in model.weights.items():
            _add(gguf, writer, name, tensor, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _add(gguf: Any, writer: Any, name: str, tensor: Tensor, kind: str) -> None:
    place, _, last = name.rpartition(".")
    many = _is_matrix(name) or name in ("wte.weight", "lm_head.weight")
    data = (tensor.T if _is_matrix(name) else tensor).float().contiguous().numpy()
    type_ = gguf.GGMLQuantizationType[kind if many else "F32"]
    if type_ == gguf.GGMLQuantizationType.Q8_0 and data.shape[-1] % 32:  # of which a block has 32 numbers
        type_ = gguf.GGMLQuantizationType.F16
    if type_ != gguf.GGMLQuantizationType.F32:
        data = gguf.quants.quantize(data, type_)
    writer.add_tensor(_gguf_name(place, last), data, raw_dtype=type_)


def _gguf_name(place: str, last: str) -> str:
    outer = {ours: theirs for theirs, ours in OUTER.items()}
    if place in outer:
        return f"{outer[place]}.{last}"
    _, layer, part = place.split(".", 2)
    names = {ours: theirs for theirs, ours in NAMES.items()}
    return f"blk.{layer}.{names[part]}.{last}"


def _is_matrix(name: str) -> bool:
    """Whether it is kept as (in, out), where others keep (out, in)."""
    return name.startswith("h.") and name.endswith(MATRICES)


def _check_plain(config: ModelConfig, reader: str) -> None:
    if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx:
        raise ConversionError(f"{reader} has no attention of another scale than GPT-2's, which this model has")


@contextmanager
def _file_in_place_of(destination: Path) -> Iterator[Path]:
    """As `in_place_of`, for one file."""
    if destination.exists():
        raise ConversionError(f"{destination.name} is there already")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{destination.name}.", dir=destination.parent) as scratch:
            yield Path(scratch) / destination.name
            (Path(scratch) / destination.name).rename(destination)
    except OSError as error:
        raise ConversionError(f"cannot write {destination.name}: {error.strerror}") from None
