"""Trains TC-CLIP, ILA or ViFi-CLIP by the papers' protocols, on one process or many.

    python train.py --protocol fewshot                   # the miniature world: no download, minutes
    torchrun --nproc_per_node=4 train.py --protocol fewshot --dataset hmdb51 --set shots=4
    torchrun --nproc_per_node=8 train.py --protocol zeroshot --dataset k400 --data /videos/k400

A run may be interrupted anywhere: the same command goes on. Everything random is drawn from (seed,
epoch, video) or (seed, step). So neither the number of processes and workers nor an interruption
changes what is computed, with two exceptions: batch norm (ILA; see sync_bn) sees the videos of one
process, and dropout is drawn per process.

Sections: recipes; optimisation; files; a run; the loop; tests; the miniature; from flags to
recipes; tables; the command line.
"""

import contextlib
import dataclasses
import difflib
import errno
import glob
import itertools
import json
import math
import os
import shutil
import signal
import socket
import sys
import textwrap
import threading
import time
import typing
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import eval as evaluation  # `eval` is a builtin
from clip_vit import (Block, clip_facts, knob, load_clip, open_weights, read_checkpoint,
                      text_once)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# DDP's broadcast_buffers is called forward_sync_buffers from torch 2.13 on; older ones lack that
warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")


# ---- recipes -------------------------------------------------------------------------------------

CHOICES = {
    "sampling": tuple(data.SAMPLERS),
    "pixels": tuple(data.MEANS),
    "crops": (1, 3),
    "optimizer": ("adamw", "sgd"),
    "schedule": ("released", "continuous", "steps"),
    "precision": ("auto", "fp32", "bf16", "fp16"),
}
COUNTS = ("shots", "frames", "clips", "epochs", "micro_batch", "eval_every", "save_every")
SHARES = ("flip", "jitter", "grey", "shift", "smoothing", "switch")
MOST = dict.fromkeys(SHARES, 1) | evaluation.LARGEST_IN_FILE


def knobs(config):
    """{name: (type, default)} of the settings in a configuration dataclass; int | None is int."""
    found = {}
    for field in dataclasses.fields(config):
        if field.default is not dataclasses.MISSING:
            types = typing.get_args(field.type) or (field.type,)
            found[field.name] = (types[0], field.default)
    return found


@dataclass(frozen=True)
class Recipe:
    """One training run. The defaults are what the papers' recipes share; the tables below differ.

    Raises ValueError if a setting is out of range, or if two do not go together.
    """

    protocol: str
    method: str
    dataset: str
    clip: str = knob("ViT-B/16", "OpenAI name or file")
    merges: str = knob("", "BPE merges; empty: the cache folder's")
    seed: int = knob(1024, "of all that is random")
    shots: int = knob(16, "training videos per class")
    train_list: str = knob("", "a list instead of the data folder's")
    test_list: str = knob("", "the same, to test on")
    base: str = knob("", "base2novel: a file of its base classes")
    labels: str = knob(
        "", "other class names: a file, CSV id,name or JSON; llm: the published LLM-rephrased ones")
    upstream_labels: bool = knob(False, "HMDB-51: the published names, of which four are swapped")
    checkpoint: str = knob(
        "", "weights of this method to start from instead of CLIP's: the papers' (P) rows")
    probe: bool = knob(
        False, "train only a linear classifier over the frozen checkpoint (ILA, Table 12)")
    # a video as input
    frames: int = knob(16, "T")
    sampling: str = knob("tsn", "tsn, uniform")
    clips: int = knob(2, "test views in time")
    crops: int = knob(1, "test views in space, 1 or 3")
    pixels: str = knob("imagenet", "imagenet, clip or half (127.5): the pixels' mean and deviation")
    short_side: int = knob(
        0, "pixels, before the crop; 0: 256/224 of the resolution, with 3 crops the resolution")
    # augmentation
    flip: float = knob(0.5, "probability")
    jitter: float = knob(0.8, "probability")
    grey: float = knob(0.2, "probability")
    shift: float = knob(0.0, "largest move, part of the side")
    scales: tuple = knob((1.0, 0.875, 0.75, 0.66), "multi-scale crop, parts of the short side")
    strengths: tuple = knob(
        (0.4, 0.4, 0.2, 0.1), "of jitter: brightness, contrast, saturation, hue")
    smoothing: float = knob(0.1, "of the labels")
    mixup: float = knob(0.8, "a of Beta(a, a); 0: never")
    cutmix: float = knob(1.0, "the same")
    switch: float = knob(0.5, "probability of cutmix if both are on")
    # optimisation
    epochs: int = knob(30, "passes over the training videos")
    warmup_epochs: float = knob(5.0, "linear, from 0")
    lr: float = knob(8e-6, "peak rate of CLIP's weights")
    lr_min: float = knob(8e-8, "rate at the end")
    new_lr: float = knob(10.0, "times lr, for what CLIP lacks")
    position_lr: float = knob(1.0, "times lr, for time positions")
    schedule: str = knob(
        "released", "or continuous: no jump after warm-up; or steps: x 0.1 at 11/15 and 14/15")
    optimizer: str = knob("adamw", "adamw, or sgd with momentum 0.9")
    drop_last: bool = knob(True, "leave out an incomplete step")
    batch: int = knob(
        256, "videos per step, over all processes; 0: an eighth of all, but 4 to 64")
    micro_batch: int = knob(
        8, "videos per forward pass, even; costs memory; only batch norm sees it")
    weight_decay: float = knob(0.001, "of the optimiser")
    position_decay: float = knob(0.001, "of time positions")
    clip_grad: float = knob(0.0, "largest gradient norm; 0: any")
    precision: str = knob("auto", "fp32, bf16, fp16; auto: bf16 or fp16 on a GPU, fp32 on a CPU")
    # the run
    eval_every: int = knob(1, "epochs")
    save_every: int = knob(500, "steps between checkpoints, beside those at epochs' ends")
    keep_best: bool = knob(True, "test the epoch of best validation accuracy; else the last")
    sync_bn: bool = knob(False, "batch norm over all processes")
    workers: int = knob(8, "loader processes per process")
    keep_decoded: bool = knob(
        False, "keep decoded clips in memory: for worlds whose clips are as short as T")
    compile: bool = knob(
        False, "torch.compile the training step: needs a C compiler, minutes at the start")
    checkpointing: bool = knob(
        False, "compute blocks' values again in backward: less memory, 1/4 to 1 more time")
    model: dict = dataclasses.field(default_factory=dict)  # overrides of the model's configuration

    def __post_init__(self):
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                known = ", ".join(map(str, known))
                raise ValueError(f"{name}={value} is unknown; use one of {known}")
        for name, (kind, _) in knobs(Recipe).items():
            if kind in (int, float):
                self.check_range(name)
        if not all(0.05 <= part <= 1 for part in self.scales):
            raise ValueError(f"scales={self.scales} must be parts of the short side, 0.05 to 1")
        if len(self.strengths) != 4 or not all(0 <= part <= 1 for part in self.strengths):
            raise ValueError(f"strengths={self.strengths} must be four numbers between 0 and 1")
        if self.protocol == "zeroshot" and (self.probe or self.model.get("num_classes")):
            raise ValueError(
                "zeroshot tests on other classes than it trains on, and a linear head (probe, "
                "num_classes) does not know them: take --protocol supervised")
        if self.base and self.protocol != "base2novel":
            raise ValueError(f"base={self.base} is for --protocol base2novel alone: leave it out")
        if self.probe and not self.checkpoint:
            raise ValueError("probe=true needs the model to be probed: --checkpoint FILE")
        if self.keep_decoded and self.workers:
            raise ValueError(
                f"keep_decoded=true keeps clips in one process: workers={self.workers} must be 0")
        for name in ("batch", "micro_batch"):
            if getattr(self, name) % 2:
                raise ValueError(f"{name}={getattr(self, name)} must be even, because videos are "
                                 "mixed in pairs")

    def check_range(self, name):
        least = 1 if name in COUNTS else 0
        most = MOST.get(name, 2**32 - 1)
        value = getattr(self, name)
        if not least <= value <= most:  # nan is refused too
            raise ValueError(f"{name}={value} must lie between {least} and {most}")

    def augmentation(self):
        """The arguments of data.augment."""
        names = ("flip", "scales", "jitter", "grey", "shift", "strengths")
        return {name: getattr(self, name) for name in names}


PROTOCOL_RECIPES = {  # [released] TC-CLIP's configurations; ViFi-CLIP is trained alike
    "zeroshot": dict(epochs=10, warmup_epochs=5.0, lr=8e-6, lr_min=8e-8, batch=256),
    "fewshot": dict(epochs=50, warmup_epochs=5.0, lr=2e-6, lr_min=2e-8, batch=64),
    "base2novel": dict(epochs=12, warmup_epochs=2.0, lr=3.33e-6, lr_min=3.33e-8, batch=64),
    "supervised": dict(
        epochs=30, warmup_epochs=5.0, lr=2.2e-5, lr_min=2.2e-7, batch=512, clips=4, crops=3),
}
METHOD_RECIPES = {  # what a method changes; every method of eval.METHODS has a row
    "tc": {},
    "vifi": {},
    "ila": dict(  # [paper, ILA Table 14]; TC-CLIP's numbers where ILA gives none
        frames=8, weight_decay=0.003, position_lr=10.0, position_decay=0.003),
}
DATASET_RECIPES = {  # and on one dataset: (protocol, method, dataset)
    ("supervised", "ila", "k400"): dict(  # 50 000 steps of 256 videos [paper, ILA Table 14]
        epochs=53, warmup_epochs=5.0, lr=8e-6, lr_min=8e-8, batch=256),
    ("supervised", "ila", "ssv2"): dict(  # 30 000 steps; a linear head over a frozen CLIP
        epochs=45, warmup_epochs=5.0, lr=5e-4, lr_min=5e-6, batch=256, new_lr=1.0, position_lr=1.0,
        weight_decay=0.01, position_decay=0.01, smoothing=0.0, mixup=0.0, cutmix=0.0,
        sampling="uniform", model={"num_classes": 174}),
}
ONE_HOT = dict(smoothing=0.0, mixup=0.0, cutmix=0.0)
HOST_RECIPES = {  # of ILA in another host, with and without alignment: its own [released]
    "evl": ONE_HOT | dict(  # 50 000 steps of 256 videos
        epochs=53, warmup_epochs=0.0, lr=4e-4, lr_min=0.0, new_lr=1.0, position_lr=1.0, batch=256,
        weight_decay=0.05, position_decay=0.05, pixels="clip", clips=3, crops=1),
    "timesformer": ONE_HOT | dict(
        epochs=15, warmup_epochs=0.0, lr=0.005, lr_min=0.0, new_lr=1.0, position_lr=1.0, batch=8,
        weight_decay=1e-4, position_decay=1e-4, optimizer="sgd", schedule="steps", jitter=0.0,
        grey=0.0, sampling="uniform", pixels="slowfast", clips=1, crops=3),
}
FOLDER = dict(  # [ours] few videos of one's own: enough updates, at a rate that learns
    epochs=50, warmup_epochs=5.0, lr=1e-5, lr_min=1e-7, batch=0, schedule="continuous",
    drop_last=False, clips=2, crops=1)
FEW_UPDATES = 200  # a run with fewer hardly moves CLIP
PROBE = dict(lr=1e-3, lr_min=1e-5, new_lr=1.0, smoothing=0.0, mixup=0.0, cutmix=0.0)  # [ours]
PROTOCOLS = tuple(PROTOCOL_RECIPES)
SWEPT = ("shots", "seed")  # settings of which several values, as in shots=2,4,8, are several runs
TRANSFER = ("hmdb51", "ucf101", "k600")  # the zero-shot tests after training


# ---- optimisation --------------------------------------------------------------------------------

RELEASED_PASS = 16  # videos
TEMPORAL_POSITIONS = ("positions", "frame_positions", "position")  # last parts of parameter names


def learning_rate(t, total, warmup, peak, lowest, schedule="released"):
    """The rate at time t of `total` steps: a linear warm-up, then a half cosine to `lowest`.

    continuous  the cosine begins where the warm-up ends
    steps       the peak; a tenth of it from 11/15 of the run, a hundredth from 14/15 [TimeSformer's
                code]
    released    the cosine counts from step 0, so that the rate jumps down where the warm-up ends
                [TC-CLIP's code]
    """
    if t < warmup:
        return peak * t / warmup
    if schedule == "steps":
        drops = sum(15 * t >= part * total for part in (11, 14))
        return peak * 0.1 ** drops
    share = t / total
    if schedule == "continuous":
        share = (t - warmup) / (total - warmup)
    return lowest + (peak - lowest) * (1 + math.cos(math.pi * min(share, 1))) / 2


def parameter_groups(model, recipe):
    """The optimiser's groups: CLIP's weights, temporal positions, new modules.

    A group's rate is lr times its "multiple", which is 1 for CLIP's weights. [released]
    local_global_bias counts as CLIP's; vectors, prompt layers and all that ILA adds are new.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        from_clip = name.startswith("clip.")
        if not from_clip and name.rpartition(".")[2] in TEMPORAL_POSITIONS:
            key = (recipe.position_lr, recipe.position_decay)
        elif from_clip or name.startswith("vision."):
            key = (1.0, recipe.weight_decay)
        else:
            key = (recipe.new_lr, recipe.weight_decay)
        groups.setdefault(key, []).append(parameter)
    return [{"params": groups[key], "multiple": key[0], "weight_decay": key[1]}
            for key in sorted(groups)]


def steps_per_epoch(recipe, count):
    """Optimiser steps in an epoch of `count` videos.

    [ours] A single incomplete step is kept even with drop_last: own folders are small.
    """
    if recipe.drop_last:
        return max(1, count // recipe.batch)
    return math.ceil(count / recipe.batch)


def time_of_step(recipe, step, count):
    """(t, length of an epoch) of optimiser step `step`, counted from 0; `count` videos an epoch.

    "continuous", "steps": the middle of the step, t = step + 1/2, in steps.
    [released] "released": t is in passes of 16 videos (4 on each of 4 GPUs), of which a step
    accumulates A = batch / 16. An epoch counts those that drop_last leaves out too. That loop sets
    the rate in the last pass of a step, for the step after it: step s > 0 runs at t = A s - 1, and
    step 0 at rate 0.
    """
    per_epoch = steps_per_epoch(recipe, count)
    if recipe.schedule != "released":
        return step + 0.5, per_epoch
    A = max(1, recipe.batch / RELEASED_PASS)
    passes = max(count // RELEASED_PASS, A * per_epoch)  # in an epoch
    if step == 0:
        return 0, passes
    epoch, before = divmod(step - 1, per_epoch)
    return epoch * passes + A * (before + 1) - 1, passes


def rate_of_step(recipe, step, count, multiple=1.0):
    """The learning rate of optimiser step `step`, for a group with this multiple of lr."""
    t, per_epoch = time_of_step(recipe, step, count)
    total = recipe.epochs * per_epoch
    warmup = recipe.warmup_epochs * per_epoch
    peak = recipe.lr * multiple
    return learning_rate(t, total, warmup, peak, recipe.lr_min, recipe.schedule)


def set_rates(optimizer, recipe, step, count):
    """Sets the learning rates of optimiser step `step`."""
    for group in optimizer.param_groups:
        group["lr"] = rate_of_step(recipe, step, count, group["multiple"])


def epoch_batches(recipe, count, epoch, rank=0, world=1):
    """This process's share of an epoch of `count` videos: a list of micro-batches for each step.

    A micro-batch is a list of (epoch, video, weight). The order is a permutation drawn from (seed,
    epoch). A step's videos are cut into contiguous parts of even length, because neighbours are
    mixed in pairs; so world and micro_batch never change what a step computes. All processes get
    equally many micro-batches: a process without videos left gets one video of weight 0.
    """
    order = np.random.default_rng([recipe.seed, epoch]).permutation(count).tolist()
    steps = []
    for step in range(steps_per_epoch(recipe, count)):
        start = step * recipe.batch
        videos = [(epoch, i, 1.0) for i in order[start:start + recipe.batch]]
        filler = (*videos[0][:2], 0.0)
        share = 2 * math.ceil(len(videos) / (2 * world))
        mine = videos[rank * share:(rank + 1) * share]
        parts = [mine[i:i + recipe.micro_batch] for i in range(0, share, recipe.micro_batch)]
        steps.append([part or [filler] for part in parts])
    return steps


# ---- files ---------------------------------------------------------------------------------------

DAMAGED_LAST = "delete it, and the same command trains from the start"
INSTEAD_OF_BEST = "or copy last.pt there, and the last epoch is tested in place of the best one"


def save(path, content):
    evaluation.write_atomically(path, lambda file: torch.save(content, file))


def read_state(path, advice):
    """The dict that `save` wrote. Raises ValueError that names the file and gives the advice."""
    try:
        content = read_checkpoint(path)
        if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
            raise ValueError(f"{path} holds no model")
        return content
    except ValueError as error:
        raise ValueError(f"{error}: {advice}") from error


def read_json(path, names, advice):
    """The dict in a JSON file. Raises ValueError, with the advice, if it lacks one of `names`
    {name: its type}."""
    try:
        content = json.loads(path.read_text())
        missing = [name for name in names if name not in content]
        if missing or not isinstance(content, dict):
            raise ValueError(f"no {', '.join(missing)} in it")
        for name, kind in names.items():
            if not isinstance(content[name], kind):
                raise ValueError(f"its {name} is {content[name]!r:.40}")
        return content
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error!s:.100}): {advice}") from error


@contextlib.contextmanager
def locked(folder):
    """Keeps other processes from training in the folder. Raises ValueError if one does already.

    The operating system holds the lock for this process, so that a killed one leaves none. A
    replacement for a lost machine waits until the file server has noticed the loss.
    """
    path = folder / "lock"
    with open(path, "a+") as file:
        patience = 100 if "TORCHELASTIC_RUN_ID" in os.environ else 0  # seconds
        while not try_lock(file):
            file.seek(0)
            owner = file.read(200)
            if patience <= 0 or socket.gethostname() in owner:
                raise ValueError(
                    f"{folder}: {owner} trains here: wait for it, or choose another --out; if it "
                    f"is gone, delete the file `lock` in it.{slurm_hint()}")
            patience -= 5
            time.sleep(5)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def try_lock(file):
    """Whether this process got the lock on an open file, or the file system has no locks."""
    if fcntl is None:
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def slurm_hint():
    """A sentence for those whom srun has given several processes without torchrun."""
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if tasks == "1" or "RANK" in os.environ:
        return ""
    return f" SLURM starts {tasks} tasks here: start one torchrun per node in their place"


def refuse_other_files(folder):
    """Raises ValueError if the folder holds files, and none of them is a run's."""
    if not folder.is_dir():
        return
    names = {path.name for path in folder.iterdir()} - {"lock"}
    if names and not names & {"recipe.json", "last.pt"}:
        raise ValueError(
            f"{folder} holds other files and no recipe.json: choose another --out, or an empty "
            "folder")


def differences(old, new):
    """The settings in which two recipes (dicts) differ, in words, if they can change a result."""
    free = ("workers", "save_every", "compile", "checkpointing")
    words = []
    for name, value in new.items():
        if name == "data" and old.get(name) != value:
            words.append(f"its videos or classes are others: {old.get(name)} there, {value} now")
        elif name not in free and old.get(name) != value:
            words.append(f"{name} is {old.get(name)!r} there, {value!r} now")
    return words


def check_same_run(folder, recipe):
    """Raises ValueError if the run folder holds a run of another recipe (a dict)."""
    path = folder / "recipe.json"
    if path.exists():
        old = read_json(path, {"protocol": str}, "delete it, and the same command writes it again")
    elif (folder / "last.pt").exists():
        old = read_state(folder / "last.pt", DAMAGED_LAST)["recipe"] | {"data": recipe["data"]}
    else:
        return
    differ = differences(json.loads(json.dumps(old)), json.loads(json.dumps(recipe)))
    if differ:
        advice = "choose another --out, or delete it"
        if len(differ) == 1 and differ[0].startswith("epochs "):
            advice = (f"choose another --out; to begin with its weights there (epochs count anew), "
                      f"add --checkpoint {folder / 'best.pt'}")
        raise ValueError(f"{folder} holds another run ({'; '.join(differ)}): {advice}")


@contextlib.contextmanager
def open_folder(folder, recipe):
    """Makes the run folder if need be, and holds it for a run of this very recipe (a dict).

    Raises ValueError if it holds another run or other files, or if another process trains there.
    """
    refuse_other_files(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be made a folder ({error.strerror}): choose another "
                         "--out") from error
    try:
        with locked(folder):
            for left in folder.glob(".*.*.[0-9]*"):  # by a write that was killed
                left.unlink()
            check_same_run(folder, recipe)
            yield
    finally:
        if not any(folder.iterdir()):  # a start that failed
            folder.rmdir()


# ---- a run ---------------------------------------------------------------------------------------

@dataclass
class Run:
    """A training run under way."""

    recipe: Recipe
    folder: Path
    training: data.TrainVideos
    validation: data.TestVideos  # one view of each video
    model: nn.Module
    wrapped: nn.Module  # the model as it is trained: under DDP, compiled
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: dict  # all of the run's state that is neither weights nor optimiser
    # data.keys_of the videos that the weights have seen: tests leave them out
    trained_on: list = dataclasses.field(default_factory=list)

    @property
    def per_epoch(self):
        """Optimiser steps in an epoch."""
        return steps_per_epoch(self.recipe, len(self.training))


def trained_before(recipe):
    """data.keys_of the videos that the checkpoint from which training starts was trained on."""
    content = open_weights(recipe.checkpoint).content if recipe.checkpoint else None
    return [str(key) for key in content.get("trained_on", ())] if isinstance(content, dict) else []


def build_start(recipe, classes, device):
    """The model of a recipe with the weights that training starts from, its classes set."""
    model = evaluation.build_model(vars(recipe), load_clip(recipe.clip, recipe.merges))
    if recipe.checkpoint:
        evaluation.load_tuned(model, recipe.checkpoint, recipe.clip, recipe.merges)
    if recipe.probe:
        model = evaluation.LinearProbe(model, len(classes))
    model.set_classes(classes)
    return model.to(device)


def check_machine(recipe, device):
    """Raises ValueError if the recipe asks for what this machine lacks."""
    if recipe.sync_bn and device.type == "cpu":
        raise ValueError("sync_bn=true needs GPUs")
    if recipe.compile:
        variable, *compilers = ("CXX", "g++", "clang++")
        if device.type == "cuda":
            variable, *compilers = ("CC", "gcc", "clang")
        candidates = [os.environ.get(variable, ""), *compilers]
        if not any(shutil.which(name) for name in candidates):
            raise ValueError(
                f"--compile needs a compiler: install {compilers[0]}, or leave the flag out")


def check_progress(progress, per_epoch):
    """Raises ValueError, TypeError or KeyError if a run's progress cannot be what it should be."""
    history, step = progress["history"], progress["step"]
    for number, line in enumerate(history, 1):
        numbers = line["loss"] + line["seconds"] + line.get("top1", 0.0)
        names = all(isinstance(name, str) for name in line["bad"])
        if line["epoch"] != number or not math.isfinite(numbers) or not names:
            raise ValueError(f"odd history: {line!s:.100}")
    begun = step - len(history) * per_epoch
    sums = math.fsum(progress["sums"])
    if not (0 <= begun <= per_epoch and math.isfinite(sums) and len(progress["sums"]) == 3):
        raise ValueError(f"odd progress: step {step}, {len(history)} epochs, sums of {sums}")
    if not progress["seconds"] >= 0 or not all(isinstance(name, str) for name in progress["bad"]):
        raise ValueError("odd progress: seconds or bad")


def load_last(folder, model, optimizer, scaler, per_epoch):
    """Loads folder/last.pt into all three; returns the run's progress. Raises ValueError."""
    path = folder / "last.pt"
    state = read_state(path, DAMAGED_LAST)
    try:
        check_progress(state["progress"], per_epoch)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not of this run ({error!s:.100}): {DAMAGED_LAST}") from error
    tested = [line["epoch"] for line in state["progress"]["history"] if "top1" in line]
    if tested and not (folder / "best.pt").exists():
        raise ValueError(f"{folder / 'best.pt'} is missing: put it back, {INSTEAD_OF_BEST}")
    return state["progress"]


def wrap(model, recipe):
    """The model as it is trained: under DDP if there are several processes, compiled if asked."""
    if recipe.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, Block):
            module.checkpointing = recipe.checkpointing
    _, world = data.rank_and_world()
    if world > 1:
        model = DistributedDataParallel(model, broadcast_buffers=False)
    if recipe.compile:
        model = torch.compile(model)
    return model


def start(recipe, folder, train_videos, validation_videos, device):
    """A Run at its beginning, or where folder/last.pt left it."""
    torch.manual_seed(recipe.seed)
    check_machine(recipe, device)
    model = data.node_leader_first(lambda: build_start(recipe, train_videos.classes, device))
    groups = parameter_groups(model, recipe)
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98), eps=1e-8)
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
    progress = {"step": 0, "sums": [0.0] * 3, "bad": [], "seconds": 0.0, "history": []}
    if (folder / "last.pt").exists():
        per_epoch = steps_per_epoch(recipe, len(train_videos.paths))
        progress = load_last(folder, model, optimizer, scaler, per_epoch)
    one_view = evaluation.eval_views(vars(recipe) | {"clips": 1, "crops": 1}, model)
    training = data.TrainVideos(
        train_videos, one_view, recipe.seed, recipe.augmentation(), recipe.keep_decoded)
    validation = data.TestVideos(validation_videos, one_view, recipe.keep_decoded)
    return Run(recipe, folder, training, validation, model, wrap(model, recipe), optimizer, scaler,
               progress)


def model_content(run):
    """What last.pt and best.pt both hold: all that it takes to use the model."""
    return {
        "recipe": vars(run.recipe),
        "classes": list(run.training.video_list.classes),
        "model": run.model.state_dict(),
        "clip": clip_facts(run.model.clip),
    }


def save_run(run):
    """Writes the whole state, from which the run goes on bit by bit, to folder/last.pt."""
    _, world = data.rank_and_world()
    if world > 1:  # batch norm's running statistics differ between processes: keep their mean
        for buffer in run.model.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer.div_(world))
    state = model_content(run) | {
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "progress": run.progress,
    }
    data.on_rank_zero(lambda: save(run.folder / "last.pt", state))


# ---- the loop ------------------------------------------------------------------------------------

@contextlib.contextmanager
def sigterm_noted():
    """Within it, SIGTERM (a scheduler's warning) only adds its time to the list that it yields.

    One that comes seconds after the first ends the process: somebody insists. A thread of its own
    sees to that, since Python runs no handler while the main thread waits for other processes.
    """
    times = []
    inside, outside = socket.socketpair()
    outside.setblocking(False)

    def watch():
        first = None
        while number := inside.recv(1):  # b"" when the other end is closed
            if number[0] == signal.SIGTERM:
                first = first or time.monotonic()
                if time.monotonic() - first > 3:  # sooner it is an echo: torchrun passes on its own
                    os._exit(143)

    threading.Thread(target=watch, daemon=True).start()
    before = signal.signal(signal.SIGTERM, lambda *_: times.append(time.monotonic()))
    waking = signal.set_wakeup_fd(outside.fileno(), warn_on_full_buffer=False)
    try:
        yield times
    finally:
        signal.set_wakeup_fd(waking)
        signal.signal(signal.SIGTERM, before)
        outside.close()


def draw_mixing(recipe, micro_batch, size):
    """(n,R,R): how each pair of neighbours in a micro-batch is mixed, see data.mix_draw.

    It is drawn from (seed, epoch, first video of the pair).
    """
    own = []
    for epoch, video, _ in micro_batch[::2]:
        rng = np.random.default_rng([recipe.seed, epoch, video, 1])
        own.append(data.mix_draw(rng, size, recipe.mixup, recipe.cutmix, recipe.switch))
    return torch.stack(own)


def forward_sums(run, clips, labels, weights, own):
    """The forward pass of a micro-batch: (3,) sums over its videos of (loss, auxiliary loss, 1).

    clips (b,T,3,R,R) uint8, labels (b,), weights (b,) 0 or 1; own: see draw_mixing.
    """
    recipe = run.recipe
    device = evaluation.device_of(run.model)
    weights = torch.as_tensor(weights, dtype=torch.float32, device=device)
    clips = torch.as_tensor(clips).to(device, non_blocking=True)
    video = data.normalise(clips, recipe.pixels)
    classes = len(run.training.video_list.classes)
    labels = torch.as_tensor(labels, device=device)
    targets = data.soft_targets(labels, classes, recipe.smoothing)  # (b,C)
    video, targets = data.mix_pairs(video, targets, own)
    with evaluation.autocast(device, recipe.precision):
        logits, aux = run.wrapped(video)  # (b,C), scalar
    losses = -(targets * logits.float().log_softmax(dim=-1)).sum(dim=-1)  # (b,)
    count = weights.sum()
    return torch.stack([weights @ losses, count * aux.float(), count])


def add_gradients(run, loader, micro_batch, videos, once):
    """Reads the next micro-batch and adds its gradients to the weights'.

    `videos` is the number of videos in the whole step, over all processes; `once` is the step's
    TextOnce. Returns the sums over this process's videos of (loss, auxiliary loss, 1), and the
    reading errors.
    """
    _, world = data.rank_and_world()
    clips, labels, weights, errors = next(loader)
    if clips is None:
        raise ValueError("ten training videos in a row cannot be read: " + "; ".join(errors))
    own = draw_mixing(run.recipe, micro_batch, run.training.views.size)
    sync = contextlib.nullcontext()
    if world > 1 and not once.last:
        sync = run.wrapped.no_sync()  # gradients cross the network once, at the last
    with sync:
        sums = forward_sums(run, clips, labels, weights, own)
        loss = sums[:2].sum() * world / videos  # DDP takes the mean over processes
        once.backward(run.scaler.scale(loss))
    return sums.detach(), errors


def train_step(run, loader, micro_batches, videos):
    """One optimiser step over this process's micro-batches, see epoch_batches, read by the loader.

    The gradient is that of the mean loss over the step's `videos` (their number, over all
    processes), however processes and micro-batches divide them. The text tower runs once.
    Returns the sums over this process's videos of (loss, auxiliary loss, 1), and the reading
    errors.
    """
    recipe = run.recipe
    rank, _ = data.rank_and_world()
    step = run.progress["step"]
    # dropout is seeded by the step, so that no random state has to be saved
    torch.manual_seed((recipe.seed * 1_000_003 + step) * 1024 + rank)
    sums = 0
    errors = []
    with text_once(run.model) as once:
        for i, micro_batch in enumerate(micro_batches, 1):
            once.last = i == len(micro_batches)
            part, bad = add_gradients(run, loader, micro_batch, videos, once)
            sums = sums + part
            errors += bad
    if recipe.clip_grad:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), recipe.clip_grad)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    return sums, errors


def batches_left(run):
    """Yields this process's micro-batches from the run's step to the end of its last epoch."""
    begun, done = divmod(run.progress["step"], run.per_epoch)
    for epoch in range(begun, run.recipe.epochs):
        steps = epoch_batches(run.recipe, len(run.training), epoch, *data.rank_and_world())
        for parts in steps[done:]:
            yield from parts
        done = 0


def train_epoch(run, loader, bar):
    """The rest of the current epoch, saved on the way and at its end.

    loader: an iterator over the batches of batches_left. Returns whether SIGTERM has stopped it.
    """
    recipe, progress = run.recipe, run.progress
    device = evaluation.device_of(run.model)
    epoch = len(progress["history"])
    done = progress["step"] - epoch * run.per_epoch
    run.wrapped.train()
    if hasattr(run.model, "set_epoch"):
        run.model.set_epoch(epoch)
    # the lists that batches_left gives the loader; none if last.pt was saved at this epoch's end
    steps = epoch_batches(recipe, len(run.training), epoch, *data.rank_and_world())[done:]
    sums, errors, began = 0, [], time.monotonic()
    with sigterm_noted() as times:
        for i, parts in enumerate(steps, done):
            set_rates(run.optimizer, recipe, progress["step"], len(run.training))
            videos = min(recipe.batch, len(run.training) - i * recipe.batch)
            step_sums, step_errors = train_step(run, loader, parts, videos)
            sums = sums + step_sums
            errors += step_errors
            progress["step"] += 1
            bar.update()
            stop = data.any_process(bool(times), device)  # all leave after the same step
            last = i == run.per_epoch - 1
            if stop or last or progress["step"] % recipe.save_every == 0:
                add_up(run, sums.tolist(), errors, time.monotonic() - began)
                save_run(run)
                sums, errors, began = 0, [], time.monotonic()
            if stop:
                return True
    return data.any_process(bool(times), device)  # one that came during the last save


def add_up(run, sums, errors, seconds):
    """Adds what all processes have seen since the last time to the progress.

    Raises ValueError to stop the run.
    """
    progress = run.progress
    progress["sums"] = np.sum([progress["sums"], *data.gather([sums])], axis=0).tolist()
    progress["bad"] = sorted({*progress["bad"], *data.gather(errors)})
    progress["seconds"] += seconds
    evaluation.stop_if_unreadable(progress["bad"], len(run.training))
    if not math.isfinite(progress["sums"][0]):
        precision = run.recipe.precision
        advice = "lower lr"
        if precision != "fp32":
            advice += f", or try precision={'bf16' if precision == 'fp16' else 'fp32'}"
        raise ValueError(f"the loss is not finite at step {progress['step']} (precision="
                         f"{precision}): {advice}")


def finish_epoch(run):
    """Validates, and writes the epoch's line to the log; the best epoch so far also to best.pt.

    last.pt holds the epoch's steps already: a run killed here resumes here.
    """
    recipe, progress = run.recipe, run.progress
    history = progress["history"]
    epoch = len(history) + 1
    loss, aux, videos = progress["sums"]
    line = {
        "epoch": epoch,
        "step": progress["step"],
        "lr": rate_of_step(recipe, progress["step"] - 1, len(run.training)),
        "loss": loss / videos,
        "aux_loss": aux / videos,
        "seconds": round(progress["seconds"], 2),
        "bad": progress["bad"],
    }
    best = max((old["top1"] for old in history if "top1" in old), default=-1)
    tested = epoch % recipe.eval_every == 0 or epoch == recipe.epochs
    if tested:
        line["top1"] = scores_of(run, run.validation)["top1"]
    history.append(line)
    progress["sums"], progress["bad"] = [0.0] * 3, []
    keep = tested and (line["top1"] > best or not recipe.keep_best)
    data.on_rank_zero(lambda: write_epoch(run, line, keep))  # the others wait for a whole best.pt
    if epoch == recipe.epochs:
        save_run(run)


def write_epoch(run, line, keep):
    """Writes log and curves, best.pt if `keep`, and a line on the screen if it validated."""
    epoch, history = line["epoch"], run.progress["history"]
    if keep:
        best = model_content(run) | {"trained_on": run.trained_on, "epoch": epoch}
        save(run.folder / "best.pt", best)
    lines = "".join(json.dumps(old) + "\n" for old in history)
    evaluation.write_text(run.folder / "log.jsonl", lines)
    evaluation.draw_curves(history, run.folder / "curves.png")
    if "top1" in line:
        tqdm.write(f"epoch {epoch} of {run.recipe.epochs}: loss {line['loss']:.4f}, "
                   f"validation top-1 {line['top1']:.1%}", file=sys.stderr)


def train_epochs(run):
    """Trains from where the run is to its last epoch; at SIGTERM saves, says so and ends."""
    rank, _ = data.rank_and_world()
    progress, epochs = run.progress, run.recipe.epochs
    stopped = False
    loader = iter(run.training.loader(batches_left(run), run.recipe.workers))
    with data.progress_bar(total=epochs * run.per_epoch, initial=progress["step"],
                           desc=run.recipe.method, unit="step") as bar:
        while len(progress["history"]) < epochs and not stopped:
            stopped = train_epoch(run, loader, bar)
            if not stopped:
                finish_epoch(run)
    if not stopped:
        return
    if rank == 0:
        print(f"stopped by SIGTERM after step {progress['step']}; the same command goes on",
              file=sys.stderr)
    # 143 is a shell's 128 + 15. torchrun fails by itself if it was warned, but would start a
    # worker again that ends in anything but 0
    sys.exit(0 if "TORCHELASTIC_RUN_ID" in os.environ else 143)


# ---- tests ---------------------------------------------------------------------------------------

def scores_of(run, videos, picture=None):
    """The scores of the model as it stands on a data.TestVideos.

    Its classes are the training's again afterwards.
    """
    recipe = run.recipe
    scores = evaluation.evaluate(
        run.model, videos, recipe.micro_batch, recipe.workers, recipe.precision, picture=picture)
    run.model.set_classes(run.training.video_list.classes)
    return scores


def transfer(run, root):
    """Zero-shot tests of a model that was trained on one of the known data sets.

    Returns {dataset: {"plain" or "ensembled": {test set: scores}}}; a dataset whose folder does not
    lie beside the training's has {"missing": reason}. The ensemble is 0.7 of the tuned weights and
    0.3 of CLIP's [paper].
    """
    recipe, model = run.recipe, run.model
    base = data.node_leader_first(
        lambda: evaluation.build_model(vars(recipe), load_clip(recipe.clip, recipe.merges)))
    tuned = {name: value.clone() for name, value in model.state_dict().items()}
    ensembled = evaluation.ensemble(base.state_dict(), tuned, 0.7)
    labels = "llm" if recipe.labels == "llm" else ""
    test_views = evaluation.eval_views(vars(recipe), model)
    results = {}
    for dataset in TRANSFER:
        if dataset == recipe.dataset:
            continue
        try:
            tests = data.load_tests(dataset, root.parent / dataset, labels=labels)
        except ValueError as error:
            results[dataset] = {"missing": str(error)}
            continue
        results[dataset] = {}
        for kind, state in (("plain", tuned), ("ensembled", ensembled)):
            model.load_state_dict(state)
            results[dataset][kind] = {
                name: scores_of(run, data.TestVideos(videos, test_views))
                for name, videos in tests.items()}
    return results


def lines_of(words):
    """Words as indented lines of text."""
    return textwrap.fill(" ".join(words), 98, initial_indent="  ", subsequent_indent="  ",
                         break_on_hyphens=False, break_long_words=False)


def announce(run, train_videos, tests, all_tests):
    """Prints what a run begins with. Of all_tests, `tests` are those that the model can do."""
    device = evaluation.device_of(run.model)
    print(header_of(run.recipe, run.folder, train_videos, tests, device), file=sys.stderr)
    evaluation.print_notes(all_tests, {"training": train_videos} | tests)
    if run.progress["step"]:
        print(f"  resumed at step {run.progress['step']}", file=sys.stderr)


def header_of(recipe, folder, train_videos, tests, device):
    """The lines of text about a run's folder, data and device, and its settings.

    Settings that have their default values are left out.
    """
    sizes = ", ".join(f"{name} of {len(videos.paths)}" for name, videos in tests.items())
    classes, count = len(train_videos.classes), len(train_videos.paths)
    text = (f"{folder}: {recipe.method} on {recipe.dataset}, {count} training videos of {classes} "
            f"classes; tests: {sizes}; on {evaluation.device_name(device)}")
    known = data.KNOWN.get(recipe.dataset)
    expected = known.classes if known else classes
    if classes != expected and recipe.protocol != "base2novel":
        text += (f" ({recipe.dataset} has {expected} classes: is this its folder, with its "
                 "annotations?)")
    settings = {name: getattr(recipe, name) for name, (_, default) in knobs(Recipe).items()
                if getattr(recipe, name) != default}
    words = [f"{name}={value}".replace(" ", "") for name, value in settings.items()]
    words += [f"{name}={value}" for name, value in recipe.model.items()]
    lines = [text, lines_of(words)]
    if train_videos.source:
        lines.append(f"  training list: {data.quoted(train_videos.source)}")
    if recipe.dataset == "folder" and recipe.protocol != "base2novel":
        lines.append(f"  classes: {data.some(train_videos.classes, 8)}")
    if recipe.dataset not in data.KNOWN and recipe.protocol == "zeroshot":
        lines.append("  the tests below are on classes of the training: no zero-shot numbers")
    if recipe.protocol == "base2novel":
        for half in ("base", "novel"):
            lines.append(lines_of([f"{half} classes:", ", ".join(tests[half].classes)]))
    updates = recipe.epochs * steps_per_epoch(recipe, count)
    if updates < FEW_UPDATES:
        lines.append(f"  updates in all: {updates}, which teach little; more epochs or a smaller "
                     "batch make more")
    return "\n".join(lines)


def read_best(run):
    """Loads folder/best.pt into the model and returns its content. Raises ValueError."""
    path = run.folder / "best.pt"
    advice = f"put the right one there, {INSTEAD_OF_BEST}"
    best = read_state(path, advice)
    try:
        run.model.load_state_dict(best["model"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is of another model ({error!s:.80}): {advice}") from error
    return best


def test_best(run, tests, root):
    """The results of a trained run, from its best.pt, as results.json has them."""
    recipe, history = run.recipe, run.progress["history"]
    best = read_best(run)
    results = {
        "recipe": vars(recipe),
        "train_videos": len(run.training),
        "epoch": best["epoch"] if "epoch" in best else len(history),  # the one that is tested
        "tests": {},
        "transfer": {},
        "bad": sorted({error for line in history for error in line["bad"]}),
    }
    test_views = evaluation.eval_views(vars(recipe), run.model)
    picture = run.folder / "confusion.png"
    for name, videos in tests.items():
        if results["tests"]:  # not the first
            picture = run.folder / f"confusion-{name}.png"
        videos = data.TestVideos(videos, test_views, recipe.keep_decoded)
        results["tests"][name] = scores_of(run, videos, picture)
    results["seconds"] = round(history[-1]["seconds"], 1)
    if recipe.protocol == "zeroshot" and recipe.dataset in data.KNOWN:
        results["transfer"] = transfer(run, root)
    return results


# what results.json must hold
RESULTS = {"recipe": dict, "tests": dict, "transfer": dict, "seconds": (int, float)}


def fit_recipe(recipe, count, device):
    """The recipe with what depends on the device and on the number of training videos."""
    batch = recipe.batch
    if batch == 0:
        batch = 2 * min(max(count // 16, 2), 32)
    precision = evaluation.resolve_precision(device, recipe.precision)
    return dataclasses.replace(recipe, batch=batch, precision=precision)


def choose_validation(recipe, tests):
    """The name of the test set on which the epoch is chosen.

    The first one, as in the papers; of one's own folders val/, if it is there.
    """
    if recipe.dataset == "folder" and "val" in tests:
        return "val"
    return next(iter(tests))


# settings in which processes may differ: machines may have their own copies of files
OWN_PATHS = ("clip", "merges", "checkpoint", "train_list", "test_list", "labels", "base", "workers")


def run_recipe(recipe, root, folder, device):
    """Trains by a recipe, tests on every test set, writes results.json and returns its content."""
    train_videos, tests = data.load_protocol(
        recipe.protocol, recipe.dataset, root, recipe.shots, recipe.seed, recipe.train_list,
        recipe.test_list, recipe.labels, recipe.upstream_labels, recipe.base)
    trained = trained_before(recipe)
    tests = data.without_trained(tests, trained)
    if len(train_videos.classes) < 2 and recipe.protocol != "base2novel":
        raise ValueError(f"{root}: a single class, {data.some(train_videos.classes)}: there is "
                         "nothing to tell apart; expected <class>/<video> folders")
    described = evaluation.describe_data([train_videos, *tests.values()])
    data.check_same_data(described)  # before anything else: else processes wait for one another
    settings = {name: str(value) for name, value in vars(recipe).items() if name not in OWN_PATHS}
    data.check_same("settings", settings, "give every machine the same command")
    all_tests = tests
    if recipe.protocol != "base2novel":  # which needs both halves
        tests = evaluation.known_tests(vars(recipe), train_videos.classes, tests)
    recipe = fit_recipe(recipe, len(train_videos.paths), device)
    described = vars(recipe) | {"data": described}
    with contextlib.ExitStack() as stack:
        data.on_rank_zero(lambda: stack.enter_context(open_folder(folder, described)))
        path = folder / "results.json"
        if path.exists():
            return read_json(path, RESULTS, "delete it, and the same command makes it again")
        validation = choose_validation(recipe, tests)
        run = start(recipe, folder, train_videos, tests[validation], device)
        for videos in (*tests.values(), train_videos):  # refuse names now, not after the training
            run.model.set_classes(videos.classes)
        run.trained_on = trained  # and, where tests may be drawn from the same videos, these:
        if recipe.protocol in data.FEW_SHOT or recipe.dataset == "folder":
            run.trained_on = trained + data.keys_of(train_videos)
        rank, _ = data.rank_and_world()
        if rank == 0:  # only now: a start that fails leaves no trace
            evaluation.write_json(folder / "recipe.json", described)
            announce(run, train_videos, tests, all_tests)
        train_epochs(run)
        results = test_best(run, tests, root) | {"validation": validation}
        if rank == 0:
            evaluation.write_json(path, results)
        return results


# ---- the miniature -------------------------------------------------------------------------------

PREFIX = "a pic"  # M = 4 byte tokens before every caption and, later, every class name
MINIATURE = dict(  # teaches a tiny CLIP the order of frames in a minute
    frames=8, short_side=32, clips=1, shots=8, flip=0.0, scales=(1.0,), jitter=1.0, grey=0.0,
    shift=0.125, strengths=(0.15, 0.15, 0.0, 0.0), smoothing=0.0, mixup=0.0, cutmix=0.0, epochs=20,
    warmup_epochs=1.0, lr=5e-4, lr_min=0.0, new_lr=6.0, position_lr=40.0, schedule="continuous",
    drop_last=False, batch=16, micro_batch=16, weight_decay=0.05, position_decay=0.0, clip_grad=1.0,
    eval_every=5, save_every=100, keep_best=False, workers=0, keep_decoded=True)
MINIATURE_METHODS = {  # what a method changes there; one without a row changes nothing
    "vifi": dict(model=dict(prompt=PREFIX)),
    "tc": dict(model=dict(prompt=PREFIX, positions="joint", context_tokens=16)),
    "ila": dict(lr=3e-4, new_lr=10.0, position_lr=66.0, model=dict(align_weight=0.01)),
}
# the tiny CLIP, in OpenAI's layout
WIDTH, PATCH, VISION_LAYERS, TEXT_LAYERS, VOCABULARY, CONTEXT = 128, 8, 4, 3, 514, 32


def patch_positions(side, D):
    """(side*side, D): sines and cosines of y and of x, D/4 each, at rates from 1 to 1/10."""
    rates = 10 ** -(torch.arange(D // 4) / (D // 4))  # [ours] not to 1/10000: a side has 4 patches
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    y = y.flatten()[:, None] * rates  # (side*side, D/4)
    x = x.flatten()[:, None] * rates
    return torch.cat([torch.sin(y), torch.cos(y), torch.sin(x), torch.cos(x)], dim=1)


def block_shapes(block, D, layers):
    """{name: (shape, standard deviation)} of the matrices and biases of one transformer block."""
    out = (2 * layers * D) ** -0.5
    matrices = {
        "attn.in_proj_": ((3 * D, D), D ** -0.5),
        "mlp.c_fc.": ((4 * D, D), (2 * D) ** -0.5),
        "attn.out_proj.": ((D, D), out),
        "mlp.c_proj.": ((D, 4 * D), out),
    }
    shapes = {}
    for name, (shape, std) in matrices.items():
        shapes[f"{block}.{name}weight"] = (shape, std)
        shapes[f"{block}.{name}bias"] = (shape[:1], 0)
    return shapes


def tiny_state(seed):
    """A random state_dict of the tiny CLIP; scales are OpenAI's except for the towers' inputs.

    [ours] Pixels enter softly beside their positions, and letters loudly; otherwise some seeds do
    not learn where a shape is.
    """
    D = WIDTH
    shapes = {
        "visual.class_embedding": ((D,), D ** -0.5),
        "visual.proj": ((D, D), D ** -0.5),
        "visual.conv1.weight": ((D, 3, PATCH, PATCH), 0.015),
        "text_projection": ((D, D), D ** -0.5),
        "token_embedding.weight": ((VOCABULARY, D), 0.5),
        "positional_embedding": ((CONTEXT, D), 0.2),
    }
    norms = ["visual.ln_pre", "visual.ln_post", "ln_final"]
    towers = {"visual.transformer": VISION_LAYERS, "transformer": TEXT_LAYERS}
    for tower, layers in towers.items():
        for i in range(layers):
            block = f"{tower}.resblocks.{i}"
            norms += [f"{block}.ln_1", f"{block}.ln_2"]
            shapes |= block_shapes(block, D, layers)
    rng = torch.Generator().manual_seed(seed)
    state = {}
    for name, (shape, std) in shapes.items():
        state[name] = std * torch.randn(shape, generator=rng)
    for norm in norms:
        state[f"{norm}.weight"] = torch.ones(D)
        state[f"{norm}.bias"] = torch.zeros(D)
    positions = 0.3 * patch_positions(data.SIDE // PATCH, D)
    state["visual.positional_embedding"] = F.pad(positions, (0, 0, 1, 0))  # (N,D): class token 0
    state["logit_scale"] = torch.tensor(math.log(20))
    return state


def random_caption(rng, truth):
    """A caption of a picture: each of its attributes with p = 0.3, at least one; None if not named.

    truth: (size, colour, place) as words.
    """
    named = rng.random(3) < 0.3
    named[rng.integers(3)] |= not named.any()
    return tuple(word if name else None for word, name in zip(truth, named))


def is_true(caption, truth):
    """Whether every attribute that the caption names is the picture's."""
    return all(word in (None, fact) for word, fact in zip(caption, truth))


def captioned_stills(rng, batch):
    """Random pictures uint8 (batch,3,32,32), C captions, and which fits which, bool (batch,C).

    No caption comes twice. [ours] Shapes are never named: 32 pixels teach them last, and their long
    words slow the rest down.
    """
    pictures, truths = [], []
    for _ in range(batch):
        picture, (size, colour, _, place) = data.render_still(rng)
        pictures.append(picture)
        truths.append((size, colour, place))
    captions = {random_caption(rng, truth) for truth in truths}
    captions = sorted(captions, key=str)  # a set's order changes from run to run
    true = [[is_true(caption, truth) for caption in captions] for truth in truths]
    texts = []
    for caption in captions:
        words = [word for word in caption if word]
        texts.append(" ".join([PREFIX, *words]) + ".")
    pictures = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return pictures, texts, torch.tensor(true)


def contrastive_loss(clip, pictures, texts, true):
    """CLIP's loss in both directions, with targets uniform over all that is true of one another.

    pictures uint8 (B,3,R,R); texts: C captions; true: bool (B,C).
    """
    device = clip.logit_scale.device
    pictures = data.normalise(pictures.to(device), "clip")
    image = F.normalize(clip.encode_image(pictures), dim=-1)  # (B,E)
    text = F.normalize(clip.encode_text(clip.tokenize(texts)), dim=-1)  # (C,E)
    logits = clip.logit_scale.exp() * image @ text.T  # (B,C)
    true = true.to(image)
    of_images = F.cross_entropy(logits, true / true.sum(1, True))
    of_texts = F.cross_entropy(logits.T, (true / true.sum(0)).T)
    return (of_images + of_texts) / 2


def pretrain_tiny_clip(path, seed=0, steps=250, batch=64, lr=6e-4, device="cpu"):
    """Pretrains the tiny CLIP and saves its state_dict at `path`, whole or not at all.

    The logit scale stays at 20.
    """
    clip = load_clip(tiny_state(seed)).to(device)
    rng = np.random.default_rng(seed)
    clip.logit_scale.requires_grad_(False)
    learned = [p for p in clip.parameters() if p.requires_grad]
    matrices = [p for p in learned if p.dim() >= 2]
    vectors = [p for p in learned if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    for step in tqdm(range(steps), desc="pretraining a tiny CLIP", unit="step"):
        loss = contrastive_loss(clip, *captioned_stills(rng, batch))
        warmup = min(1, (step + 1) / (0.05 * steps))
        share = max(0, (step / steps - 0.05) / 0.95)
        for group in optimizer.param_groups:
            group["lr"] = lr * warmup * (1 + math.cos(math.pi * share)) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
    save(path, {name: value.cpu() for name, value in clip.state_dict().items()})


def prepare_miniature(root, device):
    """Renders the world and pretrains its CLIP, root/clip.pt, if that is not done yet.

    One process does it, on whatever node; others wait. What a killed one left is deleted.
    """
    root = root.resolve()
    clip = root / "clip.pt"
    if data.holds_shapes(root) and clip.is_file():
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    lock = root.with_name(f".{root.name}.lock")
    with open(lock, "a") as file:
        if not try_lock(file):
            print(f"waiting for the process that prepares {root}", file=sys.stderr)
            while not try_lock(file):
                time.sleep(1)
        for killed in root.parent.glob(f".{glob.escape(root.name)}.unfinished-*"):
            shutil.rmtree(killed)
        try:
            data.write_shapes(root, seed=0)
            if not clip.is_file():
                pretrain_tiny_clip(clip, device=device)
        finally:
            lock.unlink(missing_ok=True)  # whoever waits for it finds all done


def draw_miniature(root, results, path):
    """Draws a clip and its reversal as the first run of each method sees them.

    Linear heads are left out: they cannot be asked about two classes only.
    """
    names = ("red to blue", "blue to red")
    models = {}
    for folder, result in results.items():
        if evaluation.has_linear_head(result["recipe"]):
            continue
        title = evaluation.METHODS[result["recipe"]["method"]].title
        if title not in models:
            models[title], recipe = evaluation.load_model(folder / "best.pt")
            views = evaluation.eval_views(recipe, models[title])
    if models:
        clip = data.read_test(root / "base" / names[0] / "000.mp4", views)[0]
        evaluation.draw_reversal(models, clip, names, path)
        print(f"drawn: {path}", file=sys.stderr)


# ---- from flags to recipes -----------------------------------------------------------------------

def parse_value(name, text, kind, default):
    """`text` as a value of a setting's type. Raises ValueError that names the setting."""
    def refuse(expected, reason=None):
        raise ValueError(
            f"--set {name}={text}: {name} takes {expected}; its default is {default}") from reason

    if kind is bool:
        if text not in ("true", "false"):
            refuse("true or false")
        return text == "true"
    if kind is str:
        return text
    number, expected = kind, "a whole number" if kind is int else "a number"
    if kind is tuple:
        fractions = any(isinstance(part, float) for part in default or ())
        number, expected = float if fractions else int, "numbers with commas"
    try:
        values = tuple(number(part) for part in text.split(","))
    except ValueError as error:
        refuse(expected, error)
    if kind is tuple:
        return values
    if len(values) > 1:
        refuse(expected)
    return values[0]


def unknown_setting(setting, method, known):
    """The ValueError for a setting that neither the recipe nor the method has."""
    name = setting.partition("=")[0]
    owners = [other for other, row in evaluation.METHODS.items() if name in knobs(row.config)]
    like = difflib.get_close_matches(name, known, 1)
    hint = ""
    if owners:
        hint = f", --method {owners[0]} has"
    elif like:
        hint = f"; did you mean {like[0]}?"
    return ValueError(
        f"--set {setting}: {method} has no {name!r}{hint}; known are {', '.join(known)}")


def parse_settings(method, settings):
    """({name: value} of the recipe, the same of the model) from overrides `key=value`."""
    run, config = knobs(Recipe), knobs(evaluation.METHODS[method].config)
    of_run, of_model = {}, {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting}: write it as key=value, without spaces")
        if name in run:
            of_run[name] = parse_value(name, text, *run[name])
        elif name in config:
            of_model[name] = parse_value(name, text, *config[name])
        else:
            raise unknown_setting(setting, method, [*run, *config])
    return of_run, of_model


def table_values(protocol, method, dataset, host=None):
    """The settings that the tables of recipes give a run, "model" among them. `host`: ILA's."""
    values = {"model": {}} | PROTOCOL_RECIPES[protocol] | METHOD_RECIPES[method]
    if (protocol, method, dataset) in DATASET_RECIPES:
        values |= DATASET_RECIPES[protocol, method, dataset]
    if host in HOST_RECIPES and dataset in data.KNOWN:  # else few videos, which need their own
        values |= HOST_RECIPES[host]
    if dataset == "folder":
        values |= FOLDER
    if dataset == "shapes":
        values |= MINIATURE
        if method in MINIATURE_METHODS:
            values |= MINIATURE_METHODS[method]
    if dataset in data.KNOWN and not data.KNOWN[dataset].flips:
        values["flip"] = 0.0
    return values


def resolve_recipe(protocol, method, dataset, settings=(), defaults=None, **flags):
    """The recipe of a run: the tables' values, then `defaults`, then flags, then overrides.

    settings: overrides `key=value`, of the recipe or of the model's configuration. flags: their
    values by name; an empty one was not given. Raises ValueError.
    """
    overrides, model_overrides = parse_settings(method, settings)
    flags = {name: value for name, value in flags.items() if value}
    for name, value in flags.items():
        if overrides.get(name, value) != value:
            raise ValueError(f"--{name} {value} and --set {name}={overrides[name]} contradict each "
                             "other: give one of them")
    values = table_values(protocol, method, dataset, model_overrides.get("host"))
    defaults = defaults or {"model": {}}
    model = values["model"] | defaults["model"]
    if overrides.get("probe"):
        values |= PROBE
        model.pop("num_classes", None)
    if "labels" in overrides and "text_length" in knobs(evaluation.METHODS[method].config):
        model = {"text_length": 77} | model  # described classes are longer than names
    if overrides.get("workers"):
        values["keep_decoded"] = False  # unless it is asked for, which Recipe refuses
    values |= defaults | flags | overrides
    values["model"] = model | model_overrides
    if values.get("merges") and not os.path.isfile(values["merges"]):
        raise ValueError(f"merges={values['merges']}: no such file")
    return Recipe(protocol, method, dataset, **values)


def runs_of(protocol, settings):
    """{name: settings} of the runs that a command asks for: "", "-shots=2" and the like.

    That is one, or one for each value if there are several, as in `shots=2,4` or `seed=1,2,3`.
    base2novel is the mean of three seeds [paper] unless told otherwise.
    """
    swept, others = {}, []
    for setting in settings:
        name, equals, text = setting.partition("=")
        if equals and name in SWEPT:
            swept[name] = text.split(",")
        else:
            others.append(setting)
    if protocol == "base2novel" and "seed" not in swept:
        swept["seed"] = ["1", "2", "3"]
    choices = [[f"{name}={value}" for value in values] for name, values in swept.items()]
    runs = {}
    for choice in itertools.product(*choices):
        runs["".join(f"-{setting}" for setting in choice)] = [*others, *choice]
    return runs


def checkpoint_defaults(args):
    """(method or None, settings) of a --checkpoint of ours: a run from it sees videos alike."""
    asked = dict(setting.partition("=")[::2] for setting in args.set)
    path = args.checkpoint or asked.get("checkpoint")
    content = open_weights(path).content if path else None
    if not isinstance(content, dict) or not isinstance(content.get("recipe"), dict):
        return None, {"model": {}}
    recipe = content["recipe"]
    names = ("clip", "merges", "frames", "sampling", "pixels", "short_side", "model")
    return recipe["method"], {name: recipe[name] for name in names}


def recipes_of(args, dataset, root, out):
    """{run folder: recipe} of all that a command asks for.

    The folder is `out` itself if --out was given and there is a single run.
    """
    tuned, defaults = checkpoint_defaults(args)
    methods = [args.method or tuned or "tc"]
    if dataset == "shapes" and not args.method and not tuned:
        methods = ["vifi", "tc"]
    if tuned not in methods:  # if it is of another method, load_tuned says so
        defaults = {"model": {}}
    if dataset == "shapes":
        defaults["clip"] = str(root / "clip.pt")
    flags = ("clip", "merges", "checkpoint", "upstream_labels", "compile")
    flags = {name: getattr(args, name) for name in flags}
    recipes = {}
    for method in methods:
        for name, settings in runs_of(args.protocol, args.set).items():
            recipe = resolve_recipe(args.protocol, method, dataset, settings, defaults, **flags)
            recipes[out / f"{method}{name}"] = recipe
    if args.out and len(recipes) == 1:
        return {out: recipe for recipe in recipes.values()}
    if (out / "recipe.json").exists():
        raise ValueError(f"{out} is the folder of a single run: choose another --out")
    return recipes


def check_places(dataset, root, out, folders):
    """Raises ValueError if runs would be written among videos or other files."""
    for folder in folders:
        refuse_other_files(folder)
    if dataset == "folder" and root.resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(f"--out {out} lies inside the videos' folder {root}, where folders are "
                         "classes: choose another")
    for video in data.videos_below(out)[:1] if out.is_dir() else ():
        raise ValueError(f"--out {out} holds videos ({os.path.basename(video)}): choose another, "
                         "or were --data and --out mixed up?")


# ---- tables --------------------------------------------------------------------------------------

def percent(scores, key="top1"):
    return [100 * score[key] for score in scores]


def own_columns(result):
    """{column: [values in %]} of a run's own test sets, as the papers' tables have them."""
    recipe, tests = result["recipe"], result["tests"]
    first = list(tests.values())[:1]
    single = len(tests) == 1 and "pairs" not in first[0]
    if recipe["protocol"] == "base2novel":
        return {name: percent([tests[name]]) for name in ("base", "novel")}
    if recipe["protocol"] == "supervised" and single:
        return {"top-1": percent(first), "top-5": percent(first, "top5")}
    if recipe["protocol"] == "fewshot" and single:
        return {f"{recipe['shots']} shots": percent(first)}
    columns = {}
    for name, score in tests.items():
        columns[f"{name} top-1"] = percent([score])
        if "pairs" in score:
            columns[f"{name}, inside reversed pairs"] = percent([score], "pairs")
    return columns


def rows_of(result):
    """{row: {column: [values in %, several of several splits]}} of a run's results."""
    recipe = result["recipe"]
    row = recipe["method"]
    if recipe["probe"]:
        row += ", linear probe"
    rows = {row: own_columns(result)}
    for dataset, kinds in result["transfer"].items():
        if "missing" in kinds:
            continue
        for kind, sets in kinds.items():
            name = row if kind == "plain" else f"{row}, {kind}"
            rows.setdefault(name, {})[dataset] = percent(sets.values())
    rows[row]["training seconds"] = [result["seconds"]]
    return rows


def paper_row(recipe):
    """(name, {column: [top-1 in %]}) of a recipe's (a dict's) row in its paper, or None.

    The zero-shot rows are those of ensembled models.
    """
    columns = {name: [value] for name, value in evaluation.paper_numbers(recipe).items()}
    kind = ", ensembled," if recipe["protocol"] == "zeroshot" else ""
    if recipe["checkpoint"]:
        kind += ", from a Kinetics model,"
    return (f"{recipe['method']}{kind} in its paper", columns) if columns else None


def cell(values):
    """Values as text: their mean, and if there are several, +- their standard deviation."""
    if not values:
        return ""
    spread = f" +- {np.std(values):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}"


def table(results):
    """Runs' results as lines of text: a row per method, over seeds and splits, and the paper's."""
    swept = len({result["recipe"]["shots"] for result in results}) > 1
    rows = {}
    for result in results:
        shots = f"{result['recipe']['shots']} shots"
        for row, columns in rows_of(result).items():
            if swept and shots not in columns:
                row += f", {shots}"
            for column, values in columns.items():
                rows.setdefault(row, {}).setdefault(column, []).extend(values)
    for columns in rows.values():
        if "base" in columns and "novel" in columns:
            base, novel = np.mean(columns["base"]), np.mean(columns["novel"])
            columns["harmonic mean"] = [2 * base * novel / max(base + novel, 1e-9)]
        columns["training seconds"] = columns.pop("training seconds", [])  # the last column
    for result in results:
        found = paper_row(result["recipe"])
        shown = {title for columns in rows.values() for title in columns}
        if found and shown & found[1].keys():  # something of ours to compare it with
            rows[found[0]] = found[1]
    titles = list(dict.fromkeys(column for columns in rows.values() for column in columns))
    lines = [["method", *titles]]
    for row, columns in rows.items():
        lines.append([row, *(cell(columns.get(title)) for title in titles)])
    widths = [max(len(text) for text in column) for column in zip(*lines)]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths))
                     for line in lines)


# ---- the command line ----------------------------------------------------------------------------

def notes_of(name, result):
    """Lines about a run that its row in the table needs beside it."""
    recipe = result["recipe"]
    notes = [f"not tested on {dataset}: {kinds['missing']}"
             for dataset, kinds in result["transfer"].items() if "missing" in kinds]
    if recipe["keep_best"] and "validation" in result:
        chosen = result["validation"]
        note = f"{name}: epoch {result['epoch']}, the best on one view of {chosen}, was tested"
        if recipe["dataset"] == "folder" and chosen != "val":
            note += ("; it was chosen on the test videos, so the numbers flatter it: sort them "
                     "into train/, val/ and test/<class>, and val/ chooses")
        notes.append(note)
    if recipe["dataset"] == "folder" and recipe["protocol"] == "fewshot":
        sizes = [f"{scores['videos']} videos of {test}"
                 for test, scores in result["tests"].items()]
        notes.append(f"{name}: tested on {', '.join(sizes)}")
    return notes


def print_results(results, out):
    """Prints the table, notes and where the files are; of several runs writes out/results.json."""
    print(table(list(results.values())))
    notes = {}  # each once, in order
    for folder, result in results.items():
        notes |= dict.fromkeys(notes_of(folder.name, result))
    for note in notes:
        print(note)
    if len(results) > 1:
        content = {str(folder.relative_to(out)): result for folder, result in results.items()}
        evaluation.write_json(out / "results.json", content)
    folders = ", ".join(map(str, [*results][:4])) + (", ..." if len(results) > 4 else "")
    print(f"best.pt, curves and results.json are in {folders}", file=sys.stderr)


def main(args):
    device = data.start_processes()
    rank, _ = data.rank_and_world()
    dataset = args.dataset or "shapes"
    root = Path(args.data or f"data/{dataset}")
    name = root.resolve().name if dataset == "folder" else dataset
    out = Path(args.out or f"runs/{name}-{args.protocol}")
    recipes = recipes_of(args, dataset, root, out)
    check_places(dataset, root, out, recipes)
    if dataset == "shapes":
        if device.type == "cpu":
            torch.set_num_threads(1)  # more gain nothing on 32 pixels, and lose on a busy machine
        data.node_leader_first(lambda: prepare_miniature(root, device))
    results = {folder: run_recipe(recipe, root, folder, device)
               for folder, recipe in recipes.items()}
    if rank == 0:
        if dataset == "shapes":
            draw_miniature(root, results, out / "reversal.png")
        print_results(results, out)
    return 0


def describe(title, config, but=()):
    """Help on a configuration dataclass's settings, name=default and its meaning.

    Two short ones share a line. Settings in `but` are left out.
    """
    helps = {field.name: field.metadata["help"] for field in dataclasses.fields(config)
             if "help" in field.metadata}
    lines = [title]
    half = ""  # a short entry that waits for another
    for name, (kind, default) in knobs(config).items():
        if name in but:
            continue
        if kind is bool:
            default = str(default).lower()
        elif isinstance(default, tuple):
            default = ",".join(map(str, default))
        entry = f"  {name}={default}  {helps.get(name, '')}"
        if half and len(entry) <= 50:
            lines[-1] = f"{half:50}{entry[1:]}"
            half = ""
        else:
            lines.append(entry)
            half = entry if len(entry) < 50 else ""
    return "\n".join(lines)


def unknown_argument(unknown):
    """What to say of arguments that are no flags; a setting may have been taken for one."""
    name, _, value = unknown[0].lstrip("-").partition("=")
    name = name.replace("-", "_")
    if not value and len(unknown) > 1:
        value = unknown[1]
    configs = [Recipe, *(method.config for method in evaluation.METHODS.values())]
    if any(name in knobs(config) for config in configs):
        return f"{unknown[0]} is a setting: write --set {name}={value or '...'}"
    return f"unrecognized arguments: {' '.join(unknown)}"


def parse_args(arguments=None):
    title = "--set for every run (defaults where no recipe of the papers says otherwise):"
    helps = [describe(title, Recipe)]
    for name, method in evaluation.METHODS.items():
        helps.append(describe(f"--set for --method {name}:", method.config, knobs(Recipe)))
    parser = evaluation.Parser(
        description=__doc__.partition("Sections")[0], epilog="\n".join(helps),
        usage="train.py --protocol PROTOCOL [flags] [--set key=value ...]")
    flag = parser.add_argument
    flag("--protocol", choices=PROTOCOLS, help="the papers' experiment; needed")
    flag("--method", choices=evaluation.METHODS,
         help="default tc; on the miniature, vifi and tc")
    flag("--dataset",
         help=f"one of {', '.join(data.DATASETS)}; default shapes, the miniature world")
    flag("--data", metavar="DIR", help="folder of the data; default data/DATASET")
    flag("--clip", metavar="NAME",
         help="OpenAI's name or a file of the CLIP to start from; default ViT-B/16")
    flag("--merges", metavar="FILE",
         help="CLIP's BPE merges; default: the cache folder's, downloaded once")
    flag("--checkpoint", metavar="FILE",
         help="weights of this method, or a run folder, to start from; default: CLIP's")
    flag("--upstream-labels", action="store_true",
         help="HMDB-51: the published names, four swapped; default: right")
    flag("--compile", action="store_true",
         help="torch.compile the training step; default: not")
    flag("--out", metavar="DIR",
         help="run folder; default runs/DATASET-PROTOCOL/METHOD. The same command resumes")
    flag("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
         help="overrides, listed below; shots=2,4,8 or seed=1,2,3 are several runs; default: none")
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(unknown_argument(unknown))
    evaluation.check_flags(parser, args)
    if not args.protocol:
        parser.error(f"--protocol is needed, one of {', '.join(PROTOCOLS)}")
    return args


if __name__ == "__main__":
    sys.exit(evaluation.run_command(main, parse_args))
