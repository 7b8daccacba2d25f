"""Training state on disk, and the finished model: safetensors and JSON, each file replaced whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from model.config import ModelConfig, read_config
from model.training.network import Network
from model.weights import as_stored, read_weights


def write_atomically(path: Path, content: bytes) -> None:
    """Writes beside `path`, syncs, renames: a reader finds the old file or the new one, even after a power cut."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)  # a full disk gets its room back
        raise OSError(error.errno, error.strerror, str(path)) from error  # not every one names its file


def save_state(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """One file holds the tensors and, in its header, everything else, so the two can never disagree."""
    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(whole, metadata={"state": json.dumps(state)}))


def load_state(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Copies what `save_state` wrote into `tensors`, in place, and returns the rest.

    Raises ValueError when the file is of another network.
    """
    with safe_open(path, framework="pt") as file, torch.no_grad():
        if set(file.keys()) != set(tensors):
            raise ValueError(f"{path.name} is the state of another network")
        for name, tensor in tensors.items():
            saved = file.get_tensor(name)
            if saved.shape != tensor.shape:
                raise ValueError(f"{path.name}: {name} has shape {tuple(saved.shape)}, not {tuple(tensor.shape)}")
            tensor.copy_(saved)
        state: dict[str, Any] = json.loads(file.metadata()["state"])
    return state


def load_network(directory: Path) -> Network:
    """A checkpoint for training or measuring, in fp32. Raises ConfigError or WeightsError."""
    config = read_config(directory)
    weights = read_weights(directory, config)
    network = Network(as_stored(config, weights))
    named = {name if name == "lm_head.weight" else f"transformer.{name}": weight for name, weight in weights.items()}
    network.load_state_dict(named)
    return network.float()


def hugging_face_config(config: ModelConfig, dtype: torch.dtype = torch.float16) -> dict[str, Any]:
    """What `config.json` says of a GPT-2."""
    return {
        "activation_function": config.activation.value,
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.0,
        "bos_token_id": next(iter(config.eos_token_ids), None),
        "dtype": str(dtype).removeprefix("torch."),
        "embd_pdrop": 0.0,
        "eos_token_id": config.eos_token_ids[0]
        if len(config.eos_token_ids) == 1
        else list(config.eos_token_ids) or None,
        "initializer_range": 0.02,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "model_type": "gpt2",
        "n_ctx": config.n_positions,
        "n_embd": config.n_embd,
        "n_head": config.n_head,
        "n_inner": config.n_inner,
        "n_layer": config.n_layer,
        "n_positions": config.n_positions,
        "resid_pdrop": 0.0,
        "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
        "scale_attn_weights": config.scale_attn_weights,
        "tie_word_embeddings": config.tie_word_embeddings,
        "vocab_size": config.vocab_size,
    }


def export(network: Network, directory: Path, dtype: torch.dtype = torch.float16) -> None:
    """Writes `config.json` and `model.safetensors`, as `GPT2LMHeadModel.save_pretrained` would."""
    export_weights(network.state_dict(), network.config, directory, dtype)


def export_weights(weights: Mapping[str, Tensor], config: ModelConfig, directory: Path, dtype: torch.dtype) -> None:
    """weights: by their Hugging Face names."""
    directory.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in weights.items()}
    write_atomically(directory / "model.safetensors", save(stored, metadata={"format": "pt"}))
    text = json.dumps(hugging_face_config(config, dtype), indent=2) + "\n"
    write_atomically(directory / "config.json", text.encode())
