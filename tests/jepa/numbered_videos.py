"""Videos whose frames carry their number as eight bars, in many codecs and containers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

SIZE, FRAMES = 64, 72


def picture(number: int) -> NDArray[np.uint8]:
    bars = [255 * (number >> bit & 1) for bit in range(8)]
    row = np.repeat(np.array(bars, np.uint8), SIZE // 8)
    return np.tile(row[None, :, None], (SIZE, 1, 3))


def number_of(pixels: NDArray[np.uint8]) -> int:
    middles = [pixels[:, 8 * bit + 2 : 8 * bit + 6].mean() for bit in range(8)]
    return sum(int(middle > 127) << bit for bit, middle in enumerate(middles))


@dataclass(frozen=True)
class Recipe:
    """How to write one file. `milliseconds` are time stamps of the frames; the first `dropped`
    packets are lost; `changed` alters the bytes of the finished file."""

    codec: str
    options: dict[str, str] = field(default_factory=dict)
    pixels: str = "yuv420p"
    container: str | None = None
    container_options: dict[str, str] = field(default_factory=dict)
    milliseconds: Sequence[int] | None = None
    dropped: int = 0
    frames: int = FRAMES
    changed: Callable[[bytes], bytes] | None = None

    def write(self, path: Path) -> None:
        """Writes the frames, 25 per second."""
        with av.open(
            str(path), "w", format=self.container, options=self.container_options
        ) as container:
            stream = container.add_stream(self.codec, rate=25, options=dict(self.options))
            stream.width = stream.height = SIZE
            stream.pix_fmt = self.pixels
            if self.milliseconds is not None:
                stream.codec_context.time_base = Fraction(1, 1000)
            packets = 0
            for number in [*range(self.frames), None]:
                frame = None
                if number is not None:
                    frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
                    if self.milliseconds is not None:
                        frame.pts = self.milliseconds[number]
                        frame.time_base = Fraction(1, 1000)
                for packet in stream.encode(frame):
                    packets += 1
                    if packets > self.dropped:
                        container.mux(packet)
        if self.changed is not None:
            path.write_bytes(self.changed(path.read_bytes()))


def sequential(path: Path) -> list[int]:
    """The numbers in a decode of the whole file; errors before the first frame are passed over."""
    numbers: list[int] = []
    with av.open(str(path), metadata_errors="replace") as container:
        for packet in container.demux(video=0):
            tolerated = av.error.InvalidDataError if not numbers else ()
            with contextlib.suppress(tolerated):
                numbers += [
                    number_of(frame.to_ndarray(format="rgb24")) for frame in packet.decode()
                ]
    return numbers


def _x265(extra: str) -> dict[str, str]:
    return {"x265-params": f"keyint=24:min-keyint=24:bframes=3:scenecut=0:log-level=none:{extra}"}


def _without_index(content: bytes) -> bytes:
    return content[: content.rfind(b"idx1")]


_H264 = {
    "closed": {"g": "24", "bf": "3", "preset": "ultrafast", "x264-params": "open-gop=0:bframes=3"},
    "open": {
        "g": "24",
        "x264-params": "open-gop=1:bframes=3:b-adapt=0:keyint=24:min-keyint=24:scenecut=0",
    },
    "without_b": {"g": "24", "bf": "0"},
    "one_key": {"g": "1000", "bf": "3"},
    "refresh": {"g": "24", "x264-params": "intra-refresh=1:bframes=0"},
    "interlaced": {"g": "24", "flags": "+ilme+ildct", "x264-params": "tff=1:bframes=2"},
}
_VPX = {"g": "24", "cpu-used": "8", "deadline": "realtime"}
_ALTREF = {
    "g": "24",
    "cpu-used": "5",
    "deadline": "good",
    "auto-alt-ref": "1",
    "lag-in-frames": "16",
}
_AV1 = {"g": "48", "preset": "12"}
_B2, _B0 = {"g": "12", "bf": "2"}, {"g": "12", "bf": "0"}
_XVID2, _XVID0 = {**_B2, "vtag": "xvid"}, {**_B0, "vtag": "xvid"}
_VARYING = np.cumsum(np.random.default_rng(3).choice([20, 33, 40, 100, 300], FRAMES)).tolist()
_FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}

RECIPES: dict[str, Recipe] = {
    **{
        f"h264_{kind}.{end}": Recipe("libx264", _H264[kind])
        for kind, ends in {
            "closed": "mp4 mkv mov avi ts flv",
            "open": "mp4 mkv mov avi ts m2ts",
            "without_b": "mp4 mkv avi ts",
            "one_key": "mkv",
            "refresh": "mp4 ts",
            "interlaced": "mp4 ts",
        }.items()
        for end in ends.split()
    },
    **{
        f"hevc_{kind}.{end}": Recipe("libx265", _x265(f"open-gop={int(kind == 'open')}"))
        for kind in ("closed", "open")
        for end in ("mp4", "mkv", "ts")
    },
    **{
        f"{codec}_{kind}.{end}": Recipe(encoder, options)
        for codec, encoder in (("vp8", "libvpx"), ("vp9", "libvpx-vp9"))
        for kind, options in (("plain", _VPX), ("altref", _ALTREF))
        for end in (("webm", "mkv") if codec == "vp8" else ("webm", "mkv", "mp4"))
    },
    **{f"av1.{end}": Recipe("libsvtav1", _AV1) for end in ("mp4", "mkv", "webm")},
    **{
        f"mpeg2_b{b}.{end}": Recipe("mpeg2video", {**_B2, "bf": b})
        for b in "02"
        for end in ("mpg", "vob", "ts", "avi", "mkv", "mp4")
    },
    **{
        f"mpeg4_b{b}.{end}": Recipe("mpeg4", {**_XVID2, "bf": b})
        for b in "02"
        for end in ("avi", "mkv", "mp4", "mov")
    },
    "mpeg1.mpg": Recipe("mpeg1video", _B2),
    **{f"mjpeg.{end}": Recipe("mjpeg", pixels="yuvj420p") for end in ("avi", "mkv", "mov")},
    "loop.gif": Recipe("gif", pixels="rgb8"),
    "windows.wmv": Recipe("wmv2", {"g": "12"}),
    "divx3.avi": Recipe("msmpeg4", {"g": "12"}),
    "flash.flv": Recipe("flv", {"g": "12"}),
    "lossless.avi": Recipe("ffv1"),
    # Without an index.
    "elementary.h264": Recipe("libx264", _H264["closed"], container="h264"),
    "fragments.mp4": Recipe("libx264", _H264["closed"], container_options=_FRAGMENTS),
    "live.mkv": Recipe("libx264", _H264["open"], container_options={"live": "1"}),
    "live.webm": Recipe("libvpx", _VPX, container_options={"live": "1"}),
    "without_index_b2.avi": Recipe("mpeg4", _XVID2, changed=_without_index),
    "without_index_b0.avi": Recipe("mpeg4", _XVID0, changed=_without_index),
    "without_index_mjpeg.avi": Recipe("mjpeg", pixels="yuvj420p", changed=_without_index),
    # The first key frame is missing.
    **{
        f"headless_{name}.{end}": Recipe(encoder, options, dropped=1)
        for name, encoder, options in (
            ("h264", "libx264", _H264["closed"]),
            ("h264_open", "libx264", _H264["open"]),
            ("hevc", "libx265", _x265("open-gop=0")),
            ("mpeg2", "mpeg2video", _B2),
            ("vp8", "libvpx", _VPX),
        )
        for end in (("webm",) if name == "vp8" else ("mkv", "ts", "mp4"))
    },
    "begins_inside.ts": Recipe(
        "libx264", _H264["open"], changed=lambda content: content[188 * 40 :]
    ),
    "twice.ts": Recipe("libx264", _H264["open"], changed=lambda content: content + content),
    # A rate that varies.
    **{
        f"varying_{name}.{end}": Recipe(encoder, options, milliseconds=_VARYING)
        for name, encoder, options, ends in (
            ("h264", "libx264", _H264["closed"], "mkv mp4 ts"),
            ("h264_without_b", "libx264", _H264["without_b"], "mkv mp4 ts"),
            ("vp9", "libvpx-vp9", _VPX, "webm"),
            ("av1", "libsvtav1", _AV1, "mkv"),
        )
        for end in ends.split()
    },
}


def write_edited(source: Path, target: Path, cut: int) -> None:
    """A copy of an MP4 file with an edit list that leaves out the first `cut` frames."""
    with (
        av.open(str(source)) as old,
        av.open(
            str(target), "w", options={"avoid_negative_ts": "disabled", "use_editlist": "1"}
        ) as new,
    ):
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        ticks = round(cut / 25 / float(stream.time_base))
        for packet in old.demux(stream):
            if packet.dts is not None:
                packet.pts -= ticks
                packet.dts -= ticks
                packet.stream = copy
                new.mux(packet)
