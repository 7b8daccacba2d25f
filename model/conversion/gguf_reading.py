"""GGUF of architecture gpt2, as llama.cpp reads it. Quantised tensors become fp32.

Sources: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the `gguf` package; llama.cpp's GPT2Model.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.conversion.layout import LazyTensor, Source, gpt2_config, linear_to_conv1d
from model.conversion.libraries import needed
from model.errors import ConversionError

NAMES = {  # GGUF's: the Hugging Face layout's
    "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
}  # fmt: skip
OUTER = {
    "token_embd": "wte", "position_embd": "wpe", "output_norm": "ln_f", "output": "lm_head",
}  # fmt: skip
_CONTROL, _USER_DEFINED = 3, 4  # of a token's types


def open_gguf(path: Path) -> Source:
    """Raises ConversionError."""
    gguf = needed("gguf")
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception:
        raise ConversionError(f"{path.name} is damaged, or no GGUF") from None
    architecture = fields.get("general.architecture")
    if architecture != "gpt2":
        raise ConversionError(f"{path.name} holds a {str(architecture)[:30]} model; gpt2 is read")
    if fields.get("split.count", 1) != 1:
        raise ConversionError(f"{path.name} is one of several parts: llama.cpp's gguf-split merges them")
    tensors = {}
    for tensor in reader.tensors:
        tensors[_name(tensor.name)] = _lazy(gguf, tensor)
    linear_to_conv1d(tensors)
    tokens = fields.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or "wte.weight" not in tensors:
        raise ConversionError(f"{path.name} has no vocabulary or no embeddings")
    config = gpt2_config(
        layers=_number(fields, "gpt2.block_count"),
        heads=_number(fields, "gpt2.attention.head_count"),
        width=_number(fields, "gpt2.embedding_length"),
        positions=_number(fields, "gpt2.context_length"),
        tokens=tensors["wte.weight"].shape[0],
        activation="gelu_new",
        n_inner=_number(fields, "gpt2.feed_forward_length"),
        layer_norm_epsilon=_epsilon(fields),
    )
    config["bos_token_id"] = fields.get("tokenizer.ggml.bos_token_id", config["bos_token_id"])
    config["eos_token_id"] = fields.get("tokenizer.ggml.eos_token_id", config["eos_token_id"])
    return Source("GGUF", config, tensors, [path], _tokenizer(fields, tokens))


def _name(theirs: str) -> str:
    kind, _, last = theirs.rpartition(".")
    if kind.startswith("blk."):
        _, layer, name = kind.split(".", 2)
        if name in NAMES:
            return f"h.{layer}.{NAMES[name]}.{last}"
    elif kind in OUTER:
        return f"{OUTER[kind]}.{last}"
    raise ConversionError(f"it has {theirs[:60]}, which is no tensor of GPT-2")


def _lazy(gguf: ModuleType, tensor: Any) -> LazyTensor:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    kinds = gguf.GGMLQuantizationType
    dtype = {kinds.F16: torch.float16, kinds.BF16: torch.bfloat16}.get(tensor.tensor_type, torch.float32)

    def read() -> Tensor:
        data = np.array(tensor.data)  # a copy: what is mapped cannot be written
        if tensor.tensor_type == kinds.BF16:
            return torch.from_numpy(data.view(np.uint8)).view(torch.bfloat16).reshape(shape)
        if tensor.tensor_type not in (kinds.F32, kinds.F16):
            data = gguf.quants.dequantize(data, tensor.tensor_type)
        return torch.from_numpy(data).reshape(shape)

    return LazyTensor(shape, dtype, read)


def _number(fields: dict[str, Any], key: str) -> int:
    value = fields.get(key)
    if not isinstance(value, int) or not 0 < value < 1 << 24:
        raise ConversionError(f"it does not say its {key}")
    return value


def _epsilon(fields: dict[str, Any]) -> float:
    value = fields.get("gpt2.attention.layer_norm_epsilon", 1e-5)
    return float(f"{value:.6g}") if isinstance(value, float) else 1e-5  # stored as fp32


def _tokenizer(fields: dict[str, Any], tokens: list[str]) -> dict[str, bytes]:
    """Raises ConversionError where it is not GPT-2's kind."""
    if fields.get("tokenizer.ggml.model") != "gpt2" or fields.get("tokenizer.ggml.pre", "gpt-2") != "gpt-2":
        raise ConversionError("its tokenizer is not GPT-2's: name a directory that holds it (--tokenizer DIR)")
    types = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    merges = fields.get("tokenizer.ggml.merges") or []
    special = {i: token for i, token in enumerate(tokens) if types[i] == _CONTROL}
    added = {i: token for i, token in enumerate(tokens) if types[i] in (_CONTROL, _USER_DEFINED)}
    end = fields.get("tokenizer.ggml.eos_token_id", len(tokens) - 1)
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": bool(fields.get("tokenizer.ggml.add_space_prefix", False)),
        "add_bos_token": bool(fields.get("tokenizer.ggml.add_bos_token", False)),
        **{name: tokens[end] for name in ("bos_token", "eos_token", "unk_token") if 0 <= end < len(tokens)},
        "added_tokens_decoder": {str(i): _added(token, special=i in special) for i, token in added.items()},
    }
    return {
        "vocab.json": json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False).encode(),
        "merges.txt": ("#version: 0.2\n" + "".join(f"{merge}\n" for merge in merges)).encode(),
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False).encode(),
    }


def _added(token: str, *, special: bool) -> dict[str, Any]:
    kept = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": token, **kept, "special": special}
