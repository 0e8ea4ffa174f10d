"""The command line: ``jepa pretrain | probe | finetune | encode | variants | conformance``. Every
option is a field of the command's configuration.

jepa pretrain variant=fwm_hw_ld schedule.total_steps=300 output=runs/demo
jepa pretrain recipe=published variant=fwm_hw_ld output=runs/published
jepa probe run=runs/demo
jepa pretrain --config run.yaml --data.kind ucf101 --data.at.files /data/UCF-101 --data.at.lists
/data/ucfTrainTestlist
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jepa import recipes
from jepa.config import ConfigError, load, merged, to_dict, to_yaml


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
        elif "=" in word:
            result.append(
                word[2:].replace("-", "_") if "-" in word[2:].partition("=")[0] else word[2:]
            )
        else:
            alone = not words or words[0].startswith("--") or "=" in words[0]
            result.append(f"{word[2:].replace('-', '_')}={'true' if alone else words.pop(0)}")
    return result


def _nested_defaults(kind: type) -> dict[str, Any]:
    """Defaults of nested configurations that differ from those of their own class, so that giving
    one key of them keeps the others."""
    made = {
        f.name: f.default_factory()
        for f in dataclasses.fields(kind)
        if f.default_factory is not dataclasses.MISSING and "parse" not in f.metadata
    }
    return {name: to_dict(value) for name, value in made.items() if dataclasses.is_dataclass(value)}


def _describe(kind: type) -> str:
    fields = [f"  {f.name}" for f in dataclasses.fields(kind)]
    return f"{kind.__doc__}\nkeys:\n" + "\n".join(fields)


def _recipes(name: str) -> str:
    if name != "pretrain":
        return ""
    names = ", ".join(recipes.RECIPES)
    return (
        f"\nrecipe=NAME starts from one of {names} (jepa/recipes.py); {recipes.DEFAULT} where "
        "neither it nor --config is given"
    )


def _configured(name: str, arguments: Sequence[str]) -> int:
    purpose, find = COMMANDS[name]
    parser = argparse.ArgumentParser(
        prog=f"jepa {name}",
        description=purpose,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_describe(find()[0]) + _recipes(name),
    )
    parser.add_argument(
        "--config", help="YAML file; what is given on the command line is laid over it"
    )
    parser.add_argument(
        "--show", action="store_true", help="print the resolved configuration and stop"
    )
    known, rest = parser.parse_known_args(arguments)
    kind, run = find()
    words, base = overrides(rest), _nested_defaults(kind)
    if name == "pretrain":
        settings, words = recipes.taken_from(words, known.config is not None)
        base = merged(base, settings)
    config = load(kind, known.config, words, base=base)
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


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="jepa", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choices = parser.add_subparsers(dest="command", required=True, metavar="command")
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
    from jepa.checkpoint import CheckpointError

    try:
        return _variants() if command == "variants" else _configured(command, rest)
    except (ConfigError, FileNotFoundError, CheckpointError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
