"""Every kernel becomes machine code for GPUs that are not here, and good code as far as that can be seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from model.gpu import ops

ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(not ops.HAS_TRITON, reason="there is no Triton for this system")
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("architecture", [80, 90])  # A100, H100
def test_kernels_compile_for_gpus_and_keep_to_registers(architecture: int, dtype: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, str(architecture), dtype],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kernels: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert {each["kernel"] for each in kernels} == {"_write", "_decode", "_merge", "_prefill", "_few_rows", "_draw"}
    for each in kernels:
        assert each["stack"] <= 16, each
        if each["kernel"] in {"_decode", "_prefill", "_few_rows"}:
            assert each["wide_loads"] >= 4, each
        if each["kernel"] == "_decode":
            assert each["registers"] <= 96, each  # five programs of 128 threads on a multiprocessor, at the least
        if each["kernel"] in {"_prefill", "_few_rows"} and dtype == "bf16":
            assert each["matrix"] > 0, each
