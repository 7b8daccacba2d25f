"""Rounding a model's matrices to int8's grid, against what the kernels then make of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

from model.batch import Batch
from model.kernels.layers import KernelEmbedding, PackedLinear, Storage
from model.kernels.library import Kernels, KernelsUnavailableError, load
from model.training.rounding import main, rounded

Make = Callable[..., tuple[Path, GPT2LMHeadModel]]
HALF = 2**-11  # what fp16 may be off by, of a number


@pytest.mark.parametrize("outputs", [0, 1])
def test_each_output_has_255_values_its_largest_among_them(outputs: int) -> None:
    weight = torch.randn(40, 300) if outputs == 0 else torch.randn(300, 40)
    weight.select(outputs, 7).zero_()
    found = rounded(weight, outputs)
    for before, after in zip(weight.unbind(outputs), found.unbind(outputs), strict=True):
        step = before.abs().max() / 127
        assert (after - before).abs().max() <= step / 2 + 1e-6
        if step > 0:
            torch.testing.assert_close(after / step, (after / step).round(), atol=1e-4, rtol=0)
            torch.testing.assert_close(after.abs().max(), before.abs().max())
    torch.testing.assert_close(rounded(found, outputs), found)


def test_what_8_bits_keep_of_a_rounded_model_is_in_its_file(make_checkpoint: Make, tmp_path: Path) -> None:
    directory, _ = make_checkpoint()
    main([str(directory), str(tmp_path)])
    before, after = load_file(directory / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert after.keys() == before.keys()
    for name, weight in before.items():
        if weight.dim() == 1 or "wpe" in name:
            torch.testing.assert_close(after[name].float(), weight.float(), rtol=HALF, atol=1e-6)
    try:
        kernels = load(threads=1)
    except KernelsUnavailableError as error:
        pytest.skip(str(error))
    matrices = {name: tensor.float() for name, tensor in after.items() if tensor.dim() == 2 and "wpe" not in name}
    for name, tensor in matrices.items():
        weight = tensor if "wte" in name else tensor.T
        error = (kept_in_8_bits(kernels, weight) - weight).abs()
        assert (error <= 2 * HALF * weight.abs().amax(1, keepdim=True)).all(), name
    wte = before["transformer.wte.weight"].float()
    assert (kept_in_8_bits(kernels, wte) - wte).abs().max() > wte.abs().max() / 1000, "or the test would show nothing"


def kept_in_8_bits(kernels: Kernels, weight: torch.Tensor) -> torch.Tensor:
    """As the embedding reads it."""
    rows, none = torch.arange(len(weight)), torch.empty(0, dtype=torch.int32)
    embed = KernelEmbedding(kernels, PackedLinear(kernels, weight, None, Storage.INT8), torch.zeros(1, weight.shape[1]))
    return embed(Batch(rows, torch.zeros_like(rows), rows[:0], none, none, none.view(0, 0), ()))
