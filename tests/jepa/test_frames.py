"""Which frames a clip holds: numbered frames of every codec and container against a sequential
decode of the same file."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest

from jepa.data import decode
from jepa.data.clip import BadClipError, ClipSpec
from jepa.data.decode import read_video, wanted_frames
from jepa_kernels.testing import FLOAT32_STORED
from tests.jepa.numbered_videos import FRAMES, RECIPES, number_of, sequential, write_edited

# (frames, stride, draw): the start, places near it, the middle and the end.
CLIPS = [
    (1, 1, 0.0),
    (8, 1, 0.02),
    (3, 2, 0.23),
    (4, 5, 0.4),
    (6, 1, 0.55),
    (2, 9, 0.7),
    (7, 3, 0.9),
    (4, 1, 0.999),
]


@pytest.fixture(scope="session")
def numbered(tmp_path_factory):
    """Path of a recipe's file, written once."""
    folder = tmp_path_factory.mktemp("numbered")

    def find(name: str):
        path = folder / name
        if not path.exists():
            try:
                av.Codec(RECIPES[name].codec, "w")
            except ValueError:
                pytest.skip(f"this PyAV has no encoder {RECIPES[name].codec}")
            RECIPES[name].write(path)
        return path

    return find


def numbers_read(path, frames, stride, draw, fps=None):
    spec = ClipSpec(frames, stride, fps, 64, 64)
    return [number_of(frame) for frame in read_video(path, spec, draw).frames]


def check(path, monkeypatch):
    whole = sequential(path)
    assert len(whole) > 10
    wanted = [
        [whole[n] for n in wanted_frames(ClipSpec(frames, stride), len(whole), 25.0, draw)]
        for frames, stride, draw in CLIPS
    ]
    # Decoding goes on from the packets that were held in memory, or from a seek.
    for held in (1 << 24, 0):
        monkeypatch.setattr(decode, "_HELD_BYTES", held)
        for clip, numbers in zip(CLIPS, wanted, strict=True):
            decode._remembered().clear()
            assert numbers_read(path, *clip) == numbers, (clip, held)
    # And with what is remembered of the file.
    assert [numbers_read(path, *clip) for clip in CLIPS] == wanted


@pytest.mark.parametrize("name", RECIPES)
def test_frames_are_those_of_a_sequential_decode(numbered, monkeypatch, name):
    check(numbered(name), monkeypatch)


@pytest.mark.parametrize("cut", [5, 30])
@pytest.mark.parametrize(
    "source",
    ["h264_closed.mp4", "h264_without_b.mp4", "mpeg4_b2.mp4", "vp9_plain.mp4", "hevc_open.mp4"],
)
def test_edit_lists(numbered, monkeypatch, tmp_path, source, cut):
    path = tmp_path / "edited.mp4"
    write_edited(numbered(source), path, cut)
    assert sequential(path) == list(range(cut, FRAMES))
    check(path, monkeypatch)


# Most files tell by their packets which frame is which; a count of all frames is for the others.
COUNTED = {
    "h264_closed.avi",
    "h264_open.avi",
    "h264_interlaced.mp4",
    "h264_interlaced.ts",
    "elementary.h264",
    "begins_inside.ts",
    "twice.ts",
}


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith("headless")])
def test_only_files_without_order_are_counted(numbered, monkeypatch, name):
    counts = []
    count = decode._count
    monkeypatch.setattr(decode, "_count", lambda path: counts.append(path) or count(path))
    decode._remembered().clear()
    numbers_read(numbered(name), 4, 2, 0.6)
    assert len(counts) == (name in COUNTED)


def test_seeking_spares_decoding(numbered, monkeypatch):
    """The clip at the end of a file starts at the last key frame, and frames in between that no
    other refers to are not decoded."""
    decoded = []
    picture = decode._clip

    def spied(numbered_frames, *arguments):
        return picture((decoded.append(n) or (n, f) for n, f in numbered_frames), *arguments)

    monkeypatch.setattr(decode, "_clip", spied)
    for name in ("h264_closed.mp4", "mpeg2_b2.ts", "vp9_plain.webm", "mpeg4_b2.avi"):
        decoded.clear()
        numbers_read(numbered(name), 2, 1, 0.999)
        assert 2 <= len(decoded) < 40, name


def test_a_varying_rate_with_fps_shows_what_is_shown_at_those_times(numbered):
    times = np.array(RECIPES["varying_h264.mkv"].milliseconds) / 1000.0
    times = times - times[0]
    for draw in (0.0, 0.5, 0.99):
        got = numbers_read(numbered("varying_h264.mkv"), 5, 1, draw, fps=4.0)
        wanted = np.searchsorted(times, times[got[0]] + np.arange(5) / 4.0 + 1e-6, side="right") - 1
        assert got == wanted.tolist()
        assert times[got[0]] + 1.0 <= times[-1] + FLOAT32_STORED["atol"]
    constant = numbers_read(numbered("h264_closed.mkv"), 4, 1, 0.5, fps=10.0)
    assert np.diff(constant).tolist() == [2, 3, 2]


def test_text_of_other_encodings_in_tags(tmp_path):
    path = tmp_path / "title.mp4"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "Caf@"
        stream = container.add_stream("libx264", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 200, np.uint8), format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    path.write_bytes(path.read_bytes().replace(b"Caf@", b"Caf\xe9"))
    frames = read_video(path, ClipSpec(4, 1, None, 32, 32), 0.0).frames
    assert abs(int(frames.mean()) - 200) < 3


def test_a_cover_picture_is_not_the_video(numbered, tmp_path):
    path = tmp_path / "cover.mp4"
    with av.open(str(numbered("h264_closed.mp4"))) as old, av.open(str(path), "w") as new:
        cover = new.add_stream("mjpeg", rate=1)
        cover.width = cover.height = 64
        cover.pix_fmt = "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        white = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 255, np.uint8), format="rgb24")
        new.mux(cover.encode(white))
        new.mux(cover.encode(None))
        for packet in old.demux(stream):
            if packet.dts is not None:
                packet.stream = copy
                new.mux(packet)
    assert numbers_read(path, 4, 1, 0.0) == [0, 1, 2, 3]


def test_pixels_that_are_not_square(tmp_path):
    path = tmp_path / "anamorphic.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 72, 64, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        frame = av.VideoFrame.from_ndarray(np.zeros((64, 72, 3), np.uint8), format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    clip = read_video(path, ClipSpec(1, 1, None, 32, 32), 0.0)
    assert (clip.source_height, clip.source_width) == (64, 96)


def test_a_codec_that_cannot_be_decoded_is_a_bad_clip(numbered, tmp_path):
    path = tmp_path / "unknown.avi"
    content = numbered("mjpeg.avi").read_bytes()
    path.write_bytes(content.replace(b"MJPG", b"QQQQ"))
    with pytest.raises(BadClipError, match=r"unknown\.avi"):
        read_video(path, ClipSpec(4, 1, None, 32, 32), 0.0)
