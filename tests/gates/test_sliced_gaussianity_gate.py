"""What ptxas makes of the Triton kernels of sliced_gaussianity, without a GPU: no spills, and room
for two programs on a multiprocessor."""

from __future__ import annotations

import os

import pytest

from jepa_kernels import triton_runtime
from jepa_kernels.ops.sliced_gaussianity import triton as launch
from tests.conftest import missing

ARCHITECTURES = (80, 90, 100, 120)
# 65536 registers of a multiprocessor / (256 threads * 128 registers) = 2 programs.
MOST_REGISTERS = 128


@pytest.mark.parametrize(
    "architecture",
    [a if a == 90 else pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES],
)
@pytest.mark.parametrize("name", ["sums", "slope"])
def test_kernels_fit_their_architecture(name, architecture):
    if not triton_runtime.installed():
        missing("triton is not installed (pip install triton)")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip(
            "TRITON_INTERPRET=1 replaces the kernels by Python functions, which cannot be compiled"
        )
    from jepa_kernels.ops.sliced_gaussianity import triton_kernels
    from jepa_kernels.triton_offline import compile_report

    kernel = getattr(triton_kernels, f"{name}_kernel")
    options = launch.options()
    sizes = {n: options.pop(n) for n in ("BM", "BN")}
    types = dict.fromkeys(("projections", "sums", "coefficients"), "*fp32")
    types |= dict.fromkeys(("rows", "columns", "knots"), "i32")
    types |= dict.fromkeys(("spacing", "limit"), "fp32")
    types = {n: t for n, t in types.items() if n in kernel.arg_names}
    report = compile_report(kernel, architecture, types, sizes, options)
    assert report.stack_bytes == 0 and report.spill_instructions == 0, report
    assert report.registers <= MOST_REGISTERS, report
    assert report.shared_bytes <= 49152, report
    assert report.float_instructions > 16, report
