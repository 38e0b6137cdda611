"""The miniature world: what its files and captions promise."""
import hashlib
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

import data
import train

ROOT = Path(__file__).resolve().parents[1]


def decode(path):
    """All frames of a video, one after the other: uint8 (T,R,R,3)."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    data.write_shapes(folder, seed=3, shots_max=2, base_clips=2, novel_clips=3)
    return folder


def test_classes_are_all_transitions_and_every_colour_is_in_base():
    base, novel = data.shapes_classes()
    assert (len(base), len(novel), len({*base, *novel})) == (20, 10, 30)
    assert all(data.opposite(name) in names for names in (base, novel) for name in names)
    assert {word for name in base for word in name.split(" to ")} == set(data.COLOURS)


def test_counts(folder):
    base, novel = data.shapes_classes()
    for split, names, files in (("train", base, ["000.mp4", "001.mp4"]), ("base", base, ["000.mp4", "000r.mp4", "001.mp4", "001r.mp4"]),
                                ("novel", novel, [f"00{i}{r}.mp4" for i in range(3) for r in ("", "r")])):
        assert sorted(path.name for path in (folder / split).iterdir()) == sorted(names)
        for name in names:
            assert sorted(path.name for path in (folder / split / name).iterdir()) == sorted(files)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["shapes"]  # nothing is left beside it


def test_a_reversed_clip_is_the_other_backwards_to_the_bit(folder):
    for split in ("base", "novel"):
        for path in (folder / split).glob("*/???.mp4"):
            frames = decode(path)
            backwards = decode(folder / split / data.opposite(path.parent.name) / f"{path.stem}r.mp4")
            assert frames.shape == (8, 32, 32, 3) and (frames == backwards[::-1]).all()
            assert (frames != backwards).any()


def test_a_clip_depends_on_the_seed_and_its_name_alone(folder, tmp_path):
    data.write_shapes(tmp_path / "again", seed=3, shots_max=1, base_clips=1, novel_clips=1)
    data.write_shapes(tmp_path / "other", seed=4, shots_max=1, base_clips=0, novel_clips=0)

    def digest(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    for path in (tmp_path / "again").glob("*/*/*.mp4"):
        assert digest(path) == digest(folder / path.relative_to(tmp_path / "again"))
    for path in (tmp_path / "other").glob("*/*/*.mp4"):
        assert digest(path) != digest(folder / path.relative_to(tmp_path / "other"))
    digests = [digest(path) for path in folder.glob("*/*/*.mp4")]
    assert len(set(digests)) == len(digests)


def test_first_and_last_frame_show_the_two_colours(folder):
    """In the frame's most saturated pixels the named colour is the nearest one."""
    right = []
    for path in folder.glob("*/*/*.mp4"):
        frames = decode(path)
        for frame, name in zip((frames[0], frames[-1]), path.parent.name.split(" to ")):
            pixels = frame.reshape(-1, 3).astype(float)
            vivid = np.median(pixels[np.ptp(pixels, axis=1).argsort()[-20:]], axis=0)
            right.append(name == min(data.COLOURS, key=lambda colour: abs(vivid - data.COLOURS[colour]).sum()))
    assert np.mean(right) > 0.98, np.mean(right)


def test_an_interrupted_rendering_leaves_nothing(tmp_path, monkeypatch):
    calls = itertools.count()
    write = data.write_clip

    def stop(path, frames):
        if next(calls) == 5:
            raise KeyboardInterrupt
        write(path, frames)
    monkeypatch.setattr(data, "write_clip", stop)
    with pytest.raises(KeyboardInterrupt):
        data.write_shapes(tmp_path / "shapes", seed=0)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no whole miniature world"):
        data.write_shapes(tmp_path, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_first_of_two_that_render_at_once_wins(tmp_path, monkeypatch):
    write = data.write_clip

    def other_first(path, frames):
        monkeypatch.setattr(data, "write_clip", write)
        data.write_shapes(tmp_path / "shapes", seed=1, shots_max=1, base_clips=1, novel_clips=1)
        write(path, frames)
    monkeypatch.setattr(data, "write_clip", other_first)
    data.write_shapes(tmp_path / "shapes", seed=2, shots_max=2, base_clips=1, novel_clips=1)
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]
    assert len(list((tmp_path / "shapes").glob("train/*/*"))) == 20  # one of each class: the other's


PREPARE = """
import functools, os, pathlib, signal, sys, train
train.data.write_shapes = functools.partial(
    train.data.write_shapes, shots_max=1, base_clips=1, novel_clips=1)
def pretrain(path, device):
    print("pretrained")
    path.write_text("a CLIP")
train.pretrain_tiny_clip = pretrain
if "killed" in sys.argv:
    train.data.write_clip = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
train.prepare_miniature(pathlib.Path("shapes"), "cpu")
"""


@pytest.mark.slow
def test_two_first_commands_prepare_once_and_tidy_up_after_a_killed_one(tmp_path):
    def start(*words):
        return subprocess.Popen([sys.executable, "-c", PREPARE, *words], cwd=tmp_path, text=True,
                                env=os.environ | {"PYTHONPATH": str(ROOT)},
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert start("killed").wait(60) == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2  # a lock that nobody holds, a folder without clips
    both = [start(), start()]
    said = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted(out for out, _ in said) == ["", "pretrained\n"]
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]


def test_a_still_shows_what_is_said_of_it():
    """Colour and place are found again in the pixels that stand out from a ground of the same picture without the shape."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        picture, (size, colour, shape, place) = data.render_still(rng)
        pixels = picture.astype(float)
        near = abs(pixels - data.COLOURS[colour]).max(-1) < 60  # tint 15, noise 8
        y, x = (axis[near].mean() for axis in np.mgrid[:32, :32])
        nearest = min(data.PLACES, key=lambda word: np.hypot(*np.subtract(data.PLACES[word], (y, x))))
        assert near.sum() > 10 and nearest == place, (size, colour, shape, place)


def test_captions_are_true_of_their_pictures(monkeypatch):
    """The table of truth, against every caption's words looked up in the picture's facts."""
    seen, still = [], data.render_still

    def remember(rng):
        seen.append(still(rng))
        return seen[-1]
    monkeypatch.setattr(data, "render_still", remember)
    pictures, texts, true = train.captioned_stills(np.random.default_rng(0), 40)
    assert pictures.shape == (40, 3, 32, 32) and true.shape == (40, len(texts)) and len(set(texts)) == len(texts)
    assert true.any(0).all() and true.any(1).all()
    for (_, truth), row in zip(seen, true):
        for text, is_true in zip(texts, row):
            words = text.removeprefix(train.PREFIX).removesuffix(".").split()
            assert words and bool(is_true) == set(words).issubset(truth)
