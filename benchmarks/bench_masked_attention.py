"""masked_attention against what training code does today: eager rotation + SDPA, SDPA without
positions, torch.compile, padding, loops.

Both sides read strided views of one qkv projection and give [tokens, heads * head_dim], as a
transformer block needs it. Our side always rotates; `sdpa` does not rotate at all and is the bound
that no rotation can beat for free. Ragged cases hold the context tokens of the two usual mask sets
(8 blocks of 15 %, 2 blocks of 70 % of a frame) for every sample of the batch. Frame-causal cases
are one clip whose tokens see their frame and earlier ones; their frames are those of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise

import torch
from torch.nn import functional as F

import jepa_kernels
from benchmarks import eager_attention, harness
from benchmarks.resolutions import Resolution, parse_resolution
from jepa.masks import mask_policy, sample_masks
from jepa_kernels import Rope3D
from jepa_kernels.backend import OPS

OP = "masked_attention"
FRAMES = 16
BATCH = 2
HEADS = {"vit_s": (6, 64), "vit_b": (12, 64), "vit_l": (16, 64), "predictor": (8, 32)}
CAUSAL_FRAMES = (4, 8, 16, 32, 64)
CAUSAL_HEADS = (4, 64)
# What a dense mask, FlexAttention's compilation and a 64-frame SDPA cost beyond these is plain.
MOST_FRAMES = {"sdpa_dense_mask": 32, "rotation_sdpa_dense_mask": 16, "rotation_flex_attention": 8}
RESOLUTIONS = ("112", "160", "224", "288", "384")
MAX_RELATIVE_ERROR = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
Call = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Case:
    """One input: `qkv` [B, N, 3, heads, head_dim] dense, or [tokens, 3, heads, head_dim] with
    `offsets` when ragged."""

    name: str
    group: str
    resolution: Resolution
    qkv: torch.Tensor
    ids: torch.Tensor
    offsets: torch.Tensor | None = None
    magnitude: float = 1.0
    frames: int = FRAMES
    times: torch.Tensor | None = None
    cotangent: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.cotangent = torch.randn(
            *self.qkv.shape[:-3], self.heads * self.head_dim, device=self.qkv.device
        ).to(self.qkv.dtype)

    @property
    def heads(self) -> int:
        return self.qkv.shape[-2]

    @property
    def head_dim(self) -> int:
        return self.qkv.shape[-1]

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.resolution.grid(self.frames)

    @property
    def lengths(self) -> list[int]:
        if self.offsets is None:
            return [self.qkv.shape[1]] * self.qkv.shape[0]
        return [stop - start for start, stop in pairwise(self.offsets.tolist())]

    def flop(self, pass_name: str) -> float:
        forward = 4.0 * self.heads * self.head_dim * self.pairs()
        return forward * (3.5 if pass_name == "forward+backward" else 1.0)

    def pairs(self) -> int:
        """Of a query and a key that it sees."""
        if self.times is None:
            return sum(n * n for n in self.lengths)
        frames, height, width = self.grid
        return len(self.lengths) * (height * width) ** 2 * frames * (frames + 1) // 2

    def traffic(self, pass_name: str) -> float:
        return (
            self.qkv.numel()
            * self.qkv.element_size()
            * (4 / 3)
            * (3.0 if pass_name == "forward+backward" else 1.0)
        )


def ours(case: Case, backend: str, qkv: torch.Tensor) -> torch.Tensor:
    query, key, value = qkv.unbind(-3)
    rope = Rope3D(case.grid, "interleaved", eager_attention.PRETRAINED_SIDE)
    out = jepa_kernels.masked_attention(
        query,
        key,
        value,
        query_ids=case.ids,
        rope=rope,
        cu_seqlens_q=case.offsets,
        query_times=case.times,
        backend=backend,
    )
    return out.flatten(-2)


def _merged(out: torch.Tensor) -> torch.Tensor:
    return out.transpose(1, 2).flatten(-2)


def rotated_sdpa(case: Case, qkv: torch.Tensor) -> torch.Tensor:
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    return _merged(eager_attention.attend(query, key, value, None, case.grid))


def plain_sdpa(case: Case, qkv: torch.Tensor) -> torch.Tensor:
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    return _merged(F.scaled_dot_product_attention(query, key, value))


def plain_products(case: Case, qkv: torch.Tensor) -> torch.Tensor:
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    return _merged(
        torch.softmax(query @ key.transpose(-1, -2) * case.head_dim**-0.5, dim=-1) @ value
    )


def looped_sdpa(case: Case, qkv: torch.Tensor) -> torch.Tensor:
    """Ragged: one rotation and one SDPA per sequence."""
    outputs = []
    for start, stop in pairwise(case.offsets.tolist()):
        query, key, value = qkv[start:stop].unsqueeze(0).permute(2, 0, 3, 1, 4)
        outputs.append(
            _merged(
                eager_attention.attend(
                    query, key, value, case.ids[start:stop].unsqueeze(0), case.grid
                )
            )[0]
        )
    return torch.cat(outputs)


def padded(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The ragged case as padded code holds it: qkv [S, longest, 3, heads, head_dim], ids, and which
    rows are real."""
    lengths = torch.tensor(case.lengths, device=case.qkv.device)
    real = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
    wide = torch.zeros(
        *real.shape, *case.qkv.shape[1:], dtype=case.qkv.dtype, device=case.qkv.device
    )
    wide[real] = case.qkv
    ids = torch.zeros(real.shape, dtype=torch.int64, device=lengths.device)
    ids[real] = case.ids
    return wide, ids, real


def padded_sdpa(
    case: Case, ids: torch.Tensor, real: torch.Tensor, qkv: torch.Tensor
) -> torch.Tensor:
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    query, key = eager_attention.rotate(query, key, ids, case.grid)
    return _merged(
        F.scaled_dot_product_attention(
            query.to(value.dtype), key.to(value.dtype), value, attn_mask=real[:, None, None, :]
        )
    )


def _flex(case: Case) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    blocks = None
    if case.times is not None:
        times, n = case.times, case.times.numel()
        blocks = create_block_mask(
            lambda b, h, q, k: times[q] >= times[k], None, None, n, n, device=str(times.device)
        )

    def call(qkv: torch.Tensor) -> torch.Tensor:
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        query, key = eager_attention.rotate(query, key, None, case.grid)
        query, key = query.to(value.dtype), key.to(value.dtype)
        return _merged(compiled(query, key, value, block_mask=blocks))

    return call


def dense_mask(case: Case) -> torch.Tensor:
    """[N, N] booleans: which token sees which."""
    assert case.times is not None
    return case.times[:, None] >= case.times[None, :]


def masked_sdpa(mask: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    return _merged(F.scaled_dot_product_attention(query, key, value, attn_mask=mask))


def rotated_masked_sdpa(case: Case, mask: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    query, key = eager_attention.rotate(query, key, None, case.grid)
    query, key = query.to(value.dtype), key.to(value.dtype)
    return _merged(F.scaled_dot_product_attention(query, key, value, attn_mask=mask))


def prefix_loops(case: Case, qkv: torch.Tensor) -> torch.Tensor:
    """Frame-causal without a mask: one rotation, and one SDPA for each frame over its past."""
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    query, key = eager_attention.rotate(query, key, None, case.grid)
    query, key = query.to(value.dtype), key.to(value.dtype)
    frames, height, width = case.grid
    outs = []
    for end in range(height * width, frames * height * width + 1, height * width):
        frame, past = slice(end - height * width, end), slice(end)
        outs.append(
            F.scaled_dot_product_attention(query[:, :, frame], key[:, :, past], value[:, :, past])
        )
    return _merged(torch.cat(outs, dim=2))


def dense_case(
    model: str,
    resolution: Resolution,
    dtype: torch.dtype,
    options: harness.Options,
    magnitude: float = 1.0,
) -> Case:
    heads, head_dim = HEADS[model]
    torch.manual_seed(options.seed)
    qkv = torch.randn(BATCH, resolution.tokens(FRAMES), 3, heads, head_dim, device=options.device)
    qkv[:, :, :2] *= magnitude
    ids = torch.arange(resolution.tokens(FRAMES), device=options.device)
    suffix = "" if magnitude == 1.0 else f"/logits_x{magnitude:g}"
    return Case(
        f"{model}/{resolution.name}px/{FRAMES}f/dense{suffix}",
        model,
        resolution,
        qkv.to(dtype),
        ids,
        magnitude=magnitude,
    )


def causal_case(frames: int, dtype: torch.dtype, options: harness.Options) -> Case:
    heads, head_dim = CAUSAL_HEADS
    torch.manual_seed(options.seed)
    resolution = parse_resolution("224")
    tubelets = FRAMES // resolution.grid(FRAMES)[0]
    grid = resolution.grid(frames * tubelets)
    ids = torch.arange(frames * grid[1] * grid[2], device=options.device)
    qkv = torch.randn(1, ids.numel(), 3, heads, head_dim, device=options.device).to(dtype)
    return Case(
        f"frame_causal/224px/{frames}f",
        "frame_causal",
        resolution,
        qkv,
        ids,
        frames=frames * tubelets,
        times=jepa_kernels.frame_times(grid, ids),
    )


def ragged_case(
    model: str, resolution: Resolution, dtype: torch.dtype, options: harness.Options
) -> Case:
    heads, head_dim = HEADS[model]
    torch.manual_seed(options.seed)
    masks = sample_masks(
        mask_policy("blocks"),
        resolution.grid(FRAMES),
        seed=options.seed,
        step=0,
        samples=range(BATCH),
    ).to(options.device)
    qkv = torch.randn(masks.context_ids.numel(), 3, heads, head_dim, device=options.device).to(
        dtype
    )
    return Case(
        f"{model}/{resolution.name}px/{FRAMES}f/ragged",
        f"{model} ragged",
        resolution,
        qkv,
        masks.context_ids,
        masks.context_cu,
    )


def equal_flop_case(case: Case) -> Case:
    """A dense batch with as many sequences and the same FLOP as a ragged case."""
    lengths = case.lengths
    length = round((sum(n * n for n in lengths) / len(lengths)) ** 0.5)
    qkv = torch.randn(len(lengths), length, *case.qkv.shape[1:], device=case.qkv.device).to(
        case.qkv.dtype
    )
    return Case(
        case.name, case.group, case.resolution, qkv, torch.arange(length, device=case.qkv.device)
    )


def baselines(
    case: Case, options: harness.Options
) -> Iterator[tuple[str, Call, torch.Tensor, torch.Tensor]]:
    """(name, call, its qkv, its cotangent) of everything this case can be compared with."""
    if case.times is not None:
        for name, call in causal_baselines(case):
            yield name, call, case.qkv, case.cotangent
        return
    if case.offsets is not None:
        wide, ids, real = padded(case)
        spread = torch.zeros(
            *real.shape, case.cotangent.shape[-1], dtype=case.cotangent.dtype, device=real.device
        )
        spread[real] = case.cotangent
        yield "padded_sdpa", partial(padded_sdpa, case, ids, real), wide, spread
        yield "looped_sdpa", partial(looped_sdpa, case), case.qkv, case.cotangent
        return
    yield "rotation_sdpa", partial(rotated_sdpa, case), case.qkv, case.cotangent
    yield "sdpa", partial(plain_sdpa, case), case.qkv, case.cotangent
    if options.quick or case.magnitude != 1.0:
        return
    if case.resolution.name in ("112", "224") and case.group in ("vit_b", "predictor"):
        yield (
            "compiled_rotation_sdpa",
            torch.compile(partial(rotated_sdpa, case), dynamic=False),
            case.qkv,
            case.cotangent,
        )
        yield "rotation_flex_attention", _flex(case), case.qkv, case.cotangent
    if case.resolution.name == "112":
        yield "bmm_softmax_bmm", partial(plain_products, case), case.qkv, case.cotangent


def causal_baselines(case: Case) -> Iterator[tuple[str, Call]]:
    """Of a frame-causal case; masks are made beforehand, and not where they grow too large."""
    frames = case.grid[0]
    yield "prefix_loops", partial(prefix_loops, case)
    if frames <= MOST_FRAMES["sdpa_dense_mask"]:
        yield "sdpa_dense_mask", partial(masked_sdpa, dense_mask(case))
    if frames <= MOST_FRAMES["rotation_sdpa_dense_mask"]:
        yield "rotation_sdpa_dense_mask", partial(rotated_masked_sdpa, case, dense_mask(case))
        yield "sdpa", partial(plain_sdpa, case)
    if frames <= MOST_FRAMES["rotation_flex_attention"]:
        yield "rotation_flex_attention", _flex(case)


def oracle(case: Case, gradient: bool) -> torch.Tensor:
    """Rotation + SDPA in float64 on the same rounded inputs; with `gradient` that of qkv."""
    exact = Case(
        case.name,
        case.group,
        case.resolution,
        case.qkv.double(),
        case.ids,
        case.offsets,
        frames=case.frames,
        times=case.times,
    )
    composed = looped_sdpa if case.offsets is not None else rotated_sdpa
    call = partial(composed if case.times is None else prefix_loops, exact)
    if gradient:
        return harness.forward_backward(call, [exact.qkv], case.cotangent.double())()[0]
    with torch.no_grad():
        return call(exact.qkv)


def _run(
    call: Call, qkv: torch.Tensor, cotangent: torch.Tensor, pass_name: str
) -> Callable[[], torch.Tensor]:
    if pass_name == "forward+backward":
        both = harness.forward_backward(call, [qkv], cotangent)
        return lambda: both()[0]

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return call(qkv)

    return forward


def gate(
    case: Case, backend: str, dtype: str, pass_name: str, checked: set[tuple[str, ...]]
) -> None:
    """Our result against the oracle, once per (case, backend, dtype, pass)."""
    key = (case.name, backend, dtype, pass_name)
    if key in checked:
        return
    gradient = pass_name == "forward+backward"
    actual = _run(partial(ours, case, backend), case.qkv, case.cotangent, pass_name)()
    limit = MAX_RELATIVE_ERROR[dtype] * (
        10 if gradient and dtype == "float32" else 2 if gradient else 1
    )
    harness.require_close(
        "gradient of qkv" if gradient else "out",
        actual,
        oracle(case, gradient),
        rtol=limit * max(1.0, case.magnitude),
    )
    checked.add(key)


def backends(case: Case, options: harness.Options) -> list[str]:
    """What runs this case here: the asked ones (whatever they say), or every kernel backend that
    supports it."""
    if options.backends:
        return list(options.backends)
    query, key, value = case.qkv.unbind(-3)
    rope = Rope3D(case.grid)
    call = OPS[OP].prepare(
        query,
        key,
        value,
        query_ids=case.ids,
        rope=rope,
        cu_seqlens_q=case.offsets,
        query_times=case.times,
    )
    return [
        name
        for name in OPS[OP].priority
        if name not in ("reference", "torch") and not OPS[OP].reasons(name, call)
    ] or ["torch"]


def cases(options: harness.Options) -> Iterator[Case]:
    on_gpu = options.device.startswith("cuda")
    for name in options.dtypes or harness.default_dtypes(options.device, on_gpu=("bfloat16",)):
        dtype = getattr(torch, name)
        if options.quick:
            yield dense_case("vit_b", parse_resolution("112"), dtype, options)
            yield ragged_case("vit_b", parse_resolution("112"), dtype, options)
            continue
        for model in HEADS:
            # A CPU looks at the whole axis for one encoder and the predictor; the other widths
            # differ in the number of heads only.
            sizes = RESOLUTIONS if on_gpu or model in ("vit_b", "predictor") else ("224",)
            for size in sizes:
                yield dense_case(model, parse_resolution(size), dtype, options)
                if model != "predictor":
                    yield ragged_case(model, parse_resolution(size), dtype, options)
        for magnitude in (4.0, 8.0):
            yield dense_case("vit_b", parse_resolution("224"), dtype, options, magnitude)
        for frames in CAUSAL_FRAMES:
            yield causal_case(frames, dtype, options)


def comparisons(options: harness.Options) -> Iterator[harness.Comparison]:
    checked: set[tuple[str, ...]] = set()
    for case in cases(options):
        dtype = str(case.qkv.dtype).removeprefix("torch.")
        details = {
            "group": case.group,
            "resolution": case.resolution.name,
            "tokens": case.resolution.tokens(case.frames),
            "batch": BATCH,
            "heads": case.heads,
            "head_dim": case.head_dim,
            "lengths": case.lengths,
        }
        if case.times is not None:
            # What our side never makes: booleans, and the numbers that SDPA turns them into.
            mask = case.times.numel() ** 2
            details |= {
                "visible_share": case.pairs() / mask,
                "mask_bytes": mask,
                "mask_bytes_in_dtype": mask * case.qkv.element_size(),
            }
        for backend in backends(case, options):
            rivals = list(baselines(case, options))
            if case.offsets is not None:
                dense = equal_flop_case(case)
                rivals.append(
                    (
                        "own_dense_equal_flop",
                        partial(ours, dense, backend),
                        dense.qkv,
                        dense.cotangent,
                    )
                )
            if case.times is not None:
                rivals.append(
                    (
                        "own_unmasked",
                        partial(ours, replace(case, times=None), backend),
                        case.qkv,
                        case.cotangent,
                    )
                )
            if case.magnitude != 1.0:
                plain = dense_case(case.group, case.resolution, case.qkv.dtype, options)
                rivals.append(
                    ("own_unit_logits", partial(ours, plain, backend), plain.qkv, plain.cotangent)
                )
            for pass_name in ("forward", "forward+backward"):
                for baseline, call, qkv, cotangent in rivals:
                    forward_only = baseline in ("rotation_flex_attention", "bmm_softmax_bmm")
                    if forward_only and pass_name != "forward":
                        continue
                    yield harness.Comparison(
                        case=case.name,
                        dtype=dtype,
                        pass_name=pass_name,
                        backend=backend,
                        baseline=baseline,
                        candidate=_run(
                            partial(ours, case, backend), case.qkv, case.cotangent, pass_name
                        ),
                        reference=_run(call, qkv, cotangent, pass_name),
                        gate=partial(gate, case, backend, dtype, pass_name, checked),
                        flop=case.flop(pass_name),
                        bytes=case.traffic(pass_name),
                        details=details,
                    )


if __name__ == "__main__":
    raise SystemExit(harness.main(OP, comparisons, __doc__))
