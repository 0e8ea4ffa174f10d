"""The SIMT executor itself: CUDA semantics on a CPU, and proof that planted faults are caught."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from tests.simt.build import ORDERS, SANITIZER_STATUS, build, configure, load, run_sanitized

PROBE = Path(__file__).with_name("probe.cu")


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


def open_probe(library: str | Path) -> ctypes.CDLL:
    probe = ctypes.CDLL(str(library))
    for name in ("block_sum", "warp_reverse", "mma", "mma_tf32", "half_warps", "count", "convert", "shared_bytes", "empty_grid"):
        getattr(probe, f"probe_{name}").restype = ctypes.c_char_p
    probe.probe_shared_bytes.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    return probe


def planted(**defines: int) -> ctypes.CDLL:
    return open_probe(build(PROBE, None, defines))


@pytest.fixture(scope="module")
def probe() -> ctypes.CDLL:
    return open_probe(build(PROBE))


@pytest.fixture(params=sorted(ORDERS))
def ordered(request: pytest.FixtureRequest, probe: ctypes.CDLL) -> ctypes.CDLL:
    configure(probe, request.param, seed=7)
    yield probe
    configure(probe)


def block_sum(probe: ctypes.CDLL, blocks: int = 3, threads: int = 96) -> tuple[bytes | None, np.ndarray, np.ndarray]:
    x = np.arange(blocks * threads, dtype=np.float32)
    out = np.zeros(blocks, np.float32)
    error = probe.probe_block_sum(pointer(x), pointer(out), blocks, threads)
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
    assert ordered.probe_warp_reverse(pointer(x), pointer(out)) is None
    np.testing.assert_array_equal(out, x[::-1])


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("is_fp16", [0, 1])
def test_mma_matches_a_matrix_product(ordered: ctypes.CDLL, is_fp16: int, transposed: int) -> None:
    rng = np.random.default_rng(3)
    a, b, c = rng.standard_normal((16, 16)), rng.standard_normal((16, 8)), np.zeros((16, 8), np.float32)
    if is_fp16:
        a, b = a.astype(np.float16), b.astype(np.float16)
        expected = a.astype(np.float64) @ b.astype(np.float64)
    else:
        a, b = bfloat16_bits(a), bfloat16_bits(b)
        expected = bfloat16_value(a).astype(np.float64) @ bfloat16_value(b).astype(np.float64)
    right = np.ascontiguousarray(b if transposed else b.T)
    assert ordered.probe_mma(pointer(a), pointer(right), pointer(c), is_fp16, transposed) is None
    np.testing.assert_allclose(c, expected, rtol=1e-5, atol=1e-5)


def test_tf32_mma_rounds_its_inputs(probe: ctypes.CDLL) -> None:
    rng = np.random.default_rng(4)
    a, b, c = rng.standard_normal((16, 8)).astype(np.float32), rng.standard_normal((8, 8)).astype(np.float32), np.zeros((16, 8), np.float32)
    assert probe.probe_mma_tf32(pointer(a), pointer(b), pointer(c)) is None
    exact = a.astype(np.float64) @ b.T.astype(np.float64)
    error = np.abs(c - exact).max()
    assert 1e-6 < error < 1e-2


def test_two_half_warps_run_their_own_collectives(ordered: ctypes.CDLL) -> None:
    x = np.arange(32, dtype=np.float32)
    out, votes = np.zeros(32, np.float32), np.zeros(32, np.uint32)
    assert ordered.probe_half_warps(pointer(x), pointer(out), pointer(votes)) is None
    np.testing.assert_array_equal(out[:16], np.full(16, x[:16].sum()))
    np.testing.assert_array_equal(out[16:], np.repeat([x[16:24].sum(), x[24:].sum()], 8))
    ballot = sum(1 << i for i in range(32) if i % 3 == 0)
    np.testing.assert_array_equal(votes, np.where(np.arange(32) < 16, ballot & 0xFFFF, ballot & 0xFFFF0000).astype(np.uint32))


def test_atomics_and_orders(ordered: ctypes.CDLL) -> None:
    counter, total, order = np.zeros(1, np.int32), np.zeros(1, np.float32), np.full(256, -1, np.int32)
    assert ordered.probe_count(pointer(counter), pointer(total), pointer(order), 4, 64) is None
    assert counter[0] == 256 and total[0] == 128
    np.testing.assert_array_equal(np.sort(order), np.arange(256))


def test_orders_differ(probe: ctypes.CDLL) -> None:
    seen = {}
    for name in ORDERS:
        configure(probe, name, seed=5, host_threads=1)
        counter, total, order = np.zeros(1, np.int32), np.zeros(1, np.float32), np.zeros(256, np.int32)
        assert probe.probe_count(pointer(counter), pointer(total), pointer(order), 4, 64) is None
        seen[name] = order.copy()
    configure(probe)
    np.testing.assert_array_equal(seen["forward"], np.arange(256))
    np.testing.assert_array_equal(seen["reverse"], np.arange(256)[::-1])
    assert not np.array_equal(seen["shuffled"], seen["forward"]) and not np.array_equal(seen["shuffled"], seen["reverse"])


def test_conversions_round_to_nearest_even(probe: ctypes.CDLL) -> None:
    rng = np.random.default_rng(6)
    special = [0.0, -0.0, np.inf, -np.inf, 1.00390625, 1.01171875, 65504.0, 65520.0, 6e-8, 1e-9, 3.4e38]
    x = np.concatenate([rng.standard_normal(500) * 10.0 ** rng.integers(-6, 6, 500), special]).astype(np.float32)
    bf16, fp16, back = np.zeros(x.size, np.uint16), np.zeros(x.size, np.uint16), np.zeros(x.size, np.float32)
    assert probe.probe_convert(pointer(x), pointer(bf16), pointer(fp16), pointer(back), x.size) is None
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16)
    np.testing.assert_array_equal(bf16, bfloat16_bits(x))
    np.testing.assert_array_equal(fp16, expected.view(np.uint16))
    np.testing.assert_array_equal(back, expected.astype(np.float32))


def test_launch_limits_are_checked(probe: ctypes.CDLL) -> None:
    x, out = np.arange(32, dtype=np.float32), np.zeros(32, np.float32)
    arguments = pointer(x), pointer(out)
    assert b"1 to 1024 threads" in probe.probe_block_sum(*arguments, 1, 2048)
    assert b"a grid must have" in probe.probe_empty_grid(*arguments)
    assert b"need jk::allow_dynamic_shared" in probe.probe_shared_bytes(*arguments, 64 * 1024, 0)
    assert b"at most 101376 bytes" in probe.probe_shared_bytes(*arguments, 128 * 1024, 1)
    assert probe.probe_shared_bytes(*arguments, 64 * 1024, 1) is None
    assert probe.probe_block_sum(*arguments, 1, 32) is None


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("PLANT_DIVERGENT_BARRIER", b"divergent barrier"),
        ("PLANT_EARLY_EXIT", b"threads have exited"),
        ("PLANT_TWO_BARRIERS", b"while others are at __syncthreads"),
        ("PLANT_OVERRUN", b"shared-memory overrun"),
    ],
)
@pytest.mark.parametrize("order", sorted(ORDERS))
def test_planted_fault_ends_the_launch_with_a_sentence(fault: str, sentence: bytes, order: str) -> None:
    probe = planted(**{fault: 1})
    configure(probe, order)
    error, _, _ = block_sum(probe)
    assert error is not None and sentence in error
    # The executor is usable after a failed launch.
    x, out = np.arange(32, dtype=np.float32), np.zeros(32, np.float32)
    assert probe.probe_warp_reverse(pointer(x), pointer(out)) is None


@pytest.mark.parametrize("fault", ["PLANT_MISSING_BARRIER", "PLANT_MISSING_WARP_SYNC", "PLANT_MISSING_WAIT"])
def test_planted_race_gives_wrong_numbers_in_some_order(fault: str) -> None:
    probe = planted(**{fault: 1})
    wrong = []
    for order in ORDERS:
        configure(probe, order)
        _, out, expected = block_sum(probe)
        x, reversed_x = np.arange(32, dtype=np.float32), np.zeros(32, np.float32)
        probe.probe_warp_reverse(pointer(x), pointer(reversed_x))
        one, c = np.full((16, 16), 0x3F80, np.uint16), np.zeros((16, 8), np.float32)
        probe.probe_mma(pointer(one), pointer(one), pointer(c), 0, 0)
        wrong.append(not (np.array_equal(out, expected) and np.array_equal(reversed_x, x[::-1]) and (c == 16).all()))
    assert any(wrong)


def run_probe(sanitizer: str, defines: Mapping[str, int]) -> tuple[int, str]:
    done = run_sanitized([str(Path(__file__)), str(build(PROBE, sanitizer, defines))], sanitizer)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("sanitizer", ["asan_ubsan", "tsan"])
def test_sanitizers_accept_correct_kernels(sanitizer: str) -> None:
    status, text = run_probe(sanitizer, {})
    assert status == 0 and "all right" in text, text


@pytest.mark.parametrize(
    ("sanitizer", "fault", "sentence"),
    [
        ("asan_ubsan", "PLANT_OVERRUN", "AddressSanitizer"),
        ("tsan", "PLANT_MISSING_BARRIER", "data race"),
        ("tsan", "PLANT_MISSING_WARP_SYNC", "data race"),
        ("tsan", "PLANT_EARLY_COPY", "data race"),
    ],
)
def test_sanitizers_catch_planted_faults(sanitizer: str, fault: str, sentence: str) -> None:
    status, text = run_probe(sanitizer, {fault: 1})
    assert status == SANITIZER_STATUS and sentence in text, text


def main(library: str) -> None:
    """What a sanitized child runs: every probe once."""
    probe = open_probe(library)
    error, out, expected = block_sum(probe)
    assert error is None and np.array_equal(out, expected), error
    x, out = np.arange(32, dtype=np.float32), np.zeros(32, np.float32)
    assert probe.probe_warp_reverse(pointer(x), pointer(out)) is None
    one, c = np.full((16, 16), 0x3F80, np.uint16), np.zeros((16, 8), np.float32)
    for transposed in (0, 1):
        assert probe.probe_mma(pointer(one), pointer(one), pointer(c), 0, transposed) is None
        assert (c == 16).all()
    counter, total, order = np.zeros(1, np.int32), np.zeros(1, np.float32), np.zeros(128, np.int32)
    assert probe.probe_count(pointer(counter), pointer(total), pointer(order), 2, 64) is None
    print("all right")


if __name__ == "__main__":
    main(sys.argv[1])
