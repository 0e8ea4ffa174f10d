"""Malformed calls of adamw_ema_, run in a child process by test_fuzz.py.

    python -m tests.ops.fuzz_adamw_ema CALLS SEED

Half of the calls go through the public function, half straight to torch.ops: the dispatching op and
the native CPU op.
"""

from __future__ import annotations

import sys

import torch

from jepa_kernels import TeacherLists, adamw_ema_, native
from tests.ops import fuzzing
from tests.ops.fuzz_ema_update import BAD_DTYPES
from tests.ops.fuzzing import replace

LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "targets")
ROW = [1e-3, 0.9, 0.999, 1e-8, 0.01, 0.0]


def valid(rng):
    shapes = [
        tuple(rng.randint(1, 4) for _ in range(rng.randint(1, 3))) for _ in range(rng.randint(2, 4))
    ]
    call = {name: [torch.rand(s) + 0.1 for s in shapes] for name in LISTS}
    call["targets"] = call["targets"][: rng.randint(1, len(shapes))]
    call["steps"] = [torch.tensor(2.0) for _ in shapes]
    call |= {
        "hyper": torch.tensor([ROW, ROW], dtype=torch.float64),
        "groups": [rng.randrange(2) for _ in shapes],
    }
    call |= {
        "momentum": torch.tensor(0.9, dtype=torch.float64),
        "grad_scale": torch.tensor(2.0),
        "found_inf": torch.tensor(0.0),
    }
    call |= {"backend": "cpu" if native.available() else "torch", "isa": -1}
    return call


def wrong_dtype(call, rng):
    replace(call, rng, LISTS, lambda t: t.to(rng.choice(BAD_DTYPES)))


def wrong_size(call, rng):
    replace(call, rng, LISTS, lambda t: torch.cat((t, t)))


def wrong_device(call, rng):
    replace(call, rng, (*LISTS, "steps"), lambda t: t.to("meta"))


def sparse(call, rng):
    replace(call, rng, LISTS, lambda t: t.to_sparse())


def huge(call, rng):
    """A view of one element that claims a size no machine has."""
    replace(call, rng, LISTS, lambda t: torch.zeros(1, dtype=t.dtype).as_strided((2**40,), (0,)))


def lengths_differ(call, rng):
    name = rng.choice(("grads", "exp_avgs", "exp_avg_sqs", "steps", "groups"))
    call[name] = call[name][:-1]


def more_targets_than_parameters(call, rng):
    call["targets"] = [*call["params"], torch.ones(1)]


def not_a_tensor(call, rng):
    replace(call, rng, LISTS, lambda t: rng.choice((3, "x", None)))


def moments_of_two_dtypes(call, rng):
    replace(call, rng, ("exp_avgs", "exp_avg_sqs"), lambda t: t.bfloat16())


def steps_wrong(call, rng):
    replace(call, rng, ("steps",), lambda t: rng.choice((torch.ones(2), torch.tensor(1))))


def hyper_wrong(call, rng):
    change = rng.choice(
        (
            lambda t: t.float(),
            lambda t: t[0],
            lambda t: t[:, :5],
            lambda t: t.t(),
            lambda t: t.to("meta"),
            lambda t: t[:0],
        )
    )
    call["hyper"] = change(call["hyper"])


def groups_wrong(call, rng):
    call["groups"] = [rng.choice((-1, 2, 2**40)), *call["groups"][1:]]


def momentum_wrong(call, rng):
    bad = (float("nan"), 1.0001, -1e-3)
    call["momentum"] = rng.choice(
        (
            *(torch.tensor(m, dtype=torch.float64) for m in bad),
            torch.ones(2),
            torch.tensor(0.5, device="meta"),
        )
    )


def flag_wrong(call, rng):
    name = rng.choice(("grad_scale", "found_inf"))
    call[name] = rng.choice(
        (torch.zeros(2), torch.zeros((), dtype=torch.float64), torch.zeros((), device="meta"))
    )


def backend_unknown(call, rng):
    call["backend"] = rng.choice(("gpu", "", "CPU", "cuda", "triton"))


def step_zero(call, rng):
    call["steps"], call["found_inf"] = [torch.tensor(0.0) for _ in call["steps"]], None


def isa_wrong(call, rng):
    call["isa"] = rng.choice((-2, 4, 99, -(2**31)))


EVERY = (
    wrong_dtype,
    wrong_size,
    wrong_device,
    sparse,
    huge,
    lengths_differ,
    more_targets_than_parameters,
    not_a_tensor,
    moments_of_two_dtypes,
    steps_wrong,
    hyper_wrong,
    groups_wrong,
    momentum_wrong,
    flag_wrong,
)
PUBLIC = DIRECT = (*EVERY, backend_unknown, step_zero)
NATIVE = (*EVERY, isa_wrong)


def public(call):
    adamw_ema_(
        call["params"],
        call["grads"],
        call["exp_avgs"],
        call["exp_avg_sqs"],
        call["steps"],
        hyper=call["hyper"],
        groups=call["groups"],
        teacher=TeacherLists(call["targets"], call["momentum"]),
        grad_scale=call["grad_scale"],
        found_inf=call["found_inf"],
        backend=call["backend"],
    )


def _common(call):
    return (
        *(call[n] for n in (*LISTS[:4], "steps", "hyper", "groups", "targets", "momentum")),
        [],
        [],
    )


def direct(call):
    torch.ops.jepa_kernels.adamw_ema_(
        *_common(call), None, "nearest", call["grad_scale"], call["found_inf"], call["backend"]
    )


def native_cpu(call):
    streams = list(range(len(call["targets"])))
    torch.ops.jepa_kernels_native.adamw_ema_cpu_(
        *_common(call), streams, 0, None, call["grad_scale"], call["found_inf"], call["isa"]
    )


WAYS = (
    (public, PUBLIC),
    (direct, DIRECT),
    *(((native_cpu, NATIVE),) if native.available() else ()),
)

if __name__ == "__main__":
    sys.exit(fuzzing.main(valid, WAYS, int(sys.argv[1]), int(sys.argv[2])))
