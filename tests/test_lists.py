"""Annotations: class folders, the published lists and labels, few-shot draws, base and novel classes."""

import ast
import csv
import json
import os
import re
import shutil
import sys
from pathlib import Path

import archives
import numpy as np
import pytest
from helpers import SHARED, tiny_clip
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from clip_vit import split_capitals


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
    assert [Path(path).name for path in videos.paths] == ["c.webm", "a.avi", "b.mp4"] and videos.labels == (0, 1, 1)
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
    videos = data.read_list(tmp_path / "list.txt", data.Files(tmp_path), data.Listing(["walk", "riding a bike"], {}), "")
    assert [Path(p).is_file() for p in videos.paths] == [True, True, False] and videos.labels == (1, 0, 1)
    for line in ("clip.mp4", "clip.mp4 2", "clip.mp4 -1", "clip.mp4 one"):
        (tmp_path / "wrong.txt").write_text(line + "\n")
        with pytest.raises(ValueError, match="wrong.txt, line 1.*below 2"):
            data.read_list(tmp_path / "wrong.txt", data.Files(tmp_path), data.Listing(["a", "b"], {}), "")
    touch(tmp_path, "run/001.mp4", "jump/002.mp4")  # another class's video of the same name is not the one that is listed
    (tmp_path / "same.txt").write_text("jump/001.mp4 0\nrun/001.mp4 1\njump/002.mp4 0\n")
    videos = data.read_list(tmp_path / "same.txt", data.Files(tmp_path), data.Listing(["jump", "run"], {}), "")
    assert [Path(p).is_file() for p in videos.paths] == [False, True, True]
    (tmp_path / "none.txt").write_text("gone.avi 0\n")
    with pytest.raises(ValueError, match="none of its 1 videos"):
        data.read_list(tmp_path / "none.txt", data.Files(tmp_path), data.Listing(["a"], {}), "")


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
    base, novel = data.base_and_novel(data.Files(Path(__file__).parent / "figures"), None, videos.classes, train=videos)
    assert sorted(base + novel) == list(range(len(sizes))) and 0 <= len(base) - len(novel) <= 1
    assert min(sizes[c] for c in base) >= max(sizes[c] for c in novel)
    half = videos.only(novel)
    assert all(half.classes[new] == str(labels[path]) for path, new in zip(half.paths, half.labels))


LISTS = SHARED / "lists"
LABELS = {"hmdb51": "hmdb_51", "ucf101": "ucf_101"}


def published(root, dataset):
    """A folder of the published lists of a dataset with a video file for every line, as flat as the lists are."""
    if not (SHARED / "lists").is_dir():
        pytest.skip("the published lists (../shared/lists) are not here")
    lists = SHARED / "lists" / "published"
    (root / "lists").mkdir(parents=True)
    for path in [*(lists / dataset).iterdir(), *(lists / "labels").glob("*.*")]:
        shutil.copy(path, root / "lists" / path.name)
    (root / "videos").mkdir()
    for path in (lists / dataset).iterdir():
        for line in path.read_text().splitlines():
            (root / "videos" / line.rpartition(" ")[0].rpartition("/")[2]).touch()
    return root


@pytest.mark.slow
@pytest.mark.parametrize("dataset, classes, tests", [("hmdb51", 51, (1530,) * 3), ("ucf101", 101, (3783, 3734, 3696))])
def test_the_published_lists(tmp_path, dataset, classes, tests):
    root = published(tmp_path, dataset)
    found = data.load_tests(dataset, root)
    assert {name: len(videos.paths) for name, videos in found.items()} == dict(zip(archives.SPLITS, tests))
    for shots in (2, 4, 8, 16):
        train, few = data.load_protocol("fewshot", dataset, root, shots, 0)
        assert np.bincount(train.labels).tolist() == [shots] * classes and list(few) == ["split1"]
    assert all(Path(path).is_file() for path in train.paths)
    half, halves = data.load_protocol("base2novel", dataset, root, 16, 0)
    names = data.read_labels(root / "lists" / f"{LABELS[dataset]}_base_labels.csv")
    published_names = data.put_right(names, data.KNOWN[dataset])
    assert half.classes == halves["base"].classes == published_names
    assert not {*half.classes} & {*halves["novel"].classes}
    assert len(halves["base"].paths) + len(halves["novel"].paths) == tests[0]
    if dataset == "hmdb51":  # the labels file is wrong there: a clip's class is a part of its name
        for videos in (train, *found.values()):
            names = [videos.classes[label].replace(" ", "_") for label in videos.labels]
            assert np.mean([f"_{name}_" in Path(path).name for name, path in zip(names, videos.paths)]) > 0.999
            assert {name for name in names} >= {"kick", "kick_ball", "sword", "sword_exercise"}


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(ValueError, match="no data there.*serre-lab"):
        data.load_tests("hmdb51", tmp_path / "hmdb51")
    touch(tmp_path, "hmdb51/some.avi")
    with pytest.raises(ValueError, match=r"hmdb51/testTrain.*/\*_test_split1.txt is missing.*serre-lab.*val1.txt"):
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
    assert [Path(p).name for p in data.videos_below(tmp_path / "linked")] == ["1.mp4"]


def test_ones_own_class_folders(tmp_path):
    touch(tmp_path, *(f"{name}/{i}.mp4" for name in ("walk", "run") for i in range(5)))
    train, tests = data.load_protocol("fewshot", "folder", tmp_path, 3, 0)
    assert len(train.paths) == 6 and len(tests["test"].paths) == 4 and not {*train.paths} & {*tests["test"].paths}
    touch(tmp_path, "run/5.mp4")
    with pytest.raises(ValueError, match="every video of walk .* leaves none to test on"):
        data.load_protocol("fewshot", "folder", tmp_path, 5, 0)


def as_named(videos):
    """{name of each video without suffix: its class name}."""
    named = {Path(path).stem: videos.classes[label] for path, label in zip(videos.paths, videos.labels)}
    assert len(named) == len(videos.paths) == len(videos.labels)
    return named


@pytest.fixture(scope="module")
def owners(tmp_path_factory):
    """The real annotation files of HMDB-51 and UCF-101 with an empty file for every video in its class folder."""
    if not (LISTS / "owners").is_dir():
        pytest.skip("the owners' lists (../shared/lists) are not here")
    root = tmp_path_factory.mktemp("owners")
    shutil.copytree(LISTS / "owners", root, dirs_exist_ok=True)
    for path in root.glob("hmdb51/*/*_test_split1.txt"):
        names = [line.split()[0] for line in path.read_text().splitlines()]
        touch(root / "hmdb51" / "videos", *(f"{path.name.removesuffix('_test_split1.txt')}/{name}" for name in names))
    for path in root.glob("ucf101/*/t*list01.txt"):
        touch(root / "ucf101" / "UCF-101", *(line.split()[0] for line in path.read_text().splitlines()))
    return root


def published_list(dataset, name):
    """{video: class name} of a published list, as published."""
    names = data.read_labels(LISTS / "published" / "labels" / f"{LABELS[dataset]}_labels.csv")
    lines = (LISTS / "published" / dataset / name).read_text().splitlines()
    return {Path(line.rpartition(" ")[0]).stem: names[int(line.rpartition(" ")[2])] for line in lines}


@pytest.mark.slow
@pytest.mark.parametrize("dataset, trained, sizes", [("hmdb51", 3570, (1530,) * 3),
                                                     ("ucf101", 9537, (3783, 3734, 3696))])
def test_the_owners_lists_agree_with_the_published(owners, dataset, trained, sizes):
    tests = data.load_tests(dataset, owners / dataset)
    assert {name: len(videos.paths) for name, videos in tests.items()} == dict(zip(archives.SPLITS, sizes))
    right = {"kick": "kick ball", "kick ball": "kick", "sword": "sword exercise", "sword exercise": "sword"}
    wrong = [0]
    for i, videos in enumerate(tests.values(), 1):
        assert all(Path(path).is_file() for path in videos.paths)
        assert all(Path(path).parent.name.replace("_", " ") == videos.classes[label]
                   for path, label in zip(videos.paths, videos.labels))
        mine, theirs = as_named(videos), published_list(dataset, f"val{i}.txt")
        wrong.append(sum(mine[name] != theirs[name] for name in theirs))
        assert mine.keys() == theirs.keys() and mine == {
            name: right.get(label, label) if dataset == "hmdb51" else label for name, label in theirs.items()}
    assert wrong == ([0, 120, 120, 120] if dataset == "hmdb51" else [0] * 4)
    train, few = data.load_protocol("supervised", dataset, owners / dataset, 16, 0)
    assert len(train.paths) == trained and list(few) == ["split1"] and not {*train.paths} & {*few["split1"].paths}
    for shots in (2, 4, 8, 16):
        theirs = published_list(dataset, f"train1_few_shot_{shots}.txt")
        assert theirs.keys() <= as_named(train).keys()
    drawn = [data.load_protocol("fewshot", dataset, owners / dataset, 16, seed)[0] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and {*drawn[0].paths} < {*train.paths}
    train, halves = data.load_protocol("base2novel", dataset, owners / dataset, 16, 0)
    for half, videos in halves.items():
        names = data.read_labels(LISTS / "published" / "labels" / f"{LABELS[dataset]}_{half}_labels.csv")
        assert videos.classes == data.put_right(names, data.KNOWN[dataset]) and (half == "novel" or train.classes == videos.classes)
        assert as_named(videos) == {name: label for name, label in as_named(tests["split1"]).items() if label in names}


@pytest.mark.slow
def test_upstream_labels_are_hmdbs_as_published(owners, tmp_path):
    published_names = data.read_labels(LISTS / "published" / "labels" / "hmdb_51_labels.csv")
    for root in (owners / "hmdb51", published(tmp_path / "hmdb51", "hmdb51")):
        for i, videos in enumerate(data.load_tests("hmdb51", root, upstream_labels=True).values(), 1):
            assert videos.classes == published_names and as_named(videos) == published_list("hmdb51", f"val{i}.txt")
        train, tests = data.load_protocol("base2novel", "hmdb51", root, 16, 0, upstream_labels=True)
        ours, _ = data.load_protocol("base2novel", "hmdb51", root, 16, 0)
        assert {*train.paths} == {*ours.paths}  # the same videos, other names
        assert train.classes[-7:-5] == ("sword exercise", "sword")
        assert tests["novel"].classes[20:22] == ("kick ball", "kick")
    with pytest.raises(ValueError, match="upstream"):
        data.load_tests("ucf101", owners / "ucf101", upstream_labels=True)


def test_published_few_shot_lists_beside_the_owners_files(owners, tmp_path):
    """Tests and names are the owner's, few-shot clips the published ones, whose labels count the same classes."""
    root = published(tmp_path / "hmdb51", "hmdb51")
    shutil.copytree(owners / "hmdb51" / "testTrainMulti_7030_splits", root / "testTrainMulti_7030_splits")
    train, tests = data.load_protocol("fewshot", "hmdb51", root, 4, 0)
    assert {Path(path).stem for path in train.paths} == published_list("hmdb51", "train1_few_shot_4.txt").keys()
    owned = as_named(data.load_protocol("supervised", "hmdb51", owners / "hmdb51", 4, 0)[0])
    assert as_named(train).items() <= owned.items()
    three, _ = data.load_protocol("fewshot", "hmdb51", root, 3, 0)  # not published: drawn
    assert np.bincount(three.labels).tolist() == [3] * 51 and as_named(three).items() <= owned.items()


ARCHIVES = [("hmdb51", dict(folder=".")), ("hmdb51", dict(folder="lists/testTrainMulti_7030_splits")),
            ("ucf101", {}), ("ucf101", dict(labelled_tests=True, folder="annotations")),
            ("k400", {}), ("k400", dict(folder="labels", empty=1)), ("k600", {}),
            ("ssv2", {}), ("ssv2", dict(prefix=""))]


@pytest.mark.slow
@pytest.mark.parametrize("dataset, layout, deeper", [(*archive, False) for archive in ARCHIVES]
                         + [(name, {}, True) for name in ("hmdb51", "ucf101", "k400", "k600", "ssv2")])
def test_archives_as_their_owners_distribute_them(tmp_path, dataset, layout, deeper):
    truth = getattr(archives, dataset)(tmp_path / "inner" if deeper else tmp_path, classes=4, train=3, test=2, **layout)
    tests = data.load_tests(dataset, tmp_path)
    for name, videos in tests.items():
        empty = {Path(path).stem for path in videos.paths if not Path(path).stat().st_size}
        assert {video: label for video, label in as_named(videos).items() if video not in empty} == truth[name]
        assert empty == truth.get("empty", {}).keys() and list(videos.classes) == sorted({*truth[name].values()})
        readable = [path for path in videos.paths if Path(path).stem not in empty]
        assert data.read_clip(readable[-1], frames=2, size=32).shape == (2, 3, 32, 32)
    sets = {"hmdb51": archives.SPLITS, "ucf101": archives.SPLITS, "k600": archives.SPLITS}
    assert tuple(tests) == sets.get(dataset, ("val",))
    if dataset != "k600" or not deeper:  # class folders are looked for in the root alone
        train, validation = data.load_protocol("supervised", dataset, tmp_path, 2, 0)
        assert as_named(train) == truth["train"]
        assert list(validation) == ["val" if dataset == "k600" else next(iter(tests))]
        assert not {*train.paths} & {path for videos in validation.values() for path in videos.paths}
        for path in train.paths:
            assert data.read_clip(path, frames=2, size=32).float().std() > 1
        half, halves = data.load_protocol("base2novel", dataset, tmp_path, 2, 0)
        annotated = [*truth["train"].values(), *(truth["absent"][video] for video in train.absent)]
        counts = [annotated.count(name) for name in halves["novel"].classes + halves["base"].classes]
        assert counts == sorted(counts) and len(halves["novel"].classes) == len(counts) // 2
        assert half.classes == halves["base"].classes and not {*half.classes} & {*halves["novel"].classes}


def test_what_kinetics_holds_beside_its_videos(tmp_path):
    truth = archives.k400(tmp_path, classes=3, train=2, test=2, absent=2, empty=1)
    train, tests = data.load_protocol("supervised", "k400", tmp_path, 2, 0)
    assert {*train.absent, *tests["val"].absent} == truth["absent"].keys() and len(train.absent) == 2
    replaced = [path for path in train.paths if "replacement" in path]
    assert len(replaced) == 1 and (tmp_path / "train" / Path(replaced[0]).name).stat().st_size == 0
    assert any(Path(path).name.startswith("-") for path in train.paths)
    assert not any(Path(path).name.startswith("._") for path in train.paths)
    shutil.copy(train.paths[1], replaced[0] + ".part")  # no video's name: changes nothing
    (tmp_path / "replacement" / Path(train.paths[1]).name).touch()  # an empty replacement does not win
    assert data.load_protocol("supervised", "k400", tmp_path, 2, 0)[0].paths == train.paths
    shutil.copy(train.paths[1], tmp_path / "replacement" / Path(train.paths[1]).name)
    assert "/replacement/" in data.load_protocol("supervised", "k400", tmp_path, 2, 0)[0].paths[1]
    (name,) = truth["empty"]
    (bad,) = (path for path in tests["val"].paths if Path(path).stem == name)
    with pytest.raises(data.VideoError, match=name):
        data.read_clip(bad)
    for split, other in (("train", "kinetics400_train"), ("val", "validate")):
        (tmp_path / "annotations" / f"{split}.csv").rename(tmp_path / "annotations" / f"{other}.csv")
    assert data.load_protocol("supervised", "k400", tmp_path, 2, 0)[1] == tests
    (tmp_path / "annotations" / "kinetics400_train.csv").unlink()
    assert as_named(data.load_tests("k400", tmp_path)["val"]).items() >= truth["val"].items()
    with pytest.raises(ValueError, match=r"/train.csv is missing.*kinetics-dataset"):
        data.load_protocol("supervised", "k400", tmp_path, 2, 0)
    for content in ("path label\n", "", "label,youtube_id,time_start,time_end\nzumba,x,one,2\n"):
        (tmp_path / "annotations" / "validate.csv").write_text(content)
        with pytest.raises(ValueError, match="validate.csv"):
            data.load_tests("k400", tmp_path)
    archives.k400(tmp_path / "bare")
    for folder in ("train", "val", "replacement"):
        shutil.rmtree(tmp_path / "bare" / folder)
    with pytest.raises(ValueError, match="none of its .* videos"):
        data.load_tests("k400", tmp_path / "bare")


def test_kinetics_class_order_is_the_published(tmp_path):
    if not LISTS.is_dir():
        pytest.skip("the published lists (../shared/lists) are not here")
    names = data.read_labels(LISTS / "published" / "labels" / "kinetics_400_labels.csv")
    rows = [("label", "youtube_id", "time_start", "time_end", "split"),
            *((name, f"{i:011d}", i, i + 10, "val") for i, name in enumerate(reversed(names)))]
    with open(tmp_path / "val.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\r\n").writerows(rows)
    touch(tmp_path, *(f"val/{video}_{start:06d}_{end:06d}.mkv" for _, video, start, end, _ in rows[1:]))
    videos = data.load_tests("k400", tmp_path)["val"]
    assert videos.classes == names and videos.labels == tuple(range(399, -1, -1))


def test_k600_is_tested_on_the_published_lists(tmp_path):
    truth = archives.k600(tmp_path, classes=3, absent=1)
    tests = data.load_tests("k600", tmp_path)
    assert [len(videos.absent) for videos in tests.values()] == [1, 1, 1]
    assert not set.intersection(*({*videos.classes} for videos in tests.values()))
    parts = {Path(path).relative_to(tmp_path).parts[0] for path in tests["split1"].paths}
    assert parts == {"train", "val", "test"}
    with pytest.raises(ValueError, match="three lists"):  # one file of other names cannot fit three lists of classes
        data.load_tests("k600", tmp_path, labels=tmp_path / "lists" / "ZS_split1_K600.csv")
    (tmp_path / "lists" / "ZS_split2_K600.csv").unlink()
    with pytest.raises(ValueError, match=f"{tmp_path}/ZS_split2_K600.csv is missing"):
        data.load_tests("k600", tmp_path)
    for path in (tmp_path / "lists").glob("*eval*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"/ZS_split1_K600_eval\*.txt is missing"):  # not its class folders
        data.load_tests("k600", tmp_path)
    train, val = data.load_protocol("supervised", "k600", tmp_path, 2, 0)
    assert as_named(train) == truth["train"] and as_named(val["val"]) == truth["val"]


def test_the_published_head_of_a_k600_list(tmp_path):
    if not LISTS.is_dir():
        pytest.skip("the published lists (../shared/lists) are not here")
    names = data.read_labels(LISTS / "published" / "labels" / "ZS_split1_K600.csv")
    lines = (LISTS / "published" / "k600" / "ZS_split1_K600_eval_head200.txt").read_text().splitlines()
    for i in (1, 2, 3):
        shutil.copy(LISTS / "published" / "labels" / f"ZS_split{i}_K600.csv", tmp_path)
        (tmp_path / f"ZS_split{i}_K600_eval.txt").write_text("\n".join(lines))
    for line in lines[1:]:
        path, _, label = line.rpartition(" ")
        touch(tmp_path / "k600", f"{Path(path).parent}/{names[int(label)]}/{Path(path).name}")
    videos = data.load_tests("k600", tmp_path)["split1"]
    assert videos.classes == names and videos.absent == (lines[0].rpartition(" ")[0],) and len(videos.paths) == 199
    assert all(Path(path).parent.name == names[label] for path, label in zip(videos.paths, videos.labels))


@pytest.mark.slow
def test_something_something_classes_are_the_published(tmp_path):
    if not LISTS.is_dir():
        pytest.skip("the published lists (../shared/lists) are not here")
    names = data.read_labels(LISTS / "published" / "labels" / "ssv2_labels.csv")
    counts = np.random.default_rng(0).permutation(174) + 1
    items = [{"id": str(1000 * label + i), "template": name.replace("something", "[something]")}
             for label, name in enumerate(names) for i in range(counts[label])]
    for name, content in (("labels", {name: str(i) for i, name in sorted(enumerate(names), key=lambda pair: pair[1])}),
                          ("train", items), ("validation", items[::50]), ("test", [{"id": "1"}])):
        (tmp_path / f"something-something-v2-{name}.json").write_text(json.dumps(content))
    touch(tmp_path / "videos", *(f"{item['id']}.webm" for item in items[1:]))
    train, tests = data.load_protocol("supervised", "ssv2", tmp_path, 2, 0)
    assert train.classes == names and np.bincount(train.labels).tolist() == counts.tolist() and list(tests) == ["val"]
    assert not train.absent and train.paths[0] == str(tmp_path / items[0]["id"])  # nowhere: fails by name when read
    _, halves = data.load_protocol("base2novel", "ssv2", tmp_path, 1, 0)
    assert len(halves["novel"].classes) == len(halves["base"].classes) == 87
    ranked = halves["novel"].classes + halves["base"].classes
    assert [counts[names.index(name)] for name in ranked] == list(range(1, 175))
    (tmp_path / "something-something-v2-labels.json").unlink()
    with pytest.raises(ValueError, match=f"{tmp_path}/something-something-v2-labels.json is missing"):
        data.load_tests("ssv2", tmp_path)


def test_other_names_for_the_same_classes(tmp_path):
    archives.hmdb51(tmp_path, classes=4, train=3)
    (tmp_path / "llm.json").write_text(json.dumps({str(i): f"Name {i}: a person, {i}" for i in range(4)}))
    (tmp_path / "hmdb_51_llm_labels.json").write_text(json.dumps({str(i): f"LLM {i}" for i in range(4)}))
    plain, named = (data.load_tests("hmdb51", tmp_path, labels=labels) for labels in ("", tmp_path / "llm.json"))
    assert named["split2"].classes[2] == "Name 2: a person, 2" and named["split2"].labels == plain["split2"].labels
    assert data.load_tests("hmdb51", tmp_path, labels="llm")["split1"].classes[3] == "LLM 3"
    train, tests = data.load_protocol("base2novel", "hmdb51", tmp_path, 2, 0, labels=str(tmp_path / "llm.json"))
    assert train.classes == tests["base"].classes == ("Name 2: a person, 2", "Name 3: a person, 3")
    assert {Path(path).parent.name for path in tests["novel"].paths} == {"kick", "kick_ball"}
    (tmp_path / "llm.json").write_text(json.dumps({str(i): f"Name {i}" for i in range(5)}))
    with pytest.raises(ValueError, match="llm.json: 5 names.*4 classes"):
        data.load_tests("hmdb51", tmp_path, labels=tmp_path / "llm.json")


def test_one_of_the_owners_files_is_missing_or_wrong(tmp_path):
    archives.hmdb51(tmp_path / "hmdb51")
    (tmp_path / "hmdb51" / "testTrainMulti_7030_splits" / "sword_test_split3.txt").unlink()
    with pytest.raises(ValueError, match=f"{tmp_path}/hmdb51/sword_test_split3.txt is missing.*serre-lab"):
        data.load_tests("hmdb51", tmp_path / "hmdb51")
    (tmp_path / "hmdb51" / "testTrainMulti_7030_splits" / "sword_test_split3.txt").write_text("a b.avi 1 \na.avi 3 \n")
    with pytest.raises(ValueError, match="sword_test_split3.txt, line 2.*below 3"):
        data.load_tests("hmdb51", tmp_path / "hmdb51")
    archives.ucf101(tmp_path / "ucf101")
    lists = tmp_path / "ucf101" / "ucfTrainTestlist"
    (lists / "testlist03.txt").write_text("Handstand/v_HandStandPushups_g01_c01.avi\n")
    with pytest.raises(ValueError, match="ucf101.*'Handstand'"):
        data.load_tests("ucf101", tmp_path / "ucf101")
    (lists / "classInd.txt").unlink()
    with pytest.raises(ValueError, match="classInd.txt is missing.*crcv.ucf"):
        data.load_tests("ucf101", tmp_path / "ucf101")
    touch(tmp_path, "k400/val/zumba.mp4", "k400/train/yoga.mp4")  # flat, and not annotated
    with pytest.raises(ValueError, match="k400/val.csv is missing"):
        data.load_tests("k400", tmp_path / "k400")


def test_class_folders_lists_and_files_of_ones_own(tmp_path):
    """A known dataset in plain class folders; a test list of one's own beside the owner's files."""
    videos = [f"{name}/{i}.mp4" for name in "ab" for i in (1, 2)]
    touch(tmp_path / "ucf101", *(f"train/{video}" for video in videos), *(f"val/{video}" for video in videos))
    train, tests = data.load_protocol("supervised", "ucf101", tmp_path / "ucf101", 2, 0)
    assert (len(train.paths), list(tests), train.classes) == (4, ["val"], ("a", "b"))
    with pytest.raises(ValueError, match="ucf_101_base_labels.csv"):
        data.load_protocol("base2novel", "ucf101", tmp_path / "ucf101", 2, 0)
    lists = {"classInd": "1 a\n2 b", "trainlist01": "a/1.mp4 1\nb/1.mp4 2"}
    for name, lines in (lists | {f"testlist0{i}": "a/2.mp4\nb/2.mp4" for i in (1, 2, 3)}).items():
        (tmp_path / "ucf101" / f"{name}.txt").write_text(lines)
    _, halves = data.load_protocol("base2novel", "ucf101", tmp_path / "ucf101", 1, 0)  # the owner's counts are true
    assert (halves["novel"].classes, halves["base"].classes) == (("a",), ("b",))
    archives.hmdb51(tmp_path / "hmdb51", classes=4)
    video = next((tmp_path / "hmdb51" / "sword").iterdir())
    (tmp_path / "mine.txt").write_text(f"sword/{video.name} 2\n{video.name} 2\n{video} 2\n")
    videos = data.load_tests("hmdb51", tmp_path / "hmdb51", test_list=tmp_path / "mine.txt")["mine"]
    assert videos.paths == (str(video),) * 3 and videos.classes[2] == "sword"
    shutil.copy(tmp_path / "mine.txt", tmp_path / "train.txt")  # a name that means nothing
    train, tests = data.load_protocol("supervised", "hmdb51", tmp_path / "hmdb51", 2, 0,
                                      test_list=tmp_path / "train.txt")
    assert len(train.paths) == 8 and tests["train"] == videos
    (tmp_path / "hmdb51" / "sword" / "up").symlink_to(tmp_path / "hmdb51")  # a link that leads back
    assert data.load_tests("hmdb51", tmp_path / "hmdb51", test_list=tmp_path / "mine.txt")["mine"] == videos


# ---- what people's folders, lists and labels files are like ----

def own_folders(root, classes=("run", "walk"), sets=("train", "test"), videos=2):
    touch(root, *(f"{name}/{c}/{name}{i}.mp4" for name in sets for c in classes for i in range(videos)))
    return root


def owner_of(videos):
    """{name of each video's class folder: its class name}."""
    return {Path(path).parent.name: videos.classes[label] for path, label in zip(videos.paths, videos.labels)}


def refusal(*arguments, **settings):
    """The message with which load_protocol (or, of fewer arguments, load_tests) refuses; one short line."""
    load = data.load_protocol if len(arguments) > 2 else data.load_tests
    with pytest.raises(ValueError) as caught:
        load(*arguments, **settings)
    message = str(caught.value)
    assert len(message) < 400 and message.isprintable(), message  # the command line cuts its paths further
    return message


def labels_csv(path, names, rows=None):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("id", "name"), *(rows or enumerate(names))])
    return path


def test_labels_files_go_by_name_else_by_number(tmp_path):
    own_folders(tmp_path / "numbers", [str(i) for i in range(12)])
    by_number = labels_csv(tmp_path / "n.csv", [f"action {i}" for i in range(12)])
    train, tests = data.load_protocol("supervised", "folder", tmp_path / "numbers", 1, 0, labels=by_number)
    assert owner_of(train) == owner_of(tests["test"]) == {str(i): f"action {i}" for i in range(12)}
    assert owner_of(data.load_tests("folder", tmp_path / "numbers", labels=by_number)["test"])["10"] == "action 10"
    few = labels_csv(tmp_path / "few.csv", [f"action {i}" for i in range(11)])
    assert "11 names, but train has 12 classes" in refusal(
        "supervised", "folder", tmp_path / "numbers", 1, 0, labels=few)

    own_folders(tmp_path / "names", ("draw_sword", "run", "walk"))
    other_order = labels_csv(tmp_path / "o.csv", ["Walk", "Draw sword: a person draws a sword", "run: on a track"])
    train, _ = data.load_protocol("supervised", "folder", tmp_path / "names", 1, 0, labels=other_order)
    assert owner_of(train) == {"draw_sword": "Draw sword: a person draws a sword", "run": "run: on a track",
                               "walk": "Walk"}
    for names in (["a", "b", "c"], ["run", "walk", "jump"]):
        message = refusal("supervised", "folder", tmp_path / "names", 1, 0,
                          labels=labels_csv(tmp_path / "x.csv", names))
        assert names[0] in message and "draw_sword" in message and "x.csv" in message


def test_labels_files_that_are_wrong(tmp_path):
    path = tmp_path / "labels.csv"
    for content, words in (("id,name\n0,falling, slowly\n1,run\n", "line 2 has more cells.*quotes"),
                           ("id,name\n0,run\n1,run\n", "its name run is there twice"),
                           ("id,name\n0,run\n0,walk\n", "id 0 .* is there twice"),
                           ("id,name\n0,run\n1,\n", "id 1 has no name"), ("id,name\n0,run\n2,walk\n", "without gaps")):
        path.write_text(content)
        for read in (data.read_labels, data.read_class_names):
            with pytest.raises(ValueError, match=f"labels.csv: .*{words}"):
                read(path)
    path = tmp_path / "labels.json"
    for content in ('{"0": "a", "0": "b"}', '{"0": "a", "1": "a"}', '{"0": ["a"]}', '{"0": {"b": "c"}}', "[" * 100_000,
                    '{"0": 1}', "{}", "7"):
        path.write_text(content)
        with pytest.raises(ValueError, match="labels.json: expected"):
            data.read_labels(path)
    path.write_text('["walk", "run"]')
    assert data.read_class_names(path) == ("walk", "run")


def test_class_names_a_line_each(tmp_path):
    path = tmp_path / "classInd.txt"
    for lines, names in (("1 ApplyEyeMakeup\r\n2 Yo Yo\r\n", ("ApplyEyeMakeup", "Yo Yo")),
                         ("0 run\n1 walk\n\n", ("run", "walk")), ("2 men\n1 man\n", ("2 men", "1 man")),
                         ("1\n2\n", ("1", "2")), ("1 man\n2 men\n3\n", ("1 man", "2 men", "3")),
                         ("\ufeffrun\n  walk, slowly \n", ("run", "walk, slowly"))):
        path.write_bytes(lines.encode())
        assert data.read_class_names(path) == names
    for content in (b"", b"\n \n", b"\xff\xfe\0"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="classInd.txt: expected text"):
            data.read_class_names(path)
    with pytest.raises(ValueError, match="absent.txt: No such file"):
        data.read_class_names(tmp_path / "absent.txt")
    if LISTS.is_dir():
        names = data.read_class_names(LISTS / "owners" / "ucf101" / "ucfTrainTestlist" / "classInd.txt")
        assert len(names) == 101 and names[0] == "ApplyEyeMakeup"
        lists = LISTS / "published" / "labels" / "labels_temporal_static"
        assert len(data.read_class_names(lists / "ssv2_temporal18_labels.csv")) == 18


@pytest.mark.parametrize("pair", [("run", "Run"), ("JumpRope", "Jump Rope"), ("R&B", "R&amp;B"), ("run 12", "run 1 2"),
                                  ("run", "run"), ("cafe\u0301", "caf\u00e9"), ("a  b", "a b"), ("HandstandPushups", "handstand pushups"),
                                  ("\uff52un", "run")])
def test_classes_that_are_one_text_to_the_model(tmp_path, pair):
    with pytest.raises(ValueError, match="same text.*rename one"):
        data.check_classes(["walk", *pair], "x")
    clip = tiny_clip(context=77)
    first, second = clip.tokenize([split_capitals(name) for name in pair])
    if pair[0] != "\uff52un":
        assert (first == second).all()
    if len({*pair}) == 1:
        return  # no two folders
    for name in "ab":
        for i, own in enumerate(pair):
            touch(tmp_path, *(f"{s}/{own.replace('/', '_')}/{s}{i}{name}.mp4" for s in ("train", "test")))
    for protocol in ("supervised", "fewshot", "base2novel", "zeroshot"):
        assert "same text" in refusal(protocol, "folder", tmp_path, 1, 0)
    assert "same text" in refusal("folder", tmp_path)


@pytest.mark.parametrize("pair", [("run", "running"), ("kick", "kick ball"), ("a-b", "ab"), ("C", "C++"), ("1", "11"),
                                  ("person's", "persons"), ("跑步", "走路")])
def test_classes_that_are_not_one_text(pair):
    data.check_classes(pair, "x")
    first, second = tiny_clip(context=77).tokenize([split_capitals(name) for name in pair])
    assert not (first == second).all()


def test_published_classes_are_all_of_another_text():
    if not LISTS.is_dir():
        pytest.skip("the published lists (../shared/lists) are not here")
    paths = [*(LISTS / "published" / "labels").rglob("*.csv"), *(LISTS / "published" / "labels").rglob("*.json")]
    assert len(paths) > 15
    for path in paths:
        data.check_classes(data.read_labels(path), path)


def test_what_is_no_class(tmp_path):
    own_folders(tmp_path)
    for name in ("train", "test"):
        touch(tmp_path, f"{name}/__MACOSX/run/._train0.mp4", f"{name}/@eaDir/a.mp4/SYNOPHOTO_FILM_M.mp4",
              f"{name}/annotations/a.xml", f"{name}/run/@eaDir/train0.mp4/SYNOPHOTO_FILM_M.mp4")
        (tmp_path / name / "empty").mkdir()
    for protocol in ("supervised", "fewshot", "zeroshot"):
        train, tests = data.load_protocol(protocol, "folder", tmp_path, 2, 0)
        assert train.classes == tests["test"].classes == ("run", "walk") and len(train.paths) == 4
        (note,) = (note for note in train.notes if "no classes" in note)
        assert "4 folders" in note and "@eaDir, __MACOSX, annotations, ..." in note
    runs = tmp_path / "flat" / "runs" / "mine"
    touch(tmp_path, *(f"flat/{name}/{i}.mp4" for name in "ab" for i in range(3)), "flat/runs/mine/best.pt")
    train, tests = data.load_protocol("fewshot", "folder", tmp_path / "flat", 1, 0)  # --out inside the data
    assert runs.is_dir() and train.classes == ("a", "b") and "(runs)" in train.notes[0]
    with pytest.raises(ValueError, match="no videos; expected one folder per class"):
        data.class_folders(runs.parent)


def test_a_class_that_only_one_side_has(tmp_path):
    own_folders(tmp_path, ("a", "b", "c"), ("train",))
    own_folders(tmp_path, ("c", "b"), ("test",))
    for protocol in ("supervised", "fewshot", "zeroshot"):
        train, tests = data.load_protocol(protocol, "folder", tmp_path, 2, 0)
        assert tests["test"].classes == train.classes == ("a", "b", "c") and tests["test"].labels == (1, 1, 2, 2)
        assert tests["test"].notes == ("test/ has no videos of 1 of the 3 classes (a)",)
    test = data.load_tests("folder", tmp_path)["test"]
    assert test.classes == ("a", "b", "c") and owner_of(test) == {"b": "b", "c": "c"}
    own_folders(tmp_path, ("d",), ("test",))
    (tmp_path / "train" / "d").mkdir()  # empty there
    for protocol in ("supervised", "fewshot"):
        assert "test/ has classes that train/ has no videos of (d)" in refusal(protocol, "folder", tmp_path, 2, 0)
    _, tests = data.load_protocol("zeroshot", "folder", tmp_path, 2, 0)
    assert tests["test"].classes == ("b", "c", "d")


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    own_folders(tmp_path, ("cyan to green", "b"))
    scandir = data.os.scandir

    def refuse(path):  # as without permissions, which root always has
        if str(path).endswith("green"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)
    monkeypatch.setattr(data.os, "scandir", refuse)
    assert refusal("folder", tmp_path) == f"{tmp_path}/test/cyan to green: Permission denied"
    assert "cyan to green: Permission denied" in refusal("supervised", "folder", tmp_path, 1, 0)
    with pytest.raises(ValueError, match="Permission denied"):
        data.videos_below(tmp_path)


def test_links(tmp_path):
    own_folders(tmp_path / "d")
    (tmp_path / "d" / "train" / "run" / "up").symlink_to(tmp_path / "d")  # a loop
    (tmp_path / "d" / "train" / "run" / "more").symlink_to(tmp_path / "d" / "train" / "run")
    assert len(data.class_folders(tmp_path / "d" / "train").paths) == 4
    touch(tmp_path, "elsewhere/x.mp4")
    for name in ("one", "two"):
        (tmp_path / "d" / "train" / "run" / name).symlink_to(tmp_path / "elsewhere")
    assert len(data.class_folders(tmp_path / "d" / "train").paths) == 5  # counted once
    video = tmp_path / "d" / "train" / "run" / "train0.mp4"
    (tmp_path / "d" / "train" / "run" / "again.mp4").symlink_to(video)
    assert len(data.class_folders(tmp_path / "d" / "train").paths) == 5
    (tmp_path / "d" / "train" / "walk" / "again.mp4").symlink_to(video)
    assert "again.mp4 are one video" in refusal("supervised", "folder", tmp_path / "d", 1, 0)
    (tmp_path / "d" / "train" / "walk" / "again.mp4").unlink()
    (tmp_path / "d" / "train" / "jog").symlink_to(tmp_path / "d" / "train" / "run")
    assert "train/run and " in refusal("supervised", "folder", tmp_path / "d", 1, 0)
    (tmp_path / "e").mkdir()
    for name in ("train", "test"):  # the test is the training set
        (tmp_path / "e" / name).symlink_to(tmp_path / "d" / "test")
    _, tests = data.load_protocol("supervised", "folder", tmp_path / "e", 1, 0)
    assert tests["test"].notes == ("test/: 4 of 4 test videos are training videos as well",)


def test_a_video_with_two_labels(tmp_path):
    own_folders(tmp_path / "d")
    labels_csv(tmp_path / "d" / "labels.csv", ["a", "b"])
    (tmp_path / "list.txt").write_text("train/run/train0.mp4 0\ntrain/run/train0.mp4 1\ntrain/run/train1.mp4 0\n")
    message = refusal("folder", tmp_path / "d", test_list=tmp_path / "list.txt")
    assert "list.txt: 1 videos are listed with two labels, such as" in message and "train0.mp4" in message
    archives.hmdb51(tmp_path / "hmdb51", classes=4)  # there only told: nobody can mend an owner's lists
    video = next((tmp_path / "hmdb51" / "sword").iterdir()).name
    (tmp_path / "mine.txt").write_text(f"sword/{video} 2\nsword/{video} 3\n")
    (note,) = data.load_tests("hmdb51", tmp_path / "hmdb51", test_list=tmp_path / "mine.txt")["mine"].notes
    assert "two labels" in note


@pytest.mark.parametrize("suffix", "MTS m2ts VOB ogv mxf asf f4v QT divx rmvb dav h264 Mp4 AVI".split())
def test_suffixes_of_cameras(tmp_path, suffix):
    touch(tmp_path, f"a/b.{suffix}", "a/c.xyz", "a/notes.txt", "loose.mp4")
    videos = data.class_folders(tmp_path)
    assert [Path(path).name for path in videos.paths] == [f"b.{suffix}"]
    assert [note.partition(": ")[2] for note in videos.notes] == [
        "1 video lies in no class folder (loose.mp4)", "1 file is no known video (a/c.xyz)"]
    assert len(data.videos_below(tmp_path)) == 2
    assert data.passed_over(tmp_path) == f"{tmp_path}: 1 file is no known video: a/c.xyz"


def test_unicode_forms(tmp_path):
    nfd, nfc = "u\u0308bung", "\u00fcbung"
    touch(tmp_path, *(f"d/v/{nfd} {i}.mp4" for i in range(2)), f"e/train/{nfd}/1.mp4", f"e/test/{nfc}/2.mp4",
          "e/train/a/3.mp4", "e/test/a/4.mp4")
    labels_csv(tmp_path / "d" / "labels.csv", ["a", "b"])
    for form in (nfc, nfd):
        (tmp_path / "test.txt").write_text(f"v/{form} 0.mp4 0\n{form} 1.mp4 1\n")
        (videos,) = data.load_tests("folder", tmp_path / "d", test_list=tmp_path / "test.txt").values()
        assert [Path(path).is_file() for path in videos.paths] == [True, True]
    train, tests = data.load_protocol("supervised", "folder", tmp_path / "e", 1, 0,
                                      labels=labels_csv(tmp_path / "l.csv", [f"{nfc}: uebung", "a: b"]))
    assert train.classes == tests["test"].classes == ("a: b", f"{nfc}: uebung")


def test_lists_of_other_programs(tmp_path):
    own_folders(tmp_path / "d", sets=("v",))
    labels_csv(tmp_path / "d" / "labels.csv", ["a", "b"])

    def refused(*lines):
        (tmp_path / "list.txt").write_text("".join(line + "\n" for line in lines))
        return refusal("folder", tmp_path / "d", test_list=tmp_path / "list.txt")
    frames = refused("v/run/v0.mp4 120 0", "v/walk/v0.mp4 80 1")
    assert "none of its 2 videos" in frames and "v/run/v0.mp4 120: " in frames and "number of frames" in frames
    assert "1 of 2 classes have no videos (b), such as v/walk/v0.mp4 80" in refused(
        "v/run/v0.mp4 0", "v/walk/v0.mp4 80 1")
    assert "such as /other/v/run/v0.mp4: " in refused("/other/v/run/v0.mp4 0", "/other/v/walk/v0.mp4 1")
    assert "such as v/run/v0.avi: " in refused("v/run/v0.avi 0", "v/walk/v0.avi 1")
    (tmp_path / "list.txt").write_text(f"v\\run\\v0.mp4 0\n{tmp_path}/d/v/walk/v1.mp4 1\nv/walk/gone.mp4 1\n")
    (videos,) = data.load_tests("folder", tmp_path / "d", test_list=tmp_path / "list.txt").values()
    assert [Path(path).is_file() for path in videos.paths] == [True, True, False]
    assert videos.notes == ("list.txt: 1 of 3 videos are missing, such as v/walk/gone.mp4; they count as unreadable",)


def test_names_are_printed_safely(tmp_path):
    assert data.quoted("a\x1b[31m\nb\u202e\udcff") == "a\\x1b[31m\\nb\\u202e\\udcff"
    assert data.quoted("x" * 10 ** 6 + "end", 20) == "xxxxxxxx...xxxxxend"
    assert data.some(["a", "b", "c"]) == "a, b, c" and data.some("abcd", 2) == "a, b, ..."
    (tmp_path / "list.txt").write_text("\x1b[31m" + "y" * 10 ** 6 + "\n")
    own_folders(tmp_path / "d")
    labels_csv(tmp_path / "d" / "labels.csv", ["a", "b"])
    assert "\\x1b[31m" in refusal("folder", tmp_path / "d", test_list=tmp_path / "list.txt")
    touch(tmp_path, "e/train/a\x1b[31m/1.mp4", "e/test/b/1.mp4")
    assert "(b)" in refusal("supervised", "folder", tmp_path / "e", 1, 0)
    name = os.fsdecode(b"caf\xe9")
    touch(tmp_path, f"f/train/{name}/1.mp4", f"f/test/{name}/1.mp4")
    assert "caf\\udce9 is not named in UTF-8: rename it" in refusal("supervised", "folder", tmp_path / "f", 1, 0)


# ---- half unpacked archives ----

def test_archives_that_are_half_unpacked(tmp_path):
    archives.hmdb51(tmp_path, classes=10)
    for action in archives.ACTIONS[3:]:
        shutil.rmtree(tmp_path / action)
    left = "7 of 10 classes have no videos (brush hair, climb, climb stairs, ...)"
    for arguments in (("hmdb51", tmp_path), ("fewshot", "hmdb51", tmp_path, 1, 0)):
        assert left in refusal(*arguments) and "unpack them there" in refusal(*arguments)
    touch(tmp_path, "rars/climb.rar", "rars/flic_flac.rar")
    assert "unpack rars/climb.rar, rars/flic_flac.rar with `unrar x`" in refusal("hmdb51", tmp_path)
    for action in archives.ACTIONS[:3]:
        shutil.rmtree(tmp_path / action)
    assert "none of its 10 videos" in refusal("hmdb51", tmp_path) and "unrar x" in refusal("hmdb51", tmp_path)
    touch(tmp_path, "k400/a.tar.gz")
    assert "k400/val.csv is missing: unpack a.tar.gz" in refusal("k400", tmp_path / "k400")
    touch(tmp_path, "packed/test_train_splits.rar", "packed/hmdb51_org.rar")
    assert "is missing: unpack hmdb51_org.rar, test_train_splits.rar with `unrar x`" in refusal("hmdb51", tmp_path / "packed")


def test_missing_kinetics_videos_are_counted(tmp_path):
    archives.k400(tmp_path, classes=3, train=20, test=2, absent=2)
    train, tests = data.load_protocol("supervised", "k400", tmp_path, 2, 0)
    assert len(train.absent) == 2 and train.notes == ()  # 2 of 65
    (note,) = tests["val"].notes  # 2 of 8
    assert note.startswith("val.csv: 2 of 8 videos are missing, such as ") and "do not compare" in note
    assert (train.source, tests["val"].source) == ("train.csv", "val.csv")


# ---- the lists as they are published ----

def official(root):
    """The folders datasets_splits and labels of the official repository, as far as they are here."""
    if not (LISTS / "published" / "base2novel_splits").is_dir():
        pytest.skip("the published lists (../shared/lists) are not here")
    lists = LISTS / "published"
    for mine, theirs in (("hmdb51", "hmdb_splits"), ("ucf101", "ucf_splits"), ("ssv2", "ssv2_splits")):
        shutil.copytree(lists / mine, root / "datasets_splits" / theirs)
    (root / "datasets_splits" / "ssv2_splits" / "validation_head3000.txt").chmod(0o644)
    os.rename(root / "datasets_splits" / "ssv2_splits" / "validation_head3000.txt",
              root / "datasets_splits" / "ssv2_splits" / "validation.txt")
    shutil.copytree(lists / "base2novel_splits", root / "datasets_splits" / "base2novel_splits")
    shutil.copytree(lists / "labels", root / "labels")
    return root


def empty_videos(root, folder):
    """An empty file for every video in the lists of a folder."""
    (root / "videos").mkdir()
    for path in folder.glob("**/*.txt"):
        for line in path.read_text().splitlines():
            (root / "videos" / Path(line.rpartition(" ")[0]).name).touch()


@pytest.mark.slow
@pytest.mark.parametrize("dataset, short", [("hmdb51", "hmdb"), ("ucf101", "ucf")])
def test_the_official_folders_laid_into_a_data_folder(tmp_path, dataset, short):
    root = official(tmp_path)
    for splits in ("datasets_splits", "datasets_splits/base2novel_splits"):
        (root / "v").mkdir(exist_ok=True)
        for path in (root / splits / f"{short}_splits").glob("*.txt"):
            for line in path.read_text().splitlines():
                (root / "v" / Path(line.rpartition(" ")[0]).name).touch()
    tests = data.load_tests(dataset, root)
    for i, videos in enumerate(tests.values(), 1):
        right = {"kick": "kick ball", "kick ball": "kick", "sword": "sword exercise", "sword exercise": "sword"}
        assert videos.source == f"val{i}.txt" and as_named(videos) == {
            name: right.get(label, label) for name, label in published_list(dataset, f"val{i}.txt").items()}
    train, _ = data.load_protocol("fewshot", dataset, root, 2, 1024)
    assert train.source == "train1_few_shot_2.txt"
    truth = as_named(tests["split1"])
    drawn = []
    for seed in (1, 2, 3, 1024):
        train, halves = data.load_protocol("base2novel", dataset, root, 16, seed)
        assert train.source == (f"fs_base_s{seed}_train.txt" if seed < 4 else "drawn with seed 1024 from base_train.txt")
        assert np.bincount(train.labels).tolist() == [16] * len(train.classes) and train.classes == halves["base"].classes
        for half, videos in halves.items():
            assert videos.source == f"{half}_val.txt"
            assert as_named(videos) == {name: label for name, label in truth.items() if label in videos.classes}
            assert data.load_tests(dataset, root, half=half) == {half: videos}
        drawn.append({*train.paths})
        for path, label in zip(train.paths, train.labels):
            name = train.classes[label].replace(" ", "_")
            assert dataset != "hmdb51" or f"_{name}_" in Path(path).name  # sword and sword exercise are put right
    assert len({frozenset(paths) for paths in drawn}) == 4
    few, _ = data.load_protocol("base2novel", dataset, root, 4, 1)  # no list of 4
    assert few.source == "drawn with seed 1 from base_train.txt" and len(few.paths) == 4 * len(few.classes)
    (alone,) = root.rglob(f"{short}_*_novel_labels.csv")
    names = alone.read_bytes()
    alone.unlink()  # the base classes' numbers would be another order's
    assert f"{alone.name} is missing" in refusal("base2novel", dataset, root, 16, 1)
    alone.write_bytes(names)
    if dataset == "hmdb51":
        train, halves = data.load_protocol("base2novel", dataset, root, 16, 1, labels="llm")
        assert owner_by_name(train)["sword_exercise"].startswith("Sword exercise: ")
        assert owner_by_name(halves["novel"])["kick_ball"].startswith("Kick ball: ")
        whole = data.load_tests(dataset, root, labels="llm")["split1"]
        assert owner_by_name(whole)["kick"].startswith("Kick: ") and len(whole.classes) == 51
        (root / "labels" / "labels_froster" / "hmdb_51_novel_llm_labels.json").unlink()  # then the whole set's
        assert data.load_tests(dataset, root, labels="llm", half="novel")["novel"].classes == halves["novel"].classes


def owner_by_name(videos):
    """{action in a HMDB-51 file's name: class name}."""
    actions = [re.search(r"_([a-z_]+)_[fhlu]_[a-z]+_np\d", Path(path).name) for path in videos.paths]
    found = {}
    for action, label in zip(actions, videos.labels):
        name = action[1]
        for known in ("kick_ball", "sword_exercise", "kick", "sword"):
            if name.endswith(known):
                found.setdefault(known, videos.classes[label])
                break
    return found


@pytest.mark.slow
def test_ssv2_as_published(tmp_path):
    root = official(tmp_path)
    touch(root, *(f"v/{line.split()[0]}" for path in root.glob("datasets_splits/**/ssv2_splits/*.txt")
                  for line in path.read_text().splitlines()))
    names = data.read_labels(LISTS / "published" / "labels" / "ssv2_labels.csv")
    (tests,) = data.load_tests("ssv2", root).values()
    assert tests.classes == names and tests.source == "validation.txt" and len(tests.paths) == 3000
    train, _ = data.load_protocol("fewshot", "ssv2", root, 16, 0)
    assert (train.source, len(train.paths)) == ("train1_few_shot_16.txt", 16 * 174)
    train, halves = data.load_protocol("base2novel", "ssv2", root, 16, 2)
    assert train.source == "fs_base_s2_train.txt" and len(train.paths) == 16 * 87 and len(halves["novel"].classes) == 87
    assert train.classes == halves["base"].classes == data.read_labels(root / "labels" / "ssv2_174_base_labels.csv")
    assert halves["base"].source == halves["novel"].source == "validation.txt"


def test_k600_names_by_llm(tmp_path):
    archives.k600(tmp_path, classes=3)
    for i in (1, 2, 3):
        names = data.read_labels(tmp_path / "lists" / f"ZS_split{i}_K600.csv")
        (tmp_path / f"ZS_split{i}_K600_llm.json").write_text(
            json.dumps({str(j): f"{name.capitalize()}: in this video, ..." for j, name in enumerate(names)}))
    plain = data.load_tests("k600", tmp_path)
    for name, videos in data.load_tests("k600", tmp_path, labels="llm").items():
        assert videos.classes == tuple(f"{own.capitalize()}: in this video, ..." for own in plain[name].classes)
        assert videos.labels == plain[name].labels
    assert "no halves" in refusal("k600", tmp_path, half="base")


def test_halves_and_their_files(tmp_path):
    archives.ucf101(tmp_path, classes=4, train=2, test=2)
    train, halves = data.load_protocol("base2novel", "ucf101", tmp_path, 1, 0)
    for half in ("base", "novel"):
        assert data.load_tests("ucf101", tmp_path, half=half) == {half: halves[half]}
    (tmp_path / "base.txt").write_text("YoYo\nTaiChi\n")
    train, halves = data.load_protocol("base2novel", "ucf101", tmp_path, 1, 0, base=tmp_path / "base.txt")
    assert train.classes == halves["base"].classes == ("YoYo", "TaiChi") and "ApplyEyeMakeup" in halves["novel"].classes
    assert data.load_tests("ucf101", tmp_path, half="novel", base=tmp_path / "base.txt") == {"novel": halves["novel"]}
    for lines in ("YoYo\nJuggling\n", "YoYo\nTaiChi\nHandstandPushups\nApplyEyeMakeup\n"):
        (tmp_path / "base.txt").write_text(lines)
        assert "base.txt: it must name some of the classes" in refusal(
            "base2novel", "ucf101", tmp_path, 1, 0, base=tmp_path / "base.txt")
    own_folders(tmp_path / "own", ("a", "b", "c"), videos=3)
    _, halves = data.load_protocol("base2novel", "folder", tmp_path / "own", 2, 0)
    assert data.load_tests("folder", tmp_path / "own", half="base") == {"base": halves["base"]}
    touch(tmp_path, *(f"flat/{name}/{i}.mp4" for name in "abcd" for i in range(3 + ord(name) % 2)))
    _, halves = data.load_protocol("base2novel", "folder", tmp_path / "flat", 2, 0)
    (novel,) = data.load_tests("folder", tmp_path / "flat", half="novel").values()
    assert novel.classes == halves["novel"].classes == ("a", "b") and {*novel.paths} > {*halves["novel"].paths}
    (tmp_path / "own.txt").write_text("c\na\n")
    train, halves = data.load_protocol("base2novel", "folder", tmp_path / "own", 2, 0, base=tmp_path / "own.txt")
    assert train.classes == ("c", "a") and halves["novel"].classes == ("b",) and len(train.paths) == 4


# ---- what a model was trained on, and what it is chosen on ----

def test_training_videos_are_left_out_of_a_test(tmp_path):
    root = tmp_path / "mine"
    for name in ("walk", "run"):
        for i in range(5):
            touch(root, f"{name}/{i}.mp4")
            (root / name / f"{i}.mp4").write_bytes(b"x" * (i + 1))
    train, tests = data.load_protocol("fewshot", "folder", root, 2, 7)
    assert train.source == "drawn with seed 7 from mine/"
    keys = data.keys_of(train)
    assert len({*keys}) == 4 and all(key.split("/")[0] in ("walk", "run") for key in keys)
    (left,) = data.load_tests("folder", root, leave_out=keys).values()
    assert left == tests["test"] and left.notes[-1].startswith("4 of 10 videos are left out")
    shutil.move(root, tmp_path / "elsewhere")
    (left,) = data.load_tests("folder", tmp_path / "elsewhere", leave_out=keys).values()
    assert len(left.paths) == 6
    (tmp_path / "elsewhere" / "walk" / "0.mp4").write_bytes(b"another video")
    (left,) = data.load_tests("folder", tmp_path / "elsewhere", leave_out=keys).values()
    assert len(left.paths) in (6, 7)
    everything = data.keys_of(data.class_folders(tmp_path / "elsewhere"))
    assert "trained on all videos of" in refusal("folder", tmp_path / "elsewhere", leave_out=everything)
    (whole,) = data.load_tests("folder", tmp_path / "elsewhere", leave_out=["other/0.mp4 1"]).values()
    assert len(whole.paths) == 10 and not whole.notes


def test_copies_among_the_test_videos_and_folders_in_class_folders_are_told(tmp_path):
    own_folders(tmp_path, sets=("train", "test"))
    video = next((tmp_path / "train" / "run").iterdir())
    video.write_bytes(b"a video")
    shutil.copy(video, tmp_path / "test" / "run" / video.name)
    _, tests = data.load_protocol("supervised", "folder", tmp_path, 1, 0)
    assert any("1 of" in note and "training videos as well" in note for note in tests["test"].notes), tests["test"].notes
    touch(tmp_path / "above", "one/a/1.mp4", "one/b/1.mp4", "two/a/1.mp4", "three/1.mp4")
    (note,) = data.class_folders(tmp_path / "above").notes
    assert "2 classes hold only folders" in note and "(one, two)" in note and "--data" in note
    touch(tmp_path / "loose", "1.mp4", "2.mp4")
    assert "2 videos, in no class folders; expected one folder per class" in refusal("folder", tmp_path / "loose")


def test_sets_of_ones_own(tmp_path):
    own_folders(tmp_path, sets=("train", "val", "test"))
    _, tests = data.load_protocol("supervised", "folder", tmp_path, 1, 0)
    assert list(tests) == ["test", "val"]
    shutil.rmtree(tmp_path / "train")
    assert "no train/<class>" in refusal("fewshot", "folder", tmp_path, 1, 0)


def test_lists_of_ones_own_without_a_class(tmp_path):
    """A class that only the training list or only the test list has videos of."""
    own_folders(tmp_path, "abc", sets=("v",))
    labels_csv(tmp_path / "labels.csv", "abc")
    (tmp_path / "l1.txt").write_text("v/a/v0.mp4 0\nv/b/v0.mp4\t1\n")
    (tmp_path / "l2.txt").write_text("v/a/v1.mp4 0\nv/b/v1.mp4  1\nv/c/v1.mp4 2\n")
    lists = dict(train_list=tmp_path / "l1.txt", test_list=tmp_path / "l2.txt")
    assert "l2.txt has classes that l1.txt has no videos of (c)" in refusal("supervised", "folder", tmp_path, 1, 0, **lists)
    lists = dict(train_list=tmp_path / "l2.txt", test_list=tmp_path / "l1.txt")
    _, tests = data.load_protocol("supervised", "folder", tmp_path, 1, 0, **lists)
    assert tests["l1"].notes == ("l1.txt has no videos of 1 of the 3 classes (c)",) and tests["l1"].labels == (0, 1)


def test_folders_by_number_beside_a_list(tmp_path):
    """Training folders that are named by ids, a test list whose labels are the same ids."""
    own_folders(tmp_path, [str(i) for i in range(11)], sets=("train",))
    labels = labels_csv(tmp_path / "labels.csv", [f"action {i}" for i in range(11)])
    touch(tmp_path, *(f"v/{i}.mp4" for i in range(11)))
    (tmp_path / "l.txt").write_text("".join(f"v/{i}.mp4 {i}\n" for i in range(11)))
    train, tests = data.load_protocol("supervised", "folder", tmp_path, 1, 0, test_list=tmp_path / "l.txt", labels=labels)
    assert owner_of(train) == {str(i): f"action {i}" for i in range(11)}
    assert as_named(tests["l"]) == owner_of(train) and tests["l"].classes == train.classes
