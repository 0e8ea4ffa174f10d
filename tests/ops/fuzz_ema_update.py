"""Malformed calls of ema_update_, run in a child process by test_fuzz.py.

    python -m tests.ops.fuzz_ema_update CALLS SEED

Half of the calls go through the public function, half straight to torch.ops: the dispatching op and
the native CPU op.
"""

from __future__ import annotations

import sys

import torch

from jepa_kernels import ema_update_, native
from tests.ops import fuzzing
from tests.ops.fuzzing import replace

BAD_DTYPES = (torch.int32, torch.bool, torch.complex64, torch.int8)
LISTS = ("targets", "sources", "copies")


def valid(rng):
    shapes = [
        tuple(rng.randint(1, 4) for _ in range(rng.randint(1, 3))) for _ in range(rng.randint(2, 4))
    ]
    dtypes = (torch.float32, torch.bfloat16)
    call = {
        "targets": [torch.randn(s).to(rng.choice(dtypes)) for s in shapes],
        "sources": [torch.randn(s) for s in shapes],
    }
    call["copies"] = [torch.zeros(s, dtype=torch.float16) for s in shapes]
    call["rounding"] = rng.choice(("nearest", "kahan", "stochastic"))
    call["compensations"] = (
        [torch.zeros_like(t) for t in call["targets"]] if call["rounding"] == "kahan" else []
    )
    call["seed"] = torch.tensor(rng.randrange(99)) if call["rounding"] == "stochastic" else None
    call |= {
        "momentum": torch.tensor(0.9, dtype=torch.float64),
        "backend": "cpu" if native.available() else "torch",
        "isa": -1,
    }
    call["streams"] = list(range(len(shapes)))
    return call


def wrong_dtype(call, rng):
    replace(call, rng, LISTS, lambda t: t.to(rng.choice(BAD_DTYPES)))


def wrong_size(call, rng):
    replace(call, rng, LISTS, lambda t: torch.cat((t, t)))


def wrong_device(call, rng):
    replace(call, rng, LISTS, lambda t: t.to("meta"))


def sparse(call, rng):
    replace(call, rng, LISTS, lambda t: t.to_sparse())


def huge(call, rng):
    """A view of one element that claims a size no machine has."""
    replace(call, rng, LISTS, lambda t: torch.zeros(1, dtype=t.dtype).as_strided((2**40,), (0,)))


def short_list(call, rng):
    name = rng.choice(LISTS)
    call[name] = call[name][:-1]


def not_a_tensor(call, rng):
    replace(call, rng, LISTS, lambda t: rng.choice((3, "x", None)))


def not_a_list(call, rng):
    name = rng.choice(("targets", "sources"))
    call[name] = rng.choice((call[name][0], 3, "targets", None))


def momentum_wrong(call, rng):
    bad = (float("nan"), 1.0001, -1e-3, float("inf"))
    call["momentum"] = rng.choice(
        (
            *(torch.tensor(m, dtype=torch.float64) for m in bad),
            torch.ones(2),
            torch.tensor(1),
            torch.tensor(0.5, device="meta"),
        )
    )


def rounding_wrong(call, rng):
    call["rounding"] = rng.choice(("up", "", "Kahan", 3))


def seed_wrong(call, rng):
    call["rounding"], call["compensations"] = "stochastic", []
    call["seed"] = rng.choice(
        (None, torch.tensor(1.0), torch.tensor([1, 2]), torch.tensor(1, device="meta"))
    )


def compensations_wrong(call, rng):
    call["rounding"], call["seed"] = "kahan", None
    call["targets"] = [t.bfloat16() for t in call["targets"]]
    lost = [torch.zeros_like(t) for t in call["targets"]]
    change = rng.choice((lambda t: t.float(), lambda t: torch.cat((t, t)), lambda t: t.to("meta")))
    call["compensations"] = rng.choice(([], lost[:-1], [*lost[:-1], change(lost[-1])]))


def backend_unknown(call, rng):
    call["backend"] = rng.choice(("gpu", "", "CPU", "cuda", "triton", "auto " * 100))


def isa_wrong(call, rng):
    call["isa"] = rng.choice((-2, 4, 99, -(2**31)))


def streams_wrong(call, rng):
    call["streams"] = call["streams"][:-1]


EVERY = (
    wrong_dtype,
    wrong_size,
    wrong_device,
    sparse,
    huge,
    short_list,
    not_a_tensor,
    not_a_list,
    momentum_wrong,
    seed_wrong,
    compensations_wrong,
)
PUBLIC = DIRECT = (*EVERY, rounding_wrong, backend_unknown)
NATIVE = (*EVERY, isa_wrong, streams_wrong)


def public(call):
    ema_update_(
        call["targets"],
        call["sources"],
        call["momentum"],
        copies=call["copies"],
        rounding=call["rounding"],
        compensations=call["compensations"] or None,
        seed=call["seed"],
        backend=call["backend"],
    )


def direct(call):
    names = (
        "targets",
        "sources",
        "momentum",
        "copies",
        "compensations",
        "seed",
        "rounding",
        "backend",
    )
    torch.ops.jepa_kernels.ema_update_(*(call[n] for n in names))


def native_cpu(call):
    names = ("targets", "sources", "momentum", "copies", "compensations", "streams")
    rounding = {"nearest": 0, "kahan": 1, "stochastic": 2}[call["rounding"]]
    torch.ops.jepa_kernels_native.ema_update_cpu_(
        *(call[n] for n in names), rounding, call["seed"], call["isa"]
    )


WAYS = (
    (public, PUBLIC),
    (direct, DIRECT),
    *(((native_cpu, NATIVE),) if native.available() else ()),
)

if __name__ == "__main__":
    sys.exit(fuzzing.main(valid, WAYS, int(sys.argv[1]), int(sys.argv[2])))
