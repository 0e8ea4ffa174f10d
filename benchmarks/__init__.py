"""Measurements: paired micro-benchmarks of every op, and the resolution sweep of the training step.

`harness` times, `machine` and `memory` describe where, `resolutions` names the axis, `plot` draws.
A `bench_<op>.py` file holds only cases, inputs and the implementations to compare; `python -m
benchmarks.bench_<op> --help` runs one, `python -m benchmarks.sweep --help` the study.
"""

import os

# Before torch loads OpenMP: threads that wait for one another spin by default, and beside another
# program a parallel region then takes twenty times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
