"""Low-rank adaptation (Hu et al. 2021) of a network that stays frozen. Begins as peft does: A random, B zero."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from model.adapter_config import CONFIG_FILE, WEIGHTS_FILE, AdapterConfig, adapter_config_json
from model.adapter_file import read_lora
from model.adapters import LowRank, Site, adapter_tensors, json_bytes
from model.training.checkpoint import write_atomically
from model.training.network import Conv1D, Network


class LoraConv1D(nn.Module):
    """A frozen map, and the two matrices that are learnt beside it."""

    def __init__(self, base: Conv1D, rank: int, scaling: float) -> None:
        super().__init__()
        inputs, outputs = base.weight.shape
        self.base = base
        self.scaling = scaling
        self.on = True
        self.lora_a = nn.Parameter(torch.zeros(rank, inputs))
        self.lora_b = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        alone: Tensor = self.base(x)  # (..., out)
        if not self.on:
            return alone
        low = F.linear(x, self.lora_a).flatten(0, -2)  # (tokens, rank)
        # One product that adds: no tensor as large as the output is made on the way.
        both = torch.addmm(alone.flatten(0, -2), low, self.lora_b.t(), alpha=self.scaling)
        return both.view_as(alone)

    def merged(self) -> Tensor:
        """(in, out) of one map that does both."""
        return self.base.weight + self.scaling * (self.lora_b @ self.lora_a).t()


def add_lora(network: Network, config: AdapterConfig, generator: torch.Generator) -> None:
    """Freezes the network and puts fresh matrices beside its targets."""
    network.requires_grad_(False)
    for layer in range(network.config.n_layer):
        for site in config.targets:
            parent, name = _parent(network, (layer, site))
            scaling = config.scaling(config.rank, f"transformer.h.{layer}.{site}")
            wrapped = LoraConv1D(getattr(parent, name), config.rank, scaling)
            bound = 1 / math.sqrt(wrapped.lora_a.shape[1])  # kaiming_uniform with a = sqrt(5)
            with torch.no_grad():
                wrapped.lora_a.uniform_(-bound, bound, generator=generator)
            setattr(parent, name, wrapped)


def load_lora(network: Network, directory: Path) -> AdapterConfig:
    """An adapter from its files, to be learnt further or merged. Raises AdapterError."""
    config, matrices = read_lora(directory, network.config)
    network.requires_grad_(False)
    for place, pair in matrices.items():
        parent, name = _parent(network, place)
        wrapped = LoraConv1D(getattr(parent, name), pair.a.shape[0], pair.scaling)
        with torch.no_grad():
            wrapped.lora_a.copy_(pair.a)
            wrapped.lora_b.copy_(pair.b)
        setattr(parent, name, wrapped)
    return config


@torch.no_grad()
def merge_lora(network: Network) -> None:
    """The same function as one network without adapters."""
    for place in matrices_of(network):
        parent, name = _parent(network, place)
        module = getattr(parent, name)
        module.base.weight.copy_(module.merged())
        setattr(parent, name, module.base)


@torch.no_grad()
def merged_weights(network: Network) -> dict[str, Tensor]:
    """The tensors of the same function as one network without adapters, by their Hugging Face names."""
    weights = {name.replace(".base.", "."): tensor for name, tensor in network.state_dict().items()}
    for name, module in network.named_modules():
        if isinstance(module, LoraConv1D):
            weights[f"{name}.weight"] = module.merged()
            del weights[f"{name}.lora_a"], weights[f"{name}.lora_b"]
    return weights


def matrices_of(network: Network) -> dict[Site, LowRank]:
    found: dict[Site, LowRank] = {}
    for name, module in network.named_modules():
        if isinstance(module, LoraConv1D):
            _, _, layer, site = name.split(".", 3)
            found[int(layer), site] = LowRank(module.lora_a, module.lora_b, module.scaling)
    return found


def export_lora(network: Network, config: AdapterConfig, directory: Path) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`, as peft's `save_pretrained` would."""
    matrices = matrices_of(network)
    ranks, alphas = {}, {}
    for (layer, site), pair in matrices.items():
        rank, module = pair.a.shape[0], f"h.{layer}.{site}"
        alpha = pair.scaling * (math.sqrt(rank) if config.rank_stabilised else rank)
        if rank != config.rank:
            ranks[module] = rank
        if not math.isclose(alpha, config.alpha):
            alphas[module] = alpha
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / WEIGHTS_FILE, save(adapter_tensors(matrices), metadata={"format": "pt"}))
    write_atomically(directory / CONFIG_FILE, json_bytes(adapter_config_json(config, ranks, alphas)))


def _parent(network: Network, place: Site) -> tuple[nn.Module, str]:
    layer, site = place
    module, _, name = site.rpartition(".")
    return network.get_submodule(f"transformer.h.{layer}.{module}"), name
