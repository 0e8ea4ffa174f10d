"""Measurements: paired micro-benchmarks of every op, and the resolution sweep of the training step.

`harness` times, `machine` and `memory` describe where, `resolutions` names the axis, `plot` draws.
A `bench_<op>.py` file holds only cases, inputs and the implementations to compare; `python -m
benchmarks.bench_<op> --help` runs one, `python -m benchmarks.sweep --help` the study.
"""
