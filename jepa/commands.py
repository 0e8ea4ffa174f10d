r"""The commands of ``jepa``: every option is a field of the command's configuration.

jepa pretrain variant=fwm_hw_ld schedule.total_steps=300 output=runs/demo
jepa pretrain recipe=published variant=fwm_hw_ld output=runs/published
jepa probe run=runs/demo
jepa pretrain --config run.yaml --data.kind ucf101 --data.at.files /data/UCF-101 \
    --data.at.lists /data/ucfTrainTestlist
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jepa import options, recipes
from jepa.config import ConfigError, load, merged, parsing_of, to_dict, to_yaml
from jepa.failures import sentence_of


def _pretrain() -> tuple[type, Callable[[Any], object]]:
    from jepa import pretrain

    return pretrain.PretrainConfig, pretrain.run


def _probe() -> tuple[type, Callable[[Any], object]]:
    from jepa import probe

    return probe.ProbeConfig, probe.run


def _finetune() -> tuple[type, Callable[[Any], object]]:
    from jepa import finetune

    return finetune.FinetuneConfig, finetune.run


def _encode() -> tuple[type, Callable[[Any], object]]:
    from jepa import encode

    return encode.EncodeConfig, encode.run


# Each configured command names its configuration and what runs it; imported when chosen, since that
# loads torch and more.
COMMANDS: dict[str, tuple[str, Callable[[], tuple[type, Callable[[Any], object]]]]] = {
    "pretrain": ("train an encoder, with any variant's objectives", _pretrain),
    "probe": ("ask a frozen encoder for appearance, motion or classes", _probe),
    "finetune": ("train a pre-trained encoder on labels", _finetune),
    "encode": ("write features of a folder or list of videos", _encode),
}


START = """\
jepa pretrain output=runs/demo   train the micro model on generated clips: minutes on two cores
jepa probe run=runs/demo         ask its frozen encoder for shape, colour and motion
jepa --help                      the commands; jepa COMMAND --help has every option of one"""


def overrides(arguments: Sequence[str]) -> list[str]:
    """``--a.b value``, ``--a.b=value`` and ``a.b=value`` as ``a.b=value``; a flag alone is true.

    Raises:
        ConfigError: a word that is none of these.
    """
    result: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            if "=" not in word:
                raise ConfigError(
                    f"config: arguments must look like key=value or --key value, got {word!r}."
                )
            result.append(word)
            continue
        key, given, value = word[2:].partition("=")
        if not given:
            alone = not words or words[0].startswith("--") or "=" in words[0]
            value = "true" if alone else words.pop(0)
        result.append(f"{key.replace('-', '_')}={value}")
    return result


def nested_defaults(kind: type) -> dict[str, Any]:
    """Defaults of nested configurations that differ from those of their own class, so that giving
    one key of them keeps the others."""
    made = {
        f.name: f.default_factory()
        for f in dataclasses.fields(kind)
        if f.default_factory is not dataclasses.MISSING and parsing_of(f) is None
    }
    return {name: to_dict(value) for name, value in made.items() if dataclasses.is_dataclass(value)}


_RECIPES = (
    f"  recipe=NAME    start from one of {', '.join(recipes.RECIPES)} (jepa/recipes.py); "
    f"{recipes.DEFAULT} where\n"
    "                 neither it nor --config is given. The defaults below are those of "
    "published\n"
)


def _configured(name: str, arguments: Sequence[str]) -> int:
    purpose, find = COMMANDS[name]
    kind, run = find()
    if "--help" in arguments or "-h" in arguments:
        options.print_help(name, purpose, kind, _RECIPES if name == "pretrain" else "")
        return 0
    parser = argparse.ArgumentParser(prog=f"jepa {name}", add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--show", action="store_true")
    known, rest = parser.parse_known_args(arguments)
    words, base = overrides(rest), nested_defaults(kind)
    if name == "pretrain":
        settings, words = recipes.taken_from(words, known.config is not None)
        base = merged(base, settings)
    config: Any = load(kind, known.config, words, base=base)
    if known.show:
        print(to_yaml(config), end="")
        return 0
    run(config)
    return 0


def _variants() -> int:
    from rich.console import Console
    from rich.table import Table

    from jepa.variants import VARIANTS, variant

    table = Table("variant", "masks", "objectives (weight)", "target")
    for name in VARIANTS:
        made = variant(name)
        policy = VARIANTS[name].get("masks", {"name": "blocks"})
        extra = ", ".join(
            f"{k} {c.weight:g}"
            for k, c in made.objectives.items()
            if k not in ("prediction", "context")
        )
        table.add_row(
            name,
            " ".join(str(v) if k == "name" else f"{k}={v}" for k, v in policy.items()),
            extra or "-",
            made.target.kind,
        )
    Console().print(table)
    return 0


def main(words: Sequence[str]) -> int:
    """Runs the command that `words` begin with; returns the exit status."""
    if not words:
        print(START)
        return 0
    parser = argparse.ArgumentParser(
        prog="jepa", description=START, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choices = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (purpose, _) in COMMANDS.items():
        choices.add_parser(name, help=purpose, add_help=False)
    choices.add_parser("variants", help="list the named variants", add_help=False)
    choices.add_parser("conformance", help="compare with published numbers", add_help=False)
    chosen, rest = parser.parse_known_args(words[:1]), words[1:]
    command = chosen[0].command
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if command == "conformance":
        from jepa.conformance.__main__ import main as conformance

        return int(conformance(rest) or 0)
    try:
        return _variants() if command == "variants" else _configured(command, rest)
    except (Exception, KeyboardInterrupt) as error:
        told = sentence_of(error)
        if told is None:
            raise
        print(told[0], file=sys.stderr)
        return told[1]
