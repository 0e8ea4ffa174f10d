"""Mask policies: what is hidden from the context encoder. Data only; sampling is in sample.py."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal


@dataclass(frozen=True)
class MaskSet:
    """One mask set: `num_blocks` boxes of one size, whose union is hidden from the context."""

    num_blocks: int
    spatial_scale: tuple[float, float]  # share of a frame that a block covers
    temporal_scale: tuple[float, float] = (1.0, 1.0)  # share of the time steps
    aspect_ratio: tuple[float, float] = (0.75, 1.5)  # height / width in tokens

    def __post_init__(self) -> None:
        if self.num_blocks < 1:
            raise ValueError(f"MaskSet: num_blocks must be at least 1, got {self.num_blocks}.")
        for name in ("spatial_scale", "temporal_scale"):
            low, high = getattr(self, name)
            if not 0.0 < low <= high <= 1.0:
                raise ValueError(
                    f"MaskSet: {name} must be 0 < low <= high <= 1, got ({low}, {high})."
                )
        low, high = self.aspect_ratio
        if not 0.0 < low <= high:
            raise ValueError(f"MaskSet: aspect_ratio must be 0 < low <= high, got ({low}, {high}).")


@dataclass(frozen=True)
class MotionGuidance:
    """Origins drawn with probability (1-random_rate) * s^strength / sum(s^strength) + random_rate /
    n, s = mean motion in the block."""

    strength: float = 2.0
    """Exponent of the motion in a block: 0 ignores it."""
    random_rate: float = 0.1
    """Share of the origins that are drawn uniformly."""
    sampling: Literal["area", "point"] = "area"
    """How motion comes to the token grid; point is published and misses what is in between."""
    maximum: Literal["sample", "published"] = "sample"
    """What a map is divided by; published: step t of sample b by the maximum of sample t."""

    def __post_init__(self) -> None:
        if not self.strength >= 0.0:
            raise ValueError(f"MotionGuidance: strength must not be negative, got {self.strength}.")
        if not 0.0 <= self.random_rate <= 1.0:
            raise ValueError(
                f"MotionGuidance: random_rate must lie in [0, 1], got {self.random_rate}."
            )
        if self.sampling not in ("area", "point"):
            raise ValueError(
                f"MotionGuidance: sampling must be 'area' or 'point', got {self.sampling!r}."
            )
        if self.maximum not in ("sample", "published"):
            raise ValueError(
                f"MotionGuidance: maximum must be 'sample' or 'published', got {self.maximum!r}."
            )


BLOCK_SETS = (MaskSet(8, (0.15, 0.15)), MaskSet(2, (0.7, 0.7)))
# Part of the clip alone, so that what is hidden is seen at another time.
TUBE_SETS = (MaskSet(8, (0.15, 0.15), (0.5, 0.5)), MaskSet(2, (0.7, 0.7), (0.5, 0.5)))
FUTURE_SETS = (MaskSet(4, (0.15, 0.15)), MaskSet(1, (0.7, 0.7)))


@dataclass(frozen=True)
class MaskPolicy:
    """Targets are the complement of the context; the context is what no block covers, within the
    first time steps if so limited.

    `truncate="batch_min"` cuts every sample to the shortest of the batch and drops the tokens with
    the highest ids, as published code does. It skews masks in time. `shared_block_size` draws one
    block size per step instead of one per sample.
    """

    sets: tuple[MaskSet, ...] = BLOCK_SETS
    """The mask sets, each of `num_blocks` boxes of one size."""
    motion: MotionGuidance | None = None
    """Draws blocks where things move; null: uniformly."""
    context_share: float = 1.0
    """Share of the time steps, from the first, that the context may use."""
    truncate: Literal["none", "batch_min"] = "none"
    """batch_min cuts every sample's tokens to the fewest of the batch, as published."""
    shared_block_size: bool = False
    """One block size per step instead of one per sample, as published."""
    max_attempts: int = field(default=1000, repr=False)
    """Draws of a block before a sample that hides everything is an error."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.sets) <= 256:
            raise ValueError(
                f"MaskPolicy: sets must hold 1 to 256 mask sets, got {len(self.sets)}."
            )
        if not 0.0 < self.context_share <= 1.0:
            raise ValueError(
                f"MaskPolicy: context_share must lie in (0, 1], got {self.context_share}."
            )
        if self.truncate not in ("none", "batch_min"):
            raise ValueError(
                f"MaskPolicy: truncate must be 'none' or 'batch_min', got {self.truncate!r}."
            )
        if self.max_attempts < 1:
            raise ValueError(
                f"MaskPolicy: max_attempts must be at least 1, got {self.max_attempts}."
            )

    def context_steps(self, time_steps: int) -> int:
        """How many of the first time steps the context may use (at least one)."""
        return max(1, int(time_steps * self.context_share))

    def published(self) -> MaskPolicy:
        """This policy with the published behaviour: batch truncation, one size per step,
        point-sampled and wrongly scaled motion maps."""
        motion = (
            None
            if self.motion is None
            else replace(self.motion, sampling="point", maximum="published")
        )
        return replace(self, motion=motion, truncate="batch_min", shared_block_size=True)


POLICY_NAMES = ("blocks", "motion", "future", "motion_future", "tubes")


def mask_policy(name: str, *, strength: float = 2.0, random_rate: float = 0.1) -> MaskPolicy:
    """The named policies: the study's four, and blocks that last half the clip (`tubes`).

    `strength` and `random_rate` matter to the motion-guided ones only. A mixture is a policy with
    sets of its own: each set is one kind of mask.
    """
    guidance = MotionGuidance(strength, random_rate)
    policies = {
        "blocks": MaskPolicy(),
        "motion": MaskPolicy(motion=guidance),
        "tubes": MaskPolicy(sets=TUBE_SETS),
        "future": MaskPolicy(sets=FUTURE_SETS, context_share=0.5),
        "motion_future": MaskPolicy(sets=FUTURE_SETS, context_share=0.5, motion=guidance),
    }
    if name not in policies:
        raise ValueError(
            f"mask_policy: name must be one of {', '.join(POLICY_NAMES)}, got {name!r}."
        )
    return policies[name]
