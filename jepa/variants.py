"""The named variants of the study: a mask policy, a set of weighted objectives, and whether the target is an EMA. Data, not code.

`variant("fwm_ld")` gives a `VariantConfig`; any other combination is a `VariantConfig` of its own, written in a configuration file as
a `base` and what differs from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jepa.config import ConfigError, from_dict, merged, nearest, parsed_by
from jepa.objectives import Factorisation, ObjectiveConfig, parse_objectives
from jepa.quirks import Quirks, parse_quirks


@dataclass(frozen=True)
class MaskSetConfig:
    """One mask set: `blocks` blocks, each covering `spatial_share` of a frame and `temporal_share` of the clip."""

    blocks: int
    spatial_share: tuple[float, float]
    temporal_share: tuple[float, float] = (1.0, 1.0)
    aspect_ratio: tuple[float, float] = (0.75, 1.5)


@dataclass(frozen=True)
class MaskPolicy:
    """How context and target tokens are drawn; the names are those of `jepa.masks`."""

    policy: Literal["blocks", "motion", "future", "motion_future"] = "blocks"
    sets: tuple[MaskSetConfig, ...] = (MaskSetConfig(8, (0.15, 0.15)), MaskSetConfig(2, (0.7, 0.7)))
    strength: float = 2.0  # motion: exponent of a block's mean motion
    random_rate: float = 0.1  # motion: share of origins drawn uniformly
    context_share: float = 0.5  # future: share of the time steps that may be context


@dataclass(frozen=True)
class TargetConfig:
    """Where the targets come from. `detach` cuts an online target's gradient for every objective but the kinematic ones."""

    kind: Literal["ema", "online"] = "ema"
    detach: bool = False


@dataclass(frozen=True)
class VariantConfig:
    """What makes a variant; everything else is the same for all of them."""

    objectives: Mapping[str, ObjectiveConfig] = parsed_by(parse_objectives, default_factory=lambda: parse_objectives(_ALWAYS, ""))
    masks: MaskPolicy = field(default_factory=MaskPolicy)
    target: TargetConfig = field(default_factory=TargetConfig)
    factorisation: Factorisation = field(default_factory=Factorisation)
    quirks: Quirks = parsed_by(parse_quirks, default_factory=Quirks)


_ALWAYS: dict[str, Any] = {"prediction": {}, "context": {}}
_MOTION = {"policy": "motion", "strength": 2.0, "random_rate": 0.1}
_STRONG_MOTION = {"policy": "motion", "strength": 5.0, "random_rate": 0.0}
# Half the clip as context leaves room for few blocks: 4 and 1 where the others have 8 and 2.
_FUTURE_SETS = [{"blocks": 4, "spatial_share": [0.15, 0.15]}, {"blocks": 1, "spatial_share": [0.7, 0.7]}]
_ONLINE = {"kind": "online"}
_FWM = {"static": {"weight": 0.05}, "orthogonality": {"weight": 0.01}}
_HARD = {"weight": 0.3, "temperature": 1.0}
_HARD_DYNAMICS = {"weight": 1.0, "hard_region": True}


def _accelerated(**options: Any) -> dict[str, Any]:
    return {"target": _ONLINE, "objectives": {"kinematic": {"weight": 0.1, "kind": "acceleration", **options}}}


VARIANTS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "motion_guided": {"masks": _MOTION},
    "amg": {"masks": _STRONG_MOTION},
    "future_predictive": {"masks": {"policy": "future", "sets": _FUTURE_SETS}},
    "motion_future": {"masks": {**_MOTION, "policy": "motion_future", "sets": _FUTURE_SETS}},
    "hw": {"objectives": {"hard_region": _HARD}},
    "delta": {"objectives": {"delta": {"weight": 0.5}}},
    "combo": {"masks": _STRONG_MOTION, "objectives": {"delta": {"weight": 0.5}, "hard_region": _HARD}},
    "fwm": {"objectives": _FWM},
    "ld": {"objectives": {"latent_dynamics": {"weight": 1.0}}},
    "fwm_ld": {"objectives": {**_FWM, "latent_dynamics": {"weight": 1.0, "channels": "dynamics"}}},
    "hw_ld": {"objectives": {"hard_region": {"weight": 1.0}, "latent_dynamics": _HARD_DYNAMICS}},
    "fwm_hw_ld": {"objectives": {**_FWM, "hard_region": {"weight": 1.0}, "latent_dynamics": {**_HARD_DYNAMICS, "channels": "dynamics"}}},
    "spectral": {"objectives": {"spectral": {"weight": 1.0}}},
    "ltc": {"objectives": {"ltc": {"weight": 0.5, "margin": 0.5}}},
    "ac": {"objectives": {"action": {"weight": 1.0}}},
    "ac_hw": {"objectives": {"action": {"weight": 1.0}, "hard_region": _HARD}},
    "fac": {"objectives": {**_FWM, "action": {"weight": 1.0, "channels": "dynamics"}}},
    "kinematic": {"target": _ONLINE, "objectives": {"kinematic": {"weight": 1.0}}},
    "kinematic_0_1": {"target": _ONLINE, "objectives": {"kinematic": {"weight": 0.1}}},
    "kinematic_huber": {"target": _ONLINE, "objectives": {"kinematic": {"weight": 0.1, "kind": "huber", "huber_delta": 0.1}}},
    "kinematic_accel": _accelerated(),
    "kinematic_split": _accelerated(channel_share=0.5),
    "kinematic_anneal": _accelerated(schedule={"kind": "cosine"}),
    "velgate": {"objectives": {"velgate": {"weight": 1.0, "percentile": 0.5}}},
    "hamiltonian": {"objectives": {"hamiltonian": {"weight": 1.0, "time_step": 0.1}}},
    "sigreg": {"objectives": {"sigreg": {"weight": 1.0}}},
    "sigreg_no_ema": {"target": _ONLINE, "objectives": {"sigreg": {"weight": 1.0}}},
}


def variant(name: str, **changes: Any) -> VariantConfig:
    """A named variant, with nested `changes` laid over it.

    Raises:
        ConfigError: no variant of that name, or a change with an unknown key.

    Example:
        >>> variant("fwm_ld", factorisation={"split": "channels"}).factorisation.split
        'channels'
    """
    return from_dict(VariantConfig, merged(variant_data(name), changes))


def variant_data(name: str) -> dict[str, Any]:
    """A named variant as plain mappings, the baseline's objectives included."""
    if name not in VARIANTS:
        raise ConfigError(f"config: unknown variant {name!r}; {nearest(name, VARIANTS)}")
    return merged({"objectives": _ALWAYS}, VARIANTS[name])


def parse_variant(value: Any, path: str) -> VariantConfig:
    """A configuration value as a variant: a name, or a mapping whose `base` names the one it starts from."""
    if isinstance(value, VariantConfig):
        return value
    if isinstance(value, str):
        return variant(value)
    if not isinstance(value, Mapping):
        raise ConfigError(f"config: {path} must be a variant name or a mapping, got {value!r}.")
    changes = {key: item for key, item in value.items() if key != "base"}
    return from_dict(VariantConfig, merged(variant_data(value.get("base", "baseline")), changes), path)
