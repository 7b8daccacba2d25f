"""llm.c's `.bin`: 256 integers, then every kind of tensor for all layers at once, in a fixed order.

Source: https://github.com/karpathy/llm.c, `write_model` in train_gpt2.py; version 3 is fp32 and version 5 bfloat16.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

import torch

from model.conversion.layout import LazyTensor, Source, gpt2_config, lazy, linear_to_conv1d, regular_size, unpad
from model.errors import ConversionError

MAGIC = 20240326
TOKENIZER_MAGIC, STATE_MAGIC = 20240328, 20240327
HEADER_BYTES = 1024
_DTYPES = {3: torch.float32, 5: torch.bfloat16}


def open_llmc(path: Path) -> Source:
    """Raises ConversionError."""
    size = regular_size(path)
    with path.open("rb") as file:
        header = file.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        raise ConversionError(f"{path.name} is cut off")
    _, version, positions, tokens, layers, heads, width, padded = struct.unpack_from("<8i", header)
    if version not in _DTYPES:
        raise ConversionError(f"{path.name} is version {version} of llm.c's format; versions 3 and 5 are read")
    if not all(0 < number < 1 << 24 for number in (positions, tokens, layers, heads, width, padded)):
        raise ConversionError(f"{path.name} is damaged: its header gives no shape")
    dtype = _DTYPES[version]
    kinds = _kinds(positions, padded, layers, width)
    expected = HEADER_BYTES + dtype.itemsize * sum(math.prod(shape) for _, shape in kinds)
    if size != expected:
        raise ConversionError(f"{path.name} has {size} bytes; its header asks for {expected}")
    mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[HEADER_BYTES:].view(dtype)
    tensors: dict[str, LazyTensor] = {}
    at = 0
    for name, shape in kinds:
        whole = mapped[at : at + math.prod(shape)].view(shape)
        at += math.prod(shape)
        if name.startswith("*."):  # (layers, ...)
            tensors |= {f"h.{i}.{name[2:]}": lazy(whole[i]) for i in range(layers)}
        else:
            tensors[name] = lazy(whole)
    config = gpt2_config(
        layers=layers, heads=heads, width=width, positions=positions, tokens=padded, activation="gelu_new"
    )
    if tokens < padded:
        config["vocab_size"] = tokens
        tensors["wte.weight"] = tensors["wte.weight"].first(tokens)
    linear_to_conv1d(tensors)
    unpad(config, tensors)
    return Source(f"llm.c, version {version}", config, tensors, [path])


def _kinds(positions: int, padded: int, layers: int, width: int) -> list[tuple[str, tuple[int, ...]]]:
    kinds: list[tuple[str, tuple[int, ...]]] = [("wte.weight", (padded, width)), ("wpe.weight", (positions, width))]
    for norm, into, name_in, out, name_out, inner in (
        ("ln_1", 3 * width, "attn.c_attn", width, "attn.c_proj", width),
        ("ln_2", 4 * width, "mlp.c_fc", width, "mlp.c_proj", 4 * width),
    ):
        kinds += [(f"*.{norm}.weight", (layers, width)), (f"*.{norm}.bias", (layers, width))]
        kinds += [(f"*.{name_in}.weight", (layers, into, width)), (f"*.{name_in}.bias", (layers, into))]
        kinds += [(f"*.{name_out}.weight", (layers, out, inner)), (f"*.{name_out}.bias", (layers, out))]
    return [*kinds, ("ln_f.weight", (width,)), ("ln_f.bias", (width,))]
