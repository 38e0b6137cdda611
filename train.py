"""Trains TC-CLIP, ILA or ViFi-CLIP by the papers' protocols, on one process or many, and can be interrupted anywhere.

    python train.py --protocol fewshot                                        # the miniature world: no download, minutes
    torchrun --nproc_per_node=4 train.py --protocol fewshot --dataset hmdb51 --set shots=4
    torchrun --nproc_per_node=8 train.py --protocol zeroshot --dataset k400 --data /videos/k400 --out runs/k400

The same command again goes on where it was broken off. Everything random is drawn from (seed, epoch, video) or (seed,
step), so that neither the number of processes and workers nor an interruption changes what is computed, but that batch
norm (ILA; see sync_bn) sees a process's videos alone, and dropout is drawn per process.
"""

import argparse
import contextlib
import dataclasses
import inspect
import json
import math
import os
import re
import sys
import time
import typing
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
from clip_vit import load_clip, read_checkpoint


# ---- recipes ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Recipe:
    """One training run. The defaults are what the papers' recipes share; what differs stands below."""

    protocol: str
    method: str
    dataset: str
    clip: str = "ViT-B/16"  # OpenAI name or file
    merges: str = ""  # path of CLIP's BPE merges; empty: the cache folder
    seed: int = 1024  # of all that is random
    shots: int = 16  # training videos per class
    train_list: str = ""  # published lists and labels, where they are not in the data folder
    test_list: str = ""  # the same, to test on
    labels: str = ""  # CSV id,name or JSON
    # a video as input
    frames: int = 16  # T
    sampling: str = "tsn"  # tsn, uniform
    clips: int = 2  # test views in time
    crops: int = 1  # test views in space, 1 or 3
    pixels: str = "imagenet"  # imagenet, clip: whose pixel mean and deviation
    short_side: int = 0  # pixels, before the crop; 0: 256/224 of the model's resolution
    # augmentation
    flip: float = 0.5  # probability
    scales: tuple = (1.0, 0.875, 0.75, 0.66)  # multi-scale crop, parts of the short side
    jitter: float = 0.8  # probability
    grey: float = 0.2  # probability
    shift: float = 0.0  # largest move, part of the side
    strengths: tuple = (0.4, 0.4, 0.2, 0.1)  # of jitter: brightness, contrast, saturation, hue
    smoothing: float = 0.1  # of the labels
    mixup: float = 0.8  # a of Beta(a, a); 0: never
    cutmix: float = 1.0  # the same
    switch: float = 0.5  # probability of cutmix where both are on
    # optimisation
    epochs: int = 30  # passes over the training videos
    warmup_epochs: float = 5.0  # linear, from 0
    lr: float = 8e-6  # peak rate, of what comes from CLIP
    lr_min: float = 8e-8  # rate at the end
    new_lr: float = 10.0  # times lr, for the modules that CLIP lacks
    position_lr: float = 1.0  # times lr, for temporal position embeddings
    schedule: str = "released"  # released, continuous: see learning_rate
    batch: int = 256  # videos per optimiser step, over all processes
    micro_batch: int = 8  # videos per forward pass, even; costs memory; only batch norm sees it
    weight_decay: float = 0.001  # of AdamW
    position_decay: float = 0.001  # the same, for temporal position embeddings
    clip_grad: float = 0.0  # largest gradient norm; 0: no limit
    precision: str = "fp32"  # fp32, bf16, fp16
    # the run
    eval_every: int = 1  # epochs
    save_every: int = 500  # optimiser steps between checkpoints, beside those at epochs' ends
    keep_best: bool = True  # test the epoch of best validation accuracy; else the last
    sync_bn: bool = False  # batch norm over all processes (ILA)
    workers: int = 8  # loader processes per training process
    keep_decoded: bool = False  # keep decoded clips in memory: for worlds whose clips are as short as T
    model: dict = dataclasses.field(default_factory=dict)  # overrides of the model's own configuration

    def __post_init__(self):
        for name, known in (("sampling", tuple(data.SAMPLERS)), ("pixels", tuple(data.MEANS)), ("crops", (1, 3)),
                            ("schedule", ("released", "continuous")), ("precision", ("fp32", "bf16", "fp16"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)} is unknown; use one of {', '.join(map(str, known))}")
        for name in ("shots", "frames", "clips", "epochs", "batch", "micro_batch", "eval_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
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
MINIATURE_MODEL = {"vifi": dict(prompt="a pic"),
                   "tc": dict(prompt="a pic", positions="joint", context_tokens=16),
                   "ila": dict(align_weight=0.01)}
MINIATURE_ILA = dict(lr=3e-4, new_lr=10.0, position_lr=66.0)


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


def resolve_recipe(protocol, method, dataset, clip=None, merges=None, settings=()):
    """The recipe of a run: the papers' numbers, the miniature's where it is used, then what `key=value` overrides."""
    values = {"model": {}} | TC_RECIPES[protocol]
    if method == "ila":
        values |= ILA_RECIPE
    if method == "ila" and protocol == "supervised" and dataset in ILA_SUPERVISED:
        values |= ILA_SUPERVISED[dataset]
    if dataset == "shapes":
        values |= MINIATURE | (MINIATURE_ILA if method == "ila" else {}) | {"model": MINIATURE_MODEL[method]}
    if dataset == "ssv2":
        values |= {"flip": 0.0}  # left and right are part of its classes
    values |= {key: value for key, value in (("clip", clip), ("merges", merges)) if value}
    run, model = knobs(Recipe), knobs(evaluation.METHODS[method][1])
    for setting in settings:
        name, _, text = setting.partition("=")
        if name in run:
            values[name] = parse_value(name, text, *run[name])
        elif name in model:
            values["model"] = values["model"] | {name: parse_value(name, text, *model[name])}
        else:
            raise ValueError(f"--set {setting}: {method} has no {name!r}; known are {', '.join([*run, *model])}")
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
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(t, recipe.epochs * per_epoch, recipe.warmup_epochs * per_epoch,
                                    recipe.lr * group["multiple"], recipe.lr_min, recipe.schedule)
    return learning_rate(t, recipe.epochs * per_epoch, recipe.warmup_epochs * per_epoch, recipe.lr, recipe.lr_min,
                         recipe.schedule)


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
    """Calls write(file) on a temporary file beside `path`, which then takes its place: never half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # the new name itself is on the disk
    os.close(folder)


def save(path, content):
    write_atomically(path, lambda file: torch.save(content, file))


def save_json(path, content):
    write_atomically(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))


def read_json(path):
    """A dict that save_json wrote. Raises ValueError that names the file."""
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete its folder, or choose another --out") from error


def open_folder(folder, recipe):
    """Makes the run folder, or checks that it holds a run of this very recipe. Raises ValueError where it does not."""
    new, path = json.loads(json.dumps(dataclasses.asdict(recipe))), folder / "recipe.json"
    if path.exists():
        old = read_json(path)
        differ = [f"{key}={old.get(key)}" for key in new if old.get(key) != new[key] and key not in ("workers", "save_every")]
        if differ:
            raise ValueError(f"{folder} holds another run, with {', '.join(differ)}: choose another --out, or delete it")
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds other files and no recipe.json: choose another --out, or an empty folder")
    else:
        folder.mkdir(parents=True, exist_ok=True)


# ---- the loop --------------------------------------------------------------------------------------------------------

@dataclass
class Run:
    """A training run under way; `progress` is all of its state that is neither weights nor optimiser."""

    recipe: Recipe
    folder: Path
    training: data.TrainVideos
    validation: data.TestVideos
    model: nn.Module
    wrapped: nn.Module  # the model, under DDP if there are several processes
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
        clip = load_clip(recipe.clip, recipe.merges or None)
        model = evaluation.build_model(recipe.method, clip, recipe.frames, recipe.model).to(device)
        model.set_classes(train_videos.classes)
        return model
    model = evaluation.first_alone(build)
    if recipe.sync_bn and device.type == "cpu":
        raise ValueError("sync_bn=true needs GPUs")
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe), lr=recipe.lr, betas=(0.9, 0.98), eps=1e-8)
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
    progress = {"step": 0, "sums": [0.0] * 3, "bad": [], "seconds": 0.0, "history": []}
    if (folder / "last.pt").exists():
        state = read_checkpoint(folder / "last.pt")
        try:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            scaler.load_state_dict(state["scaler"])
            progress = state["progress"]
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder / 'last.pt'} is not of this run ({error!s:.200}): choose another --out") from error
    several = evaluation.rank_and_world()[1] > 1
    if recipe.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    wrapped = DistributedDataParallel(model, broadcast_buffers=False) if several else model
    training = data.TrainVideos(train_videos, views_of(recipe, model), recipe.seed, recipe.augmentation(),
                                recipe.keep_decoded)
    validation = data.TestVideos(validation_videos, views_of(recipe, model, clips=1, crops=1), recipe.keep_decoded)
    return Run(recipe, folder, training, validation, model, wrapped, optimizer, scaler, progress)


def views_of(recipe, model, **changes):
    return evaluation.views(dataclasses.asdict(recipe), model, **changes)


def save_run(run):
    """Writes the whole state, from which the run goes on bit by bit, to folder/last.pt."""
    if evaluation.rank_and_world()[0] == 0:
        save(run.folder / "last.pt", {
            "recipe": dataclasses.asdict(run.recipe), "classes": list(run.training.videos.classes),
            "model": run.model.state_dict(), "optimizer": run.optimizer.state_dict(),
            "scaler": run.scaler.state_dict(), "progress": run.progress})


def train_step(run, loader, count, videos, epoch):
    """One optimiser step over the loader's next `count` micro-batches of this process.

    Its gradient is that of the mean loss over the step's `videos`, of all processes, however they are cut up.
    -> sums over this process's videos of (loss, auxiliary loss, 1), and the reading errors.
    """
    recipe, (rank, world), device = run.recipe, evaluation.rank_and_world(), run.model.clip.logit_scale.device
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
        targets = data.soft_targets(labels.to(device), len(run.training.videos.classes), recipe.smoothing)  # (b,C)
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
    """The rest of the epoch that the run is in, with checkpoints on the way."""
    recipe, progress, (rank, world) = run.recipe, run.progress, evaluation.rank_and_world()
    epoch, done = divmod(progress["step"], run.per_epoch)
    run.wrapped.train()
    if recipe.method == "ila":
        run.model.set_epoch(epoch)
    steps = epoch_batches(recipe, len(run.training), epoch, rank, world)[done:]
    loader = iter(run.training.loader([part for parts in steps for part in parts], recipe.workers))
    sums, errors, began = 0, [], time.time()
    for i, parts in enumerate(steps):
        rate = set_rates(run.optimizer, recipe, progress["step"], run.per_epoch)
        videos = min(recipe.batch, len(run.training) - (done + i) * recipe.batch)
        step_sums, step_errors = train_step(run, loader, len(parts), videos, epoch)
        sums, errors = sums + step_sums, errors + step_errors
        progress["step"] += 1
        bar.update()
        if progress["step"] % recipe.save_every == 0 or i == len(steps) - 1:
            reduced = np.sum(evaluation.gather([sums.tolist()]), axis=0)
            progress["sums"] = (np.array(progress["sums"]) + reduced).tolist()
            progress["bad"] = sorted({*progress["bad"], *evaluation.gather(errors)})
            progress["seconds"] += time.time() - began
            sums, errors, began = 0, [], time.time()
            evaluation.refuse_if_bad(progress["bad"], len(run.training))
            if not math.isfinite(progress["sums"][0]):
                raise ValueError(f"the loss is not finite at step {progress['step']}: lower lr, or try precision=bf16")
            if i < len(steps) - 1:
                save_run(run)
    return rate


def finish_epoch(run, rate):
    """Validates, writes the epoch's line to the log, and saves; the best epoch so far also as best.pt."""
    recipe, progress, rank = run.recipe, run.progress, evaluation.rank_and_world()[0]
    epoch, (loss, aux, videos) = progress["step"] // run.per_epoch, progress["sums"]
    line = {"epoch": epoch, "step": progress["step"], "lr": rate, "loss": loss / videos, "aux_loss": aux / videos,
            "seconds": round(progress["seconds"], 2), "bad": progress["bad"]}
    validated = epoch % recipe.eval_every == 0 or epoch == recipe.epochs
    if validated:
        line["top1"] = test(run, run.validation)["top1"]
    best = max((old["top1"] for old in progress["history"] if "top1" in old), default=-1)
    progress["history"].append(line)
    progress["sums"], progress["bad"] = [0.0] * 3, []
    if rank == 0:
        if validated and (line["top1"] > best or not recipe.keep_best):
            save(run.folder / "best.pt", {"recipe": dataclasses.asdict(recipe), "classes": list(run.training.videos.classes),
                                          "model": run.model.state_dict(), "epoch": epoch})
        save_run(run)
        lines = "".join(json.dumps(old) + "\n" for old in progress["history"])
        write_atomically(run.folder / "log.jsonl", lambda file: file.write(lines.encode()))
        evaluation.draw_curves(progress["history"], run.folder / "curves.png")
    evaluation.gather([])  # nobody reads best.pt before it is whole


def test(run, videos):
    """The scores of the model as it stands on a data.TestVideos; its classes are the training's again afterwards."""
    for buffer in run.model.buffers():  # batch norm's running statistics differ between processes: their mean is used
        if run.wrapped is not run.model and buffer.is_floating_point():
            dist.all_reduce(buffer.div_(dist.get_world_size()))
    run.model.set_classes(videos.videos.classes)
    probabilities, bad = evaluation.predict(run.model, videos, run.recipe.micro_batch, run.recipe.workers,
                                            run.recipe.precision)
    run.model.set_classes(run.training.videos.classes)
    return evaluation.scores(probabilities, bad, videos.videos)


def run_recipe(recipe, root, folder, device):
    """Trains by a recipe, tests on every test set, writes results.json and returns what it holds."""
    rank, _ = evaluation.rank_and_world()
    train_videos, tests = data.load_protocol(recipe.protocol, recipe.dataset, root, recipe.shots, recipe.seed,
                                             recipe.train_list, recipe.test_list, recipe.labels)
    evaluation.on_first(lambda: open_folder(folder, recipe))
    if (folder / "results.json").exists():
        return read_json(folder / "results.json")
    run = start(recipe, folder, train_videos, next(iter(tests.values())), device)
    if rank == 0:  # only now: what could not even start leaves no trace
        save_json(folder / "recipe.json", dataclasses.asdict(recipe))
    with tqdm(total=recipe.epochs * run.per_epoch, initial=run.progress["step"], desc=recipe.method, unit="step",
              disable=rank > 0) as bar:
        while run.progress["step"] < recipe.epochs * run.per_epoch:
            finish_epoch(run, train_epoch(run, bar))
    run.model.load_state_dict(read_checkpoint(folder / "best.pt")["model"])
    results = {"recipe": dataclasses.asdict(recipe), "train_videos": len(train_videos.paths), "tests": {},
               "bad": sorted({error for line in run.progress["history"] for error in line["bad"]})}
    for name, videos in tests.items():
        results["tests"][name] = test(run, data.TestVideos(videos, views_of(recipe, run.model), recipe.keep_decoded))
    results["seconds"] = round(run.progress["history"][-1]["seconds"], 1)
    if recipe.protocol == "base2novel":
        base, novel = (results["tests"][name]["top1"] for name in ("base", "novel"))
        results["harmonic_mean"] = 2 * base * novel / max(base + novel, 1e-9)
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

def table(results):
    """{method: results} as lines of text: one row per method, one column per test set's figure."""
    columns, rows = ["method"], {method: [method] for method in results}
    first = next(iter(results.values()))
    for name, score in first["tests"].items():
        for key, title in (("top1", f"{name} top-1"), ("pairs", f"{name}, inside reversed pairs")):
            if key in score:
                columns.append(title)
                for method, result in results.items():
                    rows[method].append(f"{100 * result['tests'][name][key]:.1f}")
    if "harmonic_mean" in first:
        columns.append("harmonic mean")
        for method, result in results.items():
            rows[method].append(f"{100 * result['harmonic_mean']:.1f}")
    columns.append("training seconds")
    for method, result in results.items():
        rows[method].append(f"{result['seconds']:.0f}")
    return "\n".join("  ".join(cell.rjust(len(title)) for cell, title in zip(row, columns))
                     for row in [columns, *rows.values()])


def main(args):
    device, (rank, _) = evaluation.start_processes(), evaluation.rank_and_world()
    dataset = args.dataset or "shapes"
    root = Path(args.data or f"data/{dataset}")
    methods = [args.method] if args.method else ["vifi", "tc"] if dataset == "shapes" else ["tc"]
    out = Path(args.out or f"runs/{dataset}-{args.protocol}")
    results = {}
    if dataset == "shapes" and device.type == "cpu":
        torch.set_num_threads(1)  # 32-pixel tensors gain nothing from more, and lose much where other programs run
    if dataset == "shapes":
        evaluation.first_alone(lambda: prepare_miniature(root, device))
    for method in methods:
        clip = args.clip or (str(root / "clip.pt") if dataset == "shapes" else None)
        recipe = resolve_recipe(args.protocol, method, dataset, clip, args.merges, args.set)
        folder = out if args.out and len(methods) == 1 else out / method
        results[method] = run_recipe(recipe, root, folder, device)
    if rank == 0:
        print(table(results))
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


def describe(config):
    """Lines on the knobs of a configuration dataclass, read off its source: name, default, the comment beside it."""
    found = re.findall(r"^    (\w+): [^=\n]+ = ([^#\n]+?)(?: +# (.*))?$", inspect.getsource(config), re.MULTILINE)
    return "\n".join(f"  {name}={default}  {meaning}" for name, default, meaning in found if name != "model")


def parse_args(arguments=None):
    known = [f"--set, the recipe (the protocols differ):\n{describe(Recipe)}"]
    known += [f"--set, --method {method}:\n{describe(config)}" for method, (_, config) in evaluation.METHODS.items()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="\n".join(known))
    parser.add_argument("--protocol", required=True, choices=PROTOCOLS)
    parser.add_argument("--method", choices=evaluation.METHODS, help="default tc; on the miniature, vifi and tc")
    parser.add_argument("--dataset", help=f"one of {', '.join(data.DATASETS)}; default shapes, the miniature world")
    parser.add_argument("--data", help="folder of the data; default data/<dataset>")
    parser.add_argument("--clip", help="OpenAI name or file of the CLIP to start from; default ViT-B/16")
    parser.add_argument("--merges", help="file of CLIP's BPE merges; default: the cache folder, downloaded once")
    parser.add_argument("--out", help="run folder; default runs/<dataset>-<protocol>/<method>. The same command resumes")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of the recipe and the model")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(evaluation.run_command(main, parse_args))
