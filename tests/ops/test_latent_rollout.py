"""latent_rollout: every backend against the float64 reference, the contract of the op, properties,
and the published numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import jepa_kernels
from jepa_kernels import BackendUnsupportedError
from jepa_kernels.ops.latent_rollout import (
    GRU,
    Hamiltonian,
    ResidualMLP,
    latent_rollout,
    latent_rollout_loss,
)
from jepa_kernels.ops.latent_rollout.api import op_of, prepare
from jepa_kernels.ops.latent_rollout.arithmetic import inside
from jepa_kernels.ops.latent_rollout.cells import with_parameters
from jepa_kernels.ops.latent_rollout.hamiltonian.reference import energy
from jepa_kernels.ops.latent_rollout.mlp import reference
from jepa_kernels.testing import (
    CENTRAL_DIFFERENCES,
    FLOAT32,
    FLOAT32_DEEP,
    FLOAT32_NEAR_ZERO,
    FLOAT32_SHORT,
    FLOAT32_STORED,
    FLOAT64_STORED,
    NOMINAL,
    RESULT_FAULTS,
    assert_within_budget,
    planted_fault,
)
from jepa_kernels.testing.rollout import (
    CELLS,
    OP_NAMES,
    check_rollout,
    rollout_case,
    run_rollout,
)
from tests.ops.backends import runnable

HERE = runnable("rollout_mlp")  # every cell has the same backends
OUTPUTS = ("states", "last", 1.0, 2.5)


@pytest.fixture(params=HERE)
def backend(request) -> str:
    return request.param


def test_every_cell_has_the_same_backends():
    assert {runnable(name) for name in OP_NAMES.values()} == {HERE}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16))
def test_matches_the_reference(backend, cell, output, dtype):
    if backend not in runnable(OP_NAMES[cell], dtype):
        with pytest.raises(BackendUnsupportedError, match="dtype must be"):
            run_rollout(rollout_case(cell, output, dtype=dtype), backend)
        return
    check_rollout(rollout_case(cell, output, dtype=dtype), backend)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    "options",
    (
        {"rows": 0},
        {"rows": 1, "horizon": 1},
        {"rows": 2, "horizon": 5},
        {"rows": 130, "hidden": 40, "channels": 70},
        {"rows": 101, "hidden": 33, "channels": 34, "horizon": 2},
        {"gathered": False},
        {"gathered": False, "strided": True},
        {"anchored": False},
        {"anchored": False, "split": False, "strided": True},
        {"index_dtype": torch.int32},
        {"horizon": 1, "split": False},
        {"magnitude": 6.0},
        {"channels": 10, "hidden": 64},
        {"rows": 53, "channels": 300, "hidden": 270, "horizon": 2},
    ),
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
@pytest.mark.parametrize("output", ("states", "last", 1.0, 2.0))
def test_shapes_and_layouts(backend, cell, options, output):
    check_rollout(rollout_case(cell, output, **options), backend)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_error_stays_in_budget_for_long_horizons(backend, cell, dtype):
    for output in ("states", 1.0):
        check_rollout(
            rollout_case(cell, output, horizon=64, rows=24, gain=0.5, dtype=dtype, gathered=False),
            backend,
        )


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("output", ("states", "last", 2.0))
@pytest.mark.parametrize("rows", (2, 9))
def test_gradcheck(cell, output, rows):
    case = rollout_case(
        cell, output, rows=rows, channels=6, hidden=4, horizon=2, dtype=torch.float64
    )
    leaves = [t.clone().requires_grad_() for t in (case.states, *case.cell.parameters())]
    extra = [
        None if t is None else t.clone().requires_grad_()
        for t in (case.actions, case.anchor, case.targets)
    ]

    def function(*tensors):
        states, *parameters = tensors[: len(leaves)]
        given = iter(tensors[len(leaves) :])
        actions, anchor, targets = (None if t is None else next(given) for t in extra)
        cell_now = with_parameters(case.cell, parameters)
        options = {
            "rows": case.rows,
            "actions": actions,
            "anchor": anchor,
            "anchor_rows": case.anchor_rows,
            "backend": "torch",
        }
        if targets is None:
            return latent_rollout(states, cell_now, 2, output=output, **options)
        return latent_rollout_loss(
            states, cell_now, targets, target_rows=case.target_rows, exponent=output, **options
        )

    assert torch.autograd.gradcheck(function, (*leaves, *(t for t in extra if t is not None)))


def _op_inputs(cell: str, output: str | float, backend: str, save: bool):
    case = rollout_case(cell, output, rows=5, channels=8, hidden=6, horizon=2)
    tensors = [case.states, case.actions, case.anchor, case.targets, *case.cell.parameters()]
    states, actions, anchor, targets, *parameters = (
        None if t is None else t.float().requires_grad_(save) for t in tensors
    )
    how = {"output": output} if isinstance(output, str) else {"exponent": output}
    options = {"rows": case.rows, "anchor_rows": case.anchor_rows, "target_rows": case.target_rows}
    cell = with_parameters(case.cell, parameters)
    tensors = {"actions": actions, "anchor": anchor, "targets": targets}
    op, inputs = op_of(cell), prepare(states, cell, 2, **tensors, **options, **how)
    assert inputs.save == save
    return op, (*op.signature.values(inputs), backend)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("save", (True, False))
def test_opcheck_forward(backend, cell, output, save):
    op, inputs = _op_inputs(cell, output, backend, save)
    torch.library.opcheck(op.forward_op, inputs)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("output", OUTPUTS)
def test_opcheck_backward(backend, cell, output):
    op, inputs = _op_inputs(cell, output, backend, True)
    with torch.no_grad():
        out, *saved = op.forward_op(*inputs)
    needs = [t is not None for t in op.signature.leaves(inputs)]
    detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in inputs]
    torch.library.opcheck(op.backward_op, (torch.ones_like(out), saved, needs, *detached))


@pytest.mark.parametrize("cell", CELLS)
def test_compiles_without_graph_breaks(backend, cell):
    case = rollout_case(cell, 1.0, rows=7)

    def loss(states, targets, actions, anchor, *parameters):
        now = with_parameters(case.cell, list(parameters))
        last = latent_rollout(
            states, now, 3, actions=actions, output="last", rows=case.rows, backend=backend
        )
        options = {
            "rows": case.rows,
            "target_rows": case.target_rows,
            "actions": actions,
            "anchor": anchor,
            "anchor_rows": case.anchor_rows,
        }
        weights = torch.arange(1.0, 8.0)
        return (
            latent_rollout_loss(states, now, targets, **options, weights=weights, backend=backend)
            + last.square().mean()
        )

    tensors = [case.states, case.targets, case.actions, case.anchor, *case.cell.parameters()]
    leaves = [None if t is None else t.float().requires_grad_() for t in tensors]
    given = [t for t in leaves if t is not None]
    eager = loss(*leaves)
    compiled = torch.compile(loss, fullgraph=True)(*leaves)
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(
        torch.autograd.grad(compiled, given), torch.autograd.grad(eager, given), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_repeats_bitwise(backend):
    for cell in CELLS:
        case = rollout_case(cell, 1.0, rows=300, channels=64, hidden=48)
        first, second = run_rollout(case, backend), run_rollout(case, backend)
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name]), f"{cell} {name}"


# Properties.


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    first=st.integers(1, 4),
    second=st.integers(1, 4),
    cell=st.sampled_from(CELLS),
    seed=st.integers(0, 100),
)
def test_rolling_out_twice_is_rolling_out_the_sum(first, second, cell, seed):
    for backend in HERE:
        case = rollout_case(
            cell, "last", rows=3, horizon=first + second, gathered=False, anchored=False, seed=seed
        )
        cell_now = with_parameters(case.cell, [p.float() for p in case.cell.parameters()])
        actions = None if case.actions is None else case.actions.float()
        before, after = (None, None) if actions is None else (actions[:first], actions[first:])
        whole = latent_rollout(
            case.states.float(),
            cell_now,
            first + second,
            actions=actions,
            output="last",
            backend=backend,
        )
        middle = latent_rollout(
            case.states.float(), cell_now, first, actions=before, output="last", backend=backend
        )
        again = latent_rollout(
            middle, cell_now, second, actions=after, output="last", backend=backend
        )
        torch.testing.assert_close(again, whole, **FLOAT32_DEEP)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    cell=st.sampled_from(CELLS), seed=st.integers(0, 100), exponent=st.sampled_from((1.0, 1.5, 2.0))
)
def test_loss_is_zero_at_its_own_prediction_and_ignores_the_order_of_rows(cell, seed, exponent):
    for backend in HERE:
        case = rollout_case(cell, exponent, rows=6, gathered=False, anchored=False, seed=seed)
        cell_now = with_parameters(case.cell, [p.float() for p in case.cell.parameters()])
        states, targets = case.states.float(), case.targets.float()
        actions = None if case.actions is None else case.actions.float()
        own = latent_rollout(states, cell_now, case.horizon, actions=actions, backend=backend)
        zero = latent_rollout_loss(
            states, cell_now, own, actions=actions, exponent=exponent, backend=backend
        )
        assert zero.abs() < FLOAT32_NEAR_ZERO["atol"]
        order = torch.randperm(6)
        moved = None if actions is None else actions[:, order]
        loss = latent_rollout_loss(
            states, cell_now, targets, actions=actions, exponent=exponent, backend=backend
        )
        same = latent_rollout_loss(
            states[order],
            cell_now,
            targets[:, order],
            actions=moved,
            exponent=exponent,
            backend=backend,
        )
        torch.testing.assert_close(same, loss)


def test_hamiltonian_step_keeps_its_energy_to_second_order(backend):
    case = rollout_case(
        "hamiltonian", "last", rows=64, gathered=False, anchored=False, dtype=torch.float64
    )
    if backend not in runnable("rollout_hamiltonian", torch.float64):
        case = rollout_case("hamiltonian", "last", rows=64, gathered=False, anchored=False)
    dtype, drift = case.dtype, []
    for time_step in (0.4, 0.2):
        cell = with_parameters(
            Hamiltonian(*case.cell.parameters(), time_step),
            [p.to(dtype) for p in case.cell.parameters()],
        )
        after = latent_rollout(case.states.to(dtype), cell, 1, output="last", backend=backend)
        drift.append(
            (energy(case.cell, after.double()) - energy(case.cell, case.states)).abs().mean()
        )
    assert 3.5 < drift[0] / drift[1] < 4.5


def test_anchor_replaces_the_initial_state(backend):
    case = rollout_case("residual_mlp", "states", gathered=False)
    cell = with_parameters(case.cell, [p.float() for p in case.cell.parameters()])
    states, anchor = case.states.float(), case.anchor.float()
    plain = latent_rollout(states, cell, 3, backend=backend)
    anchored = latent_rollout(states, cell, 3, anchor=anchor, backend=backend)
    torch.testing.assert_close(anchored - anchor, plain - states, **FLOAT32)


# Peers and published numbers.


def test_reference_is_the_modules_of_torch():
    cell, norm = nn.GRUCell(5, 8).double(), nn.LayerNorm(8).double()
    nn.init.normal_(norm.weight)
    states, actions = (
        torch.randn(4, 8, dtype=torch.float64),
        torch.randn(3, 4, 5, dtype=torch.float64),
    )
    out = latent_rollout(
        states, GRU.from_modules(cell, norm), 3, actions=actions, backend="reference"
    )
    for k in range(3):
        states = norm(cell(actions[k], states))
        torch.testing.assert_close(out[k], states)
    head = nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 8)).double()
    out = latent_rollout(states, ResidualMLP.from_module(head), 2, backend="reference")
    torch.testing.assert_close(out[1], states + head(states) + head(states + head(states)))


def test_hamiltonian_forces_are_the_derivatives_of_the_energy():
    net = nn.Sequential(
        nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 1)
    ).double()
    cell = Hamiltonian.from_module(net, 0.3)
    q, p = torch.randn(2, 3, 4, dtype=torch.float64).requires_grad_().unbind()
    force = torch.autograd.grad(net(torch.cat((q, p), -1)).sum(), p)[0]
    q_next = (q + 0.3 * force).detach()
    q_leaf = q_next.clone().requires_grad_()
    pull = torch.autograd.grad(net(torch.cat((q_leaf, p), -1)).sum(), q_leaf)[0]
    wanted = torch.cat((q_next, p - 0.3 * pull), -1)
    for name in ("reference", "torch"):
        torch.testing.assert_close(
            latent_rollout(torch.cat((q, p), -1), cell, 1, output="last", backend=name), wanted
        )


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("name", ("reference", *HERE))
def test_numpy_golden_vectors(root, name, index):
    """tests/golden/latent_rollout.json was computed row by row in NumPy (make golden)."""
    case = json.loads((root / "tests" / "golden" / "latent_rollout.json").read_text())["cases"][
        index
    ]
    dtype = torch.float32 if name == "cpu" else torch.float64

    def tensor(values):
        return None if values is None else torch.tensor(values, dtype=dtype)

    kinds = {"residual_mlp": ResidualMLP, "hamiltonian": Hamiltonian, "gru": GRU}
    last = (
        [tuple(r) for r in case["in_channels"]]
        if case["cell"] == "residual_mlp"
        else case["scalar"]
    )
    cell = kinds[case["cell"]](*(tensor(v) for v in case["parameters"].values()), last)
    states, targets = tensor(case["states"]).requires_grad_(), tensor(case["targets"])
    options = {
        "actions": tensor(case["actions"]),
        "anchor": tensor(case["anchor"]),
        "backend": name,
    }
    close = FLOAT32 if name == "cpu" else FLOAT64_STORED
    predictions = latent_rollout(states, cell, targets.shape[0], **options)
    torch.testing.assert_close(predictions, tensor(case["predictions"]), **close)
    errors = latent_rollout_loss(
        states, cell, targets, exponent=case["exponent"], reduction="none", **options
    )
    torch.testing.assert_close(errors, tensor(case["errors"]), **close)
    gradient = torch.autograd.grad(errors.sum(), states)[0]
    torch.testing.assert_close(
        gradient,
        tensor(case["grad_states"]),
        **(FLOAT32_DEEP if name == "cpu" else CENTRAL_DIFFERENCES),
    )


def _golden(shared_dir, name):
    return np.load(shared_dir / "golden" / "objectives" / f"{name}.npz")


def _sets(golden):
    """For each mask set: the rows of its context tokens in [B*N, D] features, and the context rows
    of its valid pairs."""
    frames, height, width = (int(v) for v in golden["grid"])
    tokens = frames * height * width
    for j in range(2):
        ids = torch.from_numpy(golden[f"mask_enc_{j}"])
        batch, count = ids.shape
        place = torch.full((batch, tokens), -1)
        place.scatter_(1, ids, torch.arange(batch * count).view(batch, count))
        now, after = place[:, : -height * width], place[:, height * width :]
        valid = (now >= 0) & (after >= 0)
        grid_rows = torch.arange(batch * tokens).view(batch, tokens)
        yield (
            now[valid],
            grid_rows[:, : -height * width][valid],
            grid_rows[:, height * width :][valid],
        )


@pytest.mark.parametrize("name", ("reference", *HERE))
@pytest.mark.parametrize("objective", ("ld", "fwm_ld", "hamiltonian"))
def test_published_objectives(shared_dir, name, objective):
    golden = _golden(shared_dir, objective)
    features = torch.from_numpy(golden["h"]).flatten(0, 1)
    contexts = [
        torch.from_numpy(golden[f"z_enc_{j}"]).flatten(0, 1).requires_grad_() for j in range(2)
    ]
    head, layers = (
        ("hamiltonian_net", ("net.0", "net.2", "net.4"))
        if objective == "hamiltonian"
        else ("dyn_head", ("0", "2"))
    )
    names = [f"{head}.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    names = [n for n in names if n != "hamiltonian_net.net.4.bias"]
    tensors = [torch.from_numpy(golden[f"param_{n}"]).requires_grad_() for n in names]
    if objective == "hamiltonian":
        cell = Hamiltonian(*tensors, float(golden["cfg_hamiltonian_dt"]))
    else:
        width = features.shape[1]
        start = int(width * float(golden["cfg_fwm_app_ratio"])) if objective == "fwm_ld" else 0
        cell = ResidualMLP(*tensors, in_channels=(start, width))
    losses = []
    for context, (rows, now, after) in zip(contexts, _sets(golden), strict=True):
        anchor = {} if objective == "hamiltonian" else {"anchor": features, "anchor_rows": now}
        losses.append(
            latent_rollout_loss(
                context, cell, features, rows=rows, target_rows=after[None], **anchor, backend=name
            )
        )
    loss = sum(losses) / len(losses)
    term = "term_hamiltonian_loss" if objective == "hamiltonian" else "term_ld_loss"
    assert abs(loss.item() - float(golden[term])) < FLOAT32_STORED["atol"]
    grads = torch.autograd.grad(loss, [*contexts, *tensors])
    # The context features carry only this objective's gradient, except the factorisation's own
    # terms in fwm_ld.
    wanted = (
        []
        if objective == "fwm_ld"
        else [golden[f"grad_z_enc_{j}"].reshape(-1, features.shape[1]) for j in range(2)]
    )
    grads = grads[2:] if objective == "fwm_ld" else grads
    for grad, expected in zip(grads, [*wanted, *(golden[f"grad_{n}"] for n in names)], strict=True):
        torch.testing.assert_close(grad, torch.from_numpy(expected), **FLOAT32_SHORT)


# Weights.


@pytest.mark.parametrize("form", ("rows", "steps", "none"))
def test_weighted_losses(backend, form):
    case = rollout_case("residual_mlp", 1.0, rows=8)
    cell = with_parameters(case.cell, [p.float() for p in case.cell.parameters()])
    options = {"rows": case.rows, "target_rows": case.target_rows}
    weights = {
        "rows": torch.rand(8),
        "steps": torch.rand(3, 8),
        "none": None,
    }[form]
    leaves = [case.states.float().requires_grad_(), case.targets.float()]
    errors = latent_rollout_loss(
        leaves[0], cell, leaves[1], **options, reduction="none", backend="reference"
    )
    factors = 1.0 if weights is None else weights
    wanted = torch.autograd.grad((errors * factors).mean(), leaves[0])[0]
    loss = latent_rollout_loss(
        leaves[0], cell, leaves[1], **options, weights=weights, backend=backend
    )
    torch.testing.assert_close(loss, (errors * factors).mean())
    torch.testing.assert_close(torch.autograd.grad(loss, leaves[0])[0], wanted, **FLOAT32_SHORT)


def test_strided_row_indices(backend):
    case = rollout_case("residual_mlp", 1.0, rows=8)
    cell = with_parameters(case.cell, [p.float() for p in case.cell.parameters()])
    tensors = (case.states.float(), cell, case.targets.float())
    rows, target_rows = (
        torch.stack((case.rows,) * 2, 1)[:, 0],
        torch.stack((case.target_rows,) * 2, 2)[..., 0],
    )
    assert not (rows.is_contiguous() or target_rows.is_contiguous())
    anchor = {"anchor": case.anchor.float(), "anchor_rows": case.anchor_rows}
    expected = latent_rollout_loss(
        *tensors, rows=case.rows, target_rows=case.target_rows, **anchor, backend=backend
    )
    assert torch.equal(
        latent_rollout_loss(
            *tensors, rows=rows, target_rows=target_rows, **anchor, backend=backend
        ),
        expected,
    )


def test_no_rows_give_a_loss_of_zero(backend):
    case = rollout_case("residual_mlp", 1.0, rows=0, gathered=False, anchored=False)
    cell = with_parameters(case.cell, [p.float().requires_grad_() for p in case.cell.parameters()])
    loss = latent_rollout_loss(case.states.float(), cell, case.targets.float(), backend=backend)
    assert loss.item() == 0.0
    assert not torch.autograd.grad(loss, cell.weight_in)[0].any()


# What is said, saved and refused.


def test_saved_memory_is_bounded(backend):
    rows, channels, hidden, horizon = 96, 256, 32, 8
    for cell, output in (("residual_mlp", 1.0), ("residual_mlp", "last"), ("hamiltonian", 1.0)):
        case = rollout_case(
            cell,
            output,
            rows=rows,
            channels=channels,
            hidden=hidden,
            horizon=horizon,
            gathered=False,
        )
        inputs = [
            t.float()
            for t in (
                case.states,
                *case.cell.parameters(),
                *(t for t in (case.anchor, case.targets) if t is not None),
            )
        ]
        known = {t.untyped_storage().data_ptr() for t in inputs}
        saved = {}

        def remember(tensor, known=known, saved=saved):
            if tensor.untyped_storage().data_ptr() not in known:
                saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        states, *parameters = (
            t.requires_grad_() for t in inputs[: 1 + len(case.cell.parameters())]
        )
        rest = inputs[1 + len(parameters) :]
        now = with_parameters(case.cell, parameters)
        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            if output == "last":
                out = latent_rollout(
                    states, now, horizon, anchor=rest[0], output="last", backend=backend
                )
            else:
                out = latent_rollout_loss(
                    states, now, rest[1], anchor=rest[0], reduction="none", backend=backend
                )
        assert out.requires_grad
        halves = 2 if cell == "hamiltonian" else 1
        assert sum(saved.values()) <= 4 * (2 * halves * rows * hidden * horizon + rows * channels)


def test_inference_saves_nothing(backend):
    for cell in CELLS:
        op, inputs = _op_inputs(cell, 1.0, backend, False)
        _, *saved = op.forward_op(*inputs)
        assert not any(t.numel() for t in saved)


def test_backward_needs_what_forward_saved(backend):
    for cell in CELLS:
        op, inputs = _op_inputs(cell, 1.0, backend, False)
        out, *saved = op.forward_op(*inputs)
        needs = [False for _ in op.signature.leaves(inputs)]
        with pytest.raises(ValueError, match="save must be True for backward, got False"):
            op.backward_op(torch.ones_like(out), saved, needs, *inputs)


@pytest.mark.parametrize("fault", RESULT_FAULTS)
@pytest.mark.parametrize("phase", ("forward", "backward"))
def test_comparison_notices_planted_faults(backend, fault, phase):
    for cell, name in OP_NAMES.items():
        case = rollout_case(cell, "states", rows=5)
        check_rollout(case, backend)
        with planted_fault(name, backend, fault, phase), pytest.raises(AssertionError):
            check_rollout(case, backend)


def test_oracle_notices_faults_in_the_reference(monkeypatch):
    case = rollout_case("residual_mlp", "states")
    wrong = {
        "no_residual": lambda inputs, x, k: reference_step(inputs, x, k) - x,
        "sign": lambda inputs, x, k: 2 * x - reference_step(inputs, x, k),
    }
    reference_step = reference.step
    for step in wrong.values():
        monkeypatch.setattr(reference, "step", step)
        with pytest.raises(AssertionError):
            check_rollout(case, "torch")


def test_double_backward_is_refused(backend):
    states = torch.randn(3, 8, requires_grad=True)
    head = nn.Sequential(nn.Linear(8, 4), nn.GELU(), nn.Linear(4, 8))
    out = latent_rollout(states, ResidualMLP.from_module(head), 2, backend=backend)
    grad = torch.autograd.grad(out.square().sum(), states, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="double backward"):
        grad.sum().backward()


def test_autocast_uses_its_dtype(backend):
    states, head = torch.randn(3, 8), nn.Sequential(nn.Linear(8, 4), nn.GELU(), nn.Linear(4, 8))
    with torch.autocast("cpu", torch.bfloat16):
        out = latent_rollout(states, ResidualMLP.from_module(head), 2, backend=backend)
        loss = latent_rollout_loss(
            states, ResidualMLP.from_module(head), torch.randn(2, 3, 8), backend=backend
        )
    assert out.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.backward()
    assert head[0].weight.grad.dtype == torch.float32


def test_low_precision_states_take_float32_targets(backend):
    case = rollout_case("residual_mlp", 1.0, dtype=torch.bfloat16)
    # no product, whose operands may be rounded, has a part in the errors
    case.cell.weight_out.zero_()
    cell = with_parameters(case.cell, [p.bfloat16() for p in case.cell.parameters()])
    options = {
        "rows": case.rows,
        "target_rows": case.target_rows,
        "anchor_rows": case.anchor_rows,
        "reduction": "none",
    }
    targets, anchor = case.targets.float() * 1.001, case.anchor.float() * 1.001
    out = latent_rollout_loss(
        case.states.bfloat16(), cell, targets, anchor=anchor, **options, backend=backend
    )
    oracle = latent_rollout_loss(
        case.states,
        case.cell,
        targets.double(),
        anchor=anchor.double(),
        **options,
        backend="reference",
    )
    assert_within_budget("errors", out, oracle)


HEAD = ResidualMLP(torch.zeros(4, 6), torch.zeros(4), torch.zeros(6, 4), torch.zeros(6))
WRONG = {
    "cell must be a ResidualMLP, Hamiltonian or GRU, got Sequential": (
        TypeError,
        {"cell": nn.Sequential()},
    ),
    "states must have 2 dimensions [rows, D], got shape (6,)": (
        ValueError,
        {"states": torch.zeros(6)},
    ),
    "horizon must be at least 1, got 0": (ValueError, {"horizon": 0}),
    "horizon must be an int, got float": (TypeError, {"horizon": 2.0}),
    "output must be one of states, last, got 'all'": (ValueError, {"output": "all"}),
    "cell.weight_out must have shape (6, 4), got (5, 4)": (
        ValueError,
        {"cell": ResidualMLP(HEAD.weight_in, HEAD.bias_in, torch.zeros(5, 4), HEAD.bias_out)},
    ),
    "cell.in_channels must be ranges (start, stop) within 0 to 6, in rising order, got (4, 7)": (
        ValueError,
        {"cell": ResidualMLP(*HEAD.parameters(), (4, 7))},
    ),
    "cell.bias_in must have the dtype of states (float32), got float64": (
        ValueError,
        {
            "cell": ResidualMLP(
                HEAD.weight_in, HEAD.bias_in.double(), HEAD.weight_out, HEAD.bias_out
            )
        },
    ),
    "rows must hold rows from 0 to 2, got 3": (ValueError, {"rows": torch.tensor([0, 3])}),
    "rows must have dtype int32 or int64, got float32": (ValueError, {"rows": torch.zeros(2)}),
    "actions must be None unless the cell is a GRU, got Tensor": (
        ValueError,
        {"actions": torch.zeros(1)},
    ),
    "anchor must have shape (3, 6), got (2, 6)": (ValueError, {"anchor": torch.zeros(2, 6)}),
    "anchor_rows must be None without anchor, got Tensor": (
        ValueError,
        {"anchor_rows": torch.zeros(3)},
    ),
    "states must have an even number of channels for a Hamiltonian, got 5": (
        ValueError,
        {
            "states": torch.zeros(3, 5),
            "cell": Hamiltonian(torch.zeros(4, 5), *[torch.zeros(4)] * 4),
        },
    ),
    "actions must be given for a GRU, got None": (
        TypeError,
        {
            "cell": GRU(
                torch.zeros(18, 2),
                torch.zeros(18, 6),
                *[torch.zeros(18)] * 2,
                *[torch.zeros(6)] * 2,
            )
        },
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_get_one_sentence(message, backend):
    kind, change = WRONG[message]
    arguments = {"states": torch.zeros(3, 6), "cell": HEAD, "horizon": 2} | change
    with pytest.raises(kind) as raised:
        latent_rollout(**arguments, backend=backend)
    assert str(raised.value) == f"latent_rollout: {message}."


def test_wrong_losses_get_one_sentence():
    states, targets = torch.zeros(3, 6), torch.zeros(2, 3, 6)
    for message, options in {
        "exponent must be at least 1, got 0.5": {"exponent": 0.5},
        "reduction must be one of mean, none, got 'sum'": {"reduction": "sum"},
        "targets must have 2 dimensions [N, D] with target_rows, got shape (2, 3, 6)": {
            "target_rows": torch.zeros(2, 3, dtype=torch.int64)
        },
        "weights must have shape (3,) or (2, 3), got (2,)": {"weights": torch.zeros(2)},
    }.items():
        with pytest.raises(ValueError) as raised:
            latent_rollout_loss(states, HEAD, targets, **options)
        assert str(raised.value) == f"latent_rollout: {message}."


def test_explain_states_the_cost_of_both_spaces():
    text = jepa_kernels.explain("latent_rollout", torch.zeros(300, 6), HEAD, 3)
    assert "space      hidden" in text
    assert (
        "state"
        in jepa_kernels.explain("latent_rollout", torch.zeros(1, 6), HEAD, 2)
        .splitlines()[-1]
        .split()[1]
    )
    assert "residual_mlp hidden 4; horizon 3, returns states" in text


def test_flop_ratio_is_the_documented_one():
    for channels, horizon in ((768, 4), (3072, 16)):
        case = torch.empty(8192, channels, device="meta"), torch.empty(256, channels, device="meta")
        cell = ResidualMLP(
            case[1],
            torch.empty(256, device="meta"),
            case[1].T,
            torch.empty(channels, device="meta"),
        )
        call = prepare(case[0], cell, horizon, output="last")
        assert call.space() == "hidden"
        ratio = call.flop("state") / call.flop("hidden")
        assert ratio == pytest.approx(
            2 * horizon / (2 + horizon * 256 / channels), rel=NOMINAL["rtol"]
        )


def test_planning_reads_one_state_for_all_candidates(backend):
    """Expanded states (stride 0) and repeated rows are read in place."""
    cell, norm = nn.GRUCell(2, 6), nn.LayerNorm(6)
    gru, state, actions = GRU.from_modules(cell, norm), torch.randn(1, 6), torch.randn(4, 9, 2)
    wanted = latent_rollout(
        state.repeat(9, 1), gru, 4, actions=actions, output="last", backend="reference"
    )
    expanded = latent_rollout(
        state.expand(9, 6), gru, 4, actions=actions, output="last", backend=backend
    )
    gathered = latent_rollout(
        state,
        gru,
        4,
        rows=torch.zeros(9, dtype=torch.int32),
        actions=actions,
        output="last",
        backend=backend,
    )
    torch.testing.assert_close(expanded, wanted)
    torch.testing.assert_close(gathered, wanted)


class _OnAGpu(torch.Tensor):
    device = torch.device("cuda")


def test_rows_on_a_gpu_stay_inside_their_table():
    """There nobody waits to check them, so kernels that read a table directly get them clamped."""
    wrong, table = torch.tensor([-3, 0, 4, 9]), torch.zeros(2, 5, 3)
    assert inside(wrong.as_subclass(_OnAGpu), table).tolist() == [0, 0, 4, 4]
    assert inside(wrong, table) is wrong
    assert inside(None, table) is None


def test_loss_equals_the_loss_of_the_rollout(backend):
    case = rollout_case("hamiltonian", 1.0, gathered=False, anchored=False)
    cell = with_parameters(case.cell, [p.float() for p in case.cell.parameters()])
    states, targets = case.states.float(), case.targets.float()
    predictions = latent_rollout(states, cell, 3, backend=backend)
    half = states.shape[1] // 2
    wanted = F.l1_loss(predictions[..., :half], targets[..., :half]) + F.l1_loss(
        predictions[..., half:], targets[..., half:]
    )
    torch.testing.assert_close(latent_rollout_loss(states, cell, targets, backend=backend), wanted)


def test_backward_fills_nothing_as_large_as_what_is_saved(backend):
    """autograd would otherwise hand backward zeros for every saved tensor: for a GRU, the gates of
    all steps."""
    rows, width, horizon = 64, 32, 6
    case = rollout_case("gru", "last", rows=rows, channels=width, horizon=horizon)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
    ) as profile:
        run_rollout(case, backend)
    filled = [event.input_shapes[0] for event in profile.events() if event.name == "aten::zero_"]
    assert max(np.prod(shape, dtype=int) for shape in filled) < horizon * rows * width, (
        f"filled {filled}"
    )
