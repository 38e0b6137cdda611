"""Training: recipes, schedule, the order of the data, resuming, many processes, bad videos."""

import dataclasses
import errno
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import FIGURES, tiny_clip
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import eval as evaluation
import train
from clip_vit import read_checkpoint

ROOT = Path(__file__).resolve().parents[1]
TOY = ["epochs=2", "shots=4", "batch=6", "micro_batch=4", "eval_every=1", "lr=1e-3", "jitter=0.5", "mixup=0.8", "cutmix=1.0"]


def arguments(world, out, *more, method="tc", protocol="fewshot"):
    method = ["--method", method] if method else []
    return ["--protocol", protocol, *method, "--data", str(world), "--out", str(out), "--set", *TOY, *more]


def run(world, out, *more, **kind):
    train.main(train.parse_args(arguments(world, out, *more, **kind)))
    return json.loads((out / "results.json").read_text())


def command(script, *words, processes=None, **kind):
    """Runs a script as a user does; several processes through torchrun."""
    start = [sys.executable] if processes is None else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run([*start, str(ROOT / script), *map(str, words)], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, **kind)


def weights(folder, name="last.pt"):
    return read_checkpoint(folder / name)["model"]


# ---- recipes and schedule --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("protocol, epochs, warmup, lr, lowest, batch, clips, crops", [
    ("zeroshot", 10, 5, 8e-6, 8e-8, 256, 2, 1), ("fewshot", 50, 5, 2e-6, 2e-8, 64, 2, 1),
    ("base2novel", 12, 2, 3.33e-6, 3.33e-8, 64, 2, 1), ("supervised", 30, 5, 2.2e-5, 2.2e-7, 512, 4, 3)])
def test_the_papers_recipes(protocol, epochs, warmup, lr, lowest, batch, clips, crops):
    r = train.resolve_recipe(protocol, "tc", "k400")
    assert (r.epochs, r.warmup_epochs, r.lr, r.lr_min, r.batch, r.clips, r.crops) == (epochs, warmup, lr, lowest, batch, clips, crops)
    assert (r.weight_decay, r.new_lr, r.smoothing, r.mixup, r.cutmix, r.switch) == (0.001, 10, 0.1, 0.8, 1.0, 0.5)
    assert (r.flip, r.scales, r.jitter, r.grey, r.seed, r.frames) == (0.5, (1, 0.875, 0.75, 0.66), 0.8, 0.2, 1024, 16)
    assert train.resolve_recipe(protocol, "tc", "ssv2").flip == 0  # left and right are classes there


def test_ilas_recipes():
    k400, ssv2 = (train.resolve_recipe("supervised", "ila", name) for name in ("k400", "ssv2"))
    assert (k400.lr, k400.weight_decay, k400.frames, k400.sampling) == (8e-6, 0.003, 8, "tsn")
    assert (ssv2.lr, ssv2.lr_min, ssv2.weight_decay, ssv2.sampling, ssv2.smoothing, ssv2.mixup, ssv2.cutmix, ssv2.flip) == (
        5e-4, 5e-6, 0.01, "uniform", 0, 0, 0, 0)
    for recipe, settings, multiples in ((k400, {}, {1.0, 10.0}), (ssv2, {"num_classes": 5}, {1.0})):
        model = evaluation.build_model(vars(recipe) | {"model": settings}, tiny_clip())
        groups = train.parameter_groups(model, recipe)
        names = {id(p): name for name, p in model.named_parameters()}
        assert {group["multiple"] for group in groups} == multiples
        for group in groups:
            assert group["weight_decay"] == recipe.weight_decay
            for p in group["params"]:
                assert names[id(p)].startswith("clip.visual.") == (group["multiple"] == 1 and not settings) or "logit" in names[id(p)]
        assert not any(p.requires_grad for name, p in model.named_parameters() if name.startswith("clip.transformer"))


def test_overrides_are_checked():
    r = train.resolve_recipe("fewshot", "tc", "hmdb51", settings=["lr=1e-4", "merge=kmeans", "reference_blocks=8,9", "keep_best=false"])
    assert train.resolve_recipe("fewshot", "ila", "ssv2", settings=["num_classes=3"]).model == {"num_classes": 3}
    assert r.lr == 1e-4 and r.model == {"merge": "kmeans", "reference_blocks": (8, 9)} and r.keep_best is False
    for wrong, words in (("lr=fast", "a number"), ("epochs=2.5", "a whole number"), ("keep_best=1", "true or false"),
                         ("colour=red", "known are"), ("scales=a,b", "with commas")):
        with pytest.raises(ValueError, match=words):
            train.resolve_recipe("fewshot", "tc", "hmdb51", settings=[wrong])


def test_recipes_of_ilas_hosts():
    """EVL's and TimeSformer's own recipes; in the miniature world ILA's."""
    evl = train.resolve_recipe("supervised", "ila", "k400", settings=["host=evl", "num_classes=400"])
    assert (evl.optimizer, evl.lr, evl.lr_min, evl.warmup_epochs, evl.weight_decay) == ("adamw", 4e-4, 0, 0, 0.05)
    assert (evl.batch, evl.clips, evl.crops, evl.pixels, evl.frames, evl.smoothing) == (256, 3, 1, "clip", 8, 0)
    assert evl.model == {"host": "evl", "num_classes": 400}
    assert abs(evl.epochs * (240258 // 256) - 50000) < 500
    divided = train.resolve_recipe("supervised", "ila", "k400", settings=["host=timesformer", "rival=divided", "num_classes=400", "lr=0.01"])
    assert (divided.optimizer, divided.lr, divided.weight_decay, divided.batch, divided.epochs) == ("sgd", 0.01, 1e-4, 8, 15)
    rates = [train.learning_rate(t, 30, 0, 0.005, 0, "steps") for t in (0.5, 21.5, 22.5, 27.5, 28.5)]
    assert np.allclose(rates, [0.005, 0.005, 5e-4, 5e-4, 5e-5], rtol=1e-12)
    small = train.resolve_recipe("fewshot", "ila", "shapes", settings=["host=evl", "num_classes=20"])
    assert (small.optimizer, small.frames, small.batch) == ("adamw", 8, 16)
    top1 = {settings: train.paper_row(vars(train.resolve_recipe("supervised", "ila", "k400", settings=settings.split(), clip=clip)))
            for settings, clip in (("num_classes=400 host=evl rival=none", "ViT-B/16"), ("num_classes=400 host=timesformer", "vit.npz"),
                                   ("frames=32 finetune=true num_classes=400", "vit.npz"), ("rival=shift rival=shift", "ViT-B/32"),
                                   ("rival=shift", "ViT-B/16"), ("use=mi", "ViT-B/32"))}
    assert [row and row[1]["top-1"][0] for row in top1.values()] == [82.9, 79.8, 83.3, 80.1, None, 81.3]


@given(st.integers(2, 60), st.floats(0.5, 20), st.sampled_from(["released", "continuous"]))
def test_schedules_rise_then_fall(total, warmup, schedule):
    warmup = min(warmup, total - 1)
    rates = [train.learning_rate(t, total, warmup, 1.0, 0.01, schedule) for t in np.linspace(0, total, 200)]
    peak = int(np.searchsorted(np.linspace(0, total, 200), warmup))
    assert rates[0] == 0 and abs(rates[-1] - 0.01) < 1e-9 and max(rates) <= 1
    assert all(a <= b for a, b in zip(rates[:peak], rates[1:peak])) and all(a >= b for a, b in zip(rates[peak:], rates[peak + 1:]))


def test_the_released_schedule_and_groups():
    figures = np.load(FIGURES / "j_schedule.npz")
    notes = json.loads((FIGURES / "j_schedule.json").read_text())
    recipe = dataclasses.replace(train.resolve_recipe("zeroshot", "tc", "k400"), epochs=notes["epochs"])
    model = evaluation.build_model(vars(recipe) | {"model": {"prompt": "a pic"}}, tiny_clip())
    optimizer = torch.optim.AdamW(train.parameter_groups(model, recipe), lr=recipe.lr)
    for accumulation in (1, 2):  # of 7 passes an epoch; with 2 the last pass of each is dropped
        expected = figures[f"lr_used_acc{accumulation}"]
        accumulating, used = dataclasses.replace(recipe, batch=16 * accumulation), []
        for step in range(len(expected)):
            train.set_rates(optimizer, accumulating, step, 16 * notes["steps_per_epoch"])
            base = train.rate_of_step(accumulating, step, 16 * notes["steps_per_epoch"])
            used.append([group["lr"] for group in optimizer.param_groups])
            assert base == used[-1][0]
        np.testing.assert_allclose(used, expected, rtol=1e-12)
    names = {id(p): name for name, p in model.named_parameters()}
    ours = {group["multiple"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups}
    assert ours[10] == {name for name in names.values() if name.startswith(("vectors", "prompt_layers"))}
    theirs = [name for group in notes["groups"] if group["lr_multiplier"] == 1 for name in group["names"]]
    for part in ("logit_scale", "local_global_bias", "text_encoder.positional_embedding", "ln_final", "image_encoder.proj"):
        ours_part = part.replace("text_encoder.", "clip.").replace("image_encoder.", "clip.visual.")
        assert any(part in name for name in theirs) and any(ours_part in name for name in ours[1]), part
    assert all(group["weight_decay"] == 0.001 for group in notes["groups"] + optimizer.param_groups)
    assert "clip.token_embedding.weight" not in ours[1] and not any("token_embedding" in name for name in theirs)


@pytest.mark.parametrize("protocol, count, released, complete", [
    ("fewshot", 2 * 51, 50, 100), ("fewshot", 2 * 101, 150, 200), ("fewshot", 16 * 51, 600, 650),
    ("base2novel", 16 * 26, 72, 84), ("fewshot", 20, 50, 50)])  # HMDB-51, UCF-101, HMDB-51 twice, a folder of one's own
def test_the_number_of_updates(protocol, count, released, complete):
    recipe = train.resolve_recipe(protocol, "tc", "hmdb51")
    for drop_last, updates in ((True, released), (False, complete)):
        recipe = dataclasses.replace(recipe, drop_last=drop_last)
        steps = train.epoch_batches(recipe, count, 0)
        assert recipe.epochs * len(steps) == updates
        used = sum(len(part) for parts in steps for part in parts)
        assert used == (min(count, len(steps) * recipe.batch) if drop_last else count)
        total = train.time_of_step(recipe, updates - 1, count)
        assert total[0] < recipe.epochs * total[1]
    if count % recipe.batch == 0:
        return
    rates = [train.learning_rate(*time_and_length(recipe, step, count)) for step in range(3)]
    assert rates[0] == 0 < rates[1] < rates[2]  # only the first has rate 0


def time_and_length(recipe, step, count):
    t, per_epoch = train.time_of_step(recipe, step, count)
    return t, recipe.epochs * per_epoch, recipe.warmup_epochs * per_epoch, recipe.lr, recipe.lr_min


def test_the_rates_jump_where_warm_up_ends():
    """The last rate of warm-up and the first one after it, in the papers' runs."""
    for protocol, count, jump in (("zeroshot", 240_000, .505), ("fewshot", 816, .99), ("base2novel", 816, .97),
                                  ("supervised", 240_000, .93)):
        recipe = train.resolve_recipe(protocol, "tc", "k400")
        first = int(recipe.warmup_epochs) * train.steps_per_epoch(recipe, count) + 1
        before, after = (train.learning_rate(*time_and_length(recipe, step, count)) for step in (first - 1, first))
        assert abs(after / before - jump) < 0.005, protocol


# ---- the order of the data -------------------------------------------------------------------------------------------

@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 5), st.integers(1, 4).map(lambda n: 2 * n), st.integers(0, 3), st.booleans())
@settings(max_examples=150)
def test_processes_and_micro_batches_never_change_the_data(count, batch, world, micro, epoch, drop):
    recipe = dataclasses.replace(train.resolve_recipe("fewshot", "tc", "hmdb51"), batch=2 * batch, micro_batch=micro,
                                 drop_last=drop)
    whole = train.epoch_batches(dataclasses.replace(recipe, micro_batch=10**6), count, epoch)
    shares = [train.epoch_batches(recipe, count, epoch, rank, world) for rank in range(world)]
    once = sorted(i for step in whole for part in step for _, i, _ in part)
    if drop and count > 2 * batch:
        assert len({*once}) == len(once) == count - count % (2 * batch)
    else:
        assert once == list(range(count))
    for step, parts in enumerate(whole):
        mine = [share[step] for share in shares]
        assert len({len(part) for part in mine}) == 1  # all processes get equally many micro-batches
        real = [video for share in mine for part in share for video in part if video[2]]
        assert real == parts[0]
        pairs = {frozenset(v[1] for v in parts[0][i:i + 2]) for i in range(0, len(parts[0]), 2)}
        mixed = {frozenset(v[1] for v in part[i:i + 2]) for share in mine for part in share if part[0][2]
                 for i in range(0, len(part), 2)}
        assert pairs == mixed  # and neighbours, which are mixed, stay together


def test_each_pair_is_mixed_in_its_own_way_wherever_it_is_computed():
    recipe = dataclasses.replace(train.resolve_recipe("fewshot", "tc", "hmdb51"), batch=20, micro_batch=20)
    whole = train.draw_mixing(recipe, train.epoch_batches(recipe, 20, 3)[0][0], 8)
    assert whole.shape == (10, 8, 8) and len({own.mean().item() for own in whole}) == 10
    small = dataclasses.replace(recipe, micro_batch=4)
    parts = [part for rank in range(2) for part in train.epoch_batches(small, 20, 3, rank, 2)[0]]
    assert torch.equal(whole, torch.cat([train.draw_mixing(small, part, 8) for part in parts]))


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(world, tmp_path):
    run(world, tmp_path / "one")
    done = command("train.py", *arguments(world, tmp_path / "two"), processes=2)
    assert done.returncode == 0, done.stderr
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        difference = (one[name].float() - two[name].float()).abs()
        if name.endswith("in_proj_bias"):  # no softmax sees the keys' biases: their gradient is rounding,
            difference = difference.view(3, -1)[[0, 2]]  # of which AdamW makes steps of full length
        assert difference.max() < 1e-5, name
    results = [json.loads((tmp_path / n / "results.json").read_text())["tests"] for n in ("one", "two")]
    for name in results[0]:  # the same model was tested: a rounding may turn one or two videos of this random CLIP
        assert abs(results[0][name]["top1"] - results[1][name]["top1"]) <= 2 / results[0][name]["videos"]
    moved = read_checkpoint(world / "clip.pt")["model"]  # and they did learn something
    assert max(float((one[f"clip.{k}"] - moved[k]).abs().max()) for k in moved) > 1e-3


# ---- resuming --------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_killed_run_goes_on_bit_by_bit(world, tmp_path):
    more = ["save_every=3", "epochs=3"]
    words = arguments(world, tmp_path / "killed", *more)
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *words], stderr=subprocess.DEVNULL,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    saved = tmp_path / "killed" / "last.pt"
    began = time.time()
    while not saved.exists() and time.time() - began < 120:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    step = read_checkpoint(saved)["progress"]["step"]
    assert step % 14 and not (tmp_path / "killed" / "results.json").exists()  # in the middle of an epoch of 14 steps
    killed = run(world, tmp_path / "killed", *more)
    whole = run(world, tmp_path / "whole", *more)
    one, two = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert killed["tests"] == whole["tests"]
    logs = [[json.loads(line) for line in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in ("killed", "whole")]
    assert [[line["loss"], line["top1"]] for line in logs[0]] == [[line["loss"], line["top1"]] for line in logs[1]]
    assert run(world, tmp_path / "whole", *more) == whole  # done is done


def test_a_broken_write_leaves_the_last_good_state(tmp_path):
    path = tmp_path / "last.pt"
    train.save(path, {"step": 1})

    def write(file):
        file.write(b"half")
        raise OSError("No space left on device")
    with pytest.raises(OSError, match="space"):
        evaluation.write_atomically(path, write)
    assert read_checkpoint(path) == {"step": 1} and [p.name for p in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.slow
def test_a_start_that_failed_leaves_the_folder_free(world, tmp_path):
    with pytest.raises(ValueError, match="no such|neither a file"):
        train.main(train.parse_args(arguments(world, tmp_path / "run", "epochs=1") + ["clip=nowhere.pt"]))
    assert not (tmp_path / "run").exists()
    assert run(world, tmp_path / "run", "epochs=1")["tests"]
    (tmp_path / "run" / "recipe.json").write_text("[")
    with pytest.raises(ValueError, match="recipe.json is damaged"):
        run(world, tmp_path / "run", "epochs=1")


def test_ones_own_folder_is_not_taken_for_the_miniature(tmp_path):
    (tmp_path / "mine" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="--dataset folder"):
        train.main(train.parse_args(["--protocol", "fewshot", "--data", str(tmp_path / "mine")]))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["train"]


@pytest.mark.slow
def test_other_runs_are_not_touched(world, tmp_path):
    run(world, tmp_path / "a", "epochs=1")
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    with pytest.raises(ValueError, match="another run .lr is 0.001 there"):
        run(world, tmp_path / "a", "epochs=1", "lr=1e-4")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        run(world, tmp_path / "b")
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["thesis.txt"]


def told(words, capsys):
    """The line in which a command ends."""
    capsys.readouterr()
    assert evaluation.run_command(train.main, lambda: train.parse_args(list(map(str, words)))) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert len(line) < 400, line
    return line


HOLD = """
import sys, time
from pathlib import Path
import train
with train.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.mark.slow
def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(world, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    holder = subprocess.Popen([sys.executable, "-c", HOLD, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    monkeypatch.setenv("SLURM_NTASKS", "4")
    line = told(arguments(world, folder, "epochs=1"), capsys)
    assert f"process {holder.pid} on {os.uname().nodename} since " in line and "one torchrun per node" in line
    assert [path.name for path in folder.iterdir()] == ["lock"]
    holder.kill()
    holder.wait()
    assert run(world, folder, "epochs=1")["tests"] and not (folder / "lock").exists()


@pytest.mark.parametrize("where", ["lockf", "fsync", "open"])
def test_file_systems_that_cannot_lock_or_flush_a_folder(tmp_path, monkeypatch, where):
    def unsupported(*arguments, **more):
        if where == "open" and not Path(arguments[0]).is_dir() or where == "fsync" and not stat.S_ISDIR(
                os.fstat(arguments[0]).st_mode):
            return real(*arguments, **more)
        raise OSError(errno.ENOLCK if where == "lockf" else errno.EINVAL, "not supported")
    module = train.fcntl if where == "lockf" else os
    real = getattr(module, where)
    monkeypatch.setattr(module, where, unsupported)
    with train.locked(tmp_path):
        train.save(tmp_path / "last.pt", {"step": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.slow
def test_damage_is_told_by_file_and_nothing_else_is_given_up(world, tmp_path, capsys):
    folder, words = tmp_path / "run", arguments(world, tmp_path / "run")
    whole = run(world, folder)
    for text in ("{}", "[]", "3", "", "[" * 100_000):
        (folder / "results.json").write_text(text)
        line = told(words, capsys)
        assert "results.json is damaged" in line and "delete it, and the same command makes it again" in line
    (folder / "results.json").unlink()
    (folder / "recipe.json").unlink()  # follows from last.pt
    assert run(world, folder)["tests"] == whole["tests"]
    (folder / "recipe.json").unlink()
    assert "holds another run (seed is 1024 there" in told([*words, "seed=3"], capsys)
    (folder / "results.json").unlink()
    (folder / "best.pt").rename(tmp_path / "best.pt")
    assert "best.pt is missing: put it back, or copy last.pt there" in told(words, capsys)
    other = read_checkpoint(tmp_path / "best.pt")
    train.save(folder / "best.pt", other | {"model": {"clip.logit_scale": torch.zeros(())}})
    assert "best.pt is of another model" in told(words, capsys)
    (folder / "best.pt").write_bytes((folder / "last.pt").read_bytes())
    assert run(world, folder)["epoch"] == 2
    (folder / "results.json").unlink()
    kept = (folder / "last.pt").read_bytes()
    (folder / "last.pt").write_bytes(kept[:len(kept) // 2])
    line = told(words, capsys)
    assert "last.pt" in line and "delete it, and the same command trains from the start" in line
    (folder / "last.pt").unlink()
    assert run(world, folder)["tests"] == whole["tests"]


@pytest.mark.parametrize("change", [
    {"step": 10**6}, {"step": -1}, {"step": "1"}, {"sums": [0.0, 1.0]}, {"sums": [float("nan"), 0.0, 1.0]}, {"history": [{}]},
    {"history": 3}, {"seconds": "long"}, {"seconds": -1.0}, {"bad": 4}, {"bad": [3]}, {"history": None}])
def test_odd_progress_is_refused(world, tmp_path, capsys, change):
    folder, words = tmp_path / "run", arguments(world, tmp_path / "run", "epochs=1")
    folder.mkdir()
    recipe = train.recipes_of(train.parse_args(words), "shapes", world, folder)[folder]
    videos = data.load_protocol("fewshot", "shapes", world, 4, 1024)[0]
    run_ = train.start(train.fit_recipe(recipe, 80, torch.device("cpu")), folder, videos, videos, torch.device("cpu"))
    run_.progress |= change
    train.save_run(run_)
    assert "last.pt is not of this run" in told(words, capsys)


@pytest.mark.slow
def test_sigterm_during_an_epochs_last_save_is_heeded(world, tmp_path, monkeypatch):
    save_run, done = train.save_run, []

    def warned(run):
        save_run(run)
        if not done:
            done.append(os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(train, "save_run", warned)
    with pytest.raises(SystemExit, match="143"):
        run(world, tmp_path / "run")
    assert not (tmp_path / "run" / "log.jsonl").exists()
    run(world, tmp_path / "run")
    run(world, tmp_path / "whole")
    one, two = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_a_second_sigterm_ends_the_process():
    code = ("import os, signal, time, train\nwith train.sigterm_noted() as times:\n"
            " os.kill(os.getpid(), 15); os.kill(os.getpid(), 15); assert len(times) == 2; time.sleep(3.1)\n"
            " print('first', flush=True); os.kill(os.getpid(), 15); time.sleep(9); print('never')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (143, "first\n"), done.stderr


@pytest.mark.slow
def test_a_second_sigterm_ends_a_process_that_waits_for_another(tmp_path):
    """Rank 0 waits in a collective, in which Python runs no signal handler."""
    code = ("import torch.distributed as dist, train\n"
            f"dist.init_process_group('gloo', init_method='file://{tmp_path}/meet', rank=RANK, world_size=2)\n"
            "with train.sigterm_noted():\n print('in', flush=True)\n import time\n"
            " time.sleep(60) if RANK else dist.all_reduce(train.torch.zeros(1))")
    waits, sleeps = (subprocess.Popen([sys.executable, "-c", code.replace("RANK", str(rank))], cwd=ROOT, stdout=subprocess.PIPE,
                                      text=True) for rank in (0, 1))
    assert waits.stdout.readline() == sleeps.stdout.readline() == "in\n"
    for pause in (0.5, 3.2):
        time.sleep(pause)
        waits.send_signal(signal.SIGTERM)
    assert waits.wait(timeout=20) == 143
    sleeps.kill()
    sleeps.wait()


def test_processes_whose_data_differ_stop_at_once(monkeypatch):
    monkeypatch.setattr(data, "gather", lambda items: [*items, "9 videos of 3 classes, 1234"])
    with pytest.raises(ValueError, match="rank 1 sees other data than rank 0: 9 videos"):
        data.check_same_data("12 videos of 3 classes, 5678")
    data.check_same_data("9 videos of 3 classes, 1234")


# ---- bad videos ------------------------------------------------------------------------------------------------------

def spoiled(world, root, count):
    """A copy of the world in which `count` training clips hold no video."""
    for split in ("train", "base", "novel"):
        for path in map(Path, data.videos_below(world / split)):
            target = root / path.relative_to(world)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
    (root / "clip.pt").symlink_to(world / "clip.pt")
    for path in map(Path, data.videos_below(root / "train")[:count]):
        path.unlink()
        path.write_bytes(b"not a video")
    return root


@pytest.mark.slow
def test_bad_training_videos_are_replaced_and_named(world, tmp_path):
    root = spoiled(world, tmp_path / "data", 2)
    result = run(root, tmp_path / "run", "epochs=1")
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text())
    assert len(line["bad"]) == 2 and all("train" in error and ".mp4: " in error for error in line["bad"])
    assert result["bad"] == line["bad"]


def test_nothing_but_bad_videos_stops_the_run_with_the_list(world, tmp_path):
    root = spoiled(world, tmp_path / "data", 80)
    with pytest.raises(ValueError, match="ten training videos in a row.*mp4: .*mp4: "):
        run(root, tmp_path / "run", "epochs=1", "workers=1")


@pytest.mark.slow
def test_too_many_bad_videos_stop_the_run(world, tmp_path):
    root = spoiled(world, tmp_path / "data", 8)
    with pytest.raises(ValueError, match="8 of 80 videos cannot be read.*000.mp4"):
        run(root, tmp_path / "run", "epochs=1")


# ---- every method and protocol ------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("protocol, method", [("zeroshot", "tc"), ("supervised", "ila"), ("base2novel", "vifi")])
def test_protocols(world, tmp_path, protocol, method):
    result = run(world, tmp_path / "run", "epochs=1", "precision=bf16", "seed=7", protocol=protocol, method=method)
    assert set(result["tests"]) == {"base", "novel"} and result["tests"]["base"]["videos"] == 40
    assert ("harmonic mean" in train.table([result])) == (protocol == "base2novel")
    assert {"recipe.json", "log.jsonl", "last.pt", "best.pt", "results.json", "curves.png"} <= {
        p.name for p in (tmp_path / "run").iterdir()}
    if method == "vifi":
        assert result["tests"]["base"]["pairs"] == 0.5  # frame pooling cannot see the order of frames


@pytest.mark.slow
def test_two_processes_of_one_epoch_and_batch_norm(world, tmp_path):
    """ILA under DDP; the only epoch's best.pt is read by both processes; the last step has a video for one alone."""
    done = command("train.py", *arguments(world, tmp_path / "two", "epochs=1", "batch=26", method="ila"), processes=2)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "two" / "results.json").read_text())["tests"]["base"]["videos"] == 40
    delta = read_checkpoint(tmp_path / "two" / "last.pt")["model"]["delta"]
    assert abs(float(delta) - 0.2) < 1e-6


def test_a_run_says_what_it_begins_with():
    videos = data.VideoList(tuple("abc"), ("1", "2", "3"), (0, 1, 2))
    def first(dataset, protocol="fewshot"):
        recipe = train.resolve_recipe(protocol, "tc", dataset, ["lr=0.25", "merge=kmeans"])
        recipe = train.fit_recipe(recipe, 3, torch.device("cpu"))
        tests = dict.fromkeys(("base", "novel"), videos)
        return " ".join(train.header_of(recipe, Path("runs/a"), videos, tests, torch.device("cpu")).split())
    assert first("folder").startswith("runs/a: tc on folder, 3 training videos of 3 classes; tests: base of 3, novel of 3; on the CPU")
    assert " lr=0.25 " in first("folder") and "merge=kmeans" in first("folder") and " batch=4 " in first("folder")
    assert "updates in all: 50" in first("folder") and "precision=fp32" in first("folder")
    assert "updates" not in first("k400", "supervised").partition("fp32")[0] and "novel classes: a, b, c" in first("ssv2", "base2novel")
    assert "hmdb51 has 51 classes: is this its folder" in first("hmdb51")
    assert "is this its folder" not in first("folder") + first("hmdb51", "base2novel") + first("shapes")
