"""A run small enough for tests: a two-block model on four frames of 64 px, one thread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jepa.data.build import DataConfig
from jepa.monitor import MonitorConfig
from jepa.pretrain import PretrainConfig
from jepa.schedules import ScheduleConfig
from jepa.variants import variant
from tests.jepa.training_cases import small_model


def tiny_run(
    output: Path, *, steps: int = 4, name: str = "baseline", **changes: Any
) -> PretrainConfig:
    """A pre-training run of `steps` steps, logged and saved at each one unless told otherwise."""
    values = dict(
        model=small_model(),
        variant=variant(name, objectives={"context": {"schedule": {"kind": "constant"}}}),
        schedule=ScheduleConfig(
            total_steps=steps, warmup_steps=1, momentum=0.9, final_momentum=0.99
        ),
        data=DataConfig(size=40, test_size=20),
        output=output,
        batch_size=2,
        frames=4,
        height=64,
        width=64,
        device="cpu",
        threads=1,
        log_every=1,
        checkpoint_every=1,
        monitor=MonitorConfig(clips=2),
    )
    return PretrainConfig(**{**values, **changes})
