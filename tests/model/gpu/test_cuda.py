"""On a real device. Skipped, saying so, where there is none."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from benchmarks.gpu import Engine, prompts_of, start_of
from model.errors import DeviceError
from model.gpu import cuda
from model.loading import choose_device, choose_dtype, choose_ops
from server.worker.parts import count_blocks, load_networks, make_grammars, make_runner, make_variants

Made = Callable[..., tuple[Path, GPT2LMHeadModel]]
needs_gpu = pytest.mark.skipif(not cuda.available(), reason="no CUDA device on this machine")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("deterministic", [False, True])
def test_greedy_text_in_float32_is_the_cpus(make_checkpoint: Made, deterministic: bool) -> None:
    directory, _ = make_checkpoint(vocab_size=50257, n_positions=1024)
    texts = []
    for device in ("cpu", "cuda"):
        start = start_of(directory, device, "float32", 8, deterministic=deterministic)
        texts.append(list(Engine(start).run(prompts_of(8, 60), 60).tokens.values()))
    assert texts[0] == texts[1]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_deterministic_text_does_not_depend_on_the_batch(make_checkpoint: Made, dtype: str) -> None:
    directory, _ = make_checkpoint(vocab_size=50257, n_positions=1024)
    engine = Engine(start_of(directory, "cuda", dtype, 16, deterministic=True))
    prompts = prompts_of(16, 60)
    together = list(engine.run(prompts, 60).tokens.values())
    assert together == [next(iter(engine.run([prompt], 60).tokens.values())) for prompt in prompts]


@pytest.mark.gpu
@needs_gpu
def test_a_pool_that_does_not_fit_is_refused(make_checkpoint: Made) -> None:
    directory, _ = make_checkpoint()
    start = start_of(directory, "cuda", "float32", 1)
    networks = load_networks(start)
    with pytest.raises(DeviceError, match="--gpu-memory-utilization"):
        make_runner(
            start,
            networks,
            1000 * count_blocks(start, networks) + (1 << 30),
            make_variants(start, networks),
            make_grammars(start),
        )


@pytest.mark.skipif(cuda.available(), reason="a machine without a CUDA device is needed")
@pytest.mark.parametrize("name", ["cuda", "cuda:3"])
def test_without_a_device_the_reason_is_said(name: str) -> None:
    with pytest.raises(DeviceError, match=r"there is none for PyTorch .*: (this PyTorch was built|no driver)"):
        choose_device(name)


def test_a_cpu_says_what_it_does_not_serve() -> None:
    with pytest.raises(DeviceError, match="bfloat16 runs on a GPU"):
        choose_dtype("bfloat16", torch.device("cpu"))


def test_a_gpu_refuses_what_only_a_cpu_has() -> None:
    with pytest.raises(DeviceError, match="quantization int8 runs on a CPU"):
        choose_ops(torch.device("cuda"), torch.float16, "auto", "int8")


def test_torch_cuda_is_called_in_one_file() -> None:
    root = Path(cuda.__file__).parents[2]
    files = [path for room in ("model", "server", "benchmarks") for path in (root / room).rglob("*.py")]
    assert [path.name for path in files if re.search(r"torch\.cuda\.\w+\(", path.read_text("utf-8"))] == ["cuda.py"]
