import pytest
import torch
from helpers import save_clip

import data

torch.set_num_threads(1)  # most tensors here are tiny: more threads gain little, and lose much where other programs run


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true",
                     help="only the slow tests: kills, several processes, full disks, the compiler, whole models, protocols, the README's rows")


def pytest_collection_modifyitems(config, items):
    """Slow tests run with --slow, and the others without it: both commands together run each test once."""
    wanted = config.getoption("--slow")
    others = [item for item in items if ("slow" in item.keywords) != wanted]
    if any("::" in word for word in config.args):
        return  # a test that is named runs
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if ("slow" in item.keywords) == wanted]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A small rendering of the miniature world, with a CLIP of random weights."""
    root = tmp_path_factory.mktemp("world") / "shapes"
    data.write_shapes(root, seed=1, shots_max=4, base_clips=1, novel_clips=1)
    save_clip(root / "clip.pt")
    return root
