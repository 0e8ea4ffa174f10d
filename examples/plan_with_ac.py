"""Learns a frame-causal, action-conditioned predictor of moving_shapes, then plans in its latent
space with the cross-entropy method (CEM), with and without a cache of keys and values.

    python examples/plan_with_ac.py
    python examples/plan_with_ac.py --history 12 --candidates 256

An action is the velocity of the shape during a step, in shares of the frame's side along x and y:
what the generator's own factors direction and speed decide for its clips, an agent decides here for
every step. The shape starts anywhere, wraps around the edges as in the data set, and the goal is a
picture of it elsewhere.

`jepa` pre-trains the encoder on moving_shapes for some seconds. It then stays as it is, and the
predictor learns to tell the features of the next frame from those so far and the action of each, as
in V-JEPA 2-AC (arXiv 2506.09985, section 3): its tokens see their own frame and earlier ones.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jepa import pretrain
from jepa.config import from_dict, merged
from jepa.data.moving_shapes import MovingShapes
from jepa.models.blocks import Block, TokenLayout
from jepa.models.encoder import Encoder
from jepa.recipes import recipe
from jepa.target import standardise
from jepa_kernels import Rope3D, frame_tokens
from jepa_kernels.nn import KeyValueCache

SIDE, PATCHES = 32, 4  # pixels and tokens along a side
SPATIAL, WIDTH, HEADS, DEPTH = PATCHES**2, 64, 2, 2
PER_FRAME = 1 + SPATIAL  # the action ahead of the patches
FASTEST = 0.2


class World:
    """Shapes of moving_shapes in places [N, 2] that actions move."""

    def __init__(self, encoder: Encoder, shapes: int, seed: int) -> None:
        self.data = MovingShapes(shapes, seed=seed)
        self.encoder = encoder.eval()

    @torch.no_grad()
    def see(self, shape: int, places: Tensor) -> Tensor:
        """Features [N, SPATIAL, E] of a shape in N places. Each frame is encoded by itself, as a
        tubelet of two copies."""
        frames = torch.from_numpy(self.data.follow(shape, places.double().numpy(), SIDE, SIDE))
        twice = frames[:, None].repeat(1, 2, 1, 1, 1)
        features = self.encoder(twice, levels="last")
        return standardise(features, levels=1)

    def play(self, count: int, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Features [count, steps + 1, SPATIAL, E] and actions [count, steps, 2] of random play."""
        actions = random_actions((count, steps), generator)
        starts = torch.rand(count, 1, 2, generator=generator)
        places = torch.cat((starts, starts + actions.cumsum(1)), dim=1)
        seen = [self.see(i % self.data.size, path) for i, path in enumerate(places)]
        return torch.stack(seen), actions


def random_actions(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return (torch.rand(*shape, 2, generator=generator) * 2 - 1) * FASTEST


class Predictor(nn.Module):
    """The features of frame t + 1, at the patches of frame t, from frames and actions up to t."""

    def __init__(self, features: int, frames: int) -> None:
        super().__init__()
        self.rope = Rope3D((frames, PATCHES, PATCHES))
        self.embed, self.act = nn.Linear(features, WIDTH), nn.Linear(2, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS, 4.0) for _ in range(DEPTH))
        self.norm, self.proj = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, features)
        self.order = frame_tokens(self.rope.grid, conditioning=1)

    def tokens(self, features: Tensor, actions: Tensor) -> Tensor:
        """[B, T, SPATIAL, E] and [B, T, 2] to [B, T * PER_FRAME, WIDTH]. The action is a token of
        its frame, and is added to the patches as well: so little training is enough for them to
        heed it."""
        ahead = self.act(actions / FASTEST)[:, :, None]
        return torch.cat((ahead, self.embed(features) + ahead), dim=2).flatten(1, 2)

    def change(self, tokens: Tensor) -> Tensor:
        """What the next frame adds to the features of each frame: [B, T, SPATIAL, E]."""
        return self.proj(self.norm(tokens.unflatten(1, (-1, PER_FRAME))[:, :, 1:]))

    def forward(self, features: Tensor, actions: Tensor) -> Tensor:
        """Predictions for every frame of the context: [B, T, SPATIAL, E]."""
        tokens = self.tokens(features, actions)
        ids, times, _ = (t[: tokens.shape[1]] for t in self.order)
        for block in self.blocks:
            tokens = block(tokens, TokenLayout(ids, None, self.rope, times))
        return features + self.change(tokens)

    def extend(self, features: Tensor, actions: Tensor, caches: list[KeyValueCache]) -> Tensor:
        """The same for frames behind those of the caches, one of each block, which grow by them."""
        tokens, known = self.tokens(features, actions), len(caches[0])
        new = slice(known, known + tokens.shape[1])
        places = dict(ids=self.order.query_ids[new], times=self.order.query_times[new])
        for block, cache in zip(self.blocks, caches, strict=True):
            split = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, HEADS, -1))
            query, key, value = split.unbind(-3)
            cache.append(key, value, **places)
            tokens = tokens + block.attn.proj(cache.attend(query, **places).flatten(-2))
            tokens = tokens + block.mlp(block.norm2(tokens))
        return features + self.change(tokens)


def pretrained_encoder(steps: int) -> Encoder:
    """The micro encoder after some steps of `jepa pretrain` on moving_shapes."""
    changes = {
        "data": {"kind": "moving_shapes"},
        "schedule": {"total_steps": steps, "warmup_steps": max(1, steps // 10)},
        "log_every": steps,
        "checkpoint_every": steps,
    }
    with tempfile.TemporaryDirectory() as folder:
        settings = merged(recipe("small"), {**changes, "output": str(Path(folder) / "run")})
        state = pretrain.run(from_dict(pretrain.PretrainConfig, settings))
    return state.bundle.evaluation_encoder


def train(
    model: Predictor, features: Tensor, actions: Tensor, steps: int, generator: torch.Generator
) -> float:
    """Squared error of the next frame from true frames, and from the model's own predictions of
    them; the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    loss = torch.zeros(())
    for _ in range(steps):
        rows = torch.randint(len(features), (8,), generator=generator)
        true, act = features[rows], actions[rows]
        first = model(true[:, :-1], act)
        second = model(first[:, :-1], act[:, 1:])
        loss = F.mse_loss(first, true[:, 1:]) + F.mse_loss(second, true[:, 2:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item() / 2


def recomputed(model: Predictor, seen: Tensor, done: Tensor, actions: Tensor) -> Tensor:
    """The last predicted features [N, SPATIAL, E] of N candidates [N, K, 2]: the predictor runs
    over the whole context at every step."""
    context = seen.expand(len(actions), -1, -1, -1)
    acts = torch.cat((done.expand(len(actions), -1, -1), actions[:, :1]), dim=1)
    for step in range(1, actions.shape[1] + 1):
        last = model(context, acts)[:, -1:]
        context = torch.cat((context, last), dim=1)
        acts = torch.cat((acts, actions[:, step : step + 1]), dim=1)
    return last[:, 0]


def cached(model: Predictor, now: Tensor, past: list[KeyValueCache], actions: Tensor) -> Tensor:
    """The same by the keys and values of the past, which all candidates share: a step runs over its
    own frame."""
    caches = [cache.fork(len(actions)) for cache in past]
    last = now.expand(len(actions), -1, -1, -1)
    for action in actions.split(1, dim=1):
        last = model.extend(last, action, caches)
    return last[:, 0]


@torch.no_grad()
def plan(
    model: Predictor,
    seen: Tensor,
    done: Tensor,
    goal: Tensor,
    options: argparse.Namespace,
    use_cache: bool,
) -> Tensor:
    """Actions [horizon, 2] after the frames seen [1, P, SPATIAL, E] and the actions between them
    [1, P - 1, 2] that end nearest to the goal [SPATIAL, E]: sample, keep the best eighth, refit."""
    generator = torch.Generator().manual_seed(options.seed)
    past = [KeyValueCache(model.rope) for _ in model.blocks]
    if use_cache:
        model.extend(seen[:, :-1], done, past)
    mean = torch.zeros(options.horizon, 2)
    spread = torch.full_like(mean, 0.6 * FASTEST)
    for _ in range(options.rounds):
        noise = torch.randn(options.candidates, options.horizon, 2, generator=generator)
        actions = (mean + spread * noise).clamp(-FASTEST, FASTEST)
        if use_cache:
            ends = cached(model, seen[:, -1:], past, actions)
        else:
            ends = recomputed(model, seen, done, actions)
        cost = (ends - goal).abs().mean((1, 2))
        best = actions[cost.topk(options.candidates // 8, largest=False).indices]
        mean, spread = best.mean(0), best.std(0)
    return mean


def distance(first: Tensor, second: Tensor) -> Tensor:
    """Between places [.., 2] of an arena that wraps around."""
    apart = (first - second).remainder(1.0)
    return torch.minimum(apart, 1.0 - apart).norm(dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretraining-steps", type=int, default=50)
    parser.add_argument("--trajectories", type=int, default=256)
    parser.add_argument("--shapes", type=int, default=2, help="different shapes and backgrounds")
    parser.add_argument("--training-steps", type=int, default=400)
    parser.add_argument("--history", type=int, default=6, help="frames seen before planning")
    parser.add_argument("--horizon", type=int, default=4, help="actions of a plan")
    parser.add_argument("--candidates", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=6, help="pairs of a start and a goal")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    began = time.perf_counter()
    world = World(pretrained_encoder(options.pretraining_steps), options.shapes, options.seed)
    print(f"encoder: {options.pretraining_steps} steps, {time.perf_counter() - began:.1f} s")

    began = time.perf_counter()
    frames = options.history + options.horizon - 1  # of the longest context
    features, actions = world.play(options.trajectories, frames, generator)
    model = Predictor(features.shape[-1], frames)
    loss = train(model, features, actions, options.training_steps, generator)
    standing_still = F.mse_loss(features[:, 1:], features[:, :-1])
    print(
        f"predictor: {options.training_steps} steps, error {loss:.3f} (of the frame before: "
        f"{standing_still:.3f}), {time.perf_counter() - began:.1f} s"
    )

    reached, by_chance, seconds, differences = [], [], {True: 0.0, False: 0.0}, []
    for task in range(options.tasks):
        shape = task % options.shapes
        done = random_actions((1, options.history - 1), generator)
        start = torch.rand(2, generator=generator)
        places = torch.cat((start[None], start + done[0].cumsum(0)))
        seen = world.see(shape, places)[None]
        target = places[-1] + random_actions((options.horizon,), generator).sum(0)
        goal = world.see(shape, target[None])[0]
        plans = {}
        for use_cache in (True, False):
            began = time.perf_counter()
            plans[use_cache] = plan(model, seen, done, goal, options, use_cache)
            seconds[use_cache] += time.perf_counter() - began
        differences.append((plans[True] - plans[False]).abs().max())
        reached.append(distance(places[-1] + plans[True].sum(0), target))
        chance = random_actions((256, options.horizon), generator)
        by_chance.append(distance(places[-1] + chance.sum(1), target).mean())
    print(
        f"planned: ends {torch.stack(reached).mean():.3f} of a side from the goal on average over "
        f"{options.tasks} tasks"
    )
    print(f"random actions: {torch.stack(by_chance).mean():.3f}")
    print(
        f"with the cache: {seconds[True] / options.tasks:.2f} s a plan, without: "
        f"{seconds[False] / options.tasks:.2f} s, {seconds[False] / seconds[True]:.1f} times as "
        f"long; the plans differ by at most {max(differences):.1e}"
    )


if __name__ == "__main__":
    main()
