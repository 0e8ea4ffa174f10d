"""Reads clips out of video files with PyAV, and still images with Pillow.

What makes PyAV fast here: no codec threads (workers are the parallelism, and starting threads costs
more than a clip), a seek to the key frame before the clip, one reused converter, and conversion of
the wanted frames only, straight to the wanted size.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from jepa.data.clip import BadClipError, Clip, ClipSpec

_local = threading.local()


def _reformatter() -> VideoReformatter:
    """One per thread: it keeps its scaling tables while the sizes stay the same."""
    found: VideoReformatter | None = getattr(_local, "reformatter", None)
    if found is None:
        found = _local.reformatter = VideoReformatter()
    return found


def wanted_frames(spec: ClipSpec, num_frames: int, rate: float, draw: float) -> NDArray[np.int64]:
    """Frame numbers of a clip. `draw` in [0, 1) places its start uniformly; a video that is too
    short repeats its last frame."""
    step = spec.stride if spec.fps is None else rate / spec.fps
    span = math.floor((spec.frames - 1) * step + 1e-9) + 1
    start = int(draw * (max(0, num_frames - span) + 1))
    numbers = start + np.floor(np.arange(spec.frames) * step + 1e-9).astype(np.int64)
    kept: NDArray[np.int64] = np.minimum(numbers, num_frames - 1)
    return kept


def read_video(path: str | Path, spec: ClipSpec, draw: float) -> Clip:
    """Decodes the clip that `draw` picks, upright, scaled to the size of `spec`.

    Raises:
        BadClipError: the file is missing, is no video, or any frame that the clip needs fails to
            decode.
    """
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise BadClipError(f"{path}: no video stream")
            return _read(container, container.streams.video[0], spec, draw, str(path))
    except (av.FFmpegError, OSError) as error:
        raise BadClipError(f"{path}: {error}") from error


def _read(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    spec: ClipSpec,
    draw: float,
    path: str,
) -> Clip:
    stream.thread_type = "NONE"
    rate = stream.average_rate or stream.guessed_rate
    num_frames = _frame_count(container, stream, rate)
    if not rate or num_frames < 1:
        raise BadClipError(f"{path}: neither frame rate nor length is known")
    numbers = wanted_frames(spec, num_frames, float(rate), draw)
    frames, size = _decode(container, stream, spec, numbers, float(rate))
    if not frames:
        raise BadClipError(f"{path}: no frame could be decoded")
    # The header may promise more frames than the file holds: like a short video, it repeats its
    # last frame.
    while len(frames) < spec.frames:
        frames.append(frames[-1])
    return Clip(np.stack(frames), *size)


def _frame_count(
    container: av.container.InputContainer, stream: av.VideoStream, rate: Fraction | None
) -> int:
    if stream.frames > 0:
        return stream.frames
    if not rate:
        return 0
    if stream.duration is not None and stream.time_base is not None:
        return max(1, round(float(stream.duration * stream.time_base) * float(rate)))
    return (
        max(1, round(container.duration / av.time_base * float(rate))) if container.duration else 0
    )


def _numbered_frames(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    numbers: NDArray[np.int64],
    rate: float,
) -> Iterator[tuple[int, av.VideoFrame]]:
    """(number, frame) in display order from the key frame before the first of `numbers`; others of
    them may be left out on the way."""
    origin, base = stream.start_time or 0, float(stream.time_base or 0)
    if numbers[0] > 0 and base > 0:
        # Half a frame early, so that rounding of the time base cannot land behind the frame.
        container.seek(origin + int((numbers[0] - 0.5) / rate / base), stream=stream, backward=True)
    # AVI stores times in coding order: with B frames they jump to and fro and start one late, while
    # frames come out in display order. So count there, from the key frame.
    count_only = container.format.name == "avi"
    # At a constant rate every number exists, and a frame that is neither wanted nor referred to by
    # others need not be decoded.
    may_skip = not count_only and stream.average_rate == stream.base_rate
    wanted = set(numbers.tolist())
    number = -1
    for packet in container.demux(stream):
        if may_skip and packet.pts is not None:
            needed = round((packet.pts - origin) * base * rate) in wanted
            stream.codec_context.skip_frame = "DEFAULT" if needed else "NONREF"
        for frame in packet.decode():
            if frame.pts is None or (count_only and number >= 0):
                number += 1
            else:
                late = int(count_only and stream.codec_context.has_b_frames)
                number = max(0, round((frame.pts - origin) * base * rate) - late)
            yield number, frame


def _decode(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    spec: ClipSpec,
    numbers: NDArray[np.int64],
    rate: float,
) -> tuple[list[NDArray[np.uint8]], tuple[int, int]]:
    """The frames with the given numbers (the first at or after each), and the upright size of the
    picture."""
    first = int(numbers[0])
    numbered = _numbered_frames(container, stream, numbers, rate)
    head = next(numbered, None)
    if first > 0 and (head is None or head[0] > first):
        # The index of the file led past the clip: decode from the start.
        container.seek(stream.start_time or 0, stream=stream, backward=True)
        numbered = _numbered_frames(container, stream, np.concatenate([[0], numbers]), rate)
        head = next(numbered, None)
    frames: list[NDArray[np.uint8]] = []
    size = (0, 0)
    for number, frame in chain([head] if head is not None else [], numbered):
        if number < numbers[len(frames)]:
            continue
        picture, size = _picture(frame, spec)
        while len(frames) < len(numbers) and number >= numbers[len(frames)]:
            frames.append(picture)
        if len(frames) == len(numbers):
            break
    return frames, size


def _picture(frame: av.VideoFrame, spec: ClipSpec) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """Pixels [H, W, 3] at the size of `spec`, turned upright; and the upright source size."""
    turns = round(frame.rotation / 90) % 4
    sideways = turns % 2 == 1
    height, width = (spec.width, spec.height) if sideways else (spec.height, spec.width)
    scaled = _reformatter().reformat(
        frame, width=width, height=height, format="rgb24", interpolation="BILINEAR", threads=1
    )
    pixels: NDArray[np.uint8] = np.ascontiguousarray(
        np.rot90(scaled.to_ndarray(), turns), dtype=np.uint8
    )
    return pixels, (frame.width, frame.height) if sideways else (frame.height, frame.width)


def read_image(path: str | Path, spec: ClipSpec) -> Clip:
    """One image as a clip of one frame, scaled to the size of `spec`, or BadClipError."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            # JPEG decodes at a half, quarter or eighth in much less time, if that still covers what
            # is wanted.
            image.draft("RGB", (spec.width, spec.height))
            scaled = image.convert("RGB").resize(
                (spec.width, spec.height), Image.Resampling.BILINEAR
            )
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise BadClipError(f"{path}: {error}") from error
    return Clip(np.asarray(scaled)[None], height, width)
