"""Training state on disk, and the finished model: safetensors and JSON, each file replaced whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from model.config import ModelConfig
from model.training.network import Network


def write_atomically(path: Path, content: bytes) -> None:
    """Writes beside `path`, syncs, renames: a reader finds the old file or the new one, even after a power cut."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


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


def hugging_face_config(config: ModelConfig) -> dict[str, Any]:
    """What `config.json` says of a tied GPT-2 in fp16."""
    return {
        "activation_function": config.activation.value,
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.0,
        "bos_token_id": config.eos_token_id,
        "dtype": "float16",
        "embd_pdrop": 0.0,
        "eos_token_id": config.eos_token_id,
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
        "tie_word_embeddings": True,
        "vocab_size": config.vocab_size,
    }


def export(network: Network, directory: Path) -> None:
    """Writes `config.json` and fp16 `model.safetensors`, as `GPT2LMHeadModel.save_pretrained` would."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in network.state_dict().items()}
    write_atomically(directory / "model.safetensors", save(weights, metadata={"format": "pt"}))
    config = json.dumps(hugging_face_config(network.config), indent=2) + "\n"
    write_atomically(directory / "config.json", config.encode())
