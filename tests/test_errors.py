"""Wrong uses of train.py and eval.py, and what they are told: one line, exit status 2, nothing written; and --help."""

import argparse
import contextlib
import dataclasses
import errno
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import archives
import numpy as np
import pytest
import torch
from PIL import Image
from figures import weights
from helpers import MERGES, save_clip, tiny_clip

import data
import eval as evaluation
import train
from clip_vit import PoolConfig, load_clip
from ila import ILAConfig
from video_prompt import TCConfig

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {"train": train, "eval": evaluation}


class Code:
    """Pickled, it asks whoever unpickles it to make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def write_checkpoints(folder, clip):
    """Files that train.py might have written, a few of them spoiled."""
    for method in ("tc", "ila"):
        recipe = train.resolve_recipe("fewshot", method, "shapes")
        model = evaluation.build_model(vars(recipe), load_clip(clip))
        content = {"recipe": dataclasses.asdict(recipe), "classes": ["a"], "model": model.state_dict()}
        torch.save(content, folder / f"{method}.pt")
    recipe = content["recipe"]
    older = {key: value for key, value in recipe.items() if key != "short_side"}
    for name, spoiled in (("older", content | {"recipe": older}), ("bare", {"recipe": recipe}), ("odd", {"recipe": 3}),
                          ("newer", content | {"recipe": recipe | {"model": {"colour": 3}}}),
                          ("integers", {1: 2}), ("list", [1]), ("words", {"a": "b"}), ("other", {"a": torch.zeros(1)})):
        torch.save(spoiled, folder / f"{name}.pt")
    (folder / "half.pt").write_bytes(Path(clip).read_bytes()[:100_000])
    (folder / "code.pt").write_bytes(pickle.dumps(Code(str(folder / "was run")), protocol=2))


@pytest.fixture(scope="module")
def things(world, tmp_path_factory):
    """A folder of what can be given by mistake."""
    folder = tmp_path_factory.mktemp("things")
    write_checkpoints(folder, world / "clip.pt")
    save_clip(folder / "small.pt", vision_width=64, text_width=64, embed=64)
    for name, content in (("text", b"hello\nworld\n"), ("empty", b""), ("binary", bytes(range(256)) * 99),
                          ("broken.json", b"{"), ("gap.csv", b"id,name\n0,a\n2,b\n"),
                          ("no_header.csv", b"0,a\n1,b\n"), ("two.csv", b"id,name\n0,a\n1,b\n")):
        (folder / name).write_bytes(content)
    (folder / "folder").mkdir()
    archives.hmdb51(folder / "hmdb", train=1)
    shutil.copytree(folder / "hmdb" / "testTrainMulti_7030_splits", folder / "splits alone" / "splits")
    shutil.copytree(folder / "hmdb" / "kick", folder / "videos alone" / "kick")
    (folder / "packed").mkdir()
    (folder / "packed" / "hmdb51_org.rar").write_bytes(b"Rar!")
    video = data.videos_below(world / "base")[0]
    for root, names in (("one each/", "ab"), *((f"long/{part}/", ["a", "very " * 20 + "long"]) for part in ("train", "test"))):
        for name in names:
            (folder / root / name).mkdir(parents=True)
            shutil.copy(video, folder / root / name / "v.mp4")
    (folder / "twice.csv.npz").write_text("id,name\n")
    Image.new("RGB", (8, 8)).save(folder / "mine.png")
    (folder / "headed.txt").write_text("class\na\nb\n")
    (folder / "unnamed.csv").write_text("id,name\n0,a\n1\n")
    (folder / "twice.csv").write_text("id,name\n0,a\n0,b\n")
    (folder / "number.json").write_text('{"0": "a", "1": 5}')
    train_videos, tests = data.load_protocol("fewshot", "shapes", world, 2, train.Recipe.seed)
    described = evaluation.describe_data([train_videos, *tests.values()])
    for name, file, words in (("torn", "last.pt", b"half"), ("untied", "recipe.json", b"["), ("told", "results.json", b"{")):
        shutil.copytree(folder / "folder", folder / name)
        recipe = train.resolve_recipe("fewshot", "tc", "shapes", ["shots=2", "precision=fp32"], clip=str(world / "clip.pt"))
        evaluation.write_json(folder / name / "recipe.json", dataclasses.asdict(recipe) | {"data": described})
        (folder / name / file).write_bytes(words)
    (folder / "sweep" / "tc-shots=2").mkdir(parents=True)
    (folder / "sweep" / "tc-shots=2" / "recipe.json").write_text("{}")
    return folder


def snapshot(*folders):
    return {path: (path.stat().st_size, path.stat().st_mtime_ns)
            for folder in folders for path in folder.rglob("*") if path.is_file()}


def told(script, words, capsys):
    """The one line that a script ends with after its exit status 2; before it there may be a run's first lines and progress bars."""
    module = SCRIPTS[script]
    status = evaluation.run_command(module.main, lambda: module.parse_args(words))
    lines = [line for line in re.split(r"[\r\n]", capsys.readouterr().err) if line.strip()]
    assert status == 2, (status, lines)
    assert [i for i, line in enumerate(lines) if "error: " in line] == [len(lines) - 1], lines
    first = ("  ", "warning: ")
    usual = (" training videos of ", " views of ", " no known video", " lies in no class folder", "|")
    assert all(line.startswith(first) or any(word in line for word in usual) for line in lines[:-1]), lines
    assert len(lines[-1]) < 300, lines[-1]
    return lines[-1]


TRAIN = [  # arguments; {t}: the folder of things, {w}: the miniature world. What the line must hold
    ("", "--protocol"), ("--protocol fewshots", "invalid choice: 'fewshots'"),
    ("--method clip", "'tc', 'ila', 'vifi'"), ("--dataset kinetics", "known are shapes, hmdb51"),
    ("--dataset hmdb51 --data nowhere", "nowhere: no data there"),
    ("--dataset hmdb51 --data {t}/text", "/text: no data there"), ("--data {t}/text", "/text exists already"),
    ("--data {t}/hmdb", "add --dataset folder"), ("--data=", "--data is empty"), ("--out=", "--out is empty"),
    ("--dataset folder --data {t}/folder", "one folder per class"), ("--set", "at least one argument"),
    ("--set=", "--set is empty"), ("--set =3", "has no ''; known are"), ("--set lr", "write it as key=value"),
    ("--set epochs 3", "--set epochs: write it as key=value"), ("--set epoch=3", "did you mean epochs?"),
    ("--set merge=kmeans", "vifi has no 'merge', --method tc has;"), ("--protocl fewshot", "arguments: --protocl"),
    ("--set epochs=", "a whole number"), ("--set epochs=1e9", "a whole number"), ("--set colour=red", "known are"),
    ("--set shots=2,,4", "shots takes"), ("--set shots=99", "fewer than shots=99"),
    ("--set shots=0", "shots=0 must lie between 1"), ("--set seed=a", "seed takes"), ("--set seed=-1", "seed=-1 must"),
    (f"--set seed={10**30}", "must lie between 0 and 4294967295"), ("--set lr=nan", "lr=nan must"),
    ("--set lr=inf", "lr=inf must"), ("--set batch=3", "batch=3 must be even"), ("--set frames=0", "frames=0 must"),
    ("--method ila --set shots=2 frames=1", "at least 2"), ("--set jitter=2", "between 0 and 1"),
    ("--set scales=1,0", "scales=(1.0, 0.0)"), ("--set scales=nan", "0.05 to 1"),
    ("--set strengths=1,1", "four numbers"), ("--set short_side=10 shots=2", "at least the model's 32 pixels"),
    ("--set workers=-1", "workers=-1"), ("--set precision=fp8", "fp32, bf16, fp16"),
    ("--set probe=true", "--checkpoint FILE"), ("--method ila --set sync_bn=true shots=2", "needs GPUs"),
    ("--method tc --set shots=2 merge=mean", "bipartite"),
    ("--method tc --set shots=2 context_tokens=0", "context_tokens is 0"),
    ("--method tc --set shots=2 reference_blocks=99", "blocks 0 to 3"),
    ("--method ila --set shots=2 blocks=7-9", "within 1-4"), ("--method ila --set shots=2 num_classes=7", "head of 7"),
    ("--upstream-labels --set shots=2", "only hmdb51"), ("--merges nowhere.gz", "--merges nowhere.gz: no such file"),
    ("--checkpoint nowhere.pt", "--checkpoint nowhere.pt: no"), ("--checkpoint=", "--checkpoint is empty"),
    ("--checkpoint {t}/folder", "/folder: a folder without best.pt"),
    ("--method tc --checkpoint {t}/ila.pt --set shots=2", "ila.pt: not weights for this run, but of ila"),
    ("--method tc --checkpoint {t}/tc.pt --set shots=2 frames=4", "of tc with 8 frames"),
    ("--dataset folder --data {t}/one_each --protocol supervised", "supervised trains on all training videos"),
    ("--dataset folder --data {t}/one_each --set shots=1 test_list={t}/text", "also needs train_list=FILE"),
    ("--dataset folder --data {t}/one_each --set shots=1 train_list={t}/text", "also needs test_list=FILE"),
    ("--method ila --protocol zeroshot --set num_classes=20", "a linear head (probe, num_classes) does not know"),
    ("--method ila --protocol base2novel --set num_classes=10 shots=1 seed=1", "it knows only those that it was trained on"),
    ("--clip ViT-B/17 --set shots=2", "ViT-L/14@336px"), ("--clip {t}/text --set shots=2", "/text: refused"),
    ("--clip {t}/empty --set shots=2", "/empty: refused"), ("--clip {t}/half.pt --set shots=2", "half.pt: refused"),
    ("--clip {t}/code.pt --set shots=2", "code.pt: refused"),
    ("--clip {t}/folder --set shots=2", "/folder: a folder without"),
    ("--clip {t}/list.pt --set shots=2", "list.pt: not a state_dict"),
    ("--clip {t}/other.pt --set shots=2", "not CLIP weights"), ("--clip {v} --set shots=2", ".mp4: refused"),
    ("--out {t}/text --method tc --set shots=2", "/text cannot be made a folder"),
    ("--out {t}/text --set shots=2", "choose another --out"), ("--out /proc/none/run --set shots=2", "/proc/none/run"),
    ("--out {t}/hmdb --method tc --set shots=2", "other files and no recipe.json"),
    ("--out {t}/sweep --method tc --set shots=2", "other files and no recipe.json"),
    ("--out {t}/torn --set shots=2", "torn is the folder of a single run"),
    ("--out {t}/torn --method tc --set shots=3", "another run (shots is 2 there, 3 now; its videos or classes are others"),
    ("--out {t}/torn --method tc --set shots=2", "last.pt: refused"),
    ("--out {t}/untied --method tc --set shots=2", "is damaged"),
    ("--out {t}/told --method tc --set shots=2", "results.json is damaged"),
    ("--set shots=2 labels=nowhere.csv", "nowhere.csv: No such file"),
    ("--set shots=2 labels=llm", "labels_llm_labels.json is missing"),
    ("--set shots=2 labels={t}/gap.csv", "without gaps"),
    ("--set shots=2 labels={t}/no_header.csv", "the header id,name"),
    ("--set shots=2 labels={t}/binary", "binary: expected"), ("--set shots=2 labels={t}/two.csv", "2 names, but"),
    ("--set shots=2 test_list={t}/text", "labels.csv is missing"),
    ("--dataset folder --data {t}/one_each --clip {w}/clip.pt --set shots=1", "leaves none to test on"),
    ("--dataset folder --data {t}/long --protocol supervised --clip {w}/clip.pt --set frames=2 context_tokens=2", "does not fit"),
    ("--dataset hmdb51 --data {t}/videos_alone", "_test_split1.txt is"),
    ("--dataset hmdb51 --data {t}/packed", "is missing"),
    ("--dataset hmdb51 --data {t}/splits_alone", "none of its 3 videos"),
    ("--dataset ucf101 --data {t}/hmdb", "testlist01.txt is missing"),
    ("--dataset hmdb51 --data {t}/hmdb --clip {w}/clip.pt --set shots=9", "fewer than shots=9")]
EVAL = [
    ("", "give one of --test, --video"), ("--zeroshot imagenet", "invalid choice"), ("--zeroshot shapes --check {w}", "not allowed with"),
    ("--zeroshot shapes --data nowhere", "nowhere: no data there"), ("--zeroshot shapes --data=", "--data is empty"),
    ("--zeroshot shapes --data {t}/text", "no data there"),
    ("--zeroshot hmdb51 --data {t}/splits_alone", "none of its 3"),
    ("{z} --every 2s", "--every means nothing to --test"), ("{z} --classes a,b", "--classes means"),
    ("{z} --frame-rate 4", "unrecognized arguments: --frame-rate"), ("{z} --train", "unrecognized arguments: --train"), ("{z} --workers=-1", "--workers -1"),
    ("{z} --batch 0", "--batch 0"), (f"{{z}} --batch {10**20}", "must lie between 1 and"),
    ("{z} --upstream-labels", "only hmdb51"),
    ("{z} --checkpoint {t}/older.pt", "older.pt: not weights that can be used: no short_side"),
    ("{z} --checkpoint {t}/newer.pt", "'colour'"), ("{z} --checkpoint {t}/bare.pt", "no model, classes in it"),
    ("{z} --checkpoint {t}/odd.pt", "odd.pt: not weights"),
    ("{z} --checkpoint {t}/integers.pt", "integers.pt: not weights"),
    ("{z} --checkpoint {t}/list.pt", "list.pt: not weights"),
    ("{z} --checkpoint {t}/words.pt", "words.pt: not weights"), ("{z} --checkpoint {t}/other.pt", "not CLIP weights"),
    ("{z} --checkpoint {t}/code.pt", "code.pt: refused"), ("{z} --checkpoint {t}/half.pt", "half.pt: refused"),
    ("{z} --checkpoint {t}/empty", "/empty: refused"), ("{z} --checkpoint {t}/folder", "/folder: a folder without best.pt"),
    ("{z} --checkpoint nowhere.pt", "nowhere.pt: no such file"), ("{z} --checkpoint=", "--checkpoint is empty"),
    ("{z} --ensemble 0.5", "of a --checkpoint"), ("{z} --checkpoint {t}/tc.pt --ensemble nan", "'nan' is no weight"),
    ("{z} --checkpoint {t}/tc.pt --ensemble 7", "between 0 and 1"),
    ("{z} --checkpoint {t}/tc.pt --ensemble 0.5 --clip {t}/small.pt", "give its --clip"),
    ("{z} --merges nowhere", "--merges nowhere"), ("{z} --device tpu", "'tpu' (choose from"),
    ("--check {w} --device cpu", "--device means nothing to --check"),
    ("{z} --temporal nowhere.txt", "--temporal nowhere.txt: no such file"),
    ("{z} --temporal {t}/folder", "/folder: no such"), ("{z} --temporal {t}/binary", "binary: expected text"),
    ("{z} --static {t}/text", "not one: hello, world"), ("{z} --labels nowhere.csv", "nowhere.csv: No such file"),
    ("{z} --labels {t}/folder", "/folder: Is a directory"), ("{z} --labels {t}/two.csv", "2 names, but base has 20 classes"),
    ("{z} --picture a.xyz", "must end in .png"), ("{z} --picture {t}/folder", "--picture"),
    ("{z} --json {t}/folder", "--json"), ("{z} --json nowhere/a.json", "nowhere/a.json"),
    ("{z} --picture nowhere/a.png", "nowhere/a.png"), ("--check", "expected one argument"),
    ("--check=", "--check is empty"), ("--check nowhere", "nowhere: no such folder"),
    ("--check {t}/text", "/text: no such folder"), ("--check {w} --json a.json", "--json means nothing to --check"),
    ("--video x.mp4", "--video needs --classes"), ("--video x.mp4 --classes ,", "--classes ','"),
    ("--video x.mp4 --classes a", "x.mp4: no such video"),
    ("--video {t}/folder --classes a", "or a folder without any"), ("--video {v} x.mp4 --classes a", "x.mp4"),
    ("--video {t}/text --classes a --clip {w}/clip.pt", "/text: "),
    ("--video {w}/base --classes a --picture p.png", "names 40 videos; name a folder"),
    ("--video {v} --classes=", "--classes is empty"), ("--video {v} --classes nowhere.txt", "nowhere.txt: No such file"),
    ("--video {v} --classes {t}/folder", "/folder: no such file"),
    ("--video {v} --classes {t}/binary", "/binary: expected"), ("--video {v} --classes {t}/empty", "one class per line"),
    ("--video {v} --classes {t}/broken.json", "broken.json: expected"),
    ("--video {v} --classes {t}/unnamed.csv", "id 1 has no name"), ("--video {v} --classes {t}/twice.csv", "or its name b is there twice"),
    ("--video {v} --classes {t}/number.json", "number.json: expected"),
    ("--video {v} --classes a --data d", "--data means"),
    ("--video {v} --classes a --workers 3", "--workers means nothing to --video"),
    ("--video {v} --classes a --temporal {t}/text", "--temporal means"),
    ("--video {v} --classes a --num-classes 3", "--num-classes"),
    ("--video {v} --classes a --clip nowhere.pt", "nowhere.pt"),
    ("--video {v} --classes a --checkpoint {v}", "refused"),
    (f"--video {{v}} --classes {'a' * 40} --checkpoint {{t}}/tc.pt", "does not fit"),
    ("--video {v} --classes a --every 0", "not a time"),
    ("--video {v} --classes a --every=-2s", "'-2s' is not a time"), ("{z} --picture {t}/mine.png", "holds something else"),
    ("--video {v} --classes a --picture /dev/null", "must end in .png or .jpg, or be a folder"),
    ("--video {v} --classes a --every 2h", "2s, 500ms"),
    ("{v}", "write --video"), ("--video -0WZ.mp4 --classes a", "-0WZ.mp4 looks like a flag: write ./-0WZ.mp4"),
    ("--test imagenet", "invalid choice"), ("{z} --half old", "invalid choice: 'old'"),
    ("{z} --views 4x2", "'4x2' is not CLIPSxCROPS"), ("{z} --views 4", "such as 2x1 or 4x3"),
    ("{z} --views 0x1", "'0x1' is not"), ("{z} --frames 0", "--frames 0: must lie"),
    ("{z} --frames x", "invalid int value"), ("{z} --checkpoint {t}/ila.pt --frames 4", "--frames 4: "),
    ("{z} --checkpoint {t}/tc.pt --frames 4", "4 frames; this model was made for 8"),
    ("{z} --pixels grey", "invalid choice: 'grey'"), ("{z} --prompt photo", "'photo' has no {}"),
    ("{z} --checkpoint {t}/tc.pt --prompt {{}}", "has learned its prompt"),
    ("{z} --prompt=", "--prompt is empty"), ("{z} --precision fp8", "invalid choice: 'fp8'"),
    ("{z} --set lr=3", "'lr=3': known are activation=quick_gelu|gelu"), ("{z} --set activation", "known are"),
    ("{z} --set activation=relu", "known are"), ("{z} --set head_width=0", "head_width=NUMBER"),
    ("{z} --checkpoint {t}/tc.pt --ensemble 0,0.1,...", "no list of them"),
    ("{z} --checkpoint {t}/tc.pt --ensemble 0,...,1", "no list of them"),
    ("{z} --checkpoint {t}/tc.pt --ensemble 0,2", "between 0 and 1"),
    ("--video {v} --classes a --checkpoint {t}/tc.pt --ensemble 0,1", "only with --test"),
    ("{z} --features f.npz", "--features means nothing to --test"), ("{z} --top 3", "--top means nothing"),
    ("{z} --stride 2s", "--stride means nothing"), ("--video {v} --classes a --half base", "--half means"),
    ("--video {v} --classes a --features f.txt", "must end in .npz"), ("--video {v} --classes a --top 0", "--top 0"),
    ("--video {v} --classes a --features nowhere/f.npz", "no file can be written there"),
    ("--video {v} --features f.npz --picture p.png", "give --classes too"),
    ("--video {v} --classes a --stride 1s", "give --every too"),
    ("--video {v} --classes a --every 1s --stride 0", "not a time"),
    ("--video {v} --classes a --every 1s --views 4x3", "--views means nothing with --every"),
    ("--video {v} --classes a --picture p.xyz", "or be a folder"),
    ("--video {v} --classes a --json {v}", "this file is read"), ("--video {w}/base --classes a --json {v}", "this file is read"),
    ("{z} --json {v}", "this file is read"), ("{z} --checkpoint {t}/tc.pt --json {t}/tc.pt", "this file is read"),
    ("--video {v} --classes {t}/text --json {t}/text", "this file is read"),
    ("--video {v} --classes a --json p.png --picture p.png", "this file is read"),
    ("--video {v} --classes a --json /proc/none.json", "no file can be written there"),
    ("--video {v} --classes {t}/nowhere", "no such file; for a class of this name write"),
    ("{z} --json {w}/clip.pt", "this file is read"),
    ("{z} --json {t}/told/results.json", "this file is read"), ("{z} --json {t}/text", "holds something else"),
    ("--video {v} --classes a --features {t}/twice.csv.npz", "holds something else"),
    ("--video {v} --classes names.TXT", "No such file"), ("--video {v} --classes a.names", "no such file"),
    ("--video {v} --classes -", "no such file"),
    ("--video {v} --classes {t}/headed.txt", "looks like a header"), ("--video {v} --clases a", "did you mean --classes?"),
    ("--video {v} --classes a --frames 100000", "must lie between 1 and 1024"),
    ("--video {v} --classes a --checkpoint {t}/sweep", "a folder without best.pt"),
    ("--video {v} --classes names.tsv", "no such file"), ("--video {v} --classes /dev/fd/0", "no such file")]


@pytest.mark.parametrize("script, words, said", [("train", *case) for case in TRAIN] + [("eval", *case) for case in EVAL])
def test_wrong_use_is_told_in_one_line(script, words, said, world, things, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = dict(t=things, w=world, v=data.videos_below(world / "base")[0], z=f"--zeroshot\0shapes\0--data\0{world}")
    words = [word.replace("_alone", " alone").replace("_each", " each") if word.startswith(str(things)) else word
             for part in words.split() for word in part.format(**names).split("\0")]
    if script == "train" and words:
        words = ["--protocol", "fewshot", *words] if "--protocol" not in words else words
        words = [*words, *([] if "--data" in " ".join(words) else ["--data", str(world)]),
                 *([] if "--out" in " ".join(words) else ["--out", str(tmp_path / "run")])]
    if words and not {"--clip", "--checkpoint"} & {*words} and ("--video" in words or "hmdb51" in words):
        words += ["--clip", "nowhere.pt"]  # nothing may be loaded, let alone downloaded, before the mistake is seen
    before = snapshot(tmp_path, things, world)
    assert said in told(script, words, capsys)
    assert snapshot(tmp_path, things, world) == before and not (things / "was run").exists()


@pytest.mark.parametrize("kind", [torch.int64, torch.bool])
def test_weights_that_are_no_numbers_with_a_point(kind, tmp_path):
    state = tiny_clip().state_dict()
    state["visual.proj"] = state["visual.proj"].to(kind)
    with pytest.raises(ValueError, match="visual.proj holds torch.*, no weights"):
        load_clip(state)


def test_weights_of_two_kinds_of_floats(tmp_path):
    state = tiny_clip().state_dict()
    state["visual.proj"] = state["visual.proj"].double()
    clip = load_clip(state)
    assert {parameter.dtype for parameter in clip.parameters()} == {torch.float32}
    assert clip.double() is clip  # all of one kind: it computes in float64
    state = {key: value.double() for key, value in state.items()}
    assert {parameter.dtype for parameter in load_clip(state).parameters()} == {torch.float64}


@pytest.mark.parametrize("number", ["EREMOTEIO", "ENOLINK", "EPROTO", "ENOBUFS", "ENETUNREACH", "EBADF", "EIO", "ENOMEM", "EMFILE"])
def test_what_the_system_cannot_read_is_no_bad_video(number, world, monkeypatch):
    monkeypatch.setattr(data, "sleep", lambda seconds: None)
    video, tries = data.videos_below(world / "base")[0], []

    def read(self, size=-1):
        tries.append(1)
        self.error = OSError(getattr(errno, number), os.strerror(getattr(errno, number)))
        return b""
    monkeypatch.setattr(data.WatchedFile, "read", read)
    with pytest.raises(data.ReadError, match=os.strerror(getattr(errno, number))):
        data.read_clip(video)
    assert len(tries) >= 4


@pytest.mark.parametrize("task", ["--check clips", "--video a.mp4 --classes a,b"])
def test_what_is_for_one_process_says_so(task, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert f"{task.split()[0]} is for one process: leave torchrun out" in told("eval", task.split(), capsys)


def test_a_released_checkpoint_with_another_clip(world, things, tmp_path, capsys):
    from test_tc import released_state
    state, _ = released_state(weights, "tiny", 1)
    state["prompt_learner.ctx"] = np.zeros((4, 512))
    torch.save({key: torch.as_tensor(value).float() for key, value in state.items()}, tmp_path / "released.pth")
    video = data.videos_below(world / "base")[0]
    for clip in (world / "clip.pt", things / "small.pt"):
        line = told("eval", ["--video", video, "--classes", "a,b", "--checkpoint", str(tmp_path / "released.pth"),
                             "--clip", str(clip), "--merges", str(MERGES if MERGES.is_file() else clip)], capsys)
        assert "released.pth: not weights that can" in line and "give its --clip" in line


# ---- what is nobody's mistake ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(
    "Unable to allocate 1 GiB for an array"), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that")])
def test_too_little_memory_is_told_in_one_line(error, capsys):
    def main(_):
        raise error
    assert evaluation.run_command(main, lambda: None) == 2
    assert re.fullmatch(r"error: out of memory: lower micro_batch .*--batch.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("local, waits", [("0", []), ("3", [5])])
def test_every_process_tells_its_error_where_the_first_does_not(local, waits, monkeypatch, capsys):
    slept = []
    monkeypatch.setattr(evaluation.time, "sleep", slept.append)
    monkeypatch.setenv("LOCAL_RANK", local)
    monkeypatch.setenv("RANK", "9")
    def main(_):
        raise ValueError("no data here")
    assert evaluation.run_command(main, lambda: None) == 2
    assert capsys.readouterr().err.startswith("error: no data here") and slept == waits


def test_compiling_needs_a_compiler(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    words = ["--protocol", "fewshot", "--method", "vifi", "--data", str(world), "--out", str(tmp_path / "run"), "--compile",
             "--set", "shots=1"]
    assert "--compile needs a compiler: install g++" in told("train", words, capsys)


@pytest.mark.slow
def test_progress_bars_can_be_left_out():
    words = "import data; print(len(list(data.progress_bar(range(3)))))"
    for switch, bars in (({"TQDM_DISABLE": "1"}, False), ({}, True)):
        done = subprocess.run([sys.executable, "-c", words], cwd=ROOT, env=os.environ | switch, text=True, capture_output=True)
        assert done.stdout == "3\n" and ("3/3" in done.stderr) == bars, done.stderr


def test_a_bug_keeps_its_traceback():
    def main(_):
        raise RuntimeError("shapes differ")
    with pytest.raises(RuntimeError, match="shapes differ"):
        evaluation.run_command(main, lambda: None)


def test_the_traceback_behind_a_line_can_be_seen(monkeypatch, capsys):
    """A refusal of ours is complete; of any other error the line says how to see where it comes from."""
    def bug(_):
        return int("x")

    def refusal(_):
        evaluation.stop_if_unreadable(["a", "b"], 2)
    assert evaluation.run_command(refusal, lambda: None) == 2
    assert "TRACEBACK" not in capsys.readouterr().err
    assert evaluation.run_command(bug, lambda: None) == 2
    assert capsys.readouterr().err.endswith("'x' (TRACEBACK=1 in the environment shows where)\n")
    monkeypatch.setenv("TRACEBACK", "1")
    for main in (bug, refusal):
        with pytest.raises(ValueError):
            evaluation.run_command(main, lambda: None)


@pytest.mark.parametrize("error, said", [
    (MemoryError(), "out of memory: "), (OSError(24, "Too many open files"), "too many open files: raise the limit"),
    (RuntimeError("Too many open files. Communication with the workers is"), "too many open files"),
    (ValueError(), "ValueError (TRACEBACK=1"), (ValueError("a\x1b[31m\nb"), "a\\x1b[31m b"),
    (ValueError("x" * 10**6), "xxx...xxx")])
def test_every_error_is_one_short_line(error, said, capsys):
    def main(_):
        raise error
    assert evaluation.run_command(main, lambda: None) == 2
    line = capsys.readouterr().err
    assert said in line and line.count("\n") == 1 and len(line) < 300


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_closed_streams(world, closed):
    words = f"exec {sys.executable} {ROOT / 'eval.py'} --check '{world / 'novel'}' --workers 0 {closed}"
    done = subprocess.run(["sh", "-c", words], text=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert (done.stdout == "0 of 20 videos cannot be read, or are damaged\n") == (closed == "2>&-")


def test_files_are_written_whole_or_not_at_all(tmp_path):
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    link.symlink_to(target)
    evaluation.write_json(link, {"a": 1})
    assert link.is_symlink() and target.read_text() == '{\n "a": 1\n}\n'

    def broken(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError, match="target.json cannot be written .*No space left"):
        evaluation.write_atomically(target, broken)
    assert target.read_text() == '{\n "a": 1\n}\n' and len(list(tmp_path.iterdir())) == 2
    evaluation.write_json(os.devnull, {"a": 1})
    assert not os.path.isfile(os.devnull)
    with pytest.raises(OSError, match="nowhere"):
        evaluation.write_json(tmp_path / "nowhere" / "a.json", {})


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    with pytest.raises(ValueError, match="5 processes on a node with 4 GPUs: lower --nproc_per_node"):
        data.start_processes()


def launch(script, *words, **kind):
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}
    def heed():  # Ctrl-C, which a shell's background jobs ignore, and whatever they start
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([sys.executable, str(ROOT / f"{script}.py"), *map(str, words)], text=True, env=settings,
                            stderr=subprocess.PIPE, start_new_session=True, preexec_fn=heed, **kind)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train", "eval"])
def test_interrupted_at_the_keyboard(script, world, tmp_path):
    """Ctrl-C reaches all processes of a terminal, the loader's workers too."""
    words = {"train": ["--protocol", "fewshot", "--data", world, "--out", tmp_path / "run", "--method", "vifi", "--set",
                       "shots=4", "workers=1", "keep_decoded=false", "epochs=500"],
             "eval": ["--check", world, "--workers", "1"]}[script]
    with launch(script, *words, stdout=subprocess.DEVNULL) as process:
        seen = ""
        while not re.search(r" [1-9]\d*/\d+ \[", seen):  # the progress bar: it is under way
            seen += process.stderr.read(1)
            assert process.poll() is None, seen
        os.killpg(process.pid, signal.SIGINT)
        seen += process.stderr.read()
        assert process.wait(timeout=60) == 130, seen
    lines = [line for line in re.split(r"[\r\n]", seen) if line.strip() and "|" not in line
             and not line.startswith(("  ", str(tmp_path))) and "no known video" not in line]  # what a run begins with
    assert len(lines) == 1 and lines[0].startswith("interrupted; "), seen
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.slow
def test_nobody_reads_the_output(world, tmp_path):
    (tmp_path / "bad").mkdir()
    for i in range(300):  # more lines than a pipe or a buffer holds back
        (tmp_path / "bad" / f"{'x' * 200}{i}.mp4").touch()
    for folder in (tmp_path / "bad", world):
        reading, writing = os.pipe()
        os.close(reading)
        with launch("eval", "--check", folder, "--workers", "0", stdout=writing) as process:
            os.close(writing)
            error = process.stderr.read()
        assert process.returncode == 141 and "Traceback" not in error and "Exception" not in error, error


@pytest.mark.slow
def test_a_full_disk_under_the_output(world):
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as full, launch("eval", "--check", world, "--workers", "0", stdout=full) as process:
        error = process.stderr.read()
    assert process.returncode == 2 and "error: [Errno 28]" in error.splitlines()[-1], error


# ---- help --------------------------------------------------------------------------------------------------------------

def help_of(script, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    with contextlib.suppress(SystemExit):
        SCRIPTS[script].parse_args(["--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_two_screens_and_every_flag_says_its_default(script, monkeypatch, capsys):
    flags, add = [], argparse._ActionsContainer.add_argument
    monkeypatch.setattr(argparse._ActionsContainer, "add_argument",
                        lambda *a, **k: flags.append(k | {"name": a[1]}) or add(*a, **k))
    text = help_of(script, monkeypatch, capsys)
    lines = text.splitlines()
    assert len(lines) <= 100 and max(map(len, lines)) <= 100, (len(lines), [line for line in lines if len(line) > 100])
    tasks = ("-h", "--test", "--video", "--check")  # of which one is needed
    for flag in flags:
        assert flag["name"] in tasks or re.search("default|needed", flag["help"]), flag


def test_help_lists_every_override_with_its_default(monkeypatch, capsys):
    text = help_of("train", monkeypatch, capsys)
    for config in (train.Recipe, TCConfig, ILAConfig, PoolConfig):
        for name, (_, default) in train.knobs(config).items():
            match = re.search(rf"(?:^|  ){name}=(.*?)  \S", text, re.MULTILINE)
            assert match, name
            words = match[1].strip()
            kinds = {bool: lambda: words == str(default).lower(), tuple: lambda: words == ",".join(map(str, default)),
                     str: lambda: name == "prompt" or words == default, type(None): lambda: words == "None"}
            assert name == "frames" or kinds.get(type(default), lambda: float(words) == default)(), (name, words, default)
