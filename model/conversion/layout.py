"""What every format is brought to: tensors by GPT-2's names in the Hugging Face layout, read one at a time."""

from __future__ import annotations

import stat
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.errors import ConversionError

GPT2_TOKENS = 50257
GPT2_END = 50256
MATRICES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # by safetensors' names


@dataclass(frozen=True, slots=True)
class LazyTensor:
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    def transposed(self) -> LazyTensor:
        """Of two dimensions."""
        return LazyTensor((self.shape[1], self.shape[0]), self.dtype, lambda: self.read().T)

    def first(self, rows: int) -> LazyTensor:
        return LazyTensor((min(rows, self.shape[0]), *self.shape[1:]), self.dtype, lambda: self.read()[:rows])

    def reshaped(self, shape: tuple[int, ...]) -> LazyTensor:
        return replace(self, shape=shape, read=lambda: self.read().reshape(shape))


def lazy(tensor: Tensor) -> LazyTensor:
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


@dataclass(slots=True)
class Source:
    """A model as it was found. Tensors are called as in `model.weights.expected_shapes`, and lm_head.weight."""

    format: str  # in words
    config: dict[str, Any]  # as config.json holds it
    tensors: dict[str, LazyTensor]
    files: list[Path]  # that were read
    tokenizer: dict[str, bytes] = field(default_factory=dict)  # by the names of the Hugging Face layout; may be none


def gpt2_config(
    *, layers: int, heads: int, width: int, positions: int, tokens: int, activation: str, **more: Any
) -> dict[str, Any]:
    """The config.json of a model whose format has none."""
    return {
        "activation_function": activation,
        "architectures": ["GPT2LMHeadModel"],
        "bos_token_id": GPT2_END if tokens > GPT2_END else None,
        "eos_token_id": GPT2_END if tokens > GPT2_END else None,
        "layer_norm_epsilon": 1e-5,
        "model_type": "gpt2",
        "n_embd": width,
        "n_head": heads,
        "n_layer": layers,
        "n_positions": positions,
        "tie_word_embeddings": True,
        "vocab_size": tokens,
        **more,
    }


def unpad(config: dict[str, Any], tensors: dict[str, LazyTensor]) -> None:
    """Trainers pad GPT-2's vocabulary to a multiple of 64 or 128; no text has those tokens, so they go."""
    if GPT2_TOKENS < config["vocab_size"] <= GPT2_TOKENS + 256:
        config["vocab_size"] = GPT2_TOKENS
        for name in ("wte.weight", "lm_head.weight"):
            if name in tensors:
                tensors[name] = tensors[name].first(GPT2_TOKENS)


def linear_to_conv1d(tensors: dict[str, LazyTensor]) -> None:
    """From (out, in) of torch's Linear to (in, out) of GPT-2's own layout."""
    for name, tensor in tensors.items():
        if name.startswith("h.") and name.endswith(MATRICES) and len(tensor.shape) == 2:
            tensors[name] = tensor.transposed()


def regular_size(path: Path) -> int:
    """In bytes. Raises ConversionError where it is no regular file."""
    try:
        status = path.stat()
    except OSError as error:
        raise ConversionError(f"cannot read {path.name}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ConversionError(f"{path.name} is no regular file")
    return status.st_size
