"""Tools to test a backend: inputs, a float64 oracle on the same rounded inputs, error budgets per
dtype, planted faults.

Public, so that whoever adds a backend (or patches a kernel) can hold it to the same standard as
this package's own tests.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch

from ..backend import OPS
from ..rope3d import Rope3D, RopeLayout

HEAD_DIMS = (8, 24, 32, 64, 80, 88, 96, 128)

# float32 and float64: |error| <= atol + rtol * |oracle|; gradients get ten times that.
_TOLERANCE = {torch.float32: (1e-5, 1e-6), torch.float64: (1e-10, 1e-12)}

# What tests of whole models and formulas allow, by what they compare: keyword arguments of
# torch.testing.assert_close, |error| <= atol + rtol * |expected|.
Tolerance = Mapping[str, float]


def _tolerance(rtol: float, atol: float = 0.0) -> Tolerance:
    return MappingProxyType({"rtol": rtol, "atol": atol})


# Every bit; asked of assert_close for what torch.equal cannot say, such as NaN beside NaN.
EXACT = _tolerance(0.0)

# float32, whose unit in the last place is 1.2e-7 of a value.
# The same sums in another order.
FLOAT32 = _tolerance(*_TOLERANCE[torch.float32])
# Networks of several layers, and gradients.
FLOAT32_DEEP = _tolerance(1e-4, 1e-5)
# Sums whose terms are larger than they are: linear maps of pixels, differences of mixtures.
FLOAT32_CANCELLING = _tolerance(1e-4, 1e-4)
# Crops against torch's antialiased resampling.
FLOAT32_CROPS = _tolerance(1e-5, 2e-5)
# Short chains of operations: a step of AdamW or of a teacher, a rollout of a small head.
FLOAT32_SHORT = _tolerance(1e-6, 1e-7)
# A few roundings, in numbers that were computed or stored in float32.
FLOAT32_ROUNDED = _tolerance(1e-6)
FLOAT32_STORED = _tolerance(0.0, 1e-6)
# Two roundings at most: the published numbers of an average of two values.
FLOAT32_LAST_PLACE = _tolerance(2e-7, 2e-7)
# What should be 0 or the same up to rounding, for values around 1.
FLOAT32_NEAR_ZERO = _tolerance(0.0, 1e-5)
# Products of TF32, which keeps 10 bits of each factor, summed over 8 terms.
TF32_PRODUCTS = _tolerance(0.0, 1e-2)

# float64.
# Formulas against loops.
FLOAT64 = _tolerance(_TOLERANCE[torch.float64][0])
FLOAT64_SHORT = _tolerance(1e-12)
# A few roundings, for values around 1.
FLOAT64_LAST_PLACE = _tolerance(1e-15, 1e-15)
# Numbers that are stored with ten decimals.
FLOAT64_STORED = _tolerance(1e-10, 1e-10)
# Gradients against central differences.
CENTRAL_DIFFERENCES = _tolerance(1e-5, 1e-5)
# torch.autograd.gradcheck.
GRADCHECK: Tolerance = MappingProxyType({"eps": 1e-6, "atol": 1e-6})

# 16 bits, where a test has no peer for assert_within_budget. A rounding to bfloat16 is up to 4e-3
# of a value, one to float16 5e-4.
# One rounding.
BFLOAT16_ROUNDED = _tolerance(4e-3, 1e-6)
# A few roundings, for values around 1.
BFLOAT16 = _tolerance(2e-2, 2e-2)
# One rounding to float16; the absolute part is for numbers below its normal range.
FLOAT16_ROUNDED = _tolerance(1e-3, 1e-5)
# Several steps of stochastic rounding with other bits.
BFLOAT16_STOCHASTIC = _tolerance(2e-2, 1e-3)
# A loss under autocast against the one in float32.
BFLOAT16_LOSS = _tolerance(2e-2)
# Features stored as float16.
FLOAT16_STORED = _tolerance(0.0, 2e-3)

# Attention in float32 at logits of 1e4, whose own rounding is 1e-3, which softmax turns into a
# relative error of its weights.
FLOAT32_LARGE_LOGITS = _tolerance(2e-2, 2e-2)
# Attention on its own, |error| as a norm relative to the oracle's, per dtype.
ATTENTION_NORM = {torch.float32: 1e-6, torch.bfloat16: 1.2e-2}
# The same where the exact result cancels to (almost) nothing, and what is left is all rounding.
ATTENTION_NORM_CANCELLING = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
# The same at logits of 25 and more, whose rounding a peaked softmax passes on.
ATTENTION_NORM_PEAKED = {torch.float32: 5e-6, torch.bfloat16: 5e-2}
# Its log-sum-exp, absolute: a few roundings of scores around 10.
ATTENTION_LSE = {torch.float32: 5e-6, torch.bfloat16: 2e-2}
# Its relative norm as a multiple of that of torch's attention in the same dtype; without fused
# multiply-add a product is rounded before it is added.
ATTENTION_OF_TORCH, ATTENTION_OF_TORCH_UNFUSED = 1.25, 1.6

# Numbers that are drawn, rounded or modelled, rather than computed another way.
# A variance of standardised features, which the eps of the norm lowers.
STANDARDISED_VARIANCE = _tolerance(0.0, 1e-2)
# A norm after it has been clipped, an effective rank, a fitted ratio of coefficients.
DERIVED = _tolerance(1e-3)
# What a 16-bit teacher has moved after 1000 steps below its rounding, by Kahan or stochastic sums.
SMALL_STEPS = _tolerance(2e-2)
# The same where all elements are equal, so that their last rounding does not average out.
SMALL_STEPS_OF_ONE_VALUE = _tolerance(5e-2)
# The standard deviation of a few hundred initial weights or more.
DRAWN_DEVIATION = _tolerance(5e-2)
# Pixels by which the centre of a drawn shape is off.
DRAWN_CENTRE = _tolerance(0.0, 0.1)
# Parameters of a model against the round number that it is named by; a count of operations against
# a formula that leaves out its lower terms.
NOMINAL = _tolerance(0.12)
# Medians of the parts of a step against the median of the whole.
MEDIANS = _tolerance(2e-2)


def assert_within_budget(
    name: str,
    actual: torch.Tensor,
    oracle: torch.Tensor,
    peer: torch.Tensor | None = None,
    gradient: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Fails unless `actual` is finite and as close to the float64 `oracle` as its dtype allows.

    Args:
        name: what is compared, for the message.
        actual: the result under test.
        oracle: the float64 result on the same rounded inputs.
        peer: for float16 and bfloat16, the reference run in that dtype: the largest error may be
            twice the peer's plus ``eps * max|oracle|``, the mean error 1.25 times it plus the same
            share of the mean.
        gradient: float32 and float64 gradients may err ten times as much.
        dtype: the dtype whose budget holds; None is that of `actual` (lse is float32 whatever the
            inputs are).

    Raises:
        AssertionError: with the measured error and the budget.
    """
    if actual.shape != oracle.shape:
        raise AssertionError(
            f"{name}: shape {tuple(actual.shape)} instead of {tuple(oracle.shape)}"
        )
    if oracle.numel() == 0:
        return
    infinite = ~torch.isfinite(oracle)
    if not torch.equal(actual.double()[infinite], oracle[infinite]):
        raise AssertionError(f"{name}: the infinities of the oracle are not where they belong")
    if not torch.isfinite(actual[~infinite]).all():
        raise AssertionError(
            f"{name}: {int((~torch.isfinite(actual[~infinite])).sum())} elements are not finite"
        )
    oracle, actual = oracle[~infinite], actual[~infinite]
    if oracle.numel() == 0:
        return
    error = (actual.double() - oracle).abs()
    dtype = actual.dtype if dtype is None else dtype
    if dtype in _TOLERANCE:
        rtol, atol = (t * (10 if gradient else 1) for t in _TOLERANCE[dtype])
        # A sum of many terms may cancel: the scale of an element's error is that of the tensor, not
        # of the element.
        scale = torch.maximum(oracle.abs(), oracle.abs().mean())
        excess = (error - (atol + rtol * scale)).max()
        if excess > 0:
            worst = int((error - (atol + rtol * scale)).argmax())
            raise AssertionError(
                f"{name}: error {error.flatten()[worst]:.3e} at oracle "
                f"{oracle.flatten()[worst]:.3e} ({dtype})"
            )
        return
    if peer is None:
        raise ValueError(f"assert_within_budget: peer must be given for {dtype}, got None.")
    peer_error = (peer[~infinite].double() - oracle).abs()
    eps = torch.finfo(dtype).eps
    for what, measured, budget in (
        ("largest", error.max(), 2 * peer_error.max() + eps * oracle.abs().max()),
        ("mean", error.mean(), 1.25 * peer_error.mean() + eps * oracle.abs().mean()),
    ):
        if measured > budget:
            raise AssertionError(
                f"{name}: {what} error {measured:.3e} over the budget {budget:.3e} ({dtype})"
            )


@dataclass(frozen=True)
class AttentionCase:
    """Inputs of masked_attention, as float64 values that the case's dtype represents exactly."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    grad_out: torch.Tensor
    dtype: torch.dtype
    query_ids: torch.Tensor | None = None
    key_ids: torch.Tensor | None = None
    rope: Rope3D | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    query_times: torch.Tensor | None = None
    key_times: torch.Tensor | None = None
    window: int | None = None
    scale: float | None = None

    def options(self) -> dict[str, Any]:
        names = (
            "query_ids",
            "key_ids",
            "rope",
            "cu_seqlens_q",
            "cu_seqlens_k",
            "query_times",
            "key_times",
            "window",
            "scale",
        )
        return {name: getattr(self, name) for name in names}


def attention_case(
    lengths: Sequence[int] | tuple[int, int] = (13,),
    lengths_k: Sequence[int] | None = None,
    *,
    packed: bool = False,
    heads: int = 2,
    head_dim: int = 32,
    grid: tuple[int, int, int] | None = (3, 4, 5),
    layout: RopeLayout = "interleaved",
    interpolate_from: int | None = None,
    dtype: torch.dtype = torch.float32,
    id_dtype: torch.dtype = torch.int64,
    cu_dtype: torch.dtype = torch.int32,
    unrotated: int = 1,
    slack: int = 0,
    strided: bool = False,
    magnitude: float = 1.0,
    times: str | None = None,
    num_times: int = 4,
    window: int | None = None,
    time_dtype: torch.dtype = torch.int64,
    seed: int = 0,
) -> AttentionCase:
    """A random case: one length per sequence (dense: all the same), ids drawn without order, the
    first `unrotated` ids of each sequence -1.

    Args:
        lengths, lengths_k: query and key tokens of each sequence; `lengths_k` None is
            self-attention.
        packed: concatenate the sequences, followed by `slack` rows that belong to none.
        strided: make query, key and value views of one wider buffer, as of a qkv projection, with
            the heads in between.
        magnitude: standard deviation of query and key.
        times: ``"sorted"`` or ``"random"`` times from 0 to ``num_times - 1``, those of queries and
            keys drawn apart; dense ones serve the whole batch where they are sorted. None: no
            times.
        Other arguments: as named in masked_attention.
    """
    generator = torch.Generator().manual_seed(seed)
    self_attention = lengths_k is None
    counts_k = list(lengths) if lengths_k is None else list(lengths_k)
    counts_q = list(lengths)

    def values(total: int, batch: int, spread: float) -> torch.Tensor:
        shape = (total, heads, head_dim) if packed else (batch, total, heads, head_dim)
        return (
            (torch.randn(shape, generator=generator, dtype=torch.float64) * spread)
            .to(dtype)
            .double()
        )

    def ids(counts: list[int], extra: int, tokens: int) -> torch.Tensor:
        rows = []
        for count in counts:
            row = torch.randint(0, tokens, (count,), generator=generator)
            row[:unrotated] = -1
            rows.append(row)
        if packed:
            return torch.cat([*rows, torch.zeros(extra, dtype=torch.int64)]).to(id_dtype)
        return torch.stack(rows).to(id_dtype)

    total_q = sum(counts_q) + slack if packed else counts_q[0]
    total_k = sum(counts_k) + slack if packed else counts_k[0]
    case = AttentionCase(
        query=values(total_q, len(counts_q), magnitude),
        key=values(total_k, len(counts_k), magnitude),
        value=values(total_k, len(counts_k), 1.0),
        grad_out=values(total_q, len(counts_q), 1.0),
        dtype=dtype,
    )
    if strided:
        case = replace(
            case, query=_inside(case.query), key=_inside(case.key), value=_inside(case.value)
        )
    if grid is not None:
        tokens = math.prod(grid)
        query_ids = ids(counts_q, slack, tokens)
        key_ids = None if self_attention else ids(counts_k, slack, tokens)
        case = replace(
            case, query_ids=query_ids, key_ids=key_ids, rope=Rope3D(grid, layout, interpolate_from)
        )
    if packed:
        cu_q = torch.tensor(
            [0, *torch.tensor(counts_q).cumsum(0).tolist()] if counts_q else [0], dtype=cu_dtype
        )
        cu_k = torch.tensor(
            [0, *torch.tensor(counts_k).cumsum(0).tolist()] if counts_k else [0], dtype=cu_dtype
        )
        case = replace(case, cu_seqlens_q=cu_q, cu_seqlens_k=None if self_attention else cu_k)
    if times is None:
        return case

    def drawn(counts: list[int], extra: int) -> torch.Tensor:
        rows = [torch.randint(0, num_times, (count,), generator=generator) for count in counts]
        if times == "sorted":
            rows = [row.sort().values for row in rows]
        if packed:
            return torch.cat([*rows, torch.zeros(extra, dtype=torch.int64)]).to(time_dtype)
        return (rows[0] if times == "sorted" else torch.stack(rows)).to(time_dtype)

    return replace(
        case,
        query_times=drawn(counts_q, slack),
        key_times=drawn(counts_k, slack),
        window=window,
    )


def _inside(x: torch.Tensor) -> torch.Tensor:
    """The same values as a view with gaps between tokens, between heads and before the first
    element."""
    *lead, heads, head_dim = x.shape
    wide = torch.zeros((*lead, heads + 1, head_dim + 8), dtype=x.dtype)
    view = wide[..., 1:, 8:]
    view.copy_(x)
    return view


@dataclass(frozen=True)
class Result:
    """out, lse and the three gradients of one run."""

    out: torch.Tensor
    lse: torch.Tensor
    grad_query: torch.Tensor
    grad_key: torch.Tensor
    grad_value: torch.Tensor

    def named(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in ("out", "lse", "grad_query", "grad_key", "grad_value"):
            yield name, getattr(self, name)


def run_attention(
    case: AttentionCase, backend: str, dtype: torch.dtype | None = None, device: str = "cpu"
) -> Result:
    """Forward and backward of masked_attention on `backend`, in the case's dtype unless another is
    named."""
    from ..ops.masked_attention import masked_attention

    dtype = case.dtype if dtype is None else dtype

    def placed(t: torch.Tensor) -> torch.Tensor:
        # Keeps the strides: `to` of a non-dense view would make it dense.
        return (
            t.to(device=device, dtype=dtype) if t.is_contiguous() else _strided_to(t, device, dtype)
        )

    leaves = [placed(t).detach().requires_grad_() for t in (case.query, case.key, case.value)]
    options: dict[str, Any] = {
        k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in case.options().items()
    }
    query, key, value = leaves
    out, lse = masked_attention(query, key, value, **options, return_lse=True, backend=backend)
    grads = torch.autograd.grad(
        out,
        leaves,
        case.grad_out.to(device=device, dtype=dtype),
        allow_unused=True,
        materialize_grads=True,
    )
    return Result(out.detach().cpu(), lse.detach().cpu(), *(g.cpu() for g in grads))


def _strided_to(view: torch.Tensor, device: str, dtype: torch.dtype) -> torch.Tensor:
    base = view._base
    assert base is not None
    moved = base.to(device=device, dtype=dtype)
    return moved.as_strided(view.shape, view.stride(), view.storage_offset())


def check_attention(case: AttentionCase, backend: str, device: str = "cpu") -> Result:
    """Runs `backend` and holds every result to the error budget against the float64 reference.

    Raises:
        AssertionError: naming the tensor, its error and the budget.
    """
    oracle = run_attention(case, "reference", torch.float64)
    peer = (
        run_attention(case, "reference") if case.dtype in (torch.bfloat16, torch.float16) else None
    )
    actual = run_attention(case, backend, device=device)
    for name, tensor in actual.named():
        other = None if peer is None else getattr(peer, name)
        assert_within_budget(
            f"{backend} {name}",
            tensor,
            getattr(oracle, name),
            other,
            gradient=name.startswith("grad"),
            dtype=case.dtype,
        )
    return actual


def _wrong_sign(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (-tensors[0], *tensors[1:])


def _stale_accumulator(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    first = tensors[0].clone()
    first.flatten()[-1:] *= 2
    return (first, *tensors[1:])


def _unwritten_row(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    last = tensors[-1].clone()
    last.flatten()[:1] = torch.nan
    return (*tensors[:-1], last)


# Faults in what a kernel returns, and in what it is given: (tensor arguments) -> (tensor
# arguments).
RESULT_FAULTS: dict[str, Callable[[tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]] = {
    "wrong_sign": _wrong_sign,
    "stale_accumulator": _stale_accumulator,
    "unwritten_row": _unwritten_row,
}
ATTENTION_FAULTS = (*RESULT_FAULTS, "off_by_one_id", "dropped_scale", "swapped_layout")
# Faults of calls with times and a window.
TIME_FAULTS = ("early_query", "late_query", "wide_window", "narrow_window")


@contextlib.contextmanager
def planted_fault(op: str, backend: str, fault: str, phase: str = "forward") -> Iterator[None]:
    """Makes one backend of one op wrong in one way, for the test that a comparison notices.

    Args:
        op, backend: whose ``forward`` or ``backward`` (`phase`) is broken.
        fault: one of RESULT_FAULTS, or for masked_attention one of ATTENTION_FAULTS or TIME_FAULTS.
    """
    sound = getattr(OPS[op].backends[backend], phase)

    def faulty(inputs: Any, *more: Any) -> Any:
        if fault in RESULT_FAULTS:
            return RESULT_FAULTS[fault](sound(inputs, *more))
        if fault == "off_by_one_id":
            inputs = replace(inputs, query_ids=(inputs.query_ids - 1).clamp(min=-1))
        elif fault == "dropped_scale":
            inputs = replace(inputs, scale=1.0)
        elif fault == "swapped_layout":
            inputs = replace(inputs, rope_table=inputs.rope_table.flip(-1).contiguous())
        elif fault in ("early_query", "late_query"):
            step = 1 if fault == "late_query" else -1
            inputs = replace(inputs, query_times=inputs.query_times + step)
        elif fault in ("wide_window", "narrow_window"):
            step = 1 if fault == "wide_window" else -1
            inputs = replace(inputs, window=inputs.window + step)
        else:
            known = ", ".join((*ATTENTION_FAULTS, *TIME_FAULTS))
            raise ValueError(f"planted_fault: fault must be one of {known}, got {fault!r}.")
        return sound(inputs, *more)

    with patched_backend(op, backend, **{phase: faulty}):
        yield


@contextlib.contextmanager
def patched_backend(op: str, backend: str, **changes: Any) -> Iterator[None]:
    """One backend of one op with other attributes, such as another ``forward``, inside the
    context. Every call comes to another ``forward``, plain ones too."""
    backends = OPS[op].backends
    sound = backends[backend]
    backends[backend] = replace(sound, **{"plain": None, **changes})
    try:
        yield
    finally:
        backends[backend] = sound
