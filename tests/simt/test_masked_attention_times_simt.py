"""csrc/masked_attention/cuda with times and windows on the SIMT executor: what sees what, and that
what is not seen is not read."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from jepa_kernels.testing import HEAD_DIMS, TIME_FAULTS, AttentionCase, attention_case
from tests.simt.attention_abi import SOURCE, describe, open_attention, run, values
from tests.simt.build import ORDERS, build, configure, take_counts
from tests.simt.test_masked_attention_simt import DTYPES, arguments, check, each_dtype

float32_and_bfloat16 = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return open_attention(build(SOURCE))


def assert_same_bits(actual: np.ndarray, expected: np.ndarray, message: str) -> None:
    np.testing.assert_array_equal(
        np.ascontiguousarray(actual).view(np.uint8),
        np.ascontiguousarray(expected).view(np.uint8),
        err_msg=message,
    )


@each_dtype
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_width_and_form(library, dtype, head_dim):
    shared = {"head_dim": head_dim, "dtype": dtype, "heads": 1}
    check(library, attention_case((100,), times="sorted", num_times=6, **shared))
    check(
        library,
        attention_case(
            (20, 0, 33),
            (77, 5, 0),
            packed=True,
            strided=True,
            slack=2,
            times="random",
            window=2,
            time_dtype=torch.int32,
            **shared,
        ),
        misaligned=True,
    )


@float32_and_bfloat16
@pytest.mark.parametrize(
    "kw",
    [
        {"lengths": (1,), "times": "random"},
        {"lengths": (190,), "times": "random", "num_times": 190},
        {"lengths": (190,), "times": "sorted", "num_times": 190, "window": 40},
        {"lengths": (190,), "times": "random", "num_times": 2, "window": 1},
        {"lengths": (64,), "times": "random", "num_times": 1, "grid": None},
        {"lengths": (20, 20), "lengths_k": (0, 0), "times": "random"},
        {"lengths": (0, 0), "lengths_k": (5, 5), "times": "random"},
        {"lengths": (0, 0), "packed": True, "times": "random", "slack": 3},
        {"lengths": (64, 65, 127, 1, 129), "packed": True, "times": "sorted", "window": 2},
        {"lengths": (150, 150), "times": "random", "window": 1, "heads": 2, "grid": None},
        {"lengths": tuple([2, 0, 1] * 14), "packed": True, "times": "random"},
        {"lengths": (90,), "times": "sorted", "scale": -0.3},
        {"lengths": (90,), "times": "random", "window": 2, "scale": 0.0},
        {"lengths": (90,), "times": "random", "window": 1, "magnitude": 2.0},
    ],
    ids=str,
)
def test_edges(library, kw, dtype):
    kw = {"heads": 1, **kw}
    scale = kw.pop("scale", None)
    check(library, replace(attention_case(dtype=dtype, **kw), scale=scale))


@float32_and_bfloat16
@pytest.mark.parametrize("times", ["sorted", "random"])
@pytest.mark.parametrize("lengths", [(20, 2300), (2300, 20)], ids=str)
def test_more_steps_than_a_warp_looks_at_together(library, dtype, times, lengths):
    """Windows that leave out runs of 32 steps, at the start, in between and at the end."""
    case = attention_case(
        lengths[:1], lengths[1:], head_dim=8, heads=1, dtype=dtype, times=times, num_times=2300
    )
    for window in (None, 30):
        check(library, replace(case, window=window))
    middle = torch.where(torch.arange(lengths[1]) // 100 % 11 == 7, 5, 9)
    query_times = torch.full((lengths[0],), 5)
    check(library, replace(case, query_times=query_times, key_times=middle))


@float32_and_bfloat16
@pytest.mark.parametrize("times_dtype", [torch.int32, torch.int64], ids=str)
def test_the_largest_and_the_smallest_time(library, times_dtype, dtype):
    extremes = torch.tensor([-(2**31), -(2**31) + 1, -1, 0, 2**31 - 2, 2**31 - 1])
    case = attention_case((48,), heads=1, head_dim=16, dtype=dtype)
    for times in (extremes.repeat(8), extremes.repeat_interleave(8)):
        for window in (None, 1, 2, 2**32 - 1):
            times = times.to(times_dtype)
            check(library, replace(case, query_times=times, key_times=times, window=window))


@each_dtype
def test_queries_that_see_nothing(library, dtype):
    """Output 0, lse -inf and gradient 0, beside queries that see something and alone."""
    case = attention_case((70,), (50,), head_dim=16, heads=1, dtype=dtype)
    query_times, key_times = torch.arange(70) % 7, torch.full((50,), 3)
    case = replace(case, query_times=query_times, key_times=key_times, window=2)
    check(library, case)

    def found(case: AttentionCase) -> dict[str, np.ndarray]:
        given = arguments(case)
        return {n: values(a, str(given["dtype"])) for n, a in run(library, given).items()}

    result = found(case)
    blind = ((query_times < 3) | (query_times >= 5)).numpy()
    for name in ("out", "grad_query"):
        assert (result[name][:, blind] == 0).all() and (result[name][:, ~blind] != 0).any(), name
    assert (result["lse"][:, :, blind] == -np.inf).all()
    for name, array in found(replace(case, query_times=torch.zeros_like(query_times))).items():
        assert (array == (-np.inf if name == "lse" else 0)).all(), name


@each_dtype
@pytest.mark.parametrize("times", ["sorted", "random"])
def test_the_future_cannot_change_the_past(library, dtype, times):
    """Other tokens after a time leave outputs, lse and query gradients up to it alone, bit for
    bit."""
    case = attention_case((170,), head_dim=64, heads=1, dtype=dtype, times=times, num_times=6)
    last = case.query_times if case.query_times.ndim == 1 else case.query_times[0]
    case = replace(case, query_times=last, key_times=last)
    past = (last <= 3).numpy()
    given = arguments(case)
    changed = dict(given)
    for name in ("query", "key", "value", "grad_out"):
        changed[name] = given[name].copy()
        changed[name][:, ~past] = given[name][:, ::-1][:, ~past]
    before, after = run(library, given), run(library, changed)
    for name in ("out", "grad_query"):
        assert_same_bits(before[name][:, past], after[name][:, past], name)
    assert_same_bits(before["lse"][..., past], after["lse"][..., past], "lse")
    assert not np.array_equal(before["out"], after["out"])


@each_dtype
def test_frame_causal_equals_a_call_for_each_prefix(library, dtype):
    """Outputs and lse, to the bit: what is masked or skipped is as good as absent."""
    frames, frame = 5, 37
    case = attention_case((frames * frame,), head_dim=64, heads=1, dtype=dtype)
    times = torch.arange(frames * frame) // frame
    given = arguments(case)
    whole = run(library, arguments(replace(case, query_times=times, key_times=times)), False)
    for n in range(frames):
        own, past = slice(n * frame, (n + 1) * frame), slice((n + 1) * frame)
        part = dict(given)
        for name in ("query", "grad_out", "ids_q"):
            part[name] = given[name][:, own]
        for name in ("key", "value", "ids_k"):
            part[name] = given[name][:, past]
        prefix = run(library, part, backward=False)
        assert_same_bits(whole["out"][:, own], prefix["out"], f"out of frame {n}")
        assert_same_bits(whole["lse"][..., own], prefix["lse"], f"lse of frame {n}")


@each_dtype
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_one_time_is_no_mask_and_a_window_over_all_times_is_causal(library, dtype, packed):
    case = attention_case((70, 70), packed=packed, head_dim=64, heads=1, dtype=dtype)
    same = torch.full((140,) if packed else (2, 70), 7)
    plain = run(library, arguments(case))
    timed = run(library, arguments(replace(case, query_times=same, key_times=same)))
    for name, array in timed.items():
        assert_same_bits(array, plain[name], name)
    drawn = same + torch.arange(70).repeat(2).view(same.shape) * 5 % 9
    case = replace(case, query_times=drawn, key_times=drawn)
    causal, windowed = (run(library, arguments(replace(case, window=w))) for w in (None, 9))
    for name, array in windowed.items():
        assert_same_bits(array, causal[name], name)


@pytest.mark.parametrize("head_dim", [32, 64, 88])
@each_dtype
def test_thread_and_block_order_change_nothing(library, dtype, head_dim):
    case = attention_case(
        (70, 3, 0, 40),
        (33, 90, 5, 1),
        packed=True,
        head_dim=head_dim,
        heads=1,
        dtype=dtype,
        times="random",
        window=2,
    )
    results = {}
    for order in ORDERS:
        configure(library, order, seed=11)
        results[order] = run(library, arguments(case))
    configure(library)
    for order in ORDERS:
        for name, array in results[order].items():
            assert_same_bits(array, results["forward"][name], f"{name} {order}")


def copied(library: ctypes.CDLL, given: dict[str, np.ndarray]) -> int:
    """Bytes that the forward kernel copies to shared memory."""
    take_counts(library)
    run(library, given, backward=False)
    return take_counts(library).async_bytes


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize(("dtype", "queries", "keys"), [("bfloat16", 128, 64), ("float32", 64, 32)])
def test_tiles_that_cannot_meet_are_not_read(library, dtype, queries, keys, window):
    """Sorted tokens: a block reads exactly the steps of keys of which some query sees one."""
    n, head_dim, frame = 448, 64, 50
    times = torch.arange(n) // frame
    case = attention_case((n,), head_dim=head_dim, heads=1, grid=None, dtype=DTYPES[dtype])
    time_of = times.numpy()
    seen = time_of[None] <= time_of[:, None]
    if window is not None:
        seen &= time_of[None] > time_of[:, None] - window
    steps = sum(
        seen[q : q + queries, k : k + keys].any()
        for q in range(0, n, queries)
        for k in range(0, n, keys)
    )
    a_step = 2 * keys * head_dim * torch.finfo(DTYPES[dtype]).bits // 8
    timed = arguments(replace(case, query_times=times, key_times=times, window=window))
    assert copied(library, timed) == steps * a_step
    plain = copied(library, arguments(case))
    assert plain == -(-n // queries) * (n // keys) * a_step > steps * a_step


@pytest.mark.parametrize(("grid", "forward"), [(None, 1), ((3, 4, 5), 2)], ids=["plain", "rope"])
@each_dtype
def test_times_need_the_preparation_and_no_launch_more(library, dtype, grid, forward):
    case = attention_case((20, 9), packed=True, grid=grid, head_dim=16, dtype=dtype)
    times = torch.arange(29) % 4
    for chosen, launches in (
        (case, (forward, 2)),
        (replace(case, query_times=times, key_times=times), (2, 2)),
    ):
        take_counts(library)
        run(library, arguments(chosen), backward=False)
        assert take_counts(library).launches == launches[0]
        run(library, arguments(chosen))
        assert take_counts(library).launches == sum(launches)


@float32_and_bfloat16
@pytest.mark.parametrize("offsets", [(0, 10, 20, 37), (-5, 900, 20, 37), (2**40, -(2**40), 0, 0)])
def test_bad_times_and_offsets_stay_inside_the_tensors(library, dtype, offsets):
    """Times are cut at 32 bits; a sanitized run checks reads."""
    case = arguments(attention_case((10, 10, 17), packed=True, dtype=dtype, cu_dtype=torch.int64))
    case["cu_q"], case["cu_k"] = np.array(offsets, np.int64), np.array(offsets[::-1], np.int64)
    case["times_q"] = np.where(np.arange(37) % 2, 2**62, -(2**62))
    case["times_k"] = case["times_q"][::-1]
    run(library, case)


def faulty(case: AttentionCase, fault: str) -> AttentionCase:
    step = 1 if fault in ("late_query", "wide_window") else -1
    if fault.endswith("query"):
        return replace(case, query_times=case.query_times + step)
    return replace(case, window=case.window + step)


@each_dtype
@pytest.mark.parametrize("fault", TIME_FAULTS)
def test_a_mask_that_is_off_by_one_is_seen(library, monkeypatch, fault, dtype):
    case = attention_case(
        (60,), times="sorted", num_times=6, window=2, heads=1, head_dim=16, dtype=dtype
    )
    check(library, case)
    wrong = arguments(faulty(case, fault))
    monkeypatch.setattr("tests.simt.test_masked_attention_simt.arguments", lambda _: wrong)
    with pytest.raises(AssertionError, match=r"error|finite|differ"):
        check(library, case)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda p: setattr(p, "window", -1), "window must be from 0 to 4294967295"),
        (lambda p: setattr(p, "window", 2**32), "window must be from 0 to 4294967295"),
        (lambda p: setattr(p.times_k, "data", None), "key_times must be given exactly with"),
    ],
    ids=["negative", "wide", "half"],
)
@pytest.mark.parametrize("name", ["fwd", "bwd"])
def test_refusals(library, change: Callable, sentence, name):
    inputs = arguments(attention_case((5,), times="random"))
    p = describe(inputs)
    change(p)
    got = getattr(library, f"jk_masked_attention_cuda_{name}")(p, None).decode()
    assert got.startswith("masked_attention: ") and sentence in got and got.endswith(".")
