"""Our eager reproduction must be the published step: two golden steps of every variant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import eager_attention
from benchmarks.published_step import RECIPES, Outcome, PublishedStep, Size
from jepa.conformance.golden import Golden
from jepa.conformance.report import GRADIENT_TOLERANCE, Report
from jepa.conformance.sensitivity import check_measured

GOLDEN_SIZE = Size(
    dim=24, depth=12, heads=3, predictor_dim=24, predictor_depth=8, predictor_heads=3
)
RATES = {1: 3.5e-4, 2: 6e-4}


@pytest.fixture
def steps_dir(shared_dir: Path) -> Path:
    return shared_dir / "golden" / "steps"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def built(golden: Golden) -> PublishedStep:
    initial = golden.beside("init_state")
    published = PublishedStep(GOLDEN_SIZE, RECIPES[golden.name])
    for module in (published.encoder, published.predictor, published.heads):
        module.to(golden.dtype)
    state = {name: initial.tensor(name) for name in initial.names()} | {
        name.removeprefix("init_"): golden.tensor(name) for name in golden.names("init_")
    }
    with torch.no_grad():
        for name, parameter in published.named_parameters():
            if name in state:
                parameter.copy_(state.pop(name))
            else:
                assert "mask_tokens" in name
    assert not state
    published.reset_training_state()
    return published


def run(published: PublishedStep, golden: Golden, step: int) -> Outcome:
    seen = [golden.tensor(f"step{step}_mask_enc_{j}") for j in range(2)]
    hidden = [golden.tensor(f"step{step}_mask_pred_{j}") for j in range(2)]
    published.step_number = step - 1
    clip = golden.tensor(f"step{step}_clip")
    return published.train_step(clip, seen, hidden, learning_rate=RATES[step])


def check(golden: Golden, report: Report) -> None:
    """Compares two steps of the reproduction with a golden file; the gradients of the features that
    flow on are the file's, so that what is below them starts from the same place."""
    published = built(golden)
    forward, step = published.forward, published.optimizer.step

    def compared_forward(*arguments: object) -> Outcome:
        outcome = forward(*arguments)
        for kind, tensors in (
            ("z_enc", outcome.context),
            ("z_pred", outcome.predicted),
            ("z_context", outcome.predicted_context),
        ):
            for number, tensor in enumerate(tensors):
                compare_features(golden, report, f"{kind}_{number}", tensor)
        compare_features(golden, report, "h", outcome.targets)
        return outcome

    def compared_step() -> None:
        parameters = dict(published.named_parameters())
        rows = zip(map(str, golden["grad_norm_names"]), golden["grad_norms_step1"], strict=True)
        for name, norm in rows:
            key, gradient = f"grad_norms_step1[{name}]", parameters[name].grad
            if gradient is None:
                report.compare(key, -1.0, norm)
            else:
                report.compare_norm(key, gradient, float(norm))
        step()

    published.forward, published.optimizer.step = compared_forward, compared_step
    outcome = run(published, golden, 1)
    report.equal(
        "terms",
        sorted(f"step1_term_{name}" for name in outcome.terms),
        sorted(golden.names("step1_term_")),
    )
    for name, value in outcome.terms.items():
        report.compare(f"step1_term_{name}", value, golden[f"step1_term_{name}"])
    report.compare("step1_loss", outcome.loss, golden["step1_loss"])
    compare_parameters(published, golden, report, 1)
    published.forward, published.optimizer.step = forward, step
    report.compare("step2_loss", run(published, golden, 2).loss, golden["step2_loss"])
    compare_parameters(published, golden, report, 2)


def compare_features(golden: Golden, report: Report, name: str, tensor: torch.Tensor) -> None:
    report.compare(name, tensor, golden[name])
    key = f"grad_{name}"
    if tensor.requires_grad:
        tensor.register_hook(passing_on(golden, report, key))
    else:
        report.equal(key, key in golden, False)


def passing_on(golden: Golden, report: Report, key: str) -> Callable[[torch.Tensor], torch.Tensor]:
    def hook(gradient: torch.Tensor) -> torch.Tensor:
        report.compare(key, gradient, golden[key], GRADIENT_TOLERANCE)
        return golden.tensor(key)

    return hook


def compare_parameters(published: PublishedStep, golden: Golden, report: Report, step: int) -> None:
    parameters = dict(published.named_parameters())
    parameters |= {
        f"target_encoder.{name}": value
        for name, value in published.target_encoder.named_parameters()
    }
    rows = zip(
        map(str, golden["param_names"]),
        golden[f"param_norm_after_step{step}"],
        golden[f"param_sum_after_step{step}"],
        strict=True,
    )
    for name, norm, total in rows:
        value = parameters[name]
        report.compare_norm(f"param_norm_after_step{step}[{name}]", value, float(norm))
        report.compare_sum(f"param_sum_after_step{step}[{name}]", value, float(total), float(norm))


def checked(path: Path) -> Report:
    report = Report()
    report.open(path.stem)
    check_measured(lambda run, sink: check(Golden(path, run), sink), report)
    return report


@pytest.mark.parametrize("variant", sorted(RECIPES))
def test_golden_steps(variant: str, steps_dir: Path) -> None:
    report = checked(steps_dir / f"{variant}.npz")
    assert len(report.rows) > 1900
    assert not report.failures, report.failures[:10]


def test_a_planted_fault_is_seen(steps_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison must bite: positions that are not interpolated change the first features
    beyond tolerance."""
    monkeypatch.setattr("jepa.conformance.sensitivity.SEEDS", 2)
    original = eager_attention.positions
    monkeypatch.setattr(
        eager_attention,
        "positions",
        lambda ids, grid, interpolate: original(ids, grid, interpolate=False),
    )
    failures = checked(steps_dir / "baseline.npz").failures
    assert failures[0].array == "z_enc_0"
    assert failures[0].error > 3e-5


def test_a_wrong_gradient_is_seen(steps_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A factor of 1.001 on the gradient of one weight."""
    monkeypatch.setattr("jepa.conformance.sensitivity.SEEDS", 2)
    original = PublishedStep.reset_training_state

    def reset(self: PublishedStep) -> None:
        original(self)
        weight = self.predictor.predictor_blocks[3].mlp.fc1.weight
        weight.register_hook(lambda gradient: gradient * 1.001)

    monkeypatch.setattr(PublishedStep, "reset_training_state", reset)
    failures = checked(steps_dir / "baseline.npz").failures
    assert "grad_norms_step1[predictor.predictor_blocks.3.mlp.fc1.weight]" in {
        row.array for row in failures
    }
