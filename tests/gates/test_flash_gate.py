"""What the flash backend runs, compiled without a GPU: our rotation for every architecture, and
FlashAttention 4 as the backend calls it, for Hopper and Blackwell."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from jepa_kernels import triton_runtime
from jepa_kernels.ops.masked_attention.triton_launch import launch_options
from jepa_kernels.ops.masked_attention.triton_table import ROTATE_HEADS, ROTATE_TILE, channels
from jepa_kernels.rope3d import rope_dim
from tests.conftest import missing


@pytest.mark.parametrize(
    ("architecture", "head_dim", "transposed"),
    [(80, 64, False), (90, 64, False), (90, 88, True), (100, 128, True), (120, 64, True)],
)
def test_the_rotation_compiles_without_spills(architecture, head_dim, transposed):
    if not triton_runtime.installed():
        missing("triton is not installed (pip install triton)")
    from jepa_kernels.ops.masked_attention.triton_turn import turn_kernel
    from jepa_kernels.triton_offline import compile_report

    main, tail = channels(torch.bfloat16, head_dim)
    fixed = {
        "HEAD_DIM": head_dim,
        "MAIN": main,
        "TAIL": tail,
        "ROPE_DIM": rope_dim(head_dim),
        "ALIGN": 8,
        "BLOCK": ROTATE_TILE.block_q,
        "HEADS_EACH": ROTATE_HEADS,
        "TRANSPOSED": transposed,
    }
    panels = {"query": "*bf16", "key": "*bf16", "query_rotated": "*bf16", "key_rotated": "*bf16"}
    others = {"query_ids": "*i64", "key_ids": "*i64", "table": "*fp32"}
    types = {
        name: (panels | others).get(name, "i32")
        for name in turn_kernel.arg_names
        if name not in fixed
    }
    found = compile_report(turn_kernel, architecture, types, fixed, launch_options(ROTATE_TILE))
    assert found.spill_instructions == 0
    assert found.registers <= 128


FLASH_ATTENTION_4 = """
import cutlass.utils
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from jepa_kernels.ops.masked_attention.flash import FlashAttention4, Packed


def zeros(*shape, **options):
    # Its semaphores go through DLPack, which asks for the current GPU, unless they are on a CPU.
    return torch.empty(*shape, dtype=options["dtype"])

class Hardware:
    # The number of multiprocessors, which the launch grid depends on, is asked of the driver.
    def __getattr__(self, name):
        return lambda *given, **named: 132

torch.zeros = zeros
cutlass.utils.HardwareInfo = Hardware
torch.use_deterministic_algorithms({deterministic})
library = FlashAttention4()
with FakeTensorMode():
    offsets = torch.empty(4, dtype=torch.int32, device="cuda")
    for packed in (Packed(offsets, offsets, 100, 90, 200, 180), None):
        lead_q, lead_k = ((200,), (180,)) if packed else ((2, 200), (2, 180))
        q = torch.empty(*lead_q, 3, {head_dim}, dtype=torch.bfloat16, device="cuda")
        k = torch.empty(*lead_k, 3, {head_dim}, dtype=torch.bfloat16, device="cuda")
        out, lse = library.forward(q, k, k, packed, 0.1)
        assert out.shape == q.shape
        assert lse.shape == ((3, 200) if packed else (2, 3, 200))
        grads = library.backward(q, q, k, k, out, lse, packed, 0.1)
        assert [g.shape for g in grads] == [q.shape, k.shape, k.shape]
print("compiled")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "head_dim", "deterministic"),
    [("sm_90a", 64, True), ("sm_90a", 88, False), ("sm_100a", 64, True), ("sm_100a", 128, False)],
)
def test_flash_attention_4_compiles_as_it_is_called(root, architecture, head_dim, deterministic):
    if importlib.util.find_spec("cutlass") is None:
        pytest.skip("flash-attn-4 is not installed (pip install jepa-kernels[flash])")
    environment = {
        **os.environ,
        "FLASH_ATTENTION_ARCH": architecture.rstrip("a"),
        "CUTE_DSL_ARCH": architecture,
        "FLASH_ATTENTION_NUM_SMS": "132",
        "PYTHONPATH": str(root),
    }
    script = FLASH_ATTENTION_4.format(head_dim=head_dim, deterministic=deterministic)
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=root, capture_output=True, text=True
    )
    assert done.stdout.strip().endswith("compiled"), done.stdout[-500:] + done.stderr[-3000:]
