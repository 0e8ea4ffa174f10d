"""latent_rollout's Triton kernels, forward and backward, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from jepa_kernels import BackendUnsupportedError
from jepa_kernels.ops.latent_rollout import (
    ResidualMLP,
    latent_rollout,
    latent_rollout_loss,
)
from jepa_kernels.ops.latent_rollout.cells import with_parameters
from jepa_kernels.testing import FLOAT32_SHORT, RESULT_FAULTS, planted_fault
from jepa_kernels.testing.rollout import CELLS, check_rollout, rollout_case, run_rollout

# Rows that fill one tile and part of the next; widths that are no power of two.
ROWS = 19
each_cell = pytest.mark.parametrize("cell", CELLS)


@each_cell
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("output", ("states", "last", 1.0, 2.5))
def test_matches_the_reference(cell, output, dtype):
    """bfloat16 is the case the interpreter gets wrong by itself, so it is the one to cover."""
    check_rollout(rollout_case(cell, output, rows=ROWS, dtype=dtype), "triton")


@each_cell
def test_float16(cell):
    check_rollout(rollout_case(cell, 2.0, rows=5, horizon=2, dtype=torch.float16), "triton")


@each_cell
@pytest.mark.parametrize(
    "options",
    (
        {"rows": 0},
        {"rows": 1, "horizon": 1},
        {"rows": 17, "hidden": 40, "channels": 70, "horizon": 2},
        {"hidden": 33, "channels": 34, "horizon": 2, "gathered": False, "strided": True},
        {"anchored": False, "split": False, "strided": True, "horizon": 2},
        {"index_dtype": torch.int32, "horizon": 2},
        {"horizon": 9, "gain": 0.5},
    ),
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
def test_shapes_and_layouts(cell, options):
    options = {"rows": 3, **options}
    for output in ("states", 1.0):
        check_rollout(rollout_case(cell, output, **options), "triton")


def test_weighted_losses():
    case = rollout_case("residual_mlp", 1.0, rows=8)
    cell = with_parameters(case.cell, [p.float() for p in case.cell.parameters()])
    options = {"rows": case.rows, "target_rows": case.target_rows}
    weights = torch.rand(8)
    results = []
    for backend in ("triton", "reference"):
        leaves = [case.states.float().requires_grad_(), case.targets.float().requires_grad_()]
        loss = latent_rollout_loss(
            leaves[0], cell, leaves[1], **options, weights=weights, backend=backend
        )
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted, **FLOAT32_SHORT)


@each_cell
def test_repeats_bit_for_bit(cell):
    case = rollout_case(cell, 1.0, rows=ROWS, horizon=2, dtype=torch.bfloat16)
    first, second = run_rollout(case, "triton"), run_rollout(case, "triton")
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


class _NoValueLeavesTheDevice(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"{func} would wait for the device")
        return func(*args, **(kwargs or {}))


@each_cell
def test_the_launcher_reads_no_values(cell):
    """On a GPU a value read would be a synchronisation, and would break CUDA-graph capture.
    (Indices are checked on a CPU only.)"""
    case = rollout_case(cell, 1.0, rows=3, horizon=2, gathered=False)
    with _NoValueLeavesTheDevice():
        run_rollout(case, "triton")


@pytest.mark.parametrize("phase", ("forward", "backward"))
@pytest.mark.parametrize("fault", RESULT_FAULTS)
def test_comparison_notices_planted_faults(fault, phase):
    case = rollout_case("residual_mlp", "states", rows=5, horizon=2)
    with planted_fault("rollout_mlp", "triton", fault, phase), pytest.raises(AssertionError):
        check_rollout(case, "triton")


def test_refusals_name_every_reason():
    head = ResidualMLP(torch.zeros(600, 6), torch.zeros(600), torch.zeros(6, 600), torch.zeros(6))
    head = with_parameters(head, [p.double() for p in head.parameters()])
    with pytest.raises(BackendUnsupportedError) as refusal:
        latent_rollout(torch.zeros(2, 6, dtype=torch.float64), head, 2, backend="triton")
    assert "hidden width of a residual_mlp must be at most 512, got 600" in str(refusal.value)
    assert "dtype must be float32 or bfloat16 or float16, got float64" in str(refusal.value)
