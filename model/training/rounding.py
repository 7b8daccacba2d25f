"""Rounds a finished model's matrices to what int8 keeps of them: `python -m model.training.rounding MODEL OUT`.

Of each output 255 evenly spaced values, the largest weight being the last of them: the grid of `--quantization int8`.
Serving the file in 8 bits then differs from serving it in more by the rounding of activations alone. Knows nothing of
how a model is trained.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from model.training.checkpoint import export, load_network

STEPS = 127  # of each sign


def rounded(weight: Tensor, outputs: int) -> Tensor:
    """weight: a matrix whose dimension `outputs` counts outputs. An output of zeros stays one."""
    largest = weight.abs().amax(dim=1 - outputs, keepdim=True)
    scale = torch.where(largest > 0, largest, 1) / STEPS
    return (weight / scale).round() * scale


def round_model(source: Path, target: Path) -> None:
    """Raises ConfigError or WeightsError."""
    network = load_network(source)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.dim() == 2 and "wpe" not in name:  # positions are not kept in 8 bits
                by_rows = "wte" in name or "lm_head" in name  # Hugging Face's Conv1D has its outputs last
                weight.copy_(rounded(weight, outputs=0 if by_rows else 1))
    export(network, target)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m model.training.rounding", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args(arguments)
    round_model(args.model, args.out)


if __name__ == "__main__":
    main()
