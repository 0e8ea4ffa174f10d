"""One page for each code base: its lines run, and its teacher recipe does what the code base's own loop does."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

from jepa_kernels.integrations import CODE_BASES
from tests.integrations.peers import peer

RUNNABLE = {"transformers-vjepa2": "transformers", "transformers-ijepa": "transformers", "vjepa2": "vjepa2", "vjepa1": "vjepa"}
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


@pytest.mark.parametrize("name", NAMES)
def test_teacher_recipe(root, name):
    """Against the loop that JEPA code has: every target times the momentum, plus the rest of its source."""
    recipe = blocks(root, name)[1]
    assert len(recipe.strip().splitlines()) == 2
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    model.encoder = nn.Linear(4, 4)
    part = model.encoder if "model.encoder" in recipe else model
    teacher = copy.deepcopy(part)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(torch.randn_like(parameter))
    expected = [0.996 * old + 0.004 * new for old, new in zip(teacher.parameters(), part.parameters())]
    exec(recipe, {"model": model, "encoder": model, "teacher": teacher, "target_encoder": teacher, "momentum": 0.996})
    for updated, value in zip(teacher.parameters(), expected):
        torch.testing.assert_close(updated, value)
