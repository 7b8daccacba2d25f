"""The tensors of an adapter's file, by what each of them is for. Source: peft's `get_peft_model_state_dict`."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.adapter_config import PICKLED_FILE, SITES, WEIGHTS_FILE, AdapterConfig, read_adapter_config
from model.adapters import LowRank, Site
from model.config import ModelConfig
from model.conversion.apart import read_pickled_tensors
from model.errors import AdapterError, ConversionError
from model.files import ADAPTER_BYTES, check_safetensors
from model.weights import FLOATS, expected_shapes

_PART = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<part>[AB])(?:\.default)?\.(?P<kind>weight|bias)"
    r"|lora_embedding_(?P<embedding>[AB])(?:\.default)?"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.default)?(?:\.weight)?"
    r"|token_adapter\.(?P<tokens>trainable_tokens_delta)(?:\.default)?)"
)
_WRAPPED = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?)(?=\.(?:weight|bias)$)")
EMBEDDINGS = ("wte", "wpe")
HEAD = "lm_head"


@dataclass(frozen=True, slots=True)
class AdapterTensors:
    """All in fp32; modules are called as `h.0.attn.c_attn`, `wte` and `lm_head`."""

    pairs: dict[str, LowRank] = field(default_factory=dict)
    added_biases: dict[str, Tensor] = field(default_factory=dict)  # already scaled; (out,)
    magnitudes: dict[str, Tensor] = field(default_factory=dict)  # DoRA's
    whole: dict[str, Tensor] = field(
        default_factory=dict
    )  # trained in place of the model's: by `expected_shapes`' names
    tokens: Tensor | None = None  # (trained tokens, n_embd), in place of the model's embeddings

    def is_plain(self, config: AdapterConfig) -> bool:
        """Whether it can run beside the network: low-rank pairs of SITES, and no more."""
        beside = all(_site(module) is not None for module in self.pairs)
        others = self.added_biases or self.magnitudes or self.whole or self.tokens is not None
        return beside and not others and not config.pissa

    def sites(self) -> dict[Site, LowRank]:
        """Of a plain one."""
        return {site: pair for module, pair in self.pairs.items() if (site := _site(module)) is not None}


def read_adapter(directory: Path, config: ModelConfig) -> tuple[AdapterConfig, AdapterTensors]:
    """Of a model of this shape. Raises AdapterError: damaged, or it asks for what is not understood.

    Tensors in place of embeddings and of the head may have more or fewer tokens than the model.
    """
    described = read_adapter_config(directory)
    raw: dict[str, dict[str, Tensor]] = {}
    tensors = AdapterTensors()
    tokens: Tensor | None = None
    for stored, tensor in _stored(directory):
        name = stored.removeprefix("base_model.model.").removeprefix("transformer.")
        match = _PART.fullmatch(name)
        if match is None:
            _whole(stored, name, tensor, tensors.whole, config)
        elif match["tokens"]:
            tokens = tensor
        else:
            raw.setdefault(_module(stored, match, config), {})[_kind(match)] = tensor
    for module, parts in sorted(raw.items()):
        _sort(module, parts, described, tensors)
    tensors = AdapterTensors(tensors.pairs, tensors.added_biases, tensors.magnitudes, tensors.whole, tokens)
    _check(described, tensors, config)
    return described, tensors


def read_lora(directory: Path, config: ModelConfig) -> tuple[AdapterConfig, dict[Site, LowRank]]:
    """One that runs beside the network of this shape. Raises AdapterError also where it is more than that."""
    described, tensors = read_adapter(directory, config)
    if not tensors.is_plain(described):
        raise AdapterError(
            "the adapter is more than low-rank pairs of the layers, and has to be merged into the model first "
            "(gpt2-server export MODEL DEST --merge ADAPTER)"
        )
    check_pairs(tensors, config)
    sites = tensors.sites()
    targets = tuple(site for site in SITES if any(place[1] == site for place in sites))
    return replace(described, targets=targets), sites


def check_pairs(tensors: AdapterTensors, config: ModelConfig) -> None:
    """Raises AdapterError where a pair has not the shape of its module."""
    for module, pair in tensors.pairs.items():
        inputs, outputs = _shape(module, config)
        if pair.a.dim() != 2 or pair.a.shape[1] != inputs or pair.b.shape != (outputs, pair.a.shape[0]):
            raise AdapterError(f"the adapter's {module} does not fit the model")


def _stored(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Each tensor by its name in the file, in fp32. A pickled file is rewritten first, by a process of its own."""
    if (directory / WEIGHTS_FILE).exists() or not (directory / PICKLED_FILE).exists():
        yield from _tensors(directory / WEIGHTS_FILE)
        return
    with tempfile.TemporaryDirectory() as scratch:
        rewritten = Path(scratch) / WEIGHTS_FILE
        try:
            read_pickled_tensors(directory / PICKLED_FILE, rewritten)
        except ConversionError as error:
            raise AdapterError(str(error)) from None
        yield from _tensors(rewritten)


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    check_safetensors(path, ADAPTER_BYTES, AdapterError)
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                tensor = file.get_tensor(name)
                if tensor.dtype not in FLOATS:
                    raise AdapterError(f"the adapter's {name[:80]!r} is not floating point")
                if not math.isfinite(float(tensor.sum(dtype=torch.float64))):
                    raise AdapterError(f"the adapter's {name[:80]!r} holds NaN or infinity")
                yield name, tensor.float()
    except SafetensorError as error:
        raise AdapterError(f"{WEIGHTS_FILE} is damaged or no safetensors file") from error
    except OSError as error:
        raise AdapterError(f"cannot read {WEIGHTS_FILE}: {error.strerror or 'no such file'}") from error


def _site(module: str) -> Site | None:
    match = re.fullmatch(r"h\.(\d{1,6})\.(.+)", module)
    return (int(match[1]), match[2]) if match is not None and match[2] in SITES else None


def _module(stored: str, match: re.Match[str], config: ModelConfig) -> str:
    module = match["module"]
    site = _site(module)
    known = site[0] < config.n_layer if site is not None else module in (*EMBEDDINGS, HEAD)
    if not known or (match["embedding"] is not None and module not in EMBEDDINGS):
        raise AdapterError(f"the adapter has {stored[:80]!r}, which is of no module of the model")
    return module


def _kind(match: re.Match[str]) -> str:
    if match["magnitude"]:
        return "magnitude"
    if match["embedding"]:
        return str(match["embedding"])
    return "bias" if match["kind"] == "bias" else str(match["part"])


def _whole(stored: str, name: str, tensor: Tensor, whole: dict[str, Tensor], config: ModelConfig) -> None:
    """One in place of the model's own, which may have another number of tokens."""
    name = _WRAPPED.sub("", name)
    shapes = expected_shapes(config)
    shapes.setdefault(f"{HEAD}.weight", shapes["wte.weight"])
    shape = tuple(tensor.shape)
    of_tokens = name in ("wte.weight", f"{HEAD}.weight")
    if name not in shapes or (shape[1:] if of_tokens else shape) != (shapes[name][1:] if of_tokens else shapes[name]):
        raise AdapterError(f"the adapter has {stored[:80]!r}, which does not fit the model")
    whole[name] = tensor


def _sort(module: str, parts: dict[str, Tensor], described: AdapterConfig, tensors: AdapterTensors) -> None:
    if not {"A", "B"} <= set(parts):
        raise AdapterError(f"the adapter has one matrix of {module} and not the other")
    a, b = parts["A"], parts["B"]
    full_name = module if module == HEAD else f"transformer.{module}"
    scaling = described.scaling(a.shape[0], full_name)
    tensors.pairs[module] = LowRank(a, b, scaling)
    if "bias" in parts:
        tensors.added_biases[module] = scaling * parts["bias"]
    if described.dora != ("magnitude" in parts):
        raise AdapterError(f"the adapter's {module} and use_dora contradict each other")
    if described.dora:
        tensors.magnitudes[module] = parts["magnitude"]


def _check(described: AdapterConfig, tensors: AdapterTensors, config: ModelConfig) -> None:
    if not tensors.pairs and not tensors.whole and tensors.tokens is None:
        raise AdapterError(f"{WEIGHTS_FILE} holds no matrices")
    if (tensors.tokens is None) != (not described.tokens):
        raise AdapterError("the adapter's trained tokens and trainable_token_indices contradict each other")
    if tensors.tokens is not None:
        if tensors.tokens.shape != (len(described.tokens), config.n_embd):
            raise AdapterError("the adapter's trained tokens do not fit the model")
        if {"wte", HEAD} & tensors.pairs.keys() or {"wte.weight", f"{HEAD}.weight"} & tensors.whole.keys():
            raise AdapterError("the adapter trains single tokens and whole embeddings at once")
    if HEAD in tensors.added_biases:
        raise AdapterError("the adapter has a bias of the head, which the model has not")
    if described.pissa and any(_site(module) is None for module in tensors.pairs):
        raise AdapterError("the adapter began as PiSSA of the embeddings or of the head")
    for module, values in (*tensors.added_biases.items(), *tensors.magnitudes.items()):
        if values.shape != tensors.pairs[module].b.shape[:1]:
            raise AdapterError(f"the adapter's {module} does not fit the model")


def _shape(module: str, config: ModelConfig) -> tuple[int, int]:
    """(in, out) of what a pair of the module maps."""
    width, inner, tokens = config.n_embd, config.n_inner, config.vocab_size
    if module == HEAD:
        return width, tokens
    if module in EMBEDDINGS:
        return (tokens if module == "wte" else config.n_positions), width
    site = _site(module)
    assert site is not None
    shapes = dict(zip(SITES, ((width, 3 * width), (width, width), (width, inner), (inner, width)), strict=True))
    return shapes[site[1]]
