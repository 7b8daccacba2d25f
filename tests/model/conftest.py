"""Checkpoints made by transformers, and a way to drive the runner without a scheduler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

SMALL: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 128, "vocab_size": 503}


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, GPT2LMHeadModel]]:
    """Random weights, large enough that every position and token matters; saved by `save_pretrained`."""

    def make(**changes: Any) -> tuple[Path, GPT2LMHeadModel]:
        shape = {**SMALL, **changes}
        shape.setdefault("eos_token_id", shape["vocab_size"] - 1)
        torch.manual_seed(0)
        network = GPT2LMHeadModel(GPT2Config(bos_token_id=shape["eos_token_id"], **shape)).eval()
        with torch.no_grad():
            for name, weight in network.named_parameters():
                noise = torch.randn_like(weight)
                weight.copy_(1 + 0.1 * noise if "ln_" in name and name.endswith("weight") else 0.06 * noise)
        directory = tmp_path_factory.mktemp("checkpoint")
        network.save_pretrained(directory)
        return directory, network

    return make
