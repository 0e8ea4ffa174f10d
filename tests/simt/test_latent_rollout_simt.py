"""csrc/latent_rollout/cuda on the SIMT executor, called through the CUDA backend: forward and
backward against the float64 reference."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from jepa_kernels.backend import OPS
from jepa_kernels.ops.latent_rollout import latent_rollout
from jepa_kernels.ops.latent_rollout.api import prepare
from jepa_kernels.ops.latent_rollout.cells import with_parameters
from jepa_kernels.ops.latent_rollout.gru.cuda import WIDEST as WIDEST_GRU
from jepa_kernels.ops.latent_rollout.hamiltonian.cuda import WIDEST as WIDEST_HAMILTONIAN
from jepa_kernels.ops.latent_rollout.mlp.cuda import WIDEST as WIDEST_MLP
from jepa_kernels.testing import RESULT_FAULTS, planted_fault
from jepa_kernels.testing.rollout import (
    CELLS,
    OP_NAMES,
    check_rollout,
    rollout_case,
    run_rollout,
)
from tests.simt.build import ORDERS, ROOT, build, configure, run_sanitized
from tests.simt.rollout_abi import Library, SimtOps, run_cuda_on
from tests.simt.rollout_saved import Recorder

SOURCE = "csrc/latent_rollout/cuda/launch.cu"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Fewer instances compile faster.
ONLY_FLOAT = {"JK_INSTANCES(name)": "name<float>,name<float>,name<float>"}
WITHOUT_HALF = {"JK_INSTANCES(name)": "name<float>,name<jk::bfloat16>,name<jk::bfloat16>"}
OUTPUTS = ("states", "last", 1.0, 2.5)
WIDEST = dict(zip(CELLS, (WIDEST_MLP, WIDEST_HAMILTONIAN, WIDEST_GRU), strict=True))
each_cell = pytest.mark.parametrize("cell", CELLS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
two_dtypes = pytest.mark.parametrize(
    "dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16")
)


@pytest.fixture(scope="module")
def library() -> Library:
    return Library(build(SOURCE))


@pytest.fixture(autouse=True)
def _on_the_executor(monkeypatch: pytest.MonkeyPatch, library: Library):
    run_cuda_on(monkeypatch, library)
    yield
    configure(library.library)


@each_cell
@pytest.mark.parametrize("output", OUTPUTS)
@each_dtype
def test_matches_the_reference(cell, output, dtype):
    check_rollout(rollout_case(cell, output, dtype=dtype), "cuda")


@each_cell
@two_dtypes
@pytest.mark.parametrize(
    "options",
    (
        {"rows": 0},
        {"rows": 1, "horizon": 1},
        {"rows": 2, "horizon": 5},
        {"rows": 65, "hidden": 40, "channels": 70},
        {"rows": 33, "hidden": 33, "channels": 34, "horizon": 2},
        {"rows": 20, "hidden": 136, "channels": 140, "horizon": 2},
        {"rows": 16, "hidden": 64, "channels": 64, "horizon": 2, "split": False},
        {"gathered": False, "strided": True},
        {"anchored": False, "split": False, "strided": True},
        {"index_dtype": torch.int32},
        {"horizon": 1, "split": False},
        {"magnitude": 6.0},
    ),
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
def test_shapes_and_layouts(cell, options, dtype):
    # In 16 bits a residual that rounds across zero turns the sign of an L1 gradient: whether one
    # does is luck, in the reference too.
    for output in ("states", "last", 2.0 if dtype == torch.bfloat16 else 1.0):
        check_rollout(rollout_case(cell, output, **options, dtype=dtype), "cuda")


@each_cell
@two_dtypes
def test_error_stays_in_budget_for_long_horizons(cell, dtype):
    check_rollout(
        rollout_case(
            cell,
            "states",
            horizon=64,
            rows=5,
            gain=0.5,
            dtype=dtype,
            gathered=False,
            seed=int(cell == "gru"),
        ),
        "cuda",
    )


@each_cell
@two_dtypes
def test_thread_and_block_order_change_nothing(library, cell, dtype):
    for output in ("states", 1.0):
        case = rollout_case(cell, output, rows=40, channels=72, hidden=48, dtype=dtype)
        results = {}
        for order in ORDERS:
            configure(library.library, order, seed=11)
            results[order] = run_rollout(case, "cuda")
        for name, tensor in results["forward"].items():
            for order in ORDERS:
                assert torch.equal(tensor, results[order][name]), f"{name} {order}"


@two_dtypes
def test_a_row_is_the_same_in_any_company(library, dtype):
    """Bitwise: no row sees its tile, and its place in the tile does not count."""
    ops, some = SimtOps(library), torch.tensor([30, 2, 36])
    start, coupling, drift = torch.randn(37, 24), torch.randn(24, 24).to(dtype), torch.randn(24)
    _, together = ops.latent_rollout_mlp_fwd(start, coupling, drift, 3, True, False, -1)
    _, alone = ops.latent_rollout_mlp_fwd(start[some], coupling, drift, 3, True, False, -1)
    assert torch.equal(alone, together[:, some])
    case = rollout_case("gru", "states", rows=37, gathered=False)
    now = with_parameters(case.cell, [p.to(dtype) for p in case.cell.parameters()])
    states, actions = case.states.to(dtype), case.actions.to(dtype)
    together = latent_rollout(states, now, 3, actions=actions, backend="cuda")
    alone = latent_rollout(states[some], now, 3, actions=actions[:, some], backend="cuda")
    assert torch.equal(alone, together[:, some])


@pytest.mark.parametrize("fault", RESULT_FAULTS)
@pytest.mark.parametrize("phase", ("forward", "backward"))
def test_comparison_notices_planted_faults(fault, phase):
    case = rollout_case("residual_mlp", "states")
    check_rollout(case, "cuda")
    with planted_fault("rollout_mlp", "cuda", fault, phase), pytest.raises(AssertionError):
        check_rollout(case, "cuda")


KERNEL_FAULTS = {
    "a step without its drift": ("residual_mlp", "mlp.cuh", "(v + p.drift[c])", "v"),
    "a half-step the wrong way": (
        "hamiltonian",
        "hamiltonian.cuh",
        "which ? -p.time_step : p.time_step",
        "p.time_step",
    ),
    "a gate without its bias": (
        "gru",
        "gru.cuh",
        "acc[2][b][i] = p.bias_state[2 * d + at]",
        "acc[2][b][i] = 0.f",
    ),
    "a product whose left side is not complete": (
        "residual_mlp",
        "mlp.cuh",
        "    __syncthreads();\n    multiply(",
        "    multiply(",
    ),
    "a kept matrix that has not arrived": (
        "residual_mlp",
        "weights.cuh",
        "cp_async_wait<0>();",
        "",
    ),
    "a slot that has not arrived": (
        "residual_mlp",
        "weights.cuh",
        "cp_async_wait<kManySlots - 2>();",
        "",
    ),
    "a slot that other lanes have yet to fill": (
        "residual_mlp",
        "weights.cuh",
        "__syncwarp();  // every lane's",
        "// every lane's",
    ),
    "a slot filled again too early": (
        "residual_mlp",
        "weights.cuh",
        "int i = 1; i < count; i++",
        "int i = 0; i < count; i++",
    ),
}


@pytest.mark.parametrize("fault", KERNEL_FAULTS)
def test_a_fault_in_a_kernel_is_noticed(monkeypatch, tmp_path: Path, fault):
    cell, file, sound, broken = KERNEL_FAULTS[fault]
    shutil.copytree(ROOT / "csrc", tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "latent_rollout" / "cuda"
    path = folder / file
    text = path.read_text()
    assert sound in text
    path.write_text(text.replace(sound, broken))
    run_cuda_on(monkeypatch, Library(build(folder / "launch.cu", defines=ONLY_FLOAT)))
    with pytest.raises(AssertionError):
        check_rollout(rollout_case(cell, "states", hidden=72, horizon=4), "cuda")


@pytest.fixture(scope="module")
def saved_calls(library: Library, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kernel, in float32 and bfloat16: sizes that fill a tile and sizes that do not, matrices
    that stay and wide ones that stream."""
    recorder = Recorder(library)
    with pytest.MonkeyPatch.context() as patch:
        run_cuda_on(patch, recorder)
        for cell in CELLS:
            wide = {"residual_mlp": (135, 6), "hamiltonian": (100, 6), "gru": (6, 70)}[cell]
            sizes = (
                ("last", torch.float32, 19, 33, 34),
                (1.0, torch.bfloat16, 17, 12, 16),
                ("last", torch.float32, 2, *wide),
            )
            for output, dtype, rows, hidden, channels in sizes:
                run_rollout(
                    rollout_case(
                        cell,
                        output,
                        rows=rows,
                        hidden=hidden,
                        channels=channels,
                        horizon=3,
                        dtype=dtype,
                    ),
                    "cuda",
                )
    path = tmp_path_factory.mktemp("calls") / "calls.npz"
    np.savez(path, **recorder.arrays)
    return path


@pytest.mark.parametrize("sanitizer", ["asan_ubsan", "tsan"])
def test_sanitizers_find_nothing(saved_calls, sanitizer):
    arguments = [
        str(ROOT / "tests" / "simt" / "rollout_saved.py"),
        str(build(SOURCE, sanitizer, WITHOUT_HALF)),
        str(saved_calls),
        sanitizer,
    ]
    done = run_sanitized(arguments, sanitizer)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "calls agree" in done.stdout


def _wide(cell: str, width: int, dtype: torch.dtype = torch.float32):
    """A rollout of one row; the second layer of a Hamiltonian is two units wider than its first."""
    hidden = width - 2 if cell == "hamiltonian" else width
    channels = width if cell == "gru" else 4
    return rollout_case(
        cell,
        "last",
        rows=1,
        horizon=2,
        channels=channels,
        hidden=hidden,
        gathered=False,
        split=False,
        dtype=dtype,
    )


@each_cell
@two_dtypes
def test_the_widest_cell_that_the_backend_accepts_runs(cell, dtype):
    check_rollout(_wide(cell, WIDEST[cell], dtype), "cuda")


@each_cell
def test_the_widest_cell_is_what_the_kernels_can_hold(monkeypatch, cell):
    """In 99 KiB one unit more (of both layers of a Hamiltonian) does not fit, and the backend
    refuses it too."""
    widest = WIDEST[cell]
    with pytest.raises(
        RuntimeError, match="hidden must be narrow enough for the shared memory of a block"
    ):
        run_rollout(_wide(cell, widest + (3 if cell == "hamiltonian" else 1)), "cuda")
    monkeypatch.undo()
    for width, accepted in ((widest, True), (widest + 1, False)):
        case = _wide(cell, width)
        inputs = prepare(case.states, case.cell, 2, actions=case.actions, output="last")
        sentence = f"hidden width of a {cell} must be at most {widest}, got {width}"
        reasons = OPS[OP_NAMES[cell]].reasons("cuda", inputs)
        assert (sentence not in map(str, reasons)) == accepted
