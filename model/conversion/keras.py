"""transformers' `tf_model.h5`: an HDF5 file of the weights of TFGPT2LMHeadModel.

Source: transformers 4's `modeling_tf_gpt2.py` and `load_tf2_weights_in_pytorch_model`: names such as
`transformer/tfgp_t2lm_head_model/transformer/h_._0/attn/c_attn/weight:0`; biases have a first axis of one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.conversion.layout import LazyTensor, Source
from model.conversion.libraries import needed
from model.conversion.state_dict import from_state_dict
from model.conversion.vocabulary import read_description
from model.errors import ConversionError

_NAME = re.compile(
    r"(?:.*/)?(?:h_\._(?P<layer>\d+)/(?P<part>ln_1|ln_2|attn/c_attn|attn/c_proj|mlp/c_fc|mlp/c_proj)"
    r"|(?P<outer>wte|wpe|ln_f))/(?P<kind>weight|bias|gamma|beta|embeddings):0"
)
_KINDS = {"gamma": "weight", "beta": "bias", "embeddings": "weight"}


def open_keras(path: Path) -> Source:
    """Raises ConversionError."""
    h5py = needed("h5py")
    config = read_description(path)
    try:
        file = h5py.File(path, "r")
    except OSError:
        raise ConversionError(f"{path.name} is damaged, or no HDF5") from None
    tensors: dict[str, LazyTensor] = {}

    def visit(name: str, found: Any) -> None:
        if isinstance(found, h5py.Dataset):
            tensors[_plain(name)] = _lazy(found)

    file.visititems(visit)
    return from_state_dict("TensorFlow (tf_model.h5)", config, tensors, [path])


def _plain(name: str) -> str:
    match = _NAME.fullmatch(name)
    if match is None:
        raise ConversionError(f"it has {name[-60:]}, which is no tensor of GPT-2")
    kind = _KINDS.get(match["kind"], match["kind"])
    place = match["outer"] or f"h.{int(match['layer'])}.{match['part'].replace('/', '.')}"
    return f"{place}.{kind}"


def _lazy(dataset: Any) -> LazyTensor:
    shape = tuple(int(size) for size in dataset.shape)
    flat = shape[1:] if len(shape) == 2 and shape[0] == 1 else shape
    if dataset.external or dataset.is_virtual:
        raise ConversionError("it takes its weights from other files")
    dtype = {np.dtype("<f4"): torch.float32, np.dtype("<f2"): torch.float16}.get(dataset.dtype)
    if dtype is None:
        raise ConversionError(f"it has numbers of the kind {dataset.dtype}")

    def read() -> Tensor:
        return torch.from_numpy(dataset[()]).reshape(flat)

    return LazyTensor(flat, dtype, read)
