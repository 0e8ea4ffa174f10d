"""Students that are copied, complex, pruned, parametrised or wrapped."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from jepa_kernels.nn import EMATeacher
from jepa_kernels.testing import FLOAT32_STORED


def moved(student):
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)


def test_a_copied_teacher_follows_the_same_student():
    student = nn.Linear(2, 2)
    first = EMATeacher(student, 0.5)
    second = copy.deepcopy(first)
    assert second.student is student and second.module is not first.module
    moved(student)
    second.update()
    assert torch.allclose(second.module.weight, student.weight - 0.5)
    assert torch.allclose(first.module.weight, student.weight - 1.0)
    assert (first.num_updates, second.num_updates) == (0, 1)


@pytest.mark.parametrize("order", ["student first", "teacher first"])
def test_a_copied_model_has_a_teacher_of_its_own_student(order):
    student = nn.Linear(2, 2)
    parts = {"student": student, "teacher": EMATeacher(student, 0.5)}
    names = list(parts) if order == "student first" else list(parts)[::-1]
    model = nn.ModuleDict({name: parts[name] for name in names})
    copied = copy.deepcopy(model)
    assert copied["teacher"].student is copied["student"] is not student
    moved(copied["student"])
    copied["teacher"].update()
    assert torch.allclose(copied["teacher"].module.weight, copied["student"].weight - 0.5)


@pytest.mark.parametrize("average_buffers", [True, False])
def test_complex_tensors_are_averaged(average_buffers):
    student = nn.Module()
    student.weight = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    student.register_buffer("table", torch.zeros(2, dtype=torch.complex64))
    teacher = EMATeacher(student, 0.75, average_buffers=average_buffers)
    with torch.no_grad():
        student.weight.add_(4.0 + 8.0j)
        student.table.add_(4.0j)
    teacher.update()
    assert teacher.module.weight.tolist() == [1.0 + 2.0j] * 3
    assert teacher.module.table.tolist() == [1.0j if average_buffers else 4.0j] * 2
    assert abs(float(teacher.lag()) - 0.75) < FLOAT32_STORED["atol"]


def test_a_pruned_student_is_refused_with_the_way_out():
    student = nn.Linear(2, 2)
    teacher = EMATeacher(student, 0.5)
    prune.l1_unstructured(student, "weight", amount=0.5)
    with pytest.raises(ValueError, match=r"keep its parameter 'weight'.*prune\.remove"):
        teacher.update()
    prune.remove(student, "weight")
    teacher.update()


def test_a_parametrised_student_is_refused_with_the_way_out():
    student = nn.Linear(2, 2)
    teacher = EMATeacher(student, 0.5)
    parametrizations.weight_norm(student)
    with pytest.raises(ValueError, match="student must keep its"):
        teacher.update()


def test_a_student_in_fsdp1_is_refused_by_name(monkeypatch):
    from torch.distributed import fsdp

    class Wrapped(nn.Module):
        """Stands for the class, which wants a process group."""

        def __init__(self, module):
            super().__init__()
            self._fsdp_wrapped_module = module

    monkeypatch.setattr(fsdp, "FullyShardedDataParallel", Wrapped)
    student = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"not be wrapped in FSDP1.*fully_shard \(FSDP2\)"):
        EMATeacher(Wrapped(student), 0.5)
    teacher = EMATeacher(student, 0.5)
    student[0] = Wrapped(student[0])
    with pytest.raises(ValueError, match=r"submodules.*fully_shard \(FSDP2\)"):
        teacher.update()
