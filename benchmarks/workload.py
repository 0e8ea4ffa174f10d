"""What the sweep runs: batches of one shape, and steps cut into timed phases. No clocks but
`Marks`, no files, no tables.

One set of weights serves every mask policy and target kind of a workload, because time depends on
shapes only; learning rates are those of training, so nothing overflows over the few steps taken
here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness import timer
from benchmarks.resolutions import Resolution
from jepa import step as training
from jepa.batch import Batch, LoadedBatch, MaskBatch
from jepa.data.transforms import ViewSpec, model_input
from jepa.masks import MaskPolicy, motion_maps, sample_masks
from jepa.models.sizes import ModelConfig
from jepa.schedules import ScheduleConfig
from jepa.variants import TargetConfig, VariantConfig, variant
from jepa_kernels import use_backend

FINETUNE_PHASES = ("encoder", "head", "backward", "optimiser")
# Three quarters through training: the context ramp is on and no annealed weight has reached 0.
TOTAL_STEPS, STEP = 1000, 750
CLASSES = 101


@dataclass(frozen=True)
class Workload:
    """Everything that fixes the shapes of a step, apart from the variant."""

    resolution: Resolution
    model: ModelConfig
    frames: int = 16
    batch: int = 2
    precision: str = "fp32"
    device: str = "cpu"
    data: str = "moving_shapes"
    truncate: str = "none"
    encoder: str | None = None
    seed: int = 0
    clock: str = "wall"

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.resolution.grid(
            self.frames, tubelet_size=self.model.tubelet_size, patch_size=self.model.patch_size
        )

    @property
    def tokens(self) -> int:
        depth, rows, columns = self.grid
        return depth * rows * columns


@dataclass(frozen=True)
class Group:
    """Variants that share every phase but the objective: one mask policy and one kind of target."""

    policy: MaskPolicy
    target: str

    @classmethod
    def of(cls, config: VariantConfig, truncate: str) -> Group:
        return cls(replace(config.mask_policy, truncate=truncate), config.target.kind)

    @property
    def name(self) -> str:
        motion = self.policy.motion
        guided = "" if motion is None else f"motion{motion.strength:g}"
        future = "future" if self.policy.context_share < 1 else ""
        masks = "+".join(part for part in (guided, future) if part) or "blocks"
        return f"{masks}/{self.target}"


class Marks:
    """Time stamps between phases: the harness's timer on a CPU, CUDA events on a GPU (read back
    only at the end)."""

    def __init__(self, workload: Workload) -> None:
        self._on_gpu = workload.device.startswith("cuda")
        self._now = timer(workload.clock, workload.device)
        self._stamps: list[tuple[str, Any]] = []
        self("start")

    def __call__(self, name: str) -> None:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._stamps.append((name, event))
        else:
            self._stamps.append((name, self._now()))

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase, by the name that ended it."""
        if self._on_gpu:
            torch.cuda.synchronize()
        spent: dict[str, float] = {}
        for (_, before), (name, after) in zip(self._stamps, self._stamps[1:], strict=False):
            spent[name] = before.elapsed_time(after) / 1e3 if self._on_gpu else after - before
        return spent


class TensorClips:
    """Pre-generated clips in memory: takes decoding and drawing out of the measurement."""

    def __init__(self, workload: Workload, count: int = 4) -> None:
        rng = np.random.default_rng(workload.seed)
        shape = (count, workload.frames, workload.resolution.height, workload.resolution.width, 3)
        self._clips = rng.integers(0, 256, size=shape, dtype=np.uint8)

    def __call__(self, index: int) -> np.ndarray:
        return self._clips[index % len(self._clips)]


def clip_source(workload: Workload) -> Callable[[int], np.ndarray]:
    """A function from a sample number to uint8 frames [frames, height, width, 3]; `data` is a name
    or a UCF-101 folder."""
    if workload.data == "tensors":
        return TensorClips(workload)
    from jepa.data.clip import ClipSpec

    size = {"height": workload.resolution.height, "width": workload.resolution.width}
    spec = ClipSpec(
        frames=workload.frames, stride=1 if workload.data == "moving_shapes" else 2, **size
    )
    if workload.data == "moving_shapes":
        from jepa.data.moving_shapes import MovingShapes

        shapes = MovingShapes(seed=workload.seed)
        return lambda index: shapes.read(index % len(shapes), spec, 0.5).frames
    folder = Path(workload.data)
    if not folder.is_dir():
        raise ValueError(
            "sweep: data must be moving_shapes, tensors or an existing UCF-101 folder, got "
            f"{workload.data!r}."
        )
    from jepa.data.files import FileClips

    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.avi"))
    if not files:
        raise ValueError(
            f"sweep: data must be a folder with .avi files in class folders, got {folder}, which "
            "has none."
        )
    # Labels only feed a loss whose value nobody reads; the class folders number them.
    classes = sorted({Path(name).parent.name for name in files})
    videos = FileClips(
        "ucf101",
        folder,
        files,
        [classes.index(Path(name).parent.name) for name in files],
        max(CLASSES, len(classes)),
    )
    return lambda index: videos.read(index % len(videos), spec, 0.5).frames


def make_batch(
    workload: Workload, policy: MaskPolicy | None, read: Callable[[int], np.ndarray], number: int
) -> LoadedBatch:
    """What a loader does for one batch, in this process: frames, motion maps if the policy asks,
    masks with their lists, to the device."""
    samples = [number * workload.batch + place for place in range(workload.batch)]
    frames = [read(sample) for sample in samples]
    masks: MaskBatch | None = None
    if policy is not None:
        maps = None if policy.motion is None else motion_maps(frames, workload.grid, policy.motion)
        masks = sample_masks(
            policy,
            workload.grid,
            seed=workload.seed,
            step=number,
            samples=range(workload.batch),
            motion_maps=maps,
        )
    labels = torch.tensor([sample % CLASSES for sample in samples])
    loaded = LoadedBatch(
        torch.from_numpy(np.stack(frames)), labels, torch.tensor(samples), masks, views=None
    )
    return loaded if workload.device == "cpu" else loaded.to(workload.device)


def normalised(workload: Workload, loaded: LoadedBatch) -> Tensor:
    """The clips as the models take them: float32 [B, 3, frames, height, width]."""
    return model_input(
        loaded, ViewSpec(workload.resolution.height, workload.resolution.width, flip=0.0)
    )


def load_encoder(path: str, model: ModelConfig) -> nn.Module:
    """`package.module:factory`, called with the ModelConfig; called like
    `jepa.models.encoder.Encoder`, with `blocks` for fine-tuning."""
    module_name, separator, attribute = path.partition(":")
    if not separator:
        raise ValueError(f"sweep: encoder must look like package.module:factory, got {path!r}.")
    return getattr(importlib.import_module(module_name), attribute)(model)


@dataclass
class Pretraining:
    """Weights, optimiser and the phases of one pre-training step."""

    workload: Workload
    bundle: training.ModelBundle = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(self.workload.seed)
        cfg = self.config(Group(MaskPolicy(), "ema"))
        self.bundle = training.ModelBundle(cfg.model, cfg.variant)
        if self.workload.encoder is not None:
            self.bundle.context_encoder = load_encoder(self.workload.encoder, cfg.model)
            self.bundle.target_encoder = training.frozen_copy(self.bundle.context_encoder)
        self.bundle.to(self.workload.device)
        self.optimizer = training.build_optimizer(self.bundle, cfg)
        self._teacher = self.optimizer.teacher

    def config(self, group: Group, config: VariantConfig | None = None) -> training.StepConfig:
        """The group's step with the baseline's objectives, or with those of a variant."""
        base = variant("baseline") if config is None else config
        chosen = replace(
            base, masks=group.policy, target=TargetConfig(group.target, base.target.detach)
        )
        schedule = ScheduleConfig(
            total_steps=TOTAL_STEPS, warmup_steps=0, rate=1e-5, initial_rate=1e-5, final_rate=1e-5
        )
        return training.StepConfig(
            self.workload.model, chosen, schedule, precision=self.workload.precision
        )

    def step(self, group: Group, batch: Batch, backend: str) -> dict[str, float]:
        """Seconds by phase of one step of the group with the baseline's objectives."""
        self.optimizer.teacher = self._teacher if group.target == "ema" else None
        state = training.TrainState(self.bundle, self.optimizer, self.config(group))
        with use_backend(backend):
            mark = Marks(self.workload)
            training.train_step(state, batch, mark)
        return mark.seconds()

    def features(self, group: Group, batch: Batch) -> dict[str, Tensor]:
        """Detached outputs of encoder and predictor, for timing objectives alone."""
        cfg = self.config(group)
        with torch.no_grad():
            _, live = training.target_features(self.bundle, batch, cfg)
            context = training.context_features(self.bundle, batch, cfg)
            predicted, predicted_context = training.predictions(self.bundle, context, batch, cfg)
        return {
            "target_live": live,
            "context_tokens": context,
            "predicted": predicted,
            "predicted_context": predicted_context,
        }


@dataclass
class Finetuning:
    """Supervised training as `jepa.finetune` does it: attentive pooler, layer-wise rates, clipping;
    with `frozen` only the head trains."""

    workload: Workload
    frozen: bool = False
    encoder: nn.Module = field(init=False)
    head: nn.Module = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        from jepa import finetune
        from jepa.models.encoder import Encoder
        from jepa.models.probes import Probe

        torch.manual_seed(self.workload.seed)
        model, device, own = self.workload.model, self.workload.device, self.workload.encoder
        self.encoder = (Encoder(model) if own is None else load_encoder(own, model)).to(device)
        self.head = Probe("attentive", model.width, model.heads, {"class": CLASSES}).to(device)
        cfg = finetune.FinetuneConfig(rate=1e-5)
        groups: Any = self.head.parameters()
        if not self.frozen:
            groups = finetune.layer_groups(
                SimpleNamespace(context_encoder=self.encoder), self.head, cfg, False
            )
        self.optimizer = torch.optim.AdamW(groups, lr=cfg.rate)
        self._limit = cfg.clip_gradient
        self._step = training.StepConfig(model, precision=self.workload.precision)

    def step(self, clips: Tensor, labels: Tensor, backend: str) -> dict[str, float]:
        """Seconds by phase of one step."""
        from jepa import finetune  # not at the top: a sweep of pre-training needs no data libraries

        with use_backend(backend):
            mark = Marks(self.workload)
            with torch.set_grad_enabled(not self.frozen):
                tokens = finetune.tokens_of(self.encoder, clips, self._step)
            mark("encoder")
            loss = nn.functional.cross_entropy(self.head(tokens)["class"], labels)
            mark("head")
            finetune.update(self.optimizer, loss, self._limit, mark)
        return mark.seconds()
