"""The training step: nothing is read back, nothing loops over samples or tokens, parts add up,
published behaviour is reproducible."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import jepa_kernels
from jepa import step as phases
from jepa.batch import Batch
from jepa.objectives import Denominators, compute_all
from jepa.step import ModelBundle, StepConfig, TrainState, loss_step, new_state, train_step
from jepa.target import update_ema
from jepa.variants import VARIANTS
from jepa_kernels.testing import (
    BFLOAT16_LOSS,
    DERIVED,
    FLOAT32,
    FLOAT32_DEEP,
    FLOAT32_NEAR_ZERO,
    FLOAT32_STORED,
    STANDARDISED_VARIANCE,
)
from tests.conftest import missing
from tests.jepa.training_cases import make_batch, ragged_masks, small_model, step_config

EXTRA = {
    "ld_horizon_2": ("ld", {"objectives": {"latent_dynamics": {"horizon": 2}}}),
    "fwm_hw_ld_horizon_3": ("fwm_hw_ld", {"objectives": {"latent_dynamics": {"horizon": 3}}}),
    "hamiltonian_horizon_3": ("hamiltonian", {"objectives": {"hamiltonian": {"horizon": 3}}}),
}
READS_BACK = (
    "_local_scalar_dense",
    "item",
    "nonzero",
    "masked_select",
    "_unique2",
    "bincount",
    "is_nonzero",
    "equal",
    "repeat_interleave",
)
# These copy a CPU tensor out without an operator, but wait for a GPU.
SILENT = ("tolist", "numpy")


def configuration(name: str, **changes) -> StepConfig:
    base, variant_changes = EXTRA.get(name, (name, {}))
    merged = {**variant_changes, **changes.pop("variant", {})}
    return step_config(base, variant=merged, **changes)


def first_of_each_objective() -> list[str]:
    """Variants that together have every objective that any has."""
    known: set[str] = set()
    names = []
    for name in VARIANTS:
        objectives = configuration(name).variant.objectives.keys()
        if not objectives <= known:
            names.append(name)
        known |= objectives
    return names


class Watch(TorchDispatchMode):
    """Counts every operator below autograd and refuses those that hand a value to the host or
    depend on one."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.refused: list[str] = []
        self.inside_own_op = False

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        for method in SILENT:
            original = getattr(torch.Tensor, method)

            def recorded(tensor, *args, method=method, original=original, **kwargs):
                # An op of this project may look at values on a CPU, where that is free: it checks
                # ids and offsets.
                if not self.inside_own_op:
                    self.refused.append(method)
                return original(tensor, *args, **kwargs)

            self.patch.setattr(torch.Tensor, method, recorded)
        return super().__enter__()

    def __exit__(self, *exception):
        self.patch.undo()
        return super().__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        self.counts[name] += 1
        if name in READS_BACK or (name.startswith("index") and self._boolean(args)):
            self.refused.append(str(func))
        self.inside_own_op = name.startswith("jepa_kernels")
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.inside_own_op = False

    @staticmethod
    def _boolean(args) -> bool:
        indices = [
            one
            for argument in args
            if isinstance(argument, list | tuple)
            for one in argument
            if isinstance(one, torch.Tensor)
        ]
        return any(one.dtype in (torch.bool, torch.uint8) for one in indices)


def watched(name: str, grid, batch_size: int) -> Watch:
    cfg = configuration(name)
    state = new_state(cfg)
    batch = make_batch(grid, batch_size, horizon=cfg.variant.pair_horizon)
    train_step(state, batch)  # optimiser moments exist from here on
    with Watch() as watch:
        train_step(state, dataclasses.replace(batch, step=1))
    return watch


@pytest.mark.parametrize("name", [*VARIANTS, *EXTRA])
def test_nothing_is_read_back_and_nothing_loops(name):
    """Twice the samples and almost twice the tokens take exactly the same operators."""
    if not jepa_kernels.native.available():
        missing(
            "the native library is not built; the torch attention loops over packed sequences by "
            "design"
        )
    small, large = watched(name, (4, 3, 3), 2), watched(name, (4, 4, 4), 4)
    assert small.refused == []
    assert large.refused == []
    assert small.counts == large.counts
    assert sum(small.counts.values()) < 1500


def test_the_watch_sees_what_it_is_for():
    x = torch.arange(4.0)
    offences = {
        "item": lambda: x.sum().item(),
        "comparison": lambda: bool(x.sum() > 0),
        "boolean index": lambda: x[x > 0],
        "boolean assignment": lambda: x.index_put_((x > 0,), torch.tensor(1.0)),
        "nonzero": lambda: x.nonzero(),
        "masked_select": lambda: x.masked_select(x > 0),
        "tolist": lambda: x.tolist(),
        "numpy": lambda: x.numpy(),
        "repeat": lambda: torch.repeat_interleave(torch.tensor([1, 2, 3])),
    }
    for name, offence in offences.items():
        with Watch() as watch:
            offence()
        assert watch.refused, name
    with Watch() as watch:
        x.index_select(0, torch.tensor([1, 2])).sum()
    assert watch.refused == []


@pytest.mark.parametrize(
    ("name", "causal"),
    [
        *((name, False) for name in (*VARIANTS, *EXTRA)),
        *((name, True) for name in first_of_each_objective()),
    ],
)
def test_every_variant_trains(name, causal):
    """With causal encoders every objective does: none asks that a feature know the future."""
    cfg = configuration(name, model=small_model(causal=causal))
    state = new_state(cfg)
    before = copy.deepcopy(state.bundle.state_dict())
    batch = make_batch((4, 3, 3), 2, horizon=cfg.variant.pair_horizon)
    for step in range(2):
        state, metrics = train_step(state, dataclasses.replace(batch, step=step))
    assert state.step == 2
    assert all(torch.isfinite(value).all() for value in metrics.values())
    assert metrics["skipped"] == 0
    assert set(cfg.variant.objectives) <= set(metrics)
    weights = phases.objective_weights(cfg, 1)
    total = sum(weights[objective] * metrics[objective] for objective in cfg.variant.objectives)
    torch.testing.assert_close(metrics["loss"], total)
    after = state.bundle.state_dict()
    for part in ("context_encoder.patch_embed.proj.weight", "predictor.predictor_proj.weight"):
        assert not torch.equal(before[part], after[part])
    for objective in state.bundle.heads:
        changed = [
            key
            for key in after
            if key.startswith(f"heads.{objective}") and not torch.equal(before[key], after[key])
        ]
        assert changed
    assert (state.bundle.target_encoder is None) == (cfg.variant.target.kind == "online")


def test_the_loss_falls():
    torch.manual_seed(0)
    cfg = step_config("fwm_ld", total_steps=1000)
    cfg = dataclasses.replace(
        cfg, schedule=dataclasses.replace(cfg.schedule, rate=3e-3, final_rate=3e-3)
    )
    state, batch, losses = new_state(cfg), make_batch((4, 3, 3), 2), []
    for step in range(12):
        _, metrics = train_step(state, dataclasses.replace(batch, step=step))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", ["baseline", "fwm_hw_ld", "kinematic", "hamiltonian"])
def test_phases_one_by_one_equal_the_step(name):
    cfg = step_config(name)
    bundle, batch = ModelBundle(cfg.model, cfg.variant), make_batch((4, 3, 3), 2)
    loss, metrics = loss_step(bundle, batch, cfg)
    target, live = phases.target_features(bundle, batch, cfg)
    context = phases.context_features(bundle, batch, cfg)
    predicted, predicted_context = phases.predictions(bundle, context, batch, cfg)
    ctx = phases.objective_context(
        bundle,
        batch,
        cfg,
        Denominators.of(batch.masks),
        target,
        live,
        context,
        predicted,
        predicted_context,
    )
    again, _ = compute_all(ctx, cfg.variant.objectives, phases.objective_weights(cfg, batch.step))
    assert torch.equal(loss, again)
    assert torch.equal(metrics["loss"], loss.detach())


def split(batch: Batch, parts: list[list[int]]) -> list[Batch]:
    from tests.jepa.test_objectives import reordered_masks

    return [
        Batch(
            batch.clips[part],
            reordered_masks(batch.masks, part),
            batch.step,
        )
        for part in parts
    ]


@pytest.mark.parametrize(
    "name", ["baseline", "hw", "ld", "fac", "spectral", "kinematic", "velgate"]
)
def test_micro_batches_give_the_gradient_of_the_whole(name):
    """Uneven parts of a ragged batch: denominators are those of the whole."""
    cfg = step_config(
        name, variant={"objectives": {"orthogonality": {"weight": 0.0}}} if name == "fac" else {}
    )
    bundle, batch = ModelBundle(cfg.model, cfg.variant), make_batch((4, 3, 3), 4)
    loss, _ = loss_step(bundle, batch, cfg)
    loss.backward()
    whole = {key: p.grad.clone() for key, p in bundle.named_parameters() if p.grad is not None}
    bundle.zero_grad()
    parts = split(batch, [[0], [1, 2, 3]])
    denominators = phases.global_denominators(parts)
    total = torch.zeros(())
    for part in parts:
        share, _ = loss_step(bundle, part, cfg, denominators)
        share.backward()
        total += share.detach()
    torch.testing.assert_close(total, loss.detach(), **FLOAT32)
    for key, wanted in whole.items():
        error = (dict(bundle.named_parameters())[key].grad - wanted).norm() / wanted.norm().clamp(
            min=1e-6
        )
        assert error < FLOAT32_DEEP["rtol"], key


def test_train_step_takes_micro_batches():
    cfg = step_config("ld")
    torch.manual_seed(0)
    one = new_state(cfg)
    two = TrainState(copy.deepcopy(one.bundle), None, cfg)
    two.optimizer = phases.build_optimizer(two.bundle, cfg)
    batch = make_batch((4, 3, 3), 4)
    _, whole = train_step(one, batch)
    _, parts = train_step(two, split(batch, [[0, 1], [2, 3]]))
    torch.testing.assert_close(parts["loss"], whole["loss"], **FLOAT32)
    torch.testing.assert_close(parts["gradient_norm"], whole["gradient_norm"], **FLOAT32_DEEP)
    assert two.step == 1


def test_ranks_share_denominators_by_one_reduction():
    """Two ranks in one process: the reduction is called once, with every count, and what each
    computes adds up."""
    cfg = step_config("ld")
    bundle, batch = ModelBundle(cfg.model, cfg.variant), make_batch((4, 3, 3), 4)
    parts = split(batch, [[0], [1, 2, 3]])
    counts = [Denominators.of(part.masks).packed() for part in parts]
    calls = []

    def reduce(vector):
        calls.append(vector)
        return sum(counts)

    shares = []
    for part in parts:
        denominators = phases.global_denominators([part], reduce, ranks=2)
        assert denominators.parts == 2
        shares.append(loss_step(bundle, part, cfg, denominators)[0])
    assert [len(vector) for vector in calls] == [9, 9]
    torch.testing.assert_close(sum(shares), loss_step(bundle, batch, cfg)[0], **FLOAT32)


@pytest.mark.parametrize("optimizer", ["adamw_ema", "adamw"])
def test_a_gradient_that_is_not_finite_skips_the_update(optimizer):
    cfg = step_config("baseline", optimizer=optimizer)
    state, batch = new_state(cfg), make_batch((4, 3, 3), 2)
    train_step(state, batch)
    before = copy.deepcopy(state.bundle.state_dict())
    moments = copy.deepcopy(state.optimizer.state_dict()["state"])
    broken = dataclasses.replace(batch, clips=torch.full_like(batch.clips, torch.nan), step=1)
    _, metrics = train_step(state, broken)
    assert metrics["skipped"] == 1
    assert not torch.isfinite(metrics["loss"])
    assert all(torch.equal(before[key], value) for key, value in state.bundle.state_dict().items())
    for key, entry in state.optimizer.state_dict()["state"].items():
        assert all(torch.equal(entry[name], moments[key][name]) for name in entry)
    _, metrics = train_step(state, dataclasses.replace(batch, step=2))
    assert metrics["skipped"] == 0
    assert torch.isfinite(metrics["loss"])
    if optimizer == "adamw_ema":
        assert state.optimizer.teacher.num_updates == 2
    after = state.bundle.state_dict()
    assert any(
        not torch.equal(before[key], after[key])
        for key in after
        if key.startswith("context_encoder")
    )
    assert any(
        not torch.equal(before[key], after[key])
        for key in after
        if key.startswith("target_encoder")
    )


@pytest.mark.parametrize("name", ["fwm_hw_ld", "kinematic"])
def test_one_pass_over_memory_does_what_optimiser_and_ema_do(name):
    weights = []
    for optimizer in ("adamw_ema", "adamw"):
        torch.manual_seed(0)
        cfg = step_config(name, optimizer=optimizer, clip_gradient=0.5)
        state = new_state(cfg)
        for step in range(3):
            train_step(state, make_batch((4, 3, 3), 2, seed=step, step=step))
        weights.append(state.bundle.state_dict())
        teacher = getattr(state.optimizer, "teacher", None)
        assert (teacher is not None) == (optimizer == "adamw_ema" and name == "fwm_hw_ld")
    for key, value in weights[0].items():
        # Adam divides by the root of tiny moments: a weight whose gradient is rounding noise moves
        # freely within its learning rate.
        assert (value - weights[1][key]).abs().mean() <= FLOAT32_STORED["atol"], key


def test_gradients_are_clipped():
    cfg = step_config("baseline", clip_gradient=1e-3)
    state = new_state(cfg)
    loss, _ = loss_step(state.bundle, make_batch((4, 3, 3), 2), cfg)
    loss.backward()
    norm = phases.clip_gradients(state.optimizer, cfg.clip_gradient)
    assert norm > 1e-3
    assert phases.clip_gradients(state.optimizer, None) == pytest.approx(1e-3, rel=DERIVED["rtol"])


def test_ema_and_online_targets():
    ema, online = step_config("baseline"), step_config("kinematic")
    batch = make_batch((4, 3, 3), 2)
    bundle = ModelBundle(ema.model, ema.variant)
    target, live = phases.target_features(bundle, batch, ema)
    assert not target.requires_grad
    assert target is live
    assert all(not p.requires_grad for p in bundle.target_encoder.parameters())
    assert bundle.evaluation_encoder is bundle.target_encoder
    bundle = ModelBundle(online.model, online.variant)
    target, live = phases.target_features(bundle, batch, online)
    assert target.requires_grad
    assert bundle.evaluation_encoder is bundle.context_encoder
    detached = step_config("kinematic", variant={"target": {"kind": "online", "detach": True}})
    target, live = phases.target_features(bundle, batch, detached)
    assert not target.requires_grad
    assert live.requires_grad
    mean, variance = live.view(-1, 2, 24).mean(-1), live.view(-1, 2, 24).var(-1, unbiased=False)
    torch.testing.assert_close(mean, torch.zeros_like(mean), **FLOAT32_NEAR_ZERO)
    torch.testing.assert_close(variance, torch.ones_like(variance), **STANDARDISED_VARIANCE)


def test_kinematic_losses_with_an_ema_train_nothing():
    """A published finding: bitwise no effect, because nothing upstream of the target has a
    gradient."""
    gradients = []
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        cfg = step_config(
            "kinematic",
            variant={"target": {"kind": "ema"}, "objectives": {"kinematic": {"weight": weight}}},
        )
        bundle = ModelBundle(cfg.model, cfg.variant)
        loss_step(bundle, make_batch((4, 3, 3), 2), cfg)[0].backward()
        gradients.append([p.grad for p in bundle.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_ema_moves_by_its_momentum():
    first, second = (torch.nn.Linear(3, 2) for _ in range(2))
    expected = [
        0.9 * a.detach() + 0.1 * b.detach()
        for a, b in zip(first.parameters(), second.parameters(), strict=True)
    ]
    update_ema(first, second, 0.9)
    for got, wanted in zip(first.parameters(), expected, strict=True):
        torch.testing.assert_close(got.detach(), wanted)
    kept = copy.deepcopy(first.state_dict())
    update_ema(first, second, 1.0)
    assert all(torch.equal(kept[key], value) for key, value in first.state_dict().items())
    update_ema(first, second, 0.0)
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )


@pytest.mark.parametrize("behaviour", [[], ["evaluate_initial_target"]])
def test_what_is_evaluated_without_an_ema(behaviour):
    cfg = step_config("kinematic", variant={"published_behaviour": behaviour})
    state = new_state(cfg)
    initial = copy.deepcopy(state.bundle.context_encoder.state_dict())
    train_step(state, make_batch((4, 3, 3), 2))
    same = all(
        torch.equal(initial[key], value)
        for key, value in state.bundle.evaluation_encoder.state_dict().items()
    )
    assert same == bool(behaviour)


def test_the_published_dynamics_head_never_trains():
    for behaviour, trains in (([], True), (["dynamics_hard_no_gradient"], False)):
        cfg = step_config("fwm_hw_ld", variant={"published_behaviour": behaviour})
        state = new_state(cfg)
        before = copy.deepcopy(state.bundle.heads.state_dict())
        train_step(state, make_batch((4, 3, 3), 2))
        moved = [
            not torch.equal(before[key], value)
            for key, value in state.bundle.heads.state_dict().items()
        ]
        assert all(moved) if trains else not any(moved)


def test_context_weight_zero_skips_the_projection():
    cfg = step_config(
        "baseline",
        variant={
            "objectives": {"context": {"schedule": {"kind": "ramp", "begin": 0.5, "end": 1.0}}}
        },
    )
    state, batch = new_state(cfg), make_batch((4, 3, 3), 2)
    loss, metrics = loss_step(state.bundle, batch, cfg)
    loss.backward()
    assert "context" not in metrics
    assert state.bundle.predictor.predictor_proj_context.weight.grad is None
    _, metrics = loss_step(state.bundle, dataclasses.replace(batch, step=75), cfg)
    assert "context" in metrics
    assert phases.objective_weights(cfg, 75)["context"] == pytest.approx(0.25)


@pytest.mark.parametrize(
    "name", ["baseline", "fwm_hw_ld", "hamiltonian", "spectral", "sigreg_no_ema"]
)
def test_bfloat16_stays_close(name):
    losses = []
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        cfg = step_config(name, precision=precision)
        bundle = ModelBundle(cfg.model, cfg.variant)
        loss, _ = loss_step(bundle, make_batch((4, 3, 3), 2), cfg)
        loss.backward()
        assert loss.dtype == torch.float32
        assert all(torch.isfinite(p.grad).all() for p in bundle.parameters() if p.grad is not None)
        losses.append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=BFLOAT16_LOSS["rtol"])


@pytest.mark.parametrize("name", ["fwm_hw_ld", "kinematic", "sigreg", "ac_hw"])
def test_images_train_with_every_variant(name):
    cfg = step_config(name)
    state = new_state(cfg)
    batch = make_batch((1, 4, 4), 2)
    _, metrics = train_step(state, batch)
    assert torch.isfinite(metrics["loss"])
    skipped = {key for key, value in metrics.items() if key.endswith("/skipped") and value == 1}
    assert bool(skipped) == (name != "sigreg")


def test_two_resolutions_within_one_run():
    state = new_state(step_config("fwm_ld"))
    for step, grid in enumerate([(4, 3, 3), (2, 4, 5), (1, 3, 6)]):
        _, metrics = train_step(state, make_batch(grid, 2, step=step))
        assert torch.isfinite(metrics["loss"])


def test_the_phases_of_a_step_are_marked_in_order():
    state, batch = new_state(step_config("baseline")), make_batch((4, 3, 3), 2)
    seen = []
    train_step(state, batch, seen.append)
    assert tuple(seen) == phases.STEP_PHASES
    seen.clear()
    train_step(state, split(batch, [[0], [1]]), seen.append)
    assert seen == [*phases.STEP_PHASES[:-1], *phases.STEP_PHASES]


def test_optimiser_groups_are_the_published_ones():
    state = new_state(step_config("fwm_ld", model=small_model()))
    groups = state.optimizer.param_groups
    assert [group["name"] for group in groups] == [
        "context_encoder.decay",
        "predictor.decay",
        "context_encoder.plain",
        "predictor.plain",
        "head0.decay",
        "head0.plain",
    ]
    assert [group["weight_decay"] for group in groups] == [0.04, 0.04, 0.0, 0.0, 0.04, 0.0]
    counted = sum(len(group["params"]) for group in groups)
    assert counted == sum(p.requires_grad for p in state.bundle.parameters())
    names = {id(p): name for name, p in state.bundle.named_parameters()}
    decayed = [names[id(p)] for group in groups if group["decays"] for p in group["params"]]
    assert "predictor.mask_tokens.0" in decayed
    assert not any(name.endswith("bias") or ".norm" in name for name in decayed)


def test_masks_of_every_sequence_length_reach_the_loss():
    """A sequence with a single context token and one without targets are ordinary members of a
    batch."""
    cfg = step_config("fwm_hw_ld")
    batch = make_batch((4, 3, 3), 2)
    masks = ragged_masks((4, 3, 3), 2, share=0.05)
    assert int((masks.context_cu[1:] - masks.context_cu[:-1]).min()) <= 5
    loss, _ = loss_step(
        ModelBundle(cfg.model, cfg.variant), dataclasses.replace(batch, masks=masks), cfg
    )
    assert torch.isfinite(loss)
