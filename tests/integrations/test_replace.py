"""The replacing itself, on a small code base of our own: what is bound, reported, undone and
refused; and that nothing happens on import."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from jepa_kernels.integrations import CODE_BASES, accelerate, patch, replace, restore
from jepa_kernels.integrations.replace import CodeBase, Target, dropout_obstacles


class Attention(nn.Module):
    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.drop = drop

    def forward(self, x):
        return self.proj(x)


class Derived(Attention):
    """Inherits the forward: fused like its parent."""


class Changed(Attention):
    """Has a forward of its own: not known."""

    def forward(self, x):
        return 3 * self.proj(x)


class Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, x):
        return self.attn(x)


def fused(self, x):
    return self.proj(x) + 1


_HERE = __name__
BASE = CodeBase(
    "toy",
    "this file",
    (
        Target(
            (f"{_HERE}:Attention", f"elsewhere:{_HERE}"),
            fused,
            lambda module: dropout_obstacles(module, drop=module.drop),
            "nothing",
        ),
    ),
    {f"{_HERE}:Causal": "it is causal"},
)


def model() -> nn.Sequential:
    return nn.Sequential(
        Attention(), nn.Identity(), Derived(), Changed(), Causal(), Attention(drop=0.5)
    )


def test_report():
    report = replace.accelerate(model(), (BASE,))
    assert report.replaced == {"toy": ["0", "2"]}
    assert report.left == {"4": ["it is causal"], "5": ["drop must be 0, got 0.5"]}
    assert str(report).splitlines()[0] == "toy: fused 2 modules (0 .. 2)"
    assert "left 4: it is causal" in str(report)


def test_restore_is_bitwise_and_the_state_dict_never_changes():
    whole, x = model(), torch.randn(3, 4)
    state, before = copy.deepcopy(whole.state_dict()), whole(x)
    replace.accelerate(whole, (BASE,))
    assert list(whole.state_dict()) == list(state)
    assert not torch.equal(whole(x), before)
    whole.load_state_dict(state)
    replace.accelerate(whole, (BASE,))
    assert restore(whole) == 2
    assert torch.equal(whole(x), before)
    assert restore(whole) == 0
    assert all(
        "forward" not in vars(module) and not hasattr(module, replace._MARK)
        for module in whole.modules()
    )


def test_hooks_are_kept():
    attention, calls = Attention(), []
    attention.register_forward_hook(lambda module, args, out: calls.append("after"))
    attention.register_forward_pre_hook(lambda module, args: calls.append("before"))
    replace.accelerate(attention, (BASE,))
    attention(torch.randn(1, 4))
    assert calls == ["before", "after"]


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))],
    ids=["deepcopy", "pickle"],
)
def test_copies_compute_with_their_own_weights(duplicate):
    attention, x = Attention(), torch.randn(1, 4)
    replace.accelerate(attention, (BASE,))
    other = duplicate(attention)
    with torch.no_grad():
        other.proj.weight.zero_()
    torch.testing.assert_close(other(x), other.proj.bias.expand(1, 4) + 1)
    torch.testing.assert_close(attention(x), attention.proj(x) + 1)
    assert restore(other) == 1
    torch.testing.assert_close(other(x), other.proj.bias.expand(1, 4))


def test_a_forward_replaced_by_somebody_else_is_left():
    attention = Attention()
    attention.forward = lambda x: x
    report = replace.accelerate(attention, (BASE,))
    assert report.left == {"": ["its forward is already replaced by something else"]}
    assert restore(attention) == 0
    assert "forward" in vars(attention)


def test_patched_classes_choose_by_instance_and_come_back_after_an_error():
    original, x = Attention.forward, torch.randn(1, 4)
    keeps, changes = Attention(drop=0.5), Attention()
    with pytest.raises(KeyError, match="inside"), replace.patched((BASE,)) as names:
        assert names == [f"{_HERE}:Attention"]
        assert torch.equal(changes(x), changes.proj(x) + 1)
        assert torch.equal(keeps(x), keeps.proj(x))
        raise KeyError("inside")
    assert Attention.forward is original


def test_an_unknown_model_is_told_what_is_known():
    with pytest.raises(ValueError) as error:
        accelerate(nn.Sequential(nn.MultiheadAttention(8, 2)))
    text = str(error.value)
    for base in CODE_BASES:
        assert base.name in text
    assert "MultiheadAttention" in text
    with pytest.raises(ValueError, match="it has no attention module"):
        accelerate(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"accelerate: model must be a torch\.nn\.Module, got str"):
        accelerate("vit")


def test_options_that_are_unknown_or_not_there():
    with pytest.raises(
        ValueError,
        match=r"accelerate: options must name some of .*unsorted_predictor.*, got 'fast'",
    ):
        accelerate(nn.Linear(2, 2), options=("fast",))
    with pytest.raises(ValueError, match="patch: options must name some of"):
        patch("vjepa2", options=("fast",))
    base = CodeBase(
        "toy",
        "this file",
        (
            *BASE.targets,
            Target((f"{_HERE}:Causal",), fused, lambda module: [], "more", option="more"),
        ),
    )
    whole = nn.Sequential(Attention())
    with pytest.raises(
        ValueError, match=r"options must name what the model has, got 'more' for .*Sequential"
    ):
        replace.accelerate(whole, (base,), ("more",))
    assert restore(whole) == 0
    whole = nn.Sequential(Causal())
    assert replace.accelerate(whole, (base,)).replaced == {"toy": ["0.attn"]}
    assert replace.accelerate(whole, (base,), ("more",)).replaced == {"toy": ["0", "0.attn"]}
    original = Causal.forward
    with replace.patched((base,), ("more",)) as names:
        assert f"{_HERE}:Causal" in names
        assert Causal.forward is not original
    assert Causal.forward is original


def test_an_unknown_name_is_told_the_names():
    with pytest.raises(ValueError, match=r"patch: name must be one of .*vjepa2.*, got 'vjepa9'"):
        patch("vjepa9")
    assert len({base.name for base in CODE_BASES}) == len(CODE_BASES)


def test_nothing_is_imported_or_changed_on_import():
    script = """
import sys
import jepa_kernels.integrations
peers = {'transformers', 'vjepa', 'vjepa2', 'timm', 'einops', 'src', 'lightly'}
loaded = {name.partition('.')[0] for name in sys.modules} & peers
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_patch_takes_what_is_installed_and_refuses_what_was_named(monkeypatch):
    """A package that is there and lacks one of its own stands for one that is not there."""

    def absent(path):
        if path.startswith("vjepa2"):
            raise ModuleNotFoundError("No module named 'timm'", name="timm")
        raise ModuleNotFoundError(f"No module named {path!r}", name=path)

    monkeypatch.setattr("jepa_kernels.integrations.replace.importlib.import_module", absent)
    with patch() as names:
        assert names == []
    with pytest.raises(ModuleNotFoundError, match=r"got 'vjepa2'\. No module named 'timm'\.$"):
        with patch("vjepa2"):
            pass
    with pytest.raises(ModuleNotFoundError, match=r"be of an installed code base, got 'ijepa'\."):
        with patch("ijepa"):
            pass
