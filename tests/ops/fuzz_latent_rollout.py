"""Malformed calls of latent_rollout and latent_rollout_loss, run in a child process by
test_fuzz.py.

    python -m tests.ops.fuzz_latent_rollout CALLS SEED

Half of the calls go through the public functions, half straight to torch.ops: the dispatching op,
forward and backward, and the native ops.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from jepa_kernels import native
from jepa_kernels.backend import OPS
from jepa_kernels.ops.latent_rollout import (
    GRU,
    Hamiltonian,
    ResidualMLP,
    latent_rollout,
    latent_rollout_loss,
)
from jepa_kernels.testing.rollout import OP_NAMES
from tests.ops import fuzzing
from tests.ops.backends import runnable

HUGE = 2**40
KINDS = {"residual_mlp": ResidualMLP, "hamiltonian": Hamiltonian, "gru": GRU}
ROWS, D, H, MIDDLE, A = 5, 8, 6, 7, 3
TABLE = ROWS + 2
SHARED = (
    *("states", "rows", "actions", "anchor", "anchor_rows", "targets", "target_rows"),
    *("in_channels", "horizon", "output", "exponent", "save", "backend"),
)


def arguments(call):
    """The arguments of the cell's op by name. Torch refuses what is given and not of that op."""
    kind = KINDS[call["cell"]]
    *parameters, last = kind.__dataclass_fields__
    given = dict(zip(parameters, call["parameters"], strict=False))
    if kind is not ResidualMLP:
        given[last] = call["scalar"]
    names = OPS[OP_NAMES[call["cell"]]].signature.names
    known = {name: call[name] for name in SHARED if name in (*names, "backend")}
    return given | known | {n: call[n] for n in ("actions", "anchor") if call[n] is not None}


def valid(rng):
    """A call of every way at once: what the public functions take, what the op takes, and what the
    native ops take (`n_...`)."""
    kind, output, horizon = (
        rng.choice(tuple(KINDS)),
        rng.choice(("states", "last", "errors")),
        rng.randint(2, 3),
    )
    call = {
        "cell": kind,
        "output": output,
        "horizon": horizon,
        "in_channels": [0, D],
        "scalar": 0.1,
        "exponent": 1.0,
        "save": True,
    }
    call |= dict.fromkeys(("rows", "actions", "anchor", "anchor_rows", "targets", "target_rows"))
    call["backend"] = rng.choice(runnable(OP_NAMES[kind]))
    call["states"] = torch.randn(TABLE, D)
    call["rows"] = torch.randint(0, TABLE, (ROWS,))
    if kind == "residual_mlp":
        shapes = [(H, D), (H,), (D, H), (D,)]
        if rng.random() < 0.5:
            shapes[0], call["in_channels"] = (H, 5), [0, 2, 4, 7]
    elif kind == "hamiltonian":
        shapes = [(H, D), (H,), (MIDDLE, H), (MIDDLE,), (1, MIDDLE)]
    else:
        shapes = [(3 * D, A), (3 * D, D), (3 * D,), (3 * D,), (D,), (D,)]
        call["actions"] = torch.randn(horizon, ROWS, A)
    call["parameters"] = [torch.randn(shape) for shape in shapes]
    if kind != "gru" and rng.random() < 0.7:
        gathered = rng.random() < 0.5
        call["anchor"] = torch.randn(TABLE if gathered else ROWS, D)
        call["anchor_rows"] = torch.randint(0, TABLE, (ROWS,)) if gathered else None
    if output == "errors":
        gathered = rng.random() < 0.5
        call["targets"] = torch.randn(TABLE, D) if gathered else torch.randn(horizon, ROWS, D)
        call["target_rows"] = torch.randint(0, TABLE, (horizon, ROWS)) if gathered else None
        call["exponent"] = rng.choice((1.0, 1.5, 2.0))
    call |= {"reduction": "mean", "weights": None}
    out, *saved = direct_forward(call)
    leaves = OPS[OP_NAMES[kind]].signature.inputs.leaves
    needs = [call.get(name, "a parameter") is not None for name in leaves]
    call |= {"grad_out": torch.randn_like(out), "saved": saved, "needs": needs}
    shape = {
        **{
            "start": (ROWS, H),
            "coupling": (H, H),
            "drift": (H,),
            "inputs": (horizon, ROWS, H),
            "grad_sums": (horizon, ROWS, H),
        },
        **{
            "weight": (MIDDLE, H),
            "bias": (MIDDLE,),
            "energy": (1, MIDDLE),
            "following": (ROWS, H),
            "carried": (ROWS, H),
        },
        **{
            "read": (H, D),
            "read_bias": (D,),
            "sums": (horizon, ROWS, H),
            "base": (TABLE, D),
            "out": (horizon, ROWS, D),
        },
        **{"targets": (TABLE, D), "grad_errors": (horizon, ROWS), "grad_base": (ROWS, D)},
        **{
            "state": (ROWS, D),
            "actions": (horizon, ROWS, A),
            "gates": (horizon, ROWS, 4 * D),
            "states": (horizon, ROWS, D),
        },
    }
    call |= {f"n_{name}": torch.randn(size) for name, size in shape.items()}
    call["n_weights"] = [
        torch.randn(s) for s in ((3 * D, A), (3 * D, D), (3 * D,), (3 * D,), (D,), (D,))
    ]
    call["n_base_rows"], call["n_target_rows"] = (
        torch.randint(0, TABLE, (ROWS,)),
        torch.randint(0, TABLE, (horizon, ROWS)),
    )
    return call | {"isa": -1}


# Faults of the public functions and of the dispatching op.

TENSORS = ("states", "actions", "anchor", "targets")
INDICES = ("rows", "anchor_rows", "target_rows")


def change(
    call, rng, names, function: Callable[[torch.Tensor], object], parameters: bool = True
) -> None:
    """Changes one tensor of the call, or one parameter."""
    present = [name for name in names if call[name] is not None]
    if not present or (parameters and rng.random() < 0.5):
        present = ["parameters"]
    name = rng.choice(present)
    if isinstance(call[name], list):
        fuzzing.replace(call, rng, [name], function)
    else:
        call[name] = function(call[name])


def wrong_rank(call, rng):
    change(
        call,
        rng,
        (*TENSORS, *INDICES),
        rng.choice((lambda t: t[None], lambda t: t[..., 0], lambda t: t[None, None])),
    )


def wrong_dtype(call, rng):
    # One of several tensors only, so even a supported dtype disagrees with the rest.
    kinds = (torch.int32, torch.bool, torch.complex64, torch.float16, torch.float64, torch.int8)
    change(call, rng, TENSORS, lambda t: t.to(rng.choice(kinds)))


def wrong_device(call, rng):
    change(call, rng, (*TENSORS, *INDICES), lambda t: t.to("meta"))


def wrong_width(call, rng):
    change(call, rng, TENSORS, lambda t: torch.cat((t, t), -1))


def wrong_length(call, rng):
    """Too few rows in a tensor whose rows belong to those of the rollout."""
    names = [*(n for n in ("actions", "anchor_rows", "target_rows") if call[n] is not None)]
    names += [
        n
        for n in ("anchor", "targets")
        if call[n] is not None and call[f"{n.removesuffix('s')}_rows"] is None
    ]
    if not names:
        change(call, rng, (), lambda t: torch.cat((t, t)))
        return
    change(
        call,
        rng,
        names,
        lambda t: t.narrow(-1 if t.dtype == torch.int64 else -2, 0, 3),
        parameters=False,
    )


def sparse(call, rng):
    change(call, rng, TENSORS, lambda t: t.to_sparse())


def huge(call, rng):
    """A view of one element that claims a size no machine has."""
    change(
        call,
        rng,
        TENSORS,
        lambda t: torch.zeros(1).as_strided((*t.shape[:-1], HUGE), (0,) * t.dim()),
    )


def not_a_tensor(call, rng):
    bad = rng.choice((3, "x", None))
    change(call, rng, ("states",), lambda t: bad)


def rows_out_of_range(call, rng):
    value = rng.choice((-1, TABLE, 10**6, 2**31, -(2**31), 2**62, -(2**63)))

    def spoil(index: torch.Tensor) -> torch.Tensor:
        index = index.clone()
        index.view(-1)[rng.randrange(index.numel())] = value
        return index

    change(call, rng, INDICES, spoil, parameters=False)


def rows_wrong_kind(call, rng):
    kinds = (torch.float32, torch.bool, torch.int16, torch.uint8)
    change(call, rng, INDICES, lambda t: t.to(rng.choice(kinds)), parameters=False)


def horizon_wrong(call, rng):
    call["horizon"] = rng.choice((0, -1, -HUGE, 2.5, "2", None))
    if call["targets"] is not None and call["target_rows"] is None:
        call["targets"] = call["targets"][
            :0
        ]  # the public function takes its horizon from the targets
    elif call["targets"] is not None:
        call["target_rows"] = call["target_rows"][:0]


def scalar_wrong(call, rng):
    if call["cell"] == "residual_mlp":
        in_channels_wrong(call, rng)
    else:
        call["scalar"] = rng.choice((float("nan"), float("inf"), float("-inf"), "0.1", None, [0.1]))


def in_channels_wrong(call, rng):
    if call["cell"] != "residual_mlp":
        scalar_wrong(call, rng)
    else:
        bad = (
            [0, D + 1],
            [-1, 4],
            [4, 2],
            [2, 4, 3, 6],
            [4, 6, 0, 2],
            [0, HUGE],
            [0, 0],
            [1, 4],
            [],
            [0],
            [0, 2, 4],
        )
        call["in_channels"] = rng.choice(bad)


def exponent_wrong(call, rng):
    if call["targets"] is None:
        output_wrong(call, rng)
    else:
        call["exponent"] = rng.choice((0.5, 0.0, -1.0, float("nan"), float("inf"), "1", None))


def output_wrong(call, rng):
    if call["targets"] is None:
        call["output"] = rng.choice(("all", "", "errors", "State", 3, None))
    else:
        call["exponent"] = 0.0


def cell_wrong(call, rng):
    call["cell"] = rng.choice(("mlp", "", "GRU", 3, None))


def argument_of_another_cell(call, rng):
    if call["cell"] == "gru":
        call["anchor"] = torch.randn(ROWS, D)
    else:
        call["actions"] = torch.randn(call["horizon"], ROWS, A)


def missing_argument(call, rng):
    if call["cell"] == "gru":
        call["actions"] = None
    elif call["anchor_rows"] is not None:
        call["anchor"] = None
    else:
        call["parameters"] = call["parameters"][:-1]


def odd_channels(call, rng):
    call["states"] = call["states"][:, :-1].contiguous()


def backend_unknown(call, rng):
    call["backend"] = rng.choice(("gpu", "", "CPU", "cuda", "auto " * 100, 3))


def weights_wrong(call, rng):
    if call["targets"] is None:
        output_wrong(call, rng)
        return
    call["weights"] = rng.choice(
        (
            *(3, "x", torch.ones(ROWS + 1), torch.ones(1), torch.ones(ROWS, 1)),
            *(torch.ones(ROWS, device="meta"), torch.ones(ROWS, dtype=torch.complex64)),
            torch.ones(ROWS).to_sparse(),
        )
    )


def reduction_wrong(call, rng):
    if call["targets"] is None:
        output_wrong(call, rng)
    else:
        call["reduction"] = rng.choice(("sum", "", "Mean", 3, None))


def another_horizon(call, rng):
    if call["targets"] is None and call["actions"] is None:
        call["horizon"] = 0
    else:
        call["horizon"] += 1


def output_and_targets_disagree(call, rng):
    call["output"] = rng.choice(("states", "last")) if call["output"] == "errors" else "errors"


def channel_stride(call, rng):
    change(
        call, rng, ("states", "anchor", "targets"), lambda t: t.mT.contiguous().mT, parameters=False
    )


def narrow_rows(call, rng):
    change(call, rng, INDICES, lambda t: t.int(), parameters=False)


def grad_out_wrong(call, rng):
    changes = (
        lambda t: t.double(),
        lambda t: t[..., :-1],
        lambda t: t[None],
        lambda t: t.to("meta"),
        lambda t: t.half(),
        lambda t: t.to_sparse(),
    )
    call["grad_out"] = rng.choice(changes)(call["grad_out"])


def saved_wrong(call, rng):
    full = [i for i, t in enumerate(call["saved"]) if t.numel()]
    i = rng.choice(full)
    changes = (
        lambda t: t.double(),
        lambda t: t[..., :-1],
        lambda t: t[None],
        lambda t: t.to("meta"),
        lambda t: t[:0],
        lambda t: t.half(),
    )
    call["saved"] = rng.choice(
        (
            [*call["saved"][:i], rng.choice(changes)(call["saved"][i]), *call["saved"][i + 1 :]],
            call["saved"][:1],
            [],
        )
    )


def needs_wrong(call, rng):
    call["needs"] = rng.choice(([], call["needs"][:-1], [*call["needs"], True], [True]))


def nothing_saved(call, rng):
    call["save"] = False


EVERY = (
    *(
        wrong_rank,
        wrong_dtype,
        wrong_device,
        wrong_width,
        wrong_length,
        sparse,
        huge,
        not_a_tensor,
        rows_out_of_range,
        rows_wrong_kind,
    ),
    *(
        horizon_wrong,
        scalar_wrong,
        in_channels_wrong,
        exponent_wrong,
        output_wrong,
        argument_of_another_cell,
    ),
    *(missing_argument, odd_channels, backend_unknown),
)
PUBLIC = (*EVERY, cell_wrong, weights_wrong, reduction_wrong)
DIRECT = (
    *EVERY,
    another_horizon,
    output_and_targets_disagree,
    channel_stride,
    narrow_rows,
)
BACKWARD = (*DIRECT, grad_out_wrong, saved_wrong, needs_wrong, nothing_saved)


def public(call):
    edges = call["in_channels"]
    kind = KINDS.get(call["cell"], lambda *_: call["cell"])
    extra = list(zip(edges[::2], edges[1::2], strict=False)) + [
        (e,) for e in edges[-1:] if len(edges) % 2
    ]
    cell = kind(*call["parameters"], extra if call["cell"] == "residual_mlp" else call["scalar"])
    options = {name: call[name] for name in ("rows", "actions", "anchor", "anchor_rows", "backend")}
    try:
        if call["targets"] is None:
            return latent_rollout(
                call["states"], cell, call["horizon"], output=call["output"], **options
            )
        options |= {
            "target_rows": call["target_rows"],
            "exponent": call["exponent"],
            "weights": call["weights"],
            "reduction": call["reduction"],
        }
        return latent_rollout_loss(call["states"], cell, call["targets"], **options)
    except (TypeError, ValueError) as error:
        # What a user reads is this package's sentence, not one that torch or Python happened to
        # raise further down.
        if not str(error).startswith(("latent_rollout: ", "jepa_kernels: ")):
            raise AssertionError(f"not a sentence of latent_rollout: {error}") from error
        raise


def direct_forward(call):
    return OPS[OP_NAMES[call["cell"]]].forward_op(**arguments(call))


def direct_backward(call):
    op = OPS[OP_NAMES[call["cell"]]]
    return op.backward_op(call["grad_out"], call["saved"], call["needs"], **arguments(call))


# The native ops: every tensor of each, spoilt in turn.


def _native(name: str, *arguments: object) -> fuzzing.Way:
    """A way and its faults. Strings name tensors `n_...` of the call, or its isa; the rest is
    passed as it is."""

    def way(call):
        given = [
            a if not isinstance(a, str) else call["isa"] if a == "isa" else call[f"n_{a}"]
            for a in arguments
        ]
        return getattr(torch.ops.jepa_kernels_native, f"latent_rollout_{name}")(*given)

    tensors = [f"n_{a}" for a in arguments if isinstance(a, str) and a != "isa"]
    floats = [t for t in tensors if not t.endswith("_rows")]
    indices = [t for t in tensors if t.endswith("_rows")]

    def spoil(names, function: Callable[[torch.Tensor], object]):
        return lambda call, rng: change(call, rng, names, function, parameters=False)

    kinds = (torch.float64, torch.float16, torch.int32, torch.bool)
    faults = {
        "dtype": lambda call, rng: change(
            call, rng, floats, lambda t: t.to(rng.choice(kinds)), parameters=False
        ),
        "wider": spoil(floats, lambda t: torch.cat((t, t), -1)),
        "flat": spoil(floats, lambda t: t.flatten() if t.dim() > 1 else t[0]),
        "scalar": spoil(tensors, lambda t: t.flatten()[0]),
        "deeper": spoil(floats, lambda t: t[None]),
        "device": spoil(tensors, lambda t: t.to("meta")),
        "sparse": spoil(floats, lambda t: t.to_sparse()),
        "huge": spoil(
            floats, lambda t: torch.zeros(1).as_strided((*t.shape[:-1], HUGE), (0,) * t.dim())
        ),
        "isa": lambda call, rng: call.update(isa=rng.choice((-2, 4, 99, -(2**31), HUGE))),
    }
    if indices:
        faults["index_dtype"] = lambda call, rng: change(
            call, rng, indices, lambda t: t.to(rng.choice((*kinds, torch.int16))), parameters=False
        )
        faults["index_short"] = spoil(indices, lambda t: t[..., :-1].contiguous())
        faults["index_range"] = lambda call, rng: change(
            call,
            rng,
            indices,
            lambda t: torch.full_like(t, rng.choice((-1, TABLE, HUGE, -HUGE))),
            parameters=False,
        )
    way.__name__ = f"native_{name}"
    for fault_name, fault in faults.items():
        fault.__name__ = fault_name
    return way, tuple(faults.values())


READ = ("sums", "read", "read_bias", "base", "base_rows")
NATIVE = (
    _native("mlp_fwd", "start", "coupling", "drift", 3, True, True, "isa"),
    _native("mlp_bwd", "inputs", "coupling", "grad_sums", "isa"),
    _native(
        "hamiltonian_fwd",
        "start",
        "weight",
        "bias",
        "energy",
        "coupling",
        0.1,
        3,
        True,
        True,
        "isa",
    ),
    _native(
        "hamiltonian_bwd",
        "start",
        "weight",
        "bias",
        "energy",
        "coupling",
        0.1,
        False,
        "following",
        "carried",
        "isa",
    ),
    _native("readout", *READ, 1, "out", "isa"),
    _native("errors", *READ, "targets", "target_rows", 1.0, True, "isa"),
    _native(
        "errors_gradient",
        *READ,
        "targets",
        "target_rows",
        2.0,
        None,
        1,
        "grad_errors",
        "grad_base",
        "isa",
    ),
    _native("gru_fwd", "state", "actions", "weights", 1e-5, True, True, "isa"),
    _native(
        "gru_bwd", "state", "actions", "states", "gates", "weights", 1e-5, "states", True, "isa"
    ),
)

WAYS = (
    (public, PUBLIC),
    (direct_forward, DIRECT),
    (direct_backward, BACKWARD),
    *(NATIVE if native.available() else ()),
)

if __name__ == "__main__":
    sys.exit(fuzzing.main(valid, WAYS, int(sys.argv[1]), int(sys.argv[2])))
