"""Signs of collapse and of a plateau, computed on the device and read once per log interval, and
told in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

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
    max_of_mean: float = 0.95
    """Prediction loss, as a share of the mean feature's, above which little was learned."""
    patience: int = 10
    """Log intervals over which the loss has to fall by `min_fall`."""
    min_fall: float = 0.01
    """Share of itself that the loss has to fall by."""
    after: float = 0.2
    """Share of the run before which no plateau is spoken of."""


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
        mean_prediction: the prediction loss of the mean feature, whatever the context: |h - mean
            h|^r / r over tokens and channels.
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
        "mean_prediction": (evaluated - evaluated.mean(0)).abs().pow(cfg.loss_exponent).mean()
        / cfg.loss_exponent,
    }


def warnings(values: dict[str, float], monitor: MonitorConfig) -> list[str]:
    """Sentences about values below their thresholds."""
    found = []
    for name, least in (("effective_rank", monitor.min_rank), ("feature_std", monitor.min_std)):
        # Written so that NaN warns too.
        if not values.get(name, least) >= least:
            found.append(f"collapse: {name} is {values[name]:.3g}, below {least:.3g}")
    return found


@dataclass
class Watch:
    """Reads the log lines of a run and says, once each, when it has stopped getting anywhere."""

    monitor: MonitorConfig
    total_steps: int
    _losses: list[float] = field(default_factory=list)
    _highest_rank: float = 0.0
    _said: set[str] = field(default_factory=set)

    def sentences(self, line: Mapping[str, float]) -> list[str]:
        """What is new at a log line: halved rank, a prediction no better than the mean feature, a
        loss that no longer falls. `line` has step, prediction and the collapse metrics."""
        found: dict[str, str] = {}
        rank = line["effective_rank"]
        self._highest_rank = max(self._highest_rank, rank)
        if rank < self._highest_rank / 2:
            found["rank"] = (
                f"the effective rank of the features has fallen from {self._highest_rank:.1f} to "
                f"{rank:.1f}: they are losing directions"
            )
        # A variant may have no prediction loss.
        if line["step"] >= self.monitor.after * self.total_steps and "prediction" in line:
            share = line["prediction"] / max(line["mean_prediction"], 1e-12)
            if share > self.monitor.max_of_mean:
                found["mean"] = (
                    f"the prediction loss {line['prediction']:.3g} is {100 * share:.0f} % of what "
                    f"predicting the mean feature costs ({line['mean_prediction']:.3g}): it "
                    "knows little more of the context than that"
                )
            self._losses.append(line["prediction"])
            patience = self.monitor.patience
            if len(self._losses) > patience:
                before = min(self._losses[:-patience])
                best = min(self._losses[-patience:])
                if best > before * (1 - self.monitor.min_fall):
                    found["plateau"] = (
                        "plateau: the prediction loss has not fallen by "
                        f"{100 * self.monitor.min_fall:.0f} % in {patience} log intervals (best "
                        f"{best:.3g}, before {before:.3g}). The targets move too, so this is a "
                        f"sign only with a rank that falls (now {rank:.1f}) or a "
                        f"teacher-student cosine near 1 (now {line['teacher_student_cosine']:.3f})"
                    )
        new = [sentence for name, sentence in found.items() if name not in self._said]
        self._said |= found.keys()
        return new
