"""A LoRA adapter's `adapter_config.json` (Hu et al. 2021), in the layout of Hugging Face's peft. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.config import read_json
from model.errors import AdapterError, ConfigError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
SITES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # a layer's matrices, which may be adapted
UNSERVED = {
    "use_dora": "DoRA",
    "modules_to_save": "whole modules beside LoRA",
    "alpha_pattern": "an alpha of their own for some modules",
    "trainable_token_indices": "trained tokens",
    "layer_replication": "replicated layers",
    "megatron_config": "Megatron",
    "use_qalora": "QALoRA",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    rank: int
    alpha: float
    targets: tuple[str, ...]  # of SITES; read from the tensors, since peft's file may hold a pattern
    rank_stabilised: bool = False
    base: str | None = None  # the model it was made for, as its maker called it

    def scaling(self, rank: int) -> float:
        """What the product of the two matrices is multiplied with."""
        return self.alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def sites_of(targets: Iterable[str]) -> tuple[str, ...]:
    """The sites that peft's names mean: `c_proj` is the attention's and the MLP's. Raises AdapterError."""
    wanted = tuple(targets)
    for target in wanted:
        if not any(_means(target, site) for site in SITES):
            raise AdapterError(f"a LoRA adapter cannot target {target[:40]!r}; it can {', '.join(SITES)}")
    return tuple(site for site in SITES if any(_means(target, site) for target in wanted))


def _means(target: str, site: str) -> bool:
    return site == target or site.endswith(f".{target}")


def is_adapter(directory: Path) -> bool:
    return (directory / CONFIG_FILE).is_file()


def read_adapter_config(directory: Path) -> AdapterConfig:
    """Without its targets. Raises AdapterError."""
    try:
        raw = read_json(directory / CONFIG_FILE)
    except ConfigError as error:
        raise AdapterError(str(error)) from None
    if raw.get("peft_type") != "LORA":
        raise AdapterError(f"{CONFIG_FILE} describes no LoRA adapter")
    for key, what in UNSERVED.items():
        if raw.get(key):
            raise AdapterError(f"{CONFIG_FILE} asks for {what} ({key}), which this server does not do")
    if raw.get("bias", "none") != "none":
        raise AdapterError(f"{CONFIG_FILE} asks for trained biases, which this server does not do")
    return AdapterConfig(
        rank=_positive(raw, "r", int),
        alpha=_positive(raw, "lora_alpha", float),
        targets=(),
        rank_stabilised=raw.get("use_rslora") is True,
        base=base if isinstance(base := raw.get("base_model_name_or_path"), str) else None,
    )


def _positive(raw: dict[str, Any], key: str, kind: type[int] | type[float]) -> Any:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 < value < 1 << 20:
        raise AdapterError(f"{CONFIG_FILE}: {key} must be a positive number")
    return value


def adapter_config_json(config: AdapterConfig) -> dict[str, Any]:
    """What peft's `LoraConfig.from_pretrained` reads."""
    return {
        "base_model_name_or_path": config.base,
        "bias": "none",
        "fan_in_fan_out": True,  # GPT-2's matrices are stored as (in, out)
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": config.rank,
        "target_modules": list(config.targets),
        "task_type": "CAUSAL_LM",
        "use_rslora": config.rank_stabilised,
    }
