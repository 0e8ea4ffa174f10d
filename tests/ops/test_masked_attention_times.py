"""masked_attention with times and a window on every backend that runs here: what sees what, bit for
bit where that is promised."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_kernels import Rope3D, frame_times, masked_attention
from jepa_kernels.backend import OPS
from jepa_kernels.ops.masked_attention.inputs import NAME
from jepa_kernels.support import example
from jepa_kernels.testing import (
    FLOAT32,
    FLOAT32_DEEP,
    FLOAT32_LARGE_LOGITS,
    HEAD_DIMS,
    TIME_FAULTS,
    attention_case,
    check_attention,
    planted_fault,
    run_attention,
)
from tests.ops.test_masked_attention import RUNNABLE, check_large_logits

# Backends whose kernels do not read times yet: they refuse, which is tested below.
NOT_YET = ("flash",)
BACKENDS = [b for d, b in RUNNABLE if d == "cpu" and b not in NOT_YET]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
with_reference = pytest.mark.parametrize("backend", ["reference", *BACKENDS])
kernels = pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "torch"])
bounded = settings(max_examples=20, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)
windows = st.one_of(st.none(), st.integers(1, 6))
FRAMES, FRAME = 5, 23  # frames that fill no tile


def rows(n: int, generator: torch.Generator, heads: int = 2, head_dim: int = 24) -> torch.Tensor:
    return torch.randn(1, n, heads, head_dim, generator=generator)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, **FLOAT32)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_width_and_form(backend, dtype, head_dim):
    shared = {"head_dim": head_dim, "dtype": dtype, "heads": 1}
    check_attention(attention_case((150, 150), times="sorted", num_times=6, **shared), backend)
    check_attention(
        attention_case(
            (40, 40),
            (77, 77),
            strided=True,
            times="random",
            window=2,
            time_dtype=torch.int32,
            **shared,
        ),
        backend,
    )
    check_attention(
        attention_case(
            (70, 0, 33), (120, 5, 0), packed=True, slack=2, times="sorted", window=2, **shared
        ),
        backend,
    )


@each_backend
@pytest.mark.parametrize(
    "kw",
    [
        {"lengths": (1,), "times": "random"},
        {"lengths": (300,), "times": "random", "num_times": 300},
        {"lengths": (300,), "times": "sorted", "num_times": 300, "window": 40},
        {"lengths": (300,), "times": "random", "num_times": 2, "window": 1},
        {"lengths": (64,), "times": "random", "num_times": 1, "grid": None},
        {"lengths": (20, 20), "lengths_k": (0, 0), "times": "random"},
        {"lengths": (0, 0), "lengths_k": (5, 5), "times": "random"},
        {"lengths": (0, 0), "packed": True, "times": "random", "slack": 3},
        {"lengths": (90,), "times": "sorted", "scale": -0.3},
    ],
    ids=str,
)
def test_edges(backend, kw):
    kw = dict(kw)
    scale = kw.pop("scale", None)
    check_attention(replace(attention_case(**kw), scale=scale), backend)


@each_backend
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("magnitude", [4.0, 8.0])
def test_large_logits_stay_finite_and_accurate(backend, magnitude, window):
    for times in ("sorted", "random"):
        case = attention_case(
            (170,), magnitude=magnitude, head_dim=64, heads=1, times=times, window=window
        )
        check_large_logits(case, backend)


@each_backend
def test_logits_of_ten_thousand_pick_one_key(backend):
    case = attention_case((90,), magnitude=100.0, head_dim=64, times="random", window=3)
    result, oracle = run_attention(case, backend), run_attention(case, "reference", torch.float64)
    for name, tensor in result.named():
        known = torch.isfinite(getattr(oracle, name))
        assert torch.equal(torch.isfinite(tensor), known), name
    torch.testing.assert_close(result.out.double(), oracle.out, **FLOAT32_LARGE_LOGITS)


@each_backend
@pytest.mark.parametrize("times_dtype", [torch.int32, torch.int64], ids=str)
def test_the_largest_and_the_smallest_time(backend, times_dtype):
    extremes = torch.tensor([-(2**31), -(2**31) + 1, -1, 0, 2**31 - 2, 2**31 - 1])
    times = extremes.to(times_dtype).repeat(8)
    for window in (None, 1, 2, 2**32 - 1):
        case = replace(
            attention_case((48,), heads=1), query_times=times, key_times=times, window=window
        )
        check_attention(case, backend)


@each_backend
def test_queries_that_see_nothing(backend):
    """Output 0, lse -inf and gradient 0, beside queries that see something."""
    case = attention_case((70,), (50,), head_dim=16)
    query_times, key_times = torch.arange(70) % 7, torch.full((50,), 3)
    case = replace(case, query_times=query_times, key_times=key_times, window=2)
    result = check_attention(case, backend)
    blind = (query_times < 3) | (query_times >= 5)
    assert (result.out[:, blind] == 0).all() and (result.out[:, ~blind] != 0).any()
    assert (result.lse[:, :, blind] == -torch.inf).all()
    assert (result.grad_query[:, blind] == 0).all()
    everyone = replace(case, query_times=torch.zeros_like(query_times))
    result = check_attention(everyone, backend)
    for name, tensor in result.named():
        assert (tensor == (-torch.inf if name == "lse" else 0)).all(), name


@with_reference
def test_frame_causal_equals_a_call_for_each_prefix(backend):
    """Forward and every gradient; the kernels' outputs to the bit."""
    n = FRAMES * FRAME
    rope = Rope3D((FRAMES, 1, FRAME))
    ids, times = torch.arange(n), frame_times(rope.grid)
    g = torch.Generator().manual_seed(0)
    leaves = [rows(n, g).requires_grad_() for _ in range(3)]
    grad_out = rows(n, g)
    options = {"rope": rope, "backend": backend}
    whole = masked_attention(*leaves, query_ids=ids, query_times=times, **options)
    query, key, value = leaves
    parts = []
    for frame in range(FRAMES):
        own, past = slice(frame * FRAME, (frame + 1) * FRAME), slice((frame + 1) * FRAME)
        parts.append(
            masked_attention(
                query[:, own],
                key[:, past],
                value[:, past],
                query_ids=ids[own],
                key_ids=ids[past],
                **options,
            )
        )
    by_prefix = torch.cat(parts, dim=1)
    if backend in ("reference", "torch"):
        close(whole, by_prefix)
    else:
        assert torch.equal(whole, by_prefix)
    for a, b in zip(
        torch.autograd.grad(whole, leaves, grad_out),
        torch.autograd.grad(by_prefix, leaves, grad_out),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **FLOAT32_DEEP)


@kernels
@bounded
@given(
    seed=seeds,
    n=st.integers(1, 160),
    cut=st.integers(0, 5),
    window=windows,
    ordered=st.booleans(),
    magnitude=st.sampled_from((0.1, 1.0, 30.0)),
    future=st.sampled_from((1.0, 1e3)),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_future_cannot_change_the_past(
    backend, dtype, seed, n, cut, window, ordered, magnitude, future
):
    """Other tokens after time `cut`, of whatever size, leave every output and lse up to it alone,
    and the gradients of the queries up to it, to the bit."""
    g = torch.Generator().manual_seed(seed)
    times = torch.randint(0, 6, (n,), generator=g)
    times = times.sort().values if ordered else times
    past = times <= cut
    q, k, v, grad_out = (rows(n, g) for _ in range(4))
    q, k = q * magnitude, k * magnitude
    results = []
    for _ in range(2):
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        out, lse = masked_attention(
            *leaves, query_times=times, window=window, return_lse=True, backend=backend
        )
        (grad_q,) = torch.autograd.grad(out, leaves[:1], grad_out.to(dtype))
        results.append((out[:, past], lse[..., past], grad_q[:, past]))
        q, k, v, grad_out = (
            torch.where(past[:, None, None], t, rows(n, g) * future) for t in (q, k, v, grad_out)
        )
    for before, after in zip(*results, strict=True):
        assert torch.equal(before, after)


@each_backend
@bounded
@given(seed=seeds, n=st.integers(1, 60), m=st.integers(1, 60), window=windows)
def test_permuting_tokens_with_their_ids_and_times_permutes_the_output(backend, seed, n, m, window):
    g = torch.Generator().manual_seed(seed)
    q, k, v = rows(n, g), rows(m, g), rows(m, g)
    rope = Rope3D((3, 4, 5))
    ids = [torch.randint(-1, 60, (size,), generator=g) for size in (n, m)]
    times = [torch.randint(0, 6, (size,), generator=g) for size in (n, m)]
    orders = [torch.randperm(size, generator=g) for size in (n, m)]

    def attended(order_q, order_k):
        return masked_attention(
            q[:, order_q],
            k[:, order_k],
            v[:, order_k],
            query_ids=ids[0][order_q],
            key_ids=ids[1][order_k],
            query_times=times[0][order_q],
            key_times=times[1][order_k],
            window=window,
            rope=rope,
            backend=backend,
        )

    out = attended(torch.arange(n), torch.arange(m))
    close(attended(*orders), out[:, orders[0]])


@with_reference
@bounded
@given(seed=seeds, n=st.integers(1, 130), times=st.integers(1, 6))
def test_a_window_over_all_times_is_causal_and_one_time_is_no_mask(backend, seed, n, times):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (rows(n, g) for _ in range(3))
    drawn = torch.randint(0, times, (n,), generator=g)
    causal = masked_attention(q, k, v, query_times=drawn, backend=backend)
    windowed = masked_attention(q, k, v, query_times=drawn, window=times, backend=backend)
    assert torch.equal(causal, windowed)
    same = masked_attention(q, k, v, query_times=torch.full((n,), 7), backend=backend)
    plain = masked_attention(q, k, v, backend=backend)
    if backend in ("reference", "torch"):
        close(same, plain)
    else:
        assert torch.equal(same, plain)


@kernels
@pytest.mark.parametrize("times", ["sorted", "random"])
def test_bitwise_for_any_thread_count_and_packing(backend, times):
    case = attention_case(
        (250, 31), packed=True, head_dim=64, heads=3, times=times, num_times=9, window=5
    )
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run_attention(case, backend))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for (name, a), (_, b) in zip(results[0].named(), other.named(), strict=True):
            assert torch.equal(a, b), name
    at = slice(250, 281)
    lone = replace(
        case,
        **{name: getattr(case, name)[at][None] for name in ("query", "key", "value", "grad_out")},
        **{name: getattr(case, name)[at] for name in ("query_ids", "query_times", "key_times")},
        cu_seqlens_q=None,
    )
    for (name, a), (_, b) in zip(
        results[0].named(), run_attention(lone, backend).named(), strict=True
    ):
        assert torch.equal(a[:, at] if name == "lse" else a[at], b[0]), name


@each_backend
def test_rotated_keys_are_taken_as_they_are(backend):
    case = attention_case((20,), (33,), head_dim=32)
    query, key, value = (t.float() for t in (case.query, case.key, case.value))
    options = {"query_ids": case.query_ids, "rope": case.rope, "backend": backend}
    expected = masked_attention(query, key, value, key_ids=case.key_ids, **options)
    rotated = case.rope.rotate(key, case.key_ids)
    close(masked_attention(query, rotated, value, keys_rotated=True, **options), expected)
    packed = {"cu_seqlens_q": torch.tensor([0, 20]), "cu_seqlens_k": torch.tensor([0, 33])}
    options["query_ids"] = case.query_ids[0]
    out = masked_attention(query[0], rotated[0], value[0], keys_rotated=True, **packed, **options)
    close(out, expected[0])


@pytest.mark.parametrize("packed", [False, True])
def test_reference_gradcheck(packed):
    case = attention_case(
        (4, 2) if packed else (5,),
        (3, 4) if packed else (4,),
        packed=packed,
        head_dim=8,
        heads=1,
        times="random",
        window=2,
    )
    leaves = tuple(t.requires_grad_() for t in (case.query, case.key, case.value))
    assert torch.autograd.gradcheck(
        lambda q, k, v: masked_attention(q, k, v, **case.options(), backend="reference"), leaves
    )


@each_backend
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(backend, packed):
    case = attention_case((5, 4) if packed else (6, 6), packed=packed, head_dim=16, times="random")
    leaves = [t.float().requires_grad_() for t in (case.query, case.key, case.value)]
    ids, cu = case.query_ids, case.cu_seqlens_q
    rest = (ids, ids, cu, cu, case.rope.table(16, ids.device), list(case.rope.grid), 0.25)
    times = (case.query_times, case.key_times, 2, backend)
    forward, backward = (
        torch.ops.jepa_kernels.masked_attention_fwd.default,
        torch.ops.jepa_kernels.masked_attention_bwd.default,
    )
    torch.library.opcheck(forward, (*leaves, *rest, *times))
    plain = [t.detach() for t in leaves]
    saved = list(forward(*plain, *rest, *times))
    torch.library.opcheck(
        backward,
        (torch.ones_like(saved[0]), saved, [True] * 3, *plain, *rest, *times),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@each_backend
@pytest.mark.parametrize("packed", [False, True])
def test_one_graph_when_compiled(backend, packed):
    case = attention_case(
        (9, 30) if packed else (40,), packed=packed, head_dim=16, times="sorted", window=2
    )
    leaves = [t.float().requires_grad_() for t in (case.query, case.key, case.value)]
    grad_out = case.grad_out.float()

    def call(query, key, value):
        return masked_attention(query, key, value, **case.options(), backend=backend)

    eager = call(*leaves)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves)
    close(compiled, eager)
    for a, b in zip(
        torch.autograd.grad(compiled, leaves, grad_out),
        torch.autograd.grad(eager, leaves, grad_out),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **FLOAT32_DEEP)


@each_backend
def test_export(backend):
    class Attention(torch.nn.Module):
        def forward(self, query, key, value, times):
            return masked_attention(query, key, value, query_times=times, window=2, backend=backend)

    g = torch.Generator().manual_seed(0)
    arguments = (*(rows(30, g) for _ in range(3)), torch.arange(30) // 10)
    program = torch.export.export(Attention(), arguments)
    close(program.module()(*arguments), Attention()(*arguments))


@kernels
@pytest.mark.parametrize("fault", TIME_FAULTS)
def test_a_mask_that_is_off_by_one_is_seen(backend, fault):
    case = attention_case((60,), times="sorted", num_times=6, window=2, heads=1)
    check_attention(case, backend)
    for phase in ("forward", "backward"):
        with planted_fault(NAME, backend, fault, phase), pytest.raises(AssertionError):
            check_attention(case, backend)


def test_errors_are_one_sentence():
    x, times = torch.randn(1, 4, 2, 8), torch.arange(4)
    ids, rope = torch.arange(4), Rope3D((1, 2, 2))
    bad = [
        ({"key_times": times}, ValueError, "key_times must be None without query_times"),
        ({"window": 2}, ValueError, "window must be None without query_times, got 2."),
        ({"query_times": times, "window": 0}, ValueError, "window must be from 1 to 4294967295"),
        ({"query_times": times, "window": 1.5}, TypeError, "window must be an int or None"),
        ({"query_times": times, "window": True}, TypeError, "window must be an int or None"),
        ({"query_times": times[:3]}, ValueError, "query_times must have shape (1, 4) or (4,)"),
        ({"query_times": times.float()}, ValueError, "query_times must have dtype int32 or int64"),
        ({"query_times": [0, 1, 2, 3]}, TypeError, "query_times must be a tensor, got list"),
        ({"query_times": times, "key_times": times[:2]}, ValueError, "key_times must have shape"),
        ({"query_times": times.to("meta")}, ValueError, "query_times must be on cpu"),
        ({"query_times": times + 2**31}, ValueError, "query_times must hold times from -2147"),
        ({"keys_rotated": True}, ValueError, "keys_rotated must be False without rope, got True."),
        ({"keys_rotated": 1}, TypeError, "keys_rotated must be a bool, got int."),
        (
            {"keys_rotated": True, "rope": rope, "query_ids": ids, "key_ids": ids},
            ValueError,
            "key_ids must be None with keys_rotated, got Tensor.",
        ),
    ]
    for options, kind, text in bad:
        with pytest.raises(kind) as caught:
            masked_attention(x, x, x, **options)
        assert str(caught.value).startswith("masked_attention: " + text), caught.value
    with pytest.raises(ValueError, match="key_times must be given when key has other tokens"):
        masked_attention(x, x[:, :3], x[:, :3], query_times=times)
    packed = torch.randn(4, 2, 8)
    with pytest.raises(ValueError, match=r"query_times must have shape \(4,\), got \(1, 4\)"):
        masked_attention(
            packed,
            packed,
            packed,
            cu_seqlens_q=torch.tensor([0, 4]),
            query_times=times[None],
        )


@with_reference
@pytest.mark.parametrize("name", ["query_times", "key_times"])
def test_times_beyond_32_bits_are_refused(backend, name):
    x = torch.randn(1, 4, 2, 8)
    for wrong in (2**31, -(2**31) - 1, 2**62):
        times = {"query_times": torch.arange(4), "key_times": torch.arange(4)}
        times[name][2] = wrong
        with pytest.raises((ValueError, RuntimeError), match=f"{name} must hold times from -2147"):
            masked_attention(x, x, x, **times, backend=backend)


@pytest.mark.parametrize("backend", NOT_YET)
def test_backends_that_do_not_read_times_say_so(backend):
    inputs = example(OPS[NAME], "cpu", torch.float32)
    without = OPS[NAME].backends[backend].unsupported(inputs)
    inputs = replace(inputs, query_times=inputs.query_ids, key_times=inputs.query_ids)
    more = [r.text for r in OPS[NAME].backends[backend].unsupported(inputs) if r not in without]
    assert more == ["query_times must be None (this backend does not read times yet), got a tensor"]
