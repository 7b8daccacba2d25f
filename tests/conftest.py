"""Shared by every room of tests: a tiny checkpoint, and servers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from safetensors.torch import save_file
from serving import RunningServer, serving

import model
from model.config import read_config
from model.gpu import cuda
from model.weights import expected_shapes

# Idle OpenMP threads would spin on cores that tests share with servers they start.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if not cuda.available():  # Triton's kernels run in its interpreter; it looks at this when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)
hypothesis.settings.register_profile("shared", deadline=None)  # the cores are shared: time proves nothing
hypothesis.settings.load_profile("shared")

EMBEDDED = Path(model.__file__).parent / "default"
TINY = {"model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 1024, "vocab_size": 50257}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, 64 wide, the true vocabulary, random weights that say something different at every position."""
    directory = tmp_path_factory.mktemp("tiny")
    (directory / "config.json").write_text(json.dumps(TINY))
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(EMBEDDED / name, directory)
    noise = torch.Generator().manual_seed(7)
    tensors = {}
    for name, shape in expected_shapes(read_config(directory)).items():
        weight = torch.randn(shape, generator=noise)
        tensors[name] = 1 + 0.1 * weight if ".ln_" in name and name.endswith("weight") else 0.15 * weight
    tensors["wpe.weight"] *= 6  # positions matter, so that greedy text does not repeat itself
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[RunningServer]:
    """The tiny model behind a whole server. One worker thread: tests share two cores with much else."""
    with serving(tiny, "--threads", "1") as running:
        yield running


@pytest.fixture
def idle(server: RunningServer) -> Iterator[RunningServer]:
    """A server whose books are checked after the test as well."""
    yield server
    server.check_identities()
