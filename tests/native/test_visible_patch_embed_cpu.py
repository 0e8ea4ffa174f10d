"""visible_patch_embed's C++ CPU kernels through their C ABI: every instruction set, sanitized, in
any thread order."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from jepa_kernels.testing.embedding import check_embedding, embedding_case
from tests.native.attention_library import serial, threaded
from tests.native.build import CSRC, ISAS, Unit, library, units
from tests.simt.build import ROOT, SANITIZER_STATUS, run_sanitized
from tests.simt.embedding_abi import Library, Ops, run_on

pytestmark = pytest.mark.usefixtures("one_thread")

PARALLEL = Unit(Path(__file__).with_name("list_parallel.cpp"), "", [])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SANITIZERS = {
    "asan_ubsan": ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "tsan": ["-g1", "-fsanitize=thread"],
}


def build(folder: Path, sanitizer: str | None = None, csrc: Path = CSRC) -> Path:
    """A library of the kernels of every instruction set that the op has."""
    flags = [] if sanitizer is None else _SANITIZERS[sanitizer]
    parts = units("visible_patch_embed", csrc)
    parts = parts if sanitizer is None else [*parts, PARALLEL]
    return library("embedding", folder, parts, lambda unit: ["-O1", *flags], flags)


@pytest.fixture(scope="session")
def built(emulated_builds) -> Path:
    return build(emulated_builds)


@pytest.fixture(params=["portable", "avx2"])
def kernels(request, built) -> Library:
    return Library(built, "cpu", (ISAS[request.param], serial()))


@pytest.fixture
def cpu(monkeypatch, kernels) -> Library:
    run_on(monkeypatch, "cpu", kernels)
    return kernels


@pytest.mark.parametrize("clip_dtype", [torch.uint8, *DTYPES], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tubelet": (2, 2, 16), "channels_last": True},
        {"tubelet": (1, 3, 16), "dtype": torch.bfloat16},
        {"tubelet": (2, 7, 21), "channels": 4, "layout": "packed", "repeated": True},
        {"grid": (1, 1, 1), "tubelet": (1, 1, 1), "visible": 1, "dtype": torch.bfloat16},
        {"batch": 0},
    ],
    ids=str,
)
def test_matches_the_reference(cpu, clip_dtype, options):
    check_embedding(embedding_case(clip_dtype=clip_dtype, **options), "cpu")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("wide", [3, 16, 17])
def test_gathered_pixels_are_the_clips(kernels, wide, channels_last):
    """Every value, at an exact gain and shift."""
    clip = torch.arange(2 * 3 * 4 * 4 * wide * 2).view(2, 3, 4, 4, 2 * wide).remainder(251).byte()
    if channels_last:
        clip = clip.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    rows = torch.tensor([15, 0, 9, 9])
    pixels = torch.empty(4, 3 * 2 * 2 * wide)
    normalisation = torch.tensor([[1.0, 2.0, 4.0], [0.0, 1.0, -1.0]])
    Ops(kernels).visible_patch_embed_gather_(pixels, clip, rows, normalisation, 2, 2, wide, -1)
    cut = clip.float().unflatten(4, (2, wide)).unflatten(3, (2, 2)).unflatten(2, (2, 2))
    tokens = cut.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(16, 3, -1)
    expected = tokens * normalisation[0, :, None] + normalisation[1, :, None]
    assert torch.equal(pixels, expected.flatten(1)[rows])


def test_nan_and_infinity_stay_what_they_are(kernels):
    clip = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.4e38]).view(1, 1, 1, 1, 4)
    for dtype in (torch.float32, torch.bfloat16):
        pixels = torch.zeros(1, 4, dtype=dtype)
        kernels.call(
            "gather",
            **dict.fromkeys(("batch", "channels", "steps", "lines", "sites"), 1),
            **{"depth": 1, "high": 1, "wide": 4, "pixel_stride": 1, "clip_dtype": 0, "count": 1},
            clip=clip,
            gain=torch.ones(1),
            shift=torch.zeros(1),
            rows=torch.zeros(1, dtype=torch.int64),
            pixels=pixels,
            pixels_dtype=int(dtype == torch.bfloat16),
        )
        assert torch.equal(pixels[0].isnan(), torch.tensor([True, False, False, False]))
        assert pixels[0, 1] == torch.inf and pixels[0, 2] == -torch.inf


def test_same_bits_for_any_number_of_threads_and_order_of_pieces(kernels):
    clip, normalisation = torch.randn(2, 3, 4, 8, 32), torch.randn(2, 3)
    rows, results = torch.arange(64).flip(0), []
    order, of_pixels = torch.arange(64), torch.randn(64, 96)
    starts = torch.arange(65)
    for parallel_for in (serial(), serial(5, lambda pieces: pieces[::-1]), threaded(3)):
        kernels.more = (kernels.more[0], parallel_for)
        pixels, gradient = torch.empty(64, 96), torch.empty_like(clip)
        ops, tubelet = Ops(kernels), (1, 2, 16, -1)
        ops.visible_patch_embed_gather_(pixels, clip, rows, normalisation, *tubelet)
        ops.visible_patch_embed_scatter_(
            gradient, of_pixels, order, starts, normalisation, *tubelet
        )
        results.append((pixels, gradient))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_refusals(kernels):
    one = dict.fromkeys(("batch", "steps", "lines", "sites", "count"), 1)
    for number in (-1, 1, 2**40):
        wrong = torch.tensor([number, 0])
        with pytest.raises(RuntimeError, match=f"rows must hold numbers from 0 to 0, got {number}"):
            kernels.call("gather", **one, rows=wrong)
        with pytest.raises(RuntimeError, match="order must hold numbers from 0 to 0"):
            kernels.call("scatter", **one, order=wrong)
    with pytest.raises(RuntimeError, match="starts must hold numbers from 0 to 1, got 5"):
        kernels.call("scatter", **one, order=torch.tensor([0]), starts=torch.tensor([0, 5]))
    kernels.more = (99, kernels.more[1])
    for name in ("gather", "scatter"):
        with pytest.raises(RuntimeError, match="isa must be one that this processor has"):
            kernels.call(name, **one)


def test_a_planted_fault_is_noticed(tmp_path, monkeypatch):
    """The same comparison with the shift of a kernel dropped."""
    shutil.copytree(CSRC, tmp_path / "csrc")
    path = tmp_path / "csrc" / "visible_patch_embed" / "cpu" / "gather.h"
    text = path.read_text()
    assert "* gain + shift" in text
    path.write_text(text.replace("* gain + shift", "* gain"))
    broken = build(tmp_path / "built", None, tmp_path / "csrc")
    run_on(monkeypatch, "cpu", Library(broken, "cpu", (0, serial())))
    with pytest.raises(AssertionError):
        check_embedding(embedding_case(), "cpu")


@pytest.mark.parametrize("sanitizer", ["asan_ubsan", "tsan"])
def test_sanitizers_find_nothing(tmp_path, sanitizer):
    path = build(tmp_path, sanitizer)
    command = [str(ROOT / "tests" / "simt" / "embedding_sanitized.py"), str(path), "cpu"]
    for isa in (0, -1):
        done = run_sanitized([*command, str(isa)], sanitizer)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    if sanitizer == "tsan":
        # The same run with pieces that overlap, or finding nothing would prove nothing.
        assert run_sanitized([*command, "0", "overlap"], sanitizer).returncode == SANITIZER_STATUS
