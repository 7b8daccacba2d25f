"""Files of every format with bytes changed, cut or added by chance: a model, or one line; never anything else."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import foreign
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import model.conversion.__main__ as conversion

WRITERS: dict[str, Callable[[GPT2LMHeadModel, Path], None]] = {
    "pytorch_model.bin": lambda n, d: torch.save(n.state_dict(), d / "pytorch_model.bin"),
    "before-2020.bin": lambda n, d: torch.save(
        n.state_dict(), d / "before-2020.bin", _use_new_zipfile_serialization=False
    ),
    "ckpt.pt": lambda n, d: foreign.nanogpt(n, d / "ckpt.pt", tokens=300),
    "model.gguf": lambda n, d: foreign.gguf_file(n, d, d / "model.gguf"),
    "tf_model.h5": lambda n, d: foreign.tf_h5(n, d / "tf_model.h5"),
    "flax_model.msgpack": lambda n, d: foreign.flax_msgpack(n, d / "flax_model.msgpack"),
    "model.ckpt.index": foreign.openai_checkpoint,
}


def damage(data: bytes, chance: random.Random) -> bytes:
    """In the first and the last bytes rather than among the weights, of which every value is one."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 5, 20))):
        start = chance.randrange(min(len(changed), 4096))
        place = chance.choice((start, len(changed) - 1 - start, chance.randrange(len(changed))))
        match chance.randrange(4):
            case 0:
                changed[place] = chance.randrange(256)
            case 1:
                changed[place : place + 8] = chance.choice((b"\xff" * 8, bytes(8), (1 << 62).to_bytes(8, "little")))
            case 2:
                del changed[place : place + chance.randrange(1, 64)]
            case _:
                changed[place:place] = chance.randbytes(chance.randrange(1, 32))
    return bytes(changed)


def search(name: str, rounds: int, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "confine", lambda **_: None)  # this process has more to do
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 8, "vocab_size": 300}
    network = GPT2LMHeadModel(GPT2Config(bos_token_id=299, eos_token_id=299, **shape))
    network.config.save_pretrained(directory)
    tokens = ", ".join(f'"t{i}": {i}' for i in range(300))
    (directory / "vocab.json").write_text(f"{{{tokens}}}")
    (directory / "merges.txt").write_text("#version: 0.2\n")
    WRITERS[name](network, directory)
    whole = (directory / name).read_bytes()
    made = directory / "made"
    refused = 0
    for seed in range(rounds):
        (directory / name).write_bytes(damage(whole, random.Random(seed)))
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        answer = conversion.main(["60", "model", str(directory / name), str(made)])
        if answer.error is not None:
            refused += 1
            assert "\n" not in answer.error
            assert len(answer.error) < 300
            assert str(directory) not in answer.error
        else:
            assert (made / "model.safetensors").is_file()
    assert refused


@pytest.mark.parametrize("name", WRITERS)
def test_a_damaged_file_is_a_model_or_a_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search(name, 40, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_many_damaged_files_are(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search(name, 1000, tmp_path, monkeypatch)
