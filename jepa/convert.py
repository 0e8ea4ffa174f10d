"""Weights under other names: public V-JEPA 2 and 2.1 releases, transformers VJEPA2, and this stack.

Four layouts, each a dict of parts ("encoder", "predictor", ...) of tensors without wrapper
prefixes:

    stack         jepa.models.Encoder and Predictor
    vjepa2.1      the same names and the same function
    vjepa2        one final norm, no modality embeddings, a linear predictor_embed; RoPE layout
    `tiled` transformers  VJEPA2Model: the function of vjepa2 with query, key and value apart

stack <-> vjepa2.1 and vjepa2 <-> transformers are exact. Between the two pairs only an encoder's
weights can go, and what they compute changes: `tiled` and `interleaved` RoPE are different
functions, and no change of weights makes one of the other. `other_rope=True` says that this is
meant, as a start for more training.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from jepa.atomic import write_json
from jepa.models.blocks import stripped

Parts = dict[str, dict[str, Tensor]]

LAYOUTS = ("stack", "vjepa2.1", "vjepa2", "transformers")
_EXACT = ({"stack", "vjepa2.1"}, {"vjepa2", "transformers"})
_INDEX = "model.safetensors.index.json"
# transformers <- vjepa2, by part; {i} is a number.
_RENAMED = {
    "encoder": (
        ("embeddings.patch_embeddings.proj", "patch_embed.proj"),
        ("layer.{i}.attention.proj", "blocks.{i}.attn.proj"),
        ("layer.{i}", "blocks.{i}"),
        ("layernorm", "norm"),
    ),
    "predictor": (
        ("embeddings.predictor_embeddings", "predictor_embed"),
        ("layer.{i}.attention.proj", "predictor_blocks.{i}.attn.proj"),
        ("layer.{i}", "predictor_blocks.{i}"),
        ("layernorm", "predictor_norm"),
        ("proj", "predictor_proj"),
    ),
}
_SPLIT = ("query", "key", "value")


class ConversionError(ValueError):
    """Weights that cannot be had in the asked layout; the message says why."""


def layout_of(parts: Mapping[str, Mapping[str, Tensor]]) -> str:
    """Which layout the names are of; "vjepa2.1" for those that it shares with the stack.

    Raises:
        ConversionError: the names are of none.
    """
    encoder = parts.get("encoder", {})
    if "embeddings.patch_embeddings.proj.weight" in encoder:
        return "transformers"
    if "patch_embed.proj.weight" in encoder:
        if "norm.weight" in encoder:
            return "vjepa2"
        if "norms_block.0.weight" in encoder:
            return "vjepa2.1"
    raise ConversionError(
        f"convert: parts must hold an encoder of one of {', '.join(LAYOUTS)}, got names like "
        f"{sorted(encoder)[:3]}."
    )


def convert(parts: Parts, to: str, *, other_rope: bool = False, levels: int = 1) -> Parts:
    """The same weights in another layout. Tensors that only change their name are shared, not
    copied.

    Args:
        parts: as from `read`.
        to: one of LAYOUTS.
        other_rope: allow an encoder to go between layouts whose RoPE differs (see the module);
            predictors do not.
        levels: from vjepa2 or transformers to the stack: how many copies of the final norm become
            level norms.

    Raises:
        ConversionError: an unknown layout, names that do not fit theirs, or a change of function
            that was not asked for.
    """
    if to not in LAYOUTS:
        raise ConversionError(f"convert: to must be one of {', '.join(LAYOUTS)}, got {to!r}.")
    source = layout_of(parts)
    if any({source, to} <= pair for pair in _EXACT):
        if "transformers" not in (source, to) or source == to:
            return {part: dict(state) for part, state in parts.items()}
        change = _from_transformers if source == "transformers" else _to_transformers
        return {part: change(part, state) for part, state in parts.items()}
    if not other_rope:
        raise ConversionError(
            f"convert: other_rope must be True to go from {source} to {to}, got False: they "
            "rotate differently, "
            "so that the weights compute something else there and need more training."
        )
    if source in _EXACT[1]:
        return {"encoder": _widened(convert(parts, "vjepa2")["encoder"], levels)}
    return convert({"encoder": _narrowed(parts["encoder"])}, to)


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(
        re.escape(template).replace(re.escape("{i}"), r"(?P<i>\d+)") + r"(?P<rest>(\..*)?)"
    )


def _renamed(part: str, name: str, forwards: bool) -> str:
    if part not in _RENAMED:
        raise ConversionError(f"convert: parts must be of {', '.join(_RENAMED)}, got {part!r}.")
    for theirs, public in _RENAMED[part]:
        source, target = (public, theirs) if forwards else (theirs, public)
        match = _pattern(source).fullmatch(name)
        if match:
            return target.replace("{i}", match.groupdict().get("i") or "") + match["rest"]
    raise ConversionError(f"convert: {part} must hold names of its layout only, got {name!r}.")


def _to_transformers(part: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    result = {}
    tokens = [name for name in state if name.startswith("mask_tokens.")]
    if tokens:
        result["embeddings.mask_tokens"] = torch.stack(
            [state[f"mask_tokens.{i}"] for i in range(len(tokens))]
        )
    for name, value in state.items():
        if name in tokens:
            continue
        before, joined, kind = name.partition(".attn.qkv.")
        if joined:
            stem = _renamed(part, before, forwards=True)
            result |= {
                f"{stem}.attention.{which}.{kind}": third
                for which, third in zip(_SPLIT, value.chunk(3))
            }
        else:
            result[_renamed(part, name, forwards=True)] = value
    return result


def _from_transformers(part: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        match = re.fullmatch(r"(.*)\.attention\.(query|key|value)\.(weight|bias)", name)
        if name == "embeddings.mask_tokens":
            result |= {f"mask_tokens.{i}": token for i, token in enumerate(value)}
        elif match is None:
            result[_renamed(part, name, forwards=False)] = value
        elif match[2] == "query":
            thirds = [state[f"{match[1]}.attention.{which}.{match[3]}"] for which in _SPLIT]
            result[f"{_renamed(part, match[1], forwards=False)}.attn.qkv.{match[3]}"] = torch.cat(
                thirds
            )
    return result


def _narrowed(encoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A stack encoder as vjepa2: the last level's norm; the video embedding becomes part of the
    patch bias, which is exact for clips."""
    last = max(int(name.split(".")[1]) for name in encoder if name.startswith("norms_block."))
    result = {}
    for name, value in encoder.items():
        if name.startswith(f"norms_block.{last}."):
            result[f"norm.{name.rpartition('.')[2]}"] = value
        elif name == "patch_embed.proj.bias":
            result[name] = value + encoder["video_mod_embed"].reshape(-1)
        elif name.startswith(("patch_embed.", "blocks.")):
            result[name] = value
    return result


def _widened(encoder: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """A vjepa2 encoder under the stack's names: no modality embeddings, the final norm at each
    level, and an image as a frame repeated."""
    absent = encoder["norm.weight"].new_zeros(1, 1, encoder["norm.weight"].shape[0])
    result = {"img_mod_embed": absent, "video_mod_embed": absent.clone()}
    for name, value in encoder.items():
        if name.startswith("norm."):
            result |= {
                f"norms_block.{level}.{name.rpartition('.')[2]}": value.clone()
                for level in range(levels)
            }
        else:
            result[name] = value
    result["patch_embed_img.proj.weight"] = encoder["patch_embed.proj.weight"].sum(2, keepdim=True)
    result["patch_embed_img.proj.bias"] = encoder["patch_embed.proj.bias"].clone()
    return result


def read(path: str | Path, encoder: str = "encoder") -> Parts:
    """Encoder and predictor of a release: a .pt file, a .safetensors file, or a folder of whole or
    sharded safetensors.

    A .pt file is read without executing what is pickled in it. Everything else that is there
    (steps, optimiser, pooler) is left out.

    Args:
        path: file or folder, a checkpoint folder of this stack among them.
        encoder: which part to take as the encoder: "target_encoder" of a pre-training run,
            "context_encoder" of this stack.

    Raises:
        ConversionError: no such part, with the parts that are there.
    """
    found = _found(Path(path))
    if encoder not in found:
        raise ConversionError(
            f"convert: encoder must be one of the parts {', '.join(sorted(found))}, got "
            f"{encoder!r}."
        )
    return {"encoder": found[encoder]} | {
        part: state for part, state in found.items() if part == "predictor"
    }


def _found(path: Path) -> Parts:
    """Every part of a file or folder; `read` picks."""
    if path.suffix in (".pt", ".pth", ".tar", ".bin", ".ckpt"):
        found = _unpickled(path)
        if _all_tensors(found):
            raise ConversionError(
                f"convert: {path} must hold parts such as encoder and predictor, got the "
                f"{len(found)} tensors of one module; save it as {{'encoder': state}}."
            )
        kept = {
            part: state
            for part, state in found.items()
            if isinstance(state, Mapping) and _all_tensors(state)
        }
        return {part: stripped(dict(state)) for part, state in kept.items()}
    if path.is_dir():
        index = path / _INDEX
        flat: dict[str, Tensor] = {}
        for name in _shards(index) if index.is_file() else ["model.safetensors"]:
            flat |= _tensors(path / name)
    else:
        flat = _tensors(path)
    parts: Parts = {}
    for full, value in stripped(flat).items():
        part, _, name = full.removeprefix("vjepa2.").partition(".")
        parts.setdefault(part, {})[name] = value
    return parts


def _shards(index: Path) -> list[str]:
    """The files that an index of shards names, all of them in its own folder."""
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        names = sorted(set(weight_map.values()))
        absent = [name for name in names if not (index.parent / Path(name).name).is_file()]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ConversionError(
            f"convert: {index} must be JSON with a weight_map of names to files, got "
            f"{type(error).__name__}: {str(error)[:200]}"
        ) from error
    if absent or not names:
        got = repr(absent[0][:200]) if absent else "none"
        raise ConversionError(f"convert: {index} must name files of its folder, got {got}.")
    return [Path(name).name for name in names]


def _unpickled(path: Path) -> Mapping[str, Any]:
    """What a PyTorch file holds, without executing what is pickled in it."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        # torch's unpickler lets through whatever damaged bytes lead it to, struct.error and
        # AssertionError among them.
        told = str(error).strip().partition("\n")[0]
        raise ConversionError(
            f"convert: {path} must be a PyTorch file of tensors, got {type(error).__name__}: {told}"
        ) from error
    if not isinstance(found, Mapping):
        raise ConversionError(
            f"convert: {path} must hold a mapping of parts, got {type(found).__name__}."
        )
    return found


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ConversionError(f"convert: {path} must be safetensors, got {error}.") from error


def _all_tensors(state: Mapping[str, Any]) -> bool:
    return bool(state) and all(isinstance(value, Tensor) for value in state.values())


def write(parts: Parts, folder: str | Path, shard_bytes: int = 5_000_000_000) -> None:
    """Writes safetensors named ``<part>.<name>``, in numbered shards with an index where they do
    not fit one of `shard_bytes`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Copies: tensors that share memory, as tied or sliced ones do, are refused by the format.
    flat = {
        f"{part}.{name}": value.detach().clone().contiguous()
        for part, state in parts.items()
        for name, value in state.items()
    }
    shards: list[dict[str, Tensor]] = [{}]
    room = shard_bytes
    for name, value in flat.items():
        if shards[-1] and value.nbytes > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = value
        room -= value.nbytes
    if len(shards) == 1:
        save_file(flat, folder / "model.safetensors", metadata={"format": "pt"})
        return
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, file)
    index = {
        "metadata": {"total_size": sum(value.nbytes for value in flat.values())},
        "weight_map": where,
    }
    write_json(folder / _INDEX, index)
