"""What ptxas makes of the Triton kernels of visible_patch_embed, without a GPU: tensor cores for
16-bit products, no spills, and room for two programs on a multiprocessor."""

from __future__ import annotations

import os

import pytest
import torch

from jepa_kernels import triton_runtime
from jepa_kernels.ops.visible_patch_embed import triton as launch
from tests.conftest import missing

ARCHITECTURES = (80, 90, 100, 120)
# 65536 registers of a multiprocessor / (256 threads * 128 registers) = 2 programs.
MOST_REGISTERS = 128
SIZES = {"CHANNELS": 3, "DEPTH": 2, "HIGH": 16, "WIDE": 16}
STRIDES = ("clip", "channel", "frame", "line", "pixel")


@pytest.mark.parametrize(
    "architecture",
    [a if a == 90 else pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES],
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["embed", "weight_gradient", "scatter"])
def test_kernels_fit_their_architecture(name, dtype, architecture):
    if not triton_runtime.installed():
        missing("triton is not installed (pip install triton)")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip(
            "TRITON_INTERPRET=1 replaces the kernels by Python functions, which cannot be compiled"
        )
    from jepa_kernels.ops.visible_patch_embed import triton_kernels
    from jepa_kernels.triton_offline import compile_report

    kernel = getattr(triton_kernels, f"{name}_kernel")
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    options = launch.scatter_options() if name == "scatter" else launch.product_options(name, kind)
    sizes = {**SIZES, **{n: options.pop(n) for n in ("BM", "BN", "BK") if n in options}}
    if name == "embed":
        sizes["HAS_BIAS"] = True
    types = dict.fromkeys(("rows", "order", "starts"), "*i64")
    types |= dict.fromkeys(("weight", "bias", "out", "grad_out", "gradient"), f"*{dtype}")
    types |= dict.fromkeys(("normalisation", "partial", "of_pixels"), "*fp32")
    types |= {"clip": "*u8"}
    types |= dict.fromkeys(("count", "piece_rows", "width", "steps", "lines", "sites"), "i32")
    types |= {f"{n}_stride": "i32" for n in STRIDES}
    types = {n: t for n, t in types.items() if n in kernel.arg_names}
    report = compile_report(kernel, architecture, types, sizes, options)
    assert report.stack_bytes == 0 and report.spill_instructions == 0, report
    assert report.registers <= MOST_REGISTERS, report
    assert 2 * report.shared_bytes <= 100 * 1024, report
    if name != "scatter" and dtype != "fp32":
        assert report.tensor_core_instructions > 0, report
