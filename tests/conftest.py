import pytest
import torch
from helpers import save_clip

import data

torch.set_num_threads(1)  # most tensors here are tiny: more threads gain little, and lose much where other programs run


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A small rendering of the miniature world, with a CLIP of random weights."""
    root = tmp_path_factory.mktemp("world") / "shapes"
    data.write_shapes(root, seed=1, shots_max=4, base_clips=1, novel_clips=1)
    save_clip(root / "clip.pt")
    return root
