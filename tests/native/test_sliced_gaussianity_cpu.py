"""sliced_gaussianity's C++ CPU kernels through their C ABI: every instruction set, AVX-512 on an
emulation, sanitized, in any thread order."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from jepa_kernels.testing.gaussianity import ANGLE_ERROR, check_gaussianity, gaussianity_case
from tests.native.attention_library import serial, threaded
from tests.native.build import CSRC, ISAS, Unit, library, units
from tests.simt.build import ROOT, SANITIZER_STATUS, run_sanitized
from tests.simt.gaussianity_abi import MOST_KNOTS, Library, Ops, run_on

pytestmark = pytest.mark.usefixtures("one_thread")

PARALLEL = Unit(Path(__file__).with_name("list_parallel.cpp"), "", [])
_SANITIZERS = {
    "asan_ubsan": ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "tsan": ["-g1", "-fsanitize=thread"],
}


def build(folder: Path, sanitizer: str | None = None, csrc: Path = CSRC) -> Path:
    """A library of the kernels of every instruction set. Without a sanitizer AVX-512 is emulated,
    with one it is left to launch.cpp to choose what this machine has."""
    flags = [] if sanitizer is None else _SANITIZERS[sanitizer]
    parts = units("sliced_gaussianity", csrc)
    parts = [u.emulated() for u in parts] if sanitizer is None else [*parts, PARALLEL]
    return library("gaussianity", folder, parts, lambda unit: ["-O1", *flags], flags)


@pytest.fixture(scope="session")
def built(emulated_builds) -> Path:
    return build(emulated_builds)


@pytest.fixture(params=list(ISAS))
def kernels(request, built) -> Library:
    return Library(built, "cpu", (ISAS[request.param], serial()))


@pytest.fixture
def cpu(monkeypatch, kernels) -> Library:
    run_on(monkeypatch, "cpu", kernels)
    return kernels


@pytest.mark.parametrize("output", ["statistic", "sums"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rows": 1, "slices": 1},
        {"rows": 5, "slices": 17, "points": 2},
        {"rows": 259, "slices": 80, "channels": 8},
        {"rows": 7, "slices": 15, "points": MOST_KNOTS + 1, "largest_point": 6.0},
        {"rows": 20, "magnitude": 0.0, "mean": 1.7},
    ],
    ids=str,
)
def test_matches_the_reference(cpu, output, options):
    check_gaussianity(gaussianity_case(output=output, **options), "cpu")


def test_angles_of_any_size(kernels):
    """The largest error of cosine and sine: rounding of the result, and half a unit in the last
    place of an angle of at most 2."""
    u = torch.cat((torch.linspace(-60.0, 60.0, 4001), torch.tensor([19999.0, -20001.0, 3e8, 0.0])))
    sums = Ops(kernels).sliced_gaussianity_sums(u[None].contiguous(), 1, 1.0, -1)[0, :, 0]
    for found, function in zip(sums, (torch.cos, torch.sin), strict=True):
        assert (found.double() - function(u.double())).abs().max() < ANGLE_ERROR


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_no_angle_stays_none_and_does_not_spread(kernels, value):
    u = torch.zeros(9, 19)
    u[4, 3] = value
    memory = torch.zeros(1, 2, 2, 19)
    kernels.call(
        "sums",
        rows=9,
        columns=19,
        knots=2,
        spacing=0.5,
        projections=u,
        sums=memory,
        pieces=1,
        piece_rows=256,
    )
    assert memory[:, :, :, 3].isnan().all()
    assert not memory[:, :, :, :3].isnan().any() and not memory[:, :, :, 4:].isnan().any()


def test_same_bits_for_any_number_of_threads_and_order_of_cells(kernels):
    u, c, results = torch.randn(600, 150), torch.randn(2, 5, 150), []
    for parallel_for in (serial(), serial(5, lambda pieces: pieces[::-1]), threaded(3)):
        kernels.more = (kernels.more[0], parallel_for)
        slope = u.clone()
        Ops(kernels).sliced_gaussianity_slope_(slope, c, 0.5, -1)
        results.append((Ops(kernels).sliced_gaussianity_sums(u, 5, 0.5, -1), slope))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_many_rows_make_longer_pieces(built):
    kernels = Library(built, "cpu", (0, serial()))
    assert [kernels.piece_rows(rows) for rows in (1, 256, 16384, 100_000)] == [256, 256, 256, 1563]


def test_refusals(kernels):
    with pytest.raises(RuntimeError, match="knots must be from 1 to 64, got 65"):
        kernels.call("sums", rows=1, columns=1, knots=MOST_KNOTS + 1)
    kernels.more = (99, kernels.more[1])
    with pytest.raises(RuntimeError, match="isa must be one that this processor has"):
        kernels.call("slope", rows=1, columns=1, knots=1)


def test_a_planted_fault_is_noticed(tmp_path, monkeypatch):
    """The same comparison with one sign of the kernels flipped."""
    shutil.copytree(CSRC, tmp_path / "csrc")
    path = tmp_path / "csrc" / "sliced_gaussianity" / "cpu" / "harmonics.h"
    text = path.read_text()
    sound = "V::fms(w.cosine, z.cosine, V::mul(w.sine, z.sine))"
    assert sound in text
    path.write_text(text.replace(sound, sound.replace("fms", "fma")))
    broken = build(tmp_path / "built", None, tmp_path / "csrc")
    run_on(monkeypatch, "cpu", Library(broken, "cpu", (0, serial())))
    with pytest.raises(AssertionError):
        check_gaussianity(gaussianity_case(output="sums"), "cpu")


@pytest.mark.parametrize("sanitizer", ["asan_ubsan", "tsan"])
def test_sanitizers_find_nothing(tmp_path, sanitizer):
    path = build(tmp_path, sanitizer)
    command = [str(ROOT / "tests" / "simt" / "gaussianity_sanitized.py"), str(path), "cpu"]
    for isa in (0, -1):
        done = run_sanitized([*command, str(isa)], sanitizer)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    if sanitizer == "tsan":
        # The same run with pieces that overlap, or finding nothing would prove nothing.
        assert run_sanitized([*command, "0", "overlap"], sanitizer).returncode == SANITIZER_STATUS
