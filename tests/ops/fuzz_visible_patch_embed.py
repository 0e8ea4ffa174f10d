"""Malformed calls of visible_patch_embed, run in a child process by test_fuzz.py.

    python -m tests.ops.fuzz_visible_patch_embed CALLS SEED

Half of the calls go through the public function, half straight to torch.ops: the dispatching op,
its backward, and the native CPU ops.
"""

from __future__ import annotations

import sys

import torch

from jepa_kernels import native, visible_patch_embed
from tests.ops import fuzzing

BAD_DTYPES = (torch.int32, torch.bool, torch.complex64, torch.int8)
TENSORS = ("clip", "weight", "bias", "ids")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def valid(rng):
    grid, tubelet = ([rng.randint(1, 3) for _ in range(3)] for _ in range(2))
    batch, channels, width = (rng.randint(1, most) for most in (3, 4, 5))
    shape = (batch, channels, *(g * t for g, t in zip(grid, tubelet, strict=True)))
    tokens = grid[0] * grid[1] * grid[2]
    dtype, numbers = rng.choice(FLOATS), channels * tubelet[0] * tubelet[1] * tubelet[2]
    clip = torch.randint(0, 256, shape, dtype=torch.uint8)
    if rng.random() < 0.5:
        clip = clip.to(rng.choice(FLOATS))
    count = rng.randint(1, 5) * 2 * batch
    ids = torch.randint(0, tokens, (count,))
    packed = rng.random() < 0.5
    if packed:
        cuts = sorted(rng.randint(0, count) for _ in range(2 * batch - 1))
        offsets, rows = torch.tensor([0, *cuts, count]), count
    else:
        offsets, rows, ids = None, count, ids.view(batch, -1)
    order = torch.arange(rows)
    return {
        "clip": clip,
        "weight": torch.randn(width, channels, *tubelet).to(dtype),
        "bias": torch.randn(width).to(dtype),
        "normalisation": torch.randn(2, channels),
        "ids": ids,
        "cu_seqlens": offsets,
        "mean": [0.5] * channels,
        "std": [0.2] * channels,
        "scale": rng.choice((None, 1, 0.5)),
        "backend": "cpu" if native.available() else "torch",
        "grad_out": torch.randn((*(ids.shape), width)).to(dtype),
        "saved": [torch.zeros(rows, dtype=torch.int64)],
        "needs": [clip.is_floating_point(), True, True],
        "pixels": torch.empty(rows, numbers),
        "float_clip": torch.zeros(shape),
        "of_pixels": torch.randn(rows, numbers),
        "rows": torch.randint(0, batch * tokens, (rows,)),
        "order": order,
        "starts": torch.full((batch * tokens + 1,), rows).index_fill_(0, torch.tensor([0]), 0),
        "tubelet": tubelet,
        "isa": -1,
    }


def change(call, rng, names, how):
    name = rng.choice(names)
    call[name] = how(call[name])


def wrong_dtype(call, rng):
    change(call, rng, ("clip", "weight", "bias"), lambda t: t.to(rng.choice(BAD_DTYPES)))


def ids_dtype(call, rng):
    change(call, rng, ("ids",), lambda t: t.to(rng.choice((torch.float32, torch.int16))))


def other_dtype(call, rng):
    call["bias"] = call["bias"].double()


def wrong_rank(call, rng):
    change(call, rng, ("clip", "weight"), lambda t: rng.choice((t[0], t[None], t.sum())))


def ids_rank(call, rng):
    change(call, rng, ("ids",), lambda t: rng.choice((t[None, None], t.sum())))


def wrong_size(call, rng):
    name = rng.choice(("channels", "bias", "frames", "kernel"))
    if name == "channels":
        call["clip"] = torch.cat([call["clip"]] * 2, dim=1)
    elif name == "bias":
        call["bias"] = torch.cat([call["bias"]] * 2)
    elif name == "frames":
        depth = call["clip"].shape[2] + 1
        call["weight"] = torch.zeros(1, *call["weight"].shape[1:]).repeat(1, 1, depth, 1, 1)
        call["bias"] = torch.zeros(1)
    else:
        call["weight"] = call["weight"][:, :, :0]


def wrong_device(call, rng):
    change(call, rng, TENSORS, lambda t: t.to("meta"))


def sparse(call, rng):
    change(call, rng, TENSORS, lambda t: t.to_sparse())


def not_a_tensor(call, rng):
    change(call, rng, ("clip", "weight", "bias"), lambda t: rng.choice((1.5, "x", [t])))


def ids_outside(call, rng):
    ids = call["ids"].clone()
    ids.flatten()[rng.randrange(ids.numel())] = rng.choice((-1, 10**6, -(2**60), 2**62))
    call["ids"] = ids


def offsets_wrong(call, rng):
    batch, count = call["clip"].shape[0], call["ids"].numel()
    call["ids"] = call["ids"].flatten()
    steps = [count // batch] * (batch - 1)
    good = torch.tensor([0, *steps, count - sum(steps)]).cumsum(0)
    bad = [good + 1, good.float(), good[None], good[:0], good.to("meta"), [0, count]]
    bad.append(torch.cat((good[:-1], good[-1:] - 1)))
    bad.append(torch.cat((good[:-1], good[-1:] + 1)))
    if batch > 1:
        bad.append(torch.cat((good, good[-1:])))
    call["cu_seqlens"] = rng.choice(bad)


def statistics_wrong(call, rng):
    channels = call["clip"].shape[1]
    name = rng.choice(("mean", "std"))
    bad = ([], [0.5] * (channels + 1), "x", 0.5, ["0.5"] * channels, [float("nan")] * channels)
    tensors = (torch.ones(channels + 1), torch.ones(channels, dtype=torch.int64), torch.ones(1, 1))
    call[name] = rng.choice((*bad, *tensors))


def scale_wrong(call, rng):
    call["scale"] = rng.choice(("1", float("inf"), float("nan"), [1.0], True))


def normalisation_wrong(call, rng):
    change(
        call,
        rng,
        ("normalisation",),
        lambda t: rng.choice(
            (t.double(), t[0], t[None], t.to("meta"), torch.cat((t, t), 1), t[:1])
        ),
    )


def strided_weight(call, rng):
    shape = call["weight"].shape
    call["weight"] = torch.zeros(*shape, 2, dtype=call["weight"].dtype)[..., 0]
    if call["weight"].is_contiguous():
        call["weight"] = call["weight"].to("meta")


def backend_unknown(call, rng):
    call["backend"] = rng.choice(("gpu", "", "CPU", "cuda", "triton", "auto " * 100))


def grad_wrong(call, rng):
    grad = call["grad_out"]
    call["grad_out"] = rng.choice(
        (grad.double(), grad[None], grad.to("meta"), torch.zeros(3, 3, 9))
    )


def saved_wrong(call, rng):
    saved = call["saved"][0]
    bad = ([], [saved, saved], [saved.int()], [saved[None]], [saved.to("meta")], [saved + 10**6])
    call["saved"] = rng.choice(bad)


def needs_wrong(call, rng):
    call["needs"] = rng.choice(([], [True], [True] * 4))


def numbers_wrong(call, rng):
    name = rng.choice(("rows", "order"))
    change(
        call,
        rng,
        (name,),
        lambda t: rng.choice((t.int(), t[None], t - 10**6, t + 10**6, t.to("meta"), t.float())),
    )
    # Each of the two ops reads one of them.
    call["rows" if name == "order" else "order"] = call[name]


def starts_wrong(call, rng):
    change(
        call,
        rng,
        ("starts",),
        lambda t: rng.choice((t.int(), t[:-1], t[None], t - 10**6, t + 10**6, t.to("meta"))),
    )


def block_wrong(call, rng):
    for name in ("pixels", "of_pixels"):
        t = call[name]
        call[name] = rng.choice(
            (t.double(), t.half(), t[0], t[None], torch.cat((t, t), 1), t.to("meta"), t[:, :0])
        )


def tubelet_wrong(call, rng):
    tubelet = list(call["tubelet"])
    tubelet[rng.randrange(3)] = rng.choice((0, -1, 10**9, -(2**62)))
    call["tubelet"] = tubelet


def isa_wrong(call, rng):
    call["isa"] = rng.choice((-2, 4, 99, -(2**31)))


SHARED = (
    wrong_dtype,
    ids_dtype,
    other_dtype,
    wrong_rank,
    ids_rank,
    wrong_size,
    wrong_device,
    sparse,
    not_a_tensor,
    ids_outside,
    offsets_wrong,
    backend_unknown,
)
DIRECT = (*SHARED, normalisation_wrong, strided_weight)


def public(call):
    names = ("ids", "cu_seqlens", "mean", "std", "scale", "backend")
    tensors = (call[n] for n in ("clip", "weight", "bias"))
    visible_patch_embed(*tensors, **{n: call[n] for n in names})


def _arguments(call):
    names = ("clip", "weight", "bias", "normalisation", "ids", "cu_seqlens", "backend")
    return [call[n] for n in names]


def direct(call):
    torch.ops.jepa_kernels.visible_patch_embed_fwd(*_arguments(call))


def direct_backward(call):
    torch.ops.jepa_kernels.visible_patch_embed_bwd(
        call["grad_out"], call["saved"], call["needs"], *_arguments(call)
    )


def native_gather(call):
    names = ("pixels", "clip", "rows", "normalisation")
    torch.ops.jepa_kernels_native.visible_patch_embed_gather_(
        *(call[n] for n in names), *call["tubelet"], call["isa"]
    )


def native_scatter(call):
    names = ("float_clip", "of_pixels", "order", "starts", "normalisation")
    torch.ops.jepa_kernels_native.visible_patch_embed_scatter_(
        *(call[n] for n in names), *call["tubelet"], call["isa"]
    )


NATIVE = (normalisation_wrong, numbers_wrong, block_wrong, tubelet_wrong, isa_wrong)
NATIVE_WAYS = ((native_gather, NATIVE), (native_scatter, (*NATIVE, starts_wrong)))
WAYS = (
    (public, (*SHARED, statistics_wrong, scale_wrong)),
    (direct, DIRECT),
    (direct_backward, (*DIRECT, grad_wrong, saved_wrong, needs_wrong)),
    *(NATIVE_WAYS if native.available() else ()),
)

if __name__ == "__main__":
    sys.exit(fuzzing.main(valid, WAYS, int(sys.argv[1]), int(sys.argv[2])))
