"""Golden steps: two real training steps of every variant, from the published initial weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from jepa import step as phases
from jepa.batch import Batch
from jepa.conformance.golden import Golden
from jepa.conformance.masks import pack, read_masks, unpack
from jepa.conformance.modules import GOLDEN_GRID, golden_model
from jepa.conformance.objectives import HEADS, TERMS
from jepa.conformance.report import GRADIENT_TOLERANCE, Report
from jepa.objectives import Denominators, WeightSchedule, compute_all
from jepa.schedules import ScheduleConfig
from jepa.variants import VARIANTS, VariantConfig, variant

# What the published list of gradient norms has for a parameter without a gradient.
NO_GRADIENT = -1.0


def check(golden: Golden, report: Report) -> None:
    """Compares one file of steps/ with the variant of its name, published behaviour on."""
    if golden.name == "init_state":
        _check_initial_state(golden, report)
        return
    if golden.name not in VARIANTS:
        report.miss("(file)", f"unknown file: no variant is named {golden.name!r}")
        return
    state = _initial_state(golden, report)
    names = _parameter_names(state.bundle)
    report.equal("param_names", sorted(names), sorted(str(name) for name in golden["param_names"]))
    _first_step(golden, report, state, names)
    phases.update(state)
    _compare_parameters(golden, report, state, names)
    loss, metrics = phases.loss_step(state.bundle, _batch(golden, 2), state.cfg)
    _compare_terms(golden, report, 2, loss, metrics)
    phases.backward(loss)
    phases.update(state)
    _compare_parameters(golden, report, state, names)


def _check_initial_state(golden: Golden, report: Report) -> None:
    """The weights every file starts from: our modules take all of them under their public names."""
    model = golden_model(*_widths(golden), mask_tokens=len(golden.names("predictor.mask_tokens.")))
    bundle = phases.ModelBundle(model, variant("baseline")).to(golden.dtype)
    for name, module in (("encoder", bundle.context_encoder), ("predictor", bundle.predictor)):
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
    """The variant with all published behaviour, and the context loss at its final weight: the
    golden runs have no ramp."""
    cfg = variant(name, published_behaviour="all")
    behaviour = dataclasses.replace(cfg.published_behaviour, context_ramp_fixed_steps=False)
    context = dataclasses.replace(cfg.objectives["context"], schedule=WeightSchedule())
    return dataclasses.replace(
        cfg, published_behaviour=behaviour, objectives={**cfg.objectives, "context": context}
    )


def _initial_state(golden: Golden, report: Report) -> phases.TrainState:
    initial = golden.beside("init_state")
    names = [str(name) for name in golden["param_names"]]
    tokens = sum(name.startswith("predictor.mask_tokens.") for name in names)
    cfg = phases.StepConfig(
        model=golden_model(*_widths(initial), mask_tokens=tokens),
        variant=_configuration(golden.name),
        # Far longer than two steps: the published epoch is 0 in both, so nothing is annealed yet.
        schedule=ScheduleConfig(total_steps=10**12, warmup_steps=2),
    )
    bundle = phases.ModelBundle(cfg.model, cfg.variant).to(golden.dtype)
    bundle.context_encoder.load_public(
        {key.removeprefix("encoder."): initial.tensor(key) for key in initial.names("encoder.")}
    )
    own = {
        key.removeprefix("predictor."): initial.tensor(key) for key in initial.names("predictor.")
    }
    for key, value in bundle.predictor.state_dict().items():
        own.setdefault(key, torch.zeros_like(value))
    bundle.predictor.load_public({key: own[key] for key in bundle.predictor.state_dict()})
    assert bundle.target_encoder is not None  # every published configuration keeps one
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
    assert bundle.target_encoder is not None  # every published configuration keeps one
    modules: dict[str, nn.Module] = {
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


def _first_step(
    golden: Golden,
    report: Report,
    state: phases.TrainState,
    names: dict[str, nn.Parameter],
) -> None:
    """Phase by phase, so that the gradient of every intermediate tensor can be looked at."""
    bundle, cfg, batch = state.bundle, state.cfg, _batch(golden, 1)
    target, target_live = phases.target_features(bundle, batch, cfg)
    context_tokens = phases.context_features(bundle, batch, cfg)
    predicted, predicted_context = phases.predictions(bundle, context_tokens, batch, cfg)
    assert predicted_context is not None  # asked for by default
    packed = {"z_enc": context_tokens, "z_pred": predicted, "z_context": predicted_context}
    for kind, rows in packed.items():
        parts = [f"{kind}_{j}" for j in range(batch.masks.num_sets)]
        for name, value in zip(parts, unpack(rows, _shapes(golden, parts)), strict=True):
            report.compare(name, value, golden[name])
        rows.register_hook(_gradient_check(golden, report, parts))
    report.compare("h", target.view(golden["h"].shape), golden["h"])
    report.equal("(grad_h)", target.requires_grad, "grad_h" in golden)
    if "grad_h" in golden:
        target.register_hook(_gradient_check(golden, report, ["h"]))
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
    _compare_terms(golden, report, 1, loss, metrics)
    loss.backward()
    for name, expected in zip(golden["grad_norm_names"], golden["grad_norms_step1"], strict=True):
        key, gradient = f"grad_norms_step1[{name}]", names[str(name)].grad
        if gradient is None:
            report.compare(key, NO_GRADIENT, expected)
        else:
            report.compare_norm(key, gradient, float(expected))


def _gradient_check(golden: Golden, report: Report, parts: list[str]) -> Callable[[Tensor], Tensor]:
    """A hook that compares the gradient of packed features with the file's, part by part, and
    passes the file's on.

    So every stretch of the backward pass is compared from the same start: a sign that falls the
    other way in one L1 residual would otherwise reach every weight below and, through AdamW, the
    second step.
    """
    for name in parts:
        absent = f"grad_is_none_{name}"
        if absent in golden:
            report.equal(absent, False, bool(golden[absent]))

    def passed_on(gradient: Tensor) -> Tensor:
        own = unpack(gradient, _shapes(golden, parts))
        for name, part in zip(parts, own, strict=True):
            report.compare(f"grad_{name}", part, golden[f"grad_{name}"], GRADIENT_TOLERANCE)
        return pack([golden.tensor(f"grad_{name}") for name in parts])

    return passed_on


def _shapes(golden: Golden, names: list[str]) -> list[tuple[int, ...]]:
    return [golden[name].shape for name in names]


def _compare_terms(
    golden: Golden, report: Report, number: int, loss: Tensor, metrics: dict[str, Tensor]
) -> None:
    report.compare(f"step{number}_loss", loss, golden[f"step{number}_loss"])
    for name, published in TERMS.items():
        key = f"step{number}_term_{published}"
        report.equal(f"(has {key})", name in metrics, key in golden)
        if key in golden:
            report.compare(key, metrics[name], golden[key])


def _compare_parameters(
    golden: Golden, report: Report, state: phases.TrainState, names: dict[str, nn.Parameter]
) -> None:
    number = state.step
    norms, sums = golden[f"param_norm_after_step{number}"], golden[f"param_sum_after_step{number}"]
    for name, norm, total in zip(golden["param_names"], norms, sums, strict=True):
        value = names[str(name)]
        report.compare_norm(f"param_norm_after_step{number}[{name}]", value, float(norm))
        report.compare_sum(
            f"param_sum_after_step{number}[{name}]", value, float(total), float(norm)
        )
