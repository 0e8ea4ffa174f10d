"""Behaviour of masked_attention on every backend that runs here; the CUDA source and Triton run in
tests/simt and tests/interpret."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from jepa_kernels import BackendUnsupportedError, Rope3D, masked_attention, native
from jepa_kernels.ops.masked_attention.inputs import NAME
from jepa_kernels.testing import (
    ATTENTION_FAULTS,
    FLOAT32,
    FLOAT64_STORED,
    HEAD_DIMS,
    RESULT_FAULTS,
    AttentionCase,
    attention_case,
    check_attention,
    planted_fault,
    run_attention,
)
from tests.conftest import missing
from tests.ops.backends import runnable
from tests.ops.devices import GPU_BACKENDS, on_a_gpu

RUNNABLE = [("cpu", backend) for backend in runnable(NAME)]
each_backend = pytest.mark.parametrize(
    ("device", "backend"),
    [
        *(pytest.param(d, b, id=f"{d}-{b}") for d, b in RUNNABLE),
        *(on_a_gpu("cuda", b, id=f"cuda-{b}") for b in (*GPU_BACKENDS, "torch")),
    ],
)


def test_the_native_library_is_built():
    if not native.available():
        missing(str(native.reason()))
    assert ("cpu", "cpu") in RUNNABLE


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["interleaved", "tiled"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_width_layout_and_form(device, backend, dtype, layout, head_dim):
    shared = {"head_dim": head_dim, "layout": layout, "dtype": dtype}
    check_attention(attention_case((37, 37), **shared), backend, device)
    check_attention(
        attention_case((9, 9), (21, 21), strided=True, id_dtype=torch.int32, **shared),
        backend,
        device,
    )
    check_attention(
        attention_case((5, 0, 70), packed=True, slack=2, cu_dtype=torch.int64, **shared),
        backend,
        device,
    )
    check_attention(
        attention_case((1, 33), (40, 0), packed=True, strided=True, interpolate_from=16, **shared),
        backend,
        device,
    )


@each_backend
@pytest.mark.parametrize(
    "kw",
    [
        {"lengths": (1,), "grid": (1, 1, 1), "unrotated": 0},
        {"lengths": (130,), "grid": (1, 9, 20)},
        {"lengths": (16,), "grid": None},
        {"lengths": (16, 16), "lengths_k": (0, 0), "grid": None},
        {"lengths": (0, 0)},
        {"lengths": (), "packed": True},
        {"lengths": (0, 0), "packed": True},
        {"lengths": (3, 0), "lengths_k": (0, 5), "packed": True, "slack": 4},
        {"lengths": (257,), "lengths_k": (129,), "heads": 1},
        {"lengths": (64,), "scale": 0.0},
        {"lengths": (64,), "scale": -0.3},
        {"lengths": (20,), "unrotated": 20},
    ],
    ids=str,
)
def test_edges(device, backend, kw):
    kw = dict(kw)
    scale = kw.pop("scale", None)
    check_attention(replace(attention_case(**kw), scale=scale), backend, device)


@each_backend
@pytest.mark.parametrize("magnitude", [4.0, 8.0, 100.0])
def test_large_logits_stay_finite_and_accurate(device, backend, magnitude):
    """At 100 the logits reach 1e4; softmax picks one key, and every other weight underflows to
    0."""
    check_large_logits(attention_case((70,), magnitude=magnitude, head_dim=64), backend, device)


def check_large_logits(case: AttentionCase, backend: str, device: str = "cpu") -> None:
    """Every result within four times the error of the float32 reference, and a rounding of the
    largest logit."""
    result = run_attention(case, backend, device=device)
    oracle = run_attention(case, "reference", torch.float64)
    peer = run_attention(case, "reference")
    logit = (case.query.norm(dim=-1).max() * case.key.norm(dim=-1).max()) / 8
    for name, tensor in result.named():
        known = torch.isfinite(getattr(oracle, name))
        assert torch.equal(torch.isfinite(tensor), known), name
        ours = (tensor.double() - getattr(oracle, name))[known].abs().max()
        theirs = (getattr(peer, name).double() - getattr(oracle, name))[known].abs().max()
        # A logit of size L carries a rounding error of eps * L, which softmax turns into a relative
        # error of the same size.
        rounding = (
            4 * torch.finfo(torch.float32).eps * logit * getattr(oracle, name)[known].abs().max()
        )
        assert ours <= 4 * theirs + rounding, (
            f"{name}: {ours:.2e} against {theirs:.2e}, rounding {rounding:.2e}"
        )


@each_backend
def test_strided_views_are_read_in_place(device, backend):
    """A qkv projection's views go in without a copy: the op allocates its results and nothing of
    the size of an input."""
    if backend == "torch":
        pytest.skip("the torch backend rotates into new tensors by design")
    tokens, heads, head_dim = 256, 4, 64
    qkv = torch.randn(2, tokens, 3, heads, head_dim, device=device)
    ids = torch.arange(tokens, device=device)
    rope = Rope3D((4, 8, 8))
    masked_attention(*qkv.unbind(2), query_ids=ids, rope=rope, backend=backend)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        masked_attention(*qkv.unbind(2), query_ids=ids, rope=rope, backend=backend)
    allocated = sum(
        max(0, e.self_cpu_memory_usage if device == "cpu" else e.self_device_memory_usage)
        for e in profile.events()
    )
    results = 2 * tokens * heads * (head_dim + 1) * 4
    scratch = 0 if backend == "cpu" else results
    assert results <= allocated <= results + scratch + 4096, (
        f"allocated {allocated} bytes for results of {results}"
    )


@each_backend
def test_bitwise_repeat_and_packing_order(device, backend):
    if backend == "torch":
        pytest.skip("determinism is a promise of the kernels")
    case = attention_case((40, 7, 90), packed=True, head_dim=64, seed=3)
    first = run_attention(case, backend, device=device)
    again = run_attention(case, backend, device=device)
    for (name, a), (_, b) in zip(first.named(), again.named(), strict=True):
        assert torch.equal(a, b), name
    # The same sequences in another order, each alone, and dense: every row keeps its bits.
    bounds = [0, 40, 47, 137]
    for i in range(3):
        rows = slice(bounds[i], bounds[i + 1])
        lone = masked_attention(
            *(t[rows].float().to(device) for t in (case.query, case.key, case.value)),
            query_ids=case.query_ids[rows].to(device),
            rope=case.rope,
            cu_seqlens_q=torch.tensor([0, bounds[i + 1] - bounds[i]], device=device),
            backend=backend,
        )
        assert torch.equal(lone.cpu(), first.out[rows])
        dense = masked_attention(
            *(t[rows][None].float().to(device) for t in (case.query, case.key, case.value)),
            query_ids=case.query_ids[rows].to(device),
            rope=case.rope,
            backend=backend,
        )
        assert torch.equal(dense[0].cpu(), first.out[rows])


def test_bitwise_equal_for_any_thread_count():
    if ("cpu", "cpu") not in RUNNABLE:
        missing(str(native.reason()))
    case = attention_case((300, 20), packed=True, head_dim=64, heads=3)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run_attention(case, "cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for (name, a), (_, b) in zip(results[0].named(), other.named(), strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("packed", [False, True])
def test_reference_gradcheck(packed):
    case = attention_case(
        (3, 2) if packed else (4,),
        (2, 3) if packed else (3,),
        packed=packed,
        head_dim=8,
        layout="tiled",
        heads=1,
    )
    leaves = tuple(t.requires_grad_() for t in (case.query, case.key, case.value))
    assert torch.autograd.gradcheck(
        lambda q, k, v: masked_attention(q, k, v, **case.options(), backend="reference"), leaves
    )


@each_backend
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(device, backend, packed):
    case = attention_case((5, 4) if packed else (6, 6), packed=packed, head_dim=16)
    q, k, v = (t.float().to(device) for t in (case.query, case.key, case.value))
    ids, cu = (
        case.query_ids.to(device),
        None if case.cu_seqlens_q is None else case.cu_seqlens_q.to(device),
    )
    rest = (ids, ids, cu, cu, case.rope.table(16, q.device))
    grid, scale = list(case.rope.grid), 0.25
    forward, backward = (
        torch.ops.jepa_kernels.masked_attention_fwd.default,
        torch.ops.jepa_kernels.masked_attention_bwd.default,
    )
    leaves = tuple(t.clone().requires_grad_() for t in (q, k, v))
    options = (grid, scale, None, None, 0, backend)
    torch.library.opcheck(forward, (*leaves, *rest, *options))
    inputs = (q, k, v, *rest, *options)
    saved, needs = list(forward(*inputs)), [True] * 3
    out = saved[0]
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        backward,
        (torch.ones_like(out), saved, needs, *inputs),
        test_utils=checks,
    )
    # A sum's gradient arrives expanded, with strides 0.
    expanded = torch.ones((), device=device).expand(out.shape)
    for a, b in zip(
        backward(expanded, saved, needs, *inputs),
        backward(torch.ones_like(out), saved, needs, *inputs),
        strict=True,
    ):
        assert torch.equal(a, b)


@each_backend
@pytest.mark.parametrize("fault", ATTENTION_FAULTS)
def test_a_planted_fault_is_seen(device, backend, fault):
    """Each fault in what a kernel returns or reads must fail the comparison, forward and
    backward."""
    case = attention_case((11, 6), packed=True, head_dim=32, grid=(3, 4, 5))
    # The torch backend's op path is what a compiled graph takes; called directly here.
    if backend == "torch":
        pytest.skip("the torch backend runs outside the op in eager mode")
    check_attention(case, backend, device)
    for phase in ("forward", "backward"):
        with (
            planted_fault("masked_attention", backend, fault, phase),
            pytest.raises(AssertionError),
        ):
            check_attention(case, backend, device)
    assert set(RESULT_FAULTS) < set(ATTENTION_FAULTS)


GOLDEN_ROPE = [
    f"rope_hd{head_dim}_{shape}_{mask}_interp{interp}"
    for head_dim in (32, 64)
    for shape in ("sq", "rect")
    for mask in ("full", "masked")
    for interp in (0, 1)
]


@pytest.mark.parametrize("backend", ["reference", *(b for _, b in RUNNABLE)])
@pytest.mark.parametrize("name", GOLDEN_ROPE)
def test_published_rope_attention(shared_dir, backend, name):
    """The attention module of the published code: output, rotation and every gradient to a relative
    error of 1e-5."""
    folder = shared_dir / "golden" / "modules"
    weights = {
        k: torch.from_numpy(np.array(v))
        for k, v in np.load(folder / f"{name.rsplit('_', 3)[0]}_weights.npz").items()
    }
    data = {k: torch.from_numpy(np.array(v)) for k, v in np.load(folder / f"{name}.npz").items()}
    grid = (4, 4, 4) if "_sq_" in name else (3, 3, 5)
    heads = int(weights["num_heads"])
    leaves = {
        k: weights[k].clone().requires_grad_() for k in ("qkv_w", "qkv_b", "proj_w", "proj_b")
    }
    x = data["x"].clone().requires_grad_()
    qkv = (x @ leaves["qkv_w"].T + leaves["qkv_b"]).unflatten(-1, (3, heads, -1))
    rope = Rope3D(grid, "interleaved", 16 if name.endswith("interp1") else None)
    out = masked_attention(*qkv.unbind(2), query_ids=data["ids"], rope=rope, backend=backend)
    out = out.flatten(-2) @ leaves["proj_w"].T + leaves["proj_b"]
    (out * data["cotangent"]).sum().backward()
    results = {"out": out, "grad_x": x.grad, **{f"grad_{k}": v.grad for k, v in leaves.items()}}
    for key, value in results.items():
        error = (value.detach().double() - data[key].double()).norm() / data[key].double().norm()
        assert error <= FLOAT32["rtol"], f"{key}: relative error {error:.2e}"


def test_errors_are_one_sentence():
    x = torch.randn(1, 4, 2, 8)
    ids = torch.arange(4)
    rope = Rope3D((1, 2, 2))
    packed = torch.randn(4, 2, 8)
    bad = [
        (lambda: masked_attention([1], x, x), TypeError, "query must be a tensor, got list"),
        (lambda: masked_attention(x.int(), x, x), ValueError, "query must have dtype float32 or"),
        (
            lambda: masked_attention(x, x.double(), x),
            ValueError,
            "key must have the dtype of query",
        ),
        (lambda: masked_attention(x[0], x[0], x[0]), ValueError, "query must have 4 dimensions"),
        (
            lambda: masked_attention(x, x[:, :, :1], x),
            ValueError,
            "key must have the B, heads and head_dim",
        ),
        (lambda: masked_attention(x, x, x[:, :3]), ValueError, "value must have the shape of key"),
        (
            lambda: masked_attention(x, x, x, query_ids=ids),
            ValueError,
            "query_ids must be None without rope",
        ),
        (
            lambda: masked_attention(x, x, x, rope=rope),
            TypeError,
            "query_ids must be given with rope",
        ),
        (
            lambda: masked_attention(x, x, x, rope="rope", query_ids=ids),
            TypeError,
            "rope must be a Rope3D",
        ),
        (
            lambda: masked_attention(x, x, x, rope=rope, query_ids=ids[:3]),
            ValueError,
            "query_ids must have shape",
        ),
        (
            lambda: masked_attention(x, x, x, rope=rope, query_ids=ids.float()),
            ValueError,
            "query_ids must have dtype int32 or int64",
        ),
        (
            lambda: masked_attention(x, x[:, :3], x[:, :3], rope=rope, query_ids=ids),
            ValueError,
            "key_ids must be given when",
        ),
        (lambda: masked_attention(x, x, x, scale=float("nan")), ValueError, "scale must be finite"),
        (lambda: masked_attention(x, x, x, scale="1"), TypeError, "scale must be a number"),
        (lambda: masked_attention(x, x, x, return_lse=1), TypeError, "return_lse must be a bool"),
        (
            lambda: masked_attention(x, x, x, cu_seqlens_k=ids),
            ValueError,
            "cu_seqlens_k must be None without",
        ),
        (
            lambda: masked_attention(packed, packed, packed, cu_seqlens_q=ids.float()),
            ValueError,
            "cu_seqlens_q must have dtype",
        ),
        (
            lambda: masked_attention(packed, packed, packed, cu_seqlens_q=ids[:0]),
            ValueError,
            "cu_seqlens_q must have at least one",
        ),
        (
            lambda: masked_attention(
                packed, packed, packed, cu_seqlens_q=ids, cu_seqlens_k=ids[:2]
            ),
            ValueError,
            "cu_seqlens_k must have",
        ),
        (lambda: masked_attention(x, x, x, backend="fast"), ValueError, "backend must be one of"),
        (
            lambda: masked_attention(x, x, x, backend="cuda"),
            BackendUnsupportedError,
            "cannot run on backend 'cuda'",
        ),
        (lambda: Rope3D((0, 1, 1)), ValueError, "grid must have sizes of at least 1"),
        (lambda: Rope3D((1, 1)), TypeError, "grid must be three ints"),
        (lambda: Rope3D((1, 1, 1), "neox"), ValueError, "layout must be one of"),
    ]
    for call, kind, text in bad:
        with pytest.raises(kind, match=text.replace("(", r"\(")) as caught:
            call()
        assert str(caught.value).startswith(("masked_attention", "Rope3D", "jepa_kernels"))


@pytest.mark.parametrize("backend", ["reference", *(b for _, b in RUNNABLE)])
def test_bad_values_are_refused(backend):
    x = torch.randn(1, 4, 2, 8)
    packed = torch.randn(4, 2, 8)
    rope = Rope3D((1, 2, 2))
    for ids in ([0, 1, 2, 4], [-2, 0, 1, 2], [0, 1, 2, 2**40]):
        with pytest.raises((ValueError, RuntimeError), match="query_ids must"):
            masked_attention(x, x, x, rope=rope, query_ids=torch.tensor(ids), backend=backend)
    for offsets in ([1, 4], [0, 3, 2], [0, 5], [0, -1], [0, 2**40], [-1, 4]):
        with pytest.raises((ValueError, RuntimeError), match="cu_seqlens_q must"):
            masked_attention(
                packed, packed, packed, cu_seqlens_q=torch.tensor(offsets), backend=backend
            )


@each_backend
def test_ids_of_an_empty_batch_need_its_shape(device, backend):
    """A batch of 0 holds no id to read, so nothing but the shape can be wrong."""
    query = torch.randn(0, 5, 2, 8, device=device, requires_grad=True)
    key = torch.randn(0, 7, 2, 8, device=device)

    def call(*shapes):
        ids, ids_k = (torch.zeros(shape, dtype=torch.int64, device=device) for shape in shapes)
        return masked_attention(
            query,
            key,
            key,
            query_ids=ids,
            key_ids=ids_k,
            rope=Rope3D((1, 2, 4)),
            return_lse=True,
            backend=backend,
        )

    for shapes in (((0, 5), (0, 7)), ((5,), (7,)), ((0, 5), (7,))):
        out, lse = call(*shapes)
        assert out.shape == query.shape and lse.shape == (0, 2, 5)
        assert torch.autograd.grad(out.sum(), query)[0].shape == query.shape
    for wrong in ((0, 4), (1, 5), (0,), (5, 0)):
        with pytest.raises(ValueError, match=r"query_ids must have shape \(0, 5\) or \(5,\)"):
            call(wrong, (0, 7))
        with pytest.raises(ValueError, match=r"key_ids must have shape \(0, 7\) or \(7,\)"):
            call((0, 5), wrong)


@each_backend
def test_double_backward_is_refused(device, backend):
    if backend == "torch":
        pytest.skip("the torch backend has PyTorch's own autograd")
    x = torch.randn(1, 4, 2, 8, device=device, requires_grad=True)
    out = masked_attention(x, x, x, backend=backend)
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward must not be requested"):
        grad.sum().backward()


@each_backend
def test_large_offsets_do_not_overflow(device, backend):
    """Element offsets pass 2^31: the views are strided over a buffer that is never filled (memory
    is committed only where touched)."""
    if backend == "torch" or device == "cuda":
        pytest.skip("the stride test needs untouched memory, which only a CPU gives")
    tokens, stride = 5, 600_000_000
    lazy = torch.from_numpy(
        np.zeros(tokens * stride, np.float32)
    )  # zeros are committed only where touched
    view = lazy.as_strided((1, tokens, 1, 8), (tokens * stride, stride, 8, 1))
    view.copy_(torch.randn(1, tokens, 1, 8))
    near = view.clone()
    assert torch.equal(
        masked_attention(view, view, view, backend=backend),
        masked_attention(near, near, near, backend=backend),
    )


@pytest.mark.parametrize("backend", ["reference", *(b for _, b in RUNNABLE)])
@pytest.mark.parametrize("index", range(4))
def test_numpy_golden_vectors(root, backend, index):
    """tests/golden/masked_attention.json was computed token by token in NumPy (make golden)."""
    case = json.loads((root / "tests" / "golden" / "masked_attention.json").read_text())["cases"][
        index
    ]
    dtype = torch.float64 if backend == "reference" else torch.float32
    q, k, v = (torch.tensor(case[n], dtype=dtype) for n in ("query", "key", "value"))
    ids = {
        n: torch.tensor(case[n]) for n in ("query_ids", "key_ids", "cu_seqlens_q", "cu_seqlens_k")
    }
    rope = Rope3D(tuple(case["grid"]), case["layout"], case["interpolate_from"])
    out, lse = masked_attention(
        q, k, v, **ids, rope=rope, scale=case["scale"], return_lse=True, backend=backend
    )
    tolerance = FLOAT64_STORED if backend == "reference" else FLOAT32
    torch.testing.assert_close(out, torch.tensor(case["out"], dtype=dtype), **tolerance)
    wanted = torch.tensor(
        [[float("-inf") if x is None else x for x in row] for row in case["lse"]], dtype=lse.dtype
    )
    torch.testing.assert_close(lse, wanted, **tolerance)


@pytest.mark.parametrize("backend", ["auto", "reference", *runnable("masked_attention")])
@pytest.mark.parametrize("argument", ["query_ids", "key_ids"])
@pytest.mark.parametrize("wrong", [-2, 4])
def test_an_id_outside_the_grid_is_one_sentence(backend, argument, wrong):
    """Whoever reads the ids, Python or a kernel, says it in the same words."""
    x, ids = torch.randn(1, 4, 2, 8), {n: torch.arange(4) for n in ("query_ids", "key_ids")}
    ids[argument][2] = wrong
    with pytest.raises(ValueError) as caught:
        masked_attention(x, x, x, **ids, rope=Rope3D((1, 2, 2)), backend=backend)
    assert str(caught.value) == f"{NAME}: {argument} must hold ids from -1 to 3, got {wrong}."
