"""Weights by the names of transformers' or nanoGPT's modules, and whatever was wrapped around these."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from model.config import parse_config
from model.conversion.layout import LazyTensor, Source, linear_to_conv1d
from model.errors import ConversionError
from model.weights import expected_shapes

_WRAPPERS = ("_orig_mod.", "module.", "model.", "pretrained_model.", "transformer.")
_NO_WEIGHTS = re.compile(
    r"h\.\d+\.attn\.(?:bias|masked_bias)|(?:v_head|multiple_choice_head)\..*"
)  # masks, other heads


def from_state_dict(format_: str, config: dict[str, Any], tensors: dict[str, LazyTensor], files: list[Path]) -> Source:
    """Raises ConversionError where a tensor is none of GPT-2's."""
    named = plain_names(tensors)
    known = expected_shapes(parse_config(config)).keys() | {"lm_head.weight"}
    for name in sorted(named.keys() - known):
        raise ConversionError(f"it has {name[:60]}, which is no tensor of a GPT-2 of {config.get('n_layer')} layers")
    if is_linear(named):
        linear_to_conv1d(named)
    return Source(format_, config, named, files)


def plain_names(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Without the names of what was wrapped around the network, and without masks."""
    named = {}
    for name, tensor in tensors.items():
        plain = name
        while (shorter := _without_wrapper(plain)) != plain:
            plain = shorter
        if _NO_WEIGHTS.fullmatch(plain) is None:
            named[plain] = tensor
    return named


def _without_wrapper(name: str) -> str:
    return next((name.removeprefix(wrapper) for wrapper in _WRAPPERS if name.startswith(wrapper)), name)


def is_linear(tensors: dict[str, LazyTensor]) -> bool:
    """Whether matrices are those of torch's Linear, (out, in), and not of Conv1D."""
    first = tensors.get("h.0.attn.c_attn.weight")
    return first is not None and len(first.shape) == 2 and first.shape[0] == 3 * first.shape[1]
