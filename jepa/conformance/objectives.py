"""Golden objectives: the loss section on fixed features: every term, the total, every gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from jepa.conformance.golden import Golden
from jepa.conformance.masks import pack, read_masks
from jepa.conformance.report import Report
from jepa.objectives import (
    Denominators,
    FeatureDims,
    Objective,
    ObjectiveConfig,
    ObjectiveContext,
    action,
    build_heads,
    compute_all,
    context,
    get,
    kinematic,
    sigreg,
    weights,
)
from jepa.published_behaviour import PublishedBehaviour
from jepa.target import standardise
from jepa.variants import VARIANTS, VariantConfig, variant

# Our objective -> the published name of its term.
TERMS = {
    "prediction": "loss_pred",
    "context": "loss_context",
    "hard_region": "hw_loss",
    "delta": "delta_loss",
    "static": "fwm_static_loss",
    "orthogonality": "fwm_orth_loss",
    "latent_dynamics": "ld_loss",
    "spectral": "spectral_loss",
    "ltc": "ltc_loss",
    "action": "ac_loss",
    "kinematic": "kinematic_loss",
    "velgate": "velgate_loss",
    "hamiltonian": "hamiltonian_loss",
    "sigreg": "sigreg_loss",
}
HEADS = {"dyn_head": "latent_dynamics", "action_head": "action", "hamiltonian_net": "hamiltonian"}
_COEFFICIENTS = {
    "hw": "hard_region",
    "fwm_static": "static",
    "fwm_orth": "orthogonality",
    "delta": "delta",
    "ld": "latent_dynamics",
    "spectral": "spectral",
    "ltc": "ltc",
    "ac": "action",
    "kinematic": "kinematic",
    "hamiltonian": "hamiltonian",
    "velgate": "velgate",
    "sigreg": "sigreg",
}
_OPTIONS = {
    "hw_temp": ("hard_region", "temperature"),
    "ld_hidden_dim": ("latent_dynamics", "hidden"),
    "ltc_margin": ("ltc", "margin"),
    "ac_hidden_dim": ("action", "hidden"),
    "kinematic_split_ratio": ("kinematic", "channel_share"),
    "hamiltonian_dt": ("hamiltonian", "time_step"),
    "velgate_percentile": ("velgate", "percentile"),
}
_KINDS = {"velocity": "l1", "huber": "huber", "acceleration": "acceleration"}


def check(golden: Golden, report: Report) -> None:
    """Compares one file of objectives/ with the variant of its name, published behaviour on."""
    if golden.name not in VARIANTS:
        report.miss("(file)", f"unknown file: no variant is named {golden.name!r}")
        return
    cfg = variant(golden.name, published_behaviour="all")
    _check_configuration(golden, report, cfg)
    loss, features, heads = _losses(golden, report, cfg)
    report.compare("loss", loss, golden["loss"])
    for name, feature in features.items():
        report.gradient(golden, name, feature.grad)
    for name, parameter in heads.items():
        report.gradient(golden, name, parameter.grad)
    if "loss_f64" in golden:
        wide, _, _ = _losses(golden.widened(), Report(), cfg)
        report.compare("loss_f64", wide, golden["loss_f64"])


def _check_configuration(golden: Golden, report: Report, cfg: VariantConfig) -> None:
    """The variant of our table must be the published configuration of that name."""
    objectives = cfg.objectives
    for published, name in _COEFFICIENTS.items():
        report.compare(
            f"cfg_{published}_coeff",
            objectives[name].weight if name in objectives else 0.0,
            golden[f"cfg_{published}_coeff"],
        )
    for published, (name, option) in _OPTIONS.items():
        own = objectives.get(name, get(name).Config())
        report.compare(f"cfg_{published}", float(getattr(own, option)), golden[f"cfg_{published}"])
    smoothness = objectives.get("kinematic", kinematic.Config())
    assert isinstance(smoothness, kinematic.Config)
    seen = objectives["context"]
    assert isinstance(seen, context.Config)
    report.equal("cfg_kinematic_type", _KINDS[smoothness.kind], str(golden["cfg_kinematic_type"]))
    report.equal(
        "cfg_kinematic_anneal",
        smoothness.schedule.kind == "cosine",
        bool(golden["cfg_kinematic_anneal"]),
    )
    report.equal("cfg_disable_ema", cfg.target.kind == "online", bool(golden["cfg_disable_ema"]))
    report.equal(
        "cfg_weight_distance_loss",
        seen.weight_by_distance,
        bool(golden["cfg_weight_distance_loss"]),
    )
    report.compare(
        "cfg_fwm_app_ratio", cfg.factorisation.appearance_share, golden["cfg_fwm_app_ratio"]
    )
    report.compare("cfg_lambda_value", seen.weight, golden["cfg_lambda_value"])
    report.equal("cfg_ac_target_dim", action.COLOURS, golden.integer("cfg_ac_target_dim"))
    report.equal("cfg_loss_exp", 1.0, golden.number("cfg_loss_exp"))
    if "cfg_current_kinematic_coeff" in golden:
        weight = forced_weights(objectives, _progress(golden), cfg.published_behaviour)["kinematic"]
        report.compare("cfg_current_kinematic_coeff", weight, golden["cfg_current_kinematic_coeff"])
    # Facts about how the file was made that need no comparison of their own.
    golden.integer("mask_seed")
    if "clip" in golden:
        report.equal("clip_shape", list(golden["clip"].shape), list(golden["clip_shape"]))
    else:
        report.equal("clip_shape", len(golden["clip_shape"]), 5)


def _progress(golden: Golden) -> float:
    return golden.integer("cfg_epoch") / golden.integer("cfg_num_epochs")


def forced_weights(
    objectives: Mapping[str, ObjectiveConfig], progress: float, behaviour: PublishedBehaviour
) -> dict[str, float]:
    """The weights in force, with the context loss at its final weight: the golden runs have no
    ramp."""
    return {**weights(objectives, 0, progress, behaviour), "context": objectives["context"].weight}


def _losses(
    golden: Golden, report: Report, cfg: VariantConfig
) -> tuple[Tensor, dict[str, Tensor], dict[str, nn.Parameter]]:
    masks = read_masks(golden, golden.triple("grid"))
    masks = dataclasses.replace(masks, context_distance=masks.context_distance.to(golden.dtype))
    sets = range(masks.num_sets)
    levels = golden.integer("levels")
    online = cfg.target.kind == "online"
    features = {
        f"{kind}_{j}": golden.tensor(f"{kind}_{j}").requires_grad_()
        for kind in ("z_enc", "z_pred", "z_context")
        for j in sets
    }
    raw = golden.tensor("h_raw").requires_grad_(online)
    target = standardise(raw.flatten(0, 1), levels)
    if online:
        features |= {"h_raw": raw, "h": target}
    report.compare("h", target.view(raw.shape), golden["h"])
    report.equal("embed_dim", raw.shape[-1] // levels, golden.integer("embed_dim"))
    for j in sets:
        report.compare(
            f"mask_distance_{j}",
            _set_rows(masks.context_distance, masks.context_set, j),
            golden[f"mask_distance_{j}"].ravel(),
        )
    heads, parameters = _read_heads(golden, cfg, raw.shape[-1], levels)
    ctx = ObjectiveContext(
        context_tokens=pack([features[f"z_enc_{j}"] for j in sets]),
        predicted_tokens=pack([features[f"z_pred_{j}"] for j in sets]),
        predicted_context=pack([features[f"z_context_{j}"] for j in sets]),
        target=target,
        target_live=target,
        masks=masks,
        denominators=Denominators.of(masks),
        levels=levels,
        factorisation=cfg.factorisation,
        heads=heads,
        published_behaviour=cfg.published_behaviour,
        clips=golden.tensor("clip") if "action" in cfg.objectives else None,
        patch_size=golden.integer("patch_size"),
        tubelet_size=golden.integer("tubelet_size"),
    )
    weight = forced_weights(cfg.objectives, _progress(golden), cfg.published_behaviour)
    for name, objective in cfg.objectives.items():
        term: Objective = get(name).compute(ctx, objective)
        published = TERMS[name]
        report.compare(f"term_{published}", term.loss, golden[f"term_{published}"])
        report.equal(
            f"term_has_grad_{published}",
            term.loss.requires_grad,
            bool(golden[f"term_has_grad_{published}"]),
        )
    if "sigreg" in cfg.objectives:
        _check_projection(golden, report, cfg, ctx)
    _compare_auxiliary(golden, report, cfg, ctx, weight, features)
    loss, _ = compute_all(ctx, cfg.objectives, weight)
    if online:
        # Only now: a retained gradient also collects what torch.autograd.grad sends through.
        target.retain_grad()
    loss.backward()
    if online:
        features["h"] = _with_gradient(target, raw.shape)
    return loss, features, parameters


def _set_rows(values: Tensor, row_set: Tensor, j: int) -> Tensor:
    return values[row_set == j]


def _with_gradient(target: Tensor, shape: torch.Size) -> Tensor:
    """The target in the file's shape, its gradient with it."""
    shaped = target.detach().view(shape)
    shaped.grad = None if target.grad is None else target.grad.view(shape)
    return shaped


def _compare_auxiliary(
    golden: Golden,
    report: Report,
    cfg: VariantConfig,
    ctx: ObjectiveContext,
    weight: Mapping[str, float],
    features: Mapping[str, Tensor],
) -> None:
    """Gradients of what is added to the base loss, where the file has them."""
    wanted = [key for key in golden.names("aux_grad_")]
    if not wanted:
        return
    extra = {
        name: objective
        for name, objective in cfg.objectives.items()
        if name not in ("prediction", "context")
    }
    loss, _ = compute_all(ctx, extra, weight)
    tensors = [features[key.removeprefix("aux_grad_")] for key in wanted]
    for key, gradient in zip(
        wanted, torch.autograd.grad(loss, tensors, retain_graph=True), strict=True
    ):
        report.compare(key, gradient.view(golden[key].shape), golden[key])


def _check_projection(
    golden: Golden, report: Report, cfg: VariantConfig, ctx: ObjectiveContext
) -> None:
    """The random directions and the quadrature of SIGReg."""
    own = cfg.objectives["sigreg"]
    assert isinstance(own, sigreg.Config)
    report.compare(
        "sigreg_A",
        sigreg.projection(ctx.context_tokens.float(), own.slices, own.seed + ctx.step),
        golden["sigreg_A"],
    )
    time = torch.linspace(0.0, own.largest_point, own.points)
    normal = torch.exp(-0.5 * time.square())
    step = own.largest_point / (own.points - 1)
    weight = normal * torch.tensor([step, *[2 * step] * (own.points - 2), step])
    for key, value in {"sigreg_t": time, "sigreg_phi": normal, "sigreg_weights": weight}.items():
        report.compare(key, value, golden[key])


def _read_heads(
    golden: Golden, cfg: VariantConfig, width: int, levels: int
) -> tuple[nn.ModuleDict, dict[str, nn.Parameter]]:
    heads = build_heads(cfg.objectives, FeatureDims(width, levels, cfg.factorisation))
    heads.to(golden.dtype)
    parameters: dict[str, nn.Parameter] = {}
    for published, name in HEADS.items():
        keys = golden.names(f"param_{published}.")
        if not keys:
            continue
        state = {key.removeprefix(f"param_{published}."): golden.tensor(key) for key in keys}
        heads[name].load_state_dict(state)
        parameters |= {f"{published}.{key}": value for key, value in heads[name].named_parameters()}
    return heads, parameters
