"""latent_rollout's C++ CPU kernels through their C ABI: every instruction set, AVX-512 on an
emulation, sanitized, in any thread order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from jepa_kernels import native
from jepa_kernels.testing.rollout import (
    CELLS,
    RolloutCase,
    check_rollout,
    rollout_case,
    run_rollout,
)
from tests.native.attention_library import serial, threaded
from tests.native.rollout_harness import CpuOps, Fences, build, patch
from tests.native.rollout_library import ISAS, CpuLibrary
from tests.simt.build import ROOT, SANITIZER_STATUS, run_sanitized
from tests.simt.rollout_abi import run_on
from tests.simt.rollout_saved import Recorder

pytestmark = pytest.mark.usefixtures("one_thread")

OUTPUTS = ("states", "last", 1.0, 2.0, 2.5)
each_cell = pytest.mark.parametrize("cell", CELLS)


@pytest.fixture(scope="session")
def built(emulated_builds) -> Path:
    return build(emulated_builds)


@pytest.fixture(params=list(ISAS))
def library(request, built) -> CpuLibrary:
    return CpuLibrary(built, ISAS[request.param], serial())


@pytest.fixture
def use(monkeypatch) -> Callable[[CpuLibrary | Recorder], None]:
    """Lets the CPU backend run on a library, with every tensor between fences."""

    def chosen(library: CpuLibrary | Recorder) -> None:
        run_on(monkeypatch, "cpu", CpuOps(Fences(library)))
        dot_products = getattr(library, "isa", 0) == ISAS["avx512_bf16"]
        monkeypatch.setattr(native, "multiplies_bf16", lambda: dot_products)

    return chosen


@pytest.fixture
def dtype(library) -> torch.dtype:
    """That of the operands: AVX512_BF16 has kernels of its own for bfloat16, and those of AVX-512
    for float32."""
    return torch.bfloat16 if library.isa == ISAS["avx512_bf16"] else torch.float32


def poison(library: CpuLibrary) -> None:
    """Leaves NaN in the scratch of this thread, more than any case here needs: what a kernel has
    not written yet must not count."""
    start, sums = (
        torch.full((48, 4096), torch.nan),
        torch.zeros(49, 4096),
    )  # a row to spare: one fault here is to write it
    library.call("mlp_fwd", rows=48, hidden=4096, horizon=1, kept=1, start=start, sums=sums)
    assert sums[:48].isnan().all()


@pytest.fixture
def check(use, library) -> Callable[[RolloutCase], None]:
    use(library)

    def checked(case: RolloutCase) -> None:
        poison(library)
        check_rollout(case, "cpu")

    return checked


@each_cell
@pytest.mark.parametrize("output", OUTPUTS)
def test_matches_the_reference(check, dtype, cell, output):
    check(rollout_case(cell, output, dtype=dtype))


# `width`: of the hidden layer, and for a GRU of its state.
SHAPES = (
    {"rows": 0},
    {"rows": 1, "horizon": 1},
    {"rows": 49, "width": 15, "action_channels": 1},
    {"rows": 97, "width": 17, "horizon": 2, "action_channels": 16},
    {"rows": 49, "width": 1},
    {
        "rows": 49,
        "width": 1,
        "magnitude": 100.0,
    },  # a GRU's LayerNorm: no variance, however large the mean
    {"rows": 3, "width": 16, "action_channels": 40},
    {"rows": 11, "width": 33, "action_channels": 33},
    {"rows": 7, "width": 136},
    {"rows": 13, "width": 300, "horizon": 2},
    {"rows": 5, "width": 530, "horizon": 2},
    {"gathered": False, "strided": True},
    {"magnitude": 6.0},
)


def shaped(cell: str, output: str | float, width: int | None = None, **options) -> RolloutCase:
    if width is not None:
        # As many channels as hidden units, so that each width is also one of a readout: a
        # Hamiltonian has two halves.
        if cell == "gru" or width < 200:
            options["channels"] = 2 * width if cell == "hamiltonian" else width
        options |= {"hidden": width, "split": width >= 6}
    return rollout_case(cell, output, **options)


@each_cell
@pytest.mark.parametrize(
    "options", SHAPES, ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items())
)
def test_shapes_and_layouts(check, dtype, cell, options):
    if dtype == torch.bfloat16 and options.get("width") == 1 and cell != "gru":
        pytest.skip("a budget of means says nothing of a gradient with one element")
    # An absolute error's gradient jumps where a residual is about 0, which rounded products move:
    # the error of one such row would count.
    for output in ("states", 1.0 if dtype == torch.float32 else 2.0):
        check(shaped(cell, output, **options, dtype=dtype))


@each_cell
def test_same_bits_for_any_number_of_threads_and_order_of_tiles(use, library, dtype, cell):
    use(library)
    for output in ("states", "last", 1.0):
        case = rollout_case(
            cell, output, rows=131, channels=70, hidden=40, action_channels=9, dtype=dtype
        )
        library.parallel_for = serial()
        poison(library)
        expected = run_rollout(case, "cpu")
        for parallel_for in (serial(3), serial(5, lambda pieces: pieces[::-1]), threaded(3)):
            library.parallel_for = parallel_for
            for name, tensor in run_rollout(case, "cpu").items():
                assert torch.equal(tensor, expected[name]), name


def test_same_bits_in_any_company(library, dtype):
    """A row gives the same alone, in another place of another tile, and whatever its neighbours
    are."""
    ops, rows, width, some = CpuOps(Fences(library)), 61, 33, torch.tensor([60, 2, 47])
    start, square, vector = (
        torch.randn(rows, width),
        (torch.randn(width, width) / 6).to(dtype),
        torch.randn(width),
    )
    gates = [torch.randn(3 * width, n).to(dtype) for n in (9, width)] + [
        *torch.randn(2, 3 * width),
        *torch.randn(2, width),
    ]
    actions, grads = torch.randn(3, rows, 9), torch.randn(3, rows, width)

    def everything(rows: torch.Tensor) -> list[torch.Tensor]:
        """Tensors [steps, rows, width]."""
        inputs, sums = ops.latent_rollout_mlp_fwd(start[rows], square, vector, 3, True, True, -1)
        results = [inputs, sums, *ops.latent_rollout_mlp_bwd(inputs, square, grads[:, rows], -1)]
        layers = (square, vector, vector[None], square)
        inputs, sums = ops.latent_rollout_hamiltonian_fwd(
            start[rows], *layers, 0.1, 3, True, True, -1
        )
        carried = grads[1][rows]
        ops.latent_rollout_hamiltonian_bwd(
            inputs[0], *layers, 0.1, True, grads[0][rows], carried, -1
        )
        results += [inputs, sums.flatten(0, 1), carried[None]]
        states, saved = ops.latent_rollout_gru_fwd(
            start[rows], actions[:, rows], gates, 1e-5, True, True, -1
        )
        of_gates, of_start, _, of_actions, _ = ops.latent_rollout_gru_bwd(
            start[rows], actions[:, rows], states, saved, gates, 1e-5, grads[:, rows], True, -1
        )
        return [*results, states, of_gates, of_start[None], of_actions]

    for i, (alone, together) in enumerate(
        zip(everything(some), everything(torch.arange(rows)), strict=True)
    ):
        assert together.isfinite().all() and torch.equal(alone, together[:, some]), i


def test_gradient_of_errors_is_the_same_with_and_without_signs(library, dtype):
    ops = CpuOps(Fences(library))
    steps, rows, hidden, channels = 2, 49, 20, 45
    sums, weight = torch.randn(steps, rows, hidden), torch.randn(channels, hidden).mT.to(dtype)
    bias, base = (
        torch.randint(-8, 9, (channels,)) / 8,
        (torch.randint(-8, 9, (rows, channels)) / 8).to(dtype),
    )
    targets, grad_errors = torch.randn(steps, rows, channels).to(dtype), torch.randn(steps, rows)
    targets[0, :, 7] = torch.nan
    sums[1, 3] = 0.0
    targets[1, 3] = base[3] + 2 * bias  # no residual: neither sign
    errors, signs = ops.latent_rollout_errors(
        sums, weight, bias, base, None, targets, None, 1.0, True, -1
    )
    assert errors[0].isnan().all() and (errors[1, 3] == 0)
    results = {}
    for saved in (signs, None):
        grad_base = torch.zeros(rows, channels)
        grad = ops.latent_rollout_errors_gradient(
            sums, weight, bias, base, None, targets, None, 1.0, saved, 1, grad_errors, grad_base, -1
        )
        results[saved is None] = grad, grad_base
    known = (
        torch.arange(channels) != 7
    )  # a NaN has neither sign, but a NaN for a gradient where residuals are formed again
    for with_signs, without in zip(results[False], results[True], strict=True):
        assert torch.equal(with_signs[..., known], without[..., known])
    assert (results[False][0][1, 3] == 0).all()


def test_refuses_an_instruction_set_that_is_not_there(built):
    library = CpuLibrary(built, 7, serial())
    with pytest.raises(
        RuntimeError, match="latent_rollout: isa must be one that this processor has"
    ):
        poison(library)


@pytest.mark.parametrize(
    ("isa", "dtype"), (("avx512", torch.bfloat16), ("avx512_bf16", torch.float16))
)
def test_refuses_products_that_an_instruction_set_lacks(built, isa, dtype):
    ops = CpuOps(CpuLibrary(built, ISAS[isa], serial()))
    square, vector = torch.randn(3, 3), torch.randn(3)
    with pytest.raises(
        RuntimeError, match="latent_rollout: operand must be float32, or bfloat16 on AVX512_BF16"
    ):
        ops.latent_rollout_mlp_fwd(square, square.to(dtype), vector, 2, True, False, -1)


EDGE = "memset(before, 0, sizeof(float) * 5 * wide);"
# Fault: the cell and options that show it, the file, what stands there and what is put in its
# place.
FAULTS = {
    "a step without its drift": (
        "residual_mlp",
        {},
        "mlp.h",
        "V::add(left, V::load(drift + c))",
        "left",
    ),
    "a half-step the wrong way": (
        "hamiltonian",
        {},
        "hamiltonian.h",
        "which ? -p.time_step : p.time_step",
        "p.time_step",
    ),
    "gates with the bias of one": (
        "gru",
        {},
        "gru.h",
        "p.bias_state + g * d, d",
        "p.bias_state, d",
    ),
    "old numbers beyond the edge": ("gru", {}, "gru.h", EDGE, ""),
    "sums that start with old ones": (
        "residual_mlp",
        {},
        "mlp.h",
        "memset(sum, 0, sizeof(float) * count);",
        "",
    ),
    "negative signs from the positive": (
        "residual_mlp",
        {"output": 1.0},
        "readout.h",
        "negate<V>(residual[0])",
        "residual[0]",
    ),
    "a step of the depth twice": (
        "residual_mlp",
        {"hidden": 300},
        "multiply.h",
        "panel += step * kColumns;",
        "",
    ),
    "every tile the first piece": (
        "gru",
        {"rows": 49},
        "gru.h",
        "p.grad_norm + piece * 2 * d",
        "p.grad_norm",
    ),
    "a row too many": (
        "hamiltonian",
        {},
        "tile.h",
        "r < rows; ++r) memcpy(to",
        "r <= rows; ++r) memcpy(to",
    ),
}


def with_fault(name: str, folder: Path, copy: Path, sanitizer: str | None = None) -> Path:
    return build(folder, sanitizer, {"portable": patch(copy, *FAULTS[name][2:])})


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_kernel_is_noticed(use, emulated_builds, built, tmp_path, fault):
    cell, options, *_ = FAULTS[fault]
    case = rollout_case(cell, **options)
    sound, broken = (
        CpuLibrary(built, 0, serial()),
        CpuLibrary(with_fault(fault, emulated_builds, tmp_path), 0, serial()),
    )
    use(sound)
    poison(sound)
    check_rollout(case, "cpu")
    use(broken)
    poison(broken)
    with pytest.raises(AssertionError):
        check_rollout(case, "cpu")


def save_calls(library: CpuLibrary, dtype: torch.dtype, folder: Path) -> Path:
    """Every kernel, with a tile that is full and one that is not, no rows at all, and a product in
    steps."""
    recorder = Recorder(library)
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_on(monkeypatch, "cpu", CpuOps(recorder))
        monkeypatch.setattr(native, "multiplies_bf16", lambda: dtype == torch.bfloat16)
        for cell in CELLS:
            for case in (
                rollout_case(
                    cell,
                    "last",
                    rows=49,
                    channels=18,
                    hidden=33,
                    horizon=2,
                    action_channels=1,
                    dtype=dtype,
                ),
                rollout_case(
                    cell,
                    1.0,
                    rows=50,
                    channels=34,
                    hidden=15,
                    horizon=2,
                    action_channels=16,
                    dtype=dtype,
                ),
                rollout_case(cell, 2.5, rows=0, dtype=dtype),
            ):
                run_rollout(case, "cpu")
        run_rollout(
            rollout_case(
                "residual_mlp", 2.5, rows=5, channels=9, hidden=600, horizon=2, dtype=dtype
            ),
            "cpu",
        )
    path = folder / "calls.npz"
    np.savez(path, **recorder.arrays)
    return path


@pytest.fixture(scope="module")
def saved_calls(built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_calls(
        CpuLibrary(built, ISAS["avx2"], serial()), torch.float32, tmp_path_factory.mktemp("calls")
    )


def replay(library: Path, calls: Path, sanitizer: str, isas: str, *more: str):
    return run_sanitized(
        [
            str(ROOT / "tests" / "native" / "rollout_sanitized.py"),
            str(library),
            str(calls),
            isas,
            *more,
        ],
        sanitizer,
    )


@pytest.mark.parametrize(
    ("sanitizer", "isas"), (("asan_ubsan", "portable,avx2,avx512"), ("tsan", "portable,avx2"))
)
def test_sanitizers_find_nothing(emulated_builds, saved_calls, sanitizer, isas):
    library = build(emulated_builds, sanitizer)
    done = replay(library, saved_calls, sanitizer, isas)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("calls agree") == 2 * (1 + isas.count(","))
    if sanitizer == "tsan":
        # The same run with tiles that overlap, or finding nothing would prove nothing.
        done = replay(library, saved_calls, sanitizer, "portable", "overlap")
        assert done.returncode == SANITIZER_STATUS and "data race" in done.stderr, done.stderr[
            -4000:
        ]


def test_address_sanitizer_finds_nothing_in_bfloat16_kernels(emulated_builds, built, tmp_path):
    calls = save_calls(CpuLibrary(built, ISAS["avx512_bf16"], serial()), torch.bfloat16, tmp_path)
    done = replay(build(emulated_builds, "asan_ubsan"), calls, "asan_ubsan", "avx512_bf16")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("calls agree") == 2


def test_address_sanitizer_notices_a_row_too_many(emulated_builds, tmp_path, saved_calls):
    done = replay(
        with_fault("a row too many", emulated_builds, tmp_path, "asan_ubsan"),
        saved_calls,
        "asan_ubsan",
        "portable",
    )
    assert done.returncode == SANITIZER_STATUS and "heap-buffer-overflow" in done.stderr, (
        done.stderr[-4000:]
    )
