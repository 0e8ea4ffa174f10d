"""masked_attention's Triton kernels, forward and backward, against the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from jepa_kernels import BackendUnsupportedError, masked_attention
from jepa_kernels.ops.masked_attention import triton as backend
from jepa_kernels.ops.masked_attention.inputs import Inputs
from jepa_kernels.ops.masked_attention.triton_table import tile
from jepa_kernels.testing import (
    ATTENTION_FAULTS,
    FLOAT32,
    HEAD_DIMS,
    RESULT_FAULTS,
    TIME_FAULTS,
    attention_case,
    check_attention,
    planted_fault,
    run_attention,
)

# One full tile of the interpreter's row of the tile table, and a partly filled one.
FULL = tile("fwd", 0, torch.float32, 64).block_q
LONG = FULL + 5


@pytest.mark.parametrize("layout", ["interleaved", "tiled"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_width_layout_and_form_in_bfloat16(head_dim, layout):
    """bfloat16 is the case the interpreter gets wrong by itself, so it is the one to cover."""
    shared = {"head_dim": head_dim, "layout": layout, "heads": 1, "dtype": torch.bfloat16}
    check_attention(attention_case((LONG, LONG), **shared), "triton")
    check_attention(
        attention_case(
            (3, 0, LONG),
            (FULL, 2, 7),
            packed=True,
            strided=True,
            slack=2,
            id_dtype=torch.int32,
            **shared,
        ),
        "triton",
    )


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_width_and_form_in_float32(head_dim):
    layout = "tiled" if head_dim in (24, 64, 88) else "interleaved"
    shared = {"head_dim": head_dim, "layout": layout, "heads": 1}
    check_attention(
        attention_case((7,), (LONG,), strided=True, interpolate_from=16, **shared), "triton"
    )
    check_attention(
        attention_case((LONG, 4), packed=True, cu_dtype=torch.int64, **shared), "triton"
    )


@pytest.mark.parametrize("head_dim", [32, 88])
def test_float16(head_dim):
    check_attention(attention_case((LONG,), (9,), head_dim=head_dim, dtype=torch.float16), "triton")


@pytest.mark.parametrize(
    "kw",
    [
        {"lengths": (1,), "grid": (1, 1, 1), "unrotated": 0},
        {"lengths": (16,), "grid": None},
        {"lengths": (9,), "grid": None, "packed": True, "dtype": torch.bfloat16, "head_dim": 80},
        {"lengths": (3, 3), "lengths_k": (0, 0), "grid": None},
        {"lengths": (0, 0)},
        {"lengths": (), "packed": True},
        {"lengths": (0, 0), "packed": True},
        {"lengths": (3, 0), "lengths_k": (0, 5), "packed": True, "slack": 4},
        {"lengths": (LONG,), "scale": 0.0},
        {"lengths": (LONG,), "scale": -0.3},
        {"lengths": (5,), "unrotated": 5},
        {"lengths": (9,), "heads": 5},
        {"lengths": (LONG,), "magnitude": 8.0, "dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_edges(kw):
    kw = {"heads": 1, **kw}
    scale = kw.pop("scale", None)
    check_attention(replace(attention_case(**kw), scale=scale), "triton")


@pytest.mark.parametrize(
    "kw",
    [
        {"lengths": (LONG, LONG), "times": "sorted"},
        {"lengths": (LONG,), "times": "sorted", "dtype": torch.bfloat16, "head_dim": 88},
        {"lengths": (70,), "times": "random", "num_times": 40, "window": 3, "head_dim": 24},
        {
            "lengths": (40, 0, 6),
            "lengths_k": (LONG, 4, 0),
            "packed": True,
            "slack": 2,
            "times": "random",
            "window": 1,
            "time_dtype": torch.int32,
            "dtype": torch.bfloat16,
        },
        {"lengths": (LONG,), "times": "sorted", "scale": -0.3, "grid": None},
        {"lengths": (LONG,), "times": "random", "magnitude": 4.0, "dtype": torch.float16},
    ],
    ids=str,
)
def test_times(kw):
    kw = {"heads": 1, **kw}
    scale = kw.pop("scale", None)
    check_attention(replace(attention_case(**kw), scale=scale), "triton")


def test_queries_that_see_nothing_and_times_at_the_ends_of_their_range():
    ends = torch.tensor([-(2**31), -(2**31) + 1, 0, 2**31 - 1])
    case = attention_case((LONG,), (40,), heads=1, head_dim=16)
    case = replace(case, query_times=ends[torch.arange(LONG) % 4], window=1)
    for key_times in (ends[torch.arange(40) % 3], torch.full((40,), 7), ends[:1].expand(40)):
        check_attention(replace(case, key_times=key_times), "triton")


@pytest.mark.parametrize("fault", TIME_FAULTS)
def test_a_mask_that_is_off_by_one_is_noticed(fault):
    case = attention_case((20,), times="sorted", num_times=5, window=2, heads=1, head_dim=16)
    for phase in ("forward", "backward"):
        with (
            planted_fault("masked_attention", "triton", fault, phase),
            pytest.raises(AssertionError),
        ):
            check_attention(case, "triton")


def test_rows_that_start_anywhere():
    """Strides that are no multiple of 8 elements, and ids that step through a wider table."""
    case = attention_case((9,), heads=1, head_dim=16)
    wide = torch.zeros(1, 9, 19, dtype=torch.float64)
    query = wide[..., 3:].view(1, 9, 1, 16)
    query.copy_(case.query)
    ids = case.query_ids[:, :, None].expand(-1, -1, 2).contiguous()[..., 0]
    assert query.stride(1) % 8 and ids.stride(1) == 2
    check_attention(replace(case, query=query, query_ids=ids), "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_repeats_bit_for_bit_in_any_packing(dtype):
    case = attention_case((LONG, 7), packed=True, heads=1, head_dim=32, dtype=dtype)
    first, again = run_attention(case, "triton"), run_attention(case, "triton")
    for (name, a), (_, b) in zip(first.named(), again.named(), strict=True):
        assert torch.equal(a, b), name
    rows = slice(LONG, None)
    lone = replace(
        case,
        **{name: getattr(case, name)[rows][None] for name in ("query", "key", "value", "grad_out")},
        query_ids=case.query_ids[rows],
        cu_seqlens_q=None,
    )
    for (name, a), (_, b) in zip(first.named(), run_attention(lone, "triton").named(), strict=True):
        assert torch.equal(a[:, rows] if name == "lse" else a[rows], b[0]), name


def test_an_expanded_gradient_is_read_in_place():
    """A sum's gradient arrives with stride 0 everywhere."""
    case = attention_case((6,), heads=2, head_dim=16)
    leaves = [t.float().requires_grad_() for t in (case.query, case.key, case.value)]
    masked_attention(*leaves, **case.options(), backend="triton").sum().backward()
    expected = run_attention(
        replace(case, grad_out=torch.ones_like(case.query)), "reference", torch.float64
    )
    for leaf, name in zip(leaves, ("grad_query", "grad_key", "grad_value"), strict=True):
        torch.testing.assert_close(leaf.grad.double(), getattr(expected, name), **FLOAT32)


class _NoValueLeavesTheDevice(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"{func} would wait for the device")
        return func(*args, **(kwargs or {}))


def test_the_launcher_reads_no_values():
    """On a GPU a value read would be a synchronisation, and would break CUDA-graph capture."""
    case = attention_case((3, 5), packed=True, heads=1, head_dim=16)
    query, key, value, grad_out = (
        t.float() for t in (case.query, case.key, case.value, case.grad_out)
    )
    ids, cu = case.query_ids, case.cu_seqlens_q
    table = case.rope.table(16, torch.device("cpu"))
    with _NoValueLeavesTheDevice():
        inputs = Inputs(query, key, value, ids, ids, cu, cu, table, [3, 4, 5], 0.25)
        saved = backend.forward(inputs)
        backend.backward(inputs, saved, grad_out, [True] * 3)
    with pytest.raises(AssertionError, match="wait"), _NoValueLeavesTheDevice():
        cu.sum().item()


def test_wrong_offsets_and_ids_stay_inside_the_tensors():
    """The op refuses such values on a CPU; on a GPU they come this far, and must neither crash nor
    write elsewhere."""
    query = torch.randn(12, 1, 16)
    cu = torch.tensor([-7, 9, 3, 2**40], dtype=torch.int64)
    ids = torch.tensor([-9, 10**12, 2**31, -1, *range(8)], dtype=torch.int64)
    table = torch.rand(2, 6, 4)
    inputs = Inputs(query, query, query, ids, ids, cu, cu, table, [1, 2, 3], 0.25)
    saved = out, _ = backend.forward(inputs)
    backend.backward(inputs, saved, out, [True] * 3)
    # Sequence 0 is rows 0 to 8 whatever the rest says; ids below -1 do not turn, ids past the grid
    # are its last.
    sound = torch.cat((ids[:3].clamp(-1, 5), ids[3:]))
    whole = torch.tensor([0, 9])
    expected, _ = backend.forward(
        replace(inputs, query_ids=sound, key_ids=sound, cu_seqlens_q=whole, cu_seqlens_k=whole)
    )
    assert torch.equal(out[:2], expected[:2])


@pytest.mark.parametrize(
    ("phase", "fault"),
    [*(("forward", f) for f in ATTENTION_FAULTS), *(("backward", f) for f in RESULT_FAULTS)],
    ids=str,
)
def test_planted_faults_are_noticed(phase, fault):
    case = attention_case((6,), heads=1, head_dim=24, layout="tiled")
    with planted_fault("masked_attention", "triton", fault, phase), pytest.raises(AssertionError):
        check_attention(case, "triton")


def test_refusals_name_every_reason():
    q = torch.zeros(1, 2, 1, 136, dtype=torch.float64)
    with pytest.raises(BackendUnsupportedError) as refusal:
        masked_attention(q, q, q, backend="triton")
    assert "dtype must be float32 or bfloat16 or float16, got float64" in str(refusal.value)
    assert "head_dim must be a multiple of 8 from 8 to 128, got 136" in str(refusal.value)
