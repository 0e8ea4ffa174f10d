"""latent_rollout against what training and planning code does today: stepping the state itself,
eager or compiled, with autograd's gradients.

`last` returns the last state, `states` all of them, `loss` the mean absolute error against targets
(fused on our side). `published` cases are the latent-dynamics (ld) and Hamiltonian objectives at
horizon 1: their eager form scatters the context to the dense grid and runs the head on every site;
ours runs on the valid pairs alone. Inputs and parameters are differentiated in the forward+backward
pass. `flop_ratio` in a record's details is the state space's FLOP over the hidden space's for the
documented formula, `target_ratio` what the ratio should reach, `scratch_unit_bytes` rows * hidden *
K + rows * D numbers, `result_bytes` the outputs and gradients that a peak includes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks import eager_objectives, eager_rollout, harness
from benchmarks.resolutions import parse_resolution
from jepa.masks import MaskPolicy, sample_masks
from jepa_kernels import GRU, Hamiltonian, ResidualMLP, latent_rollout, latent_rollout_loss
from jepa_kernels.backend import ANY_DEVICE
from jepa_kernels.ops.latent_rollout.api import op_of, prepare
from jepa_kernels.ops.latent_rollout.cells import Cell, with_parameters

OP = "latent_rollout"
HIDDEN, ACTIONS, FRAMES, BATCH = 256, 8, 16, 2
# (cell, rows, D, K, output). The published cases give a frame size for rows.
MLP = (
    *(
        ("residual_mlp", 2048, d, k, "last")
        for d, k in ((768, 1), (768, 4), (768, 16), (1536, 4), (3072, 1), (3072, 4), (3072, 16))
    ),
    *(("residual_mlp", rows, 1536, 4, "last") for rows in (512, 8192)),
    *(
        ("residual_mlp", 2048, d, k, "loss")
        for d, k in ((768, 4), (1536, 1), (1536, 4), (1536, 16), (3072, 4))
    ),
    *(("residual_mlp", rows, 1536, 4, "loss") for rows in (512, 8192)),
    *(("residual_mlp", 2048, d, 4, "states") for d in (768, 3072)),
)
OTHERS = (
    *(
        ("hamiltonian", 2048, d, k, output)
        for d, k, output in ((768, 1, "loss"), (768, 4, "last"), (1536, 4, "loss"))
    ),
    *(("gru", rows, d, 16, "last") for rows, d in ((1024, 256), (1024, 512), (4096, 256))),
    ("gru", 1024, 512, 16, "states"),
    *(("published", side, 3072, 1, name) for side in (112, 224) for name in ("ld", "hamiltonian")),
)
QUICK = (
    *(("residual_mlp", 512, 768, 4, output) for output in ("last", "states", "loss")),
    *(
        ("hamiltonian", 512, 768, 2, "loss"),
        ("gru", 256, 256, 8, "last"),
        ("published", 64, 768, 1, "ld"),
    ),
)
# torch.compile is timed where its graph is short: every further case would spend minutes on
# compilation.
COMPILED = {
    ("residual_mlp", 2048, 1536, 4, "last"),
    ("residual_mlp", 2048, 1536, 4, "loss"),
    ("residual_mlp", 2048, 768, 4, "states"),
}
# An absolute error's gradient jumps where a residual is about 0.
MAX_RELATIVE_ERROR = {"float32": (1e-5, 5e-3), "bfloat16": (3e-2, 6e-2), "float16": (5e-3, 2e-2)}
Call = Callable[..., torch.Tensor]


@dataclass
class Case:
    """One input. `call(backend)` and each baseline take the differentiated tensors: states,
    parameters and actions."""

    name: str
    tensors: list[torch.Tensor]
    cotangent: torch.Tensor
    ours: Callable[[str], Call]
    supported: list[str]
    baselines: dict[str, Callable[[bool], Call]]
    flop: float
    details: dict[str, object] = field(default_factory=dict)


def target_ratio(cell: str, channels: int, horizon: int, output: str) -> float:
    """What the design asks of the ratio to the eager state space."""
    if cell == "published":
        return 3.0
    if cell == "gru":
        return 1.5
    if output == "last":
        return max(1.0, 0.7 * flop_ratio(channels, horizon, output))
    return 1.4 if output == "loss" and horizon >= 4 and channels >= 1536 else 1.0


def flop_ratio(channels: int, horizon: int, output: str) -> float:
    if output == "last":
        return 2 * horizon / (2 + horizon * HIDDEN / channels)
    return 2 * horizon / (horizon * (1 + HIDDEN / channels) + 1)


def kernels_for(cell: Cell, inputs: Any) -> list[str]:
    """The backends with kernels of their own that take this call here."""
    op = op_of(cell)
    return [
        name
        for name in op.priority
        if op.backends[name].devices != ANY_DEVICE and not op.reasons(name, inputs)
    ]


def new_cell(
    kind: str, channels: int, make: Callable[..., torch.Tensor]
) -> ResidualMLP | Hamiltonian | GRU:
    def linear(rows: int, columns: int) -> torch.Tensor:
        return make(rows, columns) * columns**-0.5

    if kind == "residual_mlp":
        return ResidualMLP(
            linear(HIDDEN, channels),
            make(HIDDEN) * 0.1,
            linear(channels, HIDDEN) * 0.3,
            make(channels) * 0.1,
        )
    if kind == "hamiltonian":
        first = linear(HIDDEN, channels), make(HIDDEN) * 0.1
        return Hamiltonian(*first, linear(HIDDEN, HIDDEN), make(HIDDEN) * 0.1, linear(1, HIDDEN))
    gates = 3 * channels
    weights = linear(gates, ACTIONS), linear(gates, channels), make(gates) * 0.1, make(gates) * 0.1
    return GRU(*weights, torch.ones_like(make(channels)), make(channels) * 0.1)


def rollout_case(
    kind: str,
    rows: int,
    channels: int,
    horizon: int,
    output: str,
    dtype: torch.dtype,
    options: harness.Options,
) -> Case:
    torch.manual_seed(options.seed)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=options.device).to(dtype)

    cell, states = new_cell(kind, channels, make), make(rows, channels)
    actions = make(horizon, rows, ACTIONS) if kind == "gru" else None
    targets = make(horizon, rows, channels) if output == "loss" else None
    count = len(cell.parameters())

    def unpack(
        tensors: tuple[torch.Tensor, ...],
    ) -> tuple[torch.Tensor, ResidualMLP | Hamiltonian | GRU, torch.Tensor | None]:
        return (
            tensors[0],
            with_parameters(cell, list(tensors[1 : 1 + count])),
            tensors[1 + count] if actions is not None else None,
        )

    def ours(backend: str) -> Call:
        def call(*tensors: torch.Tensor) -> torch.Tensor:
            start, now, given = unpack(tensors)
            if targets is not None:
                return latent_rollout_loss(start, now, targets, actions=given, backend=backend)
            return latent_rollout(
                start, now, horizon, actions=given, output=output, backend=backend
            )

        return call

    def stepped(step: Callable[..., eager_rollout.Step]) -> Call:
        def call(*tensors: torch.Tensor) -> torch.Tensor:
            start, now, given = unpack(tensors)
            form = "halves" if output == "loss" and kind == "hamiltonian" else output
            return eager_rollout.rollout(step(now), start, horizon, given, targets, form)

        return call

    baselines: dict[str, Callable[[bool], Call]] = {}
    if kind == "residual_mlp":
        baselines["state_space"] = lambda gradient: stepped(eager_rollout.mlp_step)
        if (kind, rows, channels, horizon, output) in COMPILED and not options.quick:
            # every case compiles the same function, of which torch keeps eight versions
            torch.compiler.reset()
            compiled = torch.compile(stepped(eager_rollout.mlp_step), dynamic=False)
            baselines["compiled_state_space"] = lambda gradient: compiled
    elif kind == "hamiltonian":
        baselines["state_space_double_autograd"] = lambda gradient: stepped(
            partial(eager_rollout.hamiltonian_step, differentiable=gradient)
        )
    else:
        baselines["gru_cell_layer_norm"] = lambda gradient: stepped(eager_rollout.gru_cell_step)
        baselines["nn_gru_layer_norm"] = lambda gradient: stepped(eager_rollout.gru_layer_step)

    tensors = [states, *cell.parameters(), *(() if actions is None else (actions,))]
    described = prepare(
        states, cell, horizon, actions=actions, output=output if targets is None else "states"
    )
    shape = {"last": (rows, channels), "states": (horizon, rows, channels), "loss": ()}[output]
    cotangent = make(*shape) if output != "loss" else torch.ones((), device=options.device)
    steps = 2 * horizon if kind == "hamiltonian" else horizon
    details = {
        "group": f"{kind} {output}",
        "rows": rows,
        "channels": channels,
        "horizon": horizon,
        "hidden": HIDDEN,
        "cell": kind,
        "output": output,
        "size_class": described.size_class(),
        "target_ratio": round(target_ratio(kind, channels, horizon, output), 2),
        "scratch_unit_bytes": 4
        * rows
        * ((channels if kind == "gru" else HIDDEN) * steps + channels),
    }
    if kind == "residual_mlp":
        details["flop_ratio"] = round(flop_ratio(channels, horizon, output), 2)
    details["result_bytes"] = {
        "forward": cotangent.nbytes,
        "forward+backward": cotangent.nbytes + sum(t.nbytes for t in tensors),
    }
    return Case(
        name=f"{kind}/{output}/D{channels}/K{horizon}/{rows}rows",
        tensors=tensors,
        cotangent=cotangent,
        ours=ours,
        supported=kernels_for(cell, described),
        baselines=baselines,
        flop=described.flop("state" if kind == "gru" else "hidden"),
        details=details,
    )


def published_case(
    side: int, channels: int, objective: str, dtype: torch.dtype, options: harness.Options
) -> Case:
    """The ld or the Hamiltonian loss of one batch: `tensors` are the packed context features and
    the head's parameters."""
    torch.manual_seed(options.seed)
    resolution = parse_resolution(str(side))
    grid = resolution.grid(FRAMES)
    policy = MaskPolicy(truncate="batch_min", shared_block_size=True)
    masks = sample_masks(policy, grid, seed=options.seed, step=0, samples=range(BATCH)).to(
        options.device
    )
    layers: list[nn.Module] = [
        nn.Linear(channels, HIDDEN),
        nn.GELU(),
        nn.Linear(HIDDEN, channels if objective == "ld" else HIDDEN),
    ]
    if objective == "hamiltonian":
        layers += [nn.GELU(), nn.Linear(HIDDEN, 1, bias=False)]
    head = nn.Sequential(*layers).to(device=options.device, dtype=dtype)
    names = [name for name, _ in head.named_parameters()]
    context = torch.randn(masks.context_ids.shape[0], channels, device=options.device).to(dtype)
    targets = torch.randn(BATCH, masks.num_tokens, channels, device=options.device).to(dtype)
    rows, grid_rows = masks.pairs.t().contiguous(), masks.pair_rows.t().contiguous()
    share = rows.shape[1] / (masks.pair_count * masks.num_sets)
    weights = share.index_select(0, masks.pair_set)
    ids = [part.view(BATCH, -1) for part in masks.context_ids.split(list(masks.context_sizes))]

    def ours(backend: str) -> Call:
        def call(features: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
            options = {
                "rows": rows[0],
                "target_rows": grid_rows[1:],
                "weights": weights,
                "backend": backend,
            }
            if objective == "ld":
                options |= {"anchor": targets.flatten(0, 1), "anchor_rows": grid_rows[0]}
                return latent_rollout_loss(
                    features, ResidualMLP(*parameters), targets.flatten(0, 1), **options
                )
            return latent_rollout_loss(
                features, Hamiltonian(*parameters, 0.1), targets.flatten(0, 1), **options
            )

        return call

    def dense(features: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        if (
            not torch.is_grad_enabled()
        ):  # The published forces need a graph even where nothing is trained.
            features = features.detach().requires_grad_()
        with torch.enable_grad() if objective == "hamiltonian" else nullcontext():
            return objective_of(features, parameters)

    def objective_of(features: torch.Tensor, parameters: tuple[torch.Tensor, ...]) -> torch.Tensor:
        sets = [
            part.view(BATCH, -1, channels) for part in features.split(list(masks.context_sizes))
        ]
        now = eager_objectives.Features(grid, sets, [], [], ids, [], targets, features)
        given = dict(zip(names, parameters, strict=True))

        def module(x: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(head, given, x)

        if objective == "ld":
            return eager_objectives.latent_dynamics(now, module, 0, None)
        return eager_objectives.hamiltonian(now, module, 0.1)

    tensors = [context, *(p.detach() for p in head.parameters())]
    cell = (ResidualMLP if objective == "ld" else Hamiltonian)(*tensors[1:])
    described = prepare(context, cell, 1, rows=rows[0])
    details = {
        "group": f"published {objective}",
        "resolution": resolution.name,
        "rows": rows.shape[1],
        "tokens": masks.num_tokens,
        "channels": channels,
        "horizon": 1,
        "hidden": HIDDEN,
        "cell": described.cell,
        "output": "loss",
        "size_class": described.size_class(),
        "target_ratio": 3.0,
        "scratch_unit_bytes": 4
        * rows.shape[1]
        * (HIDDEN * (1 if objective == "ld" else 2) + channels),
        "result_bytes": {"forward": 4, "forward+backward": sum(t.nbytes for t in tensors)},
    }
    return Case(
        name=f"published/{objective}/D{channels}/{resolution.name}px/{FRAMES}f",
        tensors=tensors,
        cotangent=torch.ones((), device=options.device),
        ours=ours,
        supported=kernels_for(cell, described),
        baselines={"eager_dense_grid": lambda gradient: dense},
        flop=described.flop("hidden"),
        details=details,
    )


def cases(options: harness.Options) -> Iterator[Case]:
    for name in options.dtypes or harness.default_dtypes(options.device, on_gpu=("bfloat16",)):
        dtype = getattr(torch, name)
        for kind, rows, channels, horizon, output in QUICK if options.quick else (*MLP, *OTHERS):
            if kind == "published":
                yield published_case(rows, channels, output, dtype, options)
            else:
                yield rollout_case(kind, rows, channels, horizon, output, dtype, options)


def _run(call: Call, case: Case, pass_name: str) -> Callable[[], object]:
    if pass_name == "forward+backward":
        return harness.forward_backward(call, case.tensors, case.cotangent)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return call(*case.tensors)

    return forward


def gate(case: Case, backend: str, baseline: Call, dtype: str, pass_name: str) -> None:
    """Our result against the baseline's in float32 on the same numbers: two derivations of one
    formula that share no code."""
    ours = _run(case.ours(backend), case, pass_name)()
    wide = replace(
        case, tensors=[t.float() for t in case.tensors], cotangent=case.cotangent.float()
    )
    theirs = _run(baseline, wide, pass_name)()
    limits = MAX_RELATIVE_ERROR[dtype]
    if pass_name == "forward":
        harness.require_close("out", ours, theirs, rtol=limits[0])
        return
    for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        harness.require_close(f"gradient {i}", mine, other, rtol=limits[1])


def comparisons(options: harness.Options) -> Iterator[harness.Comparison]:
    for case in cases(options):
        dtype = str(case.tensors[0].dtype).removeprefix("torch.")
        for backend in options.backends or case.supported or ["torch"]:
            for pass_name in ("forward", "forward+backward"):
                for baseline, build in case.baselines.items():
                    if not options.wants(baseline=baseline, pass_name=pass_name):
                        continue
                    theirs = build(pass_name == "forward+backward")
                    yield harness.Comparison(
                        case=case.name,
                        dtype=dtype,
                        pass_name=pass_name,
                        backend=backend,
                        baseline=baseline,
                        candidate=_run(case.ours(backend), case, pass_name),
                        reference=_run(theirs, case, pass_name),
                        gate=partial(gate, case, backend, theirs, dtype, pass_name),
                        flop=case.flop * (3 if pass_name == "forward+backward" else 1),
                        details=case.details
                        | {"result_bytes": case.details["result_bytes"][pass_name]},
                    )


if __name__ == "__main__":
    raise SystemExit(harness.main(OP, comparisons, __doc__))
