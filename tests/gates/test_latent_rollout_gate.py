"""What ptxas makes of the Triton kernels of latent_rollout at their usual widths, without a GPU: no
spills, tensor cores for 16-bit products."""

from __future__ import annotations

import importlib
import os

import pytest
import torch

from jepa_kernels import triton_runtime
from tests.conftest import missing

ARCHITECTURES = (80, 90, 100, 120)
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448, 120: 101376}
RECURRENCES = ("mlp_fwd", "mlp_bwd", "hamiltonian_fwd", "hamiltonian_bwd")
KERNELS = (
    *RECURRENCES,
    "readout states",
    "readout errors",
    "readout gradient",
    "gru_fwd",
    "gru_bwd",
)

_MATRICES = ("coupling", "weight", "scratch", "scratch2")
_FLOATS = [
    "start",
    "drift",
    "sums",
    "inputs",
    "grad_sums",
    "grad_inputs",
    "activations",
    "bias",
    "energy",
    "input",
    "following",
    "carried",
    "force",
    "left",
    "right",
    "energy_rows",
    "errors",
    "grad_errors",
    "grad",
    "grad_base",
    "from_action",
    "from_state",
    "bias_input",
    "bias_state",
    "norm_weight",
    "norm_bias",
    "state",
    "after",
    "gates",
    "before",
    "grad_gates",
    "grad_norm",
]
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_TABLES = ("base", "targets", "out")
_INTEGERS = [
    "rows",
    "horizon",
    "terms",
    "terms2",
    "first_step",
    "weight_term",
    "weight_column",
    "base_stride",
    "target_step",
    "target_stride",
    "out_step",
    "out_stride",
    "grad_base_stride",
    "state_stride",
    "before_stride",
]


def _case(
    name: str, operand: str
) -> tuple[object, dict[str, str], dict[str, object], dict[str, object]]:
    """The kernel, argument types, constants and options of a launch at hidden width 256."""
    from jepa_kernels.ops.latent_rollout import triton_launch as launch
    from jepa_kernels.ops.latent_rollout.gru.triton import ROWS as GRU_ROWS
    from jepa_kernels.ops.latent_rollout.hamiltonian.triton import BACKWARD_STAGES

    kernel_name = name.split()[0]
    folder = kernel_name.split("_")[0]
    module = importlib.import_module(f"jepa_kernels.ops.latent_rollout.{folder}.triton_kernels")
    kernel = getattr(module, f"{kernel_name}_kernel")
    types = (
        {n: f"*{operand}" for n in (*_MATRICES, *_TABLES)}
        | dict.fromkeys(_FLOATS, "*fp32")
        | dict.fromkeys(_INTEGERS, "i32")
    )
    types |= {"base_rows": "*i64", "target_rows": "*i64", "time_step": "fp32", "epsilon": "fp32"}
    fixed = {"hidden": 256, "middle": 256, "channels": 768, "width": 512, "EXPONENT": 1.0}
    fixed |= dict.fromkeys(("KEEP", "SAVE", "KEPT", "MOVES", "TRANSPOSED"), True)
    if name.startswith("readout"):
        mode = ("states", "errors", "gradient").index(name.split()[1])
        fixed |= {
            "MODE": mode,
            "BM": launch.ROWS,
            "BN": launch.COLUMNS,
            "BK": launch.terms(_DTYPES[operand]),
        }
        return kernel, types, fixed, launch.options(4)
    if name.startswith("gru"):
        return kernel, types, fixed | {"BM": GRU_ROWS, "BN": 512}, launch.options(4)
    middle, dtype = 256 if name.startswith("hamiltonian") else 0, _DTYPES[operand]
    fixed |= {
        "BM": launch.rows_of(256, middle, dtype),
        "BN": 256,
        "BD": 256,
        "BK": launch.terms(dtype, middle),
    }
    return (
        kernel,
        types,
        fixed,
        launch.options(8, BACKWARD_STAGES if name == "hamiltonian_bwd" else 2),
    )


def _report(name: str, operand: str, architecture: int):
    if not triton_runtime.installed():
        missing("triton is not installed (pip install triton)")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip(
            "TRITON_INTERPRET=1 replaces the kernels by Python functions, which cannot be compiled"
        )
    from jepa_kernels.triton_offline import compile_report

    kernel, types, fixed, options = _case(name, operand)
    names = set(kernel.arg_names)
    types = {n: t for n, t in types.items() if n in names}
    return compile_report(
        kernel, architecture, types, {n: v for n, v in fixed.items() if n in names}, options
    )


@pytest.mark.parametrize("operand", ("bf16", "fp32"))
@pytest.mark.parametrize(
    "architecture",
    [a if a == 90 else pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES],
)
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_fit_their_architecture(name, architecture, operand):
    if name.startswith("gru") and operand == "bf16":
        pytest.skip("its arguments are float32 whatever the states are")
    report = _report(name, operand, architecture)
    assert report.stack_bytes == 0 and report.spill_instructions == 0, report
    assert report.shared_bytes <= SHARED_LIMIT[architecture], report
    products = name in RECURRENCES or name.startswith("readout")
    assert (report.tensor_core_instructions > 0) == (products and operand == "bf16"), report
