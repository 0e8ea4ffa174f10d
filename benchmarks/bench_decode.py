"""Reading one clip (16 frames, stride 2) of a video: the tuned reader against naive PyAV code.

Baselines: "naive" converts every frame of the file with to_ndarray and chooses afterwards; "wanted
only" stops after the last wanted frame and converts only the wanted ones, but with a converter and
scaling of its own per frame. Videos are written here (moving shapes, three codecs, 320 x 240, 120
frames); clips of a folder given by JEPA_KERNELS_BENCH_VIDEOS are added.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks import harness
from jepa.data.clip import ClipSpec
from jepa.data.decode import read_video, wanted_frames
from jepa.data.moving_shapes import MovingShapes

# The size of the source costs no scaling; the other is the canvas of a 112 px view.
SPECS = {"240x320": ClipSpec(16, 2, None, 240, 320), "128x176": ClipSpec(16, 2, None, 128, 176)}
CODECS = {"mpeg4.avi": "mpeg4", "h264.mp4": "libx264", "vp9.webm": "libvpx-vp9"}
DRAW = 0.5


def write_video(path: Path, codec: str, frames: NDArray[np.uint8]) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"cpu-used": "8", "deadline": "realtime"} if codec == "libvpx-vp9" else {}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def scaled(frame: NDArray[np.uint8], spec: ClipSpec) -> NDArray[np.uint8]:
    if frame.shape[:2] == (spec.height, spec.width):
        return frame
    return np.asarray(
        Image.fromarray(frame).resize((spec.width, spec.height), Image.Resampling.BILINEAR)
    )


def naive(path: Path, spec: ClipSpec) -> NDArray[np.uint8]:
    with av.open(str(path)) as container:
        rate = float(container.streams.video[0].average_rate)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack([scaled(frames[n], spec) for n in wanted_frames(spec, len(frames), rate, DRAW)])


def wanted_only(path: Path, spec: ClipSpec) -> NDArray[np.uint8]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        rate = float(stream.average_rate)
        count = stream.frames or round(container.duration / av.time_base * rate)
        numbers = wanted_frames(spec, count, rate, DRAW).tolist()
        frames = []
        for number, frame in enumerate(container.decode(video=0)):
            if number in numbers:
                frames.append(scaled(frame.to_ndarray(format="rgb24"), spec))
            if number >= numbers[-1]:
                break
    return np.stack(frames)


def comparisons(options: harness.Options) -> Iterator[harness.Comparison]:
    with tempfile.TemporaryDirectory() as folder:
        frames = MovingShapes(1, seed=options.seed).render(
            0, 60 if options.quick else 120, 240, 320
        )
        paths = [
            Path(folder) / f"shapes_{name}"
            for name in (list(CODECS)[:1] if options.quick else CODECS)
        ]
        for path in paths:
            write_video(path, CODECS[path.name.removeprefix("shapes_")], frames)
        extra = os.environ.get("JEPA_KERNELS_BENCH_VIDEOS")
        if extra and not options.quick:
            paths += sorted(
                p for p in Path(extra).rglob("*") if p.suffix in (".avi", ".mp4", ".webm", ".mkv")
            )[:6]
        for path, (canvas, spec) in itertools.product(paths, SPECS.items()):

            def ours(path: Path = path, spec: ClipSpec = spec) -> NDArray[np.uint8]:
                return read_video(path, spec, DRAW).frames

            def gate(path: Path = path, spec: ClipSpec = spec, ours=ours) -> None:
                # Converters round and filter differently: a few grey levels on average.
                read, theirs = ours(), naive(path, spec)
                error = float(np.abs(read.astype(np.int16) - theirs).mean())
                if read.shape != theirs.shape or error > 8:
                    raise harness.GateError(
                        f"frames: mean difference must be at most 8 grey levels, got {error:.2f}."
                    )

            for baseline, read in (("naive", naive), ("wanted only", wanted_only)):
                yield harness.Comparison(
                    f"{path.name}/{canvas}",
                    "uint8",
                    "read",
                    "read_video",
                    baseline,
                    ours,
                    lambda path=path, spec=spec, read=read: read(path, spec),
                    gate,
                    details={"frames": spec.frames, "stride": spec.stride, "canvas": canvas},
                )


if __name__ == "__main__":
    raise SystemExit(harness.main("decode", comparisons, __doc__))
