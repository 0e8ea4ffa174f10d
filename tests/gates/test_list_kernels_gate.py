"""What the assemblers make of the list kernels (ema_update, adamw_ema), without a GPU: no spills,
16-byte accesses, no fused multiply-add.

These kernels are bound by memory, so what counts is that a thread moves 16 bytes at a time and that
many threads fit a multiprocessor. The average is specified without fused multiply-add (every
backend gives the same bits), which the compilers must respect.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from jepa_kernels import triton_runtime
from tests.conftest import ROOT, missing

ARCHITECTURES = (80, 90, 100, 120)
# 65536 registers of a multiprocessor / (128 threads * 96 registers) = 5 programs: 640 threads, each
# with several 16-byte loads in flight.
MOST_REGISTERS = 96

_SCALARS = {"rows": "*i64", "chunks": "*i32", "keep": "fp32", "take": "fp32"}


def _triton_case(name: str) -> tuple[object, dict[str, str], dict[str, object]]:
    import triton.language as tl

    from jepa_kernels.ops.adamw_ema import triton_kernels as adamw
    from jepa_kernels.ops.ema_update import triton_kernels as ema

    f32, bf16 = tl.float32, tl.bfloat16
    common = {"weights_ptr": None, "seed_ptr": None, "COPY": None, "ROUNDING": 0, "ALIGNED": True}
    if name.startswith("ema"):
        kind = name.split()[1]
        change = {
            "float32": {"TARGET": f32, "SOURCE": f32},
            "mixed": {"TARGET": f32, "SOURCE": bf16, "COPY": bf16},
            "kahan": {"TARGET": bf16, "SOURCE": f32, "ROUNDING": 1},
        }[kind]
        return ema.ema_update_kernel, dict(_SCALARS), common | {"BLOCK": ema.BLOCK} | change
    teacher = f32 if name == "adamw teacher" else None
    fixed = common | {
        "found_inf": None,
        "PARAM": f32,
        "GRAD": f32,
        "STATE": f32,
        "TARGET": teacher,
        "BLOCK": adamw.BLOCK,
    }
    return adamw.adamw_ema_kernel, _SCALARS | {"scalars": "*fp32"}, fixed


def _compile(name: str, architecture: int) -> str:
    """The PTX of one Triton kernel; its resources go through `compile_report`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from jepa_kernels.ops.ema_update.triton_kernels import FUSION

    kernel, types, fixed = _triton_case(name)
    signature = {n: types.get(n, "constexpr") for n in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(kernel.arg_names)
        if signature[n].startswith("*")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=aligned)
    return triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": 4, **FUSION}
    ).asm["ptx"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "name", ["ema float32", "ema mixed", "ema kahan", "adamw teacher", "adamw alone"]
)
def test_triton_kernels(name, architecture):
    if not triton_runtime.installed():
        missing("triton is not installed (pip install triton)")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip(
            "TRITON_INTERPRET=1 replaces the kernels by Python functions, which cannot be compiled"
        )
    from jepa_kernels.ops.ema_update.triton_kernels import FUSION
    from jepa_kernels.triton_offline import compile_report

    kernel, types, fixed = _triton_case(name)
    report = compile_report(kernel, architecture, types, fixed, {"num_warps": 4, **FUSION})
    assert report.stack_bytes == 0 and report.spill_instructions == 0, report
    assert report.registers <= MOST_REGISTERS, report
    text = _compile(name, architecture)
    assert re.search(r"ld\.global\S*\.v4\.b32", text) and re.search(
        r"st\.global\S*\.v4\.b32", text
    ), "no 16-byte accesses"
    assert "fma.rn.f32" not in text


@pytest.mark.parametrize("op", ["ema_update", "adamw_ema"])
@pytest.mark.parametrize("architecture", ["80", "90a"])
def test_cuda_kernels(op, architecture, tmp_path: Path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        missing("nvcc was not found (install CUDA 12.4 or later)")
    cubin = tmp_path / "kernel.cubin"
    command = [
        nvcc,
        "-std=c++17",
        "-O3",
        f"-arch=sm_{architecture}",
        "-Xptxas=-v",
        "-cubin",
        "-o",
        str(cubin),
        str(ROOT / "csrc" / op / "cuda" / "launch.cu"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    spills = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr
    )
    assert spills and all(numbers == ("0", "0", "0") for numbers in spills), done.stderr
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
    assert registers and max(registers) <= 64, (
        "256 threads of 64 registers leave room for four blocks"
    )
    if not triton_runtime.installed():
        missing("nvdisasm comes with triton, which is not installed (pip install triton)")
    from jepa_kernels.triton_offline import _tool

    code = _tool("nvdisasm", "-c", str(cubin))
    # Two capacities of each kernel: every array that may be float32 is stored 16 bytes at a time
    # (moments, parameter, target and copy; target and copy of two rounds), never in pieces.
    stores = {"adamw_ema": 2 * 5, "ema_update": 2 * 4}[op]
    assert "LDG.E.128" in code and code.count("STG.E.128") >= stores, code.count("STG.E.128")
    if op == "ema_update":
        assert not re.search(r"\bFFMA\b", code), "the average must round every product and sum"
