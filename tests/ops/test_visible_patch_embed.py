"""Behaviour of visible_patch_embed on every backend that runs here; the CUDA source and Triton run
in tests/simt and tests/interpret."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from jepa_kernels import (
    BackendUnsupportedError,
    explain,
    native,
    use_backend,
    visible_patch_embed,
)
from jepa_kernels.ops.visible_patch_embed import products
from jepa_kernels.ops.visible_patch_embed.contract import OP
from jepa_kernels.ops.visible_patch_embed.inputs import NAME
from jepa_kernels.testing import (
    FLOAT32,
    FLOAT32_CANCELLING,
    GRADCHECK,
    RESULT_FAULTS,
    assert_within_budget,
    planted_fault,
)
from jepa_kernels.testing.embedding import MEAN, STD, check_embedding, embedding_case, run_embedding
from tests.conftest import missing
from tests.ops.backends import device_of, each, runnable

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / f"{NAME}.json").read_text())
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HERE = ("reference", *runnable(NAME))
each_backend = pytest.mark.parametrize("backend", each(NAME))
on_this_machine = pytest.mark.parametrize("backend", HERE)
each_layout = pytest.mark.parametrize("layout", ["dense", "shared", "packed"])


def place(backend: str) -> str:
    return device_of(NAME, backend)


def test_the_native_library_is_built():
    if not native.available():
        missing(str(native.reason()))
    assert "cpu" in HERE


@each_backend
@pytest.mark.parametrize("clip_dtype", [torch.uint8, *DTYPES], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_reference(backend, clip_dtype, dtype):
    case = embedding_case(clip_dtype=clip_dtype, dtype=dtype)
    check_embedding(case, backend, place(backend))


CASES = (
    {"visible": 0},
    {"batch": 0},
    {"visible": 1, "batch": 1, "grid": (1, 1, 1), "tubelet": (1, 1, 1), "channels": 1, "width": 1},
    {"visible": None},
    {"visible": None, "repeated": True},
    {"grid": (1, 3, 4), "tubelet": (1, 16, 16), "width": 33},
    {"tubelet": (3, 2, 5), "channels": 4, "width": 70},
    {"tubelet": (2, 16, 16), "visible": 20, "width": 40},
    {"bias": False},
    {"normalised": False},
    {"channels_last": True},
    {"channels_last": True, "tubelet": (2, 7, 5)},
    {"repeated": True, "visible": 40, "ids_dtype": torch.int32},
    {"grid": (3, 5, 7), "visible": 90, "batch": 3},
    {"grid": (3, 5, 7), "visible": 100, "batch": 3, "bias": False, "tubelet": (2, 16, 16)},
)


@each_backend
@each_layout
@pytest.mark.parametrize("clip_dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("options", CASES, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
def test_shapes_layouts_and_ids(backend, layout, clip_dtype, options):
    case = embedding_case(layout=layout, clip_dtype=clip_dtype, **options)
    check_embedding(case, backend, place(backend))


@each_backend
def test_blocks_of_rows(backend, monkeypatch):
    monkeypatch.setattr(products, "_BLOCK_BYTES", {"cpu": 1, "cuda": 1})
    for dtype in (torch.float32, torch.bfloat16):
        case = embedding_case(visible=None, layout="packed", dtype=dtype, repeated=True)
        check_embedding(case, backend, place(backend))


@on_this_machine
def test_equals_a_convolution_over_the_normalised_clip(backend):
    """The embedding of every token, gathered: values and gradients."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3, 4, 32, 48), dtype=torch.uint8, generator=generator)
    conv = torch.nn.Conv3d(3, 24, (2, 16, 16), (2, 16, 16))
    mean, std = (torch.tensor(s[:3]).view(3, 1, 1, 1) for s in (MEAN, STD))
    normalised = ((pixels.float() / 255 - mean) / std).requires_grad_()
    ids = torch.stack([torch.randperm(12, generator=generator)[:5] for _ in range(2)])
    every = conv(normalised).flatten(2).mT
    expected = torch.gather(every, 1, ids[..., None].expand(-1, -1, 24))
    cotangent = torch.randn(expected.shape, generator=generator)
    leaves = (conv.weight, conv.bias, normalised)
    wanted = torch.autograd.grad(expected, leaves, cotangent)
    options = {"mean": MEAN[:3], "std": STD[:3], "backend": backend}
    out = visible_patch_embed(pixels, conv.weight, conv.bias, ids=ids, **options)
    torch.testing.assert_close(out, expected, **FLOAT32_CANCELLING)
    for a, b in zip(torch.autograd.grad(out, leaves[:2], cotangent), wanted, strict=False):
        torch.testing.assert_close(a, b, **FLOAT32_CANCELLING)
    out = visible_patch_embed(normalised, conv.weight, conv.bias, ids=ids, backend=backend)
    torch.testing.assert_close(out, expected, **FLOAT32_CANCELLING)
    for a, b in zip(torch.autograd.grad(out, leaves, cotangent), wanted, strict=True):
        torch.testing.assert_close(a, b, **FLOAT32_CANCELLING)


@on_this_machine
@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), channels_last=st.booleans())
def test_the_order_of_ids_is_that_of_the_output(backend, seed, channels_last):
    case = embedding_case(seed=seed, channels_last=channels_last)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    clip, weight, bias = case.clip, case.weight.float(), case.bias.float()
    out = visible_patch_embed(clip, weight, bias, ids=case.ids, backend=backend)
    other = visible_patch_embed(clip, weight, bias, ids=case.ids[:, order], backend=backend)
    torch.testing.assert_close(other, out[:, order], **FLOAT32)


@on_this_machine
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_equal_floats_of_the_same_values(backend, dtype):
    case = embedding_case(dtype=dtype)
    weight, bias = case.weight.to(dtype), case.bias.to(dtype)
    options = {"ids": case.ids, "mean": MEAN[:3], "std": STD[:3], "backend": backend}
    of_bytes = visible_patch_embed(case.clip, weight, bias, **options)
    for float_dtype in (torch.float32, torch.bfloat16, torch.float16):  # each holds every byte
        clip = case.clip.to(float_dtype)
        of_floats = visible_patch_embed(clip, weight, bias, scale=1 / 255, **options)
        assert torch.equal(of_floats, of_bytes)


@on_this_machine
def test_packed_mask_sets_equal_one_call_each(backend):
    case = embedding_case(layout="packed")
    weight, bias = case.weight.float(), case.bias.float()
    out = visible_patch_embed(
        case.clip, weight, bias, ids=case.ids, cu_seqlens=case.cu_seqlens, backend=backend
    )
    bounds = case.cu_seqlens.tolist()
    for s, (first, last) in enumerate(pairwise(bounds)):
        clip, ids = case.clip[s % 2][None], case.ids[first:last]
        one = visible_patch_embed(clip, weight, bias, ids=ids, backend=backend)
        torch.testing.assert_close(out[first:last], one[0], **FLOAT32)


@on_this_machine
def test_no_ids_are_all_tokens_in_order(backend):
    case = embedding_case()
    weight = case.weight.float()
    every = torch.arange(24)
    assert torch.equal(
        visible_patch_embed(case.clip, weight, backend=backend),
        visible_patch_embed(case.clip, weight, ids=every, backend=backend),
    )


@on_this_machine
def test_hidden_pixels_are_not_read(backend):
    """NaN in every hidden tubelet changes nothing, and their gradient is 0."""
    if backend == "reference":
        pytest.skip("the specification embeds every tubelet")
    case = embedding_case(clip_dtype=torch.float32, visible=5)
    weight, ids = case.weight.float(), case.ids
    clip = case.clip.float()
    shown = torch.zeros(2, 24).scatter_(1, ids, 1.0).view(2, 1, 2, 3, 4)
    shown = functional.interpolate(shown, scale_factor=(2, 4, 4)).bool().expand_as(clip)
    holed = torch.where(shown, clip, torch.nan).requires_grad_()
    out = visible_patch_embed(holed, weight, ids=ids, backend=backend)
    assert torch.equal(out, visible_patch_embed(clip, weight, ids=ids, backend=backend))
    (gradient,) = torch.autograd.grad(out.sum(), holed)
    assert gradient[~shown].eq(0).all()
    assert gradient[shown].isfinite().all()


@each_backend
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_repeats_bitwise(backend, layout):
    if backend == "torch":
        pytest.skip("determinism is a promise of the kernels")
    case = embedding_case(
        clip_dtype=torch.float32, layout=layout, visible=60, grid=(3, 5, 7), repeated=True
    )
    first, second = (run_embedding(case, backend, device=place(backend)) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@each_backend
def test_a_frozen_part_gets_no_gradient(backend):
    case, device = embedding_case(clip_dtype=torch.float32), place(backend)
    tensors = [t.float().to(device) for t in (case.clip, case.weight, case.bias)]
    ids = case.ids.to(device)
    everything = [t.clone().requires_grad_() for t in tensors]
    whole = torch.autograd.grad(
        visible_patch_embed(*everything, ids=ids, backend=backend).sum(), everything
    )
    for i in range(3):
        given = [t.clone().requires_grad_(i == j) for j, t in enumerate(tensors)]
        out = visible_patch_embed(*given, ids=ids, backend=backend)
        assert torch.equal(torch.autograd.grad(out.sum(), given[i])[0], whole[i])


@pytest.mark.parametrize("backend", ["reference", "torch"])
@each_layout
def test_gradcheck(backend, layout):
    case = embedding_case(
        grid=(1, 2, 2),
        tubelet=(1, 2, 1),
        width=2,
        visible=2,
        layout=layout,
        repeated=True,
        clip_dtype=torch.float64,
        dtype=torch.float64,
    )

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return visible_patch_embed(
            *tensors,
            ids=case.ids,
            cu_seqlens=case.cu_seqlens,
            mean=MEAN[:3],
            std=STD[:3],
            backend=backend,
        )

    leaves = [t.requires_grad_() for t in (case.clip, case.weight, case.bias)]
    assert torch.autograd.gradcheck(call, leaves, **GRADCHECK)


@each_backend
@pytest.mark.parametrize("clip_dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_opcheck(backend, clip_dtype, layout):
    forward, backward = (
        getattr(torch.ops.jepa_kernels, f"{NAME}_{way}").default for way in ("fwd", "bwd")
    )
    case, device = embedding_case(layout=layout), place(backend)
    clip, weight = case.clip.to(device, clip_dtype), case.weight.float().to(device)
    bias = case.bias.float().to(device)
    inputs = OP.prepare(
        clip,
        weight,
        bias,
        ids=case.ids.to(device),
        cu_seqlens=None if case.cu_seqlens is None else case.cu_seqlens.to(device),
        mean=MEAN[:3],
        std=STD[:3],
    )
    _, _, _, *rest = (*OP.signature.values(inputs), backend)
    is_float = clip_dtype == torch.float32
    leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in (clip, weight, bias)]
    torch.library.opcheck(forward, (*leaves, *rest))
    out, rows = forward(clip, weight, bias, *rest)
    needs = [is_float, True, True]
    torch.library.opcheck(
        backward,
        (torch.ones_like(out), [rows], needs, clip, weight, bias, *rest),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
    # A sum's gradient arrives expanded, with strides 0.
    expanded = torch.ones((), device=device).expand(out.shape)
    for a, b in zip(
        backward(expanded, [rows], needs, clip, weight, bias, *rest),
        backward(torch.ones_like(out), [rows], needs, clip, weight, bias, *rest),
        strict=True,
    ):
        assert torch.equal(a, b)


@on_this_machine
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_a_compiled_call_equals_the_eager_one(backend, layout):
    torch._dynamo.reset()
    case = embedding_case(layout=layout)

    def loss(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        out = visible_patch_embed(
            case.clip,
            weight * 1.5,
            bias,
            ids=case.ids,
            cu_seqlens=case.cu_seqlens,
            mean=MEAN[:3],
            std=STD[:3],
            backend=backend,
        )
        return out * 2.0

    results = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [t.float().requires_grad_() for t in (case.weight, case.bias)]
        out = call(*leaves)
        grads = torch.autograd.grad(out, leaves, case.grad_out.float())
        results.append((out.detach(), *grads))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, **FLOAT32)


@each_backend
@pytest.mark.parametrize("fault", RESULT_FAULTS)
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_planted_fault_is_seen(backend, fault, phase):
    if phase == "forward" and fault == "unwritten_row":
        pytest.skip("the last result of forward are whole numbers, which cannot be NaN")
    case = embedding_case(clip_dtype=torch.float32, visible=None)
    check_embedding(case, backend, place(backend))
    with planted_fault(NAME, backend, fault, phase), pytest.raises(AssertionError):
        check_embedding(case, backend, place(backend))


@on_this_machine
@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: str(c["ids"]))
def test_golden_numbers(backend, case):
    leaves = {n: torch.tensor(case[n], requires_grad=True) for n in ("weight", "bias", "clip")}
    clip = leaves["clip"]
    if case["dtype"] == "uint8":
        clip = leaves.pop("clip").detach().to(torch.uint8)
    out = visible_patch_embed(
        clip,
        leaves["weight"],
        leaves["bias"],
        ids=torch.tensor(case["ids"]),
        cu_seqlens=None if case["cu_seqlens"] is None else torch.tensor(case["cu_seqlens"]),
        mean=case["mean"],
        std=case["std"],
        backend=backend,
    )
    cotangent = torch.tensor(case["grad_out"]).view(out.shape)
    grads = torch.autograd.grad(out, list(leaves.values()), cotangent)
    expected = torch.tensor(case["out"], dtype=torch.float64).view(out.shape)
    assert_within_budget("out", out.detach(), expected)
    for name, found in zip(leaves, grads, strict=True):
        wanted = torch.tensor(case[f"grad_{name}"], dtype=torch.float64)
        assert_within_budget(f"grad_{name}", found, wanted, gradient=True)


# Calls.


def test_statistics_may_be_tensors():
    case = embedding_case()
    weight = case.weight.float()
    tensors = {"mean": torch.tensor(MEAN[:3]), "std": torch.tensor(STD[:3])}
    numbers = {"mean": MEAN[:3], "std": list(STD[:3])}
    for names in (("mean", "std"), ("mean",), ("std",), ()):
        torch.testing.assert_close(
            visible_patch_embed(case.clip, weight, **{n: tensors[n] for n in names}),
            visible_patch_embed(case.clip, weight, **{n: numbers[n] for n in names}),
            **FLOAT32_CANCELLING,
        )
    mixed = {"mean": tensors["mean"], "std": numbers["std"]}
    torch.testing.assert_close(
        visible_patch_embed(case.clip, weight, **mixed),
        visible_patch_embed(case.clip, weight, **numbers),
        **FLOAT32_CANCELLING,
    )


def test_autocast_takes_its_dtype():
    case = embedding_case(clip_dtype=torch.float32)
    clip, weight, bias = (t.float() for t in (case.clip, case.weight, case.bias))
    with torch.autocast("cpu", torch.bfloat16):
        out = visible_patch_embed(clip, weight, bias, ids=case.ids)
    assert out.dtype == torch.bfloat16
    half = (weight.bfloat16(), bias.bfloat16())
    assert torch.equal(out, visible_patch_embed(clip, *half, ids=case.ids))


@pytest.mark.parametrize("backend", runnable(NAME))
def test_double_backward_is_refused(backend):
    case = embedding_case(clip_dtype=torch.float32)
    weight = case.weight.float().requires_grad_()
    out = visible_patch_embed(case.clip.float(), weight, backend=backend)
    (gradient,) = torch.autograd.grad(out.sum(), weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward must not be requested"):
        gradient.sum().backward()


def test_errors_are_one_sentence():
    clip, weight = torch.zeros(2, 3, 4, 8, 8, dtype=torch.uint8), torch.zeros(5, 3, 2, 4, 4)
    ids, offsets = torch.tensor([0, 7]), torch.tensor([0, 1, 2])
    bad = [
        (lambda: visible_patch_embed([1], weight), TypeError, "clip must be a tensor, got list"),
        (lambda: visible_patch_embed(clip, None), TypeError, "weight must be a tensor, got None"),
        (lambda: visible_patch_embed(clip[0], weight), ValueError, "clip must have 5 dimensions"),
        (lambda: visible_patch_embed(clip, weight[0]), ValueError, "weight must have 5 dim"),
        (lambda: visible_patch_embed(clip.int(), weight), ValueError, "clip must have dtype uint8"),
        (lambda: visible_patch_embed(clip, weight.int()), ValueError, "weight must have dtype"),
        (
            lambda: visible_patch_embed(clip[:, :2], weight),
            ValueError,
            "clip must have the 3 channels of weight, got 2",
        ),
        (
            lambda: visible_patch_embed(clip[:, :, :3], weight),
            ValueError,
            "clip must have a multiple of 2 as its frames, got 3",
        ),
        (
            lambda: visible_patch_embed(clip[..., :6], weight),
            ValueError,
            "clip must have a multiple of 4 as its width, got 6",
        ),
        (
            lambda: visible_patch_embed(clip[:, :, :0], weight),
            ValueError,
            "clip must have a multiple of 2 as its frames, got 0",
        ),
        (
            lambda: visible_patch_embed(clip, weight, weight[:4, 0, 0, 0, 0]),
            ValueError,
            "bias must have shape (5,), got (4,)",
        ),
        (
            lambda: visible_patch_embed(clip, weight, torch.zeros(5).double()),
            ValueError,
            "bias must have the dtype of weight (float32), got float64",
        ),
        (
            lambda: visible_patch_embed(clip, weight, ids=ids.float()),
            ValueError,
            "ids must have dtype int32 or int64",
        ),
        (
            lambda: visible_patch_embed(clip, weight, ids=torch.tensor([0, 8])),
            ValueError,
            "ids must hold ids from 0 to 7, got 8",
        ),
        (
            lambda: visible_patch_embed(clip, weight, ids=torch.tensor([-1, 3])),
            ValueError,
            "ids must hold ids from 0 to 7, got -1",
        ),
        (
            lambda: visible_patch_embed(clip, weight, ids=ids[None]),
            ValueError,
            "ids must have shape (N,) or (2, N) without cu_seqlens, got (1, 2)",
        ),
        (
            lambda: visible_patch_embed(clip, weight, ids=ids[None], cu_seqlens=offsets),
            ValueError,
            "ids must have 1 dimensions [tokens] with cu_seqlens",
        ),
        (
            lambda: visible_patch_embed(clip, weight, cu_seqlens=offsets),
            ValueError,
            "cu_seqlens must be None without ids",
        ),
        (
            lambda: visible_patch_embed(clip, weight, ids=ids, cu_seqlens=offsets[:2]),
            ValueError,
            "cu_seqlens must have an offset more than a multiple of 2 (clips), got 2",
        ),
        (
            lambda: visible_patch_embed(clip, weight, ids=ids, cu_seqlens=offsets[:1]),
            ValueError,
            "ids must be empty without a sequence",
        ),
        (
            lambda: visible_patch_embed(clip, weight, ids=ids[:1], cu_seqlens=offsets),
            ValueError,
            "cu_seqlens must end at or before 1 rows",
        ),
        (
            lambda: visible_patch_embed(clip, weight, ids=ids.repeat(2), cu_seqlens=offsets),
            ValueError,
            "cu_seqlens must end at the 4 rows of ids, got 2",
        ),
        (
            lambda: visible_patch_embed(clip, weight, mean=[0.5, 0.5]),
            ValueError,
            "mean must have 3 numbers, one of each channel, got 2",
        ),
        (
            lambda: visible_patch_embed(clip, weight, std=[1.0, 0.0, 1.0]),
            ValueError,
            "std must not be 0",
        ),
        (
            lambda: visible_patch_embed(clip, weight, std=torch.ones(2)),
            ValueError,
            "std must have shape (3,), one number of each channel, got (2,)",
        ),
        (lambda: visible_patch_embed(clip, weight, mean=0.5), TypeError, "mean must be a sequence"),
        (lambda: visible_patch_embed(clip, weight, scale="1"), TypeError, "scale must be a number"),
    ]
    for call, kind, text in bad:
        with pytest.raises(kind) as caught:
            call()
        message = str(caught.value)
        assert message.startswith(f"{NAME}: {text}"), message
        assert message.endswith("."), message


def test_a_refusal_names_the_reason():
    if "cpu" not in HERE:
        missing(str(native.reason()))
    clip, weight = torch.zeros(1, 3, 2, 8, 8), torch.zeros(5, 3, 2, 4, 4)
    with use_backend("cpu"), pytest.raises(BackendUnsupportedError, match="got float64"):
        visible_patch_embed(clip, weight.double())
    with pytest.raises(BackendUnsupportedError, match="clip must be uint8, float32, bfloat16 or"):
        visible_patch_embed(clip.double(), weight, backend="cpu")
    assert visible_patch_embed(clip.double(), weight).dtype == torch.float32  # auto finds torch
    text = explain(NAME, clip, weight, ids=torch.tensor([2, 0]))
    assert "runs on    cpu (auto)" in text
    assert "2 of 4 tokens, dense" in text
