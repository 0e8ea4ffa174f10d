"""Masks of a training step: policies, motion maps, and their sampling."""

from jepa.masks.motion import block_scores, origin_probabilities
from jepa.masks.policy import (
    BLOCK_SETS,
    FUTURE_SETS,
    POLICY_NAMES,
    MaskPolicy,
    MaskSet,
    MotionGuidance,
    mask_policy,
)
from jepa.masks.sample import motion_maps, sample_contexts, sample_masks

__all__ = [
    "BLOCK_SETS",
    "FUTURE_SETS",
    "POLICY_NAMES",
    "MaskPolicy",
    "MaskSet",
    "MotionGuidance",
    "block_scores",
    "mask_policy",
    "motion_maps",
    "origin_probabilities",
    "sample_contexts",
    "sample_masks",
]
