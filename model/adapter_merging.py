"""An adapter and the model it was made for, as one network: the weights peft computes with.

Sources: LoRA, Hu et al. 2021; DoRA, Liu et al. 2024; PiSSA, Meng et al. 2024; peft's `tuners/lora`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from model.adapter_config import AdapterConfig
from model.adapter_file import HEAD, AdapterTensors, check_pairs
from model.adapters import LowRank
from model.config import ModelConfig
from model.errors import AdapterError
from model.weights import Progress

_WTE, _HEAD = "wte.weight", f"{HEAD}.weight"


@torch.no_grad()
def merge_adapter(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    described: AdapterConfig,
    tensors: AdapterTensors,
    progress: Progress | None = None,
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """weights: of `expected_shapes(config)`. What the adapter changes is in fp32 afterwards, all else as it was.

    The number of tokens becomes the adapter's where its embeddings were resized, and the head gets weights of its own
    where it no longer is the embeddings. progress: told the share of the modules that are merged.
    Raises AdapterError where the adapter does not fit.
    """
    merged = dict(weights)
    merged.setdefault(_HEAD, weights[_WTE])  # the same object, for as long as the two are tied
    _take_whole(merged, described, tensors)
    config = replace(config, vocab_size=len(merged[_WTE]))
    if merged[_HEAD].shape != merged[_WTE].shape:
        raise AdapterError("the adapter's embeddings and head have different numbers of tokens")
    check_pairs(tensors, config)
    _take_tokens(merged, described, tensors)
    for done, (module, pair) in enumerate(tensors.pairs.items(), 1):
        _merge_pair(merged, module, pair, tensors.magnitudes.get(module), pissa=described.pissa)
        if progress is not None:
            progress(done / len(tensors.pairs))
    for module, bias in tensors.added_biases.items():
        merged[f"{module}.bias"] = merged[f"{module}.bias"].float() + bias
    tied = merged[_HEAD] is merged[_WTE]
    if tied:
        del merged[_HEAD]
    return replace(config, tie_word_embeddings=tied), merged


def _take_whole(merged: dict[str, Tensor], described: AdapterConfig, tensors: AdapterTensors) -> None:
    """A module to save is a copy, apart from the one it was tied to; a resized embedding stays tied."""
    tied = merged[_HEAD] is merged[_WTE]
    for name, tensor in sorted(tensors.whole.items()):
        module = f"transformer.{name}" if name != _HEAD else name
        copied = any(module.rpartition(".")[0].endswith(saved) for saved in described.saved_modules)
        if name in (_WTE, _HEAD) and tied and not copied:
            merged[_WTE] = merged[_HEAD] = tensor
        else:
            merged[name] = tensor


def _take_tokens(merged: dict[str, Tensor], described: AdapterConfig, tensors: AdapterTensors) -> None:
    if tensors.tokens is None:
        return
    if max(described.tokens) >= len(merged[_WTE]):
        raise AdapterError("the adapter trains tokens that the model has not")
    tied = merged[_HEAD] is merged[_WTE]
    embeddings = merged[_WTE].float().clone()
    embeddings[torch.tensor(described.tokens)] = tensors.tokens
    merged[_WTE] = embeddings
    if tied:
        merged[_HEAD] = embeddings


def _merge_pair(
    merged: dict[str, Tensor], module: str, pair: LowRank, magnitude: Tensor | None, *, pissa: bool
) -> None:
    name = f"{module}.weight"
    stored = merged[name].float()
    weight = stored if module == HEAD else stored.T  # (out, in); Conv1D and embeddings are kept as (in, out)
    if pissa:
        weight = weight - _largest(weight, pair.a.shape[0])
    weight = weight + pair.scaling * (pair.b @ pair.a)  # (out, in)
    if magnitude is not None:
        weight = weight * (magnitude / torch.linalg.norm(weight, dim=1)).unsqueeze(1)
    merged[name] = (weight if module == HEAD else weight.T).contiguous()


def _largest(weight: Tensor, rank: int) -> Tensor:
    """The part of a matrix that its largest singular values make."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    largest: Tensor = (u[:, :rank] * s[:rank]) @ v[:rank]
    return largest
