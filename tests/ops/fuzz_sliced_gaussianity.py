"""Malformed calls of sliced_gaussianity, run in a child process by test_fuzz.py.

    python -m tests.ops.fuzz_sliced_gaussianity CALLS SEED

Half of the calls go through the public function, half straight to torch.ops: the dispatching op,
its backward, and the native CPU ops.
"""

from __future__ import annotations

import sys

import torch

from jepa_kernels import native, sliced_gaussianity
from tests.ops import fuzzing

BAD_DTYPES = (torch.int32, torch.bool, torch.complex64, torch.int8)
TENSORS = ("features", "directions")


def valid(rng):
    rows, channels, slices = (rng.randint(1, most) for most in (5, 4, 6))
    points = rng.randint(2, 9)
    dtype = rng.choice((torch.float32, torch.bfloat16, torch.float16))
    output = rng.choice(("statistic", "sums"))
    return {
        "features": torch.randn(rows, channels).to(dtype),
        "directions": torch.randn(channels, slices).to(dtype),
        "points": points,
        "largest_point": rng.choice((3.0, 5, 0.25)),
        "backend": "cpu" if native.available() else "torch",
        "output": output,
        "grad_out": torch.randn((2, points - 1, slices) if output == "sums" else ()),
        "saved": [torch.zeros((rows, channels) if output == "statistic" else (0,))],
        "needs": [True],
        "projections": torch.randn(rows, slices),
        "coefficients": torch.randn(2, points - 1, slices),
        "isa": -1,
        "seed": rng.randint(0, 99),
    }


def change(call, rng, names, how):
    name = rng.choice(names)
    call[name] = how(call[name])


def wrong_dtype(call, rng):
    change(call, rng, TENSORS, lambda t: t.to(rng.choice(BAD_DTYPES)))


def other_dtype(call, rng):
    change(call, rng, TENSORS, lambda t: t.double())


def wrong_rank(call, rng):
    change(call, rng, TENSORS, lambda t: rng.choice((t[0], t[None], t.sum())))


def wrong_size(call, rng):
    if rng.random() < 0.5:
        call["features"] = torch.cat([call["features"]] * 2, dim=1)
    else:
        call["directions"] = torch.cat([call["directions"]] * 2, dim=0)


def nothing_there(call, rng):
    how = rng.choice(("channels", "slices", "both"))
    if how != "slices":
        call["features"] = call["features"][:, :0]
        call["directions"] = call["directions"][:0]
    if how != "channels":
        call["directions"] = call["directions"][:, :0]


def wrong_device(call, rng):
    change(call, rng, TENSORS, lambda t: t.to("meta"))


def sparse(call, rng):
    change(call, rng, TENSORS, lambda t: t.to_sparse())


def not_a_tensor(call, rng):
    change(call, rng, TENSORS, lambda t: rng.choice((1.5, "x", None, [t])))


def points_wrong(call, rng):
    call["points"] = rng.choice((1, 0, -3, 2.5, "17", None, 2**40))


def largest_point_wrong(call, rng):
    call["largest_point"] = rng.choice((0.0, -1.0, float("nan"), float("inf"), "3", None))


def backend_unknown(call, rng):
    call["backend"] = rng.choice(("gpu", "", "CPU", "cuda", "triton", "auto " * 100))


def seed_wrong(call, rng):
    call["directions"] = 3
    call["seed"] = rng.choice((-1, 2**63, 1.5, None, "0"))


def output_wrong(call, rng):
    call["output"] = rng.choice(("", "Sums", "mean"))


def grad_wrong(call, rng):
    grad = call["grad_out"]
    bad = (grad.double(), grad[None], grad.to("meta"), torch.zeros(3, 3))
    call["grad_out"] = rng.choice(bad)


def saved_wrong(call, rng):
    saved = call["saved"][0]
    bad = ([], [saved, saved], [saved.double()], [saved[None]], [saved.to("meta")])
    call["saved"] = rng.choice(bad)


def needs_wrong(call, rng):
    call["needs"] = rng.choice(([], [True, True]))


def projections_wrong(call, rng):
    u = call["projections"]
    strided = u.repeat(3, 3)[:, ::2]
    call["projections"] = rng.choice(
        (u.double(), u[0], u[None], u.half(), u.to("meta"), u.to_sparse(), strided)
    )


def coefficients_wrong(call, rng):
    c = call["coefficients"]
    call["coefficients"] = rng.choice(
        (
            c.double(),
            c[0],
            c[:1],
            c.to("meta"),
            torch.cat((c, c), dim=2),
            c[:, :0],
            torch.cat([c] * 65, dim=1),
            c.mT.contiguous().mT if c.shape[1] > 1 < c.shape[2] else c[:, :, :0],
        )
    )


def isa_wrong(call, rng):
    call["isa"] = rng.choice((-2, 4, 99, -(2**31)))


EVERY = (
    wrong_dtype,
    other_dtype,
    wrong_rank,
    wrong_size,
    nothing_there,
    wrong_device,
    sparse,
    not_a_tensor,
    points_wrong,
    largest_point_wrong,
    backend_unknown,
)
DIRECT = (*EVERY, output_wrong)


def public(call):
    sliced_gaussianity(
        call["features"],
        call["directions"],
        seed=call["seed"],
        points=call["points"],
        largest_point=call["largest_point"],
        backend=call["backend"],
    )


def _arguments(call):
    names = ("features", "directions", "points", "largest_point", "output")
    return (*(call[n] for n in names), True, call["backend"])


def direct(call):
    torch.ops.jepa_kernels.sliced_gaussianity_fwd(*_arguments(call))


def direct_backward(call):
    torch.ops.jepa_kernels.sliced_gaussianity_bwd(
        call["grad_out"], call["saved"], call["needs"], *_arguments(call)
    )


def native_sums(call):
    torch.ops.jepa_kernels_native.sliced_gaussianity_sums(
        call["projections"], call["coefficients"].shape[1], 0.2, call["isa"]
    )


def native_slope(call):
    torch.ops.jepa_kernels_native.sliced_gaussianity_slope_(
        call["projections"], call["coefficients"], 0.2, call["isa"]
    )


NATIVE_WAYS = (
    (native_sums, (projections_wrong, isa_wrong)),
    (native_slope, (projections_wrong, coefficients_wrong, isa_wrong)),
)
WAYS = (
    (public, (*EVERY, seed_wrong)),
    (direct, DIRECT),
    (direct_backward, (*DIRECT, grad_wrong, saved_wrong, needs_wrong)),
    *(NATIVE_WAYS if native.available() else ()),
)

if __name__ == "__main__":
    sys.exit(fuzzing.main(valid, WAYS, int(sys.argv[1]), int(sys.argv[2])))
