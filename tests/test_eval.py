"""Evaluation: metrics, exactness over processes, ensembling, single videos, pictures, checking."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from figures import weights
from helpers import FIGURES, MERGES, SHARED, need_merges, save_clip, tiny_clip
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_train import command, run

import data
import eval as evaluation
from clip_vit import FramePool, load_clip
from ila import ILA
from video_prompt import TCCLIP, TCConfig

NAMES = "red to blue, blue to red"
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def checkpoint(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "tc"
    run(world, folder, "epochs=1")
    return folder / "best.pt"


def evaluate(*words):
    words = [*map(str, words)]
    if "--video" not in words:
        words += ["--workers", "0"]
    return evaluation.run_command(evaluation.main, lambda: evaluation.parse_args(words))


@pytest.mark.parametrize("make", [FramePool, lambda clip: TCCLIP(clip, TCConfig(frames=2, context_tokens=8)), ILA])
def test_a_string_is_no_list_of_classes_and_text_is_kept_per_precision(make):
    model, video = make(tiny_clip(context=77)).eval(), torch.randn(1, 8, 3, 32, 32)
    with pytest.raises(ValueError, match="got the string 'red to blue'"):
        model.set_classes("red to blue")
    model.set_classes(["red", "blue"])
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            model(video)
        with torch.autocast("cpu", torch.float16):
            one, _ = model(video)
            model.text_cache.drop()
            assert torch.equal(one, model(video)[0])


# ---- metrics ---------------------------------------------------------------------------------------------------------

@given(st.integers(1, 30), st.integers(2, 8), st.integers(0, 10**6))
@settings(max_examples=50)
def test_top_k_equals_sorting(n, C, seed):
    rng = np.random.default_rng(seed)
    probabilities, labels = rng.integers(5, size=(n, C)).astype(np.float32), rng.integers(C, size=n)  # many are equal
    for k in (1, 2, C):
        expected = np.mean([label in np.argsort(-row, kind="stable")[:k] for row, label in zip(probabilities, labels)])
        assert abs(evaluation.top_k(probabilities, labels, k) - expected) < 1e-12
    probabilities[0] = np.nan  # an unreadable video is wrong, never right
    assert evaluation.top_k(probabilities, labels, C) == (n - 1) / n


@pytest.mark.slow
def test_subsets_are_looked_up_in_every_test_set(world, checkpoint, tmp_path, capsys):
    base, novel = (data.load_tests("shapes", world)[name].classes for name in ("base", "novel"))
    for name, classes in (("temporal", base[:2]), ("static", [base[5], novel[3]])):
        (tmp_path / name).write_text("\n".join(classes))
    assert evaluate("--zeroshot", "shapes", "--data", world, "--checkpoint", checkpoint, "--temporal", tmp_path / "temporal",
                    "--static", tmp_path / "static", "--json", tmp_path / "out.json") == 0
    scores = json.loads((tmp_path / "out.json").read_text(), parse_constant=pytest.fail)  # no NaN
    assert {"temporal", "static", "temporal score"} <= scores["base"].keys()
    assert "static" in scores["novel"] and not {"temporal", "temporal score"} & scores["novel"].keys()


def test_accuracy_of_each_class():
    p = np.array([[.6, .4, 0], [.4, .6, 0], [.1, .9, 0], [np.nan] * 3], dtype=np.float32)
    assert evaluation.class_accuracy(p, (0, 0, 1, 1), ["a", "b", "c"]) == {"a": 0.5, "b": 0.5, "c": None}


def test_logits_that_are_not_finite_are_an_error(world):
    model = FramePool(load_clip(world / "clip.pt")).eval()
    model.set_classes(["a", "b"])
    views = torch.zeros(1, 1, 8, 3, 32, 32, dtype=torch.uint8)
    assert evaluation.view_logits(model, views, "clip", "fp32").shape == (1, 1, 2)
    with torch.no_grad():
        model.clip.visual.proj[0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        evaluation.view_logits(model, views, "clip", "fp32")


@pytest.mark.parametrize("kind, bf16, auto", [("cpu", True, "fp32"), ("cuda", True, "bf16"), ("cuda", False, "fp16")])
def test_automatic_precision(kind, bf16, auto, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bf16)
    assert evaluation.resolve_precision(torch.device(kind), "auto") == auto
    for name in ("fp32", "bf16", "fp16"):
        assert evaluation.resolve_precision(torch.device(kind), name) == name


@pytest.mark.parametrize("text, weights", [
    ("0.7", [0.7]), ("0,0.5,1", [0, 0.5, 1]), ("0,0.1,...,1", [i / 10 for i in range(11)]), ("0,0.25,...,0.9", [0, .25, .5, .75])])
def test_weights_of_ensembles(text, weights):
    assert evaluation.ensemble_weights(text) == pytest.approx(weights)


def test_inside_pairs():
    classes = ("red to blue", "blue to red", "standing")
    videos = data.VideoList(classes, ("a", "b", "c", "d"), (0, 1, 0, 2))
    p = np.array([[.5, .2, .3], [.6, .1, .3], [.2, .2, .6], [0, 0, 1]], dtype=np.float32)
    assert evaluation.inside_pairs(p, videos) == (1 + 0 + 0.5) / 3
    assert evaluation.inside_pairs(p, data.VideoList(("x", "y", "z"), videos.paths, videos.labels)) is None


def test_ensembling_mixes_clip_and_keeps_what_it_lacks():
    clip = tiny_clip()
    settings = dict(prompt="a pic", frames=3, positions="joint", context_tokens=4)
    base, tuned = (TCCLIP(clip, TCConfig(**settings)).state_dict() for _ in range(2))
    tuned = {name: value + 1 for name, value in tuned.items()}
    for w in (0.0, 0.7, 1.0):
        mixed = evaluation.ensemble(base, tuned, w)
        for name, value in mixed.items():
            expected = base[name] + w if name.startswith("clip.") or name == "vision.positions" else tuned[name]
            torch.testing.assert_close(value, expected)


@torch.no_grad()
def test_released_ensembling():
    from test_tc import released_model
    need_merges()
    figures = np.load(FIGURES / "i_wiseft.npz")
    model, _ = released_model("tiny", frames=4)
    base, tuned = model.state_dict(), {}
    layout = json.loads((FIGURES / "released_layouts.json").read_text())["tc tiny T=4"]
    fresh = {f"ft.{name}": weights.tensor(f"ft.{name}", shape) for name, shape in layout.items()}
    fresh["ft.logit_scale"] = weights.tensor("ft.logit.bias", ())
    from video_prompt import load_released
    load_released(model, {name.removeprefix("ft."): value for name, value in fresh.items()})
    tuned = {name: value.clone() for name, value in model.state_dict().items()}
    base = released_model("tiny", frames=4)[0].state_dict()
    model.load_state_dict(evaluation.ensemble(base, tuned, 0.7))
    logits, _ = model.eval()(torch.from_numpy(weights.video(1, 4, 224)))
    np.testing.assert_allclose(logits.numpy(), figures["logits"], rtol=0, atol=1e-9)


TC_FILE = evaluation.VANILLA | {"method": "tc", "pixels": "imagenet"}  # as a released file tells it
ILA_FILE = evaluation.VANILLA | {"method": "ila", "clip": "ViT-L/14", "frames": 8, "model": {"form": "released"}}
OURS = TC_FILE | {"protocol": "fewshot", "dataset": "ucf101", "shots": 4, "checkpoint": "", "labels": "", "probe": False}


@pytest.mark.parametrize("recipe, flags, weight, lines", [
    (evaluation.VANILLA | {"pixels": "imagenet"}, "--test ucf101 --prompt {}", 1, ["vanilla CLIP: 63.2"]),
    (evaluation.VANILLA, "--test ucf101", 1, []),
    (TC_FILE, "--test k600 --checkpoint F --ensemble 0.7", 0.7, ["weight 0.7, mean of three splits: k600 75.8"]),
    (TC_FILE, "--test k600 --checkpoint F --ensemble 0.7 --labels llm", 0.7, ["three splits: k600 78.1"]),
    (TC_FILE | {"method": "vifi"}, "--test hmdb51 --checkpoint F --ensemble 0.7", 0.7, ["hmdb51 52.2"]),
    (TC_FILE, "--test k600 --checkpoint F --ensemble 0.5", 0.5, []),
    (TC_FILE, "--test k600 --checkpoint F", 1, []),  # the paper's are of the ensembled model
    (TC_FILE, "--test hmdb51 --checkpoint F", 1,
     ["few-shot, first split: 2 shots 57.3, 4 shots 62.3, 8 shots 67.3, 16 shots 68.6", "Kinetics model: 2 shots 65.3, "]),
    (TC_FILE, "--test ucf101 --checkpoint F --half novel", 1, ["seeds: novel 78.0", "Kinetics model: novel 84.5"]),
    (TC_FILE, "--test k400 --checkpoint F", 1, ["supervised: top-1 85.2, top-5 96.9"]),
    (ILA_FILE, "--test k400 --checkpoint F", 1, ["supervised: top-1 88.0"]),
    (OURS, "--test ucf101 --checkpoint F", 1, ["few-shot, first split: 4 shots 89.9"]),
    (OURS, "--test hmdb51 --checkpoint F", 1, []),  # trained on other data
    (OURS | {"probe": True}, "--test ucf101 --checkpoint F", 1, []),
])
def test_the_papers_number_stands_beside_what_reproduces_it(recipe, flags, weight, lines, monkeypatch):
    monkeypatch.setattr(evaluation, "check_flags", lambda parser, args: args)  # the file F is not looked for
    told = evaluation.paper_lines(evaluation.parse_args(flags.split()), recipe, weight)
    assert len(told) == len(lines) and all(end in line for line, end in zip(told, lines)), told


# ---- the command line ------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_zeroshot_counts_every_video_once_on_any_number_of_processes(world, checkpoint):
    words = ["--zeroshot", "shapes", "--data", world, "--checkpoint", checkpoint, "--workers", "0"]
    one, three = command("eval.py", *words), command("eval.py", *words, processes=3)
    assert one.returncode == three.returncode == 0, one.stderr + three.stderr
    assert one.stdout == three.stdout
    assert "base: 40 videos, 20 classes" in one.stdout and "novel: 20 videos, 10 classes" in one.stdout


def test_zeroshot_of_vanilla_clip_and_of_an_ensemble(world, checkpoint, capsys):
    assert evaluate("--zeroshot", "shapes", "--data", world) == 0
    vanilla = capsys.readouterr().out
    assert vanilla.count("inside reversed pairs 50.00") == 2
    assert evaluate("--zeroshot", "shapes", "--data", world, "--checkpoint", checkpoint, "--ensemble", "0.7") == 0
    assert "base: 40 videos" in capsys.readouterr().out


def test_views_frames_pixels_and_prompts_are_those_that_the_flags_name(world, tmp_path, capsys):
    prompts = ["{}", "a video of {}."]
    assert evaluate("--test", "shapes", "--data", world, "--views", "2x3", "--frames", 4, "--pixels", "imagenet", "--prompt",
                    *prompts, "--half", "novel", "--json", tmp_path / "a.json", "--picture", tmp_path / "confusion.png") == 0
    assert "(2x3 views of 4 frames, fp32; list: novel/)" in capsys.readouterr().out
    (scores,) = json.loads((tmp_path / "a.json").read_text()).values()
    assert (scores["views"], scores["frames"], scores["precision"], scores["list"]) == ("2x3", 4, "fp32", "novel/")
    videos = data.load_tests("shapes", world)["novel"]
    assert scores["class_top1"].keys() == set(videos.classes) and scores["classes"] == 10
    model = FramePool(load_clip(world / "clip.pt")).eval()
    model.set_classes(videos.classes, templates=prompts)
    rows = (tmp_path / "predictions.csv").read_text().splitlines()
    assert len(rows) == 21 and rows[0].startswith("path,label,class 1,probability 1,")
    views = data.read_test(videos.paths[3], data.Views(4, 32, evaluation.eval_views(
        evaluation.VANILLA | {"crops": 3}, model).short_side, clips=2, crops=3))
    with torch.no_grad():
        p = model(data.normalise(views, "imagenet"))[0].softmax(-1).mean(0)
    path, label, *best = rows[4].split(",")
    assert path == str(videos.paths[3]) and label == videos.classes[videos.labels[3]]
    order = p.argsort(descending=True)[:5]
    assert best[::2] == [videos.classes[i] for i in order]
    assert [float(value) for value in best[1::2]] == pytest.approx(p[order].tolist(), abs=2e-6)


def test_predictions_replace_no_video_and_leave_unreadable_ones_open(world, tmp_path):
    from test_train import spoiled
    root = spoiled(world, tmp_path / "data", 0)
    bad = Path(data.videos_below(root / "novel")[-1])
    bad.unlink()
    bad.write_bytes(b"")
    before = {path: path.read_bytes() for path in root.rglob("*.mp4")}
    assert evaluate("--test", "shapes", "--data", root, "--picture", tmp_path / "confusion.png") == 0
    assert before == {path: path.read_bytes() for path in root.rglob("*.mp4")}
    assert {path.name for path in tmp_path.glob("*.*")} == {"confusion.png", "confusion-novel.png", "predictions.csv",
                                                            "predictions-novel.csv"}
    rows = (tmp_path / "predictions-novel.csv").read_text().splitlines()
    assert rows[-1] == f"{bad},{bad.parent.name}" and rows[1].count(",") == 11


@pytest.mark.slow
def test_accuracy_over_the_weight_of_an_ensemble(world, checkpoint, tmp_path, capsys):
    words = "--test", "shapes", "--data", world, "--checkpoint", checkpoint, "--json", tmp_path / "a.json"
    assert evaluate(*words, "--ensemble", "0,0.5,...,1", "--picture", tmp_path / "w.png") == 0
    out = capsys.readouterr().out
    curve = json.loads((tmp_path / "a.json").read_text())
    assert [*curve] == ["0", "0.5", "1"] and (tmp_path / "w.png").is_file()
    assert evaluate(*words) == 0
    assert json.loads((tmp_path / "a.json").read_text()) == curve["1"]
    assert evaluate(*words, "--ensemble", "0.5") == 0
    assert json.loads((tmp_path / "a.json").read_text()) == curve["0.5"] != curve["1"]
    for weight, scores in curve.items():
        mean = 100 * np.mean([score["top1"] for score in scores.values()])
        assert f"w = {weight}: mean top-1 {mean:.2f}\n" in out


def test_videos_of_the_training_are_left_out(world, tmp_path, capsys):
    content = torch.load(evaluate_trained(world, tmp_path), weights_only=True)
    videos = data.load_tests("shapes", world)["base"]
    content["trained_on"] = data.keys_of(videos.keep(range(30)))
    torch.save(content, tmp_path / "best.pt")
    assert evaluate("--test", "shapes", "--data", world, "--checkpoint", tmp_path / "best.pt") == 0
    out, err = capsys.readouterr()
    assert "base: 10 videos" in out and "base: 30 of 40 videos are left out: the model was trained on them" in err


def evaluate_trained(world, folder):
    """A checkpoint of random weights as train.py writes it."""
    import dataclasses

    import train
    recipe = train.resolve_recipe("fewshot", "vifi", "shapes")
    model = evaluation.build_model(vars(recipe), load_clip(world / "clip.pt"))
    classes = list(data.load_tests("shapes", world)["base"].classes)
    torch.save({"recipe": dataclasses.asdict(recipe), "classes": classes, "model": model.state_dict()}, folder / "best.pt")
    return folder / "best.pt"


@pytest.mark.slow
def test_processes_with_other_data_are_told(world, tmp_path):
    """Each process has a copy of its own; one lacks a video."""
    import shutil
    for rank in "01":
        shutil.copytree(world, tmp_path / rank / "d")
    Path(data.videos_below(tmp_path / "1" / "d" / "base")[0]).unlink()
    (tmp_path / "run.sh").write_text(f"cd {tmp_path}/$LOCAL_RANK; exec {sys.executable} {ROOT / 'eval.py'} --test shapes "
                                     "--data d --workers 0")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--no-python", "bash",
                           str(tmp_path / "run.sh")], text=True, capture_output=True, timeout=100,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode and "rank 1 sees other data than rank 0: 39 videos of 20 classes" in done.stderr


def test_an_unreadable_test_video_is_wrong_and_named(world, tmp_path, capsys):
    from test_train import spoiled
    root = spoiled(world, tmp_path / "data", 0)
    path = Path(data.videos_below(root / "base")[0])
    path.unlink()
    path.write_bytes(b"")
    assert evaluate("--zeroshot", "shapes", "--data", root) == 0
    out = capsys.readouterr().out
    assert f"unreadable, counted as wrong: {path}: " in out and "base: 40 videos" in out


def test_a_video_its_classes_and_a_picture(world, checkpoint, tmp_path, capsys):
    video, picture = data.videos_below(world / "base")[0], tmp_path / "seen.png"
    assert evaluate("--video", video, "--classes", NAMES, "--checkpoint", checkpoint, "--picture", picture) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(video) and sorted(line.split("  ")[-1] for line in lines[1:]) == sorted(NAMES.split(", "))
    assert abs(sum(float(line.split()[0]) for line in lines[1:]) - 1) < 2e-3
    image = np.asarray(Image.open(picture))
    assert image.shape[1] == 1600 and len(np.unique(image.reshape(-1, 3), axis=0)) > 500
    classes = tmp_path / "classes.txt"
    classes.write_text("red to blue\nblue to red\n")
    assert evaluate("--video", video, video, "--classes", classes, "--clip", world / "clip.pt") == 0


def test_the_source_map_is_drawn_where_the_patches_are():
    """A seed's colour lies on its own patch, and on no other."""
    frame, scores = torch.full((3, 64, 64), 128, dtype=torch.uint8), np.linspace(0, 1, 16)
    seeds, group = np.array([5, 10]), np.array([0, 1])
    colours = evaluation.context_colours(2)
    painted = np.asarray(evaluation.context_column(frame, scores, seeds, group, colours, 160)[3]).astype(int)
    pale = painted[20, 20]
    for patch in range(16):
        y, x = patch // 4 * 40 + 20, patch % 4 * 40 + 20
        assert (np.abs(painted[y, x] - pale).sum() > 30) == (patch in (5, 10)), patch
    assert (colours[0] != colours[1]).any()


def test_check_names_each_bad_video(tmp_path, world, capsys):
    good = data.videos_below(world / "train")[0]
    (tmp_path / "a.mp4").write_bytes(Path(good).read_bytes())
    assert evaluate("--check", tmp_path) == 0
    (tmp_path / "b.mp4").write_bytes(b"nothing")
    (tmp_path / "._c.mp4").write_bytes(b"not a video of ours")
    assert evaluate("--check", tmp_path) == 1
    out = capsys.readouterr().out
    assert f"{tmp_path / 'b.mp4'}: " in out and "1 of 2 videos" in out


# ---- real clips ------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_real_clips_train_and_are_evaluated(tmp_path):
    """The same command on real videos: a folder of class folders, made from the clips' manifest."""
    if not (SHARED / "videos" / "real").is_dir():
        pytest.skip("the real clips (../shared/videos/real) are not here")
    for line in (SHARED / "videos" / "real" / "manifest.csv").read_text().splitlines()[1:]:
        name, action = line.split(",")[:2]
        for split in ("train", "test"):
            folder = tmp_path / "data" / split / action
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(SHARED / "videos" / "real" / name)
    save_clip(tmp_path / "clip.pt", context=77)
    done = command("train.py", "--protocol", "fewshot", "--method", "tc", "--dataset", "folder", "--data", tmp_path / "data",
                   "--clip", tmp_path / "clip.pt", "--out", tmp_path / "run", "--set", "shots=1", "epochs=2", "frames=4",
                   "batch=4", "workers=1", "prompt=a pic", "context_tokens=4", "clips=1", "text_length=77")
    assert done.returncode == 0, done.stderr
    assert "run: tested on 10 videos of test" in done.stdout
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    assert result["tests"]["test"]["videos"] == 10 and not result["tests"]["test"]["bad"] and result["train_videos"] == 9


@torch.no_grad()
def test_a_released_checkpoint_is_read_and_used(tmp_path, capsys):
    from test_tc import released_state
    need_merges()
    state, openai = released_state(weights, "tiny", 1)
    state["prompt_learner.ctx"] = np.zeros((4, 512))
    torch.save({"model": {f"module.{k}": torch.as_tensor(v).float() for k, v in state.items()}, "epoch": 3}, tmp_path / "released.pth")
    torch.save({k: torch.as_tensor(v).float() for k, v in openai.items()}, tmp_path / "clip.pt")
    video = next((SHARED / "videos" / "real").glob("*.mp4"))
    assert evaluate("--video", video, "--classes", "juggling,running", "--checkpoint", tmp_path / "released.pth",
                    "--clip", tmp_path / "clip.pt", "--merges", MERGES) == 0
    assert "juggling" in capsys.readouterr().out
    assert load_clip(tmp_path / "clip.pt", activation="quick_gelu").visual.resolution == 224
