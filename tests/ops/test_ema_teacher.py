"""EMATeacher: copies, dtypes, buffers, schedules, debiasing, checkpoints and the lag."""

from __future__ import annotations

import copy
import io
import math

import numpy as np
import pytest
import torch
from torch import nn

from jepa_kernels.nn import CosineMomentum, EMATeacher, LinearMomentum
from jepa_kernels.testing import (
    FLOAT32,
    FLOAT32_LAST_PLACE,
    FLOAT32_ROUNDED,
    FLOAT32_SHORT,
    FLOAT64_LAST_PLACE,
    SMALL_STEPS_OF_ONE_VALUE,
)
from tests.ops.backends import runnable
from tests.ops.lists import one_thread  # noqa: F401

HERE = runnable("ema_update")

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """Tied, empty and frozen parameters, and buffers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(3, 4, bias=False)
        self.second.weight = self.first.weight
        self.empty = nn.Parameter(torch.empty(0, 2))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("absent", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.norm(self.first(x) + self.second(x)))


def shift(module: nn.Module, by: float = 1.0) -> None:
    with torch.no_grad():
        for tensor in {id(t): t for t in (*module.parameters(), *module.buffers())}.values():
            tensor.add_(by if tensor.is_floating_point() else 1)


@pytest.mark.parametrize("backend", [None, "reference", *HERE])
def test_follows_parameters_and_buffers(backend):
    student = Net()
    teacher = EMATeacher(student, momentum=0.75, backend=backend)
    start = copy.deepcopy(student).state_dict()
    shift(student)
    teacher.update()
    state = teacher.module.state_dict()
    assert list(state) == list(start), "a teacher's module has the student's own keys"
    for name, value in state.items():
        expected = start[name] + (0.25 if value.is_floating_point() else 1)
        torch.testing.assert_close(value, expected, msg=lambda m, n=name: f"{n}: {m}")
    assert teacher.module.first.weight is teacher.module.second.weight, "ties stay tied"
    assert not any(p.requires_grad for p in teacher.parameters())


def test_buffers_can_be_copied():
    student = Net()
    teacher = EMATeacher(student, momentum=0.75, average_buffers=False)
    shift(student)
    teacher.update()
    assert torch.equal(teacher.module.norm.running_var, student.norm.running_var)
    assert not torch.equal(teacher.module.first.weight, student.first.weight)


def test_is_always_in_eval_mode_and_without_a_graph():
    student = Net().train()
    teacher = EMATeacher(student)
    outer = nn.ModuleDict({"student": student, "teacher": teacher}).train()
    assert outer.training and student.training and not any(m.training for m in teacher.modules())
    x = torch.randn(5, 3, requires_grad=True)
    assert torch.equal(teacher(x), teacher(x)) and not teacher(x).requires_grad


def test_published_ramp(shared_dir):
    numbers = np.load(shared_dir / "golden" / "modules" / "ema.npz")
    student = nn.ParameterDict(
        {n: nn.Parameter(torch.from_numpy(numbers[f"ramp_target0_{n}"])) for n in "abc"}
    )
    teacher = EMATeacher(student, LinearMomentum(0.9, 1.0, 20))
    with torch.no_grad():
        for n in "abc":
            student[n].copy_(torch.from_numpy(numbers[f"ramp_online_{n}"]))
    for step, momentum in enumerate(numbers["ramp_m"].tolist()):
        assert teacher.next_momentum() == pytest.approx(momentum, abs=FLOAT64_LAST_PLACE["atol"])
        teacher.update()
        for n in "abc":
            np.testing.assert_allclose(
                teacher.module[n].numpy(),
                numbers[f"ramp_target{step + 1}_{n}"],
                **FLOAT32_LAST_PLACE,
            )


def test_schedules():
    linear, cosine = LinearMomentum(0.9, 1.0, 10), CosineMomentum(0.99, 1.0, 10)
    assert [linear(n) for n in (0, 5, 10, 99)] == pytest.approx([0.9, 0.95, 1.0, 1.0])
    assert [cosine(n) for n in (0, 5, 10, 99)] == pytest.approx([0.99, 0.995, 1.0, 1.0])
    teacher = EMATeacher(Net(), 0.999, warmup=True)
    assert teacher.next_momentum() == pytest.approx(0.1)
    teacher.num_updates = 10**6
    assert teacher.next_momentum() == 0.999


def test_debias_equals_the_corrected_average_from_zero():
    student = nn.Linear(4, 3)
    momentum = LinearMomentum(0.5, 0.95, 6)
    teacher = EMATeacher(student, momentum, debias=True)
    average, product = torch.zeros(3, 4, dtype=torch.float64), 1.0
    for n in range(10):
        shift(student, 0.3)
        m = momentum(n)
        average = m * average + (1 - m) * student.weight.detach().double()
        product *= m
        teacher.update()
        torch.testing.assert_close(
            teacher.module.weight.double(), average / (1 - product), **FLOAT32_SHORT
        )


def test_half_precision_student_has_float32_masters_and_a_copy_for_the_forward():
    student = Net().bfloat16()
    teacher = EMATeacher(student, momentum=1 - 1e-3)
    master, low = teacher.module.first.weight, teacher.forward_copy.first.weight
    assert master.dtype == torch.float32 and low.dtype == torch.bfloat16
    with torch.no_grad():
        student.first.weight.copy_(torch.ones_like(low) * 1.1)
        master.fill_(1.0)
    for _ in range(1000):
        teacher.update()
    expected = 1.1015625 - 0.1015625 * (1 - 1e-3) ** 1000  # 1.1 in bfloat16
    torch.testing.assert_close(master, torch.full_like(master, expected), **FLOAT32)
    assert torch.equal(low, master.bfloat16())
    assert teacher(torch.ones(2, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert teacher.module.norm.num_batches_tracked.dtype == torch.int64


@pytest.mark.parametrize("rounding", ["nearest", "kahan", "stochastic"])
def test_half_precision_masters(rounding):
    student = nn.Linear(64, 64).bfloat16()
    teacher = EMATeacher(student, momentum=1 - 1e-3, master_dtype=None, rounding=rounding)
    assert teacher.forward_copy is None and teacher.module.weight.dtype == torch.bfloat16
    with torch.no_grad():
        for module, value in ((student, 1.1015625), (teacher.module, 1.0)):
            module.weight.fill_(value)
    for _ in range(1000):
        teacher.update()
    moved = float(teacher.module.weight.double().mean() - 1.0) / (
        0.1015625 * (1 - (1 - 1e-3) ** 1000)
    )
    if rounding == "nearest":
        assert moved == 0.0
    else:
        assert abs(moved - 1) < SMALL_STEPS_OF_ONE_VALUE["rtol"]


def test_forward_dtype_keeps_a_low_precision_copy():
    student = Net()
    teacher = EMATeacher(student, 0.5, forward_dtype=torch.bfloat16)
    shift(student)
    teacher.update()
    for name, master in teacher.module.state_dict().items():
        low = teacher.forward_copy.state_dict()[name]
        assert torch.equal(low, master.bfloat16() if master.is_floating_point() else master), name
    assert EMATeacher(student, 0.5, forward_dtype=torch.float32).forward_copy is None


@pytest.mark.parametrize(
    "options", [{}, {"forward_dtype": torch.bfloat16}, {"master_dtype": None, "rounding": "kahan"}]
)
def test_checkpoint_resumes_bitwise(options):
    student = Net().bfloat16() if "rounding" in options else Net()
    make = lambda: EMATeacher(student, CosineMomentum(0.9, 1.0, 20), debias=True, **options)  # noqa: E731
    teacher = make()
    for _ in range(3):
        shift(student, 0.01)
        teacher.update()
    buffer = io.BytesIO()
    torch.save(teacher.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert not any(key.startswith("forward_copy") for key in state)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    again = make()
    again.load_state_dict(state)
    assert again.num_updates == 3
    for one in (teacher, again):
        one.update()
    for a, b in zip(
        (*teacher.parameters(), *teacher.buffers()),
        (*again.parameters(), *again.buffers()),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_deepcopy_and_pickle_keep_the_schedule():
    teacher = EMATeacher(Net(), LinearMomentum(0.9, 1.0, 10))
    teacher.update()
    again = copy.deepcopy(teacher)
    assert again.num_updates == 1 and again.next_momentum() == teacher.next_momentum()


def test_lag_is_the_relative_distance():
    student = Net()
    teacher = EMATeacher(student, 0.9)
    assert float(teacher.lag()) == 0.0
    shift(student, 0.5)
    parameters = list(zip(teacher.module.parameters(), student.parameters(), strict=True))
    difference = sum(
        float((t.double() - s.detach().double()).square().sum()) for t, s in parameters
    )
    size = sum(float(s.detach().double().square().sum()) for _, s in parameters)
    assert float(teacher.lag()) == pytest.approx(
        math.sqrt(difference / size), rel=FLOAT32_ROUNDED["rtol"]
    )
    before = float(teacher.lag())
    teacher.update()
    assert float(teacher.lag()) < before


def test_momentum_tensor_is_read_at_every_update():
    student = nn.Linear(2, 2)
    momentum = torch.tensor(1.0)
    teacher = EMATeacher(student, momentum)
    shift(student)
    teacher.update()
    assert not torch.equal(teacher.module.weight, student.weight)
    momentum.zero_()
    teacher.update()
    assert torch.equal(teacher.module.weight, student.weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3,), "student must be a module, got int"),
        ((nn.Linear(1, 1), 1.5), "momentum must be from 0 to 1, got 1.5"),
        ((nn.Linear(1, 1), "0.9"), "momentum must be a number, got str"),
        (
            (nn.Linear(1, 1), torch.tensor(0.5), {"debias": True}),
            "momentum must be a number or a function with warmup or debias",
        ),
        ((nn.Linear(1, 1), 0.5, {"rounding": "up"}), "rounding must be one of"),
    ],
)
def test_bad_arguments_say_what_is_wrong(arguments, message):
    options = arguments[-1] if isinstance(arguments[-1], dict) else {}
    with pytest.raises((TypeError, ValueError), match=message):
        EMATeacher(*[a for a in arguments if a is not options], **options)
