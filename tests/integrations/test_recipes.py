"""The lines of docs/integrations/recipes.md do what a plain loop does."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import re

import pytest
import torch
from torch import nn

from jepa_kernels.nn import EMATeacher
from tests.integrations.peers import peer


def blocks(root, title: str) -> str:
    """The lines of Python under a heading of the page."""
    page = (root / "docs" / "integrations" / "recipes.md").read_text()
    section = page.split(f"## {title}\n")[1].split("\n## ")[0]
    return "\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL))


def parts():
    torch.manual_seed(5)
    encoder = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3))
    return encoder, nn.Linear(3, 3), torch.randn(8, 2, 4)


def by_hand(accumulated: int) -> dict[str, torch.Tensor]:
    """The teacher after plain steps of AdamW and the published update."""
    encoder, predictor, batches = parts()
    teacher = copy.deepcopy(encoder).requires_grad_(False)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *predictor.parameters()], lr=1e-3)
    for number, batch in enumerate(batches, 1):
        loss = nn.functional.smooth_l1_loss(predictor(encoder(batch)), teacher(batch))
        (loss / accumulated).backward()
        if number % accumulated == 0:
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for theirs, ours in zip(teacher.parameters(), encoder.parameters()):
                    theirs.mul_(0.99).add_(ours, alpha=1 - 0.99)
    return teacher.state_dict()


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("fused", [True, False])
def test_lightning(root, tmp_path, fused, accumulated):
    lightning = peer("lightning", "lightning")
    recipe: dict = {}
    exec(blocks(root, "Lightning"), recipe)
    encoder, predictor, batches = parts()
    module = recipe["Module"](encoder, predictor, fused=fused)
    lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        accumulate_grad_batches=accumulated,
        callbacks=[] if fused else [recipe["UpdateTeacher"]()],
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, torch.utils.data.DataLoader(list(batches), batch_size=None, shuffle=False))
    assert module.teacher.num_updates == len(batches) // accumulated
    for name, wanted in by_hand(accumulated).items():
        torch.testing.assert_close(module.teacher.module.state_dict()[name], wanted)


@pytest.mark.skipif(
    importlib.util.find_spec("lerobot") is None,
    reason="lerobot is not installed (release 0.6 asks for a torch before 2.12)",
)
def test_lerobot(root, tmp_path):
    policies = importlib.import_module("lerobot.policies.pretrained")
    configs = importlib.import_module("lerobot.configs.policies")
    utils = importlib.import_module("lerobot.utils.utils")
    recipe: dict = {}
    exec(blocks(root, "lerobot"), recipe)

    @configs.PreTrainedConfig.register_subclass("followed")
    @dataclasses.dataclass
    class Config(configs.PreTrainedConfig):
        pass

    Config.__abstractmethods__ = frozenset()

    class Policy(recipe["FollowedByTeacher"], policies.PreTrainedPolicy):
        config_class, name = Config, "followed"

        def __init__(self, config):
            super().__init__(config)
            self.encoder = parts()[0]
            self.make_teacher(0.99)

    Policy.__abstractmethods__ = frozenset()
    policy = Policy(Config())
    assert utils.has_method(policy, "update")
    with torch.no_grad():
        for parameter in policy.encoder.parameters():
            parameter.add_(1.0)
    policy.update()
    wanted = copy.deepcopy(policy.teacher.state_dict())
    for ours, theirs in zip(policy.encoder.parameters(), policy.teacher.module.parameters()):
        torch.testing.assert_close(ours - theirs, torch.full_like(ours, 0.99))
    policy._save_pretrained(tmp_path)
    again = Policy.from_pretrained(tmp_path, config=Config())
    for name, tensor in wanted.items():
        assert torch.equal(again.teacher.state_dict()[name], tensor)
    assert again.teacher.num_updates == 1


def test_the_mixin_of_lerobot_in_its_loop(root):
    """The same without that package: what its loop does after a step of the optimiser."""
    recipe: dict = {}
    exec(blocks(root, "lerobot"), recipe)

    class Policy(recipe["FollowedByTeacher"], nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = parts()[0]
            self.make_teacher(0.99)

    policy = Policy()
    assert isinstance(policy.teacher, EMATeacher)
    with torch.no_grad():
        for parameter in policy.encoder.parameters():
            parameter.add_(1.0)
    if callable(getattr(policy, "update", None)):
        policy.update()
    for ours, theirs in zip(policy.encoder.parameters(), policy.teacher.module.parameters()):
        torch.testing.assert_close(ours - theirs, torch.full_like(ours, 0.99))
