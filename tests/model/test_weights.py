"""A checkpoint that cannot be served is refused with one clear line, and never half loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2LMHeadModel

from model.config import read_config
from model.errors import WeightsError
from model.weights import as_stored, expected_shapes, plain_name, read_weights

Make = Callable[..., tuple[Path, GPT2LMHeadModel]]
Change = Callable[[dict[str, Tensor]], object]


@pytest.fixture
def checkpoint(make_checkpoint: Make, tmp_path: Path) -> Path:
    return Path(shutil.copytree(make_checkpoint()[0], tmp_path / "copy"))


def read(directory: Path) -> dict[str, Tensor]:
    return read_weights(directory, read_config(directory))


def rewrite(directory: Path, change: Change) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_a_good_checkpoint_is_read_whole(checkpoint: Path) -> None:
    weights = read(checkpoint)
    assert weights.keys() == expected_shapes(read_config(checkpoint)).keys()
    assert read_config(checkpoint).parameters == sum(tensor.numel() for tensor in weights.values())


def test_names_without_the_transformer_prefix_and_other_tensors_are_fine(checkpoint: Path) -> None:
    """As openai-community/gpt2 stores them: no prefix, and the causal mask among the weights."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 128, 128)

    expected = read(checkpoint)
    rewrite(checkpoint, change)
    got = read(checkpoint)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)


def test_shards_are_put_together(checkpoint: Path) -> None:
    expected = read(checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    names = sorted(tensors)
    for i in range(2):
        save_file({name: tensors[name] for name in names[i::2]}, checkpoint / f"part-{i}.safetensors")
    (checkpoint / "model.safetensors").unlink()
    index = {"weight_map": {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read(checkpoint).keys() == expected.keys()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda t: t.pop("transformer.h.1.mlp.c_fc.weight"), "the checkpoint lacks h.1.mlp.c_fc.weight"),
        (lambda t: [t.pop(n) for n in list(t) if ".h.1." in n], "and 11 more"),
        (lambda t: t.update({"transformer.ln_f.bias": torch.zeros(63)}), r"ln_f.bias has shape \(63,\)"),
        (lambda t: t["transformer.wte.weight"][5, 5].fill_(torch.nan), "wte.weight holds NaN or infinity"),
        (lambda t: t["transformer.h.0.ln_1.bias"][0].fill_(-torch.inf), "h.0.ln_1.bias holds NaN or infinity"),
        (lambda t: t.update({"transformer.ln_f.bias": torch.zeros(64, dtype=torch.int64)}), "int64, not floating"),
    ],
    ids=["missing", "missing many", "mis-shaped", "NaN", "infinity", "integers"],
)
def test_wrong_tensors_are_named(checkpoint: Path, change: Change, line: str) -> None:
    rewrite(checkpoint, change)
    with pytest.raises(WeightsError, match=line):
        read(checkpoint)


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def disguise_a_pickle(directory: Path) -> None:
    torch.save({"a": torch.zeros(3)}, directory / "model.safetensors")


def only_a_pickle(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def symlink_loop(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").symlink_to("model.safetensors")


def nothing(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def escape(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(
        '{"weight_map": {"wte.weight": "../elsewhere.safetensors"}}'
    )


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (truncate, "damaged or no safetensors file"),
        (disguise_a_pickle, "damaged or no safetensors file"),
        (only_a_pickle, "pickled, which can execute code; convert it once"),
        (symlink_loop, "no readable model.safetensors"),
        (nothing, "no readable model.safetensors"),
        (escape, "does not name files of the checkpoint"),
    ],
)
def test_damaged_files_are_refused(checkpoint: Path, damage: Callable[[Path], None], line: str) -> None:
    damage(checkpoint)
    with pytest.raises(WeightsError, match=line) as caught:
        read(checkpoint)
    assert "\n" not in str(caught.value)
    assert str(checkpoint) not in str(caught.value)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model.", "transformer.", "module._orig_mod.transformer."])
def test_what_wrappers_put_before_a_name_is_no_part_of_it(prefix: str, checkpoint: Path) -> None:
    expected = read(checkpoint)
    path = checkpoint / "model.safetensors"
    plain = {plain_name(name): tensor for name, tensor in load_file(path).items()}
    save_file({prefix + name: tensor for name, tensor in plain.items()}, path)
    got = read(checkpoint)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_an_output_layer_that_is_the_embeddings_is_kept_once_and_another_one_is_used(checkpoint: Path) -> None:
    config = read_config(checkpoint)
    path = checkpoint / "model.safetensors"
    plain = {plain_name(name): tensor for name, tensor in load_file(path).items()}
    for head, tied in ((plain["wte.weight"].clone(), True), (plain["wte.weight"] + 1, False)):
        save_file({**plain, "lm_head.weight": head}, path)
        weights = read(checkpoint)
        assert ("lm_head.weight" not in weights) is tied
        assert as_stored(config, weights).tie_word_embeddings is tied
    save_file({**{n: t for n, t in plain.items() if n != "wte.weight"}, "lm_head.weight": plain["wte.weight"]}, path)
    assert torch.equal(read(checkpoint)["wte.weight"], plain["wte.weight"])


def test_eight_bits_are_refused_by_name(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(path).items()}, path)
    with pytest.raises(WeightsError, match="is float8_e4m3fn, not floating point of float16, bfloat16"):
        read(checkpoint)
