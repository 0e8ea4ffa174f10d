"""Fine-tunes a transformers VJEPA2 video classifier, with fused attention, on a folder of videos:
one subfolder for each class.

    python examples/finetune_vjepa2_transformers.py path/to/videos --steps 20
    python examples/finetune_vjepa2_transformers.py path/to/videos --weights path/to/saved_model
    --steps 500

Without --weights a small model starts from random weights, so that the script runs anywhere; with
it, whatever `save_pretrained` wrote.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import av
import numpy as np
import torch
from transformers import VJEPA2Config, VJEPA2ForVideoClassification

from jepa_kernels.integrations import accelerate

SUFFIXES = (".avi", ".mp4", ".mkv", ".webm")
MEAN, STD = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))


def list_videos(folder: Path) -> tuple[list[tuple[Path, int]], list[str]]:
    """(file, class number) of every video, and the class names."""
    classes = sorted(child.name for child in folder.iterdir() if child.is_dir())
    files = [
        (file, label)
        for label, name in enumerate(classes)
        for file in sorted((folder / name).iterdir())
    ]
    return [(file, label) for file, label in files if file.suffix.lower() in SUFFIXES], classes


def read_clip(path: Path, frames: int, side: int) -> torch.Tensor:
    """The first `frames` frames, squeezed to squares and normalised: [frames, 3, side, side]. The
    last one repeats in shorter videos."""
    taken: list[np.ndarray] = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            taken.append(frame.to_ndarray(format="rgb24", width=side, height=side))
            if len(taken) == frames:
                break
    if not taken:
        raise ValueError(f"read_clip: path must be a video with frames, got {path}.")
    taken += [taken[-1]] * (frames - len(taken))
    pixels = torch.from_numpy(np.stack(taken)).float() / 255
    return ((pixels - MEAN) / STD).permute(0, 3, 1, 2)


def build(weights: Path | None, classes: int) -> VJEPA2ForVideoClassification:
    if weights is not None:
        return VJEPA2ForVideoClassification.from_pretrained(
            weights, num_labels=classes, ignore_mismatched_sizes=True
        )
    sizes = dict(
        crop_size=64, frames_per_clip=8, hidden_size=96, num_attention_heads=2, num_hidden_layers=2
    )
    pooler = dict(
        num_pooler_layers=1,
        pred_hidden_size=96,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
    )
    return VJEPA2ForVideoClassification(VJEPA2Config(**sizes, **pooler, num_labels=classes))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("videos", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--save", type=Path, help="folder for save_pretrained at the end")
    options = parser.parse_args()

    torch.manual_seed(0)
    videos, classes = list_videos(options.videos)
    if not videos:
        parser.error(
            "videos must be a folder with one subfolder of videos for each class, got "
            f"{options.videos}"
        )
    print(f"{len(videos)} videos of {len(classes)} classes")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(options.weights, len(classes)).to(device).train()
    print(accelerate(model))

    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    for step in range(options.steps):
        picks = [videos[i] for i in torch.randint(len(videos), (options.batch_size,)).tolist()]
        clips = torch.stack(
            [
                read_clip(path, model.config.frames_per_clip, model.config.crop_size)
                for path, _ in picks
            ]
        )
        labels = torch.tensor([label for _, label in picks], device=device)
        out = model(pixel_values_videos=clips.to(device), labels=labels)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        print(f"step {step + 1}  loss {out.loss.item():.4f}")
    if options.save is not None:
        model.save_pretrained(options.save)


if __name__ == "__main__":
    main()
