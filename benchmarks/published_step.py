"""An eager reproduction of the published training step: the same arithmetic at the same cost, in
our own code.

It is the baseline of the step benchmark. Every mask set goes through the encoder and the
predictor on its own, the whole clip is embedded for each of them, positions and rotations are
recomputed in every block, tokens are sorted in the predictor, objectives scatter to a dense grid,
context distances are found one token at a time. `tests/benchmarks/test_published_step.py` holds it
to the golden steps of the published code (losses, terms, gradients, parameters after two updates),
for every published variant.

    # step time, and the shares of SDPA and of the rotation
    python -m benchmarks.published_step --resolution 224 --dtype float32
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import eager_objectives as terms
from benchmarks.eager_model import EagerEncoder, EagerPredictor

HEAD_HIDDEN = 256


@dataclass(frozen=True)
class Recipe:
    """One published variant: weights of its terms and their constants. The mask policy is the
    caller's."""

    hard_region: float = 0.0
    static: float = 0.0
    orthogonality: float = 0.0
    delta: float = 0.0
    dynamics: float = 0.0
    spectral: float = 0.0
    contrastive: float = 0.0
    action: float = 0.0
    kinematic: float = 0.0
    kinematic_kind: str = "l1"
    kinematic_share: float = 1.0
    velocity_gate: float = 0.0
    hamiltonian: float = 0.0
    sigreg: float = 0.0
    ema: bool = True


_FACTORIZED = {"static": 0.05, "orthogonality": 0.01}
RECIPES = {
    "baseline": Recipe(),
    "motion_guided": Recipe(),
    "amg": Recipe(),
    "future_predictive": Recipe(),
    "motion_future": Recipe(),
    "hw": Recipe(hard_region=0.3),
    "delta": Recipe(delta=0.5),
    "combo": Recipe(delta=0.5, hard_region=0.3),
    "fwm": Recipe(**_FACTORIZED),
    "ld": Recipe(dynamics=1.0),
    "fwm_ld": Recipe(dynamics=1.0, **_FACTORIZED),
    "hw_ld": Recipe(hard_region=1.0, dynamics=1.0),
    "fwm_hw_ld": Recipe(hard_region=1.0, dynamics=1.0, **_FACTORIZED),
    "spectral": Recipe(spectral=1.0),
    "ltc": Recipe(contrastive=0.5),
    "ac": Recipe(action=1.0),
    "ac_hw": Recipe(action=1.0, hard_region=0.3),
    "fac": Recipe(action=1.0, **_FACTORIZED),
    "kinematic": Recipe(kinematic=1.0, ema=False),
    "kinematic_0_1": Recipe(kinematic=0.1, ema=False),
    "kinematic_huber": Recipe(kinematic=0.1, kinematic_kind="huber", ema=False),
    "kinematic_accel": Recipe(kinematic=0.1, kinematic_kind="acceleration", ema=False),
    "kinematic_split": Recipe(
        kinematic=0.1, kinematic_kind="acceleration", kinematic_share=0.5, ema=False
    ),
    "kinematic_anneal": Recipe(kinematic=0.1, kinematic_kind="acceleration", ema=False),
    "velgate": Recipe(velocity_gate=1.0),
    "hamiltonian": Recipe(hamiltonian=1.0),
    "sigreg": Recipe(sigreg=1.0),
    "sigreg_no_ema": Recipe(sigreg=1.0, ema=False),
}


@dataclass(frozen=True)
class Size:
    dim: int
    depth: int
    heads: int
    predictor_dim: int = 256
    predictor_depth: int = 8
    predictor_heads: int = 8


SIZES = {
    "micro": Size(96, 4, 3, 64, 4, 2),
    "tiny": Size(192, 12, 3),
    "small": Size(384, 12, 6),
    "base": Size(768, 12, 12),
    "large": Size(1024, 24, 16),
}


class Energy(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(width, HEAD_HIDDEN),
            nn.GELU(),
            nn.Linear(HEAD_HIDDEN, HEAD_HIDDEN),
            nn.GELU(),
            nn.Linear(HEAD_HIDDEN, 1),
        )

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return self.net(state)


@dataclass
class Outcome:
    loss: torch.Tensor
    terms: dict[str, torch.Tensor]
    context: list[torch.Tensor] = field(default_factory=list)
    predicted: list[torch.Tensor] = field(default_factory=list)
    predicted_context: list[torch.Tensor] = field(default_factory=list)
    targets: torch.Tensor | None = None


class PublishedStep:
    """Models, heads, optimiser and the step. Masks are lists of [B, K] id tensors, one per mask set
    (truncated to the batch minimum)."""

    momentum = 0.99925
    context_weight = 0.5
    weight_decay = 0.04
    head_split = 0.5

    def __init__(
        self,
        size: Size,
        recipe: Recipe,
        *,
        checkpointing: bool = False,
        autocast: torch.dtype | None = None,
        rope: bool = True,
        device: str = "cpu",
    ) -> None:
        self.recipe, self.autocast, self.device = recipe, autocast, torch.device(device)
        self.encoder = EagerEncoder(
            size.dim, size.depth, size.heads, checkpointing=checkpointing, rope=rope
        ).to(device)
        self.predictor = EagerPredictor(
            size.dim,
            size.predictor_dim,
            size.predictor_depth,
            size.predictor_heads,
            checkpointing=checkpointing,
            rope=rope,
        ).to(device)
        width = 4 * size.dim
        self.split = (
            max(1, int(width * self.head_split)) if recipe.static or recipe.orthogonality else 0
        )
        self.heads = nn.ModuleDict()
        if recipe.dynamics:
            self.heads["dyn_head"] = self._head(width - self.split, width)
        if recipe.action:
            self.heads["action_head"] = self._head(width - self.split, 3)
        if recipe.hamiltonian:
            self.heads["hamiltonian_net"] = Energy(width)
        self.heads.to(device)
        self.step_number = 0
        self.reset_training_state()

    @staticmethod
    def _head(width: int, out: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(width, HEAD_HIDDEN), nn.GELU(), nn.Linear(HEAD_HIDDEN, out))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for prefix, module in (("encoder", self.encoder), ("predictor", self.predictor)):
            for name, parameter in module.named_parameters():
                yield f"{prefix}.{name}", parameter
        yield from self.heads.named_parameters()

    def reset_training_state(self) -> None:
        """Target encoder = copy of the online one, fresh optimiser. Call again after loading
        weights."""
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        plain, exempt = [], []
        for name, parameter in self.named_parameters():
            (exempt if name.endswith("bias") or parameter.dim() == 1 else plain).append(parameter)
        groups = [
            {"params": plain, "weight_decay": self.weight_decay},
            {"params": exempt, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=6e-4)

    def _standardised_targets(self, clip: torch.Tensor) -> torch.Tensor:
        if self.recipe.ema:
            with torch.no_grad():
                raw = self.target_encoder(clip)
        else:
            raw = self.encoder(clip)
        width = raw.shape[-1] // 4
        return torch.cat(
            [F.layer_norm(level, (width,)) for level in raw.split(width, dim=-1)], dim=-1
        )

    def forward(
        self,
        clip: torch.Tensor,
        context_ids: Sequence[torch.Tensor],
        target_ids: Sequence[torch.Tensor],
    ) -> Outcome:
        grid = (
            clip.shape[2] // self.encoder.tubelet_size,
            clip.shape[3] // self.encoder.patch_size,
            clip.shape[4] // self.encoder.patch_size,
        )
        scope = (
            torch.autocast(self.device.type, self.autocast)
            if self.autocast is not None
            else contextlib.nullcontext()
        )
        with scope:
            h = self._standardised_targets(clip)
            z = [self.encoder(clip, ids) for ids in context_ids]
            outputs = [
                self.predictor(*row, grid) for row in zip(z, context_ids, target_ids, strict=True)
            ]
            predicted, predicted_context = (
                [pair[0] for pair in outputs],
                [pair[1] for pair in outputs],
            )
            features = terms.Features(
                grid, z, predicted, predicted_context, list(context_ids), list(target_ids), h, clip
            )
            parts = self._base_terms(features)
            loss = parts["loss_pred"] + self.context_weight * parts["loss_context"]
            for name, weight, value in self._auxiliary(features):
                parts[name] = value
                loss = loss + weight * value
        return Outcome(loss, parts, z, predicted, predicted_context, h)

    @staticmethod
    def _base_terms(features: terms.Features) -> dict[str, torch.Tensor]:
        prediction, context = [], []
        for number, (seen, hidden) in enumerate(
            zip(features.context_ids, features.target_ids, strict=True)
        ):
            prediction.append(
                (features.predicted[number] - terms.at(features.targets, hidden)).abs().mean()
            )
            distance = terms.mask_distance(seen, hidden, features.grid)
            error = (features.predicted_context[number] - terms.at(features.targets, seen)).abs()
            context.append((error / distance.unsqueeze(-1)).mean())
        return {
            "loss_pred": terms.average(prediction, features.targets),
            "loss_context": terms.average(context, features.targets),
        }

    def _auxiliary(self, features: terms.Features) -> Iterator[tuple[str, float, torch.Tensor]]:
        recipe = self.recipe
        hard = 1.0 if recipe.hard_region else None
        if recipe.hard_region:
            yield "hw_loss", recipe.hard_region, terms.hard_region(features, 1.0)
        if recipe.static or recipe.orthogonality:
            static, orthogonal = terms.factorized(features, self.head_split)
            yield "fwm_static_loss", recipe.static, static
            yield "fwm_orth_loss", recipe.orthogonality, orthogonal
        if recipe.delta:
            yield "delta_loss", recipe.delta, terms.delta(features)
        if recipe.dynamics:
            yield (
                "ld_loss",
                recipe.dynamics,
                terms.latent_dynamics(features, self.heads["dyn_head"], self.split, hard),
            )
        if recipe.spectral:
            yield "spectral_loss", recipe.spectral, terms.spectral(features)
        if recipe.contrastive:
            yield "ltc_loss", recipe.contrastive, terms.contrastive(features, 0.5)
        if recipe.action:
            yield (
                "ac_loss",
                recipe.action,
                terms.action(features, self.heads["action_head"], self.split),
            )
        if recipe.kinematic:
            value = terms.kinematic(features, recipe.kinematic_kind, recipe.kinematic_share)
            yield "kinematic_loss", recipe.kinematic, value
        if recipe.velocity_gate:
            yield "velgate_loss", recipe.velocity_gate, terms.velocity_gate(features, 0.5)
        if recipe.hamiltonian:
            yield (
                "hamiltonian_loss",
                recipe.hamiltonian,
                terms.hamiltonian(features, self.heads["hamiltonian_net"], 0.1),
            )
        if recipe.sigreg:
            generator = torch.Generator(device="cpu").manual_seed(self.step_number)
            draw = torch.randn(features.context[0].shape[-1], 1024, generator=generator)
            yield (
                "sigreg_loss",
                recipe.sigreg,
                terms.sliced_gaussianity(features, F.normalize(draw, dim=0).to(self.device)),
            )

    def train_step(
        self,
        clip: torch.Tensor,
        context_ids: Sequence[torch.Tensor],
        target_ids: Sequence[torch.Tensor],
        *,
        learning_rate: float | None = None,
    ) -> Outcome:
        """Forward, backward, AdamW, EMA (two foreach passes)."""
        outcome = self.forward(clip, context_ids, target_ids)
        outcome.loss.backward()
        if learning_rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.recipe.ema:
            with torch.no_grad():
                ours, theirs = (
                    list(self.target_encoder.parameters()),
                    list(self.encoder.parameters()),
                )
                torch._foreach_mul_(ours, self.momentum)
                torch._foreach_add_(ours, theirs, alpha=1 - self.momentum)
        self.step_number += 1
        return outcome


def shares(
    size: Size,
    recipe: Recipe,
    clip: torch.Tensor,
    context_ids: Sequence[torch.Tensor],
    target_ids: Sequence[torch.Tensor],
    **options: object,
) -> dict[str, float]:
    """Seconds of one step and the shares of SDPA (profiler, forward and backward) and of the
    rotation (a second model without it, A B B A)."""
    torch.manual_seed(0)
    full = PublishedStep(size, recipe, **options)
    bare = PublishedStep(size, recipe, rope=False, **options)

    # With one thread, CPU time: it tells the rotation from the noise of a busy machine.
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def seconds(model: PublishedStep) -> float:
        start = now()
        model.train_step(clip, context_ids, target_ids)
        return now() - start

    seconds(full), seconds(bare)
    whole, ratio = [], []
    for _ in range(2):
        first, other = seconds(full), seconds(bare) + seconds(bare)
        second = seconds(full)
        whole += [first, second]
        ratio.append(1 - other / (first + second))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        full.train_step(clip, context_ids, target_ids)
    events = profile.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    attention = sum(
        event.self_cpu_time_total
        for event in events
        if "scaled_dot_product" in event.key and not event.key.endswith("Backward0")
    )
    return {
        "step_s": statistics.median(whole),
        "rope_share": statistics.median(ratio),
        "sdpa_share": attention / total,
    }


def random_blocks(
    grid: tuple[int, int, int],
    batch: int,
    *,
    seed: int = 0,
    policies: Sequence[tuple[int, float]] = ((8, 0.15), (2, 0.7)),
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Context and target ids of full-length blocks, truncated to the batch minimum; (count, share
    of a frame) per mask set."""
    depth, height, width = grid
    generator = torch.Generator().manual_seed(seed)
    contexts, targets = [], []
    for count, share in policies:
        seen_rows, hidden_rows = [], []
        for _ in range(batch):
            hidden = torch.zeros(height, width, dtype=torch.bool)
            for _ in range(count):
                aspect = 0.75 + 0.75 * float(torch.rand((), generator=generator))
                rows = min(height, max(1, round((share * height * width * aspect) ** 0.5)))
                columns = min(width, max(1, round((share * height * width / aspect) ** 0.5)))
                top = int(torch.randint(0, height - rows + 1, (), generator=generator))
                left = int(torch.randint(0, width - columns + 1, (), generator=generator))
                hidden[top : top + rows, left : left + columns] = True
            if bool(hidden.all()):  # a batch always keeps some context
                hidden[0, 0] = False
            flat = hidden.flatten().repeat(depth)
            hidden_rows.append(flat.nonzero().flatten())
            seen_rows.append((~flat).nonzero().flatten())
        contexts.append(torch.stack([row[: min(map(len, seen_rows))] for row in seen_rows]))
        targets.append(torch.stack([row[: min(map(len, hidden_rows))] for row in hidden_rows]))
    return contexts, targets


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.published_step",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--size", default="tiny", choices=sorted(SIZES))
    parser.add_argument("--variant", default="baseline", choices=sorted(RECIPES))
    parser.add_argument("--resolution", type=int, default=112, help="pixels, square (default 112)")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16"], help="bfloat16 = autocast"
    )
    parser.add_argument(
        "--checkpointing", action="store_true", help="as the published configuration has it"
    )
    parser.add_argument(
        "--threads", type=int, help="torch threads; 1 also counts CPU time instead of wall time"
    )
    arguments = parser.parse_args(argv)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    grid = (arguments.frames // 2, arguments.resolution // 16, arguments.resolution // 16)
    seen, hidden = random_blocks(grid, arguments.batch)
    clip = torch.randn(
        arguments.batch, 3, arguments.frames, arguments.resolution, arguments.resolution
    )
    autocast = torch.bfloat16 if arguments.dtype == "bfloat16" else None
    result = shares(
        SIZES[arguments.size],
        RECIPES[arguments.variant],
        clip,
        seen,
        hidden,
        checkpointing=arguments.checkpointing,
        autocast=autocast,
    )
    print(
        f"{arguments.variant} {arguments.size} {arguments.resolution} px {arguments.dtype}: "
        f"{result['step_s']:.3f} s per step, "
        f"SDPA {100 * result['sdpa_share']:.1f} %, rotation {100 * result['rope_share']:.1f} %"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
