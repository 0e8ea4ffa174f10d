"""What every objective shares: its inputs (`ObjectiveContext`), its result (`Objective`), and the
one way to take a mean."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

import jepa_kernels
from jepa.batch import MaskBatch
from jepa.published_behaviour import PublishedBehaviour
from jepa_kernels.ops import collective
from jepa_kernels.ops.latent_rollout.cells import Cell


@dataclass(frozen=True)
class WeightSchedule:
    """How a weight changes over training, as a factor of progress in [0, 1]: 1; 0 up to `begin`,
    then linear to 1 at `end`; or 0.5 (1 + cos(pi * progress))."""

    kind: Literal["constant", "ramp", "cosine"] = "constant"
    """constant: 1. ramp: 0 to 1, linear from `begin` to `end`. cosine: 1 to 0."""
    begin: float = 0.0
    """Share of training at which a ramp begins."""
    end: float = 1.0
    """Share of training at which a ramp is done."""

    def factor(self, progress: float) -> float:
        if self.kind == "constant":
            return 1.0
        if self.kind == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        if self.end <= self.begin:
            return float(progress >= self.begin)
        return min(1.0, max(0.0, (progress - self.begin) / (self.end - self.begin)))


@dataclass(frozen=True)
class ObjectiveConfig:
    """The part of every objective's `Config`: its weight in the sum (0 skips the work), and what
    the step has to know of it beforehand. An objective overrides what is different for it."""

    weight: float = 1.0
    """Its factor in the loss; 0 skips the work."""
    schedule: WeightSchedule = field(default_factory=WeightSchedule)
    """How the weight changes over training."""

    @property
    def minimum_frames(self) -> int:
        """Time steps of the token grid below which the objective is skipped."""
        return 1

    @property
    def pair_horizon(self) -> int:
        """K: how many time steps ahead it looks, so that pairs of context tokens span them."""
        return 1

    def build_head(self, dims: FeatureDims) -> nn.Module | None:
        """Its own parameters, found in `ctx.heads[<name>]`; None where it has none."""
        return None


@dataclass(frozen=True)
class Objective:
    """A loss (a scalar that carries gradient) and its metrics (scalars that do not); nothing here
    is read back to the host.

    Both are shares of the global batch: summed over micro-batches and ranks they are the value for
    all of it.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Factorisation:
    """Which channels of the [.., L*E] features hold appearance; the rest hold dynamics. The
    published split is by levels, that is the shallow ones."""

    split: Literal["levels", "channels"] = "levels"
    """levels: the first levels hold appearance; channels: a share of each level."""
    appearance_share: float = 0.5
    """Share of the channels that hold appearance."""

    def appearance_width(self, width: int, levels: int) -> int:
        if self.split == "levels":
            return max(1, math.floor(width * self.appearance_share))
        return levels * max(1, math.floor(width // levels * self.appearance_share))

    def dynamics_ranges(self, width: int, levels: int) -> list[tuple[int, int]]:
        """The dynamics channels as (start, stop): one range, or one for each level."""
        share = self.appearance_width(width, levels)
        if self.split == "levels":
            return [(share, width)]
        part = width // levels
        return [(level * part + share // levels, (level + 1) * part) for level in range(levels)]

    def appearance(self, features: Tensor, levels: int) -> Tensor:
        return self._part(features, levels, first=True)

    def dynamics(self, features: Tensor, levels: int) -> Tensor:
        return self._part(features, levels, first=False)

    def _part(self, features: Tensor, levels: int, first: bool) -> Tensor:
        share = self.appearance_width(features.shape[-1], levels)
        if self.split == "levels":
            return features[..., :share] if first else features[..., share:]
        by_level = features.unflatten(-1, (levels, -1))
        share //= levels
        part: Tensor = by_level[..., :share] if first else by_level[..., share:]
        return part.flatten(-2)


@dataclass(frozen=True)
class FeatureDims:
    """Sizes from which an objective builds its head."""

    width: int  # D = levels * width of a level
    levels: int
    factorisation: Factorisation

    @property
    def dynamics_width(self) -> int:
        return self.width - self.factorisation.appearance_width(self.width, self.levels)


@dataclass(frozen=True)
class Denominators:
    """Global numbers of rows per mask set: over all ranks and all micro-batches of one optimiser
    step.

    A loss is this part's share of the global mean, so shares add up to the loss of the undivided
    batch; what is computed per part (orthogonality, SIGReg) is divided by `parts` instead.
    """

    context: Tensor  # float32 [J]
    target: Tensor  # float32 [J]
    pair: Tensor  # float32 [J]
    column: Tensor  # float32 [J]
    samples: Tensor  # float32 scalar
    parts: int = 1

    @classmethod
    def of(cls, masks: MaskBatch) -> Denominators:
        """Those of an undivided batch."""
        samples = torch.full((), float(masks.batch_size), device=masks.context_count.device)
        return cls(
            masks.context_count, masks.target_count, masks.pair_count, masks.column_count, samples
        )

    def packed(self) -> Tensor:
        """float32 [4J+1]: what one all-reduce has to sum."""
        return torch.cat(
            [self.context, self.target, self.pair, self.column, self.samples.reshape(1)]
        )

    @classmethod
    def unpacked(cls, vector: Tensor, parts: int) -> Denominators:
        context, target, pair, column = vector[:-1].chunk(4)
        return cls(context, target, pair, column, vector[-1], parts)


@dataclass(frozen=True)
class ObjectiveContext:
    """Everything an objective may look at. Features are float32 ``[rows, D]``, D = L*E: L levels of
    E channels side by side.

    Attributes:
        context_tokens: Z, the context encoder's features of the visible tokens, ``[Nc, D]``, in the
            order of `masks.context_ids`. Carries gradient.
        predicted_tokens: the predictor's output at the hidden tokens, ``[Nt, D]``, in the order of
            `masks.target_ids`. Carries gradient.
        predicted_context: the predictor's output at the visible tokens, ``[Nc, D]``; None where the
            context loss has weight 0.
        target: h, the target encoder's standardised features of every token, ``[B*N, D]``; row
            ``b*N + id``. Carries no gradient with an EMA target.
        target_live: the same before any detaching; differs from `target` only with an online
            target.
        masks: which tokens are visible, which are hidden, and which visible ones share a site over
            time (a `MaskBatch`).
        denominators: rows of every mask set over the whole batch, all ranks and micro-batches
            included; what the means divide by.
        levels: L, the number of encoder levels in a feature.
        factorisation: which channels hold appearance and which dynamics.
        heads: the objectives' own modules by objective name.
        published_behaviour: the published defects that are switched on.
        clips: the normalised clips ``[B, 3, frames, H, W]``; None where only features are given.
        patch_size: side of a patch in pixels.
        tubelet_size: frames of a token.
        loss_exponent: r of ``|prediction - target|^r / r``.
        step: the optimiser step, counted from 0.
        progress: the share of training done, from 0 to 1.
    """

    context_tokens: Tensor
    predicted_tokens: Tensor
    predicted_context: Tensor | None
    target: Tensor
    target_live: Tensor
    masks: MaskBatch
    denominators: Denominators
    levels: int
    factorisation: Factorisation = field(default_factory=Factorisation)
    heads: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    published_behaviour: PublishedBehaviour = field(default_factory=PublishedBehaviour)
    clips: Tensor | None = None
    patch_size: int = 16
    tubelet_size: int = 2
    loss_exponent: float = 1.0
    step: int = 0
    progress: float = 0.0

    def __post_init__(self) -> None:
        masks, width = self.masks, self.context_tokens.shape[-1]
        expected = {
            "context_tokens": (masks.context_ids.shape[0], width),
            "predicted_tokens": (masks.target_ids.shape[0], width),
            "predicted_context": (masks.context_ids.shape[0], width),
            "target": (masks.batch_size * masks.num_tokens, width),
            "target_live": (masks.batch_size * masks.num_tokens, width),
        }
        for name, shape in expected.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(
                    f"ObjectiveContext: {name} must have shape {list(shape)}, got "
                    f"{list(value.shape)}."
                )
        if width % self.levels:
            raise ValueError(
                f"ObjectiveContext: levels must divide the feature width {width}, got "
                f"{self.levels}."
            )

    @property
    def grid(self) -> tuple[int, int, int]:
        """(T, H, W) in tokens."""
        return self.masks.grid

    @property
    def pairs(self) -> Tensor:
        """`masks.pairs`, ``[P, K+1]``."""
        return self.masks.pairs

    @property
    def columns(self) -> Tensor:
        """`masks.columns`, ``[C, T]``."""
        return self.masks.columns

    @cached_property
    def target_tokens(self) -> Tensor:
        """Target features at the target ids, [Nt, D]."""
        return self.target.index_select(0, self.masks.target_rows)

    @cached_property
    def target_context(self) -> Tensor:
        """Target features at the context ids, [Nc, D]."""
        return self.target.index_select(0, self.masks.context_rows)

    @cached_property
    def prediction_residual(self) -> Tensor:
        """Mean over channels of |prediction - target|^r / r, [Nt]: shared by the prediction loss
        and hard-region weighting."""
        return self.power(self.predicted_tokens - self.target_tokens).mean(-1)

    @cached_property
    def pair_steps(self) -> tuple[Tensor, Tensor]:
        """`masks.pairs` and `masks.pair_rows` with time first, [K+1, P] each: the rows of one time
        step lie together."""
        return self.masks.pairs.t().contiguous(), self.masks.pair_rows.t().contiguous()

    @cached_property
    def pair_tokens(self) -> tuple[Tensor, Tensor]:
        """Context features at t and t+1 of every pair, [P, D] each."""
        pairs, _ = self.pair_steps
        return self.context_tokens.index_select(0, pairs[0]), self.context_tokens.index_select(
            0, pairs[1]
        )

    @cached_property
    def pair_targets(self) -> tuple[Tensor, Tensor]:
        """Target features at t and t+1 of every pair, [P, D] each."""
        _, rows = self.pair_steps
        return self.target.index_select(0, rows[0]), self.target.index_select(0, rows[1])

    @cached_property
    def pair_target_change(self) -> Tensor:
        """h(t+1) - h(t) of every pair, [P, D]."""
        before, after = self.pair_targets
        return after - before

    def rollout_errors(
        self, name: str, cell: Cell, horizon: int, *, anchored: bool, exponent: float = 1.0
    ) -> Tensor:
        """[horizon, P]: how far the states that `cell` rolls out from Z(t) are from h(t+k), for k =
        1..horizon and every pair.

        With `anchored` the moves are compared instead of the states: h(t) + (z_k - Z(t)) against
        h(t+k).
        """
        pairs, rows = self.pair_steps
        if horizon > self.masks.horizon:
            raise ValueError(
                f"{name}: horizon must be at most that of the mask pairs ({self.masks.horizon}), "
                f"got {horizon}."
            )
        return jepa_kernels.latent_rollout_loss(
            self.context_tokens,
            cell,
            self.target,
            rows=pairs[0],
            target_rows=rows[1 : horizon + 1],
            anchor=self.target if anchored else None,
            anchor_rows=rows[0] if anchored else None,
            exponent=exponent,
            reduction="none",
        )

    def step_metrics(self, errors: Tensor) -> dict[str, Tensor]:
        """The mean error of every step of a rollout [horizon, P] as metrics ``step_<k>``; none for
        a single step, which is the loss."""
        if errors.shape[0] == 1:
            return {}
        return {
            f"step_{k}": self.pair_mean(error) for k, error in enumerate(errors.detach(), start=1)
        }

    def power(self, residual: Tensor) -> Tensor:
        """|residual|^r / r with r = `loss_exponent`."""
        if self.loss_exponent == 1.0:
            return residual.abs()
        return residual.abs().pow(self.loss_exponent) / self.loss_exponent

    def target_mean(self, rows: Tensor) -> Tensor:
        """The mean of one value for each hidden token ``[Nt]``, averaged over the mask sets."""
        return set_mean(rows, self.masks.target_set, self.denominators.target)

    def context_mean(self, rows: Tensor) -> Tensor:
        """The same for visible tokens ``[Nc]``."""
        return set_mean(rows, self.masks.context_set, self.denominators.context)

    def pair_mean(self, rows: Tensor) -> Tensor:
        """The same for pairs ``[P]``."""
        return set_mean(rows, self.masks.pair_set, self.denominators.pair)

    def column_mean(self, rows: Tensor) -> Tensor:
        """The same for columns ``[C]``."""
        return set_mean(rows, self.masks.column_set, self.denominators.column)


def set_mean(rows: Tensor, row_set: Tensor, count: Tensor) -> Tensor:
    """The mean of each mask set's rows, averaged over the sets that have any: sum_i rows_i /
    count[set_i] / J'.

    Args:
        rows: [R] values of this part of the batch.
        row_set: int64 [R], the mask set of each row.
        count: float32 [J], rows per set over the whole batch.

    Returns:
        A scalar; 0 where no set has a row.
    """
    present = (count > 0).to(rows.dtype)
    weight = present / (count.clamp(min=1.0) * present.sum().clamp(min=1.0))
    return (rows * weight.to(rows.dtype).index_select(0, row_set)).sum()


def segment_softmax_weights(values: Tensor, offsets: Tensor, temperature: float) -> Tensor:
    """n_s * softmax(values / temperature) within each segment s of n_s rows: weights of mean 1 per
    segment, without gradient.

    Args:
        values: [R], grouped by segment.
        offsets: [S+1], where each segment begins; empty segments are allowed.
        temperature: divides the values; below 1e-6 it counts as 1e-6.

    Returns:
        [R] weights.
    """
    scaled = values.detach() / max(temperature, 1e-6)
    offsets = offsets.to(torch.int64)
    rows = torch.arange(values.shape[0], device=values.device)
    # side="right" of the segment ends: the number of segments that end at or before the row, empty
    # ones included.
    segment = torch.searchsorted(offsets[1:].contiguous(), rows, right=True)
    # unsafe=True leaves out the checks that would read the offsets back.
    peak = torch.segment_reduce(scaled, "max", offsets=offsets, unsafe=True)
    exponent = (scaled - peak.index_select(0, segment)).exp()
    total = torch.segment_reduce(exponent, "sum", offsets=offsets, unsafe=True)
    size = (offsets[1:] - offsets[:-1]).to(values.dtype)
    return exponent * (size / total.clamp(min=torch.finfo(values.dtype).tiny)).index_select(
        0, segment
    )


def all_ranks() -> dist.ProcessGroup | None:
    """The group of all processes; None where there is one process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    return dist.group.WORLD


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum over all processes, differentiable; the value itself where there is one process.

    Every rank must call it equally often. If each rank then takes 1/ranks of a loss of the sum, the
    gradients add up to the right one.
    """
    group = all_ranks()
    return value if group is None else collective.sum_over_ranks(value, group)


def two_layer_head(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """W2 gelu(W1 x + b1) + b2 with the exact gelu."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))
