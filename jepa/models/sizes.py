"""Named model sizes: data, not code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from jepa.config import ConfigError, from_dict, merged, nearest, to_dict

# After which blocks a level is taken, by depth.
LEVEL_BLOCKS: Mapping[int, tuple[int, ...]] = MappingProxyType(
    {4: (0, 1, 2, 3), 12: (2, 5, 8, 11), 24: (5, 11, 17, 23), 40: (9, 19, 29, 39)}
)


@dataclass(frozen=True)
class PredictorConfig:
    """A narrow transformer."""

    width: int = 256
    """Channels of a predictor token."""
    depth: int = 8
    """Predictor blocks."""
    heads: int = 8
    """Heads of a predictor block."""
    mlp_ratio: float = 4.0
    """Hidden width of its MLPs over `width`."""
    mask_tokens: int = 2
    """Learned tokens that the mask sets take turns with."""


@dataclass(frozen=True)
class ModelConfig:
    """Encoder and predictor. Tokens are tubelets of `tubelet_size` frames x `patch_size`^2 pixels,
    or patches of a single frame."""

    width: int = 768
    """Channels of an encoder token."""
    depth: int = 12
    """Encoder blocks."""
    heads: int = 12
    """Heads of an encoder block."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLPs over `width`."""
    level_blocks: tuple[int, ...] = (2, 5, 8, 11)
    """Blocks (from 0) after which a level of features is taken; the last block is one."""
    patch_size: int = 16
    """Side of a token in pixels."""
    tubelet_size: int = 2
    """Frames of a token; a single frame is an image."""
    rope_interpolate_from: int | None = 16
    """Side of the token grid that positions are scaled to; null: unscaled."""
    checkpoint_activations: bool = False
    """Compute activations again in backward instead of keeping them."""
    causal: bool = False
    """The encoders see in time: a token attends to its own time step and earlier ones."""
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    """The narrow transformer that predicts the targets."""

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ConfigError(
                f"config: width must be a multiple of heads ({self.heads}), got {self.width}."
            )
        blocks = self.level_blocks
        if (
            not blocks
            or list(blocks) != sorted(set(blocks))
            or blocks[0] < 0
            or blocks[-1] != self.depth - 1
        ):
            raise ConfigError(
                f"config: level_blocks must rise and end at the last block ({self.depth - 1}), "
                f"got {blocks}."
            )

    @property
    def levels(self) -> int:
        return len(self.level_blocks)

    @property
    def feature_width(self) -> int:
        """D: all levels side by side."""
        return self.levels * self.width


def _size(
    width: int,
    depth: int,
    heads: int,
    mlp_ratio: float = 4.0,
    predictor: PredictorConfig | None = None,
) -> ModelConfig:
    return ModelConfig(
        width,
        depth,
        heads,
        mlp_ratio,
        LEVEL_BLOCKS[depth],
        predictor=predictor or PredictorConfig(),
    )


SIZES: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "micro": _size(96, 4, 3, predictor=PredictorConfig(width=64, depth=4, heads=2)),
        "tiny": _size(192, 12, 3),
        "small": _size(384, 12, 6),
        "base": _size(768, 12, 12),
        "large": _size(1024, 24, 16),
        "giant": _size(1408, 40, 22, 48 / 11),
    }
)

DEFAULT_SIZE = "micro"


def model_config(name: str, **changes: Any) -> ModelConfig:
    """A named size, with nested `changes` laid over it.

    Raises:
        ConfigError: no size of that name, or an unknown key.
    """
    if name not in SIZES:
        raise ConfigError(f"config: unknown model size {name!r}; {nearest(name, SIZES)}")
    return (
        from_dict(ModelConfig, merged(to_dict(SIZES[name]), changes), "model")
        if changes
        else replace(SIZES[name])
    )


def parse_model(value: Any, path: str) -> ModelConfig:
    """A configuration value as a model: a size name, or a mapping whose `size` names the one it
    starts from (`DEFAULT_SIZE` where it names none)."""
    if isinstance(value, ModelConfig):
        return value
    if isinstance(value, str):
        return model_config(value)
    if not isinstance(value, Mapping):
        raise ConfigError(f"config: {path} must be a size name or a mapping, got {value!r}.")
    changes = {key: item for key, item in value.items() if key != "size"}
    return model_config(value.get("size", DEFAULT_SIZE), **changes)
