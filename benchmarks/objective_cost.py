"""What a variant's objectives cost, alone: forward and backward down to the features, paired with
the baseline's objectives.

The features are real outputs of the encoder and the predictor, detached, so nothing else of the
step runs. Heads and their optimiser step count as part of the objective. The difference of a pair
is what the objective adds to a step.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from benchmarks import harness
from benchmarks.memory import peak_memory
from benchmarks.workload import Group, Pretraining
from jepa import step as training
from jepa.batch import Batch
from jepa.objectives import Denominators, FeatureDims, build_heads, compute_all
from jepa.variants import VariantConfig
from jepa_kernels import use_backend

LEAST_OBJECTIVE_ROUNDS = 3  # whatever the budget: their differences are small beside their noise


@dataclass(frozen=True)
class ObjectiveCost:
    """Seconds and bytes above the baseline's objectives; the interval is that of the median
    difference. `busy`: other programs had the cores."""

    added_s: float
    interval_s: tuple[float, float]
    samples: int
    added_bytes: int | None
    busy: bool = False


def signature(config: VariantConfig) -> str:
    """Equal for variants whose objectives do the same work (weights and their schedules do not
    matter)."""
    parts = []
    for name, cfg in sorted(config.objectives.items()):
        values = {
            key: value for key, value in vars(cfg).items() if key not in ("weight", "schedule")
        }
        parts.append(f"{name}{sorted(values.items())}")
    return "|".join([*parts, str(config.factorisation)])


def is_baseline(config: VariantConfig) -> bool:
    return set(config.objectives) <= {"prediction", "context"}


def objectives_call(
    pretraining: Pretraining,
    group: Group,
    config: VariantConfig | None,
    batch: Batch,
    features: dict[str, torch.Tensor],
) -> Callable[[], None]:
    """A zero-argument call: objectives forward, backward to the features, and the heads' optimiser
    step."""
    cfg = pretraining.config(group, config)
    device = pretraining.workload.device
    dims = FeatureDims(cfg.model.feature_width, cfg.model.levels, cfg.variant.factorisation)
    heads = build_heads(cfg.variant.objectives, dims).to(device)
    parameters = list(heads.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True) if parameters else None
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in features.items()}
    online = group.target == "online"
    weight = {
        name: value or objective.weight
        for (name, value), objective in zip(
            training.objective_weights(cfg, batch.step).items(),
            cfg.variant.objectives.values(),
            strict=True,
        )
    }
    holder = SimpleNamespace(heads=heads)

    def call() -> None:
        live = leaves["target_live"] if online else leaves["target_live"].detach()
        ctx = training.objective_context(
            holder,
            batch,
            cfg,
            Denominators.of(batch.masks),
            live,
            live,
            leaves["context_tokens"],
            leaves["predicted"],
            leaves["predicted_context"],
        )
        loss, _ = compute_all(ctx, cfg.variant.objectives, weight)
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for leaf in leaves.values():
            leaf.grad = None

    return call


def measure(
    pretraining: Pretraining,
    group: Group,
    config: VariantConfig,
    batch: Batch,
    features: dict[str, torch.Tensor],
    *,
    backend: str,
    rounds: int,
    budget_s: float,
    memory: bool = True,
) -> ObjectiveCost:
    """The variant's objectives against the baseline's on the same features (A B B A)."""
    device = pretraining.workload.device
    with use_backend(backend):
        ours = objectives_call(pretraining, group, config, batch, features)
        plain = objectives_call(pretraining, group, None, batch, features)
        clock = pretraining.workload.clock
        settings = harness.Settings(
            rounds=rounds,
            min_rounds=min(LEAST_OBJECTIVE_ROUNDS, rounds),
            warmup=1,
            min_sample_s=0.0,
            budget_s=budget_s,
            clock=clock,
        )
        pair = harness.time_pair(ours, plain, settings, device)
        added: int | None = None
        if memory:
            peaks = []
            for call in (ours, plain):
                with peak_memory(device) as peak:
                    call()
                peaks.append(peak.added_bytes)
            if None not in peaks:
                added = max(0, peaks[0] - peaks[1])
    differences = pair.differences_s
    return ObjectiveCost(
        statistics.median(differences),
        harness.bootstrap_interval(differences),
        len(differences),
        added,
        pair.busy,
    )
