"""masked_attention's C++ CPU kernels through their C ABI: every instruction set, AVX-512 ones on an
emulation where the machine lacks them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from jepa_kernels.testing import (
    ATTENTION_LSE,
    ATTENTION_NORM,
    ATTENTION_NORM_CANCELLING,
    ATTENTION_NORM_PEAKED,
    ATTENTION_OF_TORCH,
    ATTENTION_OF_TORCH_UNFUSED,
    HEAD_DIMS,
)

from .attention_library import ISAS, Call, Library, build, serial, threaded
from .attention_oracle import make_table, oracle, rotate

pytestmark = pytest.mark.usefixtures("one_thread")

GRID = (3, 5, 7)
TOKENS = 105
DTYPES = (torch.float32, torch.bfloat16)


@dataclass
class Kernels:
    """One instruction set of one build."""

    library: Library
    isa: str

    def forward(self, call: Call, parallel_for=None) -> tuple[torch.Tensor, torch.Tensor]:
        return self.library.forward(call, self.isa, parallel_for)

    def backward(
        self, call: Call, grad_out: torch.Tensor, parallel_for=None
    ) -> tuple[torch.Tensor, ...]:
        return self.library.backward(call, grad_out, self.isa, parallel_for)

    def both(self, call: Call, grad_out: torch.Tensor, parallel_for=None) -> list[torch.Tensor]:
        out, lse = self.forward(call, parallel_for)
        return [t.clone() for t in (out, lse, *self.backward(call, grad_out, parallel_for))]


@pytest.fixture(scope="session")
def libraries(emulated_builds) -> dict[str, Library]:
    """The native build and the one whose AVX-512 files run on SIMDe, both compiled once and kept in
    pytest's cache."""
    return {
        name: Library(build(emulated_builds, emulated=name == "emulated"))
        for name in ("native", "emulated")
    }


@pytest.fixture(params=list(ISAS))
def kernels(request, libraries) -> Kernels:
    name = "emulated" if "avx512" in request.param else "native"
    return Kernels(libraries[name], request.param)


def randn(*shape: int, dtype: torch.dtype = torch.float32, spread: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * spread).to(dtype)


def dense_call(
    n: int,
    head_dim: int,
    dtype: torch.dtype,
    layout: str | None = "interleaved",
    spread: float = 1.0,
    heads: int = 2,
    batch: int = 1,
):
    """Self-attention on views of one qkv projection, ids in a random order with some unrotated
    tokens."""
    qkv = torch.randn(batch, n, 3, heads, head_dim)
    qkv[:, :, :2] *= spread
    qkv = qkv.to(dtype)
    rope = {}
    if layout is not None:
        ids = torch.randint(-1, TOKENS, (batch, n))
        rope = {
            "ids_q": ids,
            "ids_k": ids,
            "table": make_table(GRID, 2 * (head_dim // 3 // 2), layout),
            "grid": GRID,
        }
    return Call(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], head_dim**-0.5, **rope), randn(
        batch, n, heads, head_dim, dtype=dtype
    )


def cross_call(nq: int, nk: int, head_dim: int, dtype: torch.dtype, layout: str = "interleaved"):
    """Cross-attention whose key ids are one int32 list for the whole batch."""
    q, k, v = (
        randn(2, nq, 2, head_dim, dtype=dtype),
        randn(2, nk, 2, head_dim, dtype=dtype),
        randn(2, nk, 2, head_dim, dtype=dtype),
    )
    rope = {
        "ids_q": torch.randint(-1, TOKENS, (2, nq)),
        "ids_k": torch.randint(-1, TOKENS, (nk,)).int(),
    }
    table = make_table(GRID, 2 * (head_dim // 3 // 2), layout)
    return Call(q, k, v, head_dim**-0.5, **rope, table=table, grid=GRID), randn(
        2, nq, 2, head_dim, dtype=dtype
    )


def packed_call(
    head_dim: int,
    dtype: torch.dtype,
    layout: str = "interleaved",
    lengths_q=(37, 0, 29, 1, 20),
    lengths_k=(13, 21, 0, 50, 33),
    slack: int = 5,
):
    """Ragged sequences: some without queries, some without keys, and rows after the last one."""
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0) for lengths in (lengths_q, lengths_k))
    total_q, total_k = int(cu_q[-1]) + slack, int(cu_k[-1]) + slack
    wide = randn(total_q, 6, head_dim, dtype=dtype)
    k, v = randn(total_k, 2, head_dim, dtype=dtype), randn(total_k, 2, head_dim, dtype=dtype)
    rope = {
        "ids_q": torch.randint(-1, TOKENS, (total_q,)).int(),
        "ids_k": torch.randint(-1, TOKENS, (total_k,)),
    }
    table = make_table(GRID, 2 * (head_dim // 3 // 2), layout)
    call = Call(
        wide[:, 2:4],
        k,
        v,
        head_dim**-0.5,
        cu_q=cu_q.int(),
        cu_k=cu_k,
        **rope,
        table=table,
        grid=GRID,
    )
    return call, randn(total_q, 2, head_dim, dtype=dtype)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative norm; where the exact result cancels to (almost) nothing, relative to numbers of a
    tenth."""
    return float(
        (actual.double() - expected).norm()
        / expected.norm().clamp(min=0.1 * expected.numel() ** 0.5 + 1e-30)
    )


def check_results(
    kernels: Kernels,
    call: Call,
    grad_out: torch.Tensor,
    budgets: Mapping[torch.dtype, float] = ATTENTION_NORM,
    logits: float = 1.0,
) -> None:
    """All five results against the float64 oracle, by relative norm; lse, whose error is that of
    the logits, by `logits` times the difference that logits around 1 may have."""
    results = kernels.both(call, grad_out)
    out, lse, grads = oracle(call, grad_out)
    budget = budgets[call.q.dtype]
    assert torch.equal(torch.isfinite(results[1]), torch.isfinite(lse))
    assert (results[1][~torch.isfinite(lse)] == float("-inf")).all()
    finite = torch.isfinite(lse)
    assert (results[1].double() - lse)[finite].abs().max() < logits * ATTENTION_LSE[call.q.dtype]
    for name, actual, expected in zip(
        ("out", "grad_q", "grad_k", "grad_v"),
        [results[0], *results[2:]],
        [out, *grads],
        strict=True,
    ):
        assert torch.isfinite(actual).all(), name
        assert error(actual, expected) < budget, (
            f"{name}: {error(actual, expected):.2e} > {budget:.0e}"
        )


def skip_twin(kernels: Kernels, dtype: torch.dtype) -> None:
    if dtype == torch.float32 and kernels.isa == "avx512_bf16":
        pytest.skip("float32 calls of avx512_bf16 run the avx512 kernel, tested under its own name")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_dense_views(kernels, head_dim, dtype):
    skip_twin(kernels, dtype)
    for layout in ("interleaved", "tiled", None):
        check_results(kernels, *dense_call(53, head_dim, dtype, layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_cross_and_packed(kernels, head_dim, dtype):
    skip_twin(kernels, dtype)
    for layout in ("interleaved", "tiled"):
        check_results(kernels, *cross_call(19, 58, head_dim, dtype, layout))
        check_results(kernels, *packed_call(head_dim, dtype, layout))


@pytest.mark.parametrize("n", (1, 2, 7, 8, 9, 25, 48, 64, 97))
def test_lengths_around_tiles(kernels, n):
    # With one key the gradients of q and k are exactly 0, and what is left is all rounding.
    budgets = ATTENTION_NORM_CANCELLING if n < 3 else ATTENTION_NORM
    check_results(kernels, *dense_call(n, 32, torch.float32), budgets)
    check_results(kernels, *cross_call(3, n, 8, torch.bfloat16), budgets)


def test_lengths_over_blocks(kernels):
    check_results(kernels, *dense_call(301, 16, torch.float32, heads=1))
    check_results(kernels, *cross_call(5, 270, 24, torch.bfloat16))


@pytest.mark.parametrize("scale", (0.0, 1e-30, -0.3))
def test_unusual_scales(kernels, scale):
    call, grad_out = dense_call(30, 32, torch.float32)
    call.scale = scale
    check_results(kernels, call, grad_out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("carrier", (1248.0, -1248.0, -11.6875))
def test_shifted_logits(kernels, carrier, dtype):
    """One channel shifts every logit by eight times `carrier`, up to +-1e4: padding keys, whose
    score is 0, must not count, nor overflow where all others are far below (the last carrier would
    make their P the bits of a NaN)."""
    call, grad_out = dense_call(53, 64, dtype, layout=None)
    call.q[..., 0], call.k[..., 0] = 64.0, carrier
    out, lse, *grads = kernels.both(call, grad_out)
    expected_out, expected_lse, expected = oracle(call, grad_out)
    assert (lse.double() - expected_lse).abs().max() < ATTENTION_LSE[torch.bfloat16]
    # The shift costs a float's last bits of each score, about 2e-3, and channel 0 of the gradients
    # cancels.
    for a, e in (
        (out, expected_out),
        (grads[2], expected[2]),
        (grads[0][..., 1:], expected[0][..., 1:]),
        (grads[1][..., 1:], expected[1][..., 1:]),
    ):
        assert torch.isfinite(a).all() and error(a, e) < ATTENTION_NORM_CANCELLING[torch.bfloat16]


@pytest.mark.parametrize("spread", (1.0, 4.0, 8.0))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_within_a_quarter_of_torchs(kernels, dtype, spread):
    """Large logits included: relative error of the output and of each gradient against SDPA's in
    the same dtype."""
    skip_twin(kernels, dtype)
    limit = ATTENTION_OF_TORCH_UNFUSED if kernels.isa == "portable" else ATTENTION_OF_TORCH
    call, grad_out = dense_call(180, 64, dtype, spread=spread, heads=4)
    leaves = [t.detach().clone().requires_grad_() for t in (call.q, call.k, call.v)]
    rotated = [
        rotate(leaf[0].float(), call.ids_q[0], call.table, GRID).to(dtype)[None]
        for leaf in leaves[:2]
    ]
    out = F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (*rotated, leaves[2]))
    ).transpose(1, 2)
    torchs = [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]
    expected_out, _, expected = oracle(call, grad_out)
    ours = kernels.both(call, grad_out)
    for name, a, b, e in zip(
        ("out", "grad_q", "grad_k", "grad_v"),
        [ours[0], *ours[2:]],
        torchs,
        [expected_out, *expected],
        strict=True,
    ):
        assert error(a, e) <= limit * error(b, e), (
            f"{name}: {error(a, e):.2e} against torch's {error(b, e):.2e}"
        )


def test_same_bits_for_any_thread_count_piece_count_and_order(kernels):
    calls = [
        dense_call(150, 32, torch.bfloat16, heads=1),
        dense_call(80, 24, torch.float32, heads=3),
        packed_call(32, torch.float32),
    ]
    for call, grad_out in calls:
        expected = kernels.both(call, grad_out, serial())
        # Many pieces for few heads make the backward run dQ and dK, dV in separate passes.
        for parallel_for in (
            serial(2),
            serial(7, lambda pieces: pieces[::-1]),
            serial(16),
            threaded(3),
        ):
            for name, a, b in zip(
                ("out", "lse", "grad_q", "grad_k", "grad_v"),
                expected,
                kernels.both(call, grad_out, parallel_for),
                strict=True,
            ):
                assert torch.equal(a, b), name


def test_same_bits_in_any_company(kernels):
    """A sequence gives the same bits alone, in another place of a packed batch, and after a call
    that left NaN in the scratch."""
    call, grad_out = packed_call(24, torch.bfloat16, lengths_q=(40, 9, 61), lengths_k=(55, 70, 31))
    together = kernels.both(call, grad_out)
    poison, poison_grad = dense_call(120, 128, torch.bfloat16)
    poison.q.fill_(float("nan"))
    kernels.both(poison, poison_grad)
    for s in (2, 0, 1):
        at_q, at_k = (slice(int(cu[s]), int(cu[s + 1])) for cu in (call.cu_q, call.cu_k))
        ends = [torch.tensor([0, at.stop - at.start], dtype=torch.int64) for at in (at_q, at_k)]
        rope = {
            "ids_q": call.ids_q[at_q],
            "ids_k": call.ids_k[at_k],
            "table": call.table,
            "grid": GRID,
        }
        alone = Call(
            call.q[at_q], call.k[at_k], call.v[at_k], call.scale, cu_q=ends[0], cu_k=ends[1], **rope
        )
        results = kernels.both(alone, grad_out[at_q])
        cuts = [
            t[at]
            for t, at in zip((together[0], *together[2:]), (at_q, at_q, at_k, at_k), strict=True)
        ]
        assert torch.equal(results[1], together[1][:, at_q])
        for a, b in zip([results[0], *results[2:]], cuts, strict=True):
            assert torch.equal(a, b)


def test_writes_strided_results_and_nothing_beside_them(kernels):
    call, grad_out = dense_call(45, 24, torch.float32)
    expected = kernels.both(call, grad_out)
    wide = [torch.full((1, 47, 4, 40), 7.0) for _ in range(4)]
    call.out, *grads = [w[:, 1:46, 1:3, 8:32] for w in wide]
    call.grads = tuple(grads)
    results = kernels.both(call, grad_out)
    for w, a, b in zip(wide, [results[0], *results[2:]], [expected[0], *expected[2:]], strict=True):
        assert torch.equal(a, b)
        w[:, 1:46, 1:3, 8:32] = 7.0
        assert (w == 7.0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("what", ("q", "k", "v"))
def test_a_nan_shows(kernels, what, dtype):
    """With an unusual payload, which integer tricks on a float's bits could lose."""
    call, grad_out = dense_call(40, 32, dtype, heads=2)
    clean = kernels.both(call, grad_out)
    bits = (
        torch.tensor([0x7FA1], dtype=torch.int32).to(torch.int16)
        if dtype == torch.bfloat16
        else torch.tensor([0x7FA00301], dtype=torch.int32)
    )
    getattr(call, what)[0, 11, 1, 5] = bits.view(dtype)[0]
    out, lse, *_ = kernels.both(call, grad_out)
    hit = out[0, 11, 1] if what == "q" else out[0, :, 1] if what == "k" else out[0, :, 1, 5]
    assert torch.isnan(hit).all()
    if what != "v":
        assert torch.isnan(lse[0, 1, 11])
    assert torch.equal(out[0, :, 0], clean[0][0, :, 0])


def test_empty_calls(kernels):
    for call, grad_out in (
        packed_call(32, torch.float32, lengths_q=(0, 0), lengths_k=(0, 0), slack=0),
        packed_call(32, torch.float32, lengths_q=(4,), lengths_k=(0,), slack=2),
        packed_call(32, torch.bfloat16, lengths_q=(0,), lengths_k=(9,), slack=2),
        dense_call(6, 32, torch.float32, batch=0),
        dense_call(6, 32, torch.float32, heads=0),
    ):
        out, lse, *grads = kernels.both(call, grad_out)
        assert all((t == 0).all() for t in (out, *grads)) and (lse == float("-inf")).all()


def timed(call: Call, order: str, num_times: int = 5, window: int = 0) -> Call:
    """The call with times of its own for every token, sorted within a sequence or not."""
    packed = call.cu_q is not None
    for name, rows, cu in (("times_q", call.q, call.cu_q), ("times_k", call.k, call.cu_k)):
        shape = rows.shape[:1] if packed else rows.shape[:2]
        times = torch.randint(-2, num_times - 2, shape)
        if order == "sorted":
            bounds = cu.tolist() if packed else [0, rows.shape[1]]
            for start, stop in pairwise(bounds):
                times[..., start:stop] = times[..., start:stop].sort().values
        setattr(call, name, times)
    call.times_k = call.times_k.int()
    call.window = window
    return call


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_times_at_every_width(kernels, head_dim, dtype):
    skip_twin(kernels, dtype)
    for call, grad_out in (
        dense_call(61, head_dim, dtype, batch=2),
        cross_call(19, 138, head_dim, dtype),
        packed_call(head_dim, dtype),
    ):
        for order, window in (("sorted", 0), ("random", 2)):
            check_results(kernels, timed(call, order, window=window), grad_out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", (1.0, 5.0))
def test_times_over_blocks(kernels, dtype, spread):
    """Several blocks of keys and groups of queries, of which some are skipped; with large logits,
    too."""
    skip_twin(kernels, dtype)
    for order, num_times, window in (("sorted", 300, 30), ("random", 40, 1), ("sorted", 4, 1)):
        call, grad_out = dense_call(290, 16, dtype, heads=1, spread=spread)
        timed(call, order, num_times, window)
        budgets = ATTENTION_NORM if spread == 1.0 else ATTENTION_NORM_PEAKED
        check_results(kernels, call, grad_out, budgets, logits=spread**2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ("sorted", "random"))
def test_the_future_leaves_no_trace(kernels, order, dtype):
    """Larger keys, queries and values after a time take neighbours in the same tile to another
    path, and change no bit of what does not see them."""
    skip_twin(kernels, dtype)
    call, grad_out = dense_call(230, 24, dtype, layout=None, heads=1)
    times = torch.randint(0, 6, (1, 230))
    call.times_q = call.times_k = times.sort().values if order == "sorted" else times
    past = call.times_q[0] <= 2
    results = []
    for _ in range(2):
        out, lse, grad_q, *_ = kernels.both(call, grad_out)
        results.append((out[:, past], lse[..., past], grad_q[:, past]))
        for t in (call.q, call.k, call.v):
            t[:, ~past] *= 50.0
    for before, after in zip(*results, strict=True):
        assert torch.equal(before, after)


def test_times_give_the_same_bits_for_any_thread_count(kernels):
    call, grad_out = dense_call(330, 24, torch.float32, heads=1)
    timed(call, "sorted", 7, 3)
    expected = kernels.both(call, grad_out, serial())
    for parallel_for in (serial(7, lambda pieces: pieces[::-1]), threaded(3)):
        for a, b in zip(expected, kernels.both(call, grad_out, parallel_for), strict=True):
            assert torch.equal(a, b)


def _set_id(which: str, value: int):
    return lambda call: getattr(call, which).__setitem__(3, value)


REFUSALS = {
    "query_ids must hold ids from -1 to 104, got 105.": _set_id("ids_q", TOKENS),
    "key_ids must hold ids from -1 to 104, got -2.": _set_id("ids_k", -2),
    "query_times must hold times from -2147483648 to 2147483647, got 2147483648.": lambda c: (
        c.times_q.__setitem__(3, 2**31)
    ),
    "key_times must hold times from -2147483648 to 2147483647, got -2147483649.": lambda c: (
        c.times_k.__setitem__(3, -(2**31) - 1)
    ),
    "cu_seqlens_q must never decrease, got 2 after 37.": lambda c: c.cu_q.__setitem__(2, 2),
    "cu_seqlens_q must start at 0, got -1.": lambda c: c.cu_q.__setitem__(0, -1),
    "cu_seqlens_k must end at or before 122 rows, got 9223372036854775807.": lambda c: (
        c.cu_k.__setitem__(5, 2**63 - 1)
    ),
    "cu_seqlens_k must never decrease, got -9223372036854775808 after 0.": lambda c: (
        c.cu_k.__setitem__(1, -(2**63))
    ),
}


@pytest.mark.parametrize("sentence", REFUSALS)
def test_refuses_before_any_work(libraries, sentence):
    call, grad_out = packed_call(32, torch.float32)
    call.cu_q, call.cu_k = call.cu_q.long(), call.cu_k.long()
    call.times_q, call.times_k = (torch.zeros(t.shape[0]).long() for t in (call.q, call.k))
    REFUSALS[sentence](call)
    for run in (
        lambda: libraries["native"].forward(call, "portable"),
        lambda: libraries["native"].backward(call, grad_out, "portable"),
    ):
        with pytest.raises(ValueError) as caught:
            run()
        assert str(caught.value) == "masked_attention: " + sentence
    assert all(torch.isnan(t).all() for t in (call.out, call.lse, *call.grads))


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    (
        ("dtype", 2, "dtype must be float32 or bfloat16"),
        ("head_dim", 12, "head_dim must be a multiple of 8 from 8 to 128"),
        ("head_dim", 136, "head_dim must be a multiple of 8 from 8 to 128"),
    ),
)
def test_refuses_bad_numbers(libraries, field, value, sentence):
    call, _ = packed_call(32, torch.float32)
    params = call.params(None)
    setattr(params, field, value)
    with pytest.raises(ValueError, match="masked_attention: ") as caught:
        libraries["native"].raw(params, False, ISAS["portable"], serial())
    assert sentence in str(caught.value)


def test_refuses_unknown_instruction_sets(libraries):
    call, _ = packed_call(32, torch.float32)
    with pytest.raises(
        ValueError, match=r"isa must be one that this processor has \(.*\), got 4\."
    ):
        libraries["native"].raw(call.params(None), False, 4, serial())


def test_the_oracle_comparison_bites(libraries):
    """One id off by one, a dropped scale or a swapped layout must not pass."""
    kernels = Kernels(libraries["native"], "portable")

    class Faulty(Kernels):
        def both(self, call, grad_out, parallel_for=None):
            return Kernels.both(self, self.plant(call), grad_out, parallel_for)

    def shifted(call: Call) -> Call:
        ids = call.ids_q.clone()
        ids[0, 0] = (ids[0, 0] + 1) % TOKENS
        return Call(
            call.q,
            call.k,
            call.v,
            call.scale,
            ids_q=ids,
            ids_k=call.ids_k,
            table=call.table,
            grid=GRID,
        )

    def unscaled(call: Call) -> Call:
        return Call(
            call.q,
            call.k,
            call.v,
            1.0,
            ids_q=call.ids_q,
            ids_k=call.ids_k,
            table=call.table,
            grid=GRID,
        )

    def other_layout(call: Call) -> Call:
        return Call(
            call.q,
            call.k,
            call.v,
            call.scale,
            ids_q=call.ids_q,
            ids_k=call.ids_k,
            table=make_table(GRID, 10, "tiled"),
            grid=GRID,
        )

    def later(call: Call) -> Call:
        return replace(call, times_q=call.times_q + 1)

    def wider(call: Call) -> Call:
        return replace(call, window=call.window + 1)

    for plant in (later, wider):
        faulty = Faulty(kernels.library, kernels.isa)
        faulty.plant = plant
        call, grad_out = dense_call(20, 32, torch.float32)
        with pytest.raises(AssertionError):
            check_results(faulty, timed(call, "sorted", window=2), grad_out)
    for plant in (shifted, unscaled, other_layout):
        faulty = Faulty(kernels.library, kernels.isa)
        faulty.plant = plant
        for dtype in DTYPES:
            with pytest.raises(AssertionError):
                check_results(faulty, *dense_call(20, 32, dtype))
