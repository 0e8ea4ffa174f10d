"""A whole training step against the published one in one process: our step with the published
behaviour switched on, and an eager reproduction of the published step.

The reproduction (`py`) is held to the golden steps of the published code. Both sides
start from the same weights, see the same clips and the same masks (truncated to the batch minimum),
and must give the same loss. `untruncated` compares our own default, no truncation and one packed
call for all mask sets, per token of encoder and predictor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks import flop, harness, published_step
from benchmarks.published_step import PublishedStep
from benchmarks.resolutions import Resolution, parse_resolution
from jepa import step as training
from jepa.allocator import keep_freed_memory
from jepa.batch import Batch, MaskBatch
from jepa.masks import MaskPolicy, sample_masks
from jepa.models.sizes import SIZES
from jepa.schedules import ScheduleConfig
from jepa.variants import variant
from jepa_kernels import use_backend

OP = "step"
FRAMES, BATCH = 16, 2
# Past the published context ramp, so that the context loss has its full weight on both sides.
STEP = 40_000
LOSS_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


@dataclass
class Inputs:
    clip: torch.Tensor
    masks: MaskBatch
    context_ids: list[torch.Tensor]
    target_ids: list[torch.Tensor]


def inputs(resolution: Resolution, options: harness.Options, *, truncate: str) -> Inputs:
    torch.manual_seed(options.seed)
    clip = torch.randn(BATCH, 3, FRAMES, resolution.height, resolution.width)
    policy = MaskPolicy(truncate=truncate, shared_block_size=True)
    masks = sample_masks(
        policy, resolution.grid(FRAMES), seed=options.seed, step=0, samples=range(BATCH)
    )
    lists = []
    for ids, offsets in (
        (masks.context_ids, masks.context_cu),
        (masks.target_ids, masks.target_cu),
    ):
        rows = ids.split(offsets.diff().tolist())
        equal = [rows[j * BATCH : (j + 1) * BATCH] for j in range(masks.num_sets)]
        lists.append(
            [torch.stack(part).to(options.device) for part in equal]
            if truncate == "batch_min"
            else []
        )
    return Inputs(clip.to(options.device), masks.to(options.device), *lists)


def our_state(size: str, precision: str, checkpointing: bool, device: str) -> training.TrainState:
    model = replace(SIZES[size], checkpoint_activations=checkpointing)
    chosen = variant("baseline", published_behaviour="all")
    cfg = training.StepConfig(
        model,
        chosen,
        ScheduleConfig(rate=1e-5, initial_rate=1e-5, final_rate=1e-5),
        precision=precision,
    )
    torch.manual_seed(0)
    return training.new_state(cfg, device)


def their_state(
    state: training.TrainState, size: str, dtype: str, checkpointing: bool, device: str
) -> PublishedStep:
    """The published step with our weights."""
    autocast = torch.bfloat16 if dtype == "bfloat16" else None
    published = PublishedStep(
        published_step.SIZES[size],
        published_step.RECIPES["baseline"],
        checkpointing=checkpointing,
        autocast=autocast,
        device=device,
    )
    published.encoder.load_state_dict(state.bundle.context_encoder.state_dict())
    ours = state.bundle.predictor.state_dict()
    missing = published.predictor.load_state_dict(ours, strict=False)
    if missing.unexpected_keys or any("mask_tokens" not in name for name in missing.missing_keys):
        raise ValueError(f"bench_step: weights must have the published ones' names, got {missing}.")
    published.reset_training_state()
    return published


def our_call(state: training.TrainState, batch: Batch, backend: str) -> Callable[[], object]:
    def call() -> object:
        with use_backend(backend):
            return training.train_step(state, batch)

    return call


def gate(
    state: training.TrainState,
    published: PublishedStep,
    batch: Batch,
    given: Inputs,
    dtype: str,
    backend: str,
) -> None:
    """The same loss from the same weights; asked again after either side has trained, the first
    answer stands."""
    if state.step > 0:
        return
    with torch.no_grad(), use_backend(backend):
        ours, _ = training.loss_step(state.bundle, batch, state.cfg)
        theirs = published.forward(given.clip, given.context_ids, given.target_ids).loss
    harness.require_close("loss", ours, theirs, rtol=LOSS_TOLERANCE[dtype])


def step_flop(size: str, masks: MaskBatch) -> float:
    lengths = (masks.context_cu.diff().tolist(), masks.target_cu.diff().tolist())
    return sum(
        part.total
        for part in flop.pretrain_step(SIZES[size], masks.num_tokens, BATCH, *lengths).values()
    )


def comparisons(options: harness.Options) -> Iterator[harness.Comparison]:
    if options.device == "cpu":
        keep_freed_memory()  # as jepa.pretrain does; for both sides alike
    size = "micro" if options.quick else "tiny"
    sizes = ("64",) if options.quick else ("112", "224")
    for dtype in options.dtypes or harness.default_dtypes(options.device):
        for name in sizes:
            for checkpointing in (False,) if options.quick else (False, True):
                yield from _case(options, size, dtype, parse_resolution(name), checkpointing)


def _case(
    options: harness.Options, size: str, dtype: str, resolution: Resolution, checkpointing: bool
) -> Iterator[harness.Comparison]:
    precision = {"float32": "fp32", "bfloat16": "bf16"}[dtype]
    given = inputs(resolution, options, truncate="batch_min")
    batch = Batch(given.clip, given.masks, STEP)
    for backend in options.backends or ("auto",):
        # Ours never needs checkpointing to match: the published configuration has it on, so
        # `checkpointed` is their choice, not ours.
        state = our_state(size, precision, False, options.device)
        published = their_state(state, size, dtype, checkpointing, options.device)

        def theirs(published: PublishedStep = published) -> object:
            return published.train_step(given.clip, given.context_ids, given.target_ids)

        label = "published, checkpointing" if checkpointing else "published"
        yield harness.Comparison(
            case=f"{size}/{resolution.name}px/{FRAMES}f",
            dtype=dtype,
            pass_name="step",
            backend=backend,
            baseline=label,
            candidate=our_call(state, batch, backend),
            reference=theirs,
            gate=lambda state=state, published=published, backend=backend: gate(
                state, published, batch, given, dtype, backend
            ),
            flop=step_flop(size, given.masks),
            details={
                "resolution": resolution.name,
                "tokens": resolution.tokens(FRAMES),
                "batch": BATCH,
                "size": size,
            },
        )
        if checkpointing:
            continue
        free = inputs(resolution, options, truncate="none")
        free_batch = Batch(free.clip, free.masks, STEP)
        per_token = _tokens(free.masks) / _tokens(given.masks)
        yield harness.Comparison(
            case=f"{size}/{resolution.name}px/{FRAMES}f/untruncated",
            dtype=dtype,
            pass_name="step",
            backend=backend,
            baseline="published",
            candidate=our_call(state, free_batch, backend),
            reference=theirs,
            gate=lambda: None,
            flop=step_flop(size, free.masks),
            details={
                "resolution": resolution.name,
                "tokens": resolution.tokens(FRAMES),
                "batch": BATCH,
                "size": size,
                "tokens_over_published": per_token,
            },
        )


def _tokens(masks: MaskBatch) -> int:
    """Tokens that blocks run on: all of the clip in the target encoder, the context, and context
    and targets in the predictor."""
    return BATCH * masks.num_tokens + 2 * masks.context_ids.numel() + masks.target_ids.numel()


if __name__ == "__main__":
    raise SystemExit(harness.main(OP, comparisons, __doc__))
