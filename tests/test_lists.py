"""Annotations: class folders, the published lists and labels, few-shot draws, base and novel classes."""

import ast
import csv
import json
import shutil
import sys
from pathlib import Path

import archives
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
    with pytest.raises(ValueError, match="every video of 'walk' .* leaves none to test on"):
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
