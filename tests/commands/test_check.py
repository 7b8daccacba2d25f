"""`gpt2-server check`: what a model is and needs; what cannot be served is refused with a worker's own words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.config import read_config
from server.cli import main


@pytest.fixture
def checkpoint(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def test_it_says_what_a_model_is(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tiny)]) == 0
    said = capsys.readouterr().out
    tensors = load_file(tiny / "model.safetensors")
    parameters = sum(tensor.numel() for tensor in tensors.values())
    assert parameters == read_config(tiny).parameters
    assert f"{parameters:,}" in said
    assert "2 layers of width 64, 4 heads, 1,024 positions, 50,257 tokens" in said
    assert "1 safetensors" in said
    assert "float32" in said
    assert "GPT2Tokenizer, from vocab.json and merges.txt; <|endoftext|> is 50256" in said
    assert "It can be served." in said


def test_what_it_needs_follows_the_settings(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """2 x layers x width x bytes for each token, and as many tokens as 3 contexts of 512 hold."""
    flags = ["--dtype", "float32", "--max-num-seqs", "3", "--max-model-len", "512"]
    assert main(["check", str(tiny), *flags]) == 0
    assert "KV cache 2 MiB for 1,536 tokens of 1.0 KiB" in capsys.readouterr().out


def test_the_default_model_can_be_served(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 0
    assert "gpt2-server-default" in capsys.readouterr().out


def test_what_cannot_be_served_is_refused(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = checkpoint / "model.safetensors"
    tensors = load_file(weights)

    def refused(line: str) -> None:
        assert main(["check", str(checkpoint)]) == 78
        said = capsys.readouterr()
        assert line in said.err
        assert "can be served" not in said.out

    save_file(tensors | {"ln_f.bias": torch.full((64,), float("nan"))}, weights)
    refused("ln_f.bias holds NaN or infinity")
    weights.rename(checkpoint / "pytorch_model.bin")
    refused("pickled, which can execute code")
    save_file(tensors, weights)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"n_layer": 3}))
    refused("the checkpoint lacks h.2.")
    assert main(["check", str(checkpoint), "--max-model-len", "2048"]) == 78


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("pytorch_model.bin", "pickled, which can execute code"),
        ("ckpt.pt", "pickled, which can execute code"),
        ("tf_model.h5", "in another format (tf_model.h5)"),
        ("hparams.json", "in another format (hparams.json)"),
        ("model.gguf", "in another format (model.gguf)"),
    ],
)
def test_another_format_is_answered_with_the_command_that_converts_it(
    file: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A directory without config.json too, and the file itself."""
    (tmp_path / file).write_bytes(b"something")
    assert main(["check", str(tmp_path)]) == 78
    said = capsys.readouterr().err
    assert kind in said
    assert f"gpt2-server convert {tmp_path} NEW_DIR" in said
    assert main(["check", str(tmp_path / file)]) == 78
    assert f"gpt2-server convert {tmp_path / file} NEW_DIR" in capsys.readouterr().err
