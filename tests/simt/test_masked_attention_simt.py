"""csrc/masked_attention/cuda on the SIMT executor: forward and backward against the float64
reference."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from jepa_kernels.testing import (
    BFLOAT16,
    FLOAT32_DEEP,
    HEAD_DIMS,
    AttentionCase,
    assert_within_budget,
    attention_case,
    run_attention,
)
from tests.simt.attention_abi import SOURCE, Guarded, describe, open_attention, rows, run
from tests.simt.build import ORDERS, build, configure, run_sanitized, take_counts

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
CHILD = Path(__file__).with_name("attention_child.py")


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return open_attention(build(SOURCE))


def bits(t: torch.Tensor) -> np.ndarray:
    return t.numpy() if t.dtype == torch.float32 else t.view(torch.int16).numpy().view(np.uint16)


def rounded(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`t` in `dtype` with its strides, so that views stay views."""
    if t.is_contiguous():
        return t.to(dtype)
    return t._base.to(dtype).as_strided(t.shape, t.stride(), t.storage_offset())


def arguments(case: AttentionCase) -> dict[str, np.ndarray]:
    """What attention_abi.run takes."""
    given: dict[str, np.ndarray] = {
        n: bits(rounded(getattr(case, n), case.dtype))
        for n in ("query", "key", "value", "grad_out")
    }
    head_dim = case.query.shape[-1]
    given["dtype"] = np.array(str(case.dtype).removeprefix("torch."))
    given["scale"] = np.array(head_dim**-0.5 if case.scale is None else case.scale)
    if case.rope is not None:
        given["rope_table"] = case.rope.table(head_dim, torch.device("cpu")).numpy()
        given["grid"] = np.array(case.rope.grid)
        given["ids_q"] = case.query_ids.numpy()
        given["ids_k"] = given["ids_q"] if case.key_ids is None else case.key_ids.numpy()
    if case.cu_seqlens_q is not None:
        given["cu_q"] = case.cu_seqlens_q.numpy()
        given["cu_k"] = given["cu_q"] if case.cu_seqlens_k is None else case.cu_seqlens_k.numpy()
    return given


def as_tensor(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return (
        torch.from_numpy(array)
        if array.dtype == np.float32
        else torch.from_numpy(array.view(np.int16)).view(dtype)
    )


def check(library: ctypes.CDLL, case: AttentionCase, misaligned: bool = False) -> None:
    oracle = run_attention(case, "reference", torch.float64)
    peer = None if case.dtype == torch.float32 else run_attention(case, "reference")
    for name, array in run(library, arguments(case), misaligned=misaligned).items():
        actual, same_dtype = (
            as_tensor(array, case.dtype),
            None if peer is None else getattr(peer, name),
        )
        assert_within_budget(
            name,
            actual,
            getattr(oracle, name),
            same_dtype,
            gradient=name.startswith("grad"),
            dtype=case.dtype,
        )


@each_dtype
@pytest.mark.parametrize("layout", ["interleaved", "tiled"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_width_layout_and_form(library, dtype, layout, head_dim):
    shared = {"head_dim": head_dim, "layout": layout, "dtype": dtype}
    check(library, attention_case((37,), **shared))
    check(
        library,
        attention_case((33, 4), (40, 0), packed=True, strided=True, id_dtype=torch.int32, **shared),
    )
    if layout == "interleaved":
        check(
            library,
            attention_case(
                (9,), (70,), strided=True, id_dtype=torch.int32, interpolate_from=16, **shared
            ),
            misaligned=True,
        )
    else:
        check(
            library,
            attention_case(
                (5, 0, 68), packed=True, slack=2, cu_dtype=torch.int64, heads=1, **shared
            ),
        )


def test_one_key_gives_its_value_and_no_gradient(library):
    check(library, attention_case((1,), grid=(1, 1, 1), unrotated=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "kw",
    [
        {"lengths": (130,), "grid": (1, 9, 20)},
        {"lengths": (16,), "grid": None},
        {"lengths": (16, 16), "lengths_k": (0, 0), "grid": None},
        {"lengths": (0, 0)},
        {"lengths": (), "packed": True},
        {"lengths": (0, 0), "packed": True},
        {"lengths": (3, 0), "lengths_k": (0, 5), "packed": True, "slack": 4},
        {"lengths": (257,), "lengths_k": (129,), "heads": 1},
        {"lengths": (64, 65, 127, 128, 129), "packed": True, "heads": 1},
        {"lengths": tuple([2, 0, 1] * 14), "packed": True, "heads": 1},
        {"lengths": (64,), "scale": 0.0},
        {"lengths": (70,), "scale": -0.3},
        {"lengths": (20,), "unrotated": 20},
        {"lengths": (70,), "magnitude": 2.0},
        {"lengths": (40,), "heads": 5},
    ],
    ids=str,
)
def test_edges(library, kw, dtype):
    kw = dict(kw)
    scale = kw.pop("scale", None)
    check(library, replace(attention_case(dtype=dtype, **kw), scale=scale))


@each_dtype
def test_large_logits(library, dtype):
    """Logits in the thousands: no overflow, and error like that of the reference in the same dtype.

    The backward pass starts from lse, whose last float32 bit is 2e-4 here, where the reference
    keeps the weights themselves.
    """
    case = attention_case((70,), dtype=dtype, magnitude=30.0)
    oracle, peer = run_attention(case, "reference", torch.float64), run_attention(case, "reference")
    for name, array in run(library, arguments(case)).items():
        wanted = getattr(oracle, name)
        error, allowed = (
            (t.double() - wanted).abs().max()
            for t in (as_tensor(array, dtype), getattr(peer, name))
        )
        factor = 10 if dtype == torch.float32 and name.startswith("grad") else 2
        assert error <= factor * allowed + torch.finfo(dtype).eps * wanted.abs().max(), name


@pytest.mark.parametrize("head_dim", [32, 64, 88])
@each_dtype
def test_thread_and_block_order_change_nothing(library, dtype, head_dim):
    case = attention_case(
        (70, 3, 0, 20),
        (33, 90, 5, 1),
        packed=True,
        slack=3,
        strided=True,
        head_dim=head_dim,
        dtype=dtype,
    )
    results = {}
    for order in ORDERS:
        configure(library, order, seed=11)
        results[order] = run(library, arguments(case))
    configure(library)
    for name, array in results["forward"].items():
        for order in ORDERS:
            np.testing.assert_array_equal(
                array.view(np.uint8), results[order][name].view(np.uint8), err_msg=f"{name} {order}"
            )


@each_dtype
def test_packing_order_changes_nothing(library, dtype):
    """Each sequence's results are bitwise the same alone, and in any company."""
    lengths = (70, 9, 33)
    case = arguments(attention_case(lengths, packed=True, dtype=dtype))
    together = run(library, case)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    for i in range(len(lengths)):
        part = slice(starts[i], starts[i + 1])
        alone = {
            n: v[part] if n in ("query", "key", "value", "grad_out", "ids_q", "ids_k") else v
            for n, v in case.items()
        }
        alone["cu_q"] = alone["cu_k"] = np.array([0, lengths[i]], np.int32)
        for name, array in run(library, alone).items():
            other = together[name][:, part] if name == "lse" else together[name][part]
            np.testing.assert_array_equal(
                array.view(np.uint8), np.ascontiguousarray(other).view(np.uint8), err_msg=name
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "offsets",
    [(0, 900, 20, 37), (-5, 10, 20, 37), (0, 30, 10, 37), (7, 7, 9, 11), (2**40, -(2**40), 0, 0)],
    ids=str,
)
def test_bad_values_stay_inside_the_tensors(library, dtype, offsets):
    """run() checks that nothing around the outputs and the scratch space was written; a sanitized
    run checks reads."""
    case = arguments(attention_case((10, 10, 17), packed=True, dtype=dtype, cu_dtype=torch.int64))
    case["cu_q"] = np.array(offsets, np.int64)
    case["cu_k"] = np.array(offsets[::-1], np.int64)
    case["ids_q"] = np.where(np.arange(37) % 2, 2**50, -(2**50))
    case["ids_k"] = np.full(37, 60)
    run(library, case)


@pytest.mark.parametrize(
    ("kw", "forward", "backward"),
    [
        ({"lengths": (20, 9), "packed": True}, 2, 2),  # preparation and attention
        ({"lengths": (20,)}, 2, 2),
        ({"lengths": (20, 9), "packed": True, "grid": None}, 1, 2),
        ({"lengths": (20,), "grid": None}, 1, 2),
    ],
    ids=str,
)
@each_dtype
def test_a_call_is_few_launches(library, dtype, kw, forward, backward):
    case = arguments(attention_case(dtype=dtype, **kw))
    take_counts(library)
    run(library, case, backward=False)
    assert take_counts(library).launches == forward
    run(library, case)
    assert take_counts(library).launches == forward + backward


@pytest.mark.parametrize("count", [2, 40, 256, 257])
def test_packed_sequences_are_ranked_by_their_partners(library, count):
    """The ranks end the scratch space: the longest partner first, equal ones in their order, then
    the rows outside. More than 256 sequences are not ranked."""
    generator = np.random.default_rng(count)
    lengths, partners = (generator.integers(0, 4, count).tolist() for _ in range(2))
    case = attention_case(lengths, partners, packed=True, heads=3, head_dim=8, slack=2)
    check(library, case)
    inputs = arguments(case)
    p = describe(inputs)
    size = library.jk_masked_attention_cuda_scratch(p, 0)
    scratch = np.zeros(size, np.uint8)
    out, lse = np.empty_like(inputs["query"]), np.empty((3, sum(lengths) + 2), np.float32)
    p.out, p.lse, p.lse_stride_head = rows(out), lse.ctypes.data, lse.shape[1]
    p.scratch, p.scratch_bytes = scratch.ctypes.data, size
    assert library.jk_masked_attention_cuda_fwd(p, None) is None
    work = np.array([0, *partners, 0])
    order = np.argsort(-work, kind="stable")
    own = np.array([0, *lengths, 2])[order]
    starts = size - -(-8 * len(work) // 256) * 256
    found = scratch[starts:][: 8 * len(work)].view(np.int64)
    if count > 256:
        assert not np.array_equal(found, np.cumsum(own) - own)
        return
    np.testing.assert_array_equal(found, np.cumsum(own) - own)
    sequences = starts - -(-4 * len(work) // 256) * 256
    np.testing.assert_array_equal(scratch[sequences:][: 4 * len(work)].view(np.int32), order)


def test_rows_outside_every_sequence_are_zero(library):
    case = arguments(attention_case((10, 10, 17), packed=True))
    case["cu_q"] = case["cu_k"] = np.array([4, 4, 20, 30], np.int32)
    result = run(library, case)
    outside = np.r_[0:4, 30:37]
    for name in ("out", "grad_query", "grad_key", "grad_value"):
        assert (result[name][outside] == 0).all()
        assert (result[name][4:30] != 0).any(axis=(1, 2)).all()
    assert (result["lse"][:, outside] == -np.inf).all()
    assert np.isfinite(result["lse"][:, 4:30]).all()


@pytest.mark.parametrize("stride", [0, 1])
def test_expanded_gradients(library, stride):
    """out.sum().backward() hands an expanded gradient over: every token or every head at one
    address."""
    case = attention_case((37,), dtype=torch.bfloat16)
    shape = list(case.grad_out.shape)
    shape[1 + stride] = 1
    grad = torch.randn(shape, dtype=torch.float64).to(torch.bfloat16).double()
    expanded = replace(case, grad_out=grad.expand(case.grad_out.shape).contiguous())
    inputs = arguments(expanded)
    reference = run(library, inputs)
    inputs["grad_out"] = bits(grad.to(torch.bfloat16).expand(case.grad_out.shape))
    for name, array in run(library, inputs).items():
        np.testing.assert_array_equal(
            array.view(np.uint8), reference[name].view(np.uint8), err_msg=name
        )


def test_one_id_list_serves_every_sequence_of_a_batch(library):
    inputs = arguments(attention_case((21, 21), (40, 40), dtype=torch.bfloat16))
    inputs["ids_q"], inputs["ids_k"] = inputs["ids_q"][0], inputs["ids_k"][0]
    shared = run(library, inputs)
    inputs["ids_q"], inputs["ids_k"] = (np.stack([inputs[n]] * 2) for n in ("ids_q", "ids_k"))
    for name, array in run(library, inputs).items():
        np.testing.assert_array_equal(
            array.view(np.uint8), shared[name].view(np.uint8), err_msg=name
        )


@pytest.mark.parametrize("grid", [None, (3, 4, 5)], ids=["plain", "rope"])
def test_offsets_beyond_32_bits(library, grid):
    """The second sequence lies 2^31 elements behind the first; only the touched pages of that space
    become memory."""
    inputs = arguments(attention_case((9, 9), dtype=torch.bfloat16, grid=grid))
    expected = run(library, inputs)
    far = dict(inputs)
    space = np.empty(2**31 + 2**16, np.uint16)
    for i, name in enumerate(("query", "key", "value", "grad_out")):
        array = inputs[name]
        strides = (2**32, *array.strides[1:])
        far[name] = np.lib.stride_tricks.as_strided(space[i * 2**13 :], array.shape, strides)
        far[name][...] = array
    for name, array in run(library, far).items():
        np.testing.assert_array_equal(
            array.view(np.uint8), expected[name].view(np.uint8), err_msg=name
        )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"head_dim": 12}, "head_dim must be a multiple of 8 from 8 to 128"),
        ({"head_dim": 136}, "head_dim must be a multiple of 8 from 8 to 128"),
        ({"dtype": 7}, "query must have dtype float32, bfloat16 or float16"),
        ({"heads": 70000}, "query must have at most 65535 heads"),
        ({"len_k": 2**31}, "fewer than 2147479551 rows"),
        ({"len_q": -1}, "sizes of at least 0"),
        ({"rope_table": 4}, "rope_table must be 8-byte aligned"),
        ({"scratch_bytes": -1}, "scratch must have the size"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["fwd", "bwd"])
def test_refusals(library, change, sentence, name):
    # The arrays must outlive the pointers in the params.
    inputs = arguments(attention_case((5,)))
    p = describe(inputs)
    for field, value in change.items():
        setattr(p, field, value)
    got = getattr(library, f"jk_masked_attention_cuda_{name}")(p, None).decode()
    assert got.startswith("masked_attention: ")
    assert sentence in got
    assert got.endswith(".")


def test_a_write_around_an_output_is_seen():
    guarded = Guarded((3, 5), np.float32)
    guarded.array[:] = 0
    assert guarded.intact()
    for place in (0, guarded.outside.nonzero()[0][-1]):
        guarded.buffer[place] = 0
        assert not guarded.intact()
        guarded.buffer[place] = 0xFF


@pytest.mark.parametrize(
    "fault", ["off_by_one_id", "dropped_scale", "swapped_layout", "late_offset"]
)
@each_dtype
def test_a_planted_fault_is_noticed(library, monkeypatch, fault, dtype):
    case = attention_case((20, 30), packed=True, dtype=dtype)
    check(library, case)
    faulty = arguments(case)
    if fault == "off_by_one_id":
        faulty["ids_q"] = faulty["ids_q"] - 1
    elif fault == "dropped_scale":
        faulty["scale"] = np.array(1.0)
    elif fault == "swapped_layout":
        faulty["rope_table"] = arguments(
            attention_case((20, 30), packed=True, dtype=dtype, layout="tiled")
        )["rope_table"]
    else:
        faulty["cu_k"] = faulty["cu_k"] + np.array([0, 1, 0], np.int32)
    monkeypatch.setattr(f"{__name__}.arguments", lambda _: faulty)
    with pytest.raises(AssertionError, match="error"):
        check(library, case)


def unaligned(array: np.ndarray) -> np.ndarray:
    """The same values at odd addresses and with an odd distance between rows."""
    wide = np.zeros((*array.shape[:-1], array.shape[-1] + 1), array.dtype)
    wide[..., 1:] = array
    return wide[..., 1:]


@pytest.mark.parametrize("grid", [None, (3, 4, 5)], ids=["plain", "rope"])
@pytest.mark.parametrize(
    "names",
    [("query", "key", "value", "grad_out"), ("value",), ("query", "grad_out")],
    ids="-".join,
)
@each_dtype
def test_unaligned_inputs_give_the_same_bits(library, dtype, names, grid):
    inputs = arguments(attention_case((37,), head_dim=24, dtype=dtype, grid=grid))
    expected = run(library, inputs)
    for name, array in run(library, {**inputs, **{n: unaligned(inputs[n]) for n in names}}).items():
        np.testing.assert_array_equal(
            array.view(np.uint8), expected[name].view(np.uint8), err_msg=name
        )


@pytest.fixture(scope="module")
def saved_cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calls and what the plain library answers, for children without torch: both kernel families,
    every kind of row."""
    library = open_attention(build(SOURCE))
    cases = {
        "dense": attention_case((70,), head_dim=64, dtype=torch.bfloat16, heads=1),
        "packed": attention_case(
            (40, 0, 3), (5, 7, 70), packed=True, slack=2, head_dim=56, dtype=torch.bfloat16, heads=1
        ),
        "float": attention_case((40, 0, 3), (5, 7, 33), packed=True, slack=2, head_dim=40, heads=1),
    }
    arrays: dict[str, np.ndarray] = {}
    for name, case in cases.items():
        inputs = arguments(case)
        if name == "packed":
            inputs["ids_q"] = np.full_like(inputs["ids_q"], 10**6)
        for key, value in inputs.items():
            arrays[f"{name}/{key}"] = np.asarray(value)
        for key, value in run(library, inputs).items():
            arrays[f"{name}/expected_{key}"] = value
        # The other library's compiler fuses other operations.
        tolerance = FLOAT32_DEEP if case.dtype == torch.float32 else BFLOAT16
        arrays[f"{name}/tolerance"] = np.array([tolerance["rtol"], tolerance["atol"]])
    path = tmp_path_factory.mktemp("cases") / "cases.npz"
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("sanitizer", ["asan_ubsan", "tsan"])
def test_sanitizers_find_nothing(saved_cases, sanitizer):
    sanitized = build(SOURCE, sanitizer, {"JK_ONLY_CLASS": 64})
    done = run_sanitized([str(CHILD), str(sanitized), str(saved_cases)], sanitizer)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all right" in done.stdout
