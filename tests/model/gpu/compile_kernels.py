"""Compiles every kernel for a GPU that need not be there, and prints what the machine code looks like, a line each.

`python compile_kernels.py ARCHITECTURE DTYPE`, as in `90 bf16`. Not in the interpreter: it wants the compiler.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from model.gpu import triton_attention, triton_linear, triton_sampling

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
INDICES = ("slots", "tables", "owners", "contexts", "starts")
FLOATS = ("scale", "epsilon")
# GPT-2's widths, and so the distances between lines, are multiples of 16: Triton sees that in the arguments of a call.
EVEN = ("block_size", "head_dim", "stride", "width_in", "width_out")
SPLIT: dict[str, object] = {"SPLIT": triton_attention.SPLIT, "WIDTH": 64}
CONSTANTS: list[tuple[Any, dict[str, object], dict[str, int]]] = [
    (triton_attention._write, {"WIDTH": 64}, {"num_warps": 1}),
    (triton_attention._decode, {"ALONE": True, **SPLIT, "TILE": triton_attention.TILE}, {}),
    (triton_attention._decode, {"ALONE": False, **SPLIT, "TILE": triton_attention.TILE}, {}),
    (triton_attention._merge, SPLIT, {"num_warps": 1}),
    (triton_attention._prefill, {"WIDTH": 64}, {}),
    (
        triton_linear._few_rows,
        {"NORM": True, "RESIDUAL": False, "ACTIVATION": "gelu_new", "OUT": triton_linear.OUT},
        {},
    ),
    (triton_linear._few_rows, {"NORM": False, "RESIDUAL": True, "ACTIVATION": None, "OUT": triton_linear.OUT}, {}),
    (triton_sampling._draw, {"WAY": 1, "TILE": triton_sampling.TILE}, {"num_warps": 8}),
]


DRAWN = {
    "logits": "*fp32",
    "tokens": "*i32",
    "out": "*i32",
    "width": "i32",
    "coarse": "fp32",
}  # of _draw; its others are float64


def sized(name: str, dtype: str) -> list[dict[str, object]]:
    """The constants that go with the size of a number."""
    size = 4 if dtype == "fp32" else 2
    if name == "_prefill":
        queries, tile = triton_attention.PREFILL[size]
        return [{"QUERIES": queries, "TILE": tile}]
    if name == "_few_rows":
        return [{"ROWS": rows, "IN": triton_linear.IN[size]} for rows in (16, triton_linear.FEW)]
    return [{}]


def type_of(kernel: str, name: str, dtype: str) -> str:
    if kernel == "_draw":
        return DRAWN.get(name, "*fp64")
    if name == "partial":
        return "*fp32"
    if name in INDICES:
        return "*i32"
    if name in FLOATS:
        return "fp32"
    pointers = ("qkv", "keys", "values", "out", "x", "weight", "bias", "gain", "shift", "residual")
    return f"*{dtype}" if name in pointers else "i32"


def main() -> None:
    architecture, dtype = int(sys.argv[1]), sys.argv[2]
    for kernel, constants, options in CONSTANTS:
        for more in sized(kernel.__name__, dtype):
            fixed = {**constants, **more}
            types = {
                name: "constexpr" if name in fixed else type_of(kernel.__name__, name, dtype)
                for name in kernel.arg_names
            }
            hints = {
                (i,): [["tt.divisibility", 16]]
                for i, name in enumerate(kernel.arg_names)
                if types[name].startswith("*") or name in EVEN
            }
            source = ASTSource(kernel, signature=types, constexprs=fixed, attrs=hints)
            made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
            print(json.dumps({"kernel": kernel.__name__, "constants": fixed, **looked_at(made.asm["cubin"])}))


def looked_at(machine_code: bytes) -> dict[str, int]:
    path = Path("kernel.cubin")
    path.write_bytes(machine_code)

    def dump(what: str) -> str:
        return subprocess.run([CUOBJDUMP, what, path], check=True, capture_output=True, text=True).stdout

    usage = re.search(r"REG:(\d+) STACK:(\d+)", dump("--dump-resource-usage"))
    assert usage is not None
    code = dump("--dump-sass")
    return {
        "registers": int(usage[1]),
        "stack": int(usage[2]),  # bytes of memory that registers had no room for
        "wide_loads": len(re.findall(r"LDG(?:STS)?\.E\.(?:\w+\.)*128", code)),  # of 16 bytes
        "matrix": len(re.findall(r"\bHG?MMA", code)),
    }


if __name__ == "__main__":
    main()
