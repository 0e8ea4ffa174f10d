"""The SIMT executor itself: CUDA semantics on a CPU, and proof that planted faults are caught."""

from __future__ import annotations

import ctypes
import sys
from enum import IntEnum
from pathlib import Path

import numpy as np
import pytest

from jepa_kernels.testing import FLOAT32, TF32_PRODUCTS
from tests.simt.build import (
    ORDERS,
    SANITIZER_STATUS,
    build,
    configure,
    limit_shared,
    run_sanitized,
    take_counts,
)

PROBE = Path(__file__).with_name("probe.cu")


class Fault(IntEnum):
    """The faults that probe.cu can plant, in its order."""

    NONE = 0
    DIVERGENT_BARRIER = 1
    EARLY_EXIT = 2
    TWO_BARRIERS = 3
    OVERRUN = 4
    MISSING_BARRIER = 5
    MISSING_WARP_SYNC = 6
    MISSING_WAIT = 7
    EARLY_COPY = 8


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


def open_probe(library: str | Path) -> ctypes.CDLL:
    probe = ctypes.CDLL(str(library))
    for name in (
        "block_sum",
        "warp_reverse",
        "mma",
        "mma_tf32",
        "half_warps",
        "count",
        "convert",
        "shared_bytes",
        "empty_grid",
    ):
        getattr(probe, f"probe_{name}").restype = ctypes.c_char_p
    probe.probe_shared_bytes.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int,
    ]
    return probe


@pytest.fixture(scope="module")
def probe() -> ctypes.CDLL:
    return open_probe(build(PROBE))


@pytest.fixture(params=sorted(ORDERS))
def ordered(request: pytest.FixtureRequest, probe: ctypes.CDLL) -> ctypes.CDLL:
    configure(probe, request.param, seed=7)
    yield probe
    configure(probe)


def block_sum(
    probe: ctypes.CDLL, fault: Fault = Fault.NONE, blocks: int = 3, threads: int = 96
) -> tuple[bytes | None, np.ndarray, np.ndarray]:
    x = np.arange(blocks * threads, dtype=np.float32)
    out = np.zeros(blocks, np.float32)
    error = probe.probe_block_sum(pointer(x), pointer(out), blocks, threads, int(fault))
    return error, out, x.reshape(blocks, threads).sum(1)


def bfloat16_bits(x: np.ndarray) -> np.ndarray:
    u = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((u + 0x7FFF + (u >> 16 & 1)) >> 16).astype(np.uint16)


def bfloat16_value(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def test_block_reduction_in_every_order(ordered: ctypes.CDLL) -> None:
    error, out, expected = block_sum(ordered)
    assert error is None
    np.testing.assert_array_equal(out, expected)


def test_warp_reverse_in_every_order(ordered: ctypes.CDLL) -> None:
    x, out = np.arange(32, dtype=np.float32), np.zeros(32, np.float32)
    assert ordered.probe_warp_reverse(pointer(x), pointer(out), 0) is None
    np.testing.assert_array_equal(out, x[::-1])


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("is_fp16", [0, 1])
def test_mma_matches_a_matrix_product(ordered: ctypes.CDLL, is_fp16: int, transposed: int) -> None:
    rng = np.random.default_rng(3)
    a, b, c = (
        rng.standard_normal((16, 16)),
        rng.standard_normal((16, 8)),
        np.zeros((16, 8), np.float32),
    )
    if is_fp16:
        a, b = a.astype(np.float16), b.astype(np.float16)
        expected = a.astype(np.float64) @ b.astype(np.float64)
    else:
        a, b = bfloat16_bits(a), bfloat16_bits(b)
        expected = bfloat16_value(a).astype(np.float64) @ bfloat16_value(b).astype(np.float64)
    right = np.ascontiguousarray(b if transposed else b.T)
    assert ordered.probe_mma(pointer(a), pointer(right), pointer(c), is_fp16, transposed, 0) is None
    np.testing.assert_allclose(c, expected, **FLOAT32)


def test_tf32_mma_rounds_its_inputs(probe: ctypes.CDLL) -> None:
    rng = np.random.default_rng(4)
    a, b, c = (
        rng.standard_normal((16, 8)).astype(np.float32),
        rng.standard_normal((8, 8)).astype(np.float32),
        np.zeros((16, 8), np.float32),
    )
    assert probe.probe_mma_tf32(pointer(a), pointer(b), pointer(c)) is None
    exact = a.astype(np.float64) @ b.T.astype(np.float64)
    error = np.abs(c - exact).max()
    assert 1e-6 < error < TF32_PRODUCTS["atol"]


def test_two_half_warps_run_their_own_collectives(ordered: ctypes.CDLL) -> None:
    x = np.arange(32, dtype=np.float32)
    out, votes = np.zeros(32, np.float32), np.zeros(32, np.uint32)
    assert ordered.probe_half_warps(pointer(x), pointer(out), pointer(votes)) is None
    np.testing.assert_array_equal(out[:16], np.full(16, x[:16].sum()))
    np.testing.assert_array_equal(out[16:], np.repeat([x[16:24].sum(), x[24:].sum()], 8))
    ballot = sum(1 << i for i in range(32) if i % 3 == 0)
    np.testing.assert_array_equal(
        votes, np.where(np.arange(32) < 16, ballot & 0xFFFF, ballot & 0xFFFF0000).astype(np.uint32)
    )


def test_atomics_and_orders(ordered: ctypes.CDLL) -> None:
    counter, total, order = (
        np.zeros(1, np.int32),
        np.zeros(1, np.float32),
        np.full(256, -1, np.int32),
    )
    assert ordered.probe_count(pointer(counter), pointer(total), pointer(order), 4, 64) is None
    assert counter[0] == 256
    assert total[0] == 128
    np.testing.assert_array_equal(np.sort(order), np.arange(256))


def test_orders_differ(probe: ctypes.CDLL) -> None:
    seen = {}
    for name in ORDERS:
        configure(probe, name, seed=5, host_threads=1)
        counter, total, order = (
            np.zeros(1, np.int32),
            np.zeros(1, np.float32),
            np.zeros(256, np.int32),
        )
        assert probe.probe_count(pointer(counter), pointer(total), pointer(order), 4, 64) is None
        seen[name] = order.copy()
    configure(probe)
    np.testing.assert_array_equal(seen["forward"], np.arange(256))
    np.testing.assert_array_equal(seen["reverse"], np.arange(256)[::-1])
    assert not np.array_equal(seen["shuffled"], seen["forward"])
    assert not np.array_equal(seen["shuffled"], seen["reverse"])


def test_conversions_round_to_nearest_even(probe: ctypes.CDLL) -> None:
    rng = np.random.default_rng(6)
    special = [
        0.0,
        -0.0,
        np.inf,
        -np.inf,
        1.00390625,
        1.01171875,
        65504.0,
        65520.0,
        6e-8,
        1e-9,
        3.4e38,
    ]
    x = np.concatenate(
        [rng.standard_normal(500) * 10.0 ** rng.integers(-6, 6, 500), special]
    ).astype(np.float32)
    bf16, fp16, back = (
        np.zeros(x.size, np.uint16),
        np.zeros(x.size, np.uint16),
        np.zeros(x.size, np.float32),
    )
    assert (
        probe.probe_convert(pointer(x), pointer(bf16), pointer(fp16), pointer(back), x.size) is None
    )
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16)
    np.testing.assert_array_equal(bf16, bfloat16_bits(x))
    np.testing.assert_array_equal(fp16, expected.view(np.uint16))
    np.testing.assert_array_equal(back, expected.astype(np.float32))


def test_launch_limits_are_checked(probe: ctypes.CDLL) -> None:
    x, out = np.arange(32, dtype=np.float32), np.zeros(32, np.float32)
    arguments = pointer(x), pointer(out)
    assert b"1 to 1024 threads" in probe.probe_block_sum(*arguments, 1, 2048, 0)
    assert b"a grid must have" in probe.probe_empty_grid(*arguments)
    assert b"need jk::allow_dynamic_shared" in probe.probe_shared_bytes(*arguments, 64 * 1024, 0)
    assert b"at most 101376 bytes" in probe.probe_shared_bytes(*arguments, 128 * 1024, 1)
    assert probe.probe_shared_bytes(*arguments, 64 * 1024, 1) is None
    limit_shared(probe, 227)
    take_counts(probe)
    assert probe.probe_shared_bytes(*arguments, 128 * 1024, 1) is None
    assert b"at most 232448 bytes" in probe.probe_shared_bytes(*arguments, 228 * 1024, 1)
    limit_shared(probe)
    assert take_counts(probe)[:2] == (1, 128 * 1024)
    assert b"at most 101376 bytes" in probe.probe_shared_bytes(*arguments, 128 * 1024, 1)
    assert probe.probe_block_sum(*arguments, 1, 32, 0) is None


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (Fault.DIVERGENT_BARRIER, b"divergent barrier"),
        (Fault.EARLY_EXIT, b"threads have exited"),
        (Fault.TWO_BARRIERS, b"while others are at __syncthreads"),
        (Fault.OVERRUN, b"shared-memory overrun"),
    ],
)
def test_planted_fault_ends_the_launch_with_a_sentence(
    ordered: ctypes.CDLL, fault: Fault, sentence: bytes
) -> None:
    error, _, _ = block_sum(ordered, fault)
    assert sentence in (error or b"")
    # The executor is usable after a failed launch.
    error, out, expected = block_sum(ordered)
    assert error is None
    np.testing.assert_array_equal(out, expected)


def results_are_right(probe: ctypes.CDLL, fault: Fault) -> bool:
    """Run the kernels in which a race can be planted and compare their results."""
    _, out, expected = block_sum(probe, fault)
    x, reversed_x = np.arange(32, dtype=np.float32), np.zeros(32, np.float32)
    probe.probe_warp_reverse(pointer(x), pointer(reversed_x), int(fault))
    one, c = np.full((16, 16), 0x3F80, np.uint16), np.zeros((16, 8), np.float32)
    probe.probe_mma(pointer(one), pointer(one), pointer(c), 0, 0, int(fault))
    return bool(
        np.array_equal(out, expected) and np.array_equal(reversed_x, x[::-1]) and (c == 16).all()
    )


@pytest.mark.parametrize(
    "fault", [Fault.MISSING_BARRIER, Fault.MISSING_WARP_SYNC, Fault.MISSING_WAIT]
)
def test_planted_race_gives_wrong_numbers_in_some_order(probe: ctypes.CDLL, fault: Fault) -> None:
    right = []
    for order in ORDERS:
        configure(probe, order)
        assert results_are_right(probe, Fault.NONE)
        right.append(results_are_right(probe, fault))
    configure(probe)
    assert not all(right)


def run_probe(sanitizer: str, fault: Fault) -> tuple[int, str]:
    done = run_sanitized(
        [str(Path(__file__)), str(build(PROBE, sanitizer)), str(int(fault))], sanitizer
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("sanitizer", ["asan_ubsan", "tsan"])
def test_sanitizers_accept_correct_kernels(sanitizer: str) -> None:
    status, text = run_probe(sanitizer, Fault.NONE)
    assert status == 0, text
    assert "all right" in text


@pytest.mark.parametrize(
    ("sanitizer", "fault", "sentence"),
    [
        ("asan_ubsan", Fault.OVERRUN, "AddressSanitizer"),
        ("tsan", Fault.MISSING_BARRIER, "data race"),
        ("tsan", Fault.MISSING_WARP_SYNC, "data race"),
        ("tsan", Fault.EARLY_COPY, "data race"),
    ],
)
def test_sanitizers_catch_planted_faults(sanitizer: str, fault: Fault, sentence: str) -> None:
    status, text = run_probe(sanitizer, fault)
    assert status == SANITIZER_STATUS, text
    assert sentence in text


def main(library: str, fault: int) -> None:
    """What a sanitized child runs: every kernel that can hold a fault."""
    if results_are_right(open_probe(library), Fault(fault)):
        print("all right")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
