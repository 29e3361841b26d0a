"""The Triton kernels compile to machine code for GPUs that need not be here (docs/gpu.md)."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the package triton is not installed")

KERNELS = {
    *("_norm", "_silu_mul", "_rotate_and_store", "_attend", "_combine", "_attend_chunk"),
    *("_shrink", "_expand", "_adapted", "_dress", "_embed"),
}
# Bytes of shared memory that a program may take (CUDA C++ Programming Guide, table of technical
# specifications by compute capability).
SHARED = {"80": 163 << 10, "89": 99 << 10, "90": 227 << 10, "100": 227 << 10}


def compiled(capability: str, *dtypes: str) -> dict[str, int]:
    """Return the largest shared memory of each kernel."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.serving.engine.compile_kernels", capability, *dtypes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = {}
    for line in done.stdout.splitlines():
        name, size = line.split()
        found[name] = max(found.get(name, 0), int(size))
    return found


def check(capability: str, *dtypes: str) -> None:
    found = compiled(capability, *dtypes)
    assert found.keys() == KERNELS
    assert max(found.values()) <= SHARED[capability], found


def test_every_kernel_compiles_for_an_h100() -> None:
    check("90", "bfloat16")


@pytest.mark.long
@pytest.mark.parametrize("capability", SHARED)
def test_every_kernel_compiles_for_other_gpus_and_number_formats(capability: str) -> None:
    check(capability, "bfloat16", "float16", "float32")
