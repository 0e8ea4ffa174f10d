"""Named frame sizes and clip lengths, and the token counts they cost.

A resolution is `height x width` in pixels; both are multiples of the patch. Tokens are what a model
pays for, so every table and axis shows them next to the pixels. Grid letters follow the house
style: (T, H, W) in tubelets and patches, N = T * H * W.
"""

from __future__ import annotations

from dataclasses import dataclass

PATCH_SIZE = 16
TUBELET_SIZE = 2

# Square crops used by public video encoders, from thumbnails to the high-resolution cool-down
# stage.
SQUARE_SIZES = (64, 96, 112, 128, 160, 192, 224, 256, 288, 320, 384, 448, 512)
# Whole frames of common sources, rounded down to whole patches (UCF-101 is 240 x 320).
NAMED_SIZES = {
    "ucf101": (240, 320),
    "240p": (240, 416),
    "360p": (352, 640),
    "480p": (480, 848),
    "720p": (720, 1280),
}
CLIP_LENGTHS = {"still": 1, "8f": 8, "16f": 16, "32f": 32, "64f": 64}


@dataclass(frozen=True, order=True)
class Resolution:
    """One frame size in pixels. `name` is what tables print: "224" for a square, "240x320"
    otherwise."""

    height: int
    width: int

    def __post_init__(self) -> None:
        for axis in ("height", "width"):
            value = getattr(self, axis)
            if value <= 0 or value % PATCH_SIZE:
                raise ValueError(
                    f"resolution: {axis} must be a positive multiple of {PATCH_SIZE} pixels, got "
                    f"{value}."
                )

    @property
    def name(self) -> str:
        return str(self.height) if self.height == self.width else f"{self.height}x{self.width}"

    @property
    def pixels(self) -> int:
        return self.height * self.width

    def grid(
        self, frames: int, *, tubelet_size: int = TUBELET_SIZE, patch_size: int = PATCH_SIZE
    ) -> tuple[int, int, int]:
        """(T, H, W) in tokens; a single frame is an image and has T = 1."""
        if frames != 1 and (frames <= 0 or frames % tubelet_size):
            raise ValueError(
                f"resolution: frames must be 1 or a positive multiple of {tubelet_size}, got "
                f"{frames}."
            )
        return (
            (1 if frames == 1 else frames // tubelet_size),
            self.height // patch_size,
            self.width // patch_size,
        )

    def tokens(
        self, frames: int, *, tubelet_size: int = TUBELET_SIZE, patch_size: int = PATCH_SIZE
    ) -> int:
        depth, rows, columns = self.grid(frames, tubelet_size=tubelet_size, patch_size=patch_size)
        return depth * rows * columns


def parse_resolution(text: str) -> Resolution:
    """ "224" (square), "240x320" (height x width) or a name of `NAMED_SIZES`."""
    key = text.strip().lower()
    if key in NAMED_SIZES:
        return Resolution(*NAMED_SIZES[key])
    parts = key.split("x")
    if len(parts) not in (1, 2) or not all(part.isdigit() for part in parts):
        known = ", ".join(NAMED_SIZES)
        raise ValueError(
            f"resolution: text must be a number, HEIGHTxWIDTH or one of {known}, got {text!r}."
        )
    height, width = int(parts[0]), int(parts[-1])
    return Resolution(height, width)


def parse_frames(text: str) -> int:
    """A number of frames, or a name of `CLIP_LENGTHS`."""
    key = text.strip().lower()
    if key in CLIP_LENGTHS:
        return CLIP_LENGTHS[key]
    if not key.isdigit() or int(key) == 0:
        raise ValueError(
            f"resolution: frames must be a positive number or one of {', '.join(CLIP_LENGTHS)}, "
            f"got {text!r}."
        )
    return int(key)
