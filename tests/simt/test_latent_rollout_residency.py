"""Which matrices the CUDA kernels of latent_rollout keep in shared memory, and that it changes no
bit of a result."""

from __future__ import annotations

import pytest
import torch

from jepa_kernels.testing.rollout import CELLS, check_rollout, rollout_case, run_rollout
from tests.simt.build import ORDERS, Counts, build, configure, limit_shared, take_counts
from tests.simt.rollout_abi import Library, SimtOps, run_cuda_on

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(scope="module")
def library() -> Library:
    return Library(build("csrc/latent_rollout/cuda/launch.cu"))


@pytest.fixture(autouse=True)
def _on_the_executor(monkeypatch: pytest.MonkeyPatch, library: Library):
    run_cuda_on(monkeypatch, library)
    yield
    configure(library.library)
    limit_shared(library.library)


def launch(library: Library, kernel: str, width: int, dtype: torch.dtype, horizon: int) -> Counts:
    """What one block does in one launch over so many steps; all matrices are `width` wide."""
    ops, matrix = SimtOps(library), torch.zeros(width, width, dtype=dtype)
    start, bias, sums = torch.zeros(2, width), torch.zeros(width), torch.zeros(horizon, 2, width)
    weights = [
        torch.zeros(3 * width, 4, dtype=dtype),
        torch.zeros(3 * width, width, dtype=dtype),
        *[torch.zeros(3 * width)] * 2,
        bias,
        bias,
    ]
    take_counts(library.library)
    if kernel == "residual_mlp":
        ops.latent_rollout_mlp_fwd(start, matrix, bias, horizon, False, False, -1)
    elif kernel == "residual_mlp backward":
        ops.latent_rollout_mlp_bwd(sums, matrix, sums[:1], -1)
    elif kernel == "hamiltonian":
        ops.latent_rollout_hamiltonian_fwd(
            start, matrix, bias, bias, matrix, 0.1, horizon, False, False, -1
        )
    elif kernel == "gru":
        ops.latent_rollout_gru_fwd(
            start, torch.zeros(horizon, 2, 4), weights, 1e-5, False, False, -1
        )
    else:
        gates = torch.zeros(horizon, 2, 4 * width)
        ops.latent_rollout_gru_bwd(
            start, torch.zeros(horizon, 2, 4), sums, gates, weights, 1e-5, sums, True, -1
        )
    counts = take_counts(library.library)
    assert counts.launches == 1
    return counts


# Matrices of width x width numbers that a longer rollout reads again, for each step more: 0 means
# that all of them stay.
CHOICES = (
    ("residual_mlp", 256, BFLOAT16, 227, 0),
    ("residual_mlp", 256, BFLOAT16, 99, 1),
    ("residual_mlp", 128, BFLOAT16, 99, 0),
    ("residual_mlp", 128, FLOAT16, 99, 0),
    ("residual_mlp", 128, FLOAT32, 99, 0),
    ("residual_mlp", 256, FLOAT32, 227, 1),
    ("residual_mlp backward", 256, BFLOAT16, 227, 0),
    ("residual_mlp backward", 256, BFLOAT16, 99, 1),
    ("residual_mlp backward", 128, BFLOAT16, 99, 0),
    ("hamiltonian", 128, BFLOAT16, 99, 0),
    ("hamiltonian", 256, BFLOAT16, 99, 6),  # the weight four times, the coupling twice
    ("hamiltonian", 256, BFLOAT16, 227, 2),  # the weight stays, the coupling streams
    ("gru", 64, BFLOAT16, 99, 0),
    ("gru", 160, BFLOAT16, 99, 3),  # three gates
    ("gru", 160, BFLOAT16, 227, 0),
    ("gru backward", 64, BFLOAT16, 99, 0),
    ("gru backward", 160, BFLOAT16, 99, 3),
)


@pytest.mark.parametrize(
    ("kernel", "width", "dtype", "kibibytes", "read_again"),
    CHOICES,
    ids=lambda v: str(v).removeprefix("torch."),
)
def test_a_matrix_stays_where_it_fits(library, kernel, width, dtype, kibibytes, read_again):
    limit_shared(library.library, kibibytes)
    short, long = (launch(library, kernel, width, dtype, horizon).async_bytes for horizon in (3, 5))
    assert long - short == 2 * read_again * width * width * dtype.itemsize


def test_a_matrix_that_is_read_once_streams(library):
    """Keeping it would delay the first product until all of it is there."""
    used = {
        horizon: launch(library, "residual_mlp", 128, BFLOAT16, horizon).most_shared_bytes
        for horizon in (2, 3)
    }
    assert (
        used[3] - used[2] == 128 * (128 + 8) * 2 - 8 * 8 * 512
    )  # the padded matrix in the place of the ring


@pytest.mark.parametrize("kibibytes", (99, 227))
@pytest.mark.parametrize(
    ("kernel", "barriers"),
    (
        ("residual_mlp", 1),
        ("residual_mlp backward", 1),
        ("hamiltonian", 6),
        ("gru", 2),
        ("gru backward", 9),
    ),
)
def test_barriers_of_a_step(library, kernel, barriers, kibibytes):
    """One between two products, whether a matrix stays or streams; neither width nor depth adds to
    them."""
    limit_shared(library.library, kibibytes)
    for width in (40, 144):
        short, long = (
            launch(library, kernel, width, FLOAT32, horizon).barriers for horizon in (2, 4)
        )
        assert long - short == 2 * barriers


# The first limit makes every cell of these widths stream, with the short ring; in the last one
# everything stays.
WIDTHS = (
    ("residual_mlp", 135, 8),
    ("residual_mlp", 136, 70),
    ("hamiltonian", 101, 34),
    ("hamiltonian", 136, 8),
    ("gru", 8, 70),
    ("gru", 8, 121),
)


@pytest.mark.parametrize(("cell", "hidden", "channels"), WIDTHS)
@pytest.mark.parametrize(
    "dtype", (FLOAT32, BFLOAT16, FLOAT16), ids=("float32", "bfloat16", "float16")
)
def test_kept_and_streamed_results_are_the_same_bits(library, cell, hidden, channels, dtype):
    case = rollout_case(
        cell,
        "states",
        rows=17,
        hidden=hidden,
        channels=channels,
        horizon=3,
        dtype=dtype,
        gathered=False,
    )
    results, shared_bytes = {}, {}
    for kibibytes, order in zip((46, 99, 227), ORDERS, strict=True):
        limit_shared(library.library, kibibytes)
        configure(library.library, order, seed=3)
        take_counts(library.library)
        check_rollout(case, "cuda")
        shared_bytes[kibibytes] = take_counts(library.library).most_shared_bytes
        results[kibibytes] = run_rollout(case, "cuda")
    for name, tensor in results[46].items():
        assert torch.equal(tensor, results[99][name]) and torch.equal(tensor, results[227][name]), (
            name
        )
    assert shared_bytes[46] <= 46 * 1024 < shared_bytes[227]


def test_every_cell_is_in_the_tables():
    assert (
        {cell for cell, *_ in WIDTHS} == set(CELLS) == {choice[0].split()[0] for choice in CHOICES}
    )
