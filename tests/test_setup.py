"""Building where something is missing: the pure-Python package and a sentence, or a refusal."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib

import pytest

from jepa_kernels import __main__ as doctor


@pytest.fixture
def built(root, tmp_path):
    """Builds a copy where there is no compiler; (status, output, libraries)."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path / name)
    (tmp_path / "jepa_kernels").mkdir()
    (tmp_path / "jepa_kernels" / "__init__.py").touch()
    shutil.copy(root / "jepa_kernels" / "native.py", tmp_path / "jepa_kernels" / "native.py")

    def build(**variables):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("JEPA_KERNELS")}
        environment.pop("CXX", None)
        done = subprocess.run(
            [sys.executable, "setup.py", "build", "--build-lib", "lib", "--build-temp", "temp"],
            cwd=tmp_path,
            env={**environment, "PATH": str(tmp_path / "empty"), "JEPA_KERNELS_CUDA": "0"}
            | variables,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr, list(tmp_path.rglob("*.so"))

    return build


def test_without_a_compiler_the_pure_python_package_is_built(built):
    status, output, libraries = built()
    assert status == 0, output
    assert libraries == []
    assert "the C++ compiler 'g++' was not found; the native code is left out" in output
    assert "apt-get install g++" in output


def test_a_native_build_that_was_asked_for_is_refused_without_a_compiler(built):
    status, output, _ = built(JEPA_KERNELS_NATIVE="1", CXX="ccache g++-99")
    assert status != 0
    assert "JEPA_KERNELS_NATIVE=1, but the C++ compiler 'ccache' was not found." in output


def test_doctor_says_that_there_is_no_compiler(root, tmp_path):
    """The package's Python files alone, as such a build installs them, and no writable home."""
    shutil.copytree(
        root / "jepa_kernels",
        tmp_path / "jepa_kernels",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JEPA_KERNELS", "CXX"))}
    done = subprocess.run(
        [sys.executable, "-m", "jepa_kernels", "doctor"],
        cwd=tmp_path,
        env={**environment, "PATH": str(tmp_path / "empty"), "HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "there is no C++ compiler (install g++" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_old_pythons_are_refused_by_metadata(root):
    from packaging.specifiers import SpecifierSet

    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    pythons = SpecifierSet(project["requires-python"])
    assert [version in pythons for version in ("3.9.20", "3.10.16")] == [False, False]
    assert all(version in pythons for version in ("3.11.0", "3.12.9", "3.13.3", "3.14.0"))
    assert "3.15.0" not in pythons


def test_doctor_names_a_python_that_no_test_has_run_on(root, monkeypatch):
    """Classifiers are the versions that were tried; metadata allows one more."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    tried = {
        line.rsplit(" ", 1)[1]
        for line in project["classifiers"]
        if line.startswith("Programming Language :: Python :: 3.")
    }
    assert tried == set(doctor.TRIED_PYTHONS)
    for version in tried:
        monkeypatch.setattr(
            doctor.platform, "python_version", lambda version=version: f"{version}.1"
        )
        assert ("python", f"{version}.1") in doctor._machine()
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.14.2")
    ((_, said),) = [row for row in doctor._machine() if row[0] == "python"]
    assert said == "3.14.2 (allowed, but tried on 3.11, 3.12, 3.13 alone)"
