"""The picture of the architecture: a clip's way to the loss, and a call's way to a kernel.

Every box names a function, class or module of the code. The picture is drawn from the code: a name
that does not exist is an error here, and the file under a name is where it really is.
"""

from __future__ import annotations

import inspect
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.records import ROOT
from benchmarks.svg import INK, SOFT, Picture

_OP = "masked_attention"
_BLUE, _BLUE_EDGE = "#eaf2fb", "#a9c7e8"
_GREEN, _GREEN_EDGE = "#eaf6ef", "#a3d3b5"
_SAND, _SAND_EDGE = "#fbf4e6", "#e3cb98"
_PILL = "#0b6e4f"
_WIDTH, _HEIGHT = 172, 66
# What a backend is in plain words, and where its kernels are.
_BACKENDS = {
    "cuda": ("CUDA C++", f"csrc/{_OP}/cuda"),
    "triton": ("Triton", "triton_kernels*.py"),
    "cpu": ("C++ for CPUs", f"csrc/{_OP}/cpu"),
    "torch": ("Eager composition", "PyTorch's own kernels"),
    "reference": ("The specification", "float64 oracle of tests"),
}


@dataclass(frozen=True)
class Box:
    """One step on the way.

    Attributes:
        x, y: its upper left corner.
        title: what happens, in plain words.
        name: dotted name of what does it.
        kernel: the op that it runs, or none.
        colours: fill and edge.
        width: in pixels.
    """

    x: float
    y: float
    title: str
    name: str
    kernel: str = ""
    colours: tuple[str, str] = (_BLUE, _BLUE_EDGE)
    width: float = _WIDTH

    @property
    def left(self) -> tuple[float, float]:
        return self.x, self.y + _HEIGHT / 2

    @property
    def right(self) -> tuple[float, float]:
        return self.x + self.width, self.y + _HEIGHT / 2

    @property
    def top(self) -> tuple[float, float]:
        return self.x + self.width / 2, self.y

    @property
    def bottom(self) -> tuple[float, float]:
        return self.x + self.width / 2, self.y + _HEIGHT


def find(name: str) -> Any:
    """What a dotted name stands for.

    Raises:
        AttributeError, ModuleNotFoundError: nothing of that name.
    """
    return pkgutil.resolve_name(name)


def source(name: str) -> str:
    """The file in which a dotted name is defined, from the root of the repository."""
    value = find(name)
    if not (isinstance(value, ModuleType) or callable(value)):  # a constant of a module
        value = find(name.rpartition(".")[0])
    path = value.__file__ if isinstance(value, ModuleType) else inspect.getsourcefile(value)
    return Path(str(path)).resolve().relative_to(ROOT).as_posix()


def _draw(picture: Picture, box: Box) -> None:
    fill, edge = box.colours
    picture.box(box.x, box.y, box.width, _HEIGHT, fill=fill, stroke=edge)
    picture.text(box.x + 10, box.y + 20, box.title, size=12, weight=600)
    short = box.name.rsplit(".", 1)[-1]
    owner = box.name.rsplit(".", 2)[-2]
    shown = f"{owner}.{short}" if owner[0].isupper() else short
    picture.text(box.x + 10, box.y + 38, shown, size=11, mono=True, name=box.name)
    file = source(box.name).removeprefix(f"jepa_kernels/ops/{_OP}/")
    picture.text(box.x + 10, box.y + 54, file, size=9.5, colour=SOFT, mono=True)
    if box.kernel:
        find(f"jepa_kernels.ops.{box.kernel}")
        width = 12 + 6.1 * len(box.kernel)
        picture.box(box.x + box.width - width - 8, box.y + _HEIGHT - 9, width, 18, fill=_PILL,
                    radius=9)  # fmt: skip
        picture.text(
            box.x + box.width - width / 2 - 8,
            box.y + _HEIGHT + 4,
            box.kernel,
            size=10,
            colour="#ffffff",
            anchor="middle",
            mono=True,
        )


def picture() -> str:
    """The SVG file."""
    made = Picture(
        1000,
        812,
        "Architecture of jepa and jepa_kernels",
        "Above: a clip is loaded and masked, encoded by the context and the target encoder, "
        "predicted, and compared by the objectives; the optimiser step moves the weights and the "
        "teacher. "
        "Below: a call of an op is checked once, a backend is resolved, and the backend runs a "
        "kernel.",
    )
    _training(made)
    _call(made)
    return made.source()


def _training(made: Picture) -> None:
    x = [24 + 194 * i for i in range(5)]
    made.text(24, 34, "A clip's way to the loss", size=17, weight=600)
    made.text(24, 54, "package jepa; green labels are the ops of jepa_kernels that a step runs",
              size=12, colour=SOFT)  # fmt: skip
    loader = Box(x[0], 76, "Decode, draw masks", "jepa.data.loader.Loader")
    pixels = Box(x[0], 186, "Crop, normalise", "jepa.data.transforms.model_input")
    batch = Box(x[1], 131, "Clips and token lists", "jepa.batch.Batch")
    context = Box(x[2], 76, "Encode visible tokens", "jepa.step.context_features", _OP)
    target = Box(x[2], 186, "Encode the whole clip", "jepa.step.target_features", _OP)
    predicted = Box(x[3], 76, "Predict hidden tokens", "jepa.step.predictions", _OP)
    standard = Box(x[3], 186, "Standardise targets", "jepa.target.standardise")
    seen = Box(x[4], 131, "What objectives see", "jepa.objectives.base.ObjectiveContext")
    update = Box(x[2], 306, "Move weights, teacher", "jepa.step.update", "adamw_ema")
    backward = Box(x[3], 306, "Gradients", "jepa.step.backward")
    loss = Box(x[4], 306, "Weighted sum: the loss", "jepa.objectives.compute_all",
               "latent_rollout")  # fmt: skip
    made.line([loader.bottom, pixels.top], arrow=True)
    made.line([pixels.right, (x[1] - 11, pixels.right[1]), (x[1] - 11, batch.left[1]), batch.left],
              arrow=True)  # fmt: skip
    for side in (context, target):
        turn = x[2] - 11
        made.line([batch.right, (turn, batch.right[1]), (turn, side.left[1]), side.left],
                  arrow=True)  # fmt: skip
    made.line([context.right, predicted.left], arrow=True)
    made.line([target.right, standard.left], arrow=True)
    for side in (predicted, standard):
        turn = x[4] - 11
        made.line([side.right, (turn, side.right[1]), (turn, seen.left[1]), seen.left], arrow=True)
    made.line([seen.bottom, loss.top], arrow=True)
    made.line([loss.left, backward.right], arrow=True)
    made.line([backward.left, update.right], arrow=True)
    made.line([(x[2] + 30, update.y), (x[2] + 30, target.bottom[1])], arrow=True, dashed=True)
    made.text(x[2] + 38, 294, "next step", size=10.5, colour=SOFT)
    for box in (loader, pixels, batch, context, target, predicted, standard, seen, update,
                backward, loss):  # fmt: skip
        _draw(made, box)


def _call(made: Picture) -> None:
    x = [24 + 194 * i for i in range(5)]
    made.line([(24, 408), (976, 408)], colour="#d5dbe1", width=1)
    made.text(24, 442, "A call's way to a kernel", size=17, weight=600)
    made.text(
        24,
        462,
        f"package jepa_kernels; the same for every op, shown for {_OP}. File names without a "
        f"folder lie in jepa_kernels/ops/{_OP}",
        size=12,
        colour=SOFT,
    )
    package = f"jepa_kernels.ops.{_OP}"
    green = (_GREEN, _GREEN_EDGE)
    public = Box(x[0], 484, "Public function", f"{package}.api.{_OP}", colours=green)
    prepare = Box(x[1], 484, "Arguments to inputs", f"{package}.contract.prepare", colours=green)
    inputs = Box(x[2], 484, "Checked once", f"{package}.inputs.check", colours=green)
    resolve = Box(x[3], 484, "Choose a backend", "jepa_kernels.backend.resolve", colours=green)
    run = Box(x[4], 484, "Run, with gradients", "jepa_kernels.contract.Function.run",
              colours=green)  # fmt: skip
    order = Box(x[2], 582, "Order of backends", f"{package}.contract.PRIORITY", colours=green)
    measured = Box(x[3], 582, "Measured preferences", "jepa_kernels.preferences.found",
                   colours=green)  # fmt: skip
    for left, right in ((public, prepare), (prepare, inputs), (inputs, resolve), (resolve, run)):
        made.line([left.right, right.left], arrow=True)
    made.line([measured.top, resolve.bottom], arrow=True)
    corner = resolve.x + 30
    made.line([order.right, (resolve.x - 11, order.right[1]), (resolve.x - 11, 566), (corner, 566),
               (corner, resolve.bottom[1])], arrow=True)  # fmt: skip
    rail, backends = 672.0, find(f"{package}.contract.PRIORITY")
    pitch = 970 / len(backends)
    made.text(24, rail - 8, "one backend, all with the same inputs", size=11, colour=SOFT)
    for place, name in enumerate(backends):
        title, where = _BACKENDS.get(name, (name, ""))
        box = Box(
            24 + place * pitch,
            692,
            title,
            f"{package}.{name}",
            colours=(_SAND, _SAND_EDGE),
            width=pitch - 22,
        )
        made.line([run.bottom, (run.bottom[0], rail), (box.top[0], rail), box.top], arrow=True)
        _draw(made, box)
        if where.startswith("csrc/") and not (ROOT / where).is_dir():
            raise FileNotFoundError(f"architecture: kernels must lie in {where}.")
        made.text(box.x + 10, 782, where, size=10, colour=INK, mono=True)
    for box in (public, prepare, inputs, resolve, run, order, measured):
        _draw(made, box)
