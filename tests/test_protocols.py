"""The papers' protocols, from each owner's archive (imitated: archives.py) to the table and results.json."""

import json
import shutil

import archives
import numpy as np
import pytest
import torch
from helpers import save_clip
from test_eval import evaluate

import data
import eval as evaluation
import train
from clip_vit import read_checkpoint

pytestmark = pytest.mark.slow
TOY = ["epochs=1", "batch=4", "micro_batch=4", "frames=4", "short_side=32", "workers=0", "lr=1e-3", "shots=2"]
TC = ["prompt=a pic", "context_tokens=4", "text_length=77"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with every owner's archive, tiny, and a CLIP of random weights."""
    root = tmp_path_factory.mktemp("data")
    for archive in (archives.hmdb51, archives.ucf101, archives.k400, archives.k600, archives.ssv2):
        archive(root / archive.__name__, classes=4, train=3, test=1)
    save_clip(root / "clip.pt", context=77)
    return root


def run(root, out, protocol, dataset, *settings, method="tc", flags=()):
    words = ["--protocol", protocol, "--dataset", dataset, "--data", root / dataset, "--clip", root / "clip.pt", "--out", out,
             "--method", method, *flags, "--set", *TOY, *(TC if method == "tc" else []), *settings]
    assert evaluation.run_command(train.main, lambda: train.parse_args(list(map(str, words)))) == 0
    return json.loads((out / "results.json").read_text())


def zeroshot(root, dataset, *words):
    words = ["--zeroshot", dataset, "--data", root / dataset, "--clip", root / "clip.pt", "--workers", "0", *words]
    return evaluation.run_command(evaluation.main, lambda: evaluation.parse_args(list(map(str, words))))


@pytest.fixture(scope="module")
def kinetics(root, tmp_path_factory):
    """A TC-CLIP trained on Kinetics, zero-shot: its run folder."""
    folder = tmp_path_factory.mktemp("k400") / "run"
    run(root, folder, "zeroshot", "k400", "precision=bf16")
    return folder


def test_zeroshot_trains_on_kinetics_and_tests_on_the_others(root, kinetics, tmp_path, capsys):
    result = json.loads((kinetics / "results.json").read_text())
    assert result["train_videos"] == 3 + 4 + 5 + 6 and result["tests"]["val"]["videos"] == 4
    assert list(result["transfer"]) == ["hmdb51", "ucf101", "k600"]
    for kinds in result["transfer"].values():
        assert list(kinds) == ["plain", "ensembled"] and list(kinds["plain"]) == ["split1", "split2", "split3"]
    rows = train.table([result]).splitlines()
    assert "val top-1" in rows[0] and rows[0].split()[3:6] == ["hmdb51", "ucf101", "k600"] and "tc, ensembled" in rows[2]
    top1 = [100 * score["top1"] for score in result["transfer"]["ucf101"]["ensembled"].values()]
    assert f"{np.mean(top1):.1f} +- {np.std(top1):.1f}" in rows[2]
    capsys.readouterr()
    for more, kind in (([], "plain"), (["--ensemble", "0.7"], "ensembled")):  # eval.py finds the same
        assert zeroshot(root, "ucf101", "--checkpoint", kinetics / "best.pt", "--precision", "bf16", *more) == 0
        found = capsys.readouterr().out
        for name, score in result["transfer"]["ucf101"][kind].items():
            assert f"ucf101 {name}: {score['videos']} videos, 4 classes, top-1 {100 * score['top1']:.2f}," in found
    alone = tmp_path / "alone"
    shutil.copytree(root / "k400", alone / "k400")
    shutil.copy(root / "clip.pt", alone)
    transfer = run(alone, tmp_path / "run", "zeroshot", "k400")["transfer"]
    assert all("no data there" in kinds["missing"] for kinds in transfer.values())


def test_absent_videos_are_left_out_and_said(root, capsys):
    assert zeroshot(root, "k400") == 0 and zeroshot(root, "k600") == 0
    found = capsys.readouterr().out
    assert "k400 val: 4 videos, 4 classes" in found and "k400 val: 1 annotated videos are missing and left out" in found
    assert "k600: top-1" in found and "over 3 splits" in found


@pytest.mark.parametrize("dataset", ["hmdb51", "ucf101", "ssv2"])
def test_fewshot_is_tested_on_split_1_alone(root, tmp_path, dataset, capsys):
    results = run(root, tmp_path / "run", "fewshot", dataset, "shots=1,2")
    assert list(results) == ["tc-shots=1", "tc-shots=2"]
    for shots, result in zip((1, 2), results.values()):
        assert result["train_videos"] == 4 * shots and list(result["tests"]) == ["val" if dataset == "ssv2" else "split1"]
    assert capsys.readouterr().out.splitlines()[0].split()[:5] == ["method", "1", "shots", "2", "shots"]
    assert results["tc-shots=1"]["recipe"]["flip"] == (0 if dataset == "ssv2" else 0.5)
    again = run(root, tmp_path / "run" / "tc-shots=2", "fewshot", dataset)  # a run of its own, by its folder
    assert again == results["tc-shots=2"]


def test_base_to_novel_is_the_mean_of_three_seeds(root, tmp_path, capsys):
    results = run(root, tmp_path / "run", "base2novel", "ucf101")
    assert [result["recipe"]["seed"] for result in results.values()] == [1, 2, 3]
    base, novel = ([100 * result["tests"][name]["top1"] for result in results.values()] for name in ("base", "novel"))
    harmonic = 2 * np.mean(base) * np.mean(novel) / max(np.mean(base) + np.mean(novel), 1e-9)
    title, row, *notes = capsys.readouterr().out.splitlines()
    assert len(notes) == 3 and all(note.endswith("the best on one view of base, was tested") for note in notes)
    assert title.split()[:5] == ["method", "base", "novel", "harmonic", "mean"]
    assert f"{np.mean(base):.1f} +- {np.std(base):.1f}" in row and f"  {harmonic:.1f}  " in row
    frequent = {"YoYo", "TaiChi"}  # the owner's files hold more of them
    assert set(read_checkpoint(tmp_path / "run" / "tc-shots=2-seed=1" / "best.pt")["classes"]) == frequent


def test_supervised(root, tmp_path, capsys):
    result = run(root, tmp_path / "tc", "supervised", "k400")
    assert (result["recipe"]["clips"], result["recipe"]["crops"]) == (4, 3)
    assert capsys.readouterr().out.split()[:3] == ["method", "top-1", "top-5"]
    result = run(root, tmp_path / "ila", "supervised", "ssv2", "num_classes=4", method="ila")
    assert result["tests"]["val"]["classes"] == 4 and result["recipe"]["model"] == {"num_classes": 4}


@pytest.fixture
def mine(root, tmp_path):
    """A folder of two classes with six videos each, and what is no class and no video."""
    videos = iter(data.videos_below(root / "ucf101"))
    for label in ("run", "walk"):
        (tmp_path / "mine" / label).mkdir(parents=True)
        for i in range(6):
            shutil.copy(next(videos), tmp_path / "mine" / label / f"{i}.avi")
    (tmp_path / "mine" / "annotations").mkdir()
    (tmp_path / "mine" / "loose.avi").write_bytes(b"")
    return tmp_path / "mine"


def train_mine(root, mine, out, *settings, flags=(), protocol="fewshot"):
    words = ["--protocol", protocol, "--dataset", "folder", "--data", mine, "--clip", root / "clip.pt", "--method", "vifi",
             "--out", out, *flags, "--set", *TOY, *settings]
    return evaluation.run_command(train.main, lambda: train.parse_args([*map(str, words)]))


def test_what_is_odd_in_ones_own_folder_is_told_before_training(root, mine, tmp_path, capsys):
    assert train_mine(root, mine, tmp_path / "run", "shots=2") == 0
    err = capsys.readouterr().err
    assert "1 folder without videos is no class (annotations)" in err and "1 video lies in no class folder (loose.avi)" in err
    assert "classes: run, walk" in err and f"results.json are in {tmp_path / 'run'}" in err
    assert train_mine(root, mine, tmp_path / "other", "shots=7") == 2
    assert "such as --set shots=5" in capsys.readouterr().err
    shutil.rmtree(mine / "walk")
    assert train_mine(root, mine, tmp_path / "one", "shots=2") == 2 and "a single class, run" in capsys.readouterr().err


def test_what_a_checkpoint_has_seen_is_left_out_after_further_training_too(root, mine, tmp_path, capsys):
    assert train_mine(root, mine, tmp_path / "first", "shots=2", "seed=1") == 0
    assert train_mine(root, mine, tmp_path / "second", "shots=2", "seed=2", flags=["--checkpoint", tmp_path / "first"]) == 0
    seen = {run: {*read_checkpoint(tmp_path / run / "best.pt")["trained_on"]} for run in ("first", "second")}
    assert len(seen["first"]) == 4 and seen["first"] <= seen["second"]
    capsys.readouterr()
    assert evaluate("--test", "folder", "--data", mine, "--checkpoint", tmp_path / "second") == 0
    out, err = capsys.readouterr()
    assert f"{len(seen['second'])} of 12 videos are left out" in err and f"{12 - len(seen['second'])} videos" in out


def test_what_a_checkpoint_has_seen_is_not_forgotten_on_a_known_data_set(root, mine, tmp_path):
    assert train_mine(root, mine, tmp_path / "first", "shots=2") == 0
    run(root, tmp_path / "second", "supervised", "ucf101", "prompt=pic", flags=["--checkpoint", tmp_path / "first"], method="vifi")
    seen = [read_checkpoint(tmp_path / name / "best.pt")["trained_on"] for name in ("first", "second")]
    assert len(seen[0]) == 4 and seen[1] == seen[0]


def test_a_supervised_checkpoint_of_ones_own_folder_knows_its_videos(root, mine, tmp_path, capsys):
    parts = tmp_path / "parts"
    for label in ("run", "walk"):
        for part, numbers in (("train", range(4)), ("test", range(4, 6))):
            (parts / part / label).mkdir(parents=True)
            for i in numbers:
                shutil.copy(mine / label / f"{i}.avi", parts / part / label)
    assert train_mine(root, parts, tmp_path / "run", protocol="supervised") == 0
    capsys.readouterr()
    assert evaluate("--test", "folder", "--data", mine, "--checkpoint", tmp_path / "run") == 0
    assert "8 of 12 videos are left out" in capsys.readouterr().err
    (parts / "test" / "walk").rename(parts / "test" / "walking")
    assert evaluate("--test", "folder", "--data", parts / "test", "--checkpoint", tmp_path / "run") == 0
    assert "was not trained on the walking; it was trained on walk" in capsys.readouterr().err


def test_a_run_of_other_videos_is_another_run(root, tmp_path, capsys):
    for name in ("one", "two"):
        videos = iter(data.videos_below(root / "ucf101"))
        for part in ("train", "test"):
            for label in "ab":
                (tmp_path / name / part / (label + name)).mkdir(parents=True)
                for i in range(2):
                    (tmp_path / name / part / (label + name) / f"{i}.avi").symlink_to(next(videos))
    words = ["--protocol", "supervised", "--dataset", "folder", "--clip", root / "clip.pt", "--method", "vifi", "--out",
             tmp_path / "run", "--set", *TOY, "--data"]
    status = [evaluation.run_command(train.main, lambda: train.parse_args([*map(str, words), str(tmp_path / name)]))
              for name in ("one", "two")]
    assert status == [0, 2] and "holds another run (its videos or classes are others: 4 videos of 2 classes" in capsys.readouterr().err


def test_from_a_kinetics_checkpoint(root, kinetics, tmp_path, capsys):
    result = run(root, tmp_path / "p", "fewshot", "hmdb51", "lr=0", "lr_min=0", flags=["--checkpoint", kinetics / "best.pt"])
    old, new = (read_checkpoint(folder / "best.pt")["model"] for folder in (kinetics, tmp_path / "p"))
    assert all(torch.equal(old[name], new[name]) for name in old) and result["recipe"]["checkpoint"]
    assert "paper" not in train.table([result])
    words = ["--protocol", "fewshot", "--dataset", "hmdb51", "--data", root / "hmdb51", "--clip", root / "clip.pt", "--method", "vifi",
             "--out", tmp_path / "q", "--checkpoint", kinetics / "best.pt", "--set", *TOY]
    assert evaluation.run_command(train.main, lambda: train.parse_args(list(map(str, words)))) == 2
    assert "not weights for this run, but of tc with 4 frames" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["ila", "tc", "vifi"])
def test_a_linear_probe_trains_nothing_else(root, tmp_path, method, capsys):
    first = tmp_path / "k400"
    run(root, first, "supervised", "k400", "clips=1", "crops=1", method=method)
    result = run(root, tmp_path / "probe", "supervised", "ssv2", "probe=true", "clips=1", "crops=1", method=method,
                 flags=["--checkpoint", first / "best.pt"])
    old, new = (read_checkpoint(folder / "best.pt")["model"] for folder in (first, tmp_path / "probe"))
    assert all(torch.equal(old[name], new[f"model.{name}"]) for name in old)  # batch norm's statistics too
    assert {name for name in new if not name.startswith("model.")} == {"head.1.weight", "head.1.bias"}
    assert new["head.1.weight"].shape == (4, 128)
    capsys.readouterr()
    assert zeroshot(root, "ssv2", "--checkpoint", tmp_path / "probe" / "best.pt") == 0
    assert f"top-1 {100 * result['tests']['val']['top1']:.2f}" in capsys.readouterr().out
    assert zeroshot(root, "hmdb51", "--checkpoint", tmp_path / "probe" / "best.pt") == 2  # four classes as well
    assert "a linear probe knows no others" in capsys.readouterr().err
    assert "linear probe" in train.table([result])


def test_described_class_names(root, kinetics, tmp_path, capsys):
    classes = data.load_tests("hmdb51", root / "hmdb51")["split1"].classes
    names = {str(i): f"{name}: a person doing something that is said at length" for i, name in enumerate(classes)}
    (tmp_path / "names.json").write_text(json.dumps(names))
    assert zeroshot(root, "hmdb51", "--labels", tmp_path / "names.json", "--checkpoint", kinetics / "best.pt") == 0
    result = run(root, tmp_path / "run", "fewshot", "hmdb51", f"labels={tmp_path / 'names.json'}")
    assert read_checkpoint(tmp_path / "run" / "best.pt")["classes"] == list(names.values())
    assert result["recipe"]["model"]["text_length"] == 77
    (tmp_path / "few.json").write_text(json.dumps({"0": "a"}))
    capsys.readouterr()
    assert zeroshot(root, "hmdb51", "--labels", tmp_path / "few.json") == 2
    assert "1 names, but *_test_split1.txt has 4 classes" in capsys.readouterr().err


def test_upstream_labels(root, tmp_path, capsys):
    assert zeroshot(root, "hmdb51", "--upstream-labels") == 0 and zeroshot(root, "ucf101", "--upstream-labels") == 2
    assert "only hmdb51" in capsys.readouterr().err
    run(root, tmp_path / "run", "fewshot", "hmdb51", flags=["--upstream-labels"])
    assert read_checkpoint(tmp_path / "run" / "best.pt")["classes"] == ["kick ball", "kick", "sword exercise", "sword"]


def test_temporal_and_static_subsets(root, tmp_path, capsys):
    p, labels = np.eye(4)[[0, 1, 1, 3, 3]], [0, 1, 2, 3, 0]
    assert evaluation.subset_scores(p, labels, {"temporal": [0, 2], "static": [1, 3]}) == {
        "temporal": 1 / 3, "static": 1.0, "temporal score": 1 / 3 - 1}
    classes = data.load_tests("ssv2", root / "ssv2")["val"].classes
    for name, members in (("temporal", classes[:2]), ("static", classes[2:]), ("wrong", ["flying"])):
        (tmp_path / f"{name}.txt").write_text("\n".join(members) + "\n")
    assert zeroshot(root, "ssv2", "--temporal", tmp_path / "temporal.txt", "--static", tmp_path / "static.txt") == 0
    assert "temporal score" in capsys.readouterr().out
    assert zeroshot(root, "ssv2", "--temporal", tmp_path / "wrong.txt") == 2
    assert "flying" in capsys.readouterr().err


def test_the_papers_numbers_stand_beside(root):
    """The columns of PAPERS are those of the tables, for every protocol that the papers report."""
    for key, numbers in evaluation.PAPERS.items():
        run, _, further = key.partition(", ")
        protocol, method, dataset, clip, frames, *words = run.split()
        if method == "clip":  # it is not trained
            continue
        clip = "vit.npz" if clip == "ViT" else clip
        _, model = train.parse_settings(method, [word.lower() for word in words])
        recipe = dict(protocol=protocol, method=method, dataset=dataset, clip=clip, frames=int(frames), probe=False, shots=16,
                      model=model, checkpoint="k400.pt" if "Kinetics" in further else "",
                      labels="llm" if further == "LLM names" else "")
        score = {"top1": 0.5, "top5": 0.75}
        kinds = dict.fromkeys(("plain", "ensembled"), {"split1": {"top1": 0.5}})
        result = {"recipe": recipe, "transfer": {name: kinds for name in train.TRANSFER} if protocol == "zeroshot" else {},
                  "tests": dict.fromkeys(("base", "novel") if protocol == "base2novel" else ("val",), score), "seconds": 1}
        runs = [result | {"recipe": recipe | {"shots": k}} for k in (2, 4, 8, 16)] if protocol == "fewshot" else [result]
        title, *_, ours, paper = train.table(runs).splitlines()
        ensembled = ", ensembled" if protocol == "zeroshot" else ""
        name, _, cells = paper.partition(" in its paper")
        assert name.strip(" ,") == method + ensembled + ", from a Kinetics model" * ("Kinetics" in further)
        assert ours.strip().startswith(method + ensembled)
        assert [float(number) for number in cells.split()] == list(numbers)
        for column, number in zip(evaluation.PAPER_COLUMNS[protocol], numbers):  # right-aligned below its title, beside ours
            end = title.index(column) + len(column)
            assert paper[:end].endswith(f" {number}") and ours[end - 1].isdigit(), (key, column)


@pytest.mark.parametrize("dataset", ["folder", "hmdb51"])
def test_a_few_shot_checkpoint_is_not_tested_on_its_own_training_videos(root, tmp_path, dataset, capsys):
    """Drawn from one's own folders, and the videos of split 1's training list that split 2 tests on."""
    if dataset == "folder":
        place = tmp_path / "data" / "folder"
        for name in archives.UCF[:2]:
            for i in range(4):
                archives.write_video(place / name / f"{i}.mp4", name, archives.UCF[:2], i)
    else:
        place = tmp_path / "data" / "hmdb51"
        shutil.copytree(root / "hmdb51", place)
        for path in place.rglob("*_test_split2.txt"):  # tests on what split 1 trains on
            path.write_bytes(path.with_name(path.name.replace("split2", "split1")).read_bytes()
                             .replace(b" 2", b" 0").replace(b" 1", b" 2"))
    shutil.copy(root / "clip.pt", place.parent / "clip.pt")
    run(place.parent, tmp_path / "run", "fewshot", dataset)
    train, _ = data.load_protocol("fewshot", dataset, place, 2, 1024)
    capsys.readouterr()
    assert zeroshot(place.parent, dataset, "--checkpoint", tmp_path / "run" / "best.pt") == 0
    said = capsys.readouterr()
    whole = list(data.load_tests(dataset, place).values())[-1 if dataset == "folder" else 1]
    left = len({*whole.paths} & {*train.paths})
    assert left == len(train.paths)
    assert f"{left} of {len(whole.paths)} videos are left out: the model was trained on them" in said.out + said.err


def test_base_classes_of_ones_own(root, tmp_path, capsys):
    """--set base=FILE chooses them in training; a test of one half reads the same file."""
    place = tmp_path / "data" / "folder"
    for number, name in enumerate(("walk", "run", "jump", "climb")):
        for i in range(4):
            archives.write_video(place / name / f"{i}.mp4", name, ("climb", "jump", "run", "walk"), 10 * number + i)
    shutil.copy(root / "clip.pt", place.parent / "clip.pt")
    base = tmp_path / "base.txt"
    base.write_text("walk\njump\n")
    result = run(place.parent, tmp_path / "run", "base2novel", "folder", "seed=1", f"base={base}")
    assert result["tests"].keys() == {"base", "novel"}
    header = capsys.readouterr().err
    assert "training list: drawn with seed 1 from folder/" in header and "base classes: walk, jump" in header and "novel classes: climb, run" in header
    for half, names in (("base", {"jump", "walk"}), ("novel", {"climb", "run"})):
        assert zeroshot(place.parent, "folder", "--checkpoint", tmp_path / "run" / "best.pt", "--half", half,
                        "--json", tmp_path / "a.json") == 0
        scores, = json.loads((tmp_path / "a.json").read_text()).values()
        assert scores["class_top1"].keys() == names
    base.unlink()
    assert zeroshot(place.parent, "folder", "--checkpoint", tmp_path / "run" / "best.pt", "--half", "base") == 2
    assert "it holds the base classes of this checkpoint" in capsys.readouterr().err
    with pytest.raises(ValueError, match="base2novel alone"):
        train.resolve_recipe("fewshot", "tc", "hmdb51", [f"base={tmp_path}"])
