"""The command line: what it prints, and what it says about wrong words and missing packages."""

from __future__ import annotations

import builtins
import importlib
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from jepa import cli, commands
from jepa.config import load, merged, parse_overrides
from jepa.options import options
from jepa.variants import VARIANTS

ROOT = Path(__file__).parents[2]


def configuration(command: str) -> type:
    return commands.COMMANDS[command][1]()[0]


def test_variants_are_listed(capsys):
    assert cli.main(["variants"]) == 0
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines()]
    names = [row[1].strip() for row in rows if len(row) > 1]
    assert [name for name in names if name] == list(VARIANTS)


def test_without_a_command_there_are_three_lines_to_start_with(capsys):
    assert cli.main([]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize("command", commands.COMMANDS)
def test_every_option_has_a_line_of_help(command):
    found = list(options(configuration(command)))
    assert len({option.name for option in found}) == len(found)
    for option in found:
        assert option.kind, option
        assert re.fullmatch(r"\S.{3,110}\.", option.help), option


@pytest.mark.parametrize("command", commands.COMMANDS)
def test_the_page_of_help_has_every_option_on_one_line(command, capsys):
    assert cli.main([command, "--help"]) == 0
    page = capsys.readouterr().out.splitlines()
    for option in options(configuration(command)):
        key = option.name if option.default is None else f"{option.name}={option.default}"
        lines = [line for line in page if line.split("  ")[0].strip().startswith(key[:50])]
        assert any(line.rstrip().endswith(option.help) for line in lines), option


@pytest.mark.parametrize("command", commands.COMMANDS)
def test_defaults_are_shown_as_one_would_type_them(command):
    """Each alone changes nothing."""
    kind = configuration(command)
    given = [f"{option.name}=x" for option in options(kind) if "Must be given" in option.help]
    base = merged(commands.nested_defaults(kind), parse_overrides(given))
    plain = load(kind, base=base)
    for option in options(kind):
        # A default inside a mapping that is null, or of an objective that is off, makes it one.
        inside = option.name.startswith(("variant.objectives.", "variant.masks.motion."))
        if option.default is not None and not inside and "data." not in option.name:
            assert load(kind, None, [f"{option.name}={option.default}"], base) == plain, option


def test_keys_of_objectives_and_nulls_are_accepted():
    kind = configuration("pretrain")
    for option in options(kind):
        if option.default is not None and option.name.startswith(("variant.", "data.")):
            load(kind, None, [f"{option.name}={option.default}"])


def test_dashes_of_keys_alone_are_underscores():
    assert commands.overrides(
        ["--data.at.list-file=/my-data/a.txt", "--keep-last", "2", "--half", "output=my-run"]
    ) == ["data.at.list_file=/my-data/a.txt", "keep_last=2", "half=true", "output=my-run"]


def test_modules_of_the_extra_are_those_of_the_project_file():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {
        re.split("[>=<]", one)[0].replace("-", "_").lower()
        for one in project["optional-dependencies"]["train"]
    }
    places = packages_distributions()
    found = {
        name.replace("-", "_").lower() for module in cli.TRAIN_EXTRA for name in places[module]
    }
    assert wanted == found & wanted
    assert len(wanted) == len(cli.TRAIN_EXTRA)


@pytest.mark.parametrize(("module", "command"), [("yaml", "variants"), ("av", "pretrain")])
def test_a_missing_package_gets_one_sentence(module, command, monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.partition(".")[0] == module:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *arguments, **options)

    for name in [one for one in sys.modules if one.partition(".")[0] in ("jepa", module)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    fresh = importlib.import_module("jepa.cli")
    assert fresh.main([command, "--help"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{module!r} must be installed" in error and "jepa-kernels[train]" in error


def test_another_missing_module_is_not_hidden(monkeypatch):
    def broken(words):
        raise ModuleNotFoundError("No module named 'torch.nothing'", name="torch.nothing")

    monkeypatch.setattr(commands, "main", broken)
    with pytest.raises(ModuleNotFoundError, match=r"torch\.nothing"):
        cli.main(["variants"])
