"""Reads clips out of video files with PyAV, and still images with Pillow.

A frame's number is its place in a decode of the whole file, whatever its time stamp says. The
packets of a file, read once without decoding, tell the numbers, so that a clip can start at the key
frame before it. Where packets cannot tell, frames are counted from the top.

What makes PyAV fast here: no codec threads (workers are the parallelism, and starting threads costs
more than a clip), a seek to the key frame before the clip, one reused converter, and conversion of
the wanted frames only, straight to the wanted size.
"""

from __future__ import annotations

import math
import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from PIL import ExifTags, Image

from jepa.data.clip import BadClipError, Clip, ClipSpec

# What PyAV and Pillow raise for damaged files: their parsers trust what they read.
_DAMAGED = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    av.FFmpegError,
    Image.DecompressionBombError,
)
# Decoders that leave out a frame that no other refers to when asked to, and nothing else: the tests
# read numbered frames of each. Others ignore the request or honour it late (libdav1d).
_SKIPPING = frozenset({"h264", "hevc", "mpeg2video", "mpeg4", "vp8"})
# One picture out for every packet in, in display order, so that counting packets counts pictures.
_STEADY = frozenset({"mpeg1video", "mpeg2video", "mpeg4", "msmpeg4v2", "msmpeg4v3", "h263"})
# A B frame refers to at most so many frames ahead.
_REORDERED = 16
_NEVER = -(1 << 62)
_MAX_PIXELS = 1 << 28
_HELD_BYTES = 16 << 20
_REMEMBERED = 64
# EXIF orientation to what makes the picture upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Changes when a file gives other frames or pixels than before, so that features kept on disk are
# computed anew.
READER = 2

_local = threading.local()


class _OutOfStepError(Exception):
    """Frames came out other than the packets promised: they must be counted instead."""


@dataclass(frozen=True)
class _Packets:
    """What the packets of a file tell about its frames.

    Attributes:
        order: ``times``: a frame's number is the place of its time stamp among all; ``steady``:
            time stamps are not to be trusted, but packet n gives frame n - delay; ``counted``:
            packets do not tell, frames are counted from the top.
        times: [frames], time stamps of the frames in display order; of ``steady``, the decoding
            times of the packets; of ``counted``, of the right length only.
        key_times: time stamps of the packets that decoding can start at.
        seek_times: [keys], the decoding times of those packets, which some containers seek by.
        key_places: [keys], their places among all packets of the stream.
        key_sizes: [keys], their bytes: time stamps may be guessed otherwise after a seek.
    """

    order: Literal["times", "steady", "counted"]
    times: NDArray[np.int64]
    key_times: NDArray[np.int64]
    seek_times: NDArray[np.int64]
    key_places: NDArray[np.int64]
    key_sizes: NDArray[np.int64]

    @classmethod
    def counted(cls, frames: int) -> _Packets:
        none = np.empty(0, dtype=np.int64)
        return cls("counted", np.arange(frames), none, none, none, none)

    def latest_key(self, number: int) -> int:
        """The last key that frame `number` can be decoded from."""
        # Frames stored after a key packet may be shown before it, and are lost.
        first = number if self.order == "times" else max(0, number - _REORDERED)
        return int(np.searchsorted(self.key_times, self.times[first], side="right")) - 1


def _reformatter() -> VideoReformatter:
    """One per thread: it keeps its scaling tables while the sizes stay the same."""
    found: VideoReformatter | None = getattr(_local, "reformatter", None)
    if found is None:
        found = _local.reformatter = VideoReformatter()
    return found


def wanted_frames(
    spec: ClipSpec,
    num_frames: int,
    rate: float,
    draw: float,
    seconds: NDArray[np.float64] | None = None,
) -> NDArray[np.int64]:
    """Frame numbers of a clip. `draw` in [0, 1) places its start uniformly; a video that is too
    short repeats its last frame.

    Args:
        spec: what to cut; with `spec.fps`, frames are 1 / fps apart, else `spec.stride` frames.
        num_frames, rate: of the video.
        seconds: [num_frames] times of the frames where the rate varies: with `spec.fps` the clip
            holds the frames that are shown at its times.
    """
    if seconds is not None and spec.fps is not None:
        offsets = np.arange(spec.frames) / spec.fps
        fitting = int(np.searchsorted(seconds, seconds[-1] - offsets[-1] + 1e-6, side="right"))
        start = int(draw * max(1, fitting))
        shown = np.searchsorted(seconds, seconds[start] + offsets + 1e-6, side="right") - 1
        within: NDArray[np.int64] = np.minimum(shown, num_frames - 1)
        return within
    step = spec.stride if spec.fps is None else rate / spec.fps
    span = math.floor((spec.frames - 1) * step + 1e-9) + 1
    start = int(draw * (max(0, num_frames - span) + 1))
    numbers = start + np.floor(np.arange(spec.frames) * step + 1e-9).astype(np.int64)
    kept: NDArray[np.int64] = np.minimum(numbers, num_frames - 1)
    return kept


def read_video(path: str | Path, spec: ClipSpec, draw: float) -> Clip:
    """Decodes the clip that `draw` picks, upright, scaled to the size of `spec`.

    Frames are exactly those of a decode of the whole file with the numbers of `wanted_frames`.
    Alpha is ignored. The size of the source is in square pixels.

    Raises:
        BadClipError: the file is missing, is no video, or any frame that the clip needs fails to
            decode.
    """
    try:
        return _read(str(path), spec, draw)
    except BadClipError:
        raise
    except _DAMAGED as error:
        raise BadClipError(f"{path}: {error or type(error).__name__}") from error


def _open(path: str) -> tuple[InputContainer, av.VideoStream]:
    # Old tools write tags in other encodings than UTF-8; nothing here reads them.
    container = av.open(path, metadata_errors="replace")
    videos = [
        stream
        for stream in container.streams.video
        if not stream.disposition & Disposition.attached_pic
    ]
    # A codec that FFmpeg cannot decode has no context.
    if not videos or videos[0].codec_context is None:
        container.close()
        raise BadClipError(f"{path}: no video stream that can be decoded")
    stream = videos[0]
    stream.thread_type = "NONE"
    if stream.codec_context.width * stream.codec_context.height > _MAX_PIXELS:
        size = f"{stream.codec_context.width} x {stream.codec_context.height}"
        container.close()
        raise BadClipError(f"{path}: pictures of {size} are too large")
    return container, stream


def _read(path: str, spec: ClipSpec, draw: float) -> Clip:
    status = os.stat(path)
    key = (path, status.st_size, status.st_mtime_ns)
    packets, held = _remembered().get(key), None
    container, stream = _open(path)
    try:
        if packets is None:
            packets, held = _scan(container, stream)
        if packets.order != "counted":
            numbers = _numbers(stream, packets, spec, draw, path)
            latest = packets.latest_key(int(numbers[0]))
            if held is not None:
                source = iter(held[packets.key_places[latest] :])
            else:
                source = _landed(container, stream, packets, latest)
            numbered = _by_time if packets.order == "times" else _by_place
            try:
                clip = _clip(numbered(source, stream, packets, numbers), numbers, stream, spec)
            except _OutOfStepError:
                packets = None
            else:
                _remember(key, packets)
                return clip
    finally:
        container.close()
    if packets is None or not len(packets.times):
        packets = _Packets.counted(_count(path))
    _remember(key, packets)
    container, stream = _open(path)
    with container:
        numbers = _numbers(stream, packets, spec, draw, path)
        return _clip(enumerate(_decoded(container, stream)), numbers, stream, spec)


def _remembered() -> OrderedDict[tuple[str, int, int], _Packets]:
    """What is known of the files that this thread read last: `encode` takes several clips of
    each."""
    known: OrderedDict[tuple[str, int, int], _Packets] | None = getattr(_local, "packets", None)
    if known is None:
        known = _local.packets = OrderedDict()
    return known


def _remember(key: tuple[str, int, int], packets: _Packets) -> None:
    known = _remembered()
    known[key] = packets
    known.move_to_end(key)
    if len(known) > _REMEMBERED:
        known.popitem(last=False)


def _scan(
    container: InputContainer, stream: av.VideoStream
) -> tuple[_Packets, list[av.Packet[av.VideoStream]] | None]:
    """Reads every packet, decodes none; of a file that is not large, also the packets."""
    context = stream.codec_context
    hides = context.name == "vp8"
    held: list[av.Packet[av.VideoStream]] | None = []
    size = 0
    stamps: list[int | None] = []
    placed: list[int] = []
    keys: list[tuple[int, int, int, int]] = []
    for place, packet in enumerate(container.demux(stream)):
        if held is not None:
            held.append(packet)
            size += packet.size
            if size > _HELD_BYTES:
                held = None
        time, decoding_time = packet.pts, packet.dts
        if time is None:
            time = _NEVER
        if decoding_time is None:
            decoding_time = time
        if packet.is_keyframe and packet.size:
            keys.append((time, decoding_time, place, packet.size))
        # The last packet is empty. Edit lists leave frames out. VP8 has frames that are only
        # referred to, and says so in the first byte.
        if packet.size and not packet.is_discard and not (hides and not memoryview(packet)[0] & 16):
            stamps.append(time)
            placed.append(decoding_time)
    return _understood(
        np.array(stamps, dtype=np.int64),
        np.array(placed, dtype=np.int64),
        np.array(keys, dtype=np.int64).reshape(-1, 4),
        stream,
    ), held


def _understood(
    stamps: NDArray[np.int64],
    placed: NDArray[np.int64],
    keys: NDArray[np.int64],
    stream: av.VideoStream,
) -> _Packets:
    """What the time stamps and decoding times of the frames, and those of the key packets with
    their places and sizes, tell."""
    context = stream.codec_context
    key_times, seek_times, key_places, key_sizes = keys.T
    times = np.unique(stamps)
    if not len(times) or not len(keys) or key_places[0] != 0:
        return _Packets.counted(0)
    # AVI stores times in coding order, which is not the order that frames come out in.
    if stream.container.format.name == "avi" and context.has_b_frames:
        if context.name in _STEADY and (np.diff(placed) > 0).all():
            return _Packets("steady", placed, seek_times, seek_times, key_places, key_sizes)
        return _Packets.counted(0)
    # Two fields in two packets make one frame. A decoder drops what is shown before the first key.
    fields = context.name == "h264" and context.field_order > 1
    known = len(times) == len(stamps) and times[0] >= key_times[0] > _NEVER
    if fields or not known or (np.diff(key_times) <= 0).any():
        return _Packets.counted(0)
    return _Packets("times", times, key_times, seek_times, key_places, key_sizes)


def _count(path: str) -> int:
    container, stream = _open(path)
    with container:
        count = sum(1 for _ in _decoded(container, stream))
    return count


def _decoded(container: InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """Every frame from the top. Without the first key frame some decoders fail until the next."""
    begun = False
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            if begun:
                raise
            continue
        for frame in frames:
            begun = True
            yield frame


def _numbers(
    stream: av.VideoStream, packets: _Packets, spec: ClipSpec, draw: float, path: str
) -> NDArray[np.int64]:
    count = len(packets.times)
    if not count:
        raise BadClipError(f"{path}: no frame could be decoded")
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    seconds = None
    if spec.fps is not None and packets.order == "times" and stream.time_base is not None:
        seconds = (packets.times - packets.times[0]) * float(stream.time_base)
        # Containers round times: within a quarter of a frame the rate is constant.
        if rate and np.abs(seconds * rate - np.arange(count)).max() < 0.25:
            seconds = None
    if spec.fps is not None and seconds is None and not rate:
        raise BadClipError(f"{path}: the frame rate is not known")
    return wanted_frames(spec, count, rate, draw, seconds)


def _landed(
    container: InputContainer, stream: av.VideoStream, packets: _Packets, latest: int
) -> Iterator[av.Packet[av.VideoStream]]:
    """Packets from a key packet on that is not after key `latest`, or _OutOfStepError."""
    steady = packets.order == "steady"
    for target in (
        packets.key_times[latest],
        packets.seek_times[latest],
        packets.seek_times[max(0, latest - 1)],
        packets.seek_times[max(0, latest - 4)],
        packets.seek_times[0],
    ):
        container.seek(int(target), stream=stream, backward=True)
        demuxed = container.demux(stream)
        packet = next((packet for packet in demuxed if packet.is_keyframe and packet.size), None)
        if packet is None:
            continue
        time = packet.dts if steady else packet.pts
        key = -1 if time is None else int(np.searchsorted(packets.key_times, time))
        known = 0 <= key <= latest and packets.key_times[key] == time
        if known and packets.key_sizes[key] == packet.size:
            return chain([packet], demuxed)
    raise _OutOfStepError


def _by_time(
    source: Iterator[av.Packet[av.VideoStream]],
    stream: av.VideoStream,
    packets: _Packets,
    numbers: NDArray[np.int64],
) -> Iterator[tuple[int, av.VideoFrame]]:
    """(number, frame) from a key frame on, in display order; frames that are not wanted may be
    left out."""
    times = packets.times
    wanted = set(times[numbers].tolist())
    context = stream.codec_context
    may_skip = context.name in _SKIPPING
    previous = -1
    for packet in source:
        if may_skip:
            needed = packet.pts is None or packet.pts in wanted
            context.skip_frame = "DEFAULT" if needed else "NONREF"
        for frame in packet.decode():
            if frame.pts is None:
                raise _OutOfStepError
            number = int(np.searchsorted(times, frame.pts))
            if number == len(times) or times[number] != frame.pts or number <= previous:
                raise _OutOfStepError
            if not may_skip and previous >= 0 and number != previous + 1:
                raise _OutOfStepError
            previous = number
            yield number, frame


def _by_place(
    source: Iterator[av.Packet[av.VideoStream]],
    stream: av.VideoStream,
    packets: _Packets,
    numbers: NDArray[np.int64],
) -> Iterator[tuple[int, av.VideoFrame]]:
    """(number, frame) from a key frame on, in display order, every one."""
    number = -1
    for packet in source:
        frames = packet.decode()
        if packet.size and frames:
            if packet.dts is None:
                raise _OutOfStepError
            place = int(np.searchsorted(packets.times, packet.dts))
            expected = place - int(stream.codec_context.has_b_frames)
            if len(frames) > 1 or number not in (-1, expected - 1):
                raise _OutOfStepError
            number = expected - 1
        for frame in frames:
            number += 1
            yield number, frame


def _clip(
    numbered: Iterator[tuple[int, av.VideoFrame]],
    numbers: NDArray[np.int64],
    stream: av.VideoStream,
    spec: ClipSpec,
) -> Clip:
    """The wanted frames.

    Raises:
        _OutOfStepError: one of them did not come.
        BadClipError: one of them is damaged.
    """
    frames: list[NDArray[np.uint8]] = []
    size = (0, 0)
    for number, frame in numbered:
        if number < numbers[len(frames)]:
            continue
        if number > numbers[len(frames)]:
            raise _OutOfStepError
        if frame.is_corrupt:
            raise BadClipError(f"{stream.container.name}: frame {number} is damaged")
        picture, size = _picture(frame, stream, spec)
        while len(frames) < len(numbers) and number == numbers[len(frames)]:
            frames.append(picture)
        if len(frames) == len(numbers):
            return Clip(np.stack(frames), *size)
    raise _OutOfStepError


def _picture(
    frame: av.VideoFrame, stream: av.VideoStream, spec: ClipSpec
) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """Pixels [H, W, 3] at the size of `spec`, rotated upright; and the upright source size in
    square pixels."""
    turns = round(frame.rotation / 90) % 4
    sideways = turns % 2 == 1
    height, width = (spec.width, spec.height) if sideways else (spec.height, spec.width)
    scaled = _reformatter().reformat(
        frame, width=width, height=height, format="rgb24", interpolation="BILINEAR", threads=1
    )
    pixels: NDArray[np.uint8] = np.ascontiguousarray(
        np.rot90(scaled.to_ndarray(), turns), dtype=np.uint8
    )
    # Ratios near 1 come from rounding the size, absurd ones from damage.
    ratio = float(stream.sample_aspect_ratio or 1)
    square = abs(ratio - 1) < 0.02 or not 0.1 < ratio < 10
    across = frame.width if square else round(frame.width * ratio)
    return pixels, (across, frame.height) if sideways else (frame.height, across)


def read_image(path: str | Path, spec: ClipSpec) -> Clip:
    """One image as a clip of one frame, upright, scaled to the size of `spec`, or BadClipError.

    Deeper pixels are scaled to eight bits: integers from 16 bits, floats from [0, 1] (or, where the
    image has larger values, from [0, 255] or [0, 65535]). Alpha is ignored.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > _MAX_PIXELS:
                raise BadClipError(f"{path}: pictures of {width} x {height} are too large")
            orientation = _orientation(image)
            sideways = orientation >= 5
            size = (spec.height, spec.width) if sideways else (spec.width, spec.height)
            # JPEG decodes at a half, quarter or eighth in much less time, if that still covers what
            # is wanted.
            image.draft("RGB", size)
            scaled = _eight_bits(image, path).resize(size, Image.Resampling.BILINEAR)
    except BadClipError:
        raise
    except _DAMAGED as error:
        raise BadClipError(f"{path}: {error or type(error).__name__}") from error
    if orientation in _UPRIGHT:
        scaled = scaled.transpose(_UPRIGHT[orientation])
    if sideways:
        width, height = height, width
    return Clip(np.asarray(scaled)[None], height, width)


def _orientation(image: Image.Image) -> int:
    """1 to 8 as EXIF has it; 1 where the tag is absent or cannot be read."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DAMAGED:
        return 1
    # Pillow turns TIFF upright itself.
    return value if value in _UPRIGHT and image.format != "TIFF" else 1


def _eight_bits(image: Image.Image, path: str | Path) -> Image.Image:
    if not image.mode.startswith(("I", "F")):
        return image.convert("RGB")
    values = np.asarray(image).astype(np.float32)
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(high) and low >= 0.0):
        raise BadClipError(f"{path}: grey values must be at least 0, got {low}")
    white = 65535.0
    if image.mode == "F":
        white = next((limit for limit in (1.0, 255.0, 65535.0) if high <= limit), 0.0)
    if high > white:
        raise BadClipError(f"{path}: grey values must be at most 65535, got {high}")
    grey = np.rint(values * (255.0 / white)).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
