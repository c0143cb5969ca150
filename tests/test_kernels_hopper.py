"""The Gluon kernels compile for Hopper, on a machine without one; what they compute is tested on a GPU."""

import os
import subprocess
import sys

import pytest

COMPILE = """
import sys
from importlib import import_module
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

module, name, *constants = sys.argv[1:]
kernel = getattr(import_module(f"trimtab.kernels.hopper.{module}"), name)
constants = {key: int(value) for key, value in (constant.split("=") for constant in constants)}
float32 = {"lse_ptr", "delta_ptr"}

def type_of(argument):
    if argument in constants:
        return "constexpr"
    if argument == "ids_ptr":
        return "*i32"
    if argument.endswith("_ptr"):
        return "*fp32" if argument in float32 else "*bf16"
    return "fp32" if argument == "scale" else "i32"

types = {argument: type_of(argument) for argument in kernel.arg_names}
aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind[0] == "*" or kind == "i32"}
source = GluonASTSource(
    fn=kernel,
    signature=types,
    constexprs={(kernel.arg_names.index(key),): value for key, value in constants.items()},
    attrs=aligned,
)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
assert "wgmma.mma_async" in compiled.asm["ptx"]
print(compiled.metadata.shared)
"""
SHARED_MEMORY = 227 * 1024


@pytest.mark.parametrize(
    "kernel",
    [
        "sparse_mla _forward_kernel K_PADDED=2048",
        "sparse_mla_backward _gradient_kernel K_PADDED=2048",
        "sparse_mla_backward _row_kernel K_PADDED=2048 BLOCK_H=128 WIDTH=128 DEPTH=2",
        "sparse_mla_few_heads _forward_kernel K_PADDED=2048 BLOCK_H=32",
        "sparse_mla_few_heads _gradient_kernel K_PADDED=2048 BLOCK_H=32",
    ],
)
def test_a_kernel_compiles_and_fits_into_shared_memory(kernel, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", COMPILE, *kernel.split()],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert int(result.stdout) <= SHARED_MEMORY
