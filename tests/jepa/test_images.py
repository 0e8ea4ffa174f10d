"""What read_image makes of pixels that are not plain eight-bit RGB, and of damaged files."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from jepa.data.clip import BadClipError, ClipSpec
from jepa.data.decode import read_image

SPEC = ClipSpec(1, 1, None, 64, 96)


def read(path):
    return read_image(path, SPEC).frames[0]


def ramp(top, kind):
    return np.linspace(0, top, 64 * 96).reshape(64, 96).astype(kind)


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("sixteen.png", ramp(65535, np.uint16)),
        ("sixteen.tif", ramp(65535, np.uint16)),
        ("wide.tif", ramp(65535, np.int32)),
        ("float.tif", ramp(1.0, np.float32)),
        ("float255.tif", ramp(255.0, np.float32)),
        ("eight.png", ramp(255, np.uint8)),
    ],
)
def test_deep_grey_is_scaled_to_eight_bits(tmp_path, name, pixels):
    path = tmp_path / name
    Image.fromarray(pixels).save(path)
    got = read(path)
    assert got.shape == (64, 96, 3)
    assert np.abs(got.astype(float).mean(-1) - ramp(255.0, np.float64)).max() <= 1.0


def test_a_dark_sixteen_bit_picture_stays_dark(tmp_path):
    path = tmp_path / "dark.png"
    Image.fromarray(ramp(6553, np.uint16)).save(path)
    assert 24 <= read(path).max() <= 26


@pytest.mark.parametrize("value", [float("nan"), -1.0, 1e9])
def test_grey_without_a_known_white_is_refused(tmp_path, value):
    path = tmp_path / "odd.tif"
    pixels = ramp(1.0, np.float32)
    pixels[3, 4] = value
    Image.fromarray(pixels).save(path)
    with pytest.raises(
        BadClipError, match=r"odd\.tif: grey values must be at (least 0|most 65535)"
    ):
        read(path)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("end", ["jpg", "png", "tif", "webp"])
def test_exif_orientation_is_upright(tmp_path, orientation, end):
    """Quadrants of four colours, stored as a camera in each position stores them."""
    upright = np.zeros((64, 96, 3), np.uint8)
    upright[:32, 48:] = (255, 0, 0)
    upright[32:, :48] = (0, 255, 0)
    upright[32:, 48:] = (0, 0, 255)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"rotated.{end}"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    clip = read_image(path, SPEC)
    assert (clip.source_height, clip.source_width) == (64, 96)
    for row, column in ((16, 24), (16, 72), (48, 24), (48, 72)):
        difference = clip.frames[0, row, column].astype(int) - upright[row, column]
        assert np.abs(difference).max() < 40, (orientation, row, column)


def test_alpha_is_ignored(tmp_path):
    path = tmp_path / "clear.png"
    Image.new("RGBA", (96, 64), (10, 200, 30, 0)).save(path)
    assert (read(path) == (10, 200, 30)).all()


def test_damaged_pictures_are_bad_clips(tmp_path):
    path = tmp_path / "colours.bmp"
    Image.new("L", (40, 40)).convert("P").save(path)
    content = bytearray(path.read_bytes())
    content[46:50] = (300).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(BadClipError, match=r"colours\.bmp"):
        read(path)


def test_a_picture_with_damaged_exif_is_read(tmp_path):
    path = tmp_path / "exif.jpg"
    Image.new("RGB", (96, 64), (9, 9, 9)).save(path, exif=b"Exif\0\0XX*\0\x08\0\0\0\x01\0")
    assert (np.abs(read(path).astype(int) - 9) < 3).all()
