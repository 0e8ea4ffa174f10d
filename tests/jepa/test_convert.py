"""Conversion between the stack, public releases and transformers, on random weights; where a
function is kept, outputs are compared."""

from __future__ import annotations

import pytest
import torch

from jepa import convert
from jepa.convert import ConversionError
from jepa.models.encoder import Encoder
from jepa.models.predictor import Predictor
from jepa.models.sizes import model_config
from jepa_kernels.testing import FLOAT32_DEEP
from tests.integrations.peers import peer, randomised

SIZES = dict(patch_size=4, tubelet_size=2)


def hugging_face(**changes):
    modeling = peer("transformers", "transformers.models.vjepa2.modeling_vjepa2")
    from transformers import VJEPA2Config

    sizes = dict(
        crop_size=12, frames_per_clip=4, hidden_size=48, num_attention_heads=2, num_hidden_layers=2
    )
    predictor = dict(
        pred_hidden_size=24,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=2,
        pred_num_mask_tokens=3,
    )
    return randomised(modeling.VJEPA2Model(VJEPA2Config(**SIZES, **sizes, **predictor, **changes)))


def public():
    """Encoder and predictor of cc-vjepa2 in the sizes of `hugging_face`."""
    vit = peer("vjepa2", "vjepa2.models.vision_transformer")
    predictor = peer("vjepa2", "vjepa2.models.predictor")
    sizes = dict(
        img_size=12,
        num_frames=4,
        depth=2,
        num_heads=2,
        use_rope=True,
        norm_layer=lambda d: torch.nn.LayerNorm(d, eps=1e-6),
    )
    encoder = randomised(vit.VisionTransformer(**SIZES, **sizes, embed_dim=48))
    own = dict(embed_dim=48, predictor_embed_dim=24, use_mask_tokens=True, num_mask_tokens=3)
    return encoder, randomised(predictor.VisionTransformerPredictor(**SIZES, **sizes, **own))


def stack():
    config = model_config("micro")
    return randomised(Encoder(config)), randomised(Predictor(config))


def parts(encoder, predictor) -> convert.Parts:
    return {"encoder": dict(encoder.state_dict()), "predictor": dict(predictor.state_dict())}


def assert_same(left: convert.Parts, right: convert.Parts) -> None:
    assert {part: set(state) for part, state in left.items()} == {
        part: set(state) for part, state in right.items()
    }
    for part, state in left.items():
        for name, value in state.items():
            assert torch.equal(value, right[part][name]), f"{part}.{name}"


def test_public_to_transformers_and_back_is_exact():
    theirs = parts(*public())
    assert convert.layout_of(theirs) == "vjepa2"
    model = hugging_face()
    converted = convert.convert(theirs, "transformers")
    model.load_state_dict(
        {
            f"{part}.{name}": value
            for part, state in converted.items()
            for name, value in state.items()
        }
    )
    assert_same(convert.convert(converted, "vjepa2"), theirs)
    encoder, predictor = public()
    clips = torch.randn(1, 4, 3, 12, 12)
    ids = torch.randperm(18)[None]
    with torch.no_grad():
        ours = model(
            pixel_values_videos=clips, context_mask=[ids[:, :8]], target_mask=[ids[:, 8:13]]
        )
        features = encoder(clips.transpose(1, 2))
        predicted = predictor(features[:, ids[0, :8]], ids[:, :8], ids[:, 8:13])
    torch.testing.assert_close(ours.last_hidden_state, features, **FLOAT32_DEEP)
    torch.testing.assert_close(ours.predictor_output.last_hidden_state, predicted, **FLOAT32_DEEP)


@pytest.mark.parametrize("shard_bytes", [10**9, 30_000])
def test_folders_that_transformers_reads_and_writes(tmp_path, shard_bytes):
    model = hugging_face()
    model.save_pretrained(tmp_path / "theirs", max_shard_size=shard_bytes)
    read = convert.read(tmp_path / "theirs")
    assert convert.layout_of(read) == "transformers"
    assert_same(
        read, {part: dict(getattr(model, part).state_dict()) for part in ("encoder", "predictor")}
    )
    convert.write(
        convert.convert(convert.convert(read, "vjepa2"), "transformers"),
        tmp_path / "ours",
        shard_bytes,
    )
    assert (tmp_path / "ours" / "model.safetensors.index.json").is_file() == (shard_bytes < 10**9)
    model.config.save_pretrained(tmp_path / "ours")
    again = type(model).from_pretrained(tmp_path / "ours")
    assert all(
        torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items()
    )


def test_release_file_with_prefixes(tmp_path):
    theirs = parts(*public())
    wrapped = {
        part: {f"module.backbone.{name}": value for name, value in state.items()}
        for part, state in theirs.items()
    }
    torch.save(wrapped | {"epoch": 3, "scaler": None, "opt": {"state": {}}}, tmp_path / "vitl.pt")
    assert_same(convert.read(tmp_path / "vitl.pt"), theirs)


def test_stack_and_release_2_1_share_their_names(tmp_path):
    ours = parts(*stack())
    assert convert.layout_of(ours) == "vjepa2.1"
    convert.write(convert.convert(ours, "vjepa2.1"), tmp_path)
    read = convert.convert(convert.read(tmp_path), "stack")
    assert_same(read, ours)
    own = {
        "context_encoder": ours["encoder"],
        "target_encoder": ours["encoder"],
        "predictor": ours["predictor"],
    }
    convert.write(own, tmp_path / "run")
    assert_same(convert.read(tmp_path / "run", encoder="target_encoder"), ours)
    with pytest.raises(
        ConversionError,
        match="one of the parts context_encoder, predictor, target_encoder, got 'encoder'",
    ):
        convert.read(tmp_path / "run")
    encoder, predictor = stack()
    encoder.load_public(
        {f"module.backbone.{name}": value for name, value in read["encoder"].items()}
    )
    predictor.load_public(read["predictor"])


def test_between_the_ropes_only_when_asked():
    theirs, ours = parts(*public()), parts(*stack())
    for source, to in ((theirs, "stack"), (ours, "vjepa2"), (ours, "transformers")):
        with pytest.raises(ConversionError, match="other_rope must be True"):
            convert.convert(source, to)
    narrow = convert.convert(ours, "vjepa2", other_rope=True)
    assert set(narrow) == {"encoder"}
    assert convert.layout_of(narrow) == "vjepa2"
    assert torch.equal(narrow["encoder"]["norm.weight"], ours["encoder"]["norms_block.3.weight"])
    bias = ours["encoder"]["patch_embed.proj.bias"] + ours["encoder"]["video_mod_embed"].flatten()
    assert torch.equal(narrow["encoder"]["patch_embed.proj.bias"], bias)
    assert (
        convert.layout_of(convert.convert(ours, "transformers", other_rope=True)) == "transformers"
    )
    wide = convert.convert(narrow, "stack", other_rope=True, levels=4)
    Encoder(model_config("micro")).load_state_dict(wide["encoder"])
    for name, value in narrow["encoder"].items():
        assert name.startswith("norm.") or torch.equal(wide["encoder"][name], value)


def test_an_image_is_a_frame_repeated():
    wide = convert.convert({"encoder": dict(public()[0].state_dict())}, "stack", other_rope=True)[
        "encoder"
    ]
    frame = torch.randn(1, 3, 1, 4, 4)
    clip = torch.nn.functional.conv3d(
        frame.expand(-1, -1, 2, -1, -1),
        wide["patch_embed.proj.weight"],
        wide["patch_embed.proj.bias"],
    )
    image = torch.nn.functional.conv3d(
        frame, wide["patch_embed_img.proj.weight"], wide["patch_embed_img.proj.bias"]
    )
    torch.testing.assert_close(image, clip, **FLOAT32_DEEP)


def test_refusals():
    theirs = parts(*public())
    with pytest.raises(ConversionError, match=r"to must be one of stack, vjepa2\.1"):
        convert.convert(theirs, "timm")
    with pytest.raises(ConversionError, match="parts must hold an encoder"):
        convert.convert({"encoder": {"conv1.weight": torch.zeros(1)}}, "stack")
    theirs["encoder"]["head.weight"] = torch.zeros(1)
    with pytest.raises(ConversionError, match=r"names of its layout only, got 'head\.weight'"):
        convert.convert(theirs, "transformers")
