"""moving_shapes: one textured shape that moves over a still background, drawn on the fly. No files;
any size and length.

Appearance factors and motion factors are independent and uniform, so that probes can ask for either
alone. One frame says nothing about any motion factor, by construction and not only for weak probes:
the arena wraps around and the start is uniform over it, so the position is uniform at every time
whatever the motion; the start angle is uniform; the shape is hidden a quarter of the time in every
occlusion class, at a uniform phase. The motion factors show in how frames follow one another, and
nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jepa.counter_rng import Stream, stream_id, uniforms
from jepa.data.clip import Clip, ClipSpec

Float32 = NDArray[np.float32]

SHAPES = ("square", "triangle", "cross", "ellipse", "half_disc", "corner")
TEXTURES = ("solid", "stripes", "checks", "dots")
COLOURS = ("red", "yellow", "green", "cyan", "blue", "magenta")
BACKGROUNDS = ("plain", "gradient", "clouds", "bars")
APPEARANCE = {"shape": SHAPES, "texture": TEXTURES, "colour": COLOURS, "background": BACKGROUNDS}
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
    "oscillation": ("none", "slow", "fast"),
    "acceleration": ("braking", "steady", "speeding"),
    "occlusion": ("one_long", "two_medium", "four_short"),
}
FACTORS = {**APPEARANCE, **MOTION}

# Shares of the frame side per frame, turns per frame, wobbles per 16 frames, and times hidden per
# clip.
_SPEED = (0.0125, 0.025, 0.05)
_ROTATION = (-1 / 48, 0.0, 1 / 48)
_WOBBLES = (0.0, 1.0, 3.0)
_WOBBLE_SIZE = 0.06
_ACCELERATION = (-0.8, 0.0, 0.8)
_TIMES_HIDDEN = (1, 2, 4)
_HIDDEN_SHARE = 0.25
_SUBPIXEL = np.float32(0.5)
# Numbers per sample: the factors first, then what is random without being a factor.
_NUISANCES = (
    "x",
    "y",
    "angle",
    "wobble_phase",
    "hidden_phase",
    "radius",
    "value",
    "texture_phase",
    "background_value",
    "background_angle",
)
_CLOUD_CELLS = 5
_NUM_DRAWS = len(FACTORS) + len(_NUISANCES) + _CLOUD_CELLS**2


class MovingShapes:
    """`size` clips of a split. Sample i depends on (seed, split, i) only, and on the size and
    length asked for.

    Args:
        size: number of samples; indices beyond it are an error, though any number of clips exists.
        seed: key of all random numbers.
        split: "train" or "test"; their samples never coincide.
        target: the factor that `label` gives, None for the first one.
    """

    name = "moving_shapes"
    still = False
    questions = FACTORS

    def __init__(
        self, size: int = 10000, seed: int = 0, split: str = "train", target: str | None = None
    ) -> None:
        target = next(iter(FACTORS)) if target is None else target
        if size < 1:
            raise ValueError(f"MovingShapes: size must be at least 1, got {size}.")
        if split not in ("train", "test"):
            raise ValueError(f"MovingShapes: split must be 'train' or 'test', got {split!r}.")
        if target not in FACTORS:
            raise ValueError(
                f"MovingShapes: target must be one of {', '.join(FACTORS)}, got {target!r}."
            )
        self.size, self.seed, self.split, self.target = size, seed, split, target
        self.num_classes = len(FACTORS[target])
        self._stream = stream_id(Stream.SHAPES, ("train", "test").index(split))

    def __len__(self) -> int:
        return self.size

    def may_flip(self, index: int) -> bool:
        """Never: mirroring swaps directions and turns."""
        return False

    def where(self, index: int) -> str:
        return f"moving_shapes/{self.split}/{self.seed}/{index}"

    def label(self, index: int) -> int:
        return int(self.factors([index])[self.target][0])

    def factors(self, indices: ArrayLike) -> dict[str, NDArray[np.int64]]:
        """Class of every factor for every sample."""
        draws = self._draws(np.asarray(indices, dtype=np.int64))
        return {
            name: (draws[:, k] * len(values)).astype(np.int64)
            for k, (name, values) in enumerate(FACTORS.items())
        }

    def read(self, index: int, spec: ClipSpec, draw: float = 0.0) -> Clip:
        """The clip of a sample at the size asked for. Stride, fps and `draw` have no meaning here:
        the motion is defined per frame."""
        frames = self.render(index, spec.frames, spec.height, spec.width)
        return Clip(frames, spec.height, spec.width)

    def render(self, index: int, frames: int, height: int, width: int) -> NDArray[np.uint8]:
        """[frames, height, width, 3] of one sample."""
        draws, kinds, free = self._look(index)
        path = _trajectory(kinds, free, frames, height, width)
        return _painted(draws, kinds, free, path, height, width)

    def follow(
        self, index: int, places: NDArray[np.float64], height: int, width: int
    ) -> NDArray[np.uint8]:
        """The shape and background of a sample along a path of the caller's: what an agent sees
        that moves the shape.

        Args:
            index: of the sample; its motion factors have no say.
            places: [frames, 2], centre (x, y) as shares of the frame's width and height; the arena
                wraps around.
            height, width: in pixels.

        Returns:
            [frames, height, width, 3], the shape in view in every frame and never rotated.
        """
        draws, kinds, free = self._look(index)
        x, y = np.mod(places, 1.0).T
        still = np.full(len(places), 2 * math.pi * free["angle"])
        path = y * height, x * width, still, np.ones(len(places), dtype=np.bool_)
        return _painted(draws, kinds, free, path, height, width)

    def _look(self, index: int) -> tuple[NDArray[np.float64], dict[str, int], dict[str, float]]:
        """The numbers of a sample, its factors and what else is random about it."""
        draws = self._draws(np.array([index]))[0]
        kinds = {
            name: int(draws[k] * len(values)) for k, (name, values) in enumerate(FACTORS.items())
        }
        return draws, kinds, dict(zip(_NUISANCES, draws[len(FACTORS) :].tolist()))

    def _draws(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        if indices.size and (indices.min() < 0 or indices.max() >= self.size):
            raise IndexError(
                f"MovingShapes: index must lie in [0, {self.size}), got {indices.min()} to "
                f"{indices.max()}."
            )
        return uniforms(self.seed, 0, indices, self._stream, _NUM_DRAWS)


Path = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]


def _painted(
    draws: NDArray[np.float64],
    kinds: dict[str, int],
    free: dict[str, float],
    path: Path,
    height: int,
    width: int,
) -> NDArray[np.uint8]:
    """[frames, height, width, 3]: the shape along a path, over its background."""
    centre_y, centre_x, angle, seen = path
    background = _background(kinds["background"], free, draws[-(_CLOUD_CELLS**2) :], height, width)
    out = np.empty((len(seen), height, width, 3), dtype=np.uint8)
    out[:] = np.rint(background).astype(np.uint8)
    if not seen.any():
        return out
    radius = min(height, width) * (0.15 + 0.05 * free["radius"])
    reach = math.ceil(radius * 1.05) + 1
    offset = np.arange(-reach, reach + 2)
    rows, columns = (
        np.floor(centre_y[seen])[:, None] + offset,
        np.floor(centre_x[seen])[:, None] + offset,
    )
    # Pixel centres relative to the shape, rotated into its own axes and measured in radii.
    down = ((rows + 0.5 - centre_y[seen, None]) / radius).astype(np.float32)[:, :, None]
    across = ((columns + 0.5 - centre_x[seen, None]) / radius).astype(np.float32)[:, None, :]
    cosine = np.array([math.cos(a) for a in angle[seen]], dtype=np.float32)[:, None, None]
    sine = np.array([math.sin(a) for a in angle[seen]], dtype=np.float32)[:, None, None]
    u, v = cosine * across + sine * down, cosine * down - sine * across
    scale = np.float32(radius)
    cover = np.clip(_SUBPIXEL - _DISTANCE[kinds["shape"]](u, v) * scale, 0.0, 1.0)[..., None]
    dark = _TEXTURE[kinds["texture"]](u, v, np.float32(free["texture_phase"]), scale)
    colour = _colour(kinds["colour"], 0.75 + 0.25 * free["value"])
    paint = colour * (1.0 - np.float32(0.65) * dark)[..., None]

    frame = np.flatnonzero(seen)[:, None, None]
    at_row, at_column = (
        (rows % height).astype(np.int64)[:, :, None],
        (columns % width).astype(np.int64)[:, None, :],
    )
    behind = background[at_row, at_column]
    out[frame, at_row, at_column] = np.rint(behind + cover * (paint - behind)).astype(np.uint8)
    return out


def _trajectory(
    kinds: dict[str, int], free: dict[str, float], frames: int, height: int, width: int
) -> Path:
    """Centre (y, x) in pixels, angle, and whether the shape is in view, per frame."""
    time = np.arange(frames, dtype=np.float64)
    share = time / frames
    travelled = (
        _SPEED[kinds["speed"]]
        * frames
        * (share + _ACCELERATION[kinds["acceleration"]] * (share * share - share))
    )
    heading = kinds["direction"] * (math.pi / 4)
    cycles = _WOBBLES[kinds["oscillation"]] * time / 16 + free["wobble_phase"]
    aside = np.array([_WOBBLE_SIZE * math.sin(2 * math.pi * c) for c in cycles])
    if kinds["oscillation"] == 0:
        aside = np.zeros(frames)
    side = min(height, width)
    x = free["x"] * width + side * (travelled * math.cos(heading) - aside * math.sin(heading))
    y = free["y"] * height + side * (travelled * math.sin(heading) + aside * math.cos(heading))
    angle = 2 * math.pi * (free["angle"] + _ROTATION[kinds["rotation"]] * time)
    seen = (
        np.mod(_TIMES_HIDDEN[kinds["occlusion"]] * share + free["hidden_phase"], 1.0)
        >= _HIDDEN_SHARE
    )
    return np.mod(y, height), np.mod(x, width), angle, seen


def _box(u: Float32, v: Float32, half_width: float, half_height: float) -> Float32:
    distance: Float32 = np.maximum(
        np.abs(u) - np.float32(half_width), np.abs(v) - np.float32(half_height)
    )
    return distance


def _triangle(u: Float32, v: Float32) -> Float32:
    distance: Float32 = np.maximum(
        -v - np.float32(0.5), np.float32(0.866) * np.abs(u) + np.float32(0.5) * v - np.float32(0.5)
    )
    return distance


def _ellipse(u: Float32, v: Float32) -> Float32:
    return np.float32(0.5) * (np.sqrt(u * u + np.float32(4.0) * v * v) - np.float32(1.0))


# Signed distance to the outline in radii (approximate far from it), negative inside. No shape looks
# the same after a small turn.
_DISTANCE: tuple[Callable[[Float32, Float32], Float32], ...] = (
    lambda u, v: _box(u, v, 0.72, 0.72),
    _triangle,
    lambda u, v: np.minimum(_box(u, v, 0.28, 1.0), _box(u, v, 1.0, 0.28)),
    _ellipse,
    lambda u, v: np.maximum(np.sqrt(u * u + v * v) - np.float32(1.0), -v - np.float32(0.1)),
    lambda u, v: np.minimum(
        _box(u + np.float32(0.4), v, 0.3, 0.9), _box(u, v - np.float32(0.6), 0.7, 0.3)
    ),
)


def _wave(x: Float32, phase: np.float32, scale: np.float32) -> Float32:
    """A triangle wave around zero with period .6 radii, in pixels: its sign gives stripes, its size
    the distance to their edges."""
    cycle = x / np.float32(0.6) + phase
    distance: Float32 = (np.abs(cycle - np.floor(cycle) - np.float32(0.5)) - np.float32(0.25)) * (
        np.float32(0.6) * scale
    )
    return distance


def _smooth(distance: Float32) -> Float32:
    smooth: Float32 = np.clip(_SUBPIXEL + distance, 0.0, 1.0)
    return smooth


def _checks(u: Float32, v: Float32, phase: np.float32, scale: np.float32) -> Float32:
    first, second = _smooth(_wave(u, phase, scale)), _smooth(_wave(v, phase, scale))
    return first + second - np.float32(2.0) * first * second


def _dots(u: Float32, v: Float32, phase: np.float32, scale: np.float32) -> Float32:
    cell_u, cell_v = u / np.float32(0.5) + phase, v / np.float32(0.5) + phase
    off_u, off_v = (
        cell_u - np.floor(cell_u) - np.float32(0.5),
        cell_v - np.floor(cell_v) - np.float32(0.5),
    )
    return _smooth(
        (np.float32(0.3) - np.sqrt(off_u * off_u + off_v * off_v)) * (np.float32(0.5) * scale)
    )


# How dark the paint is, 0 to 1, in the axes of the shape: the texture turns with it.
_TEXTURE: tuple[Callable[[Float32, Float32, np.float32, np.float32], Float32], ...] = (
    lambda u, v, phase, scale: np.zeros_like(u),
    lambda u, v, phase, scale: _smooth(_wave(u, phase, scale)),
    _checks,
    _dots,
)


def _colour(hue: int, value: float) -> Float32:
    """Fully saturated colour on the six corners of the hue circle."""
    corners = ((1, 0, 0), (1, 1, 0), (0, 1, 0), (0, 1, 1), (0, 0, 1), (1, 0, 1))
    return np.array(corners[hue], dtype=np.float32) * np.float32(255.0 * value)


def _background(
    kind: int, free: dict[str, float], clouds: NDArray[np.float64], height: int, width: int
) -> Float32:
    """[H, W, 3] grey picture that never changes within a clip."""
    y, x = (
        np.arange(height, dtype=np.float64)[:, None] / height,
        np.arange(width, dtype=np.float64)[None, :] / width,
    )
    turn = 2 * math.pi * free["background_angle"]
    ramp = x * math.cos(turn) + y * math.sin(turn)
    if BACKGROUNDS[kind] == "plain":
        pattern = np.zeros((height, width))
    elif BACKGROUNDS[kind] == "gradient":
        pattern = ramp - ramp.mean()
    elif BACKGROUNDS[kind] == "clouds":
        knots = clouds.reshape(_CLOUD_CELLS, _CLOUD_CELLS)
        pattern = (_hat_weights(y[:, 0]) @ knots @ _hat_weights(x[0]).T - 0.5) * 1.4
    else:
        pattern = np.where(np.mod(ramp * 6, 1.0) < 0.5, -0.3, 0.3)
    grey = np.clip(90 + 60 * free["background_value"] + 90 * pattern, 0, 255)
    return np.repeat(grey[:, :, None], 3, axis=2).astype(np.float32)


def _hat_weights(share: NDArray[np.float64]) -> NDArray[np.float64]:
    """[n, cells] weights of linear interpolation between evenly spaced knots."""
    place = share * (_CLOUD_CELLS - 1)
    return np.clip(1.0 - np.abs(place[:, None] - np.arange(_CLOUD_CELLS)[None, :]), 0.0, None)
