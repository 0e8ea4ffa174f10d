"""lightly's I-JEPA against the untouched model: the flavour on torchvision's blocks and the one on
timm's attention; and its LeJEPA loss with our SIGReg.

lightly needs torchvision, and other packages behave differently where torchvision is: `make dev`
puts the two into a folder of their own (`apart` in the environment), which only this file looks
into.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from jepa_kernels import random_directions
from jepa_kernels.integrations import accelerate, patch, restore
from jepa_kernels.testing import FLOAT32, FLOAT32_DEEP
from tests.conftest import missing
from tests.integrations.peers import DTYPES, check, randomised, results, steps_apart

_DECLARED: list[torch.library.Library] = []


def _declare_torchvision_ops() -> None:
    """torchvision cannot be imported where its library is for another build of torch; nothing here
    calls the ops it then misses."""
    origin = importlib.util.find_spec("torchvision").origin
    try:
        torch.ops.load_library(str(next(Path(origin).parent.glob("_C*.so"))))
    except OSError:
        if not _DECLARED:
            _DECLARED.append(torch.library.Library("torchvision", "DEF"))
            for name in ("nms", "qnms"):
                _DECLARED[0].define(
                    f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )


def _forget() -> dict[str, types.ModuleType]:
    """Takes the three packages out of sys.modules: other files put stand-ins there."""
    names = [
        name for name in sys.modules if name.partition(".")[0] in ("timm", "torchvision", "lightly")
    ]
    return {name: sys.modules.pop(name) for name in names}


@pytest.fixture(scope="module")
def modules():
    """lightly's I-JEPA modules of both flavours; what was imported for them is forgotten
    afterwards."""
    folder = Path(sys.prefix) / "apart"
    found = importlib.util.find_spec("lightly") is not None
    if not found and not (folder / "lightly").is_dir():
        missing("lightly is not installed (make dev installs it)")
    stand_ins = _forget()
    if not found:
        sys.path.insert(0, str(folder))
    try:
        _declare_torchvision_ops()
        flavours = (
            importlib.import_module(f"lightly.models.modules.{name}")
            for name in ("ijepa", "ijepa_timm")
        )
        yield types.SimpleNamespace(
            LeJEPALoss=importlib.import_module("lightly.loss.lejepa_loss").LeJEPALoss,
            **{
                key: value
                for module in flavours
                for key, value in vars(module).items()
                if "IJEPA" in key
            },
        )
    finally:
        if not found:
            sys.path.remove(str(folder))
        _forget()
        sys.modules.update(stand_ins)


SIZES = dict(num_heads=2, hidden_dim=48, mlp_dim=96)


def backbone(modules, **changes) -> nn.Module:
    return randomised(
        modules.IJEPABackbone(**(dict(image_size=12, patch_size=4, num_layers=2) | SIZES | changes))
    )


class Pair(nn.Module):
    """An encoder on the context and a predictor of the targets, as lightly's example joins them."""

    def __init__(self, modules, flavour: str) -> None:
        super().__init__()
        self.encoder = backbone(modules)
        if flavour == "timm":
            self.predictor = modules.IJEPAPredictorTIMM(
                num_patches=9, depth=2, mlp_dim=48, predictor_embed_dim=24, num_heads=2
            )
        else:
            sizes = dict(
                seq_length=10,
                num_layers=2,
                num_heads=2,
                hidden_dim=48,
                predictor_embed_dim=48,
                num_patches=9,
            )
            self.predictor = modules.IJEPAPredictor(
                **sizes, mlp_dim=48, dropout=0.0, attention_dropout=0.0
            )
        randomised(self.predictor)

    def forward(self, images):
        context, targets = (
            torch.tensor([[0, 2, 5, 7], [1, 2, 3, 8]]),
            torch.tensor([[1, 6], [4, 0]]),
        )
        return self.predictor(self.encoder(images, context), context, targets)


def call(model, x):
    return model(x)


def images():
    return torch.randn(2, 3, 12, 12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_encoder(modules, dtype):
    report = check(backbone(modules), call, images(), dtype)
    assert report.replaced == {
        "lightly-ijepa": ["encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1"]
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("flavour", ["torchvision", "timm"])
def test_masked_training_pair(modules, flavour, dtype):
    report = check(Pair(modules, flavour), call, images(), dtype)
    assert len(report.replaced["lightly-ijepa"]) == 4


def test_timm_attention_with_norms_of_query_and_key(modules):
    attention = importlib.import_module("timm.layers").Attention
    check(
        randomised(attention(48, 2, qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm)),
        call,
        torch.randn(2, 9, 48),
        torch.float64,
    )


def test_ten_steps_stay_together(modules):
    assert steps_apart(Pair(modules, "timm").train(), call, images()) < FLOAT32_DEEP["rtol"]


def test_training_mode_draws_the_same_dropout(modules):
    """Of one image: torch's MultiheadAttention lays out a batch token by token, so that its draws
    go to other places of a larger one."""
    whole = backbone(modules, dropout=0.3).train()
    outs = []
    for step in (lambda model: None, accelerate):
        step(whole)
        torch.manual_seed(5)
        outs.append(results(whole, call, torch.full((1, 3, 12, 12), 0.3)))
    for name, value in outs[0].items():
        torch.testing.assert_close(
            outs[1][name],
            value,
            **FLOAT32_DEEP,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_restore_and_patch(modules):
    whole, x = Pair(modules, "timm"), images()
    before = whole(x)
    accelerate(whole)
    assert restore(whole) == 4
    assert torch.equal(whole(x), before)
    with patch("lightly-ijepa") as names:
        assert "torchvision.models.vision_transformer:EncoderBlock" in names
        torch.testing.assert_close(whole(x), before, **FLOAT32_DEEP)
    assert torch.equal(whole(x), before)


def test_obstacles_and_refusals(modules):
    attention = importlib.import_module("timm.layers").Attention
    whole = nn.ModuleDict(
        {
            "drops": attention(48, 2, attn_drop=0.1),
            "gated": attention(48, 2, gated=True),
            "encoder": backbone(modules, attention_dropout=0.1, num_layers=1),
        }
    )
    left = accelerate(whole).left
    assert left["drops"] == ["attn_drop must be 0, got 0.1"]
    assert "gate" in left["gated"][0]
    assert left["encoder.encoder.layers.encoder_layer_0"] == [
        "attention_dropout must be 0, got 0.1"
    ]
    plain = attention(48, 2)
    accelerate(plain)
    with pytest.raises(ValueError, match="attn_mask must be None"):
        plain(torch.randn(1, 9, 48), is_causal=True)


def test_the_recipe_does_what_update_momentum_does(modules, root):
    page = (root / "docs" / "integrations" / "recipes.md").read_text()
    lines = page.split("## lightly\n")[1].split("```python\n")[1].split("```")[0]
    recipe: dict = {}
    exec(lines, recipe)
    encoder, teacher = recipe["encoder"], recipe["teacher"]
    assert any(hasattr(part, "_jepa_kernels_fused") for part in encoder.modules())
    plain = copy.deepcopy(teacher.module)
    update = importlib.import_module("lightly.models.utils").update_momentum
    for _ in range(3):
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.add_(torch.randn_like(parameter))
        update(encoder, plain, 0.99)
        teacher.update()
    for theirs, ours in zip(plain.parameters(), teacher.module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_lines_for_its_lejepa_loss(modules, root):
    """docs/lejepa.md: the loss is lightly's, with the directions that lightly is made to draw."""
    page = (root / "docs" / "lejepa.md").read_text()
    (lines,) = [b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "lightly" in b]
    given: dict[str, nn.Module] = {}
    exec(lines, given)
    theirs = modules.LeJEPALoss()
    theirs.sigreg._generate_unit_vectors = lambda *_: random_directions(16, 1024, 0)
    views = {"local_proj": torch.randn(6, 20, 16), "global_proj": torch.randn(2, 20, 16)}
    torch.testing.assert_close(given["criterion"](**views), theirs(**views), **FLOAT32)
