from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model.config import Activation, parse_config, read_config
from model.errors import ConfigError

GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257}


def test_the_smallest_gpt2_has_its_well_known_size() -> None:
    config = parse_config(GPT2)
    assert config.parameters == 124_439_808
    assert config.n_inner == 3072
    assert config.activation is Activation.GELU_TANH
    assert config.eos_token_ids == (50256,)
    assert config.attention_scale(3) == pytest.approx(1 / 8)
    assert config.kv_bytes_per_token(4) == 2 * 12 * 768 * 4


def test_old_checkpoints_say_n_ctx_and_null() -> None:
    raw: dict[str, Any] = {**GPT2, "n_inner": None, "n_ctx": 512}
    del raw["n_positions"]
    assert parse_config(raw).n_positions == 512


def test_attention_may_be_scaled_by_layer() -> None:
    config = parse_config({**GPT2, "scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False})
    assert config.attention_scale(3) == pytest.approx(1 / 4)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"model_type": "llama"}, "'llama' model; this server runs gpt2"),
        ({"n_head": 7}, "n_embd 768 is not a multiple of n_head 7"),
        ({"n_layer": 0}, "n_layer must be a positive integer"),
        ({"n_layer": "12"}, "n_layer must be a positive integer"),
        ({"n_layer": True}, "n_layer must be a positive integer"),
        ({"vocab_size": None}, "vocab_size must be a positive integer"),
        ({"activation_function": "os.system"}, "activation_function must be one of"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon must be between 0 and 1"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id, or a list of them"),
        ({"architectures": ["GPT2ForSequenceClassification"]}, "whose head does not say the next token"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, r"quantised \(bitsandbytes\), which is not read"),
        ({"scale_attn_weights": 1}, "scale_attn_weights must be true or false"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(change: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        parse_config({**GPT2, **change})


@pytest.mark.parametrize("text", ["", "[]", "{", '"gpt2"', "[" * 100_000, "\xff"])
def test_files_that_are_no_json_object(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.json is not"):
        read_config(tmp_path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read config\.json: No such file"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({}, None, (50256,)),
        ({"eos_token_id": [7, 3, 7]}, None, (7, 3)),
        ({"eos_token_id": None}, None, ()),
        ({"eos_token_id": -1}, None, ()),
        ({"eos_token_id": 50257}, None, ()),
        ({"eos_token_id": 7}, {"eos_token_id": [5, 50257]}, (5,)),
        ({"eos_token_id": 7}, {}, (7,)),
        ({"eos_token_id": 7}, {"eos_token_id": None}, (7,)),
    ],
)
def test_ends_are_those_of_the_generation_config_else_of_the_config(
    config: dict[str, Any], generation: dict[str, Any] | None, expected: tuple[int, ...], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**GPT2, **config}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert read_config(tmp_path).eos_token_ids == expected
