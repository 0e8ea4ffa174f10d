"""The named variants of the study: a mask policy, a set of weighted objectives, and whether the
target is an EMA. Data, not code.

`variant("fwm_ld")` gives a `VariantConfig`; any other combination is a `VariantConfig` of its own,
written in a configuration file as a `base` and what differs from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from jepa.config import ConfigError, from_dict, merged, nearest, parsed_by, to_dict
from jepa.masks.policy import POLICY_NAMES, MaskPolicy, mask_policy
from jepa.objectives import Factorisation, ObjectiveConfig, configurations, parse_objectives
from jepa.published_behaviour import PublishedBehaviour, parse_published_behaviour


def parse_masks(value: Any, path: str) -> MaskPolicy:
    """A configuration value as a mask policy: a name, a mapping of `name` and what differs from it,
    or a whole policy."""
    if isinstance(value, MaskPolicy):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping) or "name" not in value:
        return from_dict(MaskPolicy, value, path)
    if value["name"] not in POLICY_NAMES:
        raise ConfigError(
            f"config: unknown mask policy {value['name']!r}; "
            f"{nearest(str(value['name']), POLICY_NAMES)}"
        )
    guidance = {key: value[key] for key in ("strength", "random_rate") if key in value}
    rest = {key: item for key, item in value.items() if key != "name" and key not in guidance}
    return from_dict(
        MaskPolicy, merged(to_dict(mask_policy(value["name"], **guidance)), rest), path
    )


@dataclass(frozen=True)
class TargetConfig:
    """Where the targets come from."""

    kind: Literal["ema", "online"] = "ema"
    """ema: a moving average of the context encoder; online: the context encoder itself."""
    detach: bool = False
    """Cuts an online target's gradient for every objective but the kinematic ones."""


@dataclass(frozen=True)
class VariantConfig:
    """What makes a variant; everything else is the same for all of them."""

    objectives: Mapping[str, ObjectiveConfig] = field(
        default_factory=lambda: parse_objectives(_ALWAYS, ""),
        metadata=parsed_by(parse_objectives, configurations),
    )
    """The losses by name, each with its weight and options."""
    masks: MaskPolicy = field(default_factory=MaskPolicy, metadata=parsed_by(parse_masks))
    """A mask policy (blocks, motion, future, motion_future) or what differs from one."""
    target: TargetConfig = field(default_factory=TargetConfig)
    """Where the targets come from."""
    factorisation: Factorisation = field(default_factory=Factorisation)
    """Which channels hold appearance and which dynamics."""
    published_behaviour: PublishedBehaviour = field(
        default_factory=PublishedBehaviour,
        metadata=parsed_by(parse_published_behaviour, formerly="quirks"),
    )
    """Defects of the published code to switch on: names, or all."""

    @property
    def mask_policy(self) -> MaskPolicy:
        """The policy to sample from: `masks` with what `published_behaviour` switches on."""
        behaviour, policy = self.published_behaviour, self.masks
        if policy.motion is not None:
            sampling = "point" if behaviour.motion_point_sampling else policy.motion.sampling
            maximum = (
                "published" if behaviour.motion_maximum_of_wrong_sample else policy.motion.maximum
            )
            policy = replace(
                policy, motion=replace(policy.motion, sampling=sampling, maximum=maximum)
            )
        return replace(
            policy,
            truncate="batch_min" if behaviour.truncate_to_batch_minimum else policy.truncate,
            shared_block_size=behaviour.shared_block_size or policy.shared_block_size,
        )

    @property
    def pair_horizon(self) -> int:
        """K of the mask pairs: the longest that any objective looks ahead."""
        return max(
            [cfg.pair_horizon for cfg in self.objectives.values() if cfg.weight != 0.0],
            default=1,
        )


_ALWAYS: dict[str, Any] = {"prediction": {}, "context": {}}
_MOTION = {"name": "motion", "strength": 2.0, "random_rate": 0.1}
_STRONG_MOTION = {"name": "motion", "strength": 5.0, "random_rate": 0.0}
_ONLINE = {"kind": "online"}
_FWM = {"static": {"weight": 0.05}, "orthogonality": {"weight": 0.01}}
_HARD = {"weight": 0.3, "temperature": 1.0}
_HARD_DYNAMICS = {"weight": 1.0, "hard_region": True}


def _accelerated(**options: Any) -> dict[str, Any]:
    return {
        "target": _ONLINE,
        "objectives": {"kinematic": {"weight": 0.1, "kind": "acceleration", **options}},
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "motion_guided": {"masks": _MOTION},
    "amg": {"masks": _STRONG_MOTION},
    "future_predictive": {"masks": {"name": "future"}},
    "motion_future": {"masks": {**_MOTION, "name": "motion_future"}},
    "hw": {"objectives": {"hard_region": _HARD}},
    "delta": {"objectives": {"delta": {"weight": 0.5}}},
    "combo": {
        "masks": _STRONG_MOTION,
        "objectives": {"delta": {"weight": 0.5}, "hard_region": _HARD},
    },
    "fwm": {"objectives": _FWM},
    "ld": {"objectives": {"latent_dynamics": {"weight": 1.0}}},
    "fwm_ld": {"objectives": {**_FWM, "latent_dynamics": {"weight": 1.0, "channels": "dynamics"}}},
    "hw_ld": {"objectives": {"hard_region": {"weight": 1.0}, "latent_dynamics": _HARD_DYNAMICS}},
    "fwm_hw_ld": {
        "objectives": {
            **_FWM,
            "hard_region": {"weight": 1.0},
            "latent_dynamics": {**_HARD_DYNAMICS, "channels": "dynamics"},
        }
    },
    "spectral": {"objectives": {"spectral": {"weight": 1.0}}},
    "ltc": {"objectives": {"ltc": {"weight": 0.5, "margin": 0.5}}},
    "ac": {"objectives": {"action": {"weight": 1.0}}},
    "ac_hw": {"objectives": {"action": {"weight": 1.0}, "hard_region": _HARD}},
    "fac": {"objectives": {**_FWM, "action": {"weight": 1.0, "channels": "dynamics"}}},
    "kinematic": {"target": _ONLINE, "objectives": {"kinematic": {"weight": 1.0}}},
    "kinematic_0_1": {"target": _ONLINE, "objectives": {"kinematic": {"weight": 0.1}}},
    "kinematic_huber": {
        "target": _ONLINE,
        "objectives": {"kinematic": {"weight": 0.1, "kind": "huber", "huber_delta": 0.1}},
    },
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
    """A configuration value as a variant: a name, or a mapping whose `base` names the one it starts
    from."""
    if isinstance(value, VariantConfig):
        return value
    if isinstance(value, str):
        return variant(value)
    if not isinstance(value, Mapping):
        raise ConfigError(f"config: {path} must be a variant name or a mapping, got {value!r}.")
    changes = {key: item for key, item in value.items() if key != "base"}
    return from_dict(
        VariantConfig, merged(variant_data(value.get("base", "baseline")), changes), path
    )
