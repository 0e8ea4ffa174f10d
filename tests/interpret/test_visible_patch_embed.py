"""The Triton kernels of visible_patch_embed under the interpreter."""

from __future__ import annotations

import pytest
import torch

from jepa_kernels.ops.visible_patch_embed import triton
from jepa_kernels.ops.visible_patch_embed.inputs import NAME
from jepa_kernels.testing import RESULT_FAULTS, planted_fault
from jepa_kernels.testing.embedding import check_embedding, embedding_case, run_embedding

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("clip_dtype", [torch.uint8, *DTYPES], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_reference(clip_dtype, dtype):
    check_embedding(embedding_case(clip_dtype=clip_dtype, dtype=dtype), "triton")


@pytest.mark.parametrize("layout", ["shared", "packed"])
@pytest.mark.parametrize(
    "options",
    [
        {"visible": 0},
        {"batch": 0},
        {"visible": 1, "batch": 1, "grid": (1, 1, 1), "tubelet": (1, 1, 1), "width": 1},
        {"visible": None, "repeated": True, "grid": (1, 5, 8), "width": 70},
        {"tubelet": (3, 2, 5), "channels": 4, "width": 130, "channels_last": True},
        {"grid": (1, 3, 4), "tubelet": (1, 16, 16), "bias": False, "normalised": False},
    ],
    ids=str,
)
def test_shapes_layouts_and_ids(layout, options):
    for clip_dtype in (torch.uint8, torch.float32):
        check_embedding(embedding_case(layout=layout, clip_dtype=clip_dtype, **options), "triton")


def test_pieces_of_the_weight_gradient(monkeypatch):
    monkeypatch.setattr(triton, "FEWEST_ROWS", 16)
    monkeypatch.setattr(triton, "PROGRAMS", 12)
    case = embedding_case(visible=None, layout="packed")
    assert triton.rows_of_piece(len(case.ids), 2, 16) < len(case.ids)
    check_embedding(case, "triton")


def test_few_programs_get_many_pieces_of_rows():
    assert triton.rows_of_piece(100_000, 64, 32) == 12_512
    assert triton.rows_of_piece(100_000, 1024, 32) == 100_000
    assert triton.rows_of_piece(100, 1, 32) == 256


def test_repeats_bitwise():
    case = embedding_case(clip_dtype=torch.float32, repeated=True, visible=40)
    first, second = (run_embedding(case, "triton") for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("fault", RESULT_FAULTS)
def test_a_planted_fault_is_seen(fault):
    case = embedding_case(clip_dtype=torch.float32, visible=None)
    with planted_fault(NAME, "triton", fault, "backward"), pytest.raises(AssertionError):
        check_embedding(case, "triton")
