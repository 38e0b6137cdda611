"""What the tests share: a tiny random CLIP, and where figures, clips and lists lie."""

import os
from pathlib import Path

import pytest
import torch

from clip_vit import CLIP, clip_facts, load_clip

FIGURES = Path(__file__).resolve().parent / "figures"  # the released codes' and the libraries' figures
SHARED = Path(__file__).resolve().parents[2] / "shared"
MERGES = SHARED / "vocab" / "bpe_simple_vocab_16e6.txt.gz"
if not MERGES.is_file():  # as a user's clone: the file that was downloaded once, if it was
    MERGES = Path(os.path.expanduser("~/.cache/clip")) / MERGES.name


def need_merges():
    """Skips a test whose class names need CLIP's vocabulary, where that is not to be had."""
    if not MERGES.is_file():
        pytest.skip(f"CLIP's vocabulary, {MERGES.name}, is neither in ../shared/vocab nor in ~/.cache/clip")


def tiny_clip(dtype=torch.float32, resolution=32, patch=8, vision_width=128, vision_layers=4, text_width=128,
              text_layers=3, vocabulary=514, context=32, embed=128, seed=0):
    """A CLIP of the miniature's size with random weights, scaled so that attention is neither flat nor saturated."""
    with torch.device("meta"):
        shapes = CLIP(embed=embed, resolution=resolution, patch=patch, vision_width=vision_width,
                      vision_layers=vision_layers, text_length=context, vocabulary=vocabulary, text_width=text_width,
                      text_layers=text_layers).state_dict()
    rng = torch.Generator().manual_seed(seed)
    state = {}
    for name, meta in shapes.items():
        noise = torch.randn(meta.shape, generator=rng, dtype=torch.float64)
        if name == "logit_scale":
            noise = torch.tensor(2.0, dtype=torch.float64)
        elif noise.dim() >= 2 and "embedding" not in name:
            noise /= noise[0].numel() ** 0.5
        elif name.endswith("weight") and noise.dim() == 1:
            noise = 1 + 0.1 * noise
        else:
            noise *= 0.2
        state[name] = noise.to(dtype)
    return load_clip(state, head_width=64)


def save_clip(path, **sizes):
    """Writes a tiny CLIP to a file that tells its activation, as this project's own files do."""
    clip = tiny_clip(**sizes)
    torch.save({"model": clip.state_dict(), "clip": clip_facts(clip)}, path)
