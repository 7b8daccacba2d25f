"""Adapters as peft makes them: each has peft's log-probabilities, or is refused by name before anything runs."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from driving import CPU, Tables, greedy
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

from model.adapter_config import read_adapter_config
from model.config import read_config
from model.errors import AdapterError
from model.gpt2 import GPT2
from model.kv_cache import KVCache
from model.loading import choose_ops
from model.runner import Runner
from model.step import NewSequence, ScheduledChunk, StepPlan
from model.training.checkpoint import load_network
from model.training.lora import export_lora, load_lora
from model.variants import Variants
from model.weights import read_weights

Base = tuple[Path, GPT2LMHeadModel]
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # in peft
    pytest.mark.filterwarnings("ignore::UserWarning"),  # peft's, of tied weights and embeddings
]
TOKENS = [(11 * k) % 500 for k in range(40)]

SERVED: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["c_attn"]},
    "all-linear": {"target_modules": "all-linear", "r": 3},
    "pattern": {"target_modules": r".*\.mlp\.c_(fc|proj)"},
    "one-layer": {"target_modules": ["c_fc"], "layers_to_transform": [1]},
    "rank-stabilised": {"target_modules": ["c_proj"], "use_rslora": True},
    "ranks": {"target_modules": ["c_attn", "c_fc"], "rank_pattern": {"c_fc": 5, "h.1.attn.c_attn": 2}},
    "alphas": {"target_modules": ["c_attn", "c_fc"], "alpha_pattern": {"c_fc": 32, r"h\.0\.attn.*": 3}},
    "ranks-and-alphas": {
        "target_modules": ["c_attn", "mlp.c_proj"], "use_rslora": True,
        "rank_pattern": {"mlp.c_proj": 6}, "alpha_pattern": {"mlp.c_proj": 20},
    },
    "excluded": {"target_modules": ["c_attn", "c_proj"], "exclude_modules": ["mlp.c_proj"]},
    "gaussian": {"target_modules": ["c_attn"], "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": ["c_attn"], "init_lora_weights": "orthogonal"},
    "eva": {"target_modules": ["c_attn"], "init_lora_weights": "eva"},
    "pissa": {"target_modules": ["c_attn", "c_proj", "c_fc"], "init_lora_weights": "pissa"},
    "pissa-rank-stabilised": {"target_modules": ["c_attn"], "init_lora_weights": "pissa", "use_rslora": True},
    "dora": {"target_modules": ["c_attn", "c_fc"], "use_dora": True},
    "dora-pissa": {"target_modules": ["mlp.c_proj"], "use_dora": True, "init_lora_weights": "pissa"},
    "dora-of-embeddings": {"target_modules": ["wte", "c_attn"], "use_dora": True},
    "lora-bias": {"target_modules": ["c_attn", "c_proj"], "lora_bias": True},
    "bias-all": {"target_modules": ["c_attn"], "bias": "all"},
    "bias-of-targets": {"target_modules": ["c_attn", "c_fc"], "bias": "lora_only"},
    "saved-embeddings": {"target_modules": ["c_attn"], "modules_to_save": ["wte"]},
    "saved-head": {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]},
    "saved-both": {"target_modules": ["c_attn"], "modules_to_save": ["lm_head", "wte"]},
    "saved-norm-and-mlp": {"target_modules": ["c_attn"], "modules_to_save": ["ln_f", "mlp"]},
    "embeddings": {"target_modules": ["wte"]},
    "positions": {"target_modules": ["wpe", "c_attn"]},
    "head": {"target_modules": ["lm_head", "c_attn"]},
    "embeddings-and-head": {"target_modules": ["lm_head", "wte", "c_fc"]},
    "tokens": {"target_modules": ["c_attn"], "trainable_token_indices": [3, 22, 501]},
    "tokens-by-name": {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [7, 11]}},
}  # fmt: skip

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "olora": (lambda: LoraConfig(target_modules=["attn.c_proj"], init_lora_weights="olora"), "began as 'olora'"),
    "pissa-by-chance": (
        lambda: LoraConfig(target_modules=["c_attn"], init_lora_weights="pissa_niter_4"), "began as 'pissa_niter_4'"
    ),
    "alora": (lambda: LoraConfig(target_modules=["c_attn"], alora_invocation_tokens=[3]), "asks for aLoRA"),
    "tied-copies": (
        lambda: LoraConfig(target_modules=["c_attn"], modules_to_save=["wte"], ensure_weight_tying=True),
        "tied copies",
    ),
    "parameters": (lambda: LoraConfig(target_modules=[], target_parameters=["c_attn.weight"]), "bare parameters"),
    "ia3": (lambda: IA3Config(target_modules=["c_attn"], feedforward_modules=[]), "a IA3 one"),
    "loha": (lambda: LoHaConfig(target_modules=["lm_head"]), "a LOHA one"),
    "prefix": (lambda: PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3), "a PREFIX_TUNING one"),
    "prompt": (lambda: PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3), "a PROMPT_TUNING one"),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(make_checkpoint: Callable[..., Base]) -> Base:
    return make_checkpoint()


def trained(base: Base, config: Any, directory: Path) -> None:
    """Made by peft, all that it trains moved away from where it began, and saved by it."""
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(base[1]), config)
    with torch.no_grad():
        for weight in (each for each in model.parameters() if each.requires_grad):
            weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(directory)


def log_probabilities_of_peft(base: Base, adapter: Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(copy.deepcopy(base[1]), adapter).eval()
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([TOKENS])).logits[0], -1)


def log_probabilities_served(base: Base, adapter: Path) -> torch.Tensor:
    ops = choose_ops(CPU, torch.float32, "auto")
    config = read_config(base[0])
    network = GPT2(config, read_weights(base[0], config), ops)
    variants = Variants(network, ops, 1 << 30, base[0])
    variants.register("it", adapter)
    variants.use("it", frozenset())
    runner = Runner(network, KVCache(config, 8, 16, ops.kv_dtypes[0], CPU), CPU, config.n_positions, variants=variants)
    first, blocks = Tables(8).grow(0, len(TOKENS))
    chunk = ScheduledChunk(0, 0, len(TOKENS), first, blocks, True)
    scoring = greedy(1, prompt_logprobs=config.vocab_size - 1)
    scored = runner.run(StepPlan([], [NewSequence(0, TOKENS, [], scoring, "it")], [chunk])).prompt_logprobs
    rows = torch.full((len(TOKENS) - 1, config.vocab_size), torch.nan)
    for position, row in enumerate(scored[0].rows):
        for token, value in row.top:
            rows[position, token] = value
    return rows


@pytest.mark.parametrize("name", SERVED)
def test_what_peft_computes_is_what_is_served(name: str, base: Base, tmp_path: Path) -> None:
    trained(base, LoraConfig(**{"r": 4, "lora_alpha": 8, **SERVED[name]}), tmp_path)
    ours, theirs = log_probabilities_served(base, tmp_path), log_probabilities_of_peft(base, tmp_path)[:-1]
    known = ~ours.isnan()
    assert known.sum() >= ours.numel() - 2 * len(ours)  # a row has the likeliest and the prompt's own
    torch.testing.assert_close(ours[known], theirs[known], atol=1e-4, rtol=0)
    with torch.no_grad():
        plain = torch.log_softmax(base[1](torch.tensor([TOKENS])).logits[0], -1)[:-1]
    assert (plain - theirs).abs().max() > 0.01, "the adapter changes what is said"


def test_a_pickled_adapter_is_served_and_a_hostile_one_is_not(base: Base, tmp_path: Path) -> None:
    trained(base, LoraConfig(target_modules=["c_attn"]), tmp_path)
    theirs = log_probabilities_of_peft(base, tmp_path)[:-1]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    ours = log_probabilities_served(base, tmp_path)
    known = ~ours.isnan()
    torch.testing.assert_close(ours[known], theirs[known], atol=1e-4, rtol=0)
    torch.save({"a": print}, tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="asks for print, which is no tensor"):
        log_probabilities_served(base, tmp_path)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused_by_name(name: str, base: Base, tmp_path: Path) -> None:
    """By its description alone, which is read before any worker is started."""
    make, message = REFUSED[name]
    trained(base, make(), tmp_path)
    with pytest.raises(AdapterError, match=message):
        read_adapter_config(tmp_path)


def test_what_a_later_peft_adds_is_refused_unless_it_is_off(base: Base, tmp_path: Path) -> None:
    trained(base, LoraConfig(target_modules=["c_attn"]), tmp_path)
    path = tmp_path / "adapter_config.json"
    raw = json.loads(path.read_text())
    for value in (None, False, "", [], {}):
        path.write_text(json.dumps(raw | {"use_what_comes_next": value}))
        read_adapter_config(tmp_path)
    path.write_text(json.dumps(raw | {"use_what_comes_next": True}))
    with pytest.raises(AdapterError, match="use_what_comes_next"):
        read_adapter_config(tmp_path)


def test_embeddings_of_another_size_are_refused_with_the_way_out(base: Base, tmp_path: Path) -> None:
    directory, network = base
    resized = copy.deepcopy(network)
    resized.resize_token_embeddings(510)
    get_peft_model(resized, LoraConfig(target_modules=["c_attn"])).save_pretrained(tmp_path, save_embedding_layers=True)
    config = read_config(directory)
    ops = choose_ops(CPU, torch.float32, "off")
    variants = Variants(GPT2(config, read_weights(directory, config), ops), ops, 1 << 30, directory)
    variants.register("it", tmp_path)
    with pytest.raises(AdapterError, match=r"510 tokens and the model 503: .*gpt2-server export MODEL DEST --merge"):
        variants.use("it", frozenset())


def test_an_adapter_with_patterns_is_learnt_further_as_what_it_is(base: Base, tmp_path: Path) -> None:
    """What the trainer writes says for peft what was read."""
    before, after = tmp_path / "before", tmp_path / "after"
    trained(base, LoraConfig(r=4, lora_alpha=8, **SERVED["ranks-and-alphas"]), before)
    network = load_network(base[0])
    export_lora(network, load_lora(network, before), after)
    for name, tensor in load_file(before / "adapter_model.safetensors").items():
        assert torch.equal(tensor, load_file(after / "adapter_model.safetensors")[name])
    torch.testing.assert_close(
        log_probabilities_of_peft(base, after), log_probabilities_of_peft(base, before), atol=1e-6, rtol=0
    )
