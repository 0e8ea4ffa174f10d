"""The published code's defects that change numbers, by name. All are off by default; each can be
switched on alone, or all together.

Numbers D1..D13 are those of the project's list of defects. D8 (modules missing from the
repository), D9 (crashes), D12 (host synchronisations) and D13 (a slow loop) change no number and
have no switch; D5 (where the appearance share lies) is the option `factorisation.split`, whose
default is the published one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jepa.config import ConfigError, from_dict, nearest


def _switch(defect: str, meaning: str) -> Any:
    return dataclasses.field(default=False, metadata={"defect": defect, "meaning": meaning})


@dataclass(frozen=True)
class PublishedBehaviour:
    """One switch per defect of the published code; False means fixed."""

    dynamics_hard_no_gradient: bool = _switch(
        "D1", "a hard-region-weighted dynamics loss sends no gradient to anything"
    )
    dynamics_hard_pooled: bool = _switch(
        "D1", "its softmax pools every pair of a mask set instead of those of one sample"
    )
    motion_maximum_of_wrong_sample: bool = _switch(
        "D2", "a motion map's step t is divided by the maximum of sample t"
    )
    motion_point_sampling: bool = _switch(
        "D3", "motion maps are point samples instead of area averages"
    )
    evaluate_initial_target: bool = _switch(
        "D4", "without an EMA, the encoder that is evaluated is the one from before training"
    )
    context_ramp_fixed_steps: bool = _switch(
        "D6",
        "the context-loss ramp runs from step 15,000 to 30,000 whatever the length of training",
    )
    resume_drops_heads: bool = _switch("D7", "resuming starts the objectives' heads anew")
    truncate_to_batch_minimum: bool = _switch(
        "D10", "every token list of a mask set is cut to the shortest of the batch"
    )
    shared_block_size: bool = _switch(
        "D10", "all samples of a batch share one block size, which makes truncation bearable"
    )
    shared_mask_token: bool = _switch(
        "D11", "all mask sets share mask token 0; the others never train"
    )
    repeat_stills: bool = _switch(
        "D11", "a still becomes a clip of equal frames, so the image path never trains"
    )
    rank_independent_seed: bool = _switch(
        "-", "all ranks draw the same crops, clip starts and masks"
    )

    @classmethod
    def published(cls) -> PublishedBehaviour:
        """Every switch on."""
        return cls(**{name: True for name in cls.names()})

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(f.name for f in dataclasses.fields(cls))

    @classmethod
    def of(cls, names: Iterable[str]) -> PublishedBehaviour:
        """The named switches on; ``all`` stands for all of them.

        Raises:
            ConfigError: a name that is none of them.
        """
        chosen = list(names)
        if "all" in chosen:
            return cls.published()
        for name in chosen:
            if name not in cls.names():
                raise ConfigError(
                    f"config: unknown published behaviour {name!r}; "
                    f"{nearest(name, (*cls.names(), 'all'))}"
                )
        return cls(**{name: True for name in chosen})

    def active(self) -> tuple[str, ...]:
        return tuple(name for name in self.names() if getattr(self, name))

    @classmethod
    def describe(cls) -> dict[str, tuple[str, str]]:
        """Name -> (number in the list of defects, what the published code does)."""
        return {
            f.name: (f.metadata["defect"], f.metadata["meaning"]) for f in dataclasses.fields(cls)
        }


def parse_published_behaviour(value: Any, path: str) -> PublishedBehaviour:
    """A configuration value as PublishedBehaviour: a list of names, ``all``, a mapping name ->
    bool, or PublishedBehaviour."""
    if isinstance(value, PublishedBehaviour):
        return value
    if isinstance(value, Mapping):
        return from_dict(PublishedBehaviour, value, path)
    if not isinstance(value, str | list | tuple):
        raise ConfigError(f"config: {path} must be a list of names, got {value!r}.")
    return PublishedBehaviour.of([value] if isinstance(value, str) else value)
