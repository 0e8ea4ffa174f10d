"""Signs of collapse, computed on the device and read once per log interval."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from jepa.batch import Batch
from jepa.step import ModelBundle, StepConfig, precision
from jepa.target import standardise


@dataclass(frozen=True)
class MonitorConfig:
    """What is looked at, and the thresholds below which a warning is logged."""

    clips: int = 4
    """Clips of a batch that are looked at."""
    min_rank: float = 4.0
    """Effective rank of the features below which a warning is logged."""
    min_std: float = 0.05
    """Standard deviation of a standardised feature below which a warning is logged."""


def effective_rank(features: Tensor) -> Tensor:
    """RankMe (Garrido et al., arXiv 2210.02885, eq. 1): exp of the entropy of the normalised
    singular values of [rows, D].

    NaN where a feature is not finite (the decomposition itself would raise).
    """
    finite = features.isfinite().all()
    values = torch.linalg.svdvals(
        torch.where(finite, features, torch.zeros_like(features)).double()
    )
    shares = values / values.sum().clamp(min=1e-12) + 1e-7
    rank = torch.exp(-(shares * shares.log()).sum()).float()
    return torch.where(finite, rank, torch.full_like(rank, torch.nan))


@torch.no_grad()
def collapse_metrics(
    bundle: ModelBundle, batch: Batch, cfg: StepConfig, monitor: MonitorConfig
) -> dict[str, Tensor]:
    """How spread out the evaluated encoder's features are, and how close teacher and student stay.
    Nothing is read back.

    Returns:
        feature_std and feature_std_min: standard deviation over tokens, mean and smallest over
        dimensions of the last level. effective_rank: RankMe of centred token features of the last
        level. teacher_student_cosine: mean cosine of all-level features (1 with an online target).
    """
    clips = batch.clips[: monitor.clips]
    with precision(clips.device, cfg):
        online = bundle.context_encoder(clips)
        evaluated = online if bundle.target_encoder is None else bundle.target_encoder(clips)
    online, evaluated = (
        standardise(f.flatten(0, 1), cfg.model.levels) for f in (online, evaluated)
    )
    last = evaluated[:, -cfg.model.width :]
    # A bounded number of rows: the decomposition costs rows * D^2.
    last = last[:: max(1, last.shape[0] // 1024)]
    std = last.std(0, correction=0)
    return {
        "feature_std": std.mean(),
        "feature_std_min": std.min(),
        "effective_rank": effective_rank(last - last.mean(0)),
        "teacher_student_cosine": functional.cosine_similarity(online, evaluated, dim=-1).mean(),
    }


def warnings(values: dict[str, float], monitor: MonitorConfig) -> list[str]:
    """Sentences about values below their thresholds."""
    found = []
    for name, least in (("effective_rank", monitor.min_rank), ("feature_std", monitor.min_std)):
        # Written so that NaN warns too.
        if not values.get(name, least) >= least:
            found.append(f"collapse: {name} is {values[name]:.3g}, below {least:.3g}")
    return found
