"""Golden steps: two real training steps of every variant, from the published initial weights."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import torch
from torch import Tensor, nn

from jepa import step as phases
from jepa.batch import Batch
from jepa.conformance.masks import pack, read_masks, unpack
from jepa.conformance.modules import GOLDEN_GRID, golden_model
from jepa.conformance.objectives import HEADS, TERMS
from jepa.conformance.report import Golden, Report
from jepa.objectives import Denominators, WeightSchedule, compute_all
from jepa.schedules import ScheduleConfig
from jepa.variants import VARIANTS, VariantConfig, variant

FEATURES = ("z_enc", "z_pred", "z_context")
GRADIENT_TOLERANCE = 1e-4
# How well a gradient's elements are known, relative to their root mean square: a tenth of what
# gradients are compared to.
GRADIENT_NOISE = 1e-5
RATES = (3.5e-4, 6e-4)
NORM_TOLERANCE = 5e-3
SUM_TOLERANCE = 2e-4
# Objectives whose L1 residuals are zero to rounding somewhere, since the target starts as a copy of
# the context encoder: how many elements of a gradient may have flipped, how loose it may be as a
# whole, and the loss of the second step.
KINKED = ("delta", "spectral")
KINKS = 3
KINK_LOOSE = 3e-2
KINK_LOSS_TOLERANCE = 1e-4


def check(golden: Golden, report: Report) -> None:
    """Compares one file of steps/ with the variant of its name, published quirks on."""
    if golden.name == "init_state":
        _check_initial_state(golden, report)
        return
    if golden.name not in VARIANTS:
        report.miss("(file)", f"unknown file: no variant is named {golden.name!r}")
        return
    state = _initial_state(golden, report)
    names = _parameter_names(state.bundle)
    report.equal("param_names", sorted(names), sorted(str(name) for name in golden["param_names"]))
    moves = UndecidedMoves(names)
    _first_step(golden, report, state)
    moves.record(GRADIENT_NOISE)
    phases.update(state)
    _compare_parameters(golden, report, state, moves)
    loss, metrics = phases.loss_step(state.bundle, _batch(golden, 2), state.cfg)
    kinked = _has_kinks(state.cfg.variant)
    _compare_terms(golden, report, 2, loss, metrics, KINK_LOSS_TOLERANCE if kinked else 1e-5)
    phases.backward(loss)
    # The file has no gradients of this step to say which way the kinks went.
    moves.record(KINK_LOOSE if kinked else GRADIENT_NOISE)
    phases.update(state)
    _compare_parameters(golden, report, state, moves)


def _check_initial_state(golden: Golden, report: Report) -> None:
    """The weights every file starts from: our modules take all of them under their public names."""
    model = golden_model(*_widths(golden), mask_tokens=len(golden.names("predictor.mask_tokens.")))
    bundle = phases.ModelBundle(model, variant("baseline"))
    for name, module in {"encoder": bundle.context_encoder, "predictor": bundle.predictor}.items():
        module.load_public(
            {key.removeprefix(f"{name}."): golden.tensor(key) for key in golden.names(f"{name}.")}
        )
        for key, value in module.state_dict().items():
            report.compare(f"{name}.{key}", value, golden[f"{name}.{key}"])


def _widths(initial: Golden) -> tuple[int, int, int]:
    """Encoder width, predictor width, predictor depth."""
    depth = 1 + max(int(key.split(".")[2]) for key in initial.names("predictor.predictor_blocks."))
    return (
        initial["encoder.img_mod_embed"].shape[-1],
        initial["predictor.img_mod_embed"].shape[-1],
        depth,
    )


def _configuration(name: str) -> VariantConfig:
    """The variant with every published quirk, and the context loss at its final weight: the golden
    runs have no ramp."""
    cfg = variant(name, quirks="published_quirks")
    quirks = dataclasses.replace(cfg.quirks, context_ramp_fixed_steps=False)
    context = dataclasses.replace(cfg.objectives["context"], schedule=WeightSchedule())
    return dataclasses.replace(
        cfg, quirks=quirks, objectives={**cfg.objectives, "context": context}
    )


def _initial_state(golden: Golden, report: Report) -> phases.TrainState:
    initial = Golden(golden.path.with_name("init_state.npz"))
    names = [str(name) for name in golden["param_names"]]
    tokens = sum(name.startswith("predictor.mask_tokens.") for name in names)
    cfg = phases.StepConfig(
        model=golden_model(*_widths(initial), mask_tokens=tokens),
        variant=_configuration(golden.name),
        # Far longer than two steps: the published epoch is 0 in both, so nothing is annealed yet.
        schedule=ScheduleConfig(total_steps=10**12, warmup_steps=2),
    )
    bundle = phases.ModelBundle(cfg.model, cfg.variant)
    bundle.context_encoder.load_public(
        {key.removeprefix("encoder."): initial.tensor(key) for key in initial.names("encoder.")}
    )
    own = {
        key.removeprefix("predictor."): initial.tensor(key) for key in initial.names("predictor.")
    }
    for key, value in bundle.predictor.state_dict().items():
        own.setdefault(key, torch.zeros_like(value))
    bundle.predictor.load_public({key: own[key] for key in bundle.predictor.state_dict()})
    bundle.target_encoder.load_state_dict(bundle.context_encoder.state_dict())
    for published, name in HEADS.items():
        keys = golden.names(f"init_{published}.")
        report.equal(f"(has {published})", bool(keys), name in bundle.heads)
        if keys:
            bundle.heads[name].load_state_dict(
                {key.removeprefix(f"init_{published}."): golden.tensor(key) for key in keys}
            )
    return phases.TrainState(bundle, phases.build_optimizer(bundle, cfg), cfg)


def _parameter_names(bundle: phases.ModelBundle) -> dict[str, nn.Parameter]:
    """Published name -> parameter."""
    modules = {
        "encoder": bundle.context_encoder,
        "predictor": bundle.predictor,
        "target_encoder": bundle.target_encoder,
    }
    modules |= {
        published: bundle.heads[name] for published, name in HEADS.items() if name in bundle.heads
    }
    return {
        f"{prefix}.{name}": value
        for prefix, module in modules.items()
        for name, value in module.named_parameters()
    }


def _batch(golden: Golden, number: int) -> Batch:
    masks = read_masks(golden, GOLDEN_GRID, f"step{number}_")
    return Batch(golden.tensor(f"step{number}_clip"), masks, step=number - 1)


def _first_step(golden: Golden, report: Report, state: phases.TrainState) -> None:
    """Phase by phase, so that the gradient of every intermediate tensor can be looked at."""
    bundle, cfg, batch = state.bundle, state.cfg, _batch(golden, 1)
    target, target_live = phases.target_features(bundle, batch, cfg)
    context_tokens = phases.context_features(bundle, batch, cfg)
    predicted, predicted_context = phases.predictions(bundle, context_tokens, batch, cfg)
    packed = {"z_enc": context_tokens, "z_pred": predicted, "z_context": predicted_context}
    for tensor in (*packed.values(), *([target] if target.requires_grad else [])):
        tensor.retain_grad()
    ctx = phases.objective_context(
        bundle,
        batch,
        cfg,
        Denominators.of(batch.masks),
        target,
        target_live,
        context_tokens,
        predicted,
        predicted_context,
    )
    loss, metrics = compute_all(
        ctx, cfg.variant.objectives, phases.objective_weights(cfg, batch.step)
    )
    _compare_terms(golden, report, 1, loss, metrics, 1e-5)
    kinked = _has_kinks(cfg.variant)
    loss.backward(retain_graph=kinked)

    for kind, rows in packed.items():
        parts = [golden.tensor(f"{kind}_{j}") for j in range(batch.masks.num_sets)]
        gradients = unpack(rows.grad, parts)
        for j, value in enumerate(unpack(rows, parts)):
            report.compare(f"{kind}_{j}", value, golden[f"{kind}_{j}"])
            report.equal(
                f"grad_is_none_{kind}_{j}",
                rows.grad is None,
                bool(golden[f"grad_is_none_{kind}_{j}"]),
            )
            _compare_gradient(golden, report, f"grad_{kind}_{j}", gradients[j], kinked)
    report.compare("h", target.view(golden["h"].shape), golden["h"])
    report.equal("(grad_h)", target.grad is not None, "grad_h" in golden)
    if "grad_h" in golden:
        _compare_gradient(
            golden, report, "grad_h", target.grad.view(golden["grad_h"].shape), kinked
        )
    if kinked:
        _replay_gradients(golden, bundle, target, packed)
    names = _parameter_names(bundle)
    for name, expected in zip(golden["grad_norm_names"], golden["grad_norms_step1"], strict=True):
        gradient = names[str(name)].grad
        report.compare(
            f"grad_norms_step1[{name}]",
            -1.0 if gradient is None else gradient.norm(),
            expected,
            NORM_TOLERANCE,
        )


def _replay_gradients(
    golden: Golden, bundle: phases.ModelBundle, target: Tensor, packed: dict[str, Tensor]
) -> None:
    """Parameter gradients from the file's own feature gradients, which have just been compared.

    A sign that fell the other way in one L1 residual would otherwise reach every weight below it,
    and the second step with them.
    """
    for parameter in bundle.parameters():
        parameter.grad = None
    sets = range(len(golden.names("grad_z_enc_")))
    wanted = {kind: pack([golden.tensor(f"grad_{kind}_{j}") for j in sets]) for kind in FEATURES}
    torch.autograd.backward(
        [packed["z_pred"], packed["z_context"]],
        [wanted["z_pred"], wanted["z_context"]],
        inputs=list(bundle.predictor.parameters()),
        retain_graph=True,
    )
    features, gradients = [packed["z_enc"]], [wanted["z_enc"]]
    if "grad_h" in golden:
        features.append(target)
        gradients.append(golden.tensor("grad_h").flatten(0, 1))
    torch.autograd.backward(features, gradients, inputs=list(bundle.context_encoder.parameters()))


def _has_kinks(cfg: VariantConfig) -> bool:
    kinematic = cfg.objectives.get("kinematic")
    return (
        any(name in cfg.objectives for name in KINKED) or getattr(kinematic, "kind", "") == "huber"
    )


def _compare_gradient(
    golden: Golden, report: Report, key: str, gradient: Tensor, kinked: bool
) -> None:
    report.compare_up_to_kinks(
        key,
        gradient,
        golden[key],
        GRADIENT_TOLERANCE,
        KINKS,
        KINK_LOOSE if kinked else GRADIENT_TOLERANCE,
    )


def _compare_terms(
    golden: Golden,
    report: Report,
    number: int,
    loss: Tensor,
    metrics: dict[str, Tensor],
    tolerance: float,
) -> None:
    report.compare(f"step{number}_loss", loss, golden[f"step{number}_loss"], tolerance)
    for name, published in TERMS.items():
        key = f"step{number}_term_{published}"
        report.equal(f"(has {key})", name in metrics, key in golden)
        if key in golden:
            report.compare(key, metrics[name], golden[key], tolerance)


class UndecidedMoves:
    """How far AdamW's steps may go astray on gradients that are right to within rounding.

    Its first move is lr * g / (|g| + 1e-8): +-lr whatever the size of g, so a gradient whose terms
    cancel moves its weight by an amount that only rounding decides. For every element this takes
    the moves at g +- noise, in both steps, and keeps the largest deviation. It is nothing next to
    the tolerance except where a gradient is no larger than its own rounding error.
    """

    def __init__(self, names: dict[str, nn.Parameter]) -> None:
        self.names = names
        self.gradients: list[dict[str, Tensor]] = []
        self.noise: list[float] = []

    def record(self, noise: float) -> None:
        """Keeps the gradients of the step that is about to be taken; `noise` is relative to their
        root mean square."""
        self.gradients.append(
            {
                name: value.grad.detach()
                for name, value in self.names.items()
                if value.grad is not None
            }
        )
        self.noise.append(noise)

    def deviation(self, name: str) -> Tensor:
        """Largest deviation of every element of a parameter, or of its moving average, after the
        steps so far."""
        if name.startswith("target_"):
            online = name.removeprefix("target_")
            share = 1.0 - ScheduleConfig().momentum
            return share * sum(
                self._after(online, steps) for steps in range(1, len(self.gradients) + 1)
            )
        return self._after(name, len(self.gradients))

    def _after(self, name: str, steps: int) -> Tensor:
        if any(name not in gradients for gradients in self.gradients[:steps]):
            return torch.zeros(())
        history = [gradients[name].double() for gradients in self.gradients[:steps]]
        noises = [
            noise * g.square().mean().sqrt() for noise, g in zip(self.noise, history, strict=False)
        ]
        total = torch.zeros_like(history[0])
        for step in range(1, steps + 1):
            centre = _adam_move(history[:step])
            worst = torch.zeros_like(centre)
            for signs in itertools.product((-1.0, 1.0), repeat=step):
                shifted = [
                    g + sign * noise for g, sign, noise in zip(history, signs, noises, strict=False)
                ]
                worst = torch.maximum(worst, (_adam_move(shifted) - centre).abs())
            total += RATES[step - 1] * worst
        return total


def _adam_move(gradients: list[Tensor]) -> Tensor:
    """AdamW's move in units of the rate after these gradients: beta .9, .999, eps 1e-8,
    bias-corrected."""
    first, second = torch.zeros_like(gradients[0]), torch.zeros_like(gradients[0])
    for g in gradients:
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g.square()
    steps = len(gradients)
    return first / (1.0 - 0.9**steps) / ((second / (1.0 - 0.999**steps)).sqrt() + 1e-8)


def _compare_parameters(
    golden: Golden, report: Report, state: phases.TrainState, moves: UndecidedMoves
) -> None:
    number = state.step
    norms, sums = golden[f"param_norm_after_step{number}"], golden[f"param_sum_after_step{number}"]
    for name, norm, total in zip((str(n) for n in golden["param_names"]), norms, sums, strict=True):
        value = moves.names[name].detach().double()
        length = max(float(norm), 1e-6)
        # A sum is a difference of large numbers: its error is measured against what n numbers of
        # this norm can add up to.
        scale = float(np.sqrt(value.numel())) * length
        for kind, error, tolerance, unit in (
            ("norm", abs(float(value.norm()) - float(norm)) / length, NORM_TOLERANCE, length),
            ("sum", abs(float(value.sum()) - float(total)) / scale, SUM_TOLERANCE, scale),
        ):
            key = f"param_{kind}_after_step{number}[{name}]"
            if error <= tolerance:
                report.add(key, error, tolerance)
                continue
            deviation = moves.deviation(name)
            undecided = float(deviation.norm() if kind == "norm" else deviation.sum()) / unit
            report.add(
                key, error, tolerance + undecided, f"{undecided:.1e} of it undecided by AdamW"
            )
