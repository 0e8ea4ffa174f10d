"""Weight files that are not what they seem: one sentence."""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import save_file

from jepa.convert import ConversionError, read

STATE = {"norm.weight": torch.ones(3)}


@pytest.mark.parametrize("end", ["pt", "pth", "bin", "ckpt"])
def test_every_name_of_a_pytorch_file(tmp_path, end):
    path = tmp_path / f"weights.{end}"
    torch.save({"encoder": STATE, "epoch": 3}, path)
    assert list(read(path)["encoder"]) == ["norm.weight"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (STATE, r"must hold parts .*, got the 1 tensors of one module; save it as"),
        ([STATE], r"must hold a mapping of parts, got list\.$"),
        ({"state_dict": STATE}, r"must be one of the parts state_dict, got 'encoder'\.$"),
    ],
)
def test_a_file_of_another_shape(tmp_path, content, told):
    torch.save(content, tmp_path / "weights.bin")
    with pytest.raises(ConversionError, match=told):
        read(tmp_path / "weights.bin")


def test_damaged_files(tmp_path):
    save_file(STATE, tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    for name, content in (
        ("a.bin", whole),
        ("a.ckpt", b""),
        ("a.pt", pickle.dumps(print)),
        ("a.safetensors", whole[:20]),
        ("b.safetensors", b"\xff" * 40),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConversionError, match=r"convert: .* must be (a PyTorch|safetensors)"):
            read(tmp_path / name)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {}}']
    + ['{"weight_map": {"a": "../a.safetensors"}}', '{"weight_map": {"a": "gone.safetensors"}}'],
)
def test_a_damaged_index_of_shards(tmp_path, content):
    folder = tmp_path / "shards"
    folder.mkdir()
    save_file(STATE, tmp_path / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConversionError, match=r"convert: .*index\.json must (be JSON|name files)"):
        read(folder)


def test_a_missing_file_stays_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "gone.pt")
