"""The Triton kernels, compiled for GPUs that are not there: what `tests/test_fused.py` asks for.

python -m tests.compiled 80 86 90     prints a line for each kernel that needs too much
"""

import itertools
import sys

import torch
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.kernels import fused, fused_triton

SHARED = {80: 166912, 86: 101376, 90: 232448}
"""bytes of shared memory that a program may have, by compute capability (CUDA C++ guide)"""
TYPES = {"fp16": torch.float16, "fp32": torch.float32}
POINTERS = {"partials": "*fp32", "mean_state": "*fp32"}
KERNELS = {
    "state": (fused_triton.state, fused.tiles_of_state),
    "apply": (fused_triton.apply, fused.tiles_of_apply),
}


def shared_bytes(name: str, width: int, dtype: str, capability: int) -> int:
    """Of a kernel for heads so wide; compiled, so that registers are allotted too."""
    kernel, tiles_of = KERNELS[name]
    tiles = tiles_of(width, TYPES[dtype], SHARED[capability])
    constants = {
        "UNIT": 8, "HEAD": width, "WIDE": tiles.wide, "COLUMNS": tiles.columns, "TOKENS": 1024,
        "BLOCK": tiles.block, "OPERAND": fused._operand(TYPES[dtype]), "PRECISION": "tf32x3",
    }  # fmt: skip
    constants |= {n: 1 for n in kernel.arg_names if n.endswith("_column")}
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in ("key", "value", "query", "out"):
            signature[argument] = f"*{dtype}"
        else:
            plain = "fp32" if argument == "eps" else "i32"
            signature[argument] = POINTERS.get(argument, plain)
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(kernel.arg_names)
        if signature[argument].startswith("*")
    }
    places = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    compiled = compile(
        ASTSource(kernel, signature, places, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tiles.warps, "num_stages": tiles.stages},
    )
    return int(compiled.metadata.shared)


def main() -> None:
    capabilities = map(int, sys.argv[1:])
    cases = itertools.product(capabilities, TYPES, (40, 64, 80, 160), KERNELS)
    for capability, dtype, width, name in cases:
        if dtype == "fp32" and width < 160:
            continue
        needed = shared_bytes(name, width, dtype, capability)
        if needed > SHARED[capability]:
            print(f"{name} of {width} in {dtype} on {capability}: {needed}", flush=True)


if __name__ == "__main__":
    main()
