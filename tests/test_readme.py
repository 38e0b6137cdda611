"""The README: every command in it runs, on local stand-ins for what would be downloaded; its pictures and files exist."""

import contextlib
import json
import re
import shlex
from pathlib import Path

import archives
import av
import pytest
import torch
from figures import make_files
from helpers import save_clip, tiny_clip

import bench_speed
import data
import eval as evaluation
import train
from clip_vit import load_clip
from ila import ILA, ILAConfig
from video_prompt import TCCLIP, TCConfig

FILES = "train.py", "eval.py", "tests/bench_speed.py"
ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "tests" / "figures"
README = (ROOT / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"(?:torchrun [^\n`]*?|python )((?:train|eval|tests/bench_speed)\.py [^\n`#]*[^\s`#])", README)))
TOY = "epochs=1 batch=32 micro_batch=16 frames=4 short_side=32 clips=1 crops=1 workers=0"
OPTIONS = {"tc": "context_tokens=4 text_length=77 prompt=pic", "vifi": "prompt=pic", "ila": ""}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder as the README has it in mind: data/, runs/ and some videos; tiny, with a CLIP of random weights."""
    home = tmp_path_factory.mktemp("home")
    for archive, train_videos in ((archives.hmdb51, 16), (archives.ucf101, 16), (archives.k400, 2), (archives.k600, 1), (archives.ssv2, 2)):
        archive(home / "data" / archive.__name__, classes=2, train=train_videos, test=1)
    save_clip(home / "clip.pt", context=77)
    miniature(home / "data" / "shapes", None)
    videos = [path for path in data.videos_below(home / "data" / "ucf101")]
    for first, name in enumerate(("my_videos/walk", "my_videos/run", "folder")):
        (home / name).mkdir(parents=True)
        for i, path in enumerate(videos[6 * first:6 * first + 6]):
            (home / name / f"{i}.avi").symlink_to(path)
    for name in ("clip.mp4", "a.mp4", "b.webm", "long.mp4"):
        (home / name).symlink_to(videos[0])
    (home / "classes.txt").write_text("walk\nrun\n")
    kinetics = data.load_tests("k400", home / "data" / "k400")["val"].classes
    for i, name in enumerate(("temporal", "static")):
        (home / f"{name}.csv").write_text(f"id,name\n0,{kinetics[i]}\n")
    write_checkpoints(home)
    described = json.dumps({str(i): f"{i}: a person does what class {i} is about" for i in range(2)})
    for dataset, name in (("k400", "kinetics_400_llm_labels"), ("hmdb51", "hmdb_51_llm_labels"), ("ucf101", "ucf_101_llm_labels"),
                          *(("k600", f"ZS_split{i}_K600_llm_labels") for i in (1, 2, 3))):
        (home / "data" / dataset / f"{name}.json").write_text(described)
    return home


def write_checkpoints(home):
    """Imitations of the released files that the README names, and an image tower without text."""
    clip = load_clip(home / "clip.pt")
    tiny = FIGURES / "vit_in21k.json"
    (home / "vit.npz").symlink_to(next(path for path in make_files.make(tiny, home / "vit", "float32") if path.suffix == ".npz"))
    archives.released_tc(home / "tc.pth", TCCLIP(clip, TCConfig(text_length=77)))
    archives.released_vifi(home / "vifi.pth", clip)
    large = tiny_clip(resolution=64, patch=16, context=77)
    archives.released_ila(home / "ila.pth", ILA(large, ILAConfig(frames=4, form="released")))
    tower = load_clip({key: value for key, value in large.state_dict().items() if key.startswith("visual.")})
    archives.released_ila(home / "ssv2.pth", ILA(tower, ILAConfig(frames=4, form="released-ssv2", num_classes=10)))
    for name in set(re.findall(r"--checkpoint (\w+\.pth)", README)):
        kind = "ssv2" if "ssv2" in name and "ila" in name else name.partition("_")[0]
        (home / name).symlink_to(home / f"{kind}.pth")


@pytest.fixture(scope="module")
def runs(home):
    """The checkpoints that the README starts from: a TC-CLIP and an ILA of Kinetics, and the first command's TC-CLIP."""
    for method, name in (("tc", "k400"), ("ila", "ila")):
        words = ["--protocol", "supervised", "--dataset", "k400", "--data", home / "data" / "k400", "--clip", home / "clip.pt",
                 "--method", method, "--out", home / "runs" / name, "--set", *TOY.split(), *OPTIONS[method].split()]
        assert train.main(train.parse_args(list(map(str, words)))) == 0
    words = ["--protocol", "fewshot", "--method", "tc", "--data", home / "data" / "shapes", "--out",
             home / "runs" / "shapes-fewshot" / "tc", "--set", "shots=1", *TOY.split(), *OPTIONS["tc"].split()]
    assert train.main(train.parse_args(list(map(str, words)))) == 0
    (own,) = [command for command in COMMANDS if command.startswith("train.py --protocol fewshot --dataset folder")]
    words = [*shlex.split(own)[1:], "--clip", "clip.pt", "--set", *TOY.split(), *OPTIONS["tc"].split()]
    with contextlib.chdir(home):  # its run folder is the one that the README names next
        assert train.main(train.parse_args(words)) == 0
    return home / "runs"


def test_the_readme_names_commands_of_every_kind():
    assert len(COMMANDS) > 15
    for words in ("zeroshot", "fewshot", "base2novel", "supervised", "--zeroshot", "--video", "--check", "bench_speed.py"):
        assert any(words in command for command in COMMANDS), words


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "train.py --protocol fewshot"])
def test_every_command_runs(home, runs, monkeypatch, capsys, command):
    """As written, but with the stand-in CLIP, and in training with toy settings for all that the command leaves open."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(bench_speed, "memory_of", lambda variant, args: 1.0)  # a process each; tested in test_bench.py
    script, *words = shlex.split(command)
    words = ["clip.pt" if word.startswith("ViT-") else word for word in words]
    words = [f"{word}-{COMMANDS.index(command)}" if before == "--out" else word for before, word in zip(["", *words], words)]
    words = ["num_classes=2" if word.startswith("num_classes=") else word for word in words]
    if "--dataset" in words or script != "train.py":
        words += ["--clip", "clip.pt"] if not {"--check", "--help", "--clip"} & set(words) else []
    else:  # the miniature world
        monkeypatch.setattr(train, "prepare_miniature", miniature)
    if script == "train.py" and "--help" not in words:
        method = words[words.index("--method") + 1] if "--method" in words else "tc"
        own = {word.partition("=")[0] for word in words}
        toy = TOY.replace("short_side=32", "short_side=64") if "vit.npz" in words else TOY
        toy = [word for word in f"{toy} {OPTIONS[method]} num_classes=2 shots=1".split()
               if word.partition("=")[0] not in own and not ("num_classes" in word and (method != "ila" or "ssv2" not in words
                                                                                       or "probe=true" in words))]
        words += ["--set", *toy]
        words += [] if "--method" in words or "--dataset" in words else ["--method", "tc"]
    if script == "tests/bench_speed.py":
        words += ["--frames", "4", "--repeats", "1", "--num-classes", "3", "--batch", "1"]
    module = {"train.py": train, "eval.py": evaluation, "tests/bench_speed.py": bench_speed}[script]
    main, parse = module.main, module.parse_args
    if "--help" in words:
        with pytest.raises(SystemExit, match="0"):
            parse(words)
        return
    assert evaluation.run_command(main, lambda: parse(words)) == 0, capsys.readouterr().err


@pytest.mark.slow
def test_the_python_in_it_runs(home, runs, monkeypatch, capsys):
    monkeypatch.chdir(home)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(block, names)
    printed = capsys.readouterr().out
    assert re.match(r"tensor\(\[\[0\.\d+, 0\.\d+\],", printed) and "nearest to the sentence: data/shapes" in printed
    program = torch.export.load(home / "runs" / "model.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(program(names["video"][:1])[0], names["logits"][:1])


def miniature(root, device):
    """A world of one clip per class in place of the whole one."""
    if not root.exists():
        data.write_shapes(root, seed=0, shots_max=1, base_clips=1, novel_clips=1)
        save_clip(root / "clip.pt")


def test_the_first_command_is_the_default_of_train(monkeypatch):
    """It is run whole by .ci/run; here: nothing else has to be given."""
    args = train.parse_args(["--protocol", "fewshot"])
    assert [recipe.method for recipe in train.recipes_of(args, "shapes", Path("data/shapes"), Path("runs")).values()] == ["vifi", "tc"]
    assert "torchrun --nproc_per_node=1 train.py --protocol fewshot" in README and "pip install ." in README


def test_what_the_readme_points_at_is_there():
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert len(pictures) >= 4 and all((ROOT / picture).is_file() for picture in pictures)
    for name in re.findall(r"`([\w/]+\.py)`", README):
        assert (ROOT / name).is_file() or (ROOT / "tests" / name).is_file(), name
    for name in set(re.findall(r"`--([\w-]+)", README)) - {"max_restarts", "shutdown-timeout", "local_addr", "nnodes"}:  # torchrun's
        assert f'"--{name}"' in "".join((ROOT / file).read_text() for file in FILES), name
    knobs = {**train.knobs(train.Recipe)} | {name: 0 for method in evaluation.METHODS.values()
                                              for name in train.knobs(method.config)}
    for name in re.findall(r"`([a-z_]+)=[^`]*`", README):
        assert name in knobs, name
    assert av.__version__ >= "18.1"


def test_every_setting_in_the_tables_of_ablations_is_known():
    """A cell such as `merge=none` / `random` names a setting and its values."""
    found = []
    for protocol, method, dataset, start in (("fewshot", "tc", "hmdb51", "**TC-CLIP's ablations**"),
                                             ("supervised", "ila", "k400", "**ILA's ablations**")):
        rows = README.partition(start)[2].partition("\n\n|")[2].partition("\n\n")[0].splitlines()
        for row in rows:
            key = None
            for setting in re.findall(r"`([^`]+)`", row.split("|")[1]):
                key = setting.partition("=")[0] if "=" in setting else key
                if key and key != "--set":
                    found.append(setting if "=" in setting else f"{key}={setting}")
                    train.resolve_recipe(protocol, method, dataset, [found[-1]])
    assert len(found) > 30 and "merge=kmeans" in found and "rival=hungarian" in found
