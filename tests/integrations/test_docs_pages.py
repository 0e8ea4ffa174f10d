"""One page for each code base: its lines run, and its teacher recipe does what the code base's own
loop does."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

from jepa_kernels.integrations import CODE_BASES, accelerate
from tests.integrations.peers import peer

RUNNABLE = {
    "transformers-vjepa2": "transformers",
    "transformers-ijepa": "transformers",
    "vjepa2": "vjepa2",
    "vjepa2-ac": "vjepa2",
    "vjepa1": "vjepa",
}
NAMES = [base.name for base in CODE_BASES]


def blocks(root, name: str) -> list[str]:
    page = (root / "docs" / "integrations" / f"{name}.md").read_text()
    assert f"`{name}`" in page
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


@pytest.mark.parametrize("name", RUNNABLE)
def test_the_lines_run(root, name, capsys):
    package = RUNNABLE[name]
    peer(package, f"{package}.models")
    exec(blocks(root, name)[0], {})
    assert f"{name}: fused " in capsys.readouterr().out


def test_doing_less(root):
    """The lines of the two pages that offer it, on what their first lines build."""
    peer("transformers", "transformers.models")
    accelerated, options, context, *_ = [
        block for block in blocks(root, "transformers-vjepa2") if "ema_update_" not in block
    ]
    ids = torch.arange(8).expand(1, -1)
    given = {
        "pixel_values_videos": torch.randn(1, 4, 3, 32, 32),
        "context_ids": ids[:, :5],
        "target_ids": ids[:, 5:],
    }
    exec(accelerated + options + context, given)
    assert given["predicted"].shape == (1, 3, 48)
    predictor = peer("vjepa2", "vjepa2.models.predictor").VisionTransformerPredictor(
        img_size=32,
        num_frames=4,
        embed_dim=48,
        predictor_embed_dim=48,
        depth=1,
        num_heads=2,
        use_mask_tokens=True,
        use_rope=True,
    )
    exec(blocks(root, "vjepa2")[2], {"accelerate": accelerate, "predictor": predictor})
    assert hasattr(predictor, "_jepa_kernels_fused")


@pytest.mark.parametrize("name", NAMES)
def test_teacher_recipe(root, name):
    """Against the loop that JEPA code has: every target times the momentum, plus the rest of its
    source."""
    recipe = blocks(root, name)[1]
    assert len(recipe.strip().splitlines()) == 2
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    model.encoder = nn.Linear(4, 4)
    part = model.encoder if "model.encoder" in recipe else model
    teacher = copy.deepcopy(part)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(torch.randn_like(parameter))
    expected = [
        0.996 * old + 0.004 * new for old, new in zip(teacher.parameters(), part.parameters())
    ]
    exec(
        recipe,
        {
            "model": model,
            "encoder": model,
            "teacher": teacher,
            "target_encoder": teacher,
            "momentum": 0.996,
        },
    )
    for updated, value in zip(teacher.parameters(), expected):
        torch.testing.assert_close(updated, value)
