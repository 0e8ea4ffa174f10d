"""The CUDA kernels of visible_patch_embed on the SIMT executor: every thread order, sanitizers."""

from __future__ import annotations

import shutil

import pytest
import torch

from jepa_kernels.testing.embedding import check_embedding, embedding_case, run_embedding
from tests.simt.build import ORDERS, ROOT, build, configure, run_sanitized, take_counts
from tests.simt.embedding_abi import Library, on_the_executor, run_on

SOURCE = "csrc/visible_patch_embed/cuda/launch.cu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def library() -> Library:
    return on_the_executor(build(SOURCE))


@pytest.fixture
def cuda(monkeypatch, library) -> Library:
    """Lets the CUDA backend run on the executor."""
    run_on(monkeypatch, "cuda", library)
    return library


@pytest.mark.parametrize("order", sorted(ORDERS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matches_the_reference_in_every_thread_order(cuda, order, dtype):
    configure(cuda.library, order, seed=3)
    case = embedding_case(visible=40, repeated=True, width=70, dtype=dtype)
    check_embedding(case, "cuda")
    configure(cuda.library)


@pytest.mark.parametrize("clip_dtype", [torch.uint8, *DTYPES], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(cuda, clip_dtype, dtype):
    """With lines that are read 16 bytes at a time."""
    options = {"tubelet": (1, 2, 16), "clip_dtype": clip_dtype, "dtype": dtype}
    check_embedding(embedding_case(**options), "cuda")


@pytest.mark.parametrize("layout", ["shared", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"visible": 0},
        {"batch": 0},
        {"visible": 1, "batch": 1, "grid": (1, 1, 1), "tubelet": (1, 1, 1), "width": 1},
        {"visible": None, "repeated": True, "grid": (1, 5, 8), "width": 64},
        {"tubelet": (3, 2, 5), "channels": 4, "width": 130, "channels_last": True},
        {"grid": (1, 3, 4), "tubelet": (1, 16, 16), "bias": False, "normalised": False},
    ],
    ids=str,
)
def test_shapes_layouts_and_ids(cuda, layout, dtype, options):
    for clip_dtype in (torch.uint8, torch.float32):
        options = {**options, "dtype": dtype, "clip_dtype": clip_dtype}
        check_embedding(embedding_case(layout=layout, **options), "cuda")


def test_pieces_of_the_weight_gradient_and_launches(cuda):
    case = embedding_case(batch=4, grid=(1, 10, 10), tubelet=(1, 2, 2), visible=None, repeated=True)
    assert cuda.piece_rows(400, 20, 12) == 256
    take_counts(cuda.library)
    check_embedding(case, "cuda")
    assert take_counts(cuda.library).launches == 2


def test_many_rows_make_longer_pieces(library):
    assert library.piece_rows(100_000, 768, 1536) == 25_024
    assert library.piece_rows(100_000, 64, 64) == 256


def test_repeats_bitwise(cuda):
    case = embedding_case(clip_dtype=torch.float32, repeated=True, visible=40)
    first, second = (run_embedding(case, "cuda") for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("name", ["embed", "weight_gradient", "scatter"])
def test_refusals(library, name):
    sizes = {"batch": 1, "steps": 2**15, "lines": 2**10, "sites": 2**6}
    with pytest.raises(RuntimeError, match="clip must have fewer than 2\\^31 tokens"):
        library.call(name, **sizes)
    if name != "scatter":
        with pytest.raises(RuntimeError, match="weight must have at most 4194240 channels"):
            library.call(name, width=2**22)
    sizes = dict.fromkeys(("batch", "steps", "lines", "sites", "count"), 1)
    with pytest.raises(RuntimeError, match="dtype must be float32, bfloat16 or float16"):
        library.call(name, **sizes, dtype=9, clip_dtype=3)


@pytest.mark.parametrize(
    ("file", "sound", "broken"),
    [
        ("gradients.cuh", "const int at = this->first + i;", "const int at = this->first;"),
        ("pixels.cuh", "p.shift[one.channel])", "-p.shift[one.channel])"),
    ],
)
def test_a_planted_fault_is_noticed(tmp_path, monkeypatch, file, sound, broken):
    shutil.copytree(ROOT / "csrc", tmp_path, dirs_exist_ok=True)
    path = tmp_path / "visible_patch_embed" / "cuda" / file
    text = path.read_text()
    assert sound in text
    path.write_text(text.replace(sound, broken))
    faulty = on_the_executor(build(path.with_name("launch.cu")))
    run_on(monkeypatch, "cuda", faulty)
    with pytest.raises(AssertionError):
        check_embedding(embedding_case(), "cuda")


@pytest.mark.parametrize("sanitizer", ["asan_ubsan", "tsan"])
def test_sanitizers_find_nothing(sanitizer):
    script = ROOT / "tests" / "simt" / "embedding_sanitized.py"
    done = run_sanitized([str(script), str(build(SOURCE, sanitizer)), "cuda"], sanitizer)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
