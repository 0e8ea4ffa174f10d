"""How long a sweep will take and what has to be left out: FLOP over a rate that is corrected after
every finished resolution."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import flop
from benchmarks.objective_cost import LEAST_OBJECTIVE_ROUNDS, is_baseline, signature
from benchmarks.workload import Group, Workload
from jepa.variants import VariantConfig

FIRST_GUESS_OF_PEAK = 0.35
OVERHEAD_S = 0.02  # a step of no tokens: Python, launches, optimiser
OBJECTIVE_SHARE = 0.12  # of a step, on average over the objectives
SAVED_FLOATS_PER_TOKEN_AND_WIDTH = 22  # what a block keeps for its backward, in units of the width
CONTEXT_SHARE = 0.4  # of the tokens, over both mask sets
FEW_ROUNDS = 2  # with which a resolution still has an interval; one is the least
MARGIN = 1.25  # kept for later resolutions beyond what they are expected to take


def memory_limit(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def step_flop(work: Workload, online: bool = False) -> float:
    """Of a step with typical masks."""
    seen = [round(CONTEXT_SHARE / 2 * work.tokens)] * (2 * work.batch)
    hidden = [work.tokens - seen[0]] * (2 * work.batch)
    return sum(
        part.total
        for part in flop.pretrain_step(
            work.model, work.tokens, work.batch, seen, hidden, online_target=online
        ).values()
    )


def step_bytes(work: Workload) -> float:
    """What an online-target step keeps for its backward: all tokens and the context in the encoder,
    all tokens twice in the predictor."""
    model, tokens = work.model, work.batch * work.tokens
    encoder = (1 + CONTEXT_SHARE) * tokens * model.width * model.depth
    predictor = 2 * tokens * model.predictor.width * model.predictor.depth
    return (
        4.0 * SAVED_FLOATS_PER_TOKEN_AND_WIDTH * (encoder + predictor)
        + 4.0 * 6 * tokens * model.feature_width * 2
    )


class Plan:
    """Keeps the clock of the whole sweep."""

    def __init__(
        self,
        record: dict[str, Any],
        configs: dict[str, VariantConfig],
        arguments: argparse.Namespace,
    ) -> None:
        self.record, self.arguments = record, arguments
        self.deadline = time.perf_counter() + arguments.budget
        self.rate = FIRST_GUESS_OF_PEAK * record["peak_flops"]
        # What sizes took beyond what was expected of them: models, batches, objectives, memory.
        self.correction = 1.0
        pretrains = any(mode in ("pretrain", "finetune+objective") for mode in arguments.modes)
        self.groups = (
            {Group.of(config, arguments.truncate) for config in configs.values()}
            if pretrains
            else set()
        )
        self.objectives = (
            len(
                {
                    (signature(c), Group.of(c, arguments.truncate))
                    for c in configs.values()
                    if not is_baseline(c)
                }
            )
            if pretrains
            else 0
        )
        finetunes = any(mode.startswith("finetune") for mode in arguments.modes)
        # In steps of pre-training: a fine-tuning step runs all tokens forward and backward, a
        # frozen one forward only.
        self.steps_per_pass = (
            len(self.groups) + 1.0 * finetunes + 0.4 * ("frozen" in arguments.modes)
        )

    def seconds(self, work: Workload, rounds: int) -> float:
        """Expected time of one resolution."""
        step = OVERHEAD_S + step_flop(work) / self.rate
        passes = (2 * rounds + 2) * self.steps_per_pass
        objectives = (
            (2 * max(LEAST_OBJECTIVE_ROUNDS, rounds) + 4)
            * self.objectives
            * (0.005 + OBJECTIVE_SHARE * step)
        )
        expected = len(self.arguments.backends) * (passes * step + objectives) + 1.0
        return self.correction * expected

    def remaining(self) -> float:
        return self.deadline - time.perf_counter()

    def refusal(self, work: Workload) -> str | None:
        """Why this resolution is not even tried; None if it is."""
        need, have = step_bytes(work), memory_limit(work.device)
        if need > 0.8 * have:
            return (
                f"it would need about {need / 2**30:.1f} GB of memory, this device has "
                f"{have / 2**30:.1f} GB"
            )
        least = self.seconds(work, 1)
        if self.record["sizes"] and least > self.remaining():
            return (
                f"it would take at least {least:.0f} s, {max(0.0, self.remaining()):.0f} s of "
                "the budget are left"
            )
        return None

    def share(self, todo: Sequence[Workload]) -> float:
        """Seconds for the first of what is left: in proportion to its expected cost, but rounds are
        given up before a later resolution is."""
        first, *later = (work for work in todo if self.refusal(work) is None)
        wanted = [self.seconds(work, self.arguments.rounds) for work in (first, *later)]
        fair = self.remaining() * wanted[0] / sum(wanted)
        for rounds in (min(FEW_ROUNDS, self.arguments.rounds), 1):
            spare = self.remaining() - MARGIN * sum(self.seconds(work, rounds) for work in later)
            if spare >= self.seconds(first, rounds):
                return min(fair, spare)
        return min(fair, self.seconds(first, 1))

    def more_rounds(self, todo: Sequence[Workload]) -> tuple[int, float]:
        """(rounds, seconds) for the first of the sizes that have one round each, its share of what
        is left; one round means that it stays as it is."""
        if self.refusal(todo[0]) is not None:
            return 1, 0.0
        budget_s = min(self.share(todo), self.remaining())
        for rounds in range(self.arguments.rounds, 1, -1):
            if self.seconds(todo[0], rounds) <= budget_s:
                return rounds, budget_s
        return 1, budget_s

    def learn(self, work: Workload, rounds: int = 1, spent_s: float | None = None) -> None:
        """Corrects the rate from the baseline steps just measured, and the expectation from what
        the whole size took."""
        rows = [
            row
            for row in self.record["measured"]
            if row["resolution"] == work.resolution.name and row["status"] == "ok"
        ]
        steps = [sum(row["phases_s"].values()) for row in rows if row["kind"] == "pretrain"]
        if steps:
            mean = sum(steps) / len(steps)
            self.rate = step_flop(work) / max(1e-3, mean - OVERHEAD_S)
        if spent_s is not None:
            self.correction *= spent_s / self.seconds(work, rounds)

    def describe(self, todo: Sequence[Workload]) -> str:
        lines = [
            f"sweep: {len(self.arguments.variants)} variants in {len(self.groups)} groups, "
            f"{self.objectives} sets of objectives, "
            f"backends {', '.join(self.arguments.backends)}, {self.arguments.size}, "
            f"{self.arguments.frames} frames, "
            f"batch {self.arguments.batch}, {self.arguments.dtype}, budget "
            f"{self.arguments.budget:.0f} s"
        ]
        spent = 0.0
        for work in todo:
            wanted, least = self.seconds(work, self.arguments.rounds), self.seconds(work, 1)
            if spent + wanted <= self.arguments.budget:
                fits = "fits"
            elif spent + least <= self.arguments.budget:
                fits = "with fewer rounds"
            else:
                fits = "left out unless faster than expected"
            spent += min(wanted, max(least, self.arguments.budget - spent))
            lines.append(
                f"{work.resolution.name:>8} px  {work.tokens:6d} tokens  about {wanted:5.0f} s "
                f"for all rounds ({fits})"
            )
        return "\n".join(lines)
