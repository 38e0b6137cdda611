"""Trains TC-CLIP, ILA or ViFi-CLIP by the papers' protocols, on one process or many.

    python train.py --protocol fewshot                   # the miniature world: no download, minutes
    torchrun --nproc_per_node=4 train.py --protocol fewshot --dataset hmdb51 --set shots=4
    torchrun --nproc_per_node=8 train.py --protocol zeroshot --dataset k400 --data /videos/k400

It may be interrupted anywhere: the same command goes on. Everything random is drawn from (seed,
epoch, video) or (seed, step), so that neither the number of processes and workers nor an
interruption changes what is computed, but that batch norm (ILA; see sync_bn) sees a process's
videos alone, and dropout is drawn per process.
"""

import argparse
import contextlib
import dataclasses
import difflib
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import shutil
import signal
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
from clip_vit import Block, load_clip, read_checkpoint


# what DDP from torch 2.13 on calls forward_sync_buffers, an older one does not know
warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")


# ---- recipes ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Recipe:
    """One training run. The defaults are what the papers' recipes share; what differs stands below."""

    protocol: str
    method: str
    dataset: str
    clip: str = "ViT-B/16"  # OpenAI name or file
    merges: str = ""  # BPE merges; empty: the cache folder's
    seed: int = 1024  # of all that is random
    shots: int = 16  # training videos per class
    train_list: str = ""  # a list instead of the data folder's
    test_list: str = ""  # the same, to test on
    labels: str = ""  # other class names: a file, CSV id,name or JSON; llm: the published LLM-rephrased ones
    upstream_labels: bool = False  # HMDB-51: the published names, of which four are swapped
    checkpoint: str = ""  # weights of this method to start from instead of CLIP's: the papers' (P) rows
    probe: bool = False  # train a linear classifier alone, over the frozen checkpoint (ILA, Table 12)
    # a video as input
    frames: int = 16  # T
    sampling: str = "tsn"  # tsn, uniform
    clips: int = 2  # test views in time
    crops: int = 1  # test views in space, 1 or 3
    pixels: str = "imagenet"  # imagenet, clip: whose pixel mean and deviation
    short_side: int = 0  # pixels, before the crop; 0: 256/224 of the model's resolution
    # augmentation
    flip: float = 0.5  # probability
    jitter: float = 0.8  # probability
    grey: float = 0.2  # probability
    shift: float = 0.0  # largest move, part of the side
    scales: tuple = (1.0, 0.875, 0.75, 0.66)  # multi-scale crop, parts of the short side
    strengths: tuple = (0.4, 0.4, 0.2, 0.1)  # of jitter: brightness, contrast, saturation, hue
    smoothing: float = 0.1  # of the labels
    mixup: float = 0.8  # a of Beta(a, a); 0: never
    cutmix: float = 1.0  # the same
    switch: float = 0.5  # probability of cutmix if both are on
    # optimisation
    epochs: int = 30  # passes over the training videos
    warmup_epochs: float = 5.0  # linear, from 0
    lr: float = 8e-6  # peak rate, of what comes from CLIP
    lr_min: float = 8e-8  # rate at the end
    new_lr: float = 10.0  # times lr, for the modules that CLIP lacks
    position_lr: float = 1.0  # times lr, for temporal position embeddings
    schedule: str = "released"  # or continuous, see learning_rate
    batch: int = 256  # videos per step, over all processes
    micro_batch: int = 8  # videos per forward pass, even; costs memory; only batch norm sees it
    weight_decay: float = 0.001  # of AdamW
    position_decay: float = 0.001  # the same, for temporal position embeddings
    clip_grad: float = 0.0  # largest gradient norm; 0: no limit
    precision: str = "fp32"  # fp32, bf16, fp16
    # the run
    eval_every: int = 1  # epochs
    save_every: int = 500  # optimiser steps between checkpoints, beside those at epochs' ends
    keep_best: bool = True  # test the epoch of best validation accuracy; else the last
    sync_bn: bool = False  # batch norm over all processes
    workers: int = 8  # loader processes per process
    keep_decoded: bool = False  # keep decoded clips in memory: for worlds whose clips are as short as T
    compile: bool = False  # torch.compile the training step: needs a C compiler, minutes at the start
    checkpointing: bool = False  # compute blocks' values anew in the backward pass: less memory, 1/4 more time
    model: dict = dataclasses.field(default_factory=dict)  # overrides of the model's own configuration

    def __post_init__(self):
        for name, known in (("sampling", tuple(data.SAMPLERS)), ("pixels", tuple(data.MEANS)), ("crops", (1, 3)),
                            ("schedule", ("released", "continuous")), ("precision", ("fp32", "bf16", "fp16"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)} is unknown; use one of {', '.join(map(str, known))}")
        for name, (kind, _) in knobs(Recipe).items():
            least = name in ("shots", "frames", "clips", "epochs", "batch", "micro_batch", "eval_every", "save_every")
            most = 1 if name in ("flip", "jitter", "grey", "shift", "smoothing", "switch") else 2**32 - 1
            if kind in (int, float) and not least <= getattr(self, name) <= most:  # nor is nan
                raise ValueError(f"{name}={getattr(self, name)} must lie between {least:d} and {most}")
        if not all(0 < part <= 1 for part in self.scales):
            raise ValueError(f"scales={self.scales} must be parts of the short side, above 0 and at most 1")
        if len(self.strengths) != 4 or not all(0 <= part <= 1 for part in self.strengths):
            raise ValueError(f"strengths={self.strengths} must be four numbers between 0 and 1")
        if self.protocol == "zeroshot" and (self.probe or self.model.get("num_classes")):
            raise ValueError("zeroshot tests on other classes than it trains on, which a linear head (probe, num_classes) "
                             "does not know: take --protocol supervised")
        if self.probe and not self.checkpoint:
            raise ValueError("probe=true needs the model to be probed: --checkpoint FILE")
        if self.batch % 2 or self.micro_batch % 2:
            raise ValueError(f"batch={self.batch} and micro_batch={self.micro_batch} must be even, as videos are mixed in "
                             "pairs")

    def augmentation(self):
        """The arguments of data.augment."""
        return {name: getattr(self, name) for name in ("flip", "scales", "jitter", "grey", "shift", "strengths")}


TC_RECIPES = {  # TC-CLIP, released configurations; ViFi-CLIP is trained alike
    "zeroshot": dict(epochs=10, warmup_epochs=5.0, lr=8e-6, lr_min=8e-8, batch=256),
    "fewshot": dict(epochs=50, warmup_epochs=5.0, lr=2e-6, lr_min=2e-8, batch=64),
    "base2novel": dict(epochs=12, warmup_epochs=2.0, lr=3.33e-6, lr_min=3.33e-8, batch=64),
    "supervised": dict(epochs=30, warmup_epochs=5.0, lr=2.2e-5, lr_min=2.2e-7, batch=512, clips=4, crops=3),
}
PROTOCOLS = tuple(TC_RECIPES)
SWEPT = ("shots", "seed")  # several values of these, as in shots=2,4,8,16, are so many runs
TRANSFER = ("hmdb51", "ucf101", "k600")  # where a model trained on Kinetics is tested zero-shot
# [paper, ILA Table 14]; TC-CLIP's numbers where ILA gives none
ILA_RECIPE = dict(frames=8, weight_decay=0.003, position_lr=10.0, position_decay=0.003)
ILA_SUPERVISED = {  # 50 000 and 30 000 steps of 256 videos; on SSv2 a linear head over a frozen CLIP, one-hot targets
    "k400": dict(epochs=53, warmup_epochs=5.0, lr=8e-6, lr_min=8e-8, batch=256),
    "ssv2": dict(epochs=45, warmup_epochs=5.0, lr=5e-4, lr_min=5e-6, batch=256, new_lr=1.0, position_lr=1.0,
                 weight_decay=0.01, position_decay=0.01, smoothing=0.0, mixup=0.0, cutmix=0.0, sampling="uniform",
                 model={"num_classes": 174})}
# The miniature world: what was found to teach a tiny CLIP the order of frames in a minute.
MINIATURE = dict(
    frames=8, short_side=32, clips=1, shots=8, flip=0.0, scales=(1.0,), jitter=1.0, grey=0.0, shift=0.125,
    strengths=(0.15, 0.15, 0.0, 0.0), smoothing=0.0, mixup=0.0, cutmix=0.0, epochs=20, warmup_epochs=1.0, lr=5e-4, lr_min=0.0,
    new_lr=6.0, position_lr=40.0, schedule="continuous", batch=16, micro_batch=16, weight_decay=0.05, position_decay=0.0,
    clip_grad=1.0, eval_every=5, save_every=100, keep_best=False, workers=0, keep_decoded=True)
MINIATURE_METHODS = {
    "vifi": dict(model=dict(prompt="a pic")),
    "tc": dict(model=dict(prompt="a pic", positions="joint", context_tokens=16)),
    "ila": dict(lr=3e-4, new_lr=10.0, position_lr=66.0, model=dict(align_weight=0.01))}
PROBE = dict(lr=1e-3, lr_min=1e-5, new_lr=1.0, smoothing=0.0, mixup=0.0, cutmix=0.0)  # [ours]


def parse_value(name, text, kind, default):
    """`text` as a value of a knob's kind. Raises ValueError that names the knob."""
    number = float if kind is tuple and any(isinstance(x, float) for x in default or ()) else int  # in a tuple
    words, convert = {
        bool: ("true or false", {"true": True, "false": False}.__getitem__), int: ("a whole number", int),
        float: ("a number", float), str: ("text", str),
        tuple: ("numbers with commas", lambda text: tuple(map(number, text.split(","))))}[kind]
    try:
        return convert(text)
    except (KeyError, ValueError) as error:
        raise ValueError(f"--set {name}={text}: {name} takes {words}; its default is {default}") from error


def knobs(config):
    """{name: (kind, default)} of a configuration dataclass, of those that have a default. `int | None` is an int."""
    return {field.name: ((typing.get_args(field.type) or [field.type])[0], field.default)
            for field in dataclasses.fields(config) if field.default is not dataclasses.MISSING}


def resolve_recipe(protocol, method, dataset, settings=(), **given):
    """The recipe of a run: the papers' numbers, the miniature's where it is used, what flags have `given` (None: nothing),
    then the overrides `key=value`."""
    values = {"model": {}} | TC_RECIPES[protocol]
    if method == "ila":
        values |= ILA_RECIPE
    if method == "ila" and protocol == "supervised" and dataset in ILA_SUPERVISED:
        values |= ILA_SUPERVISED[dataset]
    if dataset == "shapes":
        values |= MINIATURE | MINIATURE_METHODS[method]
    if dataset == "ssv2":
        values |= {"flip": 0.0}  # left and right are part of its classes
    if "probe=true" in settings:
        values |= PROBE | {"model": {name: value for name, value in values["model"].items() if name != "num_classes"}}
    if method == "tc" and any(setting.startswith("labels=") for setting in settings):
        values["model"] = {"text_length": 77} | values["model"]  # described classes are longer than names
    values |= {key: value for key, value in given.items() if value}
    run, model = knobs(Recipe), knobs(evaluation.METHODS[method].config)
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting}: write it as key=value, without spaces")
        if name in run:
            values[name] = parse_value(name, text, *run[name])
        elif name in model:
            values["model"] = values["model"] | {name: parse_value(name, text, *model[name])}
        else:
            owner = [key for key, other in evaluation.METHODS.items() if name in knobs(other.config)]
            like = difflib.get_close_matches(name, [*run, *model], 1)
            hint = f", --method {owner[0]} has" if owner else f"; did you mean {like[0]}?" if like else ""
            raise ValueError(f"--set {setting}: {method} has no {name!r}{hint}; known are {', '.join([*run, *model])}")
    return Recipe(protocol, method, dataset, **values)


# ---- optimisation ----------------------------------------------------------------------------------------------------

def learning_rate(t, total, warmup, peak, lowest, schedule="released"):
    """Rate at time t of `total` steps: linear from 0 to `peak` over `warmup` steps, then a half cosine to `lowest`.

    [released] the cosine runs over t/total and not from the end of the warm-up, so that the rate halves at once where
    warm-up ends; and it is set after each step for the next: the step s runs at t = s - 1, the first two at 0.
    "continuous" runs it from the peak, and step s in its own middle, at t = s + 1/2.
    """
    if t < warmup:
        return peak * t / warmup
    share = t / total if schedule == "released" else (t - warmup) / (total - warmup)
    return lowest + (peak - lowest) * (1 + math.cos(math.pi * min(share, 1))) / 2


def parameter_groups(model, recipe):
    """AdamW's groups: what comes from CLIP at lr, temporal positions and new modules at their multiples of it.

    [released] local_global_bias counts as CLIP's; vectors, prompt layers and all that ILA adds are new.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if not name.startswith("clip.") and "position" in name:
            key = recipe.position_lr, recipe.position_decay
        else:
            key = 1.0 if name.startswith(("clip.", "vision.")) else recipe.new_lr, recipe.weight_decay
        groups.setdefault(key, []).append(parameter)
    return [{"params": parameters, "multiple": multiple, "weight_decay": decay}
            for (multiple, decay), parameters in sorted(groups.items(), key=lambda item: item[0])]


def set_rates(optimizer, recipe, step, per_epoch):
    """Sets the learning rates of optimiser step `step`; returns the base rate."""
    t = max(step - 1, 0) if recipe.schedule == "released" else step + 0.5
    total, warmup = recipe.epochs * per_epoch, recipe.warmup_epochs * per_epoch
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(t, total, warmup, recipe.lr * group["multiple"], recipe.lr_min, recipe.schedule)
    return learning_rate(t, total, warmup, recipe.lr, recipe.lr_min, recipe.schedule)


def epoch_batches(recipe, count, epoch, rank=0, world=1):
    """This process's share of an epoch: for each optimiser step its micro-batches, lists of (epoch, video, weight).

    The videos of a step are those of a permutation drawn from (seed, epoch). They are cut into contiguous parts of even
    length, since neighbours are mixed in pairs, so that world and micro_batch never change what a step computes. All
    processes get equally many micro-batches; one that has no video left gets a video of weight 0.
    """
    order = np.random.default_rng([recipe.seed, epoch]).permutation(count).tolist()
    steps = []
    for start in range(0, count, recipe.batch):
        videos = [(epoch, i, 1.0) for i in order[start:start + recipe.batch]]
        share = 2 * math.ceil(len(videos) / (2 * world))
        mine = videos[rank * share:(rank + 1) * share]
        parts = [mine[i:i + recipe.micro_batch] for i in range(0, share, recipe.micro_batch)]
        steps.append([part or [(*videos[0][:2], 0.0)] for part in parts])
    return steps


# ---- checkpoints -----------------------------------------------------------------------------------------------------

def write_atomically(path, write):
    """Calls write(file) on a temporary file beside `path`, which then takes its place: never half a file.

    Raises OSError that names the file, where the disk is full or the folder not writable.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # the latter is torch.save's word for a full disk
        raise OSError(f"{path} cannot be written ({' '.join(str(error).split()):.160}) and stays as it was: make room, or "
                      "give the right to write, and the same command goes on") from error
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # the new name itself is on the disk
    os.close(folder)


def save(path, content):
    write_atomically(path, lambda file: torch.save(content, file))


def read_state(path):
    """What `save` wrote. Raises ValueError that names the file."""
    try:
        content = read_checkpoint(path)
        if not isinstance(content, dict) or "model" not in content:
            raise ValueError(f"{path} holds no model")
        return content
    except ValueError as error:
        raise ValueError(f"{error}: delete {path.parent} to train anew, or choose another --out") from error


def save_json(path, content):
    write_atomically(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))


def read_json(path):
    """A dict that save_json wrote. Raises ValueError that names the file."""
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete its folder, or choose another --out") from error


def describe_data(train_videos, tests):
    """A line that differs where a run's classes or videos do, wherever these lie."""
    sets = [[list(videos.classes), [*map(os.path.basename, videos.paths)], list(map(int, videos.labels))]
            for videos in (train_videos, *tests.values())]
    return f"{len(train_videos.paths)} videos of {len(train_videos.classes)} classes, " \
           f"{hashlib.sha256(json.dumps(sets).encode()).hexdigest()[:8]}"


def open_folder(folder, recipe):
    """Makes the run folder, or checks that it holds a run of this very recipe, a dict. Raises ValueError if it does not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be made a folder ({error.strerror}): choose another --out") from error
    for left in (*folder.glob(".*.pt.[0-9]*"), *folder.glob(".*.json*.[0-9]*")):  # by a write that was killed
        left.unlink()
    new, path = json.loads(json.dumps(recipe)), folder / "recipe.json"
    if path.exists():
        old = read_json(path)
        differ = [f"{key} is {old.get(key)!r} there, {new[key]!r} now" for key in new if old.get(key) != new[key]
                  and key not in ("workers", "save_every", "compile", "checkpointing")]
        if differ:
            raise ValueError(f"{folder} holds another run ({'; '.join(differ)}): choose another --out, or delete it")
    elif any(folder.iterdir()):
        raise ValueError(f"{folder} holds other files and no recipe.json: choose another --out, or an empty folder")


# ---- the loop --------------------------------------------------------------------------------------------------------

@dataclass
class Run:
    """A training run under way; `progress` is all of its state that is neither weights nor optimiser."""

    recipe: Recipe
    folder: Path
    training: data.TrainVideos
    validation: data.TestVideos
    model: nn.Module
    wrapped: nn.Module  # the model as it is trained: under DDP if there are several processes, compiled if asked for
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: dict

    @property
    def per_epoch(self):
        return math.ceil(len(self.training) / self.recipe.batch)  # optimiser steps


def start(recipe, folder, train_videos, validation_videos, device):
    """A Run at its beginning, or where folder/last.pt left it."""
    torch.manual_seed(recipe.seed)

    def build():
        model = evaluation.build_model(vars(recipe), load_clip(recipe.clip, recipe.merges))
        if recipe.checkpoint:
            evaluation.load_tuned(model, recipe.checkpoint, recipe.clip, recipe.merges)
        if recipe.probe:
            model = evaluation.LinearProbe(model, len(train_videos.classes))
        model.set_classes(train_videos.classes)
        return model.to(device)
    model = data.node_leader_first(build)
    if recipe.sync_bn and device.type == "cpu":
        raise ValueError("sync_bn=true needs GPUs")
    variable, *compilers = ("CC", "gcc", "clang") if device.type == "cuda" else ("CXX", "g++", "clang++")
    if recipe.compile and not any(map(shutil.which, [os.environ.get(variable, ""), *compilers])):
        raise ValueError(f"--compile needs a compiler: install {compilers[0]}, or leave the flag out")
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe), lr=recipe.lr, betas=(0.9, 0.98), eps=1e-8)
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
    progress = {"step": 0, "sums": [0.0] * 3, "bad": [], "seconds": 0.0, "history": []}
    if (folder / "last.pt").exists():
        state = read_state(folder / "last.pt")
        try:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            scaler.load_state_dict(state["scaler"])
            progress = state["progress"]
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder / 'last.pt'} is not of this run ({error!s:.200}): choose another --out") from error
    if recipe.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for block in (module for module in model.modules() if isinstance(module, Block)):
        block.checkpointing = recipe.checkpointing
    wrapped = DistributedDataParallel(model, broadcast_buffers=False) if data.rank_and_world()[1] > 1 else model
    wrapped = torch.compile(wrapped) if recipe.compile else wrapped
    views = evaluation.eval_views(vars(recipe), model)
    training = data.TrainVideos(train_videos, views, recipe.seed, recipe.augmentation(), recipe.keep_decoded)
    validation = data.TestVideos(validation_videos, dataclasses.replace(views, clips=1, crops=1), recipe.keep_decoded)
    return Run(recipe, folder, training, validation, model, wrapped, optimizer, scaler, progress)


def save_run(run):
    """Writes the whole state, from which the run goes on bit by bit, to folder/last.pt."""
    world = data.rank_and_world()[1]
    for buffer in run.model.buffers():  # batch norm's running statistics differ between processes: their mean is kept
        if world > 1 and buffer.is_floating_point():
            dist.all_reduce(buffer.div_(world))
    data.on_rank_zero(lambda: save(run.folder / "last.pt", {
        "recipe": vars(run.recipe), "classes": list(run.training.video_list.classes),
        "model": run.model.state_dict(), "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(), "progress": run.progress}))


@contextlib.contextmanager
def sigterm_noted():
    """Within it SIGTERM, a scheduler's warning, only sets the threading.Event that it yields."""
    noted = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: noted.set())
    try:
        yield noted
    finally:
        signal.signal(signal.SIGTERM, before)


def train_step(run, loader, count, videos, epoch):
    """One optimiser step over the loader's next `count` micro-batches of this process.

    Its gradient is that of the mean loss over the step's `videos`, of all processes, however they are cut up.
    -> sums over this process's videos of (loss, auxiliary loss, 1), and the reading errors.
    """
    recipe, (rank, world), device = run.recipe, data.rank_and_world(), run.model.clip.logit_scale.device
    step = run.progress["step"]
    torch.manual_seed((recipe.seed * 1_000_003 + step) * 1024 + rank)  # for dropout: no random state has to be saved
    lam, box = data.mix_draw(np.random.default_rng([recipe.seed, epoch, step, 1]), run.model.clip.visual.resolution,
                             recipe.mixup, recipe.cutmix, recipe.switch)
    sums, errors = torch.zeros(3, device=device), []
    for i in range(count):
        clips, labels, weights, bad = next(loader)
        errors += bad
        if clips is None:
            raise ValueError("ten training videos in a row cannot be read: " + "; ".join(bad))
        weights = weights.to(device, torch.float32)  # (b,)
        video = data.normalise(clips.to(device, non_blocking=True), recipe.pixels)  # (b,T,3,R,R)
        targets = data.soft_targets(labels.to(device), len(run.training.video_list.classes), recipe.smoothing)  # (b,C)
        video, targets = data.mix_pairs(video, targets, lam, box)
        with contextlib.nullcontext() if world == 1 or i == count - 1 else run.wrapped.no_sync():
            with evaluation.autocast(device, recipe.precision):
                logits, aux = run.wrapped(video)
            losses = -(targets * logits.float().log_softmax(dim=-1)).sum(dim=-1)  # (b,)
            parts = torch.stack([weights @ losses, weights.sum() * aux.float(), weights.sum()])
            run.scaler.scale(parts[:2].sum() * world / videos).backward()  # DDP takes the mean over processes
        sums += parts.detach()
    if recipe.clip_grad:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), recipe.clip_grad)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    return sums, errors


def train_epoch(run, bar):
    """The rest of the epoch that the run is in, saved on the way and at its end -> whether SIGTERM has stopped it."""
    recipe, progress, (rank, world) = run.recipe, run.progress, data.rank_and_world()
    epoch = len(progress["history"])
    done = progress["step"] - epoch * run.per_epoch
    run.wrapped.train()
    if recipe.method == "ila" and not recipe.probe:
        run.model.set_epoch(epoch)
    steps = epoch_batches(recipe, len(run.training), epoch, rank, world)[done:]
    loader = iter(run.training.loader([part for parts in steps for part in parts], recipe.workers))
    sums, errors, began = 0, [], time.time()
    with sigterm_noted() as noted:
        for i, parts in enumerate(steps):
            set_rates(run.optimizer, recipe, progress["step"], run.per_epoch)
            videos = min(recipe.batch, len(run.training) - (done + i) * recipe.batch)
            step_sums, step_errors = train_step(run, loader, len(parts), videos, epoch)
            sums, errors = sums + step_sums, errors + step_errors
            progress["step"] += 1
            bar.update()
            stop = data.any_process(noted.is_set(), sums.device)  # all processes leave after the same step
            if stop or progress["step"] % recipe.save_every == 0 or i == len(steps) - 1:
                add_up(run, sums.tolist(), errors, time.time() - began)
                save_run(run)
                sums, errors, began = 0, [], time.time()
            if stop:
                return True
    return False


def add_up(run, sums, errors, seconds):
    """Adds what all processes have seen since the last time to the progress. Raises ValueError to stop the run."""
    progress = run.progress
    progress["sums"] = np.sum([progress["sums"], *data.gather([sums])], axis=0).tolist()
    progress["bad"] = sorted({*progress["bad"], *data.gather(errors)})
    progress["seconds"] += seconds
    evaluation.stop_if_unreadable(progress["bad"], len(run.training))
    if not math.isfinite(progress["sums"][0]):
        raise ValueError(f"the loss is not finite at step {progress['step']}: lower lr, or try precision=bf16")


def finish_epoch(run):
    """Validates, and writes the epoch's line to the log; the best epoch so far also to best.pt.

    last.pt holds the epoch's steps already: who is killed here comes back here.
    """
    recipe, progress = run.recipe, run.progress
    epoch, (loss, aux, videos) = len(progress["history"]) + 1, progress["sums"]
    rate = set_rates(run.optimizer, recipe, progress["step"] - 1, run.per_epoch)
    line = {"epoch": epoch, "step": progress["step"], "lr": rate, "loss": loss / videos, "aux_loss": aux / videos,
            "seconds": round(progress["seconds"], 2), "bad": progress["bad"]}
    best = max((old["top1"] for old in progress["history"] if "top1" in old), default=-1)
    if epoch % recipe.eval_every == 0 or epoch == recipe.epochs:
        line["top1"] = test(run, run.validation)["top1"]
    progress["history"].append(line)
    progress["sums"], progress["bad"] = [0.0] * 3, []

    def write():
        if "top1" in line and (line["top1"] > best or not recipe.keep_best):
            save(run.folder / "best.pt", {"recipe": vars(recipe), "model": run.model.state_dict(),
                                          "classes": list(run.training.video_list.classes), "epoch": epoch})
        lines = "".join(json.dumps(old) + "\n" for old in progress["history"])
        write_atomically(run.folder / "log.jsonl", lambda file: file.write(lines.encode()))
        evaluation.draw_curves(progress["history"], run.folder / "curves.png")
        if "top1" in line:
            tqdm.write(f"epoch {epoch} of {recipe.epochs}: loss {line['loss']:.4f}, validation top-1 {line['top1']:.1%}",
                       file=sys.stderr)
    data.on_rank_zero(write)  # nobody reads best.pt before it is whole
    if epoch == recipe.epochs:
        save_run(run)


def train_epochs(run):
    """Trains from where the run is to its last epoch; at SIGTERM saves, says so and ends the process."""
    rank, stopped = data.rank_and_world()[0], False
    with data.progress_bar(total=run.recipe.epochs * run.per_epoch, initial=run.progress["step"], desc=run.recipe.method,
                             unit="step") as bar:
        while len(run.progress["history"]) < run.recipe.epochs and not stopped:
            stopped = train_epoch(run, bar)
            if not stopped:
                finish_epoch(run)
    if stopped and rank == 0:
        print(f"stopped by SIGTERM after step {run.progress['step']}; the same command goes on", file=sys.stderr)
    if stopped:  # 143, a shell's 128 + 15: not done. But torchrun, which fails by itself where it was warned, would start
        sys.exit(0 if "TORCHELASTIC_RUN_ID" in os.environ else 143)  # a worker anew that ends in anything but 0


def test(run, videos, picture=None):
    """The scores of the model as it stands on a data.TestVideos; its classes are the training's again afterwards."""
    scores = evaluation.evaluate(run.model, videos, run.recipe.micro_batch, run.recipe.workers, run.recipe.precision,
                             picture=picture)
    run.model.set_classes(run.training.video_list.classes)
    return scores


def transfer(run, root):
    """Zero-shot tests of a model trained on Kinetics: {dataset: {"plain" or "ensembled": {test set: scores}}}.

    The data sets lie beside the training's folder; one that is not there is left out, and said so. The ensemble is
    0.7 of the tuned weights and 0.3 of CLIP's [paper].
    """
    recipe, results = run.recipe, {}
    base = data.node_leader_first(lambda: evaluation.build_model(vars(recipe), load_clip(recipe.clip, recipe.merges)))
    tuned = {name: value.clone() for name, value in run.model.state_dict().items()}
    weights = {"plain": tuned, "ensembled": evaluation.ensemble(base.state_dict(), tuned, 0.7)}
    for dataset in [name for name in TRANSFER if name != recipe.dataset]:
        try:
            tests = data.load_tests(dataset, root.parent / dataset, labels="llm" if recipe.labels else "")
        except ValueError as error:
            results[dataset] = {"missing": str(error)}
            continue
        results[dataset] = {}
        for kind, state in weights.items():
            run.model.load_state_dict(state)
            results[dataset][kind] = {name: test(run, data.TestVideos(videos, run.training.views))
                                      for name, videos in tests.items()}
    return results


def announce(recipe, folder, train_videos, tests):
    """What a run begins with, as lines of text: its folder, its data, and the recipe where it is not the default."""
    sets = ", ".join(f"{name} of {len(videos.paths)}" for name, videos in tests.items())
    words = f"{folder}: {recipe.method} on {recipe.dataset}, {len(train_videos.paths)} training videos of " \
            f"{len(train_videos.classes)} classes; tests: {sets}"
    count = data.CLASS_COUNTS.get(recipe.dataset, len(train_videos.classes))
    if len(train_videos.classes) != count and recipe.protocol != "base2novel":
        words += f" ({recipe.dataset} has {count} classes: is this its folder, with its annotations?)"
    settings = [f"{name}={getattr(recipe, name)}".replace(" ", "") for name, (_, default) in knobs(Recipe).items()
                if getattr(recipe, name) != default]
    return words + "\n" + textwrap.fill(" ".join([*settings, *(f"{k}={v}" for k, v in recipe.model.items())]), 118,
                                        initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def run_recipe(recipe, root, folder, device):
    """Trains by a recipe, tests on every test set, writes results.json and returns what it holds."""
    rank, _ = data.rank_and_world()
    train_videos, tests = data.load_protocol(recipe.protocol, recipe.dataset, root, recipe.shots, recipe.seed, recipe.train_list,
                                             recipe.test_list, recipe.labels, recipe.upstream_labels)
    described = vars(recipe) | {"data": describe_data(train_videos, tests)}
    data.on_rank_zero(lambda: open_folder(folder, described))
    if (folder / "results.json").exists():
        return read_json(folder / "results.json")
    run = start(recipe, folder, train_videos, next(iter(tests.values())), device)
    for videos in (*tests.values(), train_videos):  # names that the model cannot take are told now, not after training
        run.model.set_classes(videos.classes)
    if rank == 0:  # only now: what could not even start leaves no trace
        save_json(folder / "recipe.json", described)
        print(announce(recipe, folder, train_videos, tests), file=sys.stderr)
    train_epochs(run)
    run.model.load_state_dict(read_state(folder / "best.pt")["model"])
    results = {"recipe": vars(recipe), "train_videos": len(train_videos.paths), "tests": {}, "transfer": {},
               "bad": sorted({error for line in run.progress["history"] for error in line["bad"]})}
    for name, videos in tests.items():
        videos = data.TestVideos(videos, run.training.views, recipe.keep_decoded)
        results["tests"][name] = test(run, videos, None if results["tests"] else folder / "confusion.png")
    results["seconds"] = round(run.progress["history"][-1]["seconds"], 1)
    if recipe.protocol == "zeroshot" and recipe.dataset in data.PAGES:
        results["transfer"] = transfer(run, root)
    if rank == 0:
        save_json(folder / "results.json", results)
    return results


# ---- the miniature's CLIP ---------------------------------------------------------------------------------------------

PREFIX = "a pic"  # M = 4 byte tokens before every caption and, later, every class name
TINY = dict(width=128, vision_layers=4, text_layers=3, patch=8, vocabulary=514, context=32)  # in OpenAI's layout


def patch_positions(side, D):
    """(side*side, D): sines and cosines of y and of x, D/4 each, at rates from 1 to 1/10."""
    rates = 10 ** -(torch.arange(D // 4) / (D // 4))  # [ours] 1/10, not 1/10000: a side is 4 patches
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [axis.flatten()[:, None] * rates for axis in (y, x)]  # (side*side, D/4) each
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)


def tiny_state(seed):
    """A random state_dict of the tiny CLIP; the scales are OpenAI's but for the two towers' inputs.

    [ours] Pixels enter softly beside their positions, letters loudly: else *where* a shape is was not learned by all seeds.
    """
    D, patch, g = TINY["width"], TINY["patch"], torch.Generator().manual_seed(seed)
    shapes = {"visual.class_embedding": ((D,), D ** -0.5), "visual.proj": ((D, D), D ** -0.5),
              "visual.conv1.weight": ((D, 3, patch, patch), 0.015), "text_projection": ((D, D), D ** -0.5),
              "token_embedding.weight": ((TINY["vocabulary"], D), 0.5), "positional_embedding": ((TINY["context"], D), 0.2)}
    norms = ["visual.ln_pre", "visual.ln_post", "ln_final"]
    for tower, layers in (("visual.transformer", TINY["vision_layers"]), ("transformer", TINY["text_layers"])):
        for block in (f"{tower}.resblocks.{i}" for i in range(layers)):
            norms += [f"{block}.ln_1", f"{block}.ln_2"]
            for name, shape, std in (("attn.in_proj_", (3 * D, D), D ** -0.5), ("mlp.c_fc.", (4 * D, D), (2 * D) ** -0.5),
                                     ("attn.out_proj.", (D, D), (2 * layers * D) ** -0.5),
                                     ("mlp.c_proj.", (D, 4 * D), (2 * layers * D) ** -0.5)):
                shapes |= {f"{block}.{name}weight": (shape, std), f"{block}.{name}bias": (shape[:1], 0)}
    state = {name: std * torch.randn(shape, generator=g) for name, (shape, std) in shapes.items()}
    state |= {f"{norm}.{part}": torch.full((D,), value) for norm in norms for part, value in (("weight", 1.0), ("bias", 0.0))}
    positions = 0.3 * patch_positions(data.SIDE // patch, D)
    return state | {"visual.positional_embedding": F.pad(positions, (0, 0, 1, 0)), "logit_scale": torch.tensor(math.log(20))}


def captioned_stills(rng, batch):
    """Random pictures uint8 (batch,3,32,32), C captions, and which is true of which, bool (batch,C).

    A caption names a random part of a picture's attributes, each with p = 0.3, at least one; none is there twice.
    Shapes are never named [ours]: 32 pixels teach them last, and their long words slow the rest down.
    """
    pictures, truths = zip(*(data.render_still(rng) for _ in range(batch)))
    truths = [(size, colour, place) for size, colour, _, place in truths]
    said = set()
    for truth in truths:
        named = rng.random(3) < 0.3
        named[rng.integers(3)] |= not named.any()
        said.add(tuple(word if name else None for word, name in zip(truth, named)))
    said = sorted(said, key=str)  # a set's order changes from run to run
    true = [[all(word in (None, fact) for word, fact in zip(caption, truth)) for caption in said] for truth in truths]
    texts = [" ".join([PREFIX, *filter(None, caption)]) + "." for caption in said]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), texts, torch.tensor(true)


def pretrain_tiny_clip(path, seed=0, steps=250, batch=64, lr=6e-4, device="cpu"):
    """Pretrains the tiny CLIP and saves its state_dict at `path`, whole or not at all.

    Loss: as CLIP's, in both directions, but the targets are uniform over all that is true; the logit scale stays at 20.
    """
    clip, rng = load_clip(tiny_state(seed)).to(device), np.random.default_rng(seed)
    clip.logit_scale.requires_grad_(False)
    learned = [p for p in clip.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": [p for p in learned if p.dim() >= 2], "weight_decay": 0.05},
                                   {"params": [p for p in learned if p.dim() < 2], "weight_decay": 0.0}], betas=(0.9, 0.98))
    for step in tqdm(range(steps), desc="pretraining a tiny CLIP", unit="step"):
        pictures, texts, true = captioned_stills(rng, batch)
        image = clip.encode_image(data.normalise(pictures.to(device), "clip"))  # (B,E)
        text = clip.encode_text(clip.tokenize(texts))  # (C,E)
        logits, true = clip.logit_scale.exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T, true.to(image)
        loss = F.cross_entropy(logits, true / true.sum(1, True)) + F.cross_entropy(logits.T, (true / true.sum(0)).T)
        warmup, share = min(1, (step + 1) / (0.05 * steps)), max(0, (step / steps - 0.05) / 0.95)
        for group in optimizer.param_groups:
            group["lr"] = lr * warmup * (1 + math.cos(math.pi * share)) / 2
        optimizer.zero_grad()
        (loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
    save(path, {name: value.cpu() for name, value in clip.state_dict().items()})


def prepare_miniature(root, device):
    """Renders the world and pretrains its CLIP, root/clip.pt, where that is not done yet."""
    if not all((root / split).is_dir() for split in ("train", "base", "novel")):
        data.write_shapes(root, seed=0)
    if not (root / "clip.pt").is_file():
        pretrain_tiny_clip(root / "clip.pt", device=device)


# ---- the command line ------------------------------------------------------------------------------------------------

def figures(result):
    """A run's results as the papers' tables have them: {row: {column: [top-1 in %, of several splits several]}}."""
    recipe, tests, scores = result["recipe"], result["tests"], list(result["tests"].values())
    row = recipe["method"] + ", linear probe" * recipe["probe"]
    if recipe["protocol"] == "base2novel":
        rows = {row: {name: [100 * tests[name]["top1"]] for name in ("base", "novel")}}
    elif recipe["protocol"] == "supervised" and len(tests) == 1:
        rows = {row: {"top-1": [100 * scores[0]["top1"]], "top-5": [100 * scores[0]["top5"]]}}
    elif recipe["protocol"] == "fewshot" and len(tests) == 1:
        rows = {row: {f"{recipe['shots']} shots": [100 * scores[0]["top1"]]}}
    else:
        rows = {row: {f"{name}{title}": [100 * score[key]] for name, score in tests.items()
                      for key, title in (("top1", " top-1"), ("pairs", ", inside reversed pairs")) if key in score}}
    for dataset, kinds in result["transfer"].items():
        for kind, sets in kinds.items() if "missing" not in kinds else ():
            name = row if kind == "plain" else f"{row}, ensembled"
            rows.setdefault(name, {})[dataset] = [100 * score["top1"] for score in sets.values()]
    rows[row]["training seconds"] = [result["seconds"]]
    return rows


def table(results):
    """Runs' results as lines of text: a row per method, over seeds and splits mean +- standard deviation, and the paper's."""
    rows, sweep = {}, len({result["recipe"]["shots"] for result in results}) > 1
    for result in results:
        shots = f"{result['recipe']['shots']} shots"
        for row, cells in figures(result).items():
            row += f", {shots}" if sweep and shots not in cells else ""
            for column, values in cells.items():
                rows.setdefault(row, {}).setdefault(column, []).extend(values)
    for cells in rows.values():
        if set(cells) >= {"base", "novel"}:
            base, novel = np.mean(cells["base"]), np.mean(cells["novel"])
            cells["harmonic mean"] = [2 * base * novel / max(base + novel, 1e-9)]
        cells["training seconds"] = cells.pop("training seconds", [])  # the last column
    for result in results:
        r = result["recipe"]
        key = f"{r['protocol']} {r['method']} {r['dataset']} {r['clip']} {r['frames']}" + ", LLM names" * bool(r["labels"])
        if key in evaluation.PAPERS and not r["checkpoint"]:
            rows[f"{r['method']} in its paper"] = {column: [value] for column, value in evaluation.PAPERS[key].items()}
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    lines = [["method", *columns]]
    for row, cells in rows.items():
        texts = [f"{np.mean(values):.1f}" + f" +- {np.std(values):.1f}" * (len(values) > 1) if values else ""
                 for values in (cells.get(column, []) for column in columns)]
        lines.append([row, *texts])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines)


def runs_of(protocol, settings):
    """{name: settings} of the runs that a command asks for: one, or one per value where `shots=2,4` or `seed=1,2,3`;
    names are "", "-shots=2" and the like.

    base2novel is the mean of three seeds [paper] unless told otherwise.
    """
    swept = {name: text.split(",") for name, _, text in (setting.partition("=") for setting in settings) if name in SWEPT}
    if protocol == "base2novel" and "seed" not in swept:
        swept["seed"] = ["1", "2", "3"]
    others = [setting for setting in settings if setting.partition("=")[0] not in SWEPT]
    choices = itertools.product(*([f"{name}={value}" for value in values] for name, values in swept.items()))
    return {"".join(f"-{setting}" for setting in choice): [*others, *choice] for choice in choices}


def recipes_of(args, dataset, root, out):
    """{run folder: recipe} of all that a command asks for; the folder is `out` itself for a single run with --out."""
    methods = [args.method] if args.method else ["vifi", "tc"] if dataset == "shapes" else ["tc"]
    given = {key: getattr(args, key) for key in ("clip", "merges", "checkpoint", "upstream_labels", "compile")}
    if dataset == "shapes":
        given["clip"] = args.clip or str(root / "clip.pt")
    recipes = {out / f"{method}{name}": resolve_recipe(args.protocol, method, dataset, settings, **given)
               for method in methods for name, settings in runs_of(args.protocol, args.set).items()}
    if args.out and len(recipes) == 1:
        return {out: recipe for recipe in recipes.values()}
    if (out / "recipe.json").exists():
        raise ValueError(f"{out} is the folder of a single run: choose another --out")
    return recipes


def draw_miniature(root, results, path):
    """The time-reversal figure: a clip and its reversal, as the first run of each method sees them."""
    models, names = {}, ("red to blue", "blue to red")
    for folder, result in results.items():
        title = evaluation.METHODS[result["recipe"]["method"]].title
        if title not in models:
            models[title], recipe = evaluation.load_model(folder / "best.pt")
            clip = data.read_test(root / "base" / names[0] / "000.mp4", evaluation.eval_views(recipe, models[title]))[0]
    evaluation.draw_reversal(models, clip, names, path)


def main(args):
    device, (rank, _) = data.start_processes(), data.rank_and_world()
    dataset = args.dataset or "shapes"
    root = Path(args.data or f"data/{dataset}")
    out = Path(args.out or f"runs/{dataset}-{args.protocol}")
    recipes = recipes_of(args, dataset, root, out)
    if dataset == "shapes" and device.type == "cpu":
        torch.set_num_threads(1)  # 32-pixel tensors gain nothing from more, and lose much where other programs run
    if dataset == "shapes":
        data.node_leader_first(lambda: prepare_miniature(root, device))
    results = {folder: run_recipe(recipe, root, folder, device) for folder, recipe in recipes.items()}
    if rank == 0 and dataset == "shapes":
        draw_miniature(root, results, out / "reversal.png")
    if rank == 0:
        print(table(list(results.values())))
        for line in sorted({f"not tested on {name}: {kinds['missing']}" for result in results.values()
                            for name, kinds in result["transfer"].items() if "missing" in kinds}):
            print(line)
        if len(results) > 1:
            save_json(out / "results.json", {str(folder.relative_to(out)): result for folder, result in results.items()})
    return 0


def describe(title, config, but=()):
    """Help on a configuration dataclass's knobs: name=default and the comment beside it, two on a line if short."""
    comments, lines = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(config), re.MULTILINE)), [title]
    comments |= {field.name: field.metadata["help"] for field in dataclasses.fields(config) if field.metadata}
    for name, (kind, default) in knobs(config).items():
        words = ",".join(map(str, default)) if isinstance(default, tuple) else default
        entry = f"  {name}={str(words).lower() if kind is bool else words}  {comments[name]}"
        if name not in but and len(entry) <= 50 and 2 <= len(lines[-1]) < 50 and lines[-1] != title:
            lines[-1] = f"{lines[-1]:50}{entry[1:]}"
        elif name not in but:
            lines.append(entry)
    return "\n".join(lines)


def parse_args(arguments=None):
    known = [describe("--set for every run (defaults where no recipe of the papers says otherwise):", Recipe)]
    known += [describe(f"--set for --method {name}:", method.config, knobs(Recipe))
              for name, method in evaluation.METHODS.items()]
    parser = evaluation.Parser(description=__doc__, epilog="\n".join(known),
                               usage="train.py --protocol PROTOCOL [flags] [--set key=value ...]")
    flag = parser.add_argument
    flag("--protocol", choices=PROTOCOLS, help="the papers' experiment; needed")
    flag("--method", choices=evaluation.METHODS, help="default tc; on the miniature, vifi and tc")
    flag("--dataset", help=f"one of {', '.join(data.DATASETS)}; default shapes, the miniature world")
    flag("--data", metavar="DIR", help="folder of the data; default data/DATASET")
    flag("--clip", metavar="NAME", help="OpenAI's name or a file of the CLIP to start from; default ViT-B/16")
    flag("--merges", metavar="FILE", help="CLIP's BPE merges; default: the cache folder's, downloaded once")
    flag("--checkpoint", metavar="FILE", help="weights of this method to start from, the papers' (P); default: CLIP's")
    flag("--upstream-labels", action="store_true", help="HMDB-51: the published names, four swapped; default: right")
    flag("--compile", action="store_true", help="torch.compile the training step; default: not")
    flag("--out", metavar="DIR", help="run folder; default runs/DATASET-PROTOCOL/METHOD. The same command resumes")
    flag("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="overrides, listed below; "
         "shots=2,4,8 or seed=1,2,3 are so many runs; default: none")
    args = evaluation.check_flags(parser, parser.parse_args(arguments))
    return args if args.protocol else parser.error(f"--protocol is needed, one of {', '.join(PROTOCOLS)}")


if __name__ == "__main__":
    sys.exit(evaluation.run_command(main, parse_args))
