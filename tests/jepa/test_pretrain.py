"""The pre-training loop: resuming, accumulation, skipped updates, monitors, and a strict command
line."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from jepa import cli, distributed, pretrain
from jepa.checkpoint import CheckpointError, Checkpoints
from jepa.config import ConfigError, from_dict
from jepa.data.build import DataConfig, Location
from jepa.distributed import World
from jepa.evaluation import InputSpec, load_bundle
from jepa.monitor import MonitorConfig, Watch, collapse_metrics, effective_rank, warnings
from jepa.pretrain import NotFiniteError, load_config
from jepa.published_behaviour import PublishedBehaviour
from jepa.step import new_state, train_step
from jepa.target import standardise
from jepa_kernels.testing import DERIVED, FLOAT32, FLOAT32_DEEP
from tests.jepa.run_cases import tiny_run
from tests.jepa.training_cases import joined, make_batch, small_model, step_config


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def saved(folder, step):
    return {
        name: (folder / "checkpoints" / f"step_{step:08d}" / name).read_bytes()
        for name in ("model.safetensors", "optimizer.safetensors")
    }


RESUMED = [
    ("hw_ld", "adamw_ema"),
    ("hw_ld", "adamw"),
    ("kinematic", "adamw_ema"),
    ("motion_guided", "adamw_ema"),
]


@pytest.mark.parametrize(("name", "optimizer"), RESUMED)
def test_a_resumed_run_is_bitwise_equal(tmp_path, name, optimizer):
    """Also under accumulation, clipping, and with a checkpoint in the middle of a log interval."""
    options = dict(
        name=name,
        optimizer=optimizer,
        steps=4,
        accumulate=2,
        clip_gradient=1.0,
        log_every=3,
        checkpoint_every=2,
        batch_size=1,
    )
    pretrain.run(tiny_run(tmp_path / "whole", **options))
    cfg = tiny_run(tmp_path / "parts", **options)
    stopped = pretrain.run(
        replace(cfg, schedule=replace(cfg.schedule, total_steps=2, decay_scale=2.0))
    )
    assert stopped.step == 2
    pretrain.run(cfg)
    assert saved(tmp_path / "whole", 4) == saved(tmp_path / "parts", 4)
    assert [(line["step"], line["loss"]) for line in lines(tmp_path / "whole")] == [
        (line["step"], line["loss"]) for line in lines(tmp_path / "parts")
    ]
    assert [line["step"] for line in lines(tmp_path / "parts")] == [2, 3, 4]


def test_a_run_goes_on_with_the_other_optimiser(tmp_path, caplog):
    """Either reads the other's moments and step counts."""
    for first, second in (("adamw", "adamw_ema"), ("adamw_ema", "adamw")):
        folder = tmp_path / first
        pretrain.run(tiny_run(folder, steps=1, optimizer=first))
        with caplog.at_level(logging.WARNING):
            state = pretrain.run(tiny_run(folder, steps=2, optimizer=second))
        assert "another value of optimizer" in caplog.text
        assert {int(entry["step"]) for entry in state.optimizer.state.values()} == {2}
        caplog.clear()


def as_published(cfg, names):
    behaviour = PublishedBehaviour.of(names)
    return replace(cfg, variant=replace(cfg.variant, published_behaviour=behaviour))


@pytest.mark.parametrize("behaviour", [[], ["resume_drops_heads"]])
def test_resuming_keeps_the_heads_unless_the_published_behaviour_drops_them(tmp_path, behaviour):
    cfg = tiny_run(tmp_path, steps=2, name="ld")
    cfg = as_published(cfg, behaviour)
    trained = pretrain.run(cfg).bundle.state_dict()
    state = pretrain.run(cfg)
    torch.manual_seed(cfg.seed)
    fresh = new_state(cfg).bundle.state_dict()
    for name, value in state.bundle.state_dict().items():
        dropped = name.startswith("heads.") and bool(behaviour)
        assert torch.equal(value, (fresh if dropped else trained)[name]), name
    heads = list(state.bundle.heads.parameters())
    assert heads
    assert all(bool(state.optimizer.state.get(p)) == (not behaviour) for p in heads)
    assert all(
        state.optimizer.state[p] for p in state.bundle.predictor.predictor_blocks.parameters()
    )
    later = pretrain.run(replace(cfg, schedule=replace(cfg.schedule, total_steps=3)))
    assert {int(later.optimizer.state[p]["step"]) for p in later.bundle.heads.parameters()} == {
        1 if behaviour else 3
    }


@pytest.mark.parametrize("behaviour", [[], ["repeat_stills"]])
def test_stills_are_images_unless_repeated_as_published(tmp_path, monkeypatch, behaviour):
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (70, 80)).save(tmp_path / "images" / name / "x.png")
    (tmp_path / "classes.txt").write_text("a\nb\n")
    data = DataConfig(
        kind="imagenet100", at=Location(files=tmp_path / "images", classes=tmp_path / "classes.txt")
    )
    seen = []
    monkeypatch.setattr(
        pretrain,
        "train_step",
        lambda state, batches: seen.append(batches[0]) or train_step(state, batches),
    )
    cfg = tiny_run(tmp_path / "run", steps=1, name="ld", data=data)
    pretrain.run(as_published(cfg, behaviour))
    assert seen[0].clips.shape[2] == (4 if behaviour else 1)
    assert seen[0].masks.grid == (2 if behaviour else 1, 4, 4)
    if behaviour:
        assert all(torch.equal(seen[0].clips[:, :, 0], seen[0].clips[:, :, t]) for t in range(4))


def test_the_published_seed_reaches_the_loader(tmp_path):
    cfg = tiny_run(tmp_path)
    world = World(1, 2, torch.device("cpu"), None)
    assert not cfg.loader(world).rank_independent_seed
    cfg = as_published(cfg, ["rank_independent_seed"])
    assert cfg.loader(world).rank_independent_seed


def grids(monkeypatch) -> list[tuple]:
    """Collects the token grid of every step."""
    seen = []
    inner = pretrain.train_step
    monkeypatch.setattr(
        pretrain,
        "train_step",
        lambda state, batches: seen.append(batches[0].masks.grid) or inner(state, batches),
    )
    return seen


def test_a_run_goes_on_at_another_resolution(tmp_path, monkeypatch, caplog):
    """Positions come from token ids, so a checkpoint of one size trains, resumes and is evaluated
    at any other."""
    seen = grids(monkeypatch)
    pretrain.run(tiny_run(tmp_path, steps=2, name="fwm_hw_ld"))
    with caplog.at_level(logging.WARNING):
        state = pretrain.run(tiny_run(tmp_path, steps=4, name="fwm_hw_ld", height=96, width=48))
    assert "another value of height" in caplog.text
    assert seen == [(2, 4, 4), (2, 4, 4), (2, 6, 3), (2, 6, 3)]
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert all(np.isfinite(line["loss"]) for line in lines(tmp_path))
    bundle, cfg, _ = load_bundle(tmp_path)
    assert cfg.final_size == (96, 48)
    for size in ((32, 80), (96, 48)):
        clips = torch.rand(1, 3, 4, *size)
        with torch.no_grad():
            assert torch.equal(bundle.context_encoder(clips), state.bundle.context_encoder(clips))


def test_the_resolution_changes_within_a_run_and_resumes_bitwise(tmp_path, monkeypatch):
    seen = grids(monkeypatch)
    options = dict(
        steps=5, name="ld", accumulate=2, batch_size=1, resize=((2, 32, 48), (4, 80, 80))
    )
    cfg = tiny_run(tmp_path / "whole", **options)
    pretrain.run(cfg)
    assert seen == [(2, 4, 4), (2, 4, 4), (2, 2, 3), (2, 2, 3), (2, 5, 5)]
    parts = tiny_run(tmp_path / "parts", **options, workers=1)
    pretrain.run(replace(parts, schedule=replace(parts.schedule, total_steps=3, decay_scale=5 / 3)))
    assert load_config(parts.output).final_size == (32, 48)
    pretrain.run(parts)
    assert seen[5:] == seen[:5]
    assert saved(cfg.output, 5) == saved(parts.output, 5)
    assert cfg.final_size == (80, 80)
    assert InputSpec.of(cfg, "moving_shapes").height == 80


@pytest.mark.parametrize(
    "resize",
    [((3, 64, 64), (2, 64, 64)), ((2, 64, 64), (2, 32, 32)), ((0, 64, 64),), ((2, 0, 64),)],
)
def test_a_wrong_resize_is_refused(tmp_path, resize):
    with pytest.raises(
        ConfigError,
        match=r"resize must be \(step, height, width\) of at least 1 each, by rising step, got",
    ):
        tiny_run(tmp_path, resize=resize)


def test_a_size_that_is_no_whole_number_of_patches_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="frame must be whole patches of 16 px, got 40 x 64"):
        pretrain.run(tiny_run(tmp_path, resize=((2, 40, 64),)))


def test_workers_do_not_change_a_run(tmp_path):
    pretrain.run(tiny_run(tmp_path / "none", steps=2))
    pretrain.run(tiny_run(tmp_path / "one", steps=2, workers=1))
    assert saved(tmp_path / "none", 2) == saved(tmp_path / "one", 2)


def test_what_a_run_leaves_behind(tmp_path):
    cfg = tiny_run(tmp_path, steps=2, name="fwm_hw_ld", height=48, width=80)
    pretrain.run(cfg)
    assert load_config(tmp_path) == cfg
    last = lines(tmp_path)[-1]
    for key in (
        "step",
        "samples",
        "loss",
        "prediction",
        "latent_dynamics",
        "effective_rank",
        "feature_std",
        "teacher_student_cosine",
    ):
        assert np.isfinite(last[key])
    for key in (
        "learning_rate",
        "clips_per_s",
        "data_wait_share",
        "bad_files",
        "gradient_norm",
        "skipped",
    ):
        assert np.isfinite(last[key])
    assert last["samples"] == 4
    assert list((tmp_path / "tensorboard").iterdir())
    assert Checkpoints(tmp_path / "checkpoints").best()[0] in (1, 2)


def test_resuming_where_it_cannot_be_is_refused(tmp_path, caplog):
    pretrain.run(tiny_run(tmp_path, steps=1))
    with pytest.raises(ConfigError, match="output must hold no checkpoints where resume is off"):
        pretrain.run(tiny_run(tmp_path, steps=2, resume=False))
    with pytest.raises(CheckpointError, match=r"model\.safetensors must fit the configured model"):
        pretrain.run(tiny_run(tmp_path, steps=2, model=small_model(width=48)))
    with caplog.at_level(logging.WARNING):
        pretrain.run(tiny_run(tmp_path, steps=2, seed=5, threads=None))
    assert "another value of seed" in caplog.text
    assert "another value of schedule.total_steps" in caplog.text


class Poison:
    """A train_step whose gradient is not finite at given steps."""

    def __init__(self, monkeypatch, steps):
        self.inner, self.steps = pretrain.train_step, steps
        monkeypatch.setattr(pretrain, "train_step", self)

    def __call__(self, state, batches):
        if state.step + 1 in self.steps:
            batches[0].clips[0, 0, 0, 0, 0] = float("nan")
        return self.inner(state, batches)


def test_a_gradient_that_is_not_finite_skips_the_update_and_is_reported(
    tmp_path, monkeypatch, caplog
):
    Poison(monkeypatch, {2})
    state = pretrain.run(tiny_run(tmp_path, steps=3))
    assert all(p.isfinite().all() for p in state.bundle.parameters())
    first, second, third = (saved(tmp_path, step) if step > 1 else None for step in (1, 2, 3))
    assert first is None and second["model.safetensors"] != third["model.safetensors"]
    log = lines(tmp_path)
    assert [line["skipped"] for line in log] == [0.0, 1.0, 0.0]
    assert log[1]["loss"] is None and log[2]["loss"] is not None
    assert "skipped the update of steps [2]" in caplog.text
    replay = json.loads((tmp_path / "replay.json").read_text())
    assert [(entry["seed"], entry["step"], len(entry["sample_ids"])) for entry in replay] == [
        (0, 2, 2)
    ]


def test_a_skipped_update_changes_no_weight(tmp_path, monkeypatch):
    Poison(monkeypatch, {2})
    pretrain.run(tiny_run(tmp_path, steps=2, keep_last=5, log_every=2))
    model = [Checkpoints(tmp_path / "checkpoints").load(step)[0] for step in (1, 2)]
    assert all(torch.equal(model[0][name], model[1][name]) for name in model[0])
    # The interval's loss is the mean of the finite ones.
    assert all(line["loss"] is None or np.isfinite(line["loss"]) for line in lines(tmp_path))


def test_too_many_skipped_updates_stop_the_run_also_across_resumes(tmp_path, monkeypatch):
    Poison(monkeypatch, {1, 2, 3, 4, 5, 6})
    options = dict(max_skipped=2)
    pretrain.run(tiny_run(tmp_path, steps=2, **options))
    with pytest.raises(
        NotFiniteError, match=r"at most 2 updates may be skipped .*, got 3; .*replay\.json names"
    ):
        pretrain.run(tiny_run(tmp_path, steps=6, **options))
    assert [entry["step"] for entry in json.loads((tmp_path / "replay.json").read_text())] == [
        1,
        2,
        3,
    ]


def test_accumulation_is_the_larger_batch():
    """Two micro-batches give the gradient of one batch of both, whatever their numbers of
    tokens."""
    cfg = step_config("fwm_hw_ld", variant={"objectives": {"orthogonality": {"weight": 0.0}}})
    parts = [make_batch(batch_size=2, seed=seed) for seed in (0, 1)]
    norms = []
    for batches in (parts, [joined(parts)]):
        torch.manual_seed(0)
        _, metrics = train_step(new_state(cfg), batches)
        norms.append((metrics["loss"], metrics["gradient_norm"]))
    assert torch.allclose(norms[0][0], norms[1][0], rtol=FLOAT32["rtol"])
    assert torch.allclose(norms[0][1], norms[1][1], rtol=FLOAT32["rtol"])


def test_clipping_limits_the_gradient():
    states = []
    for limit in (None, 1e-3):
        torch.manual_seed(0)
        state = new_state(step_config(clip_gradient=limit))
        _, metrics = train_step(state, make_batch())
        first = {k: s["exp_avg"] for k, s in zip("ab", state.optimizer.state.values())}
        states.append((metrics["gradient_norm"], first["a"] / 0.1))
    (norm, gradient), (same, clipped) = states
    assert norm > 1e-3 and torch.equal(norm, same)
    assert torch.allclose(clipped, gradient * 1e-3 / norm, rtol=FLOAT32_DEEP["rtol"])


def test_checkpointed_activations_give_the_same_gradient():
    norms = []
    for flag in (False, True):
        torch.manual_seed(0)
        _, metrics = train_step(
            new_state(step_config(model=small_model(checkpoint_activations=flag))), make_batch()
        )
        norms.append(metrics["gradient_norm"])
    assert torch.equal(*norms)


@pytest.mark.slow
def test_compiled_blocks_give_the_same_gradient():
    """Traced as torch.compile traces them, for two token counts; compiling proper takes minutes of
    a CPU."""
    torch._dynamo.reset()
    states = []
    for compiled in (False, True):
        torch.manual_seed(0)
        state = new_state(step_config(model=small_model(depth=1, level_blocks=(0,))))
        names = list(state.bundle.state_dict())
        if compiled:
            pretrain.compile_blocks(state.bundle, backend="aot_eager")
            assert state.bundle.context_encoder.blocks[0]._compiled_call_impl is not None
        assert list(state.bundle.state_dict()) == names
        norms = [train_step(state, make_batch(seed=seed))[1]["gradient_norm"] for seed in (0, 1)]
        states.append(torch.stack(norms))
    assert torch.allclose(*states, rtol=FLOAT32_DEEP["rtol"])


def test_bfloat16_runs_on_a_cpu(tmp_path):
    pretrain.run(tiny_run(tmp_path, steps=1, precision="bf16"))
    assert np.isfinite(lines(tmp_path)[0]["loss"])


def test_collapsed_features_are_warned_of():
    cfg, monitor = step_config(), MonitorConfig(clips=2)
    bundle = new_state(cfg).bundle
    batch = make_batch()
    healthy = {
        name: float(value) for name, value in collapse_metrics(bundle, batch, cfg, monitor).items()
    }
    assert warnings(healthy, monitor) == []
    # All weights of the evaluated encoder's last level gone: every token gives the same feature.
    bundle.target_encoder.norms_block[-1].weight.data.zero_()
    gone = {
        name: float(value) for name, value in collapse_metrics(bundle, batch, cfg, monitor).items()
    }
    found = warnings(gone, monitor)
    assert any(s.startswith("collapse: feature_std is") for s in found)
    assert gone["teacher_student_cosine"] < healthy["teacher_student_cosine"]


def watched(*lines, **monitor):
    """The sentences of a watched run of ten lines; a line is (prediction, rank)."""
    watch = Watch(MonitorConfig(**monitor), total_steps=10)
    return [
        watch.sentences(
            {
                "step": step + 1,
                "prediction": prediction,
                "mean_prediction": 0.8,
                "effective_rank": rank,
                "teacher_student_cosine": 0.99,
            }
        )
        for step, (prediction, rank) in enumerate(lines)
    ]


def test_a_run_that_learns_is_left_in_peace():
    assert watched(*((0.7 * 0.9**i, 20.0) for i in range(10)), patience=3) == [[]] * 10


def test_halved_rank_a_mean_prediction_and_a_plateau_are_told_once_each():
    falling = watched(*((0.7 * 0.9**i, rank) for i, rank in enumerate((20, 15, 9, 8))))
    assert [len(found) for found in falling] == [0, 0, 1, 0]
    assert "the effective rank of the features has fallen from 20.0 to 9.0" in falling[2][0]
    mean = watched((0.79, 20.0), (0.79, 20.0), (0.79, 20.0), after=0.2)
    assert [len(found) for found in mean] == [0, 1, 0]
    assert "is 99 % of what predicting the mean feature costs (0.8)" in mean[1][0]
    flat = watched(*[(0.5, 20.0)] * 6, patience=3, after=0.1)
    assert [len(found) for found in flat] == [0, 0, 0, 1, 0, 0]
    assert flat[3][0].startswith("plateau: the prediction loss has not fallen by 1 % in 3 log")


def test_the_loss_of_the_mean_feature_is_what_predicting_it_costs():
    cfg, monitor = step_config(), MonitorConfig(clips=2)
    bundle, batch = new_state(cfg).bundle, make_batch()
    bundle.target_encoder.norms_block[0].weight.data.zero_()
    features = standardise(bundle.target_encoder(batch.clips[:2]).flatten(0, 1), cfg.model.levels)
    expected = (features - features.mean(0)).abs().mean()
    found = collapse_metrics(bundle, batch, cfg, monitor)["mean_prediction"]
    torch.testing.assert_close(found, expected)


def test_effective_rank_counts_directions():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(32, 8, generator=generator)).Q
    features = torch.linalg.qr(torch.randn(256, 8, generator=generator)).Q @ basis.T
    assert effective_rank(features).item() == pytest.approx(8, rel=DERIVED["rtol"])
    assert effective_rank(features[:, :1].expand(-1, 32)).item() == pytest.approx(
        1, rel=DERIVED["rtol"]
    )


def test_a_collapsed_run_logs_the_warning(tmp_path, caplog):
    pretrain.run(tiny_run(tmp_path, steps=1, monitor=MonitorConfig(clips=2, min_rank=1000.0)))
    assert "step 1: collapse: effective_rank is" in caplog.text


def test_unknown_keys_are_refused_with_the_nearest(capsys):
    assert cli.main(["pretrain", "schedule.total_stps=3"]) == 2
    assert (
        "unknown key 'schedule.total_stps'; did you mean 'total_steps'?" in capsys.readouterr().err
    )
    assert cli.main(["pretrain", "variant=fmw_ld"]) == 2
    assert "did you mean 'fwm_ld'?" in capsys.readouterr().err
    assert cli.main(["pretrain", "steps"]) == 2
    assert "must look like key=value" in capsys.readouterr().err


def test_a_recipe_is_laid_under_what_is_given(capsys):
    def shown(*words):
        assert cli.main(["pretrain", "--show", *words]) == 0
        return from_dict(pretrain.PretrainConfig, yaml.safe_load(capsys.readouterr().out))

    published = shown("recipe=published")
    assert published == pretrain.PretrainConfig()
    small = shown()
    assert small == shown("recipe=small")
    assert "latent_dynamics" in small.variant.objectives
    assert (small.data.kind, small.model.patch_size) == ("moving_textures", 8)
    assert small.model.width == published.model.width
    # A name in place of a mapping keeps what the recipe says beside it.
    named = shown("variant=ld", "model=tiny", "schedule.total_steps=7", "data.size=50")
    assert named.variant.masks == small.variant.masks
    assert "latent_dynamics" in named.variant.objectives
    assert (named.model.width, named.model.patch_size) == (192, 8)
    assert named.schedule == replace(small.schedule, total_steps=7)
    assert cli.main(["pretrain", "recipe=smal"]) == 2
    assert "unknown recipe 'smal'; did you mean 'small'?" in capsys.readouterr().err


def test_the_command_line_lays_flags_over_a_file(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("variant: ld\nbatch_size: 3\nschedule: {total_steps: 7}\n")
    assert (
        cli.main(["pretrain", "--config", str(file), "--show", "--batch-size", "5", "model=tiny"])
        == 0
    )
    shown = capsys.readouterr().out
    assert (
        "batch_size: 5" in shown
        and "total_steps: 7" in shown
        and "latent_dynamics" in shown
        and "width: 192" in shown
    )
    # What the file leaves out of a nested configuration keeps the command's own default.
    assert "warmup_steps: 30" in shown


def test_wrappers_without_processes_are_refused():
    world = distributed.start("cpu")
    for how in ("ddp", "fsdp2"):
        with pytest.raises(ConfigError, match="start several with torchrun"):
            distributed.wrap(new_state(step_config()).bundle, world, how)
    assert distributed.wrap(new_state(step_config()).bundle, world, "auto") is None
