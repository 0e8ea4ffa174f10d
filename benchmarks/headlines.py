"""The few comparisons that the README and the first page of the measurements show."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.records import Device, Record, chosen, devices, verdict
from benchmarks.svg import INK, RULE, SOFT, Picture

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@dataclass(frozen=True)
class Headline:
    """One comparison, and how the README calls it.

    Attributes:
        op, case, pass_name, baseline: which record.
        work: what is done, in plain words.
        against: what the baseline is.
    """

    op: str
    case: str
    pass_name: str
    baseline: str
    work: str
    against: str


HEADLINES = (
    Headline(
        "masked_attention",
        "vit_b/224px/16f/dense",
        "forward+backward",
        "rotation_sdpa",
        "Attention with 3-D RoPE, ViT-B, 224 px",
        "eager rotation, then SDPA",
    ),
    Headline(
        "masked_attention",
        "vit_b/224px/16f/dense",
        "forward+backward",
        "sdpa",
        "the same, RoPE included",
        "SDPA without any RoPE",
    ),
    Headline(
        "masked_attention",
        "vit_b/224px/16f/ragged",
        "forward+backward",
        "padded_sdpa",
        "Attention over the visible tokens of masked clips",
        "padding, rotation, SDPA",
    ),
    Headline(
        "ema_update",
        "vit_b/float32",
        "update",
        "foreach_lerp",
        "EMA teacher of a ViT-B",
        "`_foreach_lerp_`",
    ),
    Headline(
        "adamw_ema",
        "vit_b",
        "step",
        "adamw_fused",
        "AdamW step and EMA teacher of a ViT-B",
        "fused AdamW, then `_foreach_lerp_`",
    ),
    Headline(
        "latent_rollout",
        "residual_mlp/last/D3072/K16/2048rows",
        "forward+backward",
        "state_space",
        "16 steps of a residual MLP, 3,072 channels",
        "stepping the state in eager PyTorch",
    ),
    Headline(
        "latent_rollout",
        "gru/last/D256/K16/1024rows",
        "forward+backward",
        "nn_gru_layer_norm",
        "16 steps of a GRU with LayerNorm, 256 channels",
        "`nn.GRU` and LayerNorm, step by step",
    ),
    Headline(
        "step",
        "tiny/224px/16f",
        "step",
        "published",
        "Whole V-JEPA training step, 224 px",
        "the published step in eager PyTorch",
    ),
)

# More rows for the summary of the measurements: case, pass and baseline of every op.
SUMMARY: dict[str, tuple[tuple[str, str, str], ...]] = {
    "masked_attention": (
        ("vit_b/224px/16f/dense", "forward", "sdpa"),
        ("vit_b/224px/16f/dense", "forward+backward", "sdpa"),
        ("vit_b/224px/16f/dense", "forward+backward", "rotation_sdpa"),
        ("vit_b/112px/16f/dense", "forward+backward", "rotation_sdpa"),
        ("vit_b/224px/16f/ragged", "forward+backward", "padded_sdpa"),
    ),
    "ema_update": (
        ("vit_b/float32", "update", "mul_add"),
        ("vit_b/float32", "update", "foreach_lerp"),
        ("vit_b/float32", "update", "stream"),
        ("micro/float32", "update", "foreach_lerp"),
    ),
    "adamw_ema": (
        ("vit_b", "step", "adamw_default"),
        ("vit_b", "step", "adamw_fused"),
        ("vit_b", "step", "stream"),
        ("micro", "step", "adamw_fused"),
    ),
    "latent_rollout": (
        ("residual_mlp/last/D3072/K16/2048rows", "forward+backward", "state_space"),
        ("residual_mlp/loss/D1536/K4/2048rows", "forward+backward", "state_space"),
        ("residual_mlp/last/D768/K1/2048rows", "forward+backward", "state_space"),
        ("gru/last/D256/K16/1024rows", "forward+backward", "nn_gru_layer_norm"),
        ("published/ld/D3072/112px/16f", "forward+backward", "eager_dense_grid"),
    ),
    "sliced_gaussianity": (
        ("512rows/D192/S1024/K17", "forward+backward", "eager"),
        ("4096rows/D768/S1024/K17", "forward+backward", "eager"),
        ("4096rows/D768/S1024/K17", "forward+backward", "powers"),
        ("4096rows/D768/S1024/K17", "forward+backward", "products"),
    ),
    "visible_patch_embed": (
        ("224px/16f/10%/D192/uint8", "forward+backward", "embed_all"),
        ("224px/16f/10%/D768/float32", "forward+backward", "embed_all"),
        ("224px/16f/100%/D192/float32", "forward+backward", "gather_first"),
        ("224px/16f/100%/D768/float32", "forward+backward", "product"),
    ),
    "integrations": (
        ("transformers-vjepa2/encoder/vit_s/224px/16f", "forward+backward", "transformers-vjepa2"),
        ("vjepa2/attention/vit_s/224px/16f", "forward+backward", "vjepa2"),
        ("transformers-ijepa/encoder/vit_s/112px/16f", "forward+backward", "transformers-ijepa"),
    ),
    "step": (
        ("tiny/112px/16f", "step", "published"),
        ("tiny/224px/16f", "step", "published"),
        ("tiny/224px/16f", "step", "published, checkpointing"),
    ),
}


@dataclass(frozen=True)
class Column:
    """One device and dtype."""

    device: Device
    dtype: str

    @property
    def title(self) -> str:
        return f"{self.device.short}, {self.dtype}"

    def record(self, op: str, case: str, pass_name: str, baseline: str) -> Record | None:
        found = chosen(self.device.tables.get(op, []))
        return found.get((case, self.dtype, pass_name, baseline))


def columns(keys: list[tuple[str, str, str, str]]) -> list[Column]:
    """Every device and dtype that has a record of one of the comparisons (op, case, pass,
    baseline), the device measured last first."""
    made = []
    for device in devices():
        dtypes = dict.fromkeys(r["dtype"] for table in device.tables.values() for r in table)
        for dtype in sorted(dtypes, key=lambda name: (name != "float32", name)):
            column = Column(device, dtype)
            if any(column.record(*key) is not None for key in keys):
                made.append(column)
    return made


def _keys() -> list[tuple[str, str, str, str]]:
    return [(h.op, h.case, h.pass_name, h.baseline) for h in HEADLINES]


def table() -> str:
    """The README's table: how many times faster than the baseline."""
    shown = columns(_keys())
    if not shown:
        return "No record is committed yet."
    lines = [
        f"| what | compared with | {' | '.join(column.title for column in shown)} |",
        f"|---|---|{'--:|' * len(shown)}",
    ]
    for headline, key in zip(HEADLINES, _keys(), strict=True):
        cells = []
        for column in shown:
            record = column.record(*key)
            cells.append("" if record is None else _cell(record, column.device))
        lines.append(f"| {headline.work} | {headline.against} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _how(shown)])


def _cell(record: Record, device: Device) -> str:
    mark = verdict(record)
    return f"{record['ratio']:.2f}x{f' ({mark})' if mark else ''}{device.otherwise(record)}"


def _how(shown: list[Column]) -> str:
    """What the columns are, and what has not been measured."""
    machines = {
        c.device.key: f"{c.device.title} (`{c.device.key}`; {c.device.clock})" for c in shown
    }
    text = (
        "Clips have 16 frames; forward and backward, and whole updates. Machines: "
        f"{'; '.join(machines.values())}."
    )
    if not any(device.is_gpu for device in devices()):
        text += (
            " No GPU record is committed yet: the Triton and CUDA kernels are tested for their "
            "results, and their speed is not known."
        )
    return text


def bars() -> str:
    """The README's picture: the same ratios as bars with their intervals."""
    shown = columns(_keys())
    rows = [
        (headline, [column.record(*key) for column in shown])
        for headline, key in zip(HEADLINES, _keys(), strict=True)
    ]
    ends = [r["interval"][1] for _, records in rows for r in records if r is not None]
    left, right, top, thickness = 372, 60, 74, 9
    pitch = len(shown) * (thickness + 2) + 16
    width = 900
    limit = max([2.0, *ends])
    height = top + len(rows) * pitch + 30

    def at(value: float) -> float:
        return left + (width - left - right) * value / limit

    picture = Picture(
        width,
        height,
        "How many times faster than the baseline",
        "; ".join(
            f"{h.work}, compared with {h.against}: "
            + ", ".join(
                f"{c.title} {r['ratio']:.2f} times"
                for c, r in zip(shown, records, strict=True)
                if r is not None
            )
            for h, records in rows
        ),
    )
    picture.text(20, 30, "How many times faster than what training code does today", size=16,
                 weight=600)  # fmt: skip
    x = 20.0
    for colour, column in zip(_COLOURS, shown, strict=False):
        picture.box(x, 44, 11, 11, fill=colour, radius=2)
        picture.text(x + 17, 53.5, column.title, colour=SOFT)
        x += 40 + 6.6 * len(column.title)
    bottom = top + len(rows) * pitch - 6
    for tick in range(int(limit) + 1):
        one = tick == 1
        picture.line(
            [(at(tick), top - 6), (at(tick), bottom)],
            colour=INK if one else RULE,
            width=1.2 if one else 0.8,
        )
        picture.text(at(tick), bottom + 16, f"{tick}x", size=11, colour=SOFT, anchor="middle")
    for place, (headline, records) in enumerate(rows):
        y = top + place * pitch
        middle = y + len(shown) * (thickness + 2) / 2
        picture.text(left - 14, middle - 1, headline.work, size=12.5, anchor="end", weight=500)
        picture.text(
            left - 14,
            middle + 14,
            f"against {headline.against.replace('`', '')}",
            size=11,
            colour=SOFT,
            anchor="end",
        )
        for i, (colour, record) in enumerate(zip(_COLOURS, records, strict=False)):
            if record is None:
                continue
            row = y + i * (thickness + 2)
            low, high = record["interval"]
            picture.box(at(0), row, at(record["ratio"]) - at(0), thickness, fill=colour, radius=1.5)
            picture.line([(at(low), row + thickness / 2), (at(high), row + thickness / 2)],
                         colour=INK, width=1)  # fmt: skip
            picture.text(at(high) + 5, row + thickness - 0.5, f"{record['ratio']:.2f}", size=10)
    return picture.source()
