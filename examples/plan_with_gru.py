"""Learns a world model of a toy world with the GRU cell, then plans in its latent space with the
cross-entropy method (CEM).

    python examples/plan_with_gru.py
    python examples/plan_with_gru.py --training-steps 800 --candidates 4096

The world is a disc that is pushed about in a box; an agent sees 64 features of its position and
velocity. Training rolls the cell out over 16 actions, with gradients through time and without
writing predicted states. Planning scores 1,024 action sequences a round by where their rollout
ends.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jepa_kernels import GRU, latent_rollout, latent_rollout_loss

WIDTH, ACTIONS, HORIZON = 64, 2, 16


class World:
    """A disc in the box [-1, 1]^2: `state` [N, 4] is position and velocity, an action pushes it and
    walls stop it."""

    def __init__(self, generator: torch.Generator) -> None:
        self.projection = 0.7 * torch.randn(4, WIDTH, generator=generator)
        self.phase = 6.28 * torch.rand(WIDTH, generator=generator)

    def see(self, state: Tensor) -> Tensor:
        """Features [N, 64] of standardised size, as a trained encoder gives them."""
        scaled = state * torch.tensor([1.0, 1.0, 2.0, 2.0])
        return F.layer_norm(torch.sin(scaled @ self.projection + self.phase), (WIDTH,))

    def act(self, state: Tensor, action: Tensor) -> Tensor:
        position, velocity = state.split(2, dim=-1)
        velocity = 0.7 * velocity + 0.1 * action.clamp(-1, 1)
        moved = position + velocity
        return torch.cat((moved.clamp(-1, 1), torch.where(moved.abs() > 1, 0.0, velocity)), dim=-1)

    def follow(self, state: Tensor, actions: Tensor) -> Tensor:
        """Every state after each of the actions [K, N, 2]: [K, N, 4]."""
        states = []
        for action in actions:
            state = self.act(state, action)
            states.append(state)
        return torch.stack(states)


class WorldModel(nn.Module):
    """z' = LayerNorm(GRUCell(action, z))."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.norm = nn.GRUCell(ACTIONS, WIDTH), nn.LayerNorm(WIDTH)

    @property
    def cell(self) -> GRU:
        return GRU.from_modules(self.gru, self.norm)


def train(model: WorldModel, world: World, steps: int, generator: torch.Generator) -> float:
    """Fits the model to random play; returns the last loss."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    loss = torch.zeros(())
    for _ in range(steps):
        start = (torch.rand(128, 4, generator=generator) * 2 - 1) * torch.tensor(
            [1.0, 1.0, 0.2, 0.2]
        )
        # Pushes that persist for a while take the disc further than independent ones.
        actions = (
            torch.randn(1, 128, 2, generator=generator)
            + torch.randn(HORIZON, 128, 2, generator=generator)
        ).clamp(-1, 1)
        targets = world.see(world.follow(start, actions))
        loss = latent_rollout_loss(
            world.see(start), model.cell, targets, actions=actions, exponent=2.0
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item()


@torch.no_grad()
def plan(
    cell: GRU, now: Tensor, goal: Tensor, candidates: int, rounds: int, generator: torch.Generator
) -> Tensor:
    """Actions [16, 2] whose rollout from `now` [1, 64] ends nearest to `goal` [1, 64]: sample, keep
    the best 64, refit, repeat."""
    mean, spread = torch.zeros(HORIZON, 1, ACTIONS), torch.ones(HORIZON, 1, ACTIONS)
    for _ in range(rounds):
        actions = (
            mean + spread * torch.randn(HORIZON, candidates, ACTIONS, generator=generator)
        ).clamp(-1, 1)
        # Every candidate starts from the same state, which is read in place.
        ends = latent_rollout(
            now.expand(candidates, -1), cell, HORIZON, actions=actions, output="last"
        )
        cost = (ends - goal).square().mean(-1)
        best = actions[:, cost.topk(64, largest=False).indices]
        mean, spread = best.mean(1, keepdim=True), best.std(1, keepdim=True)
    return mean[:, 0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--training-steps", type=int, default=400)
    parser.add_argument("--candidates", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tasks", type=int, default=8, help="pairs of a start and a goal")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    generator = torch.Generator().manual_seed(options.seed)
    torch.manual_seed(options.seed)
    world, model = World(generator), WorldModel()
    began = time.perf_counter()
    loss = train(model, world, options.training_steps, generator)
    print(
        f"world model: {options.training_steps} steps of training, loss {loss:.3f}, "
        f"{time.perf_counter() - began:.1f} s"
    )

    began = time.perf_counter()
    reached, by_chance = [], []
    for _ in range(options.tasks):
        places = torch.rand(2, 2, generator=generator) * 1.6 - 0.8
        start, goal = (torch.cat((place, torch.zeros(2)))[None] for place in places)
        actions = plan(
            model.cell,
            world.see(start),
            world.see(goal),
            options.candidates,
            options.rounds,
            generator,
        )
        reached.append((world.follow(start, actions[:, None])[-1, 0, :2] - goal[0, :2]).norm())
        random = torch.rand(HORIZON, 256, ACTIONS, generator=generator) * 2 - 1
        by_chance.append(
            (world.follow(start.expand(256, 4), random)[-1, :, :2] - goal[0, :2])
            .norm(dim=-1)
            .mean()
        )
    planned, chance = torch.stack(reached).mean(), torch.stack(by_chance).mean()
    spent = (time.perf_counter() - began) / options.tasks
    print(
        f"planned: ends {planned:.3f} from the goal on average over {options.tasks} tasks "
        f"({spent:.2f} s a plan)"
    )
    print(f"random actions: {chance:.3f}")


if __name__ == "__main__":
    main()
