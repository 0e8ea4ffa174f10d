"""Which interpreters a release is built for."""

from __future__ import annotations

import subprocess

import pytest

from release import wheels
from release.environments import interpreter


def launcher(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A machine whose interpreters are those in this folder."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    monkeypatch.setattr(wheels.Path, "home", lambda: tmp_path)
    return tmp_path


def test_an_interpreter_says_its_version_itself(alone):
    assert interpreter("3.12") is None
    made = launcher(alone, "python3.12", "echo 3.12")
    assert interpreter("3.12") == made
    launcher(alone, "python3.13", "echo 3.9")
    assert interpreter("3.13") is None


def test_a_launcher_of_pyenv_that_fails_is_passed_by(alone):
    launcher(alone, "python3.12", "exit 127")
    folder = alone / "pyenv" / "versions" / "3.12.1" / "bin"
    folder.mkdir(parents=True)
    made = launcher(folder, "python3.12", "echo 3.12")
    assert interpreter("3.12") == made


def test_no_interpreter_is_a_sentence(alone, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["wheels", "--python", "3.14", "--out", str(alone / "dist")])
    assert wheels.main() == 1
    said = capsys.readouterr()
    assert "Python 3.14: no interpreter on PATH or of pyenv or uv" in said.out
    assert said.err == "release.wheels: none of these Pythons was found.\n"


def test_a_wheel_keeps_no_library_of_torch():
    """What auditwheel is told to leave out is what the native library links."""
    from jepa_kernels import native

    linked = subprocess.run(
        ["readelf", "-d", str(native._library)], capture_output=True, text=True, check=True
    ).stdout
    torch_libraries = {
        word.strip("[]") for word in linked.split() if word.startswith(("[libtorch", "[libc10"))
    }
    assert torch_libraries and torch_libraries <= set(wheels.TORCH_LIBRARIES)
