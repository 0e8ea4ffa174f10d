"""moving_textures: a textured window that moves over a still ground, drawn on the fly. No files;
any size, length and stride.

Every pixel of the window carries motion, not its outline alone, so that a token sees motion within
its own tubelet and a small transformer learns it in minutes (moving_shapes, whose uniform shapes
move at their edges only, stays as the hard set). A texture is a sum of cosine waves whose
frequencies and angles lie in a band, drawn exactly at any sub-pixel position.

Appearance and motion factors are independent and uniform. One frame says nothing about any motion
factor, by construction: positions wrap around and start uniformly, phases are uniform, and under
zoom and rotation each wave moves through the fixed band of its texture and re-enters at the other
end, where its amplitude is zero (as in a Shepard tone), so that the spectrum at every time has one
distribution whatever the motion. Lengths are shares of the shorter side: the same clip at another
resolution shows the same motion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jepa.config import ConfigError, nearest
from jepa.counter_rng import Stream, stream_id, uniforms
from jepa.data.clip import Clip, ClipSpec

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

APPEARANCE = {
    "texture": ("coarse", "medium", "fine"),
    "orientation": ("upright", "rising", "level", "falling"),
    "colour": ("grey", "red", "green", "blue"),
    "window": ("disc", "wide", "tall"),
}
MOTION = {
    "direction": (
        "east",
        "south_east",
        "south",
        "south_west",
        "west",
        "north_west",
        "north",
        "north_east",
    ),
    "speed": ("slow", "medium", "fast"),
    "rotation": ("left", "none", "right"),
    "zoom": ("out", "none", "in"),
    "acceleration": ("braking", "steady", "speeding"),
    "mover": ("object", "camera", "both"),
    "occluder": ("left", "still", "right"),
}
FACTORS = {**APPEARANCE, **MOTION}
DEFAULT_FREE = ("texture", "orientation", "colour", "window", "direction", "speed")
# What a factor is where it is not free. Without an occluder nothing lies over the window.
ABSENT = "absent"
_NEUTRAL = {
    "texture": "medium",
    "orientation": "upright",
    "colour": "grey",
    "window": "disc",
    "direction": "east",
    "speed": "medium",
    "rotation": "none",
    "zoom": "none",
    "acceleration": "steady",
    "mover": "object",
    "occluder": ABSENT,
}
# The source runs at this rate where a clip is asked for by frames per second.
SOURCE_FPS = 30.0

# Cycles per side; half the range of angles; degrees and octaves per frame; sides per frame.
_BANDS = ((1.0, 1.8), (2.2, 3.8), (4.6, 7.6))
_SPREAD = math.radians(40)
_ROTATION = math.radians(5)
_ZOOM = 0.09
_ACCELERATION = (-0.8, 0.0, 0.8)
_OCCLUDER_HALF_WIDTH = 0.09
_OCCLUDER_SPEED = 0.05
_GROUND_BAND = (0.7, 3.0)
_OCCLUDER_BAND = (3.0, 7.0)
_CONTRAST = 48.0
_COLOURS = np.array(
    ((1, 1, 1), (1.4, -0.7, -0.7), (-0.7, 1.4, -0.7), (-0.7, -0.7, 1.4)), dtype=np.float32
)
_WAVES, _GROUND_WAVES, _OCCLUDER_WAVES = 16, 8, 8
_NUISANCES = ("x", "y", "radius", "grey", "contrast", "lift", "occluder_x")
# A field takes two shifts of its band and three numbers per wave.
_FIELDS = tuple(2 + 3 * waves for waves in (_WAVES, _GROUND_WAVES, _OCCLUDER_WAVES))
_NUM_DRAWS = len(FACTORS) + len(_NUISANCES) + sum(_FIELDS)


@dataclass(frozen=True)
class TextureOptions:
    """Which factors vary, and how the motion looks."""

    free: tuple[str, ...] = DEFAULT_FREE
    """Factors that vary from clip to clip; probes ask for these."""
    fixed: Mapping[str, str] = field(default_factory=dict)
    """Class of factors that are not free, over the neutral ones (occluder: absent)."""
    # At most 0.34, so that the longest window does not meet itself around the edge.
    radius: tuple[float, float] = (0.26, 0.32)
    """Range of the window's radius, in shares of the shorter side, at most 0.34."""
    speeds: tuple[float, float, float] = (0.024, 0.048, 0.08)
    """Slow, medium and fast, in sides per source frame."""
    ground: float = 0.0
    """Contrast of the ground's texture beside the window's; a moving camera needs one."""

    def __post_init__(self) -> None:
        for name in (*self.free, *self.fixed):
            if name not in FACTORS:
                raise ConfigError(
                    f"config: unknown factor {name!r} of moving_textures; {nearest(name, FACTORS)}"
                )
        both = sorted(set(self.free) & set(self.fixed))
        if both or not self.free or len(set(self.free)) != len(self.free):
            raise ConfigError(
                "config: free must name at least one factor, each once and none that is fixed, got "
                f"free {list(self.free)} and fixed {sorted(self.fixed)}."
            )
        for name, value in self.fixed.items():
            valid = (*FACTORS[name], ABSENT) if name == "occluder" else FACTORS[name]
            if value not in valid:
                raise ConfigError(
                    f"config: fixed.{name} must be one of {', '.join(valid)}, got {value!r}."
                )
        if not 0.0 < self.radius[0] <= self.radius[1] <= 0.34:
            raise ConfigError(f"config: radius must be 0 < low <= high <= 0.34, got {self.radius}.")
        if not all(0.0 <= speed <= 0.5 for speed in self.speeds):
            raise ConfigError(f"config: speeds must lie in [0, 0.5], got {self.speeds}.")
        if self.ground < 0.0 or (self.ground == 0.0 and self.value("mover") != "object"):
            raise ConfigError(
                "config: ground must be positive where the camera may move (mover), and never "
                f"negative, got {self.ground}."
            )

    def value(self, name: str) -> str | None:
        """The class of a factor that is not free, None of one that is."""
        return None if name in self.free else self.fixed.get(name, _NEUTRAL[name])


class MovingTextures:
    """`size` clips of a split. Sample i depends on (seed, split, i) only, and on the options, size
    and times asked for; fixing a factor changes nothing else of a sample.

    Args:
        size: number of samples; indices beyond it are an error, though any number of clips exists.
        seed: key of all random numbers.
        split: "train" or "test"; their samples never coincide.
        target: the free factor that `label` gives, None for the first one.
        options: which factors vary, and how.
    """

    name = "moving_textures"
    still = False

    def __init__(
        self,
        size: int = 10000,
        seed: int = 0,
        split: str = "train",
        target: str | None = None,
        options: TextureOptions | None = None,
    ) -> None:
        self.options = TextureOptions() if options is None else options
        if size < 1:
            raise ValueError(f"MovingTextures: size must be at least 1, got {size}.")
        if split not in ("train", "test"):
            raise ValueError(f"MovingTextures: split must be 'train' or 'test', got {split!r}.")
        self.target = self.options.free[0] if target is None else target
        if self.target not in self.options.free:
            raise ValueError(
                f"MovingTextures: target must be one of {', '.join(self.options.free)}, got "
                f"{target!r}."
            )
        self.size, self.seed, self.split = size, seed, split
        self.questions = {name: FACTORS[name] for name in FACTORS if name in self.options.free}
        self.num_classes = len(FACTORS[self.target])
        self._stream = stream_id(Stream.TEXTURES, ("train", "test").index(split))

    def __len__(self) -> int:
        return self.size

    def may_flip(self, index: int) -> bool:
        """Never: mirroring swaps directions and turns."""
        return False

    def where(self, index: int) -> str:
        return f"moving_textures/{self.split}/{self.seed}/{index}"

    def label(self, index: int) -> int:
        return int(self.factors([index])[self.target][0])

    def factors(self, indices: ArrayLike) -> dict[str, NDArray[np.int64]]:
        """Class of every free factor for every sample."""
        draws = self._draws(np.asarray(indices, dtype=np.int64))
        return {
            name: (draws[:, k] * len(values)).astype(np.int64)
            for k, (name, values) in enumerate(FACTORS.items())
            if name in self.options.free
        }

    def read(self, index: int, spec: ClipSpec, draw: float = 0.0) -> Clip:
        """The clip of a sample at the size and stride asked for. `draw` has no meaning: a sample is
        one clip."""
        step = spec.stride if spec.fps is None else SOURCE_FPS / spec.fps
        frames = self.render(index, spec.frames, spec.height, spec.width, step)
        return Clip(frames, spec.height, spec.width)

    def render(
        self, index: int, frames: int, height: int, width: int, stride: float = 1
    ) -> NDArray[np.uint8]:
        """[frames, height, width, 3] of one sample, `stride` source frames apart."""
        draws = self._draws(np.array([index]))[0]
        window_draws, ground_draws, occluder_draws = np.split(
            draws[len(FACTORS) + len(_NUISANCES) :], np.cumsum(_FIELDS)[:-1]
        )
        kinds = {name: self._class(name, draws[k]) for k, name in enumerate(FACTORS)}
        scene = _Scene.of(
            kinds,
            dict(zip(_NUISANCES, draws[len(FACTORS) :].tolist())),
            self.options,
            np.arange(frames, dtype=np.float64) * stride,
            frames * stride,
            (height, width),
        )
        grey = np.float32(95.0 + 40.0 * scene.free["grey"])
        cover, paint = _window(scene, window_draws, self.options.radius)
        behind: Float32 | np.float32 = grey
        if self.options.ground > 0.0:
            shade = np.float32(_CONTRAST * self.options.ground) * _ground(scene, ground_draws)
            behind = (grey + shade * (1.0 - cover))[..., None]
        picture = behind + cover[..., None] * paint
        if kinds["occluder"] < len(MOTION["occluder"]):
            bar, texture = _occluder(scene, occluder_draws)
            over = (grey + np.float32(_CONTRAST) * texture)[..., None]
            picture = picture + bar[:, None, :, None] * (over - picture)
        rounded: NDArray[np.uint8] = np.rint(np.clip(picture, 0.0, 255.0)).astype(np.uint8)
        return rounded

    def _class(self, name: str, draw: float) -> int:
        fixed = self.options.value(name)
        if fixed is None:
            return int(draw * len(FACTORS[name]))
        return len(FACTORS[name]) if fixed == ABSENT else FACTORS[name].index(fixed)

    def _draws(self, indices: NDArray[np.int64]) -> Float64:
        if indices.size and (indices.min() < 0 or indices.max() >= self.size):
            raise IndexError(
                f"MovingTextures: index must lie in [0, {self.size}), got {indices.min()} to "
                f"{indices.max()}."
            )
        return uniforms(self.seed, 0, indices, self._stream, _NUM_DRAWS)


@dataclass(frozen=True)
class _Scene:
    """What the parts of a picture have in common. Lengths are in sides, times in source frames."""

    kinds: Mapping[str, int]
    free: Mapping[str, float]
    time: Float64  # [F]
    y: Float64  # [1, H], of pixel centres
    x: Float64  # [1, W]
    span: tuple[float, float]  # height and width of the picture
    side: int  # in pixels
    moved: tuple[Float64, Float64]  # [F, 1] down and right, of what moves
    still: Float64  # [F], zeros

    @classmethod
    def of(
        cls,
        kinds: Mapping[str, int],
        free: Mapping[str, float],
        options: TextureOptions,
        time: Float64,
        duration: float,
        size: tuple[int, int],
    ) -> _Scene:
        side = min(size)
        y, x = (np.arange(n, dtype=np.float64)[None] / side + 0.5 / side for n in size)
        speed = options.speeds[kinds["speed"]]
        moved = _travelled(speed, kinds["acceleration"], time, duration)[:, None]
        heading = kinds["direction"] * (math.pi / 4)
        return cls(
            kinds,
            free,
            time,
            y,
            x,
            (size[0] / side, size[1] / side),
            side,
            (moved * math.sin(heading), moved * math.cos(heading)),
            np.zeros(len(time)),
        )

    def shift(self, moves: bool) -> tuple[Float64, Float64]:
        """[F, 1] down and right, of something that moves or does not."""
        return self.moved if moves else (self.still[:, None], self.still[:, None])


def _window(scene: _Scene, draws: Float64, radii: tuple[float, float]) -> tuple[Float32, Float32]:
    """How much of each pixel the window covers, [F, H, W], and what it adds there, [F, H, W, 3]."""
    kinds, free = scene.kinds, scene.free
    shift = scene.shift(MOTION["mover"][kinds["mover"]] != "camera")
    down = _wrapped(scene.y - free["y"] * scene.span[0] - shift[0], scene.span[0])
    across = _wrapped(scene.x - free["x"] * scene.span[1] - shift[1], scene.span[1])
    radius = radii[0] + (radii[1] - radii[0]) * free["radius"]
    distance = _WINDOWS[kinds["window"]](
        down.astype(np.float32)[:, :, None] / np.float32(radius),
        across.astype(np.float32)[:, None, :] / np.float32(radius),
    )
    cover = np.clip(np.float32(0.5) - distance * np.float32(radius * scene.side), 0.0, 1.0)
    waves = _waves(
        draws,
        _WAVES,
        _BANDS[kinds["texture"]],
        (kinds["orientation"] * math.pi / 4, _SPREAD),
        scene.time * _ZOOM * (1 - kinds["zoom"]),
        scene.time * _ROTATION * (kinds["rotation"] - 1),
    )
    contrast = np.float32(_CONTRAST * (0.8 + 0.4 * free["contrast"]))
    texture = contrast * _drawn(waves, down, across)
    lift = np.float32(20.0 + 15.0 * free["lift"])
    return cover, lift + texture[..., None] * _COLOURS[kinds["colour"]]


def _ground(scene: _Scene, draws: Float64) -> Float32:
    """[F, H, W], a texture without orientation over the whole picture."""
    shift = scene.shift(MOTION["mover"][scene.kinds["mover"]] != "object")
    waves = _waves(draws, _GROUND_WAVES, _GROUND_BAND, (0.0, math.pi / 2), scene.still, scene.still)
    return _drawn(waves, scene.y - shift[0], scene.x - shift[1])


def _occluder(scene: _Scene, draws: Float64) -> tuple[Float32, Float32]:
    """An upright bar: how much of each column it covers, [F, W], and its texture, [F, H, W]."""
    moved = _OCCLUDER_SPEED * scene.time * (scene.kinds["occluder"] - 1)
    centre = scene.free["occluder_x"] * scene.span[1] + moved
    aside = _wrapped(scene.x - centre[:, None], scene.span[1])
    bar = np.clip(0.5 - (np.abs(aside) - _OCCLUDER_HALF_WIDTH) * scene.side, 0.0, 1.0)
    waves = _waves(
        draws, _OCCLUDER_WAVES, _OCCLUDER_BAND, (0.0, math.pi / 2), scene.still, scene.still
    )
    rows = np.broadcast_to(scene.y, (len(aside), scene.y.shape[1]))
    return bar.astype(np.float32), _drawn(waves, rows, aside)


def _travelled(speed: float, acceleration: int, time: Float64, duration: float) -> Float64:
    """Sides moved by each time; every acceleration has the same mean speed over the clip."""
    return speed * (time + _ACCELERATION[acceleration] * (time * time / duration - time))


def _wrapped(offset: Float64, span: float) -> Float64:
    """The nearest of the copies of a place that lie `span` apart: in [-span / 2, span / 2)."""
    return np.mod(offset + span / 2, span) - span / 2


Waves = tuple[Float64, Float64, Float64, Float64]


def _waves(
    draws: Float64,
    count: int,
    band: tuple[float, float],
    angles: tuple[float, float],
    octaves: Float64,
    rotated: Float64,
) -> Waves:
    """Vertical and horizontal frequency, amplitude [F, K] and phase [K] of the waves of a field.

    Args:
        draws: two shifts of the band, then three numbers per wave, in [0, 1).
        band: lowest and highest frequency, cycles per side; places in it are on a log scale.
        angles: centre and half width of the range of angles.
        octaves, rotated: [F] how far the field has been zoomed (higher frequency: smaller) and
            rotated at each frame.
    """
    jitter = draws[2:].reshape(3, count)
    # Evenly spread with jitter, then shifted by one uniform number: the set has the same
    # distribution after any further shift, which zoom and rotation are. The stride of 5 keeps
    # frequency and angle apart.
    evenly = np.arange(count)
    place = (evenly + jitter[0]) / count + draws[0]
    turn = (5 * evenly % count + jitter[1]) / count + draws[1]
    place = np.mod(place + octaves[:, None] / math.log2(band[1] / band[0]), 1.0)
    turn = np.mod(turn + rotated[:, None] / (2 * angles[1]), 1.0)
    frequency = 2 * math.pi * band[0] * (band[1] / band[0]) ** place
    angle = angles[0] + angles[1] * (2 * turn - 1)
    # A full half circle of angles has no ends to fade at: a wave and its opposite are the same.
    faded = 1.0 if angles[1] >= math.pi / 2 else np.sin(math.pi * turn)
    amplitude = np.sin(math.pi * place) * faded
    amplitude /= np.sqrt(np.square(amplitude).sum(1, keepdims=True) / 2)
    return frequency * np.sin(angle), frequency * np.cos(angle), amplitude, 2 * math.pi * jitter[2]


def _drawn(waves: Waves, down: Float64, across: Float64) -> Float32:
    """[F, H, W], the sum of the waves at the places [F, H] x [F, W]: a product, since the cosine of
    a sum splits."""
    vertical, horizontal, amplitude, phase = waves
    by_row = vertical[:, None, :] * down[:, :, None] + phase
    by_column = (horizontal[:, :, None] * across[:, None, :]).astype(np.float32)
    by_row = by_row.astype(np.float32)
    scale = amplitude[:, None, :].astype(np.float32)
    left = np.concatenate([scale * np.cos(by_row), -scale * np.sin(by_row)], axis=2)
    right = np.concatenate([np.cos(by_column), np.sin(by_column)], axis=1)
    drawn: Float32 = left @ right
    return drawn


# Signed distance to the outline in radii, negative inside; the three have about one area.
_WINDOWS: tuple[Callable[[Float32, Float32], Float32], ...] = (
    lambda v, u: np.sqrt(u * u + v * v) - np.float32(1.0),
    lambda v, u: np.maximum(np.abs(u) - np.float32(1.45), np.abs(v) - np.float32(0.54)),
    lambda v, u: np.maximum(np.abs(u) - np.float32(0.54), np.abs(v) - np.float32(1.45)),
)
