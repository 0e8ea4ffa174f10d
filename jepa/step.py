"""One training step, as functions that can be called one by one: no I/O, no globals, nothing read
back from the device.

target_features, context_features and predictions give what objective_context holds and the
objectives turn into a loss; then backward and update (clip, optimiser, EMA). `loss_step` and
`train_step` chain them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from jepa.batch import Batch
from jepa.config import parsed_by
from jepa.models.encoder import Encoder
from jepa.models.patches import is_image
from jepa.models.predictor import Predictor
from jepa.models.sizes import DEFAULT_SIZE, SIZES, ModelConfig, parse_model
from jepa.objectives import (
    Denominators,
    FeatureDims,
    ObjectiveContext,
    build_heads,
    compute_all,
    weights,
)
from jepa.schedules import ScheduleConfig, parameter_groups, set_rates
from jepa.target import frozen_copy, standardise, update_ema
from jepa.variants import VariantConfig, parse_variant
from jepa_kernels.nn import EMATeacher
from jepa_kernels.optim import AdamWEMA

LOSS_PHASES = ("target", "context", "predictor", "objective")
STEP_PHASES = (*LOSS_PHASES, "backward", "optimiser")
Mark = Callable[[str], object]


def unmarked(phase: str) -> None:
    """The mark of a step that nobody times."""


@dataclass(frozen=True)
class StepConfig:
    """Everything a step depends on besides the weights and the batch."""

    model: ModelConfig = field(
        default_factory=lambda: SIZES[DEFAULT_SIZE], metadata=parsed_by(parse_model)
    )
    """A size (micro, tiny, small, base, large, giant) or what differs from one."""
    variant: VariantConfig = field(default_factory=VariantConfig, metadata=parsed_by(parse_variant))
    """A named variant (`jepa variants` lists them), or `base` and what differs from it."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Length of training, rates and the momentum of the EMA target."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the networks under autocast to bfloat16; losses and weights stay float32."""
    loss_exponent: float = 1.0
    """r of |error|^r / r in the prediction and context losses."""
    clip_gradient: float | None = None
    """The norm that gradients are scaled down to; null: no limit."""
    optimizer: Literal["adamw_ema", "adamw"] = "adamw_ema"
    """adamw_ema moves weights and EMA in one pass over memory; adamw is torch's, then the EMA."""


class ModelBundle(nn.Module):
    """Context encoder, predictor, heads and, with an EMA, the target encoder. Calling it is
    `loss_step`, so that DDP can wrap it."""

    def __init__(self, model: ModelConfig, variant: VariantConfig) -> None:
        super().__init__()
        self.context_encoder = Encoder(model)
        behaviour = variant.published_behaviour
        self.predictor = Predictor(model, shared_mask_token=behaviour.shared_mask_token)
        dims = FeatureDims(model.feature_width, model.levels, variant.factorisation)
        self.heads = build_heads(variant.objectives, dims)
        # Without an EMA a target encoder would only be ballast, unless its initial weights are what
        # gets evaluated (published).
        keeps_target = variant.target.kind == "ema" or behaviour.evaluate_initial_target
        self.target_encoder = frozen_copy(self.context_encoder) if keeps_target else None

    @property
    def evaluation_encoder(self) -> Encoder:
        """What probes and `encode` use: the EMA, or without one the online encoder."""
        return self.context_encoder if self.target_encoder is None else self.target_encoder

    @property
    def averaged_encoder(self) -> Encoder:
        """The EMA of the context encoder.

        Raises:
            ValueError: the variant has none.
        """
        if self.target_encoder is None:
            raise ValueError("ModelBundle: target.kind must be 'ema' for an EMA encoder.")
        return self.target_encoder

    def trained(self) -> dict[str, nn.Module]:
        return {"context_encoder": self.context_encoder, "predictor": self.predictor}

    def forward(
        self,
        batch: Batch,
        cfg: StepConfig,
        denominators: Denominators | None = None,
        mark: Mark = unmarked,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        weight = objective_weights(cfg, batch.step)
        target, target_live = target_features(self, batch, cfg)
        mark("target")
        context_tokens = context_features(self, batch, cfg)
        mark("context")
        predicted, predicted_context = predictions(
            self, context_tokens, batch, cfg, predict_context=bool(weight.get("context"))
        )
        mark("predictor")
        ctx = objective_context(
            self,
            batch,
            cfg,
            denominators or Denominators.of(batch.masks),
            target,
            target_live,
            context_tokens,
            predicted,
            predicted_context,
        )
        loss, metrics = compute_all(ctx, cfg.variant.objectives, weight)
        mark("objective")
        return loss, metrics


def objective_weights(cfg: StepConfig, step: int) -> dict[str, float]:
    """The weight of every objective at a step (counted from 0)."""
    variant = cfg.variant
    return weights(variant.objectives, step, progress(cfg, step), variant.published_behaviour)


def progress(cfg: StepConfig, step: int) -> float:
    """The share of training done before step `step`, in [0, 1]."""
    return min(1.0, step / max(1, cfg.schedule.total_steps))


def target_features(bundle: ModelBundle, batch: Batch, cfg: StepConfig) -> tuple[Tensor, Tensor]:
    """Standardised target features of every token, [B*N, D], for the objectives and, before any
    detaching, for kinematic ones.

    With an EMA they carry no gradient. With an online target they do, unless `target.detach`.
    """
    if cfg.variant.target.kind == "ema":
        with torch.no_grad(), precision(batch.clips.device, cfg):
            raw: Tensor = bundle.averaged_encoder(batch.clips)
    else:
        with precision(batch.clips.device, cfg):
            raw = bundle.context_encoder(batch.clips)
    live = standardise(raw.flatten(0, 1), cfg.model.levels)
    return (live.detach() if cfg.variant.target.detach else live), live


def context_features(bundle: ModelBundle, batch: Batch, cfg: StepConfig) -> Tensor:
    """The context encoder on the visible tokens of every mask set and sample, one packed call: [Nc,
    D]."""
    with precision(batch.clips.device, cfg):
        tokens: Tensor = bundle.context_encoder(batch.clips, batch.masks)
    return tokens


def predictions(
    bundle: ModelBundle,
    context_tokens: Tensor,
    batch: Batch,
    cfg: StepConfig,
    predict_context: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The predictor at targets [Nt, D] and, if asked, at context tokens [Nc, D]."""
    with precision(batch.clips.device, cfg):
        predicted, predicted_context = bundle.predictor(
            context_tokens,
            batch.masks,
            image=is_image(batch.clips),
            predict_context=predict_context,
        )
    return predicted, predicted_context


def objective_context(
    bundle: ModelBundle,
    batch: Batch,
    cfg: StepConfig,
    denominators: Denominators,
    target: Tensor,
    target_live: Tensor,
    context_tokens: Tensor,
    predicted: Tensor,
    predicted_context: Tensor | None,
) -> ObjectiveContext:
    """What the objectives look at, in float32."""
    return ObjectiveContext(
        context_tokens=_wide(context_tokens),
        predicted_tokens=_wide(predicted),
        predicted_context=None if predicted_context is None else _wide(predicted_context),
        target=target,
        target_live=target_live,
        masks=batch.masks,
        denominators=denominators,
        levels=cfg.model.levels,
        factorisation=cfg.variant.factorisation,
        heads=bundle.heads,
        published_behaviour=cfg.variant.published_behaviour,
        clips=batch.clips,
        patch_size=cfg.model.patch_size,
        tubelet_size=cfg.model.tubelet_size,
        loss_exponent=cfg.loss_exponent,
        step=batch.step,
        progress=progress(cfg, batch.step),
    )


def loss_step(
    bundle: nn.Module,
    batch: Batch,
    cfg: StepConfig,
    denominators: Denominators | None = None,
    mark: Mark = unmarked,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one batch, with gradient, and the unweighted value of every objective.

    Args:
        bundle: a `ModelBundle`, or one in a wrapper such as DDP.
        batch: clips and masks.
        cfg: the step's configuration.
        denominators: global row counts where the batch is a part of a larger one; None when it is
            the whole.
        mark: called at the end of each phase of `LOSS_PHASES`.

    Returns:
        The loss (float32 scalar; this part's share of the global loss) and metrics (tensors without
        gradient).
    """
    loss, metrics = bundle(batch, cfg, denominators, mark)
    return loss, {"loss": loss.detach(), **metrics}


Reduce = Callable[[Tensor], Tensor]


@dataclass
class TrainState:
    """What a step changes: weights, optimiser moments, the step count. `reduce` sums a tensor over
    `ranks` processes."""

    bundle: ModelBundle
    optimizer: torch.optim.Optimizer
    cfg: StepConfig
    step: int = 0
    wrapped: nn.Module | None = None
    reduce: Reduce | None = None
    ranks: int = 1

    @property
    def module(self) -> nn.Module:
        return self.bundle if self.wrapped is None else self.wrapped


def new_state(cfg: StepConfig, device: torch.device | str = "cpu") -> TrainState:
    """Fresh weights and optimiser."""
    bundle = ModelBundle(cfg.model, cfg.variant).to(device)
    return TrainState(bundle, build_optimizer(bundle, cfg), cfg)


def build_optimizer(bundle: ModelBundle, cfg: StepConfig) -> torch.optim.Optimizer:
    """AdamW with the published groups; with an EMA target, `AdamWEMA` holds it as its teacher. Both
    skip a step by a flag on the device."""
    groups = parameter_groups(bundle.trained(), bundle.heads.values())
    schedule = cfg.schedule
    set_rates(groups, schedule.learning_rate(1), schedule.decay(1))
    rate, betas, eps = schedule.learning_rate(1), (0.9, 0.999), 1e-8
    if cfg.optimizer == "adamw":
        # The fused one: the others read their step counts back.
        return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=eps, fused=True)
    teacher = None
    if cfg.variant.target.kind == "ema":
        teacher = EMATeacher(
            bundle.context_encoder, schedule.ema_momentum(1), module=bundle.target_encoder
        )
    # Step counts have to be where the flag of a skipped step is.
    on_device = next(bundle.parameters()).device.type != "cpu"
    return AdamWEMA(groups, lr=rate, betas=betas, eps=eps, capturable=on_device, teacher=teacher)


def train_step(
    state: TrainState, batch: Batch | Sequence[Batch], mark: Mark = unmarked
) -> tuple[TrainState, dict[str, Tensor]]:
    """One optimiser step on a batch, or on micro-batches that make up one.

    `mark` is called with the name of each phase of `STEP_PHASES` when it ends, those of the loss
    once per micro-batch: what a profiler hangs its clock on.

    Returns:
        The same state, advanced, and the step's metrics: tensors on the device, summed over the
        micro-batches of this process.
    """
    batches = [batch] if isinstance(batch, Batch) else list(batch)
    denominators = global_denominators(batches, state.reduce, state.ranks)
    totals: dict[str, Tensor] = {}
    for part in batches:
        loss, metrics = loss_step(state.module, part, state.cfg, denominators, mark)
        backward(loss, state.ranks)
        mark("backward")
        for name, value in metrics.items():
            totals[name] = totals[name] + value if name in totals else value
    totals.update(update(state, totals["loss"]))
    mark("optimiser")
    return state, totals


def global_denominators(
    batches: Sequence[Batch], reduce: Reduce | None = None, ranks: int = 1
) -> Denominators:
    """Row counts over all micro-batches and, by one small all-reduce, all ranks."""
    counts = [Denominators.of(batch.masks).packed() for batch in batches]
    total = counts[0] if len(counts) == 1 else torch.stack(counts).sum(0)
    return Denominators.unpacked(
        total if reduce is None else reduce(total), parts=len(batches) * ranks
    )


def backward(loss: Tensor, ranks: int = 1) -> None:
    """Adds this part's gradients. Data-parallel wrappers average over ranks, but shares of a global
    mean are to be added up."""
    if loss.requires_grad:
        (loss * ranks if ranks > 1 else loss).backward()


def update(state: TrainState, loss: Tensor | None = None) -> dict[str, Tensor]:
    """Clips, steps the optimiser and then the EMA, clears the gradients, and counts the step.

    A gradient or loss that is not finite skips the update on the device: weights, moments and
    targets stay as they are. (A loss that is NaN may well have a finite gradient: that of |x| is 0
    there.)
    """
    schedule, step = state.cfg.schedule, state.step + 1
    set_rates(state.optimizer.param_groups, schedule.learning_rate(step), schedule.decay(step))
    norm = clip_gradients(state.optimizer, state.cfg.clip_gradient)
    skipped = torch.isfinite(norm).logical_not().to(torch.float32)
    if loss is not None:
        # This process's share of the loss; the norm is already that of all.
        bad = torch.isfinite(loss).logical_not().to(torch.float32)
        skipped = torch.maximum(
            skipped, (bad if state.reduce is None else state.reduce(bad)).clamp(max=1.0)
        )
    # The attributes are those by which a gradient scaler tells an optimiser to skip.
    optimizer: Any = state.optimizer
    optimizer.found_inf, optimizer.grad_scale = skipped, None
    teacher = optimizer.teacher if isinstance(optimizer, AdamWEMA) else None
    follows = state.cfg.variant.target.kind == "ema"
    if teacher is not None:
        teacher.momentum = schedule.ema_momentum(step)
    optimizer.step()
    if follows and teacher is None:
        momentum = torch.where(skipped > 0, torch.ones_like(skipped), schedule.ema_momentum(step))
        update_ema(state.bundle.averaged_encoder, state.bundle.context_encoder, momentum)
    optimizer.zero_grad(set_to_none=True)
    state.step = step
    return {"gradient_norm": norm, "skipped": skipped}


def clip_gradients(optimizer: torch.optim.Optimizer, limit: float | None) -> Tensor:
    """The norm of all gradients, which are scaled down to `limit` where they exceed it."""
    parameters = [
        p for group in optimizer.param_groups for p in group["params"] if p.grad is not None
    ]
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    if hasattr(norm, "full_tensor"):
        # Of sharded gradients (FSDP2): one number for all ranks.
        norm = norm.full_tensor()
    if limit is not None:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def _wide(features: Tensor) -> Tensor:
    return features if features.dtype == torch.float64 else features.to(torch.float32)


def precision(device: torch.device, cfg: StepConfig) -> AbstractContextManager[None]:
    """Autocast to bfloat16 where the configuration asks for it."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=cfg.precision == "bf16")
