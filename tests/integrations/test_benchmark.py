"""The benchmark of the drop-ins compares what it says, and refuses a wrong result."""

from __future__ import annotations

import pytest

from benchmarks import bench_integrations, harness, peers
from jepa_kernels.integrations import CODE_BASES
from tests.integrations.peers import peer


def test_rows(monkeypatch):
    monkeypatch.setattr(peers, "installed", lambda: list(peers._BUILDERS))
    rows = list(bench_integrations.plan(quick=False))
    assert len(rows) == len(set(rows))
    assert {row[0] for row in rows} == set(peers._BUILDERS) <= {base.name for base in CODE_BASES}
    for name in ("transformers-vjepa2", "vjepa2"):
        assert {row[3] for row in rows if row[0] == name} == {"112", "160", "224", "256"}
        assert {row[1] for row in rows if row[0] == name} == {"vit_s", "vit_l"}


def test_what_is_not_installed_is_named(monkeypatch, capsys):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda package: None)
    assert peers.installed() == []
    assert "left out: vjepa2 (vjepa2 is not installed)" in capsys.readouterr().out


@pytest.mark.parametrize("pass_name", ["forward", "forward+backward"])
def test_gate_bites(pass_name):
    peer("vjepa", "vjepa.models.vision_transformer")
    options = harness.Options(
        quick=True, baselines=("vjepa1",), passes=(pass_name,), dtypes=("float32",)
    )
    items = bench_integrations.comparisons(options)
    attention, encoder = items
    assert (
        attention.case == "vjepa1/attention/vit_s/64px/16f"
        and encoder.case == "vjepa1/encoder/vit_s/64px/16f"
    )
    for item in (attention, encoder):
        item.gate()
        with pytest.raises(harness.GateError, match="relative error"):
            bench_integrations.gate(
                lambda item=item: 1.001 * item.candidate(), item.reference, "float32"
            )
