"""Mechanics are tested as on a quiet machine, whatever else this one does; tests of busy machines
say so themselves."""

from __future__ import annotations

import math

import pytest

from benchmarks import contention


@pytest.fixture(autouse=True, scope="session")
def _as_on_a_quiet_machine():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contention, "WAITED_SHARE", math.inf)
        patch.setattr(contention, "SWITCHES_PER_S", math.inf)
        yield
