"""Times of video tokens, and the masks they stand for."""

from __future__ import annotations

import pytest
import torch

from jepa_kernels import Rope3D, frame_times, frame_tokens, masked_attention
from jepa_kernels.testing import FLOAT32_SHORT


def seen(tokens, window: int | None = None) -> torch.Tensor:
    """[N, N] which query sees which key, read off the op: value i is the i-th unit vector, and the
    scores are equal."""
    n = tokens.query_ids.shape[0]
    nothing = torch.zeros(1, n, 1, max(n, 6))
    value = torch.eye(n, nothing.shape[-1])[None, :, None]
    out = masked_attention(
        nothing,
        nothing,
        value,
        query_times=tokens.query_times,
        key_times=tokens.key_times,
        window=window,
        backend="reference",
    )
    return out[0, :, 0, :n] > 0


def test_frame_times_of_a_grid_and_of_ids():
    assert frame_times((3, 2, 2)).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    ids = torch.tensor([[11, -1], [4, 3]], dtype=torch.int32)
    times = frame_times((3, 2, 2), ids)
    assert times.tolist() == [[2, -1], [1, 0]] and times.dtype == torch.int32


def test_frame_causal_is_the_block_mask_of_the_action_conditioned_predictor():
    """V-JEPA 2-AC: each frame is `conditioning` tokens and its patches; a token sees all tokens of
    its frame and of earlier ones."""
    frames, spatial, conditioning = 3, 4, 2
    tokens = frame_tokens((frames, 2, 2), conditioning=conditioning)
    block = torch.ones(spatial + conditioning, spatial + conditioning)
    causal = torch.ones(frames, frames).tril()
    assert torch.equal(seen(tokens), torch.kron(causal, block) > 0)
    two = causal.triu(-1)
    assert torch.equal(seen(tokens, window=2), torch.kron(two, block) > 0)


def test_conditioning_tokens_turn_by_time_alone():
    """The id t*H*W: rows and columns are at position 0, which rotates nothing, so the rotation is
    that of the time axis by its frame."""
    tokens = frame_tokens((3, 2, 2), conditioning=1)
    action = 2 * 5
    assert tokens.query_ids[action] == 8
    x = torch.randn(1, 1, 48, dtype=torch.float64)
    rotated = Rope3D((3, 2, 2)).rotate(x, tokens.query_ids[action : action + 1])
    m = 16
    assert torch.equal(rotated[..., m:], x[..., m:])
    angle = 2.0 * 10000.0 ** (-2.0 * torch.arange(m // 2, dtype=torch.float64) / m)
    a, b = x[..., :m].unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)
    torch.testing.assert_close(rotated[..., :m], pairs.flatten(-2), **FLOAT32_SHORT)


@pytest.mark.parametrize("reads_itself", [False, True])
def test_class_tokens_read_everything_and_registers_are_read_by_everyone(reads_itself):
    tokens = frame_tokens((2, 1, 2), class_tokens=1, registers=2, class_reads_itself=reads_itself)
    mask = seen(tokens)
    assert mask[0, 1:].all() and not mask[1:, 0].any() and bool(mask[0, 0]) == reads_itself
    assert mask[:, 1:3].all()
    assert not mask[1:3, 3:].any(), "a register must not carry the future to the past"
    assert torch.equal(mask[3:, 3:], torch.kron(torch.ones(2, 2).tril(), torch.ones(2, 2)) > 0)


def test_counts_are_checked():
    with pytest.raises(ValueError, match="frame_tokens: registers must be at least 0, got -1"):
        frame_tokens((1, 1, 1), registers=-1)
    with pytest.raises(ValueError, match="Rope3D: grid must have sizes of at least 1"):
        frame_times((0, 1, 1))


@pytest.mark.parametrize(
    ("interpolation", "expected"), [("corners", (4 - 1) / (7 - 1)), ("size", 4 / 7)]
)
def test_the_two_interpolation_rules(interpolation, expected):
    """Row 6 of 7, seen from a pre-training grid of 4: V-JEPA 2.1 keeps the corners, V-JEPA 2-AC
    scales by the sides."""
    rope = Rope3D((2, 7, 7), interpolate_from=4, interpolation=interpolation)
    cosine = rope.table(24, torch.device("cpu"))[0, 2 + 6, 0]
    torch.testing.assert_close(cosine, torch.tensor(6 * expected).cos())
    ids = torch.randint(0, 98, (20,))
    q, k, v = torch.randn(3, 1, 20, 2, 24).double()
    results = [
        masked_attention(q, k, v, query_ids=ids, rope=rope, backend=backend)
        for backend in ("reference", "torch")
    ]
    torch.testing.assert_close(*results, **FLOAT32_SHORT)
    with pytest.raises(ValueError, match="interpolation must be one of corners, size"):
        Rope3D((1, 1, 1), interpolation="linear")


def test_each_interpolation_rule_has_a_table_of_its_own():
    """Tables are kept by what makes them: one rule must not be served the other's."""
    corners, size = (
        Rope3D((2, 7, 7), interpolate_from=4, interpolation=rule) for rule in ("corners", "size")
    )
    device = torch.device("cpu")
    corners.table(24, device)
    assert torch.equal(size.table(24, device), size._build(24, device))
    assert not torch.equal(size.table(24, device), corners.table(24, device))
