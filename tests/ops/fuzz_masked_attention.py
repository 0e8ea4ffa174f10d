"""Malformed calls of masked_attention, run in a child process by test_fuzz.py: every one must be
refused with a sentence.

    python -m tests.ops.fuzz_masked_attention CALLS SEED

Half of the calls go through the public function, half straight to torch.ops: the dispatching op and
the native CPU op, forward and backward. Prints one JSON line with the number of calls per way; the
first silent result, unexpected exception or NaN ends the process with status 1.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Callable

import torch

from jepa_kernels import Rope3D, masked_attention, native

REFUSALS = (TypeError, ValueError, RuntimeError, NotImplementedError)
HUGE = 2**40


class Arguments(dict):
    """A valid call by name; `direct` calls carry the table, grid and backend of the op instead of a
    Rope3D."""

    def __getattr__(self, name):
        return self[name]


def valid(rng: random.Random) -> Arguments:
    packed = rng.random() < 0.5
    heads, head_dim = rng.randint(1, 3), rng.choice((8, 16, 24, 64))
    rope = Rope3D((2, 3, 2), rng.choice(("interleaved", "tiled")))
    if packed:
        shape, ids_shape = (9, heads, head_dim), (9,)
    else:
        shape, ids_shape = (2, 5, heads, head_dim), (2, 5)
    call = Arguments({n: torch.randn(shape) for n in ("query", "key", "value", "grad_out", "out")})
    call["query_ids"], call["key_ids"] = (torch.randint(-1, 12, ids_shape) for _ in range(2))
    offsets = torch.tensor([0, 4, 4, 9], dtype=rng.choice((torch.int32, torch.int64)))
    call["cu_seqlens_q"], call["cu_seqlens_k"] = (
        (offsets.clone(), offsets.clone()) if packed else (None, None)
    )
    call["rope"], call["rope_table"], call["grid"] = (
        rope,
        rope.table(head_dim, torch.device("cpu")),
        list(rope.grid),
    )
    call["lse"] = torch.zeros((heads, 9) if packed else (2, heads, 5))
    timed = rng.random() < 0.5
    call["query_times"], call["key_times"] = (
        torch.randint(-3, 4, ids_shape).to(rng.choice((torch.int32, torch.int64)))
        if timed
        else None
        for _ in range(2)
    )
    # None of the public function is 0 of the op.
    call["window"] = rng.randint(1, 3) if timed and rng.random() < 0.5 else 0
    call["keys_rotated"] = False
    call["scale"], call["backend"], call["isa"] = 0.3, rng.choice(("cpu", "torch")), -1
    return call


def _choose(rng: random.Random, *names: str) -> str:
    return rng.choice(names)


def _rows(rng: random.Random, backward: bool) -> str:
    return _choose(rng, "query", "key", "value", *(("grad_out", "out") if backward else ()))


def wrong_rank(call, rng, backward):
    name = _rows(rng, backward)
    call[name] = rng.choice((lambda t: t[None], lambda t: t[0], lambda t: t.flatten()))(call[name])


def wrong_dtype(call, rng, backward):
    name = _rows(rng, backward)
    call[name] = call[name].to(
        rng.choice(
            (torch.int32, torch.bool, torch.complex64, torch.float64, torch.float16, torch.int8)
        )
    )


def wrong_device(call, rng, backward):
    name = _choose(rng, _rows(rng, backward), "query_ids", "key_ids")
    call[name] = call[name].to("meta")


def wrong_heads(call, rng, backward):
    name = _rows(rng, backward)
    call[name] = torch.cat((call[name],) * 2, dim=-2)


def wrong_width(call, rng, backward):
    name = _rows(rng, backward)
    call[name] = torch.cat((call[name],) * 2, dim=-1)


def wrong_tokens(call, rng, backward):
    name = (
        _choose(rng, "key", "value") if not backward else _choose(rng, "value", "grad_out", "out")
    )
    call[name] = call[name].narrow(call[name].dim() - 3, 0, 3)


def ids_out_of_range(call, rng, backward):
    name = _choose(rng, "query_ids", "key_ids")
    call[name].flatten()[rng.randrange(call[name].numel())] = rng.choice(
        (-2, 12, 10**6, 2**31, -(2**31), 2**62, -(2**63))
    )


def ids_wrong_kind(call, rng, backward):
    name = _choose(rng, "query_ids", "key_ids")
    call[name] = rng.choice(
        (
            lambda t: t.float(),
            lambda t: t.bool(),
            lambda t: t[..., :-1],
            lambda t: t[None, None],
            lambda t: t.to(torch.int16),
        )
    )(call[name])


def times_wrong(call, rng, backward):
    """Values that no 32 bits hold."""
    name = _choose(rng, "query_times", "key_times")
    shape = call["query_ids"].shape
    for other in ("query_times", "key_times"):
        call[other] = torch.zeros(shape, dtype=torch.int64)
    call[name].flatten()[rng.randrange(call[name].numel())] = rng.choice(
        (2**31, -(2**31) - 1, 2**62, -(2**63))
    )


def times_wrong_kind(call, rng, backward):
    name = _choose(rng, "query_times", "key_times")
    for other in ("query_times", "key_times"):
        call[other] = torch.zeros_like(call["query_ids"])
    call[name] = rng.choice(
        (
            lambda t: t.float(),
            lambda t: t.bool(),
            lambda t: t[..., :-1],
            lambda t: t[None, None],
            lambda t: t.to(torch.int16),
            lambda t: t.to("meta"),
        )
    )(call[name])


def times_missing(call, rng, backward):
    """Of the queries, but not of the keys: which the public function fills in."""
    call["query_times"], call["key_times"] = None, torch.zeros_like(call["query_ids"])


def key_times_missing(call, rng, backward):
    call["query_times"], call["key_times"] = torch.zeros_like(call["query_ids"]), None


def window_wrong(call, rng, backward):
    if call["query_times"] is None:
        call["window"] = 2
    else:
        call["window"] = rng.choice((-1, -(2**31), 2**32, 2**62))


def keys_rotated_wrong(call, rng, backward):
    call["keys_rotated"] = rng.choice((True, 1, "yes"))


def offsets_wrong(call, rng, backward):
    name = _choose(rng, "cu_seqlens_q", "cu_seqlens_k")
    if call[name] is None:
        call["cu_seqlens_k"] = torch.tensor([0, 2])
        return
    bad = rng.choice(
        (
            [0, 5, 4, 9],
            [1, 4, 4, 9],
            [-1, 4, 4, 9],
            [0, 4, 4, 10],
            [0, HUGE, HUGE, HUGE],
            [0, -HUGE, 4, 9],
            [0, 4, 2**31 - 1, 9],
        )
    )
    dtype = torch.int64 if max(map(abs, bad)) >= 2**31 else call[name].dtype
    call[name] = torch.tensor(bad, dtype=dtype)


def offsets_wrong_kind(call, rng, backward):
    name = _choose(rng, "cu_seqlens_q", "cu_seqlens_k")
    if call[name] is None:
        call["cu_seqlens_k"] = torch.tensor([0, 2])
        return
    change = rng.choice(
        (
            lambda t: t.float(),
            lambda t: t[:-1],
            lambda t: t[:0],
            lambda t: t[None],
            lambda t: t.to(torch.int16),
            lambda t: t.to("meta"),
        )
    )
    call[name] = change(call[name])


def sparse(call, rng, backward):
    name = _choose(rng, "query", "key", "value")
    call[name] = call[name].to_sparse()


def scale_wrong(call, rng, backward):
    call["scale"] = rng.choice((float("nan"), float("inf"), float("-inf"), "0.5", [1.0]))


def backend_unknown(call, rng, backward):
    call["backend"] = rng.choice(("gpu", "", "CPU", "cuda", "triton", "auto " * 100))


def rope_wrong(call, rng, backward):
    call["rope"] = rng.choice(("interleaved", 3, (2, 3, 2)))
    call["rope_table"] = rng.choice(
        (
            lambda t: t.double(),
            lambda t: t[:, :-1],
            lambda t: t[..., :-1],
            lambda t: t.transpose(0, 1),
            lambda t: t.to("meta"),
            lambda t: t[0],
        )
    )(call["rope_table"])


def no_ids(call, rng, backward):
    call["query_ids"] = None


def huge(call, rng, backward):
    """A view of one element that claims a size no machine has."""
    name = _choose(rng, "key", "value", "query")
    shape = list(call[name].shape)
    shape[-3] = HUGE
    call[name] = torch.zeros(1).as_strided(
        shape, [0] * (len(shape) - 1) + [1] if shape[-1] == 1 else [0] * len(shape)
    )


def grid_wrong(call, rng, backward):
    call["grid"] = rng.choice(
        (
            [],
            [1],
            [0, 3, 2],
            [-1, 3, 2],
            [HUGE, HUGE, HUGE],
            [2, 3, 3],
            [1, 3, 2],
            [2**31, 1, 1],
            [2, 3, 2, 1],
        )
    )


def channel_stride(call, rng, backward):
    name = _choose(rng, "query", "key", "value")
    call[name] = call[name].transpose(-1, -2).contiguous().transpose(-1, -2)
    if call[name].stride(-1) == 1:
        wrong_width(call, rng, backward)


def missing_argument(call, rng, backward):
    call[_choose(rng, "key_ids", "query_ids")] = None


def lse_wrong(call, rng, backward):
    call["lse"] = rng.choice(
        (
            lambda t: t.double(),
            lambda t: t[..., :-1],
            lambda t: t[None],
            lambda t: t.to("meta"),
            lambda t: t.flatten(),
        )
    )(call["lse"])


def isa_wrong(call, rng, backward):
    call["isa"] = rng.choice((-2, 4, 99, -(2**31), 2**40))


EVERY = (
    wrong_rank,
    wrong_dtype,
    wrong_device,
    wrong_heads,
    wrong_width,
    wrong_tokens,
    ids_out_of_range,
    ids_wrong_kind,
    offsets_wrong,
    offsets_wrong_kind,
    times_wrong,
    times_wrong_kind,
    times_missing,
    window_wrong,
    sparse,
    huge,
)
PUBLIC = (*EVERY, scale_wrong, backend_unknown, rope_wrong, no_ids, keys_rotated_wrong)
OPS = (*EVERY, rope_wrong, grid_wrong, channel_stride, missing_argument, key_times_missing)
DIRECT = (*OPS, backend_unknown)
NATIVE = (*OPS, isa_wrong)


def _common(call) -> tuple:
    return (call.query_ids, call.key_ids, call.cu_seqlens_q, call.cu_seqlens_k, call.rope_table)


def public(call) -> object:
    names = (
        "query_ids",
        "key_ids",
        "rope",
        "cu_seqlens_q",
        "cu_seqlens_k",
        "query_times",
        "key_times",
        "keys_rotated",
        "scale",
        "backend",
    )
    window = None if call.window == 0 else call.window
    return masked_attention(
        call.query, call.key, call.value, **{n: call[n] for n in names}, window=window
    )


def _times(call) -> tuple:
    return (call.query_times, call.key_times, call.window)


def direct_forward(call) -> object:
    return torch.ops.jepa_kernels.masked_attention_fwd(
        call.query,
        call.key,
        call.value,
        *_common(call),
        call.grid,
        call.scale,
        *_times(call),
        call.backend,
    )


def direct_backward(call) -> object:
    rows = (call.query, call.key, call.value)
    return torch.ops.jepa_kernels.masked_attention_bwd(
        call.grad_out,
        [call.out, call.lse],
        [True] * 3,
        *rows,
        *_common(call),
        call.grid,
        call.scale,
        *_times(call),
        call.backend,
    )


def native_forward(call) -> object:
    rows = (call.query, call.key, call.value)
    return torch.ops.jepa_kernels_native.masked_attention_cpu_fwd(
        *rows, *_common(call), *_times(call)[:2], call.grid, call.scale, call.window, call.isa
    )


def native_backward(call) -> object:
    rows = (call.grad_out, call.query, call.key, call.value)
    return torch.ops.jepa_kernels_native.masked_attention_cpu_bwd(
        *rows,
        *_common(call),
        *_times(call)[:2],
        call.out,
        call.lse,
        call.grid,
        call.scale,
        call.window,
        call.isa,
    )


WAYS: tuple[tuple[Callable, tuple, bool], ...] = (
    (public, PUBLIC, False),
    (direct_forward, DIRECT, False),
    (direct_backward, (*DIRECT, lse_wrong), True),
    (native_forward, NATIVE, False),
    (native_backward, (*NATIVE, lse_wrong), True),
)


def main(calls: int, seed: int) -> int:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    done: Counter[str] = Counter()
    ways = WAYS if native.available() else WAYS[:3]
    for (
        way,
        _,
        _,
    ) in ways:  # the unchanged call is accepted, or every refusal below would prove nothing
        for _ in range(20):
            call = valid(rng)
            call["backend"] = call.backend if native.available() else "torch"
            way(call)
    for i in range(calls):
        way, faults, backward = ways[0] if i % 2 == 0 else ways[1 + rng.randrange(len(ways) - 1)]
        call = valid(rng)
        call["backend"] = call.backend if native.available() else "torch"
        fault = rng.choice(faults)
        print(
            f"{i} {way.__name__} {fault.__name__}", file=sys.stderr, flush=True
        )  # the last line names a crash
        fault(call, rng, backward)
        try:
            result = way(call)
        except REFUSALS as error:
            text = str(error)
            if len(text) < 10 or "Traceback" in text:
                print(
                    f"call {i}: {way.__name__} after {fault.__name__} was refused without a "
                    f"sentence: {error!r}"
                )
                return 1
        else:
            kinds = [
                (tuple(t.shape), t.dtype, t.device.type)
                for t in (result if isinstance(result, tuple) else (result,))
            ]
            print(f"call {i}: {way.__name__} after {fault.__name__} gave a silent result {kinds}")
            return 1
        done[way.__name__] += 1
    print(json.dumps(done))
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
