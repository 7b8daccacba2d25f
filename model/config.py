"""The shape of a GPT-2, read from a Hugging Face `config.json`. Imports no torch.

The file is data: known keys are read, the rest is ignored, and nothing in it is ever resolved as a name to import.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from model.errors import ConfigError
from model.files import CONFIG_BYTES, VOCABULARY_BYTES, is_file, read_object, read_text

MOST = {  # what a shape may be; the largest GPT-2s have 48 layers of width 1600
    "n_layer": 1024,
    "n_head": 1024,
    "n_embd": 1 << 16,
    "n_positions": 1 << 20,
    "n_ctx": 1 << 20,
    "vocab_size": 1 << 21,
    "n_inner": 1 << 18,
}


OTHER_HEADS = re.compile(r"(TF|Flax)?GPT2For\w{1,60}")  # of transformers: classifiers, question answering


class Activation(Enum):
    """The MLP's non-linearity; values are the names Hugging Face gives them."""

    GELU_TANH = "gelu_new"
    GELU_ERF = "gelu"
    RELU = "relu"
    SILU = "silu"


_ACTIVATION_NAMES = {
    "gelu_new": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "gelu_fast": Activation.GELU_TANH,
    "gelu": Activation.GELU_ERF,
    "relu": Activation.RELU,
    "silu": Activation.SILU,
    "swish": Activation.SILU,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    n_layer: int
    n_head: int
    n_embd: int
    n_positions: int
    vocab_size: int
    n_inner: int
    activation: Activation
    layer_norm_epsilon: float
    scale_attn_weights: bool
    scale_attn_by_inverse_layer_idx: bool
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]  # the tokens that end a text; as a checkpoint's files name them, perhaps none

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def parameters(self) -> int:
        """How many numbers the checkpoint holds."""
        norm = 2 * self.n_embd
        attention = self.n_embd * 4 * self.n_embd + 4 * self.n_embd
        mlp = 2 * self.n_embd * self.n_inner + self.n_inner + self.n_embd
        layers = self.n_layer * (2 * norm + attention + mlp)
        heads = 1 if self.tie_word_embeddings else 2
        return layers + norm + (heads * self.vocab_size + self.n_positions) * self.n_embd

    def attention_scale(self, layer: int) -> float:
        """What query·key products of a layer are multiplied with."""
        scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    def kv_bytes_per_token(self, element_size: int) -> int:
        return 2 * self.n_layer * self.n_embd * element_size


def read_config(directory: Path) -> ModelConfig:
    """Raises ConfigError: no file, no JSON, another architecture, or a shape that cannot be."""
    config = parse_config(read_object(directory / "config.json", CONFIG_BYTES, ConfigError))
    if is_file(directory / "generation_config.json"):
        generation = read_object(directory / "generation_config.json", CONFIG_BYTES, ConfigError)
        ends = _eos_token_ids(generation, "generation_config.json", config.vocab_size)
        config = replace(config, eos_token_ids=ends or config.eos_token_ids)
    if not config.eos_token_ids and is_file(directory / "vocab.txt"):
        end = _end_of_bert(directory / "vocab.txt")  # Chinese GPT-2s name none, or GPT-2's own
        config = replace(config, eos_token_ids=() if end is None else (end,))
    return config


def _end_of_bert(path: Path) -> int | None:
    """[SEP], which ends a document where BERT's tokenizer is used."""
    lines = read_text(path, VOCABULARY_BYTES, ConfigError).split("\n")
    return lines.index("[SEP]") if "[SEP]" in lines else None


def parse_config(raw: dict[str, Any]) -> ModelConfig:
    if raw.get("model_type", "gpt2") != "gpt2":
        raise ConfigError(f"config.json describes a {str(raw['model_type'])[:40]!r} model; this server runs gpt2")
    _check_kind(raw)
    n_embd = _positive_int(raw, "n_embd")
    n_head = _positive_int(raw, "n_head")
    if n_embd % n_head:
        raise ConfigError(f"config.json: n_embd {n_embd} is not a multiple of n_head {n_head}")
    vocab_size = _positive_int(raw, "vocab_size")
    return ModelConfig(
        n_layer=_positive_int(raw, "n_layer"),
        n_head=n_head,
        n_embd=n_embd,
        n_positions=_positive_int(raw, "n_positions" if raw.get("n_positions") is not None else "n_ctx"),
        vocab_size=vocab_size,
        n_inner=_positive_int(raw, "n_inner", 4 * n_embd),
        activation=_activation(raw.get("activation_function", "gelu_new")),
        layer_norm_epsilon=_epsilon(raw.get("layer_norm_epsilon", 1e-5)),
        scale_attn_weights=_flag(raw, "scale_attn_weights", True),
        scale_attn_by_inverse_layer_idx=_flag(raw, "scale_attn_by_inverse_layer_idx", False),
        tie_word_embeddings=_flag(raw, "tie_word_embeddings", True),
        eos_token_ids=_eos_token_ids({"eos_token_id": 50256, **raw}, "config.json", vocab_size),
    )


def _check_kind(raw: dict[str, Any]) -> None:
    """Raises ConfigError for a GPT-2 that is something else than a network of floating point numbers and a head that
    says the next token."""
    classes = raw.get("architectures")
    for name in classes if isinstance(classes, list) else []:
        if OTHER_HEADS.fullmatch(str(name)):
            raise ConfigError(f"config.json describes a {name}, whose head does not say the next token")
    quantised = raw.get("quantization_config")
    if quantised is not None:
        method = str(quantised.get("quant_method", "somehow"))[:40] if isinstance(quantised, dict) else "somehow"
        raise ConfigError(
            f"its weights are quantised ({method}), which is not read; serve the model that they were made from, with "
            "--quantization int8 where memory is short"
        )


def check_variant(variant: ModelConfig, base: ModelConfig) -> None:
    """Raises ConfigError where a model cannot be served beside another: its ends, or its shape."""
    if set(variant.eos_token_ids) != set(base.eos_token_ids):
        raise _differs("eos_token_id", _listed(variant.eos_token_ids), _listed(base.eos_token_ids))
    check_shape(variant, base)


def _listed(ids: tuple[int, ...]) -> str:
    return " and ".join(map(str, ids)) or "none"


def check_shape(variant: ModelConfig, base: ModelConfig) -> None:
    """Raises ConfigError where two models cannot share a KV cache."""
    for name in ("n_embd", "n_head", "vocab_size"):
        if getattr(variant, name) != getattr(base, name):
            raise _differs(name, getattr(variant, name), getattr(base, name))
    if variant.n_layer > base.n_layer or variant.n_positions < base.n_positions:
        raise ConfigError("it cannot be served beside the model: it has more layers or fewer positions")


def _differs(name: str, its: object, the_models: object) -> ConfigError:
    return ConfigError(
        f"it cannot be served beside the model, whose {name} is {the_models} and not {its}: serve it by itself"
    )


def _positive_int(raw: dict[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ConfigError(f"config.json: {key} must be a positive integer")
    if value > MOST[key]:
        raise ConfigError(f"config.json: {key} is more than this server takes, {MOST[key]}")
    return value


def _flag(raw: dict[str, Any], key: str, default: bool) -> bool:
    value = raw.get(key, default)
    if not isinstance(value, bool):
        raise ConfigError(f"config.json: {key} must be true or false")
    return value


def _activation(name: object) -> Activation:
    if not isinstance(name, str) or name not in _ACTIVATION_NAMES:
        raise ConfigError(f"config.json: activation_function must be one of {', '.join(_ACTIVATION_NAMES)}")
    return _ACTIVATION_NAMES[name]


def _epsilon(value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1:
        raise ConfigError("config.json: layer_norm_epsilon must be between 0 and 1")
    return float(value)


def _eos_token_ids(raw: dict[str, Any], name: str, vocab_size: int) -> tuple[int, ...]:
    """Those that are tokens of the vocabulary: many a config names none, or one of the model it was made from."""
    value = raw.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(id_, int) and not isinstance(id_, bool) for id_ in ids):
        raise ConfigError(f"{name}: eos_token_id must be a token id, or a list of them")
    return tuple(dict.fromkeys(id_ for id_ in ids if 0 <= id_ < vocab_size))
