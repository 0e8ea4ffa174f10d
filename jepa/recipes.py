"""Named starting points of a pre-training run: data, not code. What is given on the command line is
laid over them.

`published` is what the fields of the configurations say by themselves: the study's masks, crops,
loss and rates around the micro model on moving_shapes. `small` is what learns within minutes on a
small grid of tokens (docs/study.md says what each choice was measured to do).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jepa.config import ConfigError, nearest

DEFAULT = "small"
RECIPES: Mapping[str, dict[str, Any]] = {
    "published": {},
    "small": {
        "model": {"size": "micro", "patch_size": 8, "rope_interpolate_from": None},
        "variant": {"base": "ld"},
        "schedule": {
            "total_steps": 600,
            "warmup_steps": 30,
            "initial_rate": 1e-5,
            "rate": 1e-3,
            "final_rate": 1e-4,
            "momentum": 0.99,
            "final_momentum": 0.999,
        },
        "data": {"kind": "moving_textures", "size": 100_000},
        "batch_size": 16,
        "frames": 8,
        "stride": 1,
        "height": 32,
        "width": 32,
        # Whole clips: a crop would change what speed means, and cut objects in two.
        "crop_scale": [1.0, 1.0],
        "crop_aspect": [1.0, 1.0],
        "flip": 0.0,
        "clip_gradient": 1.0,
        "log_every": 20,
        "checkpoint_every": 200,
    },
}
# Keys that take a name in place of a mapping, and where the name goes in the mapping.
_NAMED = {"model": "size", "variant": "base"}


def recipe(name: str) -> dict[str, Any]:
    """The settings of a named recipe.

    Raises:
        ConfigError: no recipe of that name.
    """
    if name not in RECIPES:
        raise ConfigError(f"config: unknown recipe {name!r}; {nearest(name, RECIPES)}")
    return RECIPES[name]


def taken_from(words: Sequence[str], from_file: bool = False) -> tuple[dict[str, Any], list[str]]:
    """The recipe that ``recipe=NAME`` among dotted overrides asks for, and the other overrides.

    Without one it is `DEFAULT`, or `published` where the run comes from a configuration file, which
    is a whole run already. A variant or model given by name keeps the recipe's masks and patches;
    over a file it takes the place of the file's.
    """
    name, rest = "published" if from_file else DEFAULT, []
    for word in words:
        key, _, value = word.partition("=")
        if key == "recipe":
            name = value
        elif key in _NAMED and not from_file and not value.lstrip().startswith("{"):
            rest.append(f"{key}.{_NAMED[key]}={value}")
        else:
            rest.append(word)
    return recipe(name), rest
