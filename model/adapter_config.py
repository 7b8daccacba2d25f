"""A LoRA adapter's `adapter_config.json` (Hu et al. 2021), in the layout of Hugging Face's peft. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import AdapterError
from model.files import CONFIG_BYTES, is_file, read_object

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
SITES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # a layer's matrices, which may be adapted
PICKLED_FILE = "adapter_model.bin"  # as older versions of peft wrote it

# What an adapter's file may say. Keys of the first set are read here; those of the second say how it was trained, or
# what its tensors show. Every other key, also one that a later version of peft brings, has to be off.
_READ = {
    "peft_type", "r", "lora_alpha", "alpha_pattern", "use_rslora", "use_dora", "bias", "lora_bias", "modules_to_save",
    "trainable_token_indices", "init_lora_weights", "base_model_name_or_path",
}  # fmt: skip
_WITHOUT_EFFECT = {
    "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "target_modules", "exclude_modules",
    "lora_dropout", "fan_in_fan_out", "layers_to_transform", "layers_pattern", "rank_pattern", "runtime_config",
    "megatron_core", "qalora_group_size", "eva_config", "corda_config", "lora_ga_config", "loftq_config",
}  # fmt: skip
_NAMES = {
    "alora_invocation_tokens": "aLoRA",
    "layer_replication": "replicated layers",
    "megatron_config": "Megatron",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "target_parameters": "LoRA on bare parameters",
    "arrow_config": "Arrow",
    "ensure_weight_tying": "tied copies of a trained embedding",
}
_UNTRAINED = (True, False, "gaussian", "eva", "orthogonal")  # beginnings that leave the model's own weights alone
_PISSA = "pissa"  # takes the largest singular values out of the model's weights (Meng et al. 2024)
_BIASES = ("none", "all", "lora_only")
_PATTERN_LENGTH_MAX = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    rank: int
    alpha: float
    targets: tuple[str, ...]  # of SITES; read from the tensors, since peft's file may hold a pattern
    rank_stabilised: bool = False
    base: str | None = None  # the model it was made for, as its maker called it
    alphas: tuple[tuple[re.Pattern[str], float], ...] = ()  # of modules whose name matches; the first that does counts
    dora: bool = False  # weights are split into magnitude and direction (Liu et al. 2024)
    pissa: bool = False
    saved_modules: tuple[str, ...] = ()  # ends of the names of modules that were trained whole, as copies of their own
    tokens: tuple[int, ...] = ()  # whose embeddings were trained

    def scaling(self, rank: int, module: str) -> float:
        """What the product of the two matrices is multiplied with. module: as `transformer.h.0.attn.c_attn`."""
        alpha = next((alpha for pattern, alpha in self.alphas if pattern.fullmatch(module)), self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


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
    return is_file(directory / CONFIG_FILE)


def read_adapter_config(directory: Path) -> AdapterConfig:
    """Without its targets. Raises AdapterError: it is no LoRA, or asks for what is not understood here."""
    raw = read_object(directory / CONFIG_FILE, CONFIG_BYTES, AdapterError)
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{CONFIG_FILE} describes no LoRA adapter, but a {str(kind)[:40]} one")
    for key in sorted(raw.keys() - _READ - _WITHOUT_EFFECT):
        if raw[key] not in (None, False, "", [], {}):
            raise AdapterError(f"{CONFIG_FILE} asks for {_NAMES.get(key, 'what is unknown here')} ({key[:40]})")
    if raw.get("bias", "none") not in _BIASES:
        raise AdapterError(f"{CONFIG_FILE}: bias must be one of {', '.join(_BIASES)}")
    dora = _flag(raw, "use_dora")
    if dora and _flag(raw, "lora_bias"):
        raise AdapterError(f"{CONFIG_FILE} asks for DoRA with biases of its own (lora_bias)")
    return AdapterConfig(
        rank=_positive(raw, "r", int),
        alpha=_positive(raw, "lora_alpha", float),
        targets=(),
        rank_stabilised=_flag(raw, "use_rslora"),
        base=base if isinstance(base := raw.get("base_model_name_or_path"), str) else None,
        alphas=_alphas(raw),
        dora=dora,
        pissa=_is_pissa(raw),
        saved_modules=_saved_modules(raw),
        tokens=_tokens(raw),
    )


def _is_pissa(raw: dict[str, Any]) -> bool:
    beginning = raw.get("init_lora_weights", True)
    if beginning is None or beginning in _UNTRAINED:
        return False
    if beginning == _PISSA:
        return True
    raise AdapterError(
        f"{CONFIG_FILE}: the adapter began as {str(beginning)[:40]!r} (init_lora_weights), which changed the model's "
        "own weights in a way that its files do not tell; peft's save_pretrained can write it as plain LoRA "
        "(path_initial_model_for_weight_conversion)"
    )


def _alphas(raw: dict[str, Any]) -> tuple[tuple[re.Pattern[str], float], ...]:
    """As peft matches them: a regular expression for the end of a module's name, from a dot on."""
    given = raw.get("alpha_pattern") or {}
    if not isinstance(given, dict):
        raise AdapterError(f"{CONFIG_FILE}: alpha_pattern must be an object")
    alphas = []
    for pattern in given:
        if len(pattern) > _PATTERN_LENGTH_MAX:
            raise AdapterError(f"{CONFIG_FILE}: alpha_pattern has a name of more than {_PATTERN_LENGTH_MAX} characters")
        try:
            compiled = re.compile(rf"(.*\.)?({pattern})")
        except re.error:
            raise AdapterError(f"{CONFIG_FILE}: {pattern[:40]!r} in alpha_pattern is no pattern") from None
        alphas.append((compiled, float(_positive(given, pattern, float))))
    return tuple(alphas)


def _saved_modules(raw: dict[str, Any]) -> tuple[str, ...]:
    names = raw.get("modules_to_save") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise AdapterError(f"{CONFIG_FILE}: modules_to_save must be a list of names")
    return tuple(names)


def _tokens(raw: dict[str, Any]) -> tuple[int, ...]:
    given = raw.get("trainable_token_indices") or []
    if isinstance(given, dict):
        if set(given) - {"wte", "transformer.wte"} or len(given) > 1:
            raise AdapterError(f"{CONFIG_FILE}: trainable_token_indices can be those of wte alone")
        (given,) = given.values()
    if not isinstance(given, list) or not all(type(token) is int and token >= 0 for token in given):
        raise AdapterError(f"{CONFIG_FILE}: trainable_token_indices must be a list of tokens")
    return tuple(given)


def _flag(raw: dict[str, Any], key: str) -> bool:
    value = raw.get(key)
    if value not in (None, True, False):
        raise AdapterError(f"{CONFIG_FILE}: {key} must be true or false")
    return value is True


def _positive(raw: dict[str, Any], key: str, kind: type[int] | type[float]) -> Any:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 < value < 1 << 20:
        raise AdapterError(f"{CONFIG_FILE}: {key} must be a positive number")
    return value


def adapter_config_json(config: AdapterConfig, ranks: dict[str, int], alphas: dict[str, float]) -> dict[str, Any]:
    """What peft's `LoraConfig.from_pretrained` reads. ranks, alphas: of modules that differ from the config's own."""
    return {
        "alpha_pattern": alphas,
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
        "rank_pattern": ranks,
        "target_modules": list(config.targets),
        "task_type": "CAUSAL_LM",
        "use_rslora": config.rank_stabilised,
    }
