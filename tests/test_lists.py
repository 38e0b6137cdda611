"""Annotations: class folders, the published lists and labels, few-shot draws, base and novel classes."""

import ast
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

import data


def test_who_may_import_whom():
    """clip_vit, token_merge and data stand alone; nothing imports what stands above it."""
    allowed = {"clip_vit": set(), "token_merge": set(), "data": set(), "temporal_context": {"clip_vit", "token_merge"},
               "video_prompt": {"clip_vit", "temporal_context"}, "ila": {"clip_vit"},
               "eval": {"data", "clip_vit", "video_prompt", "ila"}}
    allowed["train"] = allowed["eval"] | {"eval"}
    for name, others in allowed.items():
        tree = ast.parse((Path(__file__).resolve().parents[1] / f"{name}.py").read_text())
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert imported & set(allowed) <= others, name
        packages = {module.split(".")[0] for module in imported} - set(allowed) - set(sys.stdlib_module_names)
        assert packages <= {"torch", "numpy", "PIL", "av", "tqdm"}, name


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_class_folders(tmp_path):
    touch(tmp_path, "walk/b.mp4", "walk/a.avi", "run (fast)/deep/c.webm", "walk/._a.avi", "walk/notes.txt", "loose.mp4")
    videos = data.class_folders(tmp_path)
    assert videos.classes == ("run (fast)", "walk")
    assert [(p.name, label) for p, label in zip(videos.paths, videos.labels)] == [("c.webm", 0), ("a.avi", 1), ("b.mp4", 1)]
    with pytest.raises(ValueError, match="one folder per class"):
        data.class_folders(tmp_path / "walk")


def test_labels_files(tmp_path):
    (tmp_path / "a.csv").write_text("id,name\r\n1,run\r\n0,\"walk, slowly\"\r\n")
    (tmp_path / "b.json").write_text(json.dumps({"0": "Walk: a person walks", "1": "Run: a person runs"}))
    assert data.read_labels(tmp_path / "a.csv") == ("walk, slowly", "run")
    assert data.read_labels(tmp_path / "b.json") == ("Walk: a person walks", "Run: a person runs")
    for name, content in (("c.csv", "0,walk\n"), ("d.json", "[1"), ("e.csv", "id,name\n0,a\n2,b\n"), ("f.csv", "")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=name):
            data.read_labels(tmp_path / name)


def test_lists_are_split_at_the_last_space_and_videos_found_anywhere(tmp_path):
    touch(tmp_path, "videos/riding a bike/clip 1.mp4", "walk/w[1] & (2).avi")
    (tmp_path / "list.txt").write_text("videos/riding a bike/clip 1.mp4 1\r\nw[1] & (2).avi 0\r\n\r\ngone.avi 1\r\n")
    videos = data.read_list(tmp_path / "list.txt", tmp_path, ["walk", "riding a bike"])
    assert [p.is_file() for p in videos.paths] == [True, True, False] and videos.labels == (1, 0, 1)
    for line in ("clip.mp4", "clip.mp4 2", "clip.mp4 -1", "clip.mp4 one"):
        (tmp_path / "wrong.txt").write_text(line + "\n")
        with pytest.raises(ValueError, match="wrong.txt, line 1.*below 2"):
            data.read_list(tmp_path / "wrong.txt", tmp_path, ["a", "b"])
    touch(tmp_path, "run/001.mp4")  # another class's video of the same name is not the one that is listed
    (tmp_path / "same.txt").write_text("jump/001.mp4 0\nrun/001.mp4 1\n")
    assert [p.is_file() for p in data.read_list(tmp_path / "same.txt", tmp_path, ["jump", "run"]).paths] == [False, True]
    (tmp_path / "none.txt").write_text("gone.avi 0\n")
    with pytest.raises(ValueError, match="none of its 1 videos"):
        data.read_list(tmp_path / "none.txt", tmp_path, ["a"])


@given(st.lists(st.integers(1, 6), min_size=2, max_size=7), st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=50)
def test_few_shot_draws_and_halves(sizes, shots, seed):
    labels = tuple(label for label, size in enumerate(sizes) for _ in range(size))
    videos = data.VideoList(tuple(map(str, range(len(sizes)))), tuple(range(len(labels))), labels)
    if min(sizes) < shots:
        with pytest.raises(ValueError, match=f"fewer than shots={shots}"):
            data.draw_shots(videos, shots, seed)
    else:
        drawn = data.draw_shots(videos, shots, seed)
        assert np.bincount(drawn.labels).tolist() == [shots] * len(sizes) and len(set(drawn.paths)) == len(drawn.paths)
        assert drawn == data.draw_shots(videos, shots, seed)
    base, novel = data.base_and_novel(videos)
    assert sorted(base + novel) == list(range(len(sizes))) and 0 <= len(base) - len(novel) <= 1
    assert min(sizes[c] for c in base) >= max(sizes[c] for c in novel)
    half = videos.only(novel)
    assert all(half.classes[new] == str(labels[path]) for path, new in zip(half.paths, half.labels))


def published(root, dataset):
    """A folder of the published lists of a dataset with a video file for every line, as flat as the lists are."""
    if not (SHARED / "lists").is_dir():
        pytest.skip("the published lists (../shared/lists) are not here")
    lists = SHARED / "lists" / "published"
    (root / "lists").mkdir(parents=True)
    for path in [*(lists / dataset).iterdir(), *(lists / "labels").iterdir()]:
        shutil.copy(path, root / "lists" / path.name)
    (root / "videos").mkdir()
    for path in (lists / dataset).iterdir():
        for line in path.read_text().splitlines():
            (root / "videos" / line.rpartition(" ")[0].rpartition("/")[2]).touch()
    return root


@pytest.mark.parametrize("dataset, classes, tests", [("hmdb51", 51, (1530, 1530, 1530)), ("ucf101", 101, (3783, 3734, 3696))])
def test_the_published_lists(tmp_path, dataset, classes, tests):
    root = published(tmp_path, dataset)
    found = data.load_tests(dataset, root)
    assert [len(videos.paths) for videos in found.values()] == list(tests) and list(found) == ["val1", "val2", "val3"]
    for shots in (2, 4, 8, 16):
        train, few = data.load_protocol("fewshot", dataset, root, shots, 0)
        assert np.bincount(train.labels).tolist() == [shots] * classes and list(few) == ["val1"]
    assert all(path.is_file() for path in train.paths)
    half, halves = data.load_protocol("base2novel", dataset, root, 16, 0)
    published_names = data.read_labels(root / "lists" / f"{dataset[:-2] if classes == 51 else 'ucf'}_{classes}_base_labels.csv")
    assert half.classes == halves["base"].classes == published_names and not {*half.classes} & {*halves["novel"].classes}
    assert len(halves["base"].paths) + len(halves["novel"].paths) == tests[0]
    if dataset == "hmdb51":  # the labels file is wrong there: a clip's class is a part of its name
        for videos in (train, *found.values()):
            names = [videos.classes[label].replace(" ", "_") for label in videos.labels]
            assert np.mean([f"_{name}_" in path.name for name, path in zip(names, videos.paths)]) > 0.999
            assert {name for name in names} >= {"kick", "kick_ball", "sword", "sword_exercise"}


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(ValueError, match="no data there.*serre-lab"):
        data.load_tests("hmdb51", tmp_path / "hmdb51")
    touch(tmp_path, "hmdb51/some.avi")
    with pytest.raises(ValueError, match="val1.txt is missing"):
        data.load_tests("hmdb51", tmp_path / "hmdb51")
    with pytest.raises(ValueError, match="known are shapes, hmdb51"):
        data.load_tests("hmdb", tmp_path)


def test_empty_and_missing_test_folders(tmp_path):
    touch(tmp_path, "train/a/1.mp4", "train/b/1.mp4")
    with pytest.raises(ValueError, match="neither|no test/"):
        data.load_tests("folder", tmp_path)
    touch(tmp_path, "test/b/2.mp4")
    (tmp_path / "test" / "a").mkdir()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "all").symlink_to(tmp_path / "train" / "a")
    assert data.load_tests("folder", tmp_path)["test"].classes == ("a", "b")  # an empty class is still a class
    assert [p.name for p in data.videos_below(tmp_path / "linked")] == ["1.mp4"]


def test_ones_own_class_folders(tmp_path):
    touch(tmp_path, *(f"{name}/{i}.mp4" for name in ("walk", "run") for i in range(5)))
    train, tests = data.load_protocol("fewshot", "folder", tmp_path, 3, 0)
    assert len(train.paths) == 6 and len(tests["test"].paths) == 4 and not {*train.paths} & {*tests["test"].paths}
    with pytest.raises(ValueError, match="leaves none to test on"):
        data.load_protocol("fewshot", "folder", tmp_path, 5, 0)
