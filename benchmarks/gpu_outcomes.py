"""A pytest plugin: one line of JSON for each test as it ends, and a share of the tests for each of
several processes. A killed run leaves the lines of what it had tested; the same command then tests
the rest.

    pytest tests -m gpu -p benchmarks.gpu_outcomes --outcomes=tests-0.jsonl --share=0/8
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu_lines import append, read


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("outcomes")
    group.addoption("--outcomes", type=Path, help="file that gets a line for each test")
    group.addoption("--share", default="0/1", help="i/n: of n equal shares, the one numbered i")


# Last: shares are taken of what other plugins have left.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    number, count = (int(part) for part in config.getoption("--share").split("/"))
    path = config.getoption("--outcomes")
    passed = {row["test"] for row in read(path) if row["outcome"] == "passed"} if path else set()
    kept = [item for item in items[number::count] if item.nodeid not in passed]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    # A run that was killed after its last test has nothing left to do: that is success.
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and _path is not None and read(_path):
        session.exitstatus = pytest.ExitCode.OK


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # One row for each test: of its call, or of the setup or teardown that kept it from passing.
    if report.when == "call" or report.outcome != "passed":
        _report(report)


_path: Path | None = None


def pytest_configure(config: pytest.Config) -> None:
    global _path
    _path = config.getoption("--outcomes")


def _report(report: pytest.TestReport) -> None:
    if _path is None:
        return
    row = {
        "test": report.nodeid,
        "outcome": report.outcome,
        "when": report.when,
        "seconds": round(report.duration, 3),
    }
    if report.outcome == "failed":
        row["error"] = report.longreprtext[-4000:]
    append(_path, row)
