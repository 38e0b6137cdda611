"""Evaluates models: accuracy on data sets, classes of single videos, and which videos can be read.

    python eval.py --test hmdb51 --data /videos/hmdb51          # vanilla CLIP, or --checkpoint FILE
    python eval.py --test ucf101 --checkpoint runs/k400/best.pt --ensemble 0.7 --views 4x3
    python eval.py --video clip.mp4 --classes "juggling, running" --checkpoint FILE --picture a.png
    python eval.py --video long.mp4 more/ --classes names.txt --every 2s --json a.json
    python eval.py --check /videos/hmdb51

Sections: models from files - evaluation - writing files - drawing - what a model made of a clip -
classes over time - curves, confusion and reversal - running a script - the model that the flags
name - test sets - single videos - checking files - the command line. train.py uses those up to
running a script, and of the test sets evaluate, describe_data, known_tests and print_notes.

Letters: B videos, V views, T frames, P patches, S seeds per frame, k context tokens, C classes,
R side in pixels; n test videos.
"""

import argparse
import contextlib
import csv
import difflib
import errno
import hashlib
import inspect
import io
import json
import math
import os
import re
import secrets
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import nn
from tqdm import tqdm

import data
from clip_vit import (ACTIVATIONS, BYTES, OPENAI_MODELS, FramePool, PoolConfig, check_fit,
                      load_clip, naming, open_weights, recognise)
from ila import (FLAT, SLOPE, ILA, HostedILA, ILAConfig, earth_movers_distance, interactive_mask,
                 make_ila)
from ila import load_released as load_released_ila
from ila import released_clip
from ila import released_config as released_ila_config
from video_prompt import TCCLIP, TCConfig
from video_prompt import load_released as load_released_tc
from video_prompt import released_config as released_tc_config


class Method(NamedTuple):
    """A method that the scripts offer."""

    title: str
    model: Callable  # makes one from a CLIP and a config; FramePool shows all that it must offer
    config: type  # its settings, a frozen dataclass


METHODS = {
    "tc": Method("TC-CLIP", TCCLIP, TCConfig),
    "ila": Method("ILA", make_ila, ILAConfig),
    "vifi": Method("frame pooling", FramePool, PoolConfig)}
# How vanilla CLIP sees a video, as a recipe; the readers of released models say what differs.
VANILLA = dict(method="vifi", frames=16, sampling="tsn", clips=2, crops=1, pixels="clip",
               short_side=0, clip="ViT-B/16", model={})
OPENAI_TOWERS = {  # (width, patch, resolution): name
    (768, 32, 224): "ViT-B/32", (768, 16, 224): "ViT-B/16",
    (1024, 14, 224): "ViT-L/14", (1024, 14, 336): "ViT-L/14@336px"}
OWN_FIELDS = (*VANILLA, "merges", "probe")  # what a recipe in a checkpoint must have
# the largest numbers in a recipe that comes from a file
LARGEST_IN_FILE = {"frames": 1024, "clips": 100, "crops": 3, "short_side": 8192}
MOST_SETTING = 100_000  # a number among its model's settings
DRAWN_BY = "temporal-clip"  # stands in every picture that is drawn here


# ---- models from files ---------------------------------------------------------------------------

class LinearProbe(nn.Module):
    """A linear classifier over the standardised video feature of a frozen model [paper, ILA
    Table 12]."""

    def __init__(self, model, num_classes):
        super().__init__()
        self.model = model.requires_grad_(False)
        embed = model.clip.visual.embed
        self.head = nn.Sequential(
            nn.LayerNorm(embed, elementwise_affine=False), nn.Linear(embed, num_classes))
        self.names = None

    @property
    def clip(self):
        return self.model.clip

    def train(self, mode=True):
        """Only the head: the frozen model stays in eval mode, its batch norm and dropout rest."""
        super().train(mode)
        self.model.eval()
        return self

    def set_classes(self, names):
        """Checks that the names are those of the training. Raises ValueError if not."""
        names, count = list(names), self.head[1].out_features
        if len(names) != count or self.names not in (None, names):
            raise ValueError(f"{len(names)} classes that are not the {count} of its training: a "
                             "linear probe knows no others")
        self.names = names

    def forward(self, video):
        """Normalised video (B,T,3,R,R) -> logits (B,C), and the auxiliary loss 0."""
        with torch.no_grad():
            feature = self.model.encode_video(video)  # (B,E)
        logits = self.head(feature)
        return logits, logits.new_zeros(())


def build_model(recipe, clip):
    """The model of a recipe (a dict) around a CLIP; recipe["model"] overrides its config."""
    method = METHODS[recipe["method"]]
    settings = dict(recipe["model"])
    if "frames" in method.config.__dataclass_fields__:
        settings = {"frames": recipe["frames"]} | settings
    return method.model(clip, method.config(**settings))


def check_recipe(recipe):
    """Raises ValueError for a recipe in a file that this version does not know, or whose numbers
    would take more memory than the file's tensors can be worth."""
    missing = [name for name in OWN_FIELDS if name not in recipe]
    if missing:
        raise ValueError(f"no {', '.join(missing)} in its recipe: another version of train.py "
                         "wrote it; train anew")
    for name, known in (("method", METHODS), ("sampling", data.SAMPLERS), ("pixels", data.MEANS)):
        if recipe[name] not in known:
            raise ValueError(f"its {name} {recipe[name]!r:.40} is unknown")
    for name, most in LARGEST_IN_FILE.items():
        least = 0 if name == "short_side" else 1
        if type(recipe[name]) is not int or not least <= recipe[name] <= most:
            raise ValueError(f"its {name} is {recipe[name]!r:.40}; it must lie between {least} and "
                             f"{most}")
    known = METHODS[recipe["method"]].config.__dataclass_fields__
    for name, value in recipe["model"].items():
        if name not in known:
            raise ValueError(f"its model has the setting {name!r:.40}, which this version does not")
        numbers = value if isinstance(value, (tuple, list)) else (value,)
        if any(isinstance(n, (int, float)) and not abs(n) <= MOST_SETTING for n in numbers):
            raise ValueError(f"its setting {name}={value!r:.40} is out of range")


def usable_merges(path):
    """A path of BPE merges that a file names, if it is an ordinary file; else None."""
    return path if isinstance(path, str) and os.path.isfile(path) else None


def read_own(weights, merges):
    """A checkpoint of train.py: the model, and its recipe with its classes and the keys of the
    videos that it was trained on (data.keys_of)."""
    content = weights.content
    missing = [key for key in ("recipe", "model", "classes") if key not in content]
    if missing:
        raise ValueError(f"no {', '.join(missing)} in it: another version of train.py wrote it")
    recipe, classes = content["recipe"], content["classes"]
    check_recipe(recipe)
    clip = load_clip(weights._replace(name=""), merges or usable_merges(recipe["merges"]))
    model = build_model(recipe, clip)
    if recipe["probe"]:
        model = LinearProbe(model, len(classes))
    check_fit(model, weights.state)
    model.load_state_dict(weights.state)
    if recipe["probe"] or recipe["model"].get("num_classes"):
        model.set_classes(classes)  # a linear head knows no others from now on
    told = {"classes": [str(name) for name in classes],
            "trained_on": [str(key) for key in content.get("trained_on", ())]}
    return model, recipe | told


def check_base(state, clip):
    """Raises ValueError if a released video model was not tuned from this kind of CLIP."""
    for key, own in (("image_encoder.conv1.weight", clip.visual.conv1.weight),
                     ("text_encoder.positional_embedding", clip.positional_embedding)):
        if key in state and state[key].shape != own.shape:
            raise ValueError(f"it was tuned from another CLIP: {key} is {tuple(state[key].shape)} "
                             f"there and {tuple(own.shape)} here; give its --clip")


def settings_of(config):
    """The settings in which a model's config differs from the defaults, frames apart."""
    values = {field.name: getattr(config, field.name) for field in fields(config)
              if getattr(config, field.name) != field.default}
    values.pop("frames", None)
    return values


def read_tc(weights, clip, merges):
    """A released TC-CLIP. It lacks the token embedding, which is that of the `clip` it began as."""
    check_base(weights.state, clip)
    config = released_tc_config(weights.state)
    model = TCCLIP(clip, config)
    load_released_tc(model, weights.state)
    return model, {"method": "tc", "frames": config.frames, "model": settings_of(config)}


def read_vifi(weights, clip, merges):
    """A released ViFi-CLIP, which is frame pooling; its token embedding comes as for TC-CLIP."""
    check_base(weights.state, clip)
    state = {"token_embedding.weight": clip.token_embedding.weight}
    for key, value in weights.state.items():
        if key.startswith("image_encoder."):
            key = "visual." + key.removeprefix("image_encoder.")
        if key != "prompt_learner.complete_text_embeddings":  # of the classes of its training
            state[key.removeprefix("text_encoder.")] = value
    return FramePool(load_clip(state, clip.merges)), {"method": "vifi"}


HOST_VIEWS = {  # [released] how ILA's hosts see a video; EVL and TimeSformer are tested as trained
    "clip": {},
    "evl": {"pixels": "clip", "clips": 3},
    "timesformer": {"pixels": "slowfast", "clips": 1, "crops": 3},
}


def read_ila(weights, clip, merges):
    """A released ILA, TimeSformer or EVL.

    ILA's file holds CLIP too, for SSv2 only the image tower, and TimeSformer's its own tower. EVL's
    holds none: it is that of `clip`.
    """
    config = released_ila_config(weights.state)
    own_clip = clip or load_clip(released_clip(weights.state), merges)
    model = make_ila(own_clip, config)
    load_released_ila(model, weights.state)
    recipe = {"method": "ila", "frames": config.frames, "model": settings_of(config)}
    if config.num_classes is not None:
        recipe["sampling"] = "uniform"
    return model, recipe | {"clip": openai_name(own_clip.visual)} | HOST_VIEWS[config.host]


def openai_name(visual):
    """The name of OpenAI's CLIP with an image tower of this size; empty if there is none."""
    patch = visual.conv1.kernel_size[0]
    return OPENAI_TOWERS.get((visual.width, patch, visual.resolution), "")


RELEASED = {  # by the format's title
    "TC-CLIP": read_tc, "ViFi-CLIP": read_vifi, "ILA": read_ila, "TimeSformer": read_ila,
    "EVL": read_ila}
NEED_CLIP = ("TC-CLIP", "ViFi-CLIP", "EVL")  # their files hold no token embedding, EVL's no CLIP


def load_model(source, clip="ViT-B/16", merges=None, device=None, activation=None, head_width=None):
    """A model in eval mode, and the recipe (a dict) of how it sees videos.

    `source` is a checkpoint of train.py or its run folder, a released TC-CLIP, ViFi-CLIP, ILA, EVL
    or TimeSformer, or all that load_clip takes, for vanilla CLIP. `clip` is what a released
    TC-CLIP, ViFi-CLIP or EVL was tuned from; it gives what the file lacks. Raises ValueError that
    names the file.
    """
    weights = open_weights(source)
    unusable = f"{weights.name}: not weights that can be used" if weights.name else ""
    with naming(unusable):
        own = isinstance(weights.content, dict) and "recipe" in weights.content
        title = "ours" if own else recognise(weights).title
    facts = {"activation": activation, "head_width": head_width}
    base = None
    if title in NEED_CLIP:
        base = open_weights(clip)
        base = base._replace(facts={"activation": "quick_gelu"} | base.facts)  # as OpenAI's
        base = load_clip(base, merges, **facts)
    with naming(unusable), refusing_odd_content():
        if title == "ours":
            model, recipe = read_own(weights, merges)
        elif title in RELEASED:
            model, recipe = RELEASED[title](weights, base, merges)
            recipe = VANILLA | {"pixels": "imagenet", "clip": str(clip)} | recipe
            check_fit(model, model.state_dict())  # all are finite
        else:
            model = FramePool(load_clip(weights._replace(name=""), merges, **facts))
            recipe = VANILLA | {"clip": weights.name}
    return model.eval().to(device), recipe


@contextlib.contextmanager
def refusing_odd_content():
    """Turns what odd content of a file causes into a ValueError."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def load_tuned(model, source, clip, merges=None):
    """Loads a checkpoint, ours or released, into a model of the same method and configuration.

    Raises ValueError if it is of another.
    """
    tuned, recipe = load_model(source, clip, merges)
    state = tuned.state_dict()
    try:
        check_fit(model, state)
    except ValueError as error:
        settings = " ".join(f"{name}={value}" for name, value in recipe["model"].items())
        raise ValueError(f"{source}: not weights for this run, but of {recipe['method']} with "
                         f"{recipe['frames']} frames {settings:.80} ({error!s:.100})") from error
    model.load_state_dict(state)


def ensemble(base, tuned, weight):
    """Weight ensembling (WiSE-FT), of two state_dicts with the same keys.

    What CLIP lacks stays as it was fine-tuned [released]; temporal positions, which began as
    CLIP's, are mixed. Raises ValueError if `tuned` was not tuned from `base`.
    """
    differ = [key for key, value in tuned.items()
              if key not in base or base[key].shape != value.shape]
    if differ:
        raise ValueError("the checkpoint was not tuned from this CLIP; they differ in "
                         f"{', '.join(differ[:3]):.120}: give its --clip")
    mixed = {}
    for key, value in tuned.items():
        if key.startswith("clip.") or key == "vision.positions":
            value = torch.lerp(base[key].to(value), value, weight)  # (1 - w) CLIP + w fine-tuned
        mixed[key] = value
    return mixed


def eval_views(recipe, model):
    """How a model sees a video at test time, from its recipe (a dict): a data.Views."""
    size = model.clip.visual.resolution
    short_side = recipe["short_side"]
    if 0 < short_side < size:
        raise ValueError(f"short_side={short_side}: must be at least the model's {size} pixels, "
                         "or 0")
    kept = {key: recipe[key] for key in ("frames", "sampling", "clips", "crops", "pixels")}
    usual = size if recipe["crops"] == 3 else round(size * 256 / 224)  # [released]
    return data.Views(size=size, short_side=short_side or usual, **kept)


def device_of(model):
    """Where a model lies."""
    return model.clip.visual.class_embedding.device


def device_name(device):
    """The GPU's name, or the CPU's number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the CPU, {data.counted(torch.get_num_threads(), 'thread', 'threads')}"


# ---- evaluation ------------------------------------------------------------------------------

BAD_SHARE = 0.05  # a larger share of unreadable videos stops a run
SCORES = {  # the numbers in a test set's scores, as they are called on the screen
    "top1": "top-1",
    "top5": "top-5",
    "pairs": "inside reversed pairs",
    "temporal": "temporal",
    "static": "static",
    "temporal score": "temporal score",
}
PAPER_COLUMNS = {
    "zeroshot": ("hmdb51", "ucf101", "k600"),
    "fewshot": ("2 shots", "4 shots", "8 shots", "16 shots"),
    "base2novel": ("base", "novel", "harmonic mean"),
    "supervised": ("top-1", "top-5"),
}
# [paper] the numbers in these columns, in %, by protocol, method, training data, backbone and
# frames. The zero-shot rows are of models ensembled with CLIP, weight 0.7, except CLIP's own.
PAPERS = {
    "zeroshot clip none ViT-B/16 16": (40.8, 63.2, 59.8),  # the bare names, ImageNet's pixels
    "zeroshot vifi k400 ViT-B/16 16": (52.2, 81.0, 73.9),
    "zeroshot tc k400 ViT-B/16 16": (54.2, 82.9, 75.8),
    "zeroshot tc k400 ViT-B/16 16, LLM names": (56.0, 85.4, 78.1),
    "fewshot tc hmdb51 ViT-B/16 16": (57.3, 62.3, 67.3, 68.6),
    "fewshot tc hmdb51 ViT-B/16 16, LLM names": (58.6, 63.3, 65.5, 68.8),
    "fewshot tc hmdb51 ViT-B/16 16, from a Kinetics model": (65.3, 68.5, 71.4, 73.0),
    "fewshot tc ucf101 ViT-B/16 16": (85.9, 89.9, 92.5, 94.6),
    "fewshot tc ucf101 ViT-B/16 16, LLM names": (86.8, 90.1, 92.0, 94.3),
    "fewshot tc ucf101 ViT-B/16 16, from a Kinetics model": (94.1, 95.6, 96.6, 97.3),
    "fewshot tc ssv2 ViT-B/16 16": (7.3, 8.6, 9.3, 14.0),
    "fewshot tc ssv2 ViT-B/16 16, from a Kinetics model": (8.7, 10.1, 12.1, 15.2),
    "base2novel tc k400 ViT-B/16 16": (78.9, 63.6, 70.4),
    "base2novel tc k400 ViT-B/16 16, LLM names": (79.1, 65.4, 71.6),
    "base2novel tc hmdb51 ViT-B/16 16": (73.3, 54.1, 62.2),
    "base2novel tc hmdb51 ViT-B/16 16, LLM names": (73.3, 59.1, 65.5),
    "base2novel tc hmdb51 ViT-B/16 16, from a Kinetics model": (79.4, 58.3, 67.2),
    "base2novel tc ucf101 ViT-B/16 16": (95.5, 78.0, 85.9),
    "base2novel tc ucf101 ViT-B/16 16, LLM names": (95.4, 81.6, 88.0),
    "base2novel tc ucf101 ViT-B/16 16, from a Kinetics model": (97.5, 84.5, 90.5),
    "base2novel tc ssv2 ViT-B/16 16": (17.5, 13.4, 15.2),
    "base2novel tc ssv2 ViT-B/16 16, from a Kinetics model": (19.6, 15.6, 17.4),
    "supervised tc k400 ViT-B/16 16": (85.2, 96.9),
    "supervised ila k400 ViT-B/32 8": (81.3,),
    "supervised ila k400 ViT-B/32 16": (82.4,),
    "supervised ila k400 ViT-B/16 8": (84.0,),
    "supervised ila k400 ViT-B/16 16": (85.7,),
    "supervised ila k400 ViT-B/32 8 align=first": (80.7,),  # Table 6
    "supervised ila k400 ViT-B/32 8 align=middle": (80.8,),
    "supervised ila k400 ViT-B/32 8 blocks=1-3": (80.4,),  # Table 7
    "supervised ila k400 ViT-B/32 8 blocks=4-6": (80.5,),
    "supervised ila k400 ViT-B/32 8 blocks=7-9": (80.4,),
    "supervised ila k400 ViT-B/32 8 blocks=10-12": (80.3,),
    "supervised ila k400 ViT-B/32 8 operator=window": (80.8,),  # Table 8
    "supervised ila k400 ViT-B/32 8 use=add": (80.2,),  # Table 9
    "supervised ila k400 ViT-B/32 8 use=concat": (80.6,),
    "supervised ila k400 ViT-B/32 8 rival=none": (79.8,),  # Table 4
    "supervised ila k400 ViT-B/32 8 rival=xclip": (80.4,),
    "supervised ila k400 ViT-B/32 8 rival=divided": (80.6,),
    "supervised ila k400 ViT-B/32 8 rival=shift": (80.1,),
    "supervised ila k400 ViT-B/32 8 rival=hungarian": (81.0,),
    "supervised ila k400 ViT-B/32 8 rival=average": (80.4,),
    "supervised ila k400 ViT-B/32 8 video_prompt=False": (80.8,),  # Table 11
    "supervised ila k400 ViT-B/16 8 rival=none host=evl": (82.9,),  # Table 3
    "supervised ila k400 ViT-B/16 8 host=evl": (83.5,),
    "supervised ila k400 ViT 8 rival=divided host=timesformer": (78.0,),
    "supervised ila k400 ViT 8 host=timesformer": (79.8,),
    "supervised ila k400 ViT 32 finetune=True": (83.3,),  # Table 10
    "supervised ila k400 ViT-L/14 8": (88.0,),
    "supervised ila k400 ViT-L/14@336px 16": (88.7,),
    "supervised ila ssv2 ViT-B/16 8": (65.0,),
    "supervised ila ssv2 ViT-B/16 16": (66.8,),
    "supervised ila ssv2 ViT-L/14 8": (67.8,),
    "supervised ila ssv2 ViT-L/14@336px 16": (70.2,),
}
TESTED_AS = {
    "zeroshot": "zero-shot, ensembled with weight 0.7, mean of three splits",
    "fewshot": "few-shot, first split",
    "base2novel": "base-to-novel, mean of three seeds",
    "supervised": "supervised",
}
# the settings of ILA that have rows of their own in its tables
ILA_TABLES = ("align", "blocks", "operator", "use", "rival", "host", "finetune", "video_prompt")


def paper_numbers(recipe):
    """{column: number in %} of the row of PAPERS for a training run's recipe (a dict); or {}."""
    settings, config = recipe["model"], METHODS[recipe["method"]].config
    from_imagenet = settings.get("finetune") or settings.get("host") == "timesformer"
    clip = "ViT" if from_imagenet else recipe["clip"]
    key = f"{recipe['protocol']} {recipe['method']} {recipe['dataset']} {clip} {recipe['frames']}"
    for name in ILA_TABLES:
        if name in settings and settings[name] != getattr(config, name):
            key += f" {name}={settings[name]}"
    if recipe["labels"] == "llm":
        key += ", LLM names"
    if recipe["checkpoint"]:
        key += ", from a Kinetics model"
    return dict(zip(PAPER_COLUMNS[recipe["protocol"]], PAPERS.get(key, ())))


def resolve_precision(device, name):
    """What `auto` stands for: bf16 on a GPU that has it, fp16 on any other, fp32 on a CPU."""
    if name != "auto":
        return name
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def autocast(device, precision):
    """The context in which the models run: fp32, bf16 or fp16."""
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


@torch.no_grad()
def view_logits(model, views, pixels, precision):
    """A model's logits for each view: uint8 (b,V,T,3,R,R) -> float32 (b,V,C) on the model's device.

    Raises ValueError if a logit is not finite.
    """
    device = device_of(model)
    video = torch.as_tensor(views).flatten(0, 1).to(device, non_blocking=True)
    video = data.normalise(video, pixels)
    with autocast(device, precision):
        logits, _ = model(video)  # (b*V,C)
    if not logits.isfinite().all():
        advice = "" if precision == "fp32" else "; try --precision fp32"
        raise ValueError("the model gives logits that are not finite: its weights are damaged, or "
                         f"too large for {precision}{advice}")
    return logits.float().unflatten(0, views.shape[:2])


def stop_if_unreadable(errors, total):
    """Raises ValueError with two of the errors if over 5 % of `total` videos are unreadable."""
    if len(errors) > BAD_SHARE * total:
        raise ValueError(f"{len(errors)} of {total} videos cannot be read, more than "
                         f"{BAD_SHARE:.0%}: {'; '.join(errors[:2])}; eval.py --check names all")


def set_classes(model, names, templates=None):
    """Sets a model's classes, put into prompt templates such as "a video of {}." if there are any.

    Raises ValueError if the model has learned its prompt.
    """
    if not templates:
        model.set_classes(names)
    elif "templates" in inspect.signature(model.set_classes).parameters:
        model.set_classes(names, templates=templates)
    else:
        raise ValueError("--prompt: this model has learned its prompt or its classes; leave it out")


def predict(model, videos, batch=8, workers=0, precision="fp32", title="evaluating",
            templates=None):
    """The probabilities of a data.TestVideos' classes: softmaxed, then averaged over the views.

    Every video is read once, whatever the number of processes. Returns (n,C) float32, NaN in the
    rows of unreadable videos, and [(index, error)], both the same on all processes. Raises
    ValueError if more than 5 % cannot be read.
    """
    set_classes(model.eval(), videos.video_list.classes, templates)
    predicted, errors = [], []
    loader = videos.loader(batch, workers)
    for indices, views, unreadable in data.progress_bar(loader, desc=title, leave=False):
        errors += unreadable
        if indices:
            logits = view_logits(model, views, videos.views.pixels, precision)  # (b,V,C)
            mean = logits.softmax(dim=-1).mean(dim=1)  # (b,C)
            predicted += zip(indices, mean.cpu().numpy())
    predicted, errors = data.gather(predicted), sorted(data.gather(errors))
    stop_if_unreadable([error for _, error in errors], len(videos))
    shape = len(videos), len(videos.video_list.classes)
    probabilities = np.full(shape, np.nan, dtype=np.float32)
    for i, row in predicted:
        probabilities[i] = row
    return probabilities, errors


def top_k(probabilities, labels, k):
    """Share of videos whose class is among the k most probable; an unreadable video is wrong.

    Equal probabilities rank by label, the lower first, as in argmax.
    """
    labels = np.asarray(labels)[:, None]  # (n,1)
    own = np.take_along_axis(probabilities, labels, axis=1)  # (n,1)
    before = np.arange(probabilities.shape[1]) < labels  # (n,C)
    above = (probabilities > own) | (probabilities == own) & before
    right = (above.sum(axis=1) < k) & ~np.isnan(own[:, 0])  # (n,)
    return float(right.mean())


def inside_pairs(probabilities, video_list):
    """Share of videos that prefer their class to its reversal, "red to blue" to "blue to red".

    A tie counts half, so that a model that cannot see the order of frames scores exactly .5 on
    clips and their reversals. None if no class has a reversal.
    """
    ids = {name: i for i, name in enumerate(video_list.classes)}
    reversal = [ids.get(data.opposite(name), i) for i, name in enumerate(video_list.classes)]
    labels = np.asarray(video_list.labels)
    opposites = np.array(reversal)[labels]  # (n,) the label itself where there is no reversal
    rows = np.flatnonzero(opposites != labels)
    if not len(rows):
        return None
    own = probabilities[rows, labels[rows]]
    other = probabilities[rows, opposites[rows]]
    return float(((own > other) + 0.5 * (own == other)).mean())


def subset_scores(probabilities, labels, subsets):
    """Top-1, among all classes, on the videos of each of `subsets` {name: labels}.

    If there are temporal and static classes, also the temporal score, the first minus the second
    [paper, ILA Table 13].
    """
    scores = {}
    for name, members in subsets.items():
        rows = np.isin(labels, members)
        if rows.any():
            scores[name] = top_k(probabilities[rows], np.asarray(labels)[rows], 1)
    if {"temporal", "static"} <= scores.keys():
        scores["temporal score"] = scores["temporal"] - scores["static"]
    return scores


def class_accuracy(probabilities, labels, classes):
    """{class: share of its videos that are right}, None for a class without videos."""
    labels = np.asarray(labels)
    shares = {}
    for label, name in enumerate(classes):
        rows = labels == label
        shares[name] = top_k(probabilities[rows], labels[rows], 1) if rows.any() else None
    return shares


# ---- writing files ---------------------------------------------------------------------------

def write_atomically(path, write):
    """Calls write(file) on a temporary file, which then takes the place of `path`, whole.

    What is no ordinary file, such as /dev/null, is written to as it is. Raises OSError that names
    `path` if the disk is full or the folder is not writable.
    """
    path = Path(os.path.realpath(path))  # a link stays; its target is replaced
    if path.exists() and not path.is_file():
        with open(path, "wb") as file:
            return write(file)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        reason = " ".join(str(error).split())
        raise OSError(
            f"{path} cannot be written ({reason:.160}) and stays as it was: make room, or give the "
            "right to write, and the same command goes on") from error
    finally:
        temporary.unlink(missing_ok=True)
    flush_folder(path.parent)


def flush_folder(folder):
    """Puts new names in a folder on the disk now, where the file system can do that."""
    with contextlib.suppress(OSError):  # some network shares and Windows cannot; the file is whole
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path, text):
    """Writes text to a file, or to standard output if path is -; names need not be UTF-8."""
    encoded = text.encode("utf-8", "backslashreplace")
    if path == "-":
        print(encoded.decode(), end="")
    else:
        write_atomically(path, lambda file: file.write(encoded))


def write_json(path, content):
    """Writes content as JSON to a file, or to standard output if path is -."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_picture(picture, path):
    """Writes a picture as its suffix says, .png or .jpg; with DRAWN_BY in it, see is_drawn."""
    if Path(path).suffix.lower() == ".png":
        told = PngInfo()
        told.add_text("Software", DRAWN_BY)
        write_atomically(path, lambda file: picture.save(file, "PNG", pnginfo=told))
    else:
        write_atomically(path, lambda file: picture.save(file, "JPEG", comment=DRAWN_BY))


def is_drawn(path):
    """Whether a file is a picture that write_picture wrote."""
    try:
        with Image.open(path) as picture:
            told = picture.info.get("Software"), picture.info.get("comment")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # it is no picture
        return False
    return DRAWN_BY in told or DRAWN_BY.encode() in told


def write_predictions(path, probabilities, video_list):
    """A CSV file: path, label and the five most probable classes of each video, of the unreadable
    ones none."""
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    count = min(5, len(video_list.classes))
    header = ["path", "label"]
    for place in range(1, count + 1):
        header += [f"class {place}", f"probability {place}"]
    writer.writerow(header)
    for video, label, row in zip(video_list.paths, video_list.labels, probabilities):
        cells = [video, video_list.classes[label]]
        if not np.isnan(row[0]):
            for i in np.argsort(-row, kind="stable")[:count]:
                cells += [video_list.classes[i], f"{row[i]:.6f}"]
        writer.writerow(cells)
    write_text(path, rows.getvalue())


# ---- drawing ---------------------------------------------------------------------------------

INK, GRID, PAPER = (40, 40, 40), (220, 220, 220), (255, 255, 255)
COLOURS = ((0, 95, 175), (205, 85, 0))  # blue, orange
QUARTERS = (0, 0.25, 0.5, 0.75, 1)  # where an axis has ticks


@lru_cache
def font_of(size, ascii):
    """Pillow's font for ASCII, otherwise a system font if one exists."""
    if not ascii:
        for name in ("DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf"):
            with contextlib.suppress(OSError):
                return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def draw_text(draw, xy, text, size=18, anchor="la", width=None, fill=INK):
    """Writes a text, shortened to what fits into `width` pixels."""
    font = font_of(size, text.isascii())
    while width and len(text) > 3 and font.getlength(text) > width:
        text = text.removesuffix("...")[:-1] + "..."
    draw.text(xy, text, fill=fill, font=font, anchor=anchor)


def blank_picture(width, height, title):
    """An empty picture with a title, and what draws on it."""
    picture = Image.new("RGB", (width, round(height)), PAPER)
    draw = ImageDraw.Draw(picture)
    draw_text(draw, (20, 16), title, 26)
    return picture, draw


def clock(seconds):
    """Seconds as minutes and seconds, 0:02 or 0:00.5, or with hours, 1:02:03."""
    minutes, seconds = divmod(round(seconds, 2), 60)
    hours, minutes = divmod(round(minutes), 60)
    text = f"{seconds:02.0f}"
    if seconds % 1:
        text = f"{seconds:05.2f}".rstrip("0").rstrip(".")
    return f"{hours}:{minutes:02}:{text}" if hours else f"{minutes}:{text}"


def frame_image(frame, side):
    """A frame (3,R,R) uint8 as an image of side x side pixels."""
    image = Image.fromarray(frame.permute(1, 2, 0).numpy())
    return image.resize((side, side), Image.Resampling.BICUBIC)


def patch_image(values, side):
    """Colours of the patches, uint8 (P,3), as an image of side x side pixels."""
    grid = math.isqrt(len(values))
    image = Image.fromarray(values.reshape(grid, grid, 3))
    return image.resize((side, side), Image.Resampling.NEAREST)


def heat(values):
    """Colours for values (P,), from the lowest, dark blue, to the highest, yellow: uint8 (P,3)."""
    x = (values - values.min()) / (values.max() - values.min() + 1e-12)
    return np.stack([255 * x ** 0.5, 255 * x ** 1.5, 80 * (1 - x)], axis=-1).astype(np.uint8)


def context_colours(k):
    """k colours, neighbours far apart: hues in steps of the golden ratio -> uint8 (k,3)."""
    hues = np.arange(k) * 0.618034 % 1  # in turns
    distance = np.abs((hues[:, None] * 6 + np.array([0, 4, 2])) % 6 - 3)  # (k,3), in sixths
    wheel = np.clip(distance - 1, 0, 1)
    return (255 * (0.25 + 0.75 * wheel)).astype(np.uint8)


# ---- what a model made of a clip -------------------------------------------------------------

class Columns(NamedTuple):
    """A title, the names of the rows, and for each frame that is shown the images of its column."""

    title: str
    rows: tuple
    images: list


def context_column(frame, scores, seeds, group, colours, side):
    """TC-CLIP: a frame, its attention (P,), its seeds (S,), and their context tokens (S,)."""
    frame = frame_image(frame, side)
    grey = frame.convert("L").convert("RGB")
    pale = Image.blend(grey, Image.new("RGB", frame.size, PAPER), 0.45)
    chosen = np.zeros((len(scores), 3), np.uint8)
    painted = np.zeros_like(chosen)
    chosen[seeds] = 255
    painted[seeds] = colours[group]
    mask = patch_image(chosen, side).convert("L")
    attention = Image.blend(frame, patch_image(heat(scores), side), 0.6)
    coloured = Image.blend(frame, patch_image(painted, side), 0.75)
    return (frame, attention, Image.composite(frame, pale, mask),
            Image.composite(coloured, pale, mask))


def context_columns(block, summary, clip, shown, side):
    """TC-CLIP's Columns: the summary that block `block` made of a clip."""
    (T, S), k = summary.seeds.shape[1:], summary.sizes.shape[1]
    scores = summary.scores.reshape(T, -1).cpu().numpy()  # (T,P)
    seeds = summary.seeds.reshape(T, S).cpu().numpy()
    group = summary.group.reshape(T, S).cpu().numpy()
    colours = context_colours(k)
    title = f"TC-CLIP, block {block + 1}: {T} frames x {S} seeds, merged to {k} context tokens"
    if k == T * S:
        title = f"TC-CLIP, block {block + 1}: {T} frames x {S} seeds, all of them context tokens"
    rows = ("frame", "attention of\nthe class token", f"the {S} seeds",
            "context tokens\n(one colour each)")
    return Columns(title, rows, [
        context_column(clip[t], scores[t], seeds[t], group[t], colours, side) for t in shown])


def point_column(frame, point, mask, side):
    """ILA: a frame with its interactive point (x, y) and the box around it, and its mask (P,)."""
    frame = frame_image(frame, side)
    masked = Image.blend(frame, patch_image(heat(mask), side), 0.6)
    grid = len(mask) ** 0.5
    patch = side / grid
    x, y = ((point + 1) / 2 * (grid - 1) + 0.5) * patch  # -1, 1: middles of the outermost patches
    reach = (FLAT + 1 / SLOPE / 2) / 2 * (grid - 1) * patch  # where the mask has fallen to 1/2
    draw = ImageDraw.Draw(frame)
    draw.rectangle([x - reach, y - reach, x + reach, y + reach], outline=COLOURS[1], width=3)
    draw.ellipse([x - 5, y - 5, x + 5, y + 5], fill=COLOURS[1], outline=PAPER)
    return frame, masked


def point_columns(model, points, clip, shown, side):
    """ILA's Columns: the points (1,T,2) of the last block that aligns."""
    grid = math.isqrt(len(model.clip.visual.positional_embedding) - 1)
    masks = interactive_mask(points[-1], grid).flatten(2)[0].cpu().numpy()  # (T,P)
    last = points[-1][0].cpu().numpy()  # (T,2)
    title = f"ILA, aligned block {len(points)}: interactive points, and the masks around them"
    return Columns(title, ("frame, point\nand box", "mask"),
                   [point_column(clip[t], last[t], masks[t], side) for t in shown])


def clip_columns(model, clip, pixels, shown, side):
    """What TC-CLIP or ILA made of a clip in the last block that tells; of other models frames."""
    device = device_of(model)
    video = data.normalise(clip.to(device), pixels)[None]  # (1,T,3,R,R)
    if isinstance(model, TCCLIP):
        summaries = model.vision(model.clip.visual, video)[2]
        if summaries:
            block = max(summaries)
            return context_columns(block, summaries[block], clip, shown, side)
    if isinstance(model, (ILA, HostedILA)):
        points = model.interactive_points(video)
        if points:
            return point_columns(model, points, clip, shown, side)
    return Columns(f"What the model saw: {len(clip)} frames", ("frame",),
                   [(frame_image(clip[t], side),) for t in shown])


def draw_bars(draw, top, names, values):
    """A horizontal bar for each name, 1040 pixels long for the value 1, one below the other."""
    for row, (name, value) in enumerate(zip(names, values)):
        y, end = top + 34 * row, 460 + max(0, 1040 * value)
        draw_text(draw, (450, y + 11), name, 20, "rm", width=430)
        draw.rectangle([460, y, end + 1, y + 22], fill=COLOURS[0])
        draw_text(draw, (end + 12, y + 11), f"{value:.3f}", 20, "lm")


@torch.no_grad()
def draw_clip(model, clip, path, classes, probabilities, pixels="imagenet", name="", times=None):
    """Eight frames of a clip, what the model made of them, and bars of the classes, as a PNG.

    clip: (T,3,R,R) uint8. TC-CLIP shows seeds and context tokens, ILA its interactive points.
    name: the video's; times: where each frame lies in it, in seconds, or None.
    """
    shown = np.unique(np.linspace(0, len(clip) - 1, min(len(clip), 8)).round().astype(int))
    side = min(1400 // len(shown) - 6, 300)
    title, rows, images = clip_columns(model, clip, pixels, shown, side)
    top = 104 if name else 80
    bars = top + 24 + len(rows) * (side + 6)
    picture, draw = blank_picture(1600, bars + 36 + 34 * len(classes), title)
    draw_text(draw, (20, 52), name, 18, width=1560)
    for row, row_name in enumerate(rows):
        draw_text(draw, (20, top + row * (side + 6) + side // 2), row_name, 20, "lm")
    for column, t in enumerate(shown):
        left = 190 + column * (side + 6)
        label = f"{t + 1}" if times is None else f"{t + 1}:  {clock(times[t])}"
        draw_text(draw, (left + side // 2, top - 5), label, 16, "ms")
        for row, image in enumerate(images[column]):
            picture.paste(image, (left, top + row * (side + 6)))
    draw_bars(draw, bars, classes, probabilities)
    write_picture(picture, path)


# ---- classes over time -----------------------------------------------------------------------

def frames_over_time(frames, count, last):
    """Of frames [(seconds, (3,R,R))] those nearest to the middle of `count` equal parts of time,
    each once."""
    if len(frames) == count:
        return frames
    nearest = []
    for i in range(count):
        middle = (i + 0.5) / count * last
        number = min(range(len(frames)), key=lambda n: abs(frames[n][0] - middle))
        if number not in nearest:
            nearest.append(number)
    return [frames[number] for number in nearest]


STRIP_LEFT, STRIP_WIDTH = 330, 1190  # pixels: where time begins, and how long all of it is
BAND = 64  # pixels: the height of a class's band
SHOWN = 0.05  # a class that never reaches this is not drawn, unless it is the highest


def bar_spans(windows):
    """Where each window's bar lies, (start, end) in seconds: windows that overlap meet half-way
    between their middles."""
    spans = [[start, end] for start, end, _ in windows]
    middles = [(start + end) / 2 for start, end in spans]
    for i in range(len(spans) - 1):
        if spans[i][1] > windows[i + 1][0]:
            spans[i][1] = spans[i + 1][0] = (middles[i] + middles[i + 1]) / 2
    return spans


def draw_band(draw, base, name, windows, values, high, colour):
    """A class's values over time, as bars that stand on the line y = base; `high` fills a band."""
    last = max(windows[-1][1], 1e-3)  # a single picture takes no time
    right = STRIP_LEFT + STRIP_WIDTH
    middle = STRIP_LEFT - 14, base - BAND / 2 + 6
    draw_text(draw, middle, name, 20, "rm", width=STRIP_LEFT - 34)
    for (start, end), value in zip(bar_spans(windows), values):
        x = STRIP_LEFT + STRIP_WIDTH * start / last
        end_x = STRIP_LEFT + STRIP_WIDTH * end / last - 1
        top = base - (BAND - 14) * value / high
        draw.rectangle([x, top, max(x, end_x), base], fill=colour)
    draw.line([STRIP_LEFT, base, right, base], fill=INK)
    draw_text(draw, (right + 6, base), f"max {values.max():.2f}", 15, "ls")


def draw_strip(path, title, windows, classes, frames):
    """What happens when: eight frames in time order and a band for each of six classes, as a PNG.

    windows: [(start, end, values (C,))]. frames: [(seconds, (3,R,R) uint8)]. The classes are those
    that reach highest; a band is 1 high, or for a single class as high as its highest value. Each
    frame stands as near to its time as there is room, with a line to it.
    """
    last = max(windows[-1][1], 1e-3)
    values = np.stack([value for _, _, value in windows]).clip(0)  # (windows, C)
    order = np.argsort(-values.max(axis=0), kind="stable")
    highest = [c for c in order[:6] if c == order[0] or values[:, c].max() >= SHOWN]
    chosen = sorted(highest, key=lambda c: values[:, c].argmax())  # in the order of their peaks
    high = 1 if len(classes) > 1 else values.max() + 1e-9
    shown = frames_over_time(frames, min(8, len(frames)), last)
    count = len(shown)
    side = min(STRIP_WIDTH // count - 6, 240)
    top = 130 + side
    bottom = top + BAND * len(chosen)
    picture, draw = blank_picture(1600, bottom + 80, title)
    legend = "Cosine similarity; a full band is the maximum."
    if len(classes) > 1:
        legend = (f"Probabilities, a full band is 1. Of {len(classes)} classes the {len(chosen)} "
                  "that reach highest, in the order of their peaks; colours only tell neighbours "
                  "apart.")
    draw_text(draw, (STRIP_LEFT, bottom + 44), legend, 16)
    for i, (seconds, frame) in enumerate(shown):
        x = STRIP_LEFT + STRIP_WIDTH * (i + 0.5) / count
        picture.paste(frame_image(frame, side), (int(x - side / 2), 70))
        draw_text(draw, (x, 76 + side), clock(seconds), 18, "ma")
        time_x = STRIP_LEFT + STRIP_WIDTH * seconds / last
        draw.line([(x, 98 + side), (time_x, 110 + side), (time_x, 116 + side)], fill=INK)
    for place, c in enumerate(chosen):
        base = top + BAND * (place + 1)
        draw_band(draw, base, classes[c], windows, values[:, c], high, COLOURS[place % 2])
    for share in QUARTERS:
        x = STRIP_LEFT + STRIP_WIDTH * share
        draw.line([x, base, x, base + 6], fill=INK)
        draw_text(draw, (x, base + 10), clock(round(last * share, 1 if last > 10 else 2)), 16, "ma")
    write_picture(picture, path)


# ---- curves, confusion and reversal -------------------------------------------------

def axis_limit(top):
    """The lowest of 1, 2, 4, 6 or 8 times a power of ten that is at least `top`."""
    for exponent in range(-6, 6):
        for multiple in (1, 2, 4, 6, 8):
            if multiple * 10.0**exponent >= top:
                return multiple * 10.0**exponent
    return top


def draw_curve(draw, left, title, points, x_axis, y_axis, colour, ends):
    """A curve through `points`, on axes (lowest, highest); `ends` stand below the x axis."""
    top, width, height = 60, 390, 290
    (first, last), (low, high) = x_axis, y_axis
    draw_text(draw, (left, 12), title, 22)
    for share in QUARTERS:
        y = top + height * (1 - share)
        draw.line([(left, y), (left + width, y)], fill=GRID)
        draw_text(draw, (left - 8, y), f"{low + share * (high - low):g}", 15, "rm")
    line = []
    for x, y in points:
        line.append((left + width * (x - first) / (last - first),
                     top + height * (1 - (y - low) / (high - low))))
    draw.line(line, fill=colour, width=3)
    for x, y in line:
        draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=colour)
    draw_text(draw, (left, 365), ends[0], 15)
    draw_text(draw, (left + width, 365), ends[1], 15, "ra")


def draw_curves(history, path):
    """Training loss and validation accuracy over the epochs: a PNG of 1000 x 400 pixels.

    history: dicts with the keys epoch, loss and, where there was a validation, top1 from 0 to 1.
    """
    picture, draw = blank_picture(1000, 400, "")
    losses = [(line["epoch"], line["loss"]) for line in history]
    scores = [(line["epoch"], 100 * line["top1"]) for line in history if "top1" in line]
    if losses:
        last = max(2, losses[-1][0])
        epochs, ends = (1, last), ("epoch 1", f"epoch {last}")
        limit = axis_limit(max(loss for _, loss in losses))
        draw_curve(draw, 70, "training loss", losses, epochs, (0, limit), COLOURS[0], ends)
    if scores:
        best, score = max(scores, key=lambda point: point[1])  # of several the first is kept
        title = f"validation top-1 %: best {score:.1f}, epoch {best}"
        draw_curve(draw, 570, title, scores, epochs, (0, 100), COLOURS[1], ends)
    write_picture(picture, path)


def draw_ensembles(points, path):
    """Top-1 over the weight w of the fine-tuned weights, points [(w, top-1)], as a PNG."""
    picture, draw = blank_picture(560, 400, "")
    scores = [top1 for _, top1 in points]
    for step in (0.01, 0.02, 0.05, 0.1, 0.25):  # between ticks, the first that is enough
        low = min(math.floor(min(scores) / step) * step, 1 - 4 * step)
        if low + 4 * step >= max(scores):
            break
    draw_curve(draw, 70, "top-1 of (1 - w) CLIP + w fine-tuned", points, (0, 1),
               (low, low + 4 * step), COLOURS[0], ("w = 0: CLIP", "w = 1: fine-tuned"))
    write_picture(picture, path)


def confusion_counts(probabilities, labels, C):
    """How many videos of each class (row) are taken for each (column): int (C,C)."""
    read = ~np.isnan(probabilities[:, 0])
    counts = np.zeros((C, C), dtype=int)
    np.add.at(counts, (np.asarray(labels)[read], probabilities[read].argmax(axis=1)), 1)
    return counts


def worst_confusions(counts):
    """The ten pairs (true class, other class) that are confused most, the most frequent first."""
    C = len(counts)
    wrong = counts * (1 - np.eye(C, dtype=int))
    order = np.argsort(-wrong, axis=None, kind="stable")[:10]
    return [divmod(int(i), C) for i in order if wrong.flat[i]]


def confusion_image(counts, side):
    """Counts (C,C) as shades, the root of a row's shares; blue on the diagonal, else orange."""
    shares = counts / counts.sum(axis=1, keepdims=True).clip(1)
    diagonal = np.eye(len(counts), dtype=bool)[..., None]
    hue = np.where(diagonal, *COLOURS)  # (C,C,3)
    shade = (255 - (255 - hue) * shares[..., None] ** 0.5).astype(np.uint8)
    return Image.fromarray(shade).resize((side, side), Image.Resampling.NEAREST)


def draw_class_names(picture, draw, names, left, top, cell, room):
    """Names beside the rows and, turned, above the columns, and the lines between the cells."""
    side, size = cell * len(names), min(cell, 18)
    for i, name in enumerate(names):
        draw.line([left, top + cell * i, left + side, top + cell * i], fill=GRID)
        draw.line([left + cell * i, top, left + cell * i, top + side], fill=GRID)
        y = top + cell * (i + 0.5)
        draw_text(draw, (left - 8, y), name, size, "rm", width=room - 8)
        column = Image.new("RGB", (room, cell), PAPER)
        draw_text(ImageDraw.Draw(column), (8, cell / 2), name, size, "lm", width=room - 8)
        picture.paste(column.rotate(90, expand=True), (left + cell * i, top - room))


def draw_counts(draw, counts, left, top, cell):
    """The number of videos in each cell that has any."""
    for row, column in np.argwhere(counts):
        count = counts[row, column]
        middle = left + cell * (column + 0.5), top + cell * (row + 0.5)
        fill = PAPER if count > 0.4 * counts[row].sum() else INK  # on dark, on light
        draw_text(draw, middle, str(count), 14, "mm", width=cell - 4, fill=fill)


def draw_confusion(probabilities, labels, classes, path):
    """Which classes are taken for which, and the ten worst pairs: a PNG at `path`.

    probabilities (n,C), NaN in the rows of unreadable videos, which are left out. Up to 51 classes
    are named beside their row and column; up to 22 have the numbers of videos in their cells.
    """
    counts = confusion_counts(probabilities, labels, len(classes))
    worst = worst_confusions(counts)
    names = classes if len(classes) <= 51 else ()
    cell = max(1, min(36, 816 // len(classes)))
    side = cell * len(classes)
    font = ImageFont.load_default(min(cell, 18))
    longest = max((font.getlength(name) for name in names), default=0)
    room = int(min(240, longest)) + 10
    left, top = 20 + room, 70 + room
    title = ("Rows: the true class; columns: what it is taken for (blue: rightly); top-1 "
             f"{np.trace(counts) / len(labels):.1%}")
    height = top + side + 60 + 28 * len(worst)
    picture, draw = blank_picture(max(left + side + 30, 1000), height, title)
    picture.paste(confusion_image(counts, side), (left, top))
    draw_class_names(picture, draw, names, left, top, cell, room)
    if len(classes) <= 22:
        draw_counts(draw, counts, left, top, cell)
    draw.rectangle([left, top, left + side, top + side], outline=INK)
    for row, (own, other) in enumerate(worst):
        share = f"{counts[own, other]} of {counts[own].sum()}"
        line = f"{share}:  {classes[own]}  ->  {classes[other]}"
        y = top + side + 30 + 28 * row
        draw_text(draw, (left, y), line, width=picture.width - left - 20)
    write_picture(picture, path)


@torch.no_grad()
def draw_reversal(models, clip, names, path, pixels="imagenet"):
    """A clip and its reversal, and what models say of both: a PNG at `path`.

    models: {title: model}; their classes become the two `names`, the clip's own and the opposite.
    clip: (T,3,R,R) uint8.
    """
    left, top = 190, 110
    side = min(760 // len(clip), 150)
    height, width = max(side, 110) + 30, 620 // len(models)
    start = left + len(clip) * (side + 4) + 20
    picture, draw = blank_picture(1600, top + 2 * height, "One clip, forwards and backwards")
    clips = torch.stack([clip, clip.flip(0)])  # (2,T,3,R,R)
    for row, direction in enumerate(("forwards", "backwards")):
        middle = 20, top + row * height + side // 2
        draw_text(draw, middle, f"{direction}:\n{names[row]}", 20, "lm")
        for t, frame in enumerate(clips[row]):
            place = left + t * (side + 4), top + row * height
            picture.paste(frame_image(frame, side), place)
    for column, (title, model) in enumerate(models.items()):
        x = start + column * width
        draw_text(draw, (x, top - 12), title, 20, "ls")
        model.eval().set_classes(names)
        probabilities = view_logits(model, clips[:, None], pixels, "fp32").softmax(-1)  # (2,1,2)
        for row in range(2):
            for i, p in enumerate(probabilities[row, 0].tolist()):
                y = top + row * height + 55 * i
                draw_text(draw, (x, y), f"{names[i]}  {p:.3f}", 17, width=width - 20)
                bar = [x, y + 24, x + max(1, (width - 30) * p), y + 40]
                draw.rectangle(bar, fill=COLOURS[i])
    write_picture(picture, path)


# ---- running a script ------------------------------------------------------------------------

# in the messages of PyTorch, NumPy and the system
OUT_OF_MEMORY = r"allocate|DataLoader worker \(pid"
TOO_MANY_FILES = r"[Tt]oo many open files|received 0 items of ancdata"


class Parser(argparse.ArgumentParser):
    """Raises ValueError on an error, for run_command's one line; help is 100 columns wide."""

    def __init__(self, **settings):
        help_format = partial(argparse.RawDescriptionHelpFormatter, width=100)
        super().__init__(formatter_class=help_format, **settings)

    def parse_args(self, arguments=None):
        """As always, but a file whose name begins with - is told from a flag."""
        arguments = sys.argv[1:] if arguments is None else arguments
        for word in arguments:
            is_video = os.path.splitext(word)[1].lower() in data.VIDEO_SUFFIXES
            if re.match("-.", word) and (os.path.exists(word) or is_video and "=" not in word):
                self.error(f"{word} looks like a flag: write ./{word}")
        return super().parse_args(arguments)

    def error(self, message):
        word = message.removeprefix("unrecognized arguments: ").split()[:1]
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        near = difflib.get_close_matches(word[0], flags, 1) if word != message.split()[:1] else []
        if near:
            message += f"; did you mean {near[0]}?"
        raise ValueError(f"{message} ({self.prog} --help lists all flags)")


def flag_of(name):
    """The flag as it is typed: upstream_labels -> --upstream-labels."""
    return "--" + name.replace("_", "-")


def check_flags(parser, args):
    """Refuses empty values, as an unset shell variable leaves them, and files that do not exist."""
    for name, value in vars(args).items():
        if value == "" or isinstance(value, list) and "" in value:
            parser.error(f"{flag_of(name)} is empty: give a value, or leave the flag out")
        if name == "checkpoint":
            missing = value and not os.path.exists(value) and value not in OPENAI_MODELS
        elif name in ("merges", "temporal", "static"):
            missing = value and not os.path.isfile(value)
        else:
            missing = False
        if missing:
            parser.error(f"{flag_of(name)} {value}: no such file")
    return args


def prepare_streams():
    """Makes standard output and error take any text, also if they are closed, as with `>&-`."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # or the next file that is opened would take its place
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # for file names that are not UTF-8


def flush_output():
    """Flushes now, so that a broken pipe is raised here and not at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def run_to_end(main, parse):
    """main(parse()), then leaves the other processes and flushes the output -> the exit status."""
    try:
        status = main(parse())
        if dist.is_initialized():  # not on errors: others may still read from this process
            dist.destroy_process_group()
        return status
    finally:
        flush_output()


def is_refusal(error):
    """Whether this project raised the error to refuse an input; else it may come from a bug."""
    frames = traceback.extract_tb(error.__traceback__)
    in_project = frames and Path(frames[-1].filename).parent == Path(__file__).parent
    return in_project and frames[-1].line.startswith("raise")


NO_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


def error_line(error):
    """What the user is told of an error, in one short line; None for what only a bug causes."""
    message = " ".join(str(error).split())
    message = data.quoted(message, 290 if is_refusal(error) else 220)
    if re.search(TOO_MANY_FILES, message):
        return "too many open files: raise the limit, as with `ulimit -n 4096`, or lower workers"
    if isinstance(error, MemoryError) or re.search(OUT_OF_MEMORY, message):
        return ("out of memory: lower micro_batch or workers, or eval.py's --batch or --workers "
                f"({message:.120})")
    if getattr(error, "errno", 0) in NO_PLACE and error.filename:
        return (f"{data.quoted(error.filename, 160)}: {error.strerror}; make room or give the "
                "right to it, or name another place")
    if not isinstance(error, (ValueError, OSError)):
        return None
    if is_refusal(error):
        return message
    return f"{message or type(error).__name__} (TRACEBACK=1 in the environment shows where)"


def run_command(main, parse):
    """Runs a script, main(parse()), and returns its exit status.

    2 and one line on standard error for wrong use, missing input or too little memory; 130 if it
    was interrupted; 141 if nobody reads its output any more, as with `| head`. With TRACEBACK=1 in
    the environment an error is raised as it is.
    """
    prepare_streams()
    try:
        return run_to_end(main, parse)
    except BrokenPipeError:
        return 141
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        line = error_line(error)
        if line is None or os.environ.get("TRACEBACK", "0") not in ("", "0"):
            raise
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(5)  # if a node's first process fails too, torchrun ends this one meanwhile
        print(f"error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command starts again, a training run from its last checkpoint",
              file=sys.stderr)
        return 130


# ---- the model that the flags name -----------------------------------------------------------

class Chosen(NamedTuple):
    """A model on its device, its recipe (a dict), and how it sees videos."""

    model: nn.Module
    recipe: dict
    views: data.Views
    precision: str


def load_chosen(args, default_clip):
    """The model of --checkpoint, or vanilla CLIP, and its recipe with what the flags override."""
    clip = args.clip or default_clip
    model, recipe = load_model(args.checkpoint or clip, clip, args.merges, **args.set)
    given = {"frames": args.frames, "pixels": args.pixels}
    if args.views:
        given |= {"clips": args.views[0], "crops": args.views[1]}
    return model, recipe | {key: value for key, value in given.items() if value}


def chosen_model(args, default_clip):
    """The Chosen of the flags. Raises ValueError if they do not fit the checkpoint."""
    device = data.start_processes(args.device)
    precision = resolve_precision(device, args.precision)
    model, recipe = data.node_leader_first(lambda: load_chosen(args, default_clip))
    if args.ensemble and recipe.get("probe"):
        raise ValueError("--ensemble: a linear probe never changed CLIP's weights; leave it out")
    if isinstance(model, TCCLIP):  # sentences are longer than the names of its training
        text_length = len(model.clip.positional_embedding)
        model.config = replace(model.config, text_length=text_length)
    views = eval_views(recipe, model)
    if args.every:
        views = replace(views, clips=1, crops=1)
    model = model.to(device)
    if args.frames:  # a model that takes no other number of frames says so here
        check_frames(model, views)
    return Chosen(model, recipe, views, precision)


@torch.no_grad()
def check_frames(model, views):
    """Raises ValueError if the model does not take this number of frames."""
    device = device_of(model)
    frames = torch.zeros(1, views.frames, 3, views.size, views.size, device=device)
    try:
        getattr(model, "model", model).encode_video(frames)  # a linear probe's own model
    except ValueError as error:
        raise ValueError(f"--frames {views.frames}: {error}") from error


def describe_chosen(chosen):
    """A line about the model, the device and the precision."""
    method, views = METHODS[chosen.recipe["method"]].title, chosen.views
    device = device_name(device_of(chosen.model))
    return (f"{method} on {device}, {chosen.precision}; {views.clips}x{views.crops} views of "
            f"{views.frames} frames, {views.size} pixels")


def ensembled(args, chosen):
    """Yields each weight w of --ensemble, while the model has (1 - w) CLIP's + w its own weights.

    Yields 1.0 once, with the model as it is, if there is no --ensemble.
    """
    if not args.ensemble:
        yield 1.0
        return
    model, recipe = chosen.model, chosen.recipe

    def load_base():
        name = args.clip or recipe["clip"]
        if not os.path.exists(name) and name not in OPENAI_MODELS:
            raise ValueError(f"the model was tuned from the CLIP {name}, which is not here: give "
                             "its --clip")
        return build_model(recipe, load_clip(name, args.merges, **args.set)).state_dict()
    base = data.node_leader_first(load_base)
    tuned = {key: value.clone() for key, value in model.state_dict().items()}
    for weight in args.ensemble:
        model.load_state_dict(ensemble(base, tuned, weight))
        yield weight


def text_output(args):
    """Where the results are printed: standard error if the JSON goes to standard output."""
    return sys.stderr if args.json == "-" else sys.stdout


def check_outputs(args, inputs):
    """Raises ValueError if a file that will be written is one of those that are read, or no result
    of such a command: then it is somebody's data."""
    flags = ("checkpoint", "clip", "merges", "labels", "temporal", "static")
    inputs = [*inputs, *(args.classes or ()), *(getattr(args, name) for name in flags)]
    inputs = {os.path.realpath(path) for path in inputs if path}
    root = args.test and os.path.realpath(args.data or f"data/{args.test}")
    for name in ("json", "picture", "features"):
        path = getattr(args, name)
        if not path or path == "-":
            continue
        real = os.path.realpath(path)
        of_a_run = os.path.basename(real) in ("recipe.json", "results.json")
        among_data = root and real.startswith(root + os.sep)
        if real in inputs or os.path.isfile(real) and (of_a_run or among_data):
            raise ValueError(f"{flag_of(name)} {path}: this file is read, and would be replaced by "
                             "the results; name another")
        if os.path.isfile(real) and not begins_as(name, real):
            raise ValueError(f"{flag_of(name)} {path}: this file is there and holds something "
                             "else; name another")
        inputs.add(real)


def begins_as(name, path):
    """Whether a file begins as what --json, --picture or --features writes, or is empty."""
    with open(path, "rb") as file:
        begin = file.read(4)
    if name == "picture":
        return not begin or is_drawn(path)
    return not begin or begin.startswith({"json": (b"{", b"["), "features": b"PK"}[name])


# ---- test sets -------------------------------------------------------------------------------

def evaluate(model, videos, batch, workers, precision, title="evaluating", picture=None,
             subsets=None, templates=None):
    """The scores of a model on a data.TestVideos, as results.json has them.

    picture: where to draw the confusion of classes; confusion.png has predictions.csv beside it,
    confusion-novel.png predictions-novel.csv. subsets: see subset_scores. templates: of prompts.
    """
    probabilities, errors = predict(model, videos, batch, workers, precision, title, templates)
    video_list, views = videos.video_list, videos.views
    labels, classes = video_list.labels, video_list.classes
    if picture and data.rank_and_world()[0] == 0:
        draw_confusion(probabilities, labels, classes, picture)
        write_predictions(predictions_path(picture), probabilities, video_list)
    scores = {
        "videos": len(labels),
        "classes": len(classes),
        "views": f"{views.clips}x{views.crops}",
        "frames": views.frames,
        "precision": precision,
        "list": video_list.source,
        "top1": top_k(probabilities, labels, 1),
        "top5": top_k(probabilities, labels, 5),
    }
    pairs = inside_pairs(probabilities, video_list)
    if pairs is not None:
        scores["pairs"] = pairs
    scores |= subset_scores(probabilities, labels, subsets or {})
    scores["class_top1"] = class_accuracy(probabilities, labels, classes)
    scores["bad"] = [error for _, error in errors]
    scores["absent"] = list(video_list.absent)
    return scores


def predictions_path(picture):
    """Where the predictions beside a picture of confusion are written."""
    picture = Path(picture)
    stem = picture.stem.replace("confusion", "predictions")
    if stem == picture.stem:
        stem += "-predictions"
    return picture.with_name(f"{stem}.csv")


def describe_data(lists):
    """The first list's counts, and a hash that differs if any list's classes or videos differ."""
    content = []
    for videos in lists:
        names = [os.path.basename(path) for path in videos.paths]
        content.append([list(videos.classes), names, [int(label) for label in videos.labels]])
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]
    return f"{len(lists[0].paths)} videos of {len(lists[0].classes)} classes, {digest}"


def describe_scores(name, scores):
    """The lines about one test set's scores."""
    numbers = [f"{title} {100 * scores[key]:.2f}" for key, title in SCORES.items() if key in scores]
    lines = [f"{name}: {scores['videos']} videos, {scores['classes']} classes, "
             f"{', '.join(numbers)} ({scores['views']} views of {scores['frames']} frames, "
             f"{scores['precision']}; list: {scores['list']})"]
    absent = scores["absent"]
    if absent:
        lines.append(f"{name}: {len(absent)} annotated videos are missing and left out, "
                     f"such as {absent[0]}")
    for error in scores["bad"]:
        lines.append(f"unreadable, counted as wrong: {error}")
    return "\n".join(lines)


def trained_as(args, recipe):
    """Yields a recipe (a dict) with all that its row of PAPERS depends on, in each way in which its
    model may have been trained for this test: a released file tells neither protocol nor data."""
    for protocol in PAPER_COLUMNS:
        run = {"protocol": protocol, "dataset": "k400" if protocol == "zeroshot" else args.test}
        for start in ("", "k400"):
            same = all(recipe.get(name, value) == value for name, value in run.items())
            if same and bool(recipe.get("checkpoint", start)) == bool(start):
                yield recipe | run | {"checkpoint": start, "labels": args.labels}


def paper_columns(args, recipe, weight):
    """{protocol: the columns of PAPERS that this test reproduces}."""
    if args.ensemble:
        return {"zeroshot": [args.test]} if weight == 0.7 else {}
    if args.half:
        return {"base2novel": [args.half]}
    shots = [f"{recipe['shots']} shots"] if "shots" in recipe else PAPER_COLUMNS["fewshot"]
    return {"fewshot": shots, "supervised": PAPER_COLUMNS["supervised"]}


def paper_lines(args, recipe, weight):
    """What the papers report of such a model in such a test, a line for each of their rows."""
    lines = []
    if not args.checkpoint:
        numbers = PAPERS.get(f"zeroshot clip none {recipe['clip']} {recipe['frames']}", ())
        row = dict(zip(PAPER_COLUMNS["zeroshot"], numbers))
        if args.test in row and args.prompt == ["{}"] and recipe["pixels"] == "imagenet":
            lines.append(f"in TC-CLIP's paper, vanilla CLIP: {row[args.test]}")
        return lines
    columns = paper_columns(args, recipe, weight)
    for run in trained_as(args, recipe):
        row = {} if recipe.get("probe") else paper_numbers(run)
        shown = columns.get(run["protocol"], ())
        numbers = [f"{name} {row[name]}" for name in shown if name in row]
        if numbers:
            start = ", from a Kinetics model" if run["checkpoint"] else ""
            lines.append(f"in the paper, {TESTED_AS[run['protocol']]}{start}: {', '.join(numbers)}")
    return lines


def read_subsets(args, tests):
    """{kind: class names} of --temporal and --static, each in at least one of the test sets."""
    classes = {name for video_list in tests.values() for name in video_list.classes}
    subsets = {}
    for kind in ("temporal", "static"):
        path = getattr(args, kind)
        if not path:
            continue
        subsets[kind] = data.read_class_names(path)
        unknown = [name for name in subsets[kind] if name not in classes]
        if unknown:
            raise ValueError(f"{path}: it must list classes of the data, one per line; not one: "
                             f"{data.some(unknown)}")
    return subsets


def labels_of(subsets, classes):
    """{kind: labels} of subsets {kind: class names} in a test set's classes."""
    labels = {}
    for kind, names in subsets.items():
        labels[kind] = [i for i, name in enumerate(classes) if name in names]
    return labels


def load_test_sets(args, leave_out=(), base=""):
    """The test sets of --test, {name: data.VideoList}; leave_out and base as in data.load_tests."""
    root = args.data or f"data/{args.test}"
    return data.load_tests(args.test, root, labels=args.labels or "", half=args.half or "",
                           upstream_labels=args.upstream_labels, leave_out=leave_out,
                           base=base)


def test_all(args, chosen, weight, tests, subsets):
    """The scores of the model on all test sets, {name: scores}, printed by the first process."""
    first, output = data.rank_and_world()[0] == 0, text_output(args)
    results = {}
    prefix = f"w = {weight:g}, {args.test}" if args.ensemble else args.test
    for name, video_list in tests.items():
        picture = None
        if args.picture and len(args.ensemble or ()) < 2:
            path = Path(args.picture)
            picture = path.with_name(f"{path.stem}-{name}{path.suffix}") if results else path
        videos = data.TestVideos(video_list, chosen.views)
        results[name] = evaluate(
            chosen.model, videos, args.batch or 8, args.workers, chosen.precision, name, picture,
            labels_of(subsets, video_list.classes), args.prompt)
        if first:
            print(describe_scores(f"{prefix} {name}", results[name]), file=output)
    if first and "split2" in results:
        top1 = [100 * scores["top1"] for scores in results.values()]
        mean = f"{np.mean(top1):.2f} +- {np.std(top1):.2f}"
        print(f"{args.test}: top-1 {mean} over {len(top1)} splits", file=output)
    if first:
        for line in paper_lines(args, chosen.recipe, weight):
            print(line, file=output)
    return results


def has_linear_head(recipe):
    """Whether a recipe (a dict) makes a model that knows only its training classes."""
    return bool(recipe.get("probe") or recipe["model"].get("num_classes"))


def known_tests(recipe, classes, tests):
    """The test sets that a model can do: a linear head only those of its training's classes."""
    if not has_linear_head(recipe):
        return tests
    known = {name: videos for name, videos in tests.items()
             if list(videos.classes) == list(classes)}
    return known or tests  # if it knows none, set_classes says so


def print_notes(tests, known):
    """Prints the test sets that a linear head cannot do, not in `known`, and the others' notes."""
    for name in tests.keys() - known.keys():
        print(f"{name}: left out, since a linear head knows only the classes of its training",
              file=sys.stderr)
    for name, video_list in known.items():
        for note in video_list.notes:
            print(f"{name}: {note}", file=sys.stderr)


def check_same_command(args, model):
    """Raises ValueError, on every process, if the processes' flags or weights differ."""
    own = ("data", "checkpoint", "clip", "merges", "json", "picture", "workers", "device")
    flags = {flag_of(name): str(value) for name, value in vars(args).items() if name not in own}
    data.check_same("flags", flags, "give every machine the same command")
    total = sum(value.double().sum().item() for value in model.state_dict().values())
    data.check_same("weights", {"with the sum": f"{total:.9g}"}, "give every machine its files")


def note_other_classes(videos, trained):
    """The VideoList, with a note if some of its classes were trained and others were not."""
    others = [name for name in videos.classes if name not in trained]
    if not others or len(others) == len(videos.classes):
        return videos
    return videos.note(f"the model was not trained on the {data.some(others)}; it was trained on "
                       f"{data.some(name for name in trained if name not in videos.classes)}")


def run_test(args):
    """--test: accuracy on every test set of a data set; over splits mean and deviation."""
    data.start_processes(args.device)
    first = data.rank_and_world()[0] == 0
    tests = load_test_sets(args)
    check_outputs(args, [path for video_list in tests.values() for path in video_list.paths])
    data.check_same_data(describe_data(list(tests.values())))
    subsets = read_subsets(args, tests)
    default_clip = "ViT-B/16"
    if args.test == "shapes":
        default_clip = Path(args.data or "data/shapes", "clip.pt")
    chosen = chosen_model(args, default_clip)
    check_same_command(args, chosen.model)
    base = args.half and chosen.recipe.get("base")  # a file of the base classes, see train.py
    if base and not os.path.isfile(base):
        raise ValueError(f"{base}: no such file; it holds the base classes of this checkpoint")
    if chosen.recipe.get("trained_on") or base:
        tests = load_test_sets(args, chosen.recipe.get("trained_on", ()), base or "")
    classes = chosen.recipe.get("classes", ())
    known = known_tests(chosen.recipe, classes, tests)
    if args.test == "folder":
        known = {name: note_other_classes(videos, classes) for name, videos in known.items()}
    if first:
        print(describe_chosen(chosen), file=sys.stderr)
        print_notes(tests, known)
    tests = known
    results, points = {}, []
    for weight in ensembled(args, chosen):
        scores = test_all(args, chosen, weight, tests, subsets)
        points.append((weight, np.mean([result["top1"] for result in scores.values()])))
        results[f"{weight:g}"] = scores
    if first and len(points) > 1:
        for weight, top1 in points:
            print(f"w = {weight:g}: mean top-1 {100 * top1:.2f}", file=text_output(args))
        if args.picture:
            draw_ensembles(points, args.picture)
    if first and args.json:
        write_json(args.json, results if len(points) > 1 else scores)
    return 0


# ---- single videos ---------------------------------------------------------------------------

def classes_of(text):
    """The class names of one value of --classes: those of a file, or text with commas between."""
    is_path = os.sep in text and os.path.isdir(os.path.dirname(text))
    if os.path.isfile(text) or text.lower().endswith((".txt", ".csv", ".json")):
        return list(data.read_class_names(text))
    if is_path or text == "-" or os.path.exists(text) or re.fullmatch(r"\S+\.\w{2,5}", text):
        raise ValueError(f"--classes {text}: no such file; for a class of this name write "
                         f"'{text},'")
    return text.split(",")


def named_classes(values):
    """The class names of --classes, each once.

    One value: names with commas between them, or a file's. Several: a name or a file each; or one
    list that the shell has split, if a value ends in a comma.
    """
    if any(value.endswith(",") for value in values):
        values = [" ".join(values)]
    found = []
    for value in values:
        names = classes_of(value)
        found += [value] if len(values) > 1 and "," in value else names
    classes = list(dict.fromkeys(name.strip() for name in found if name.strip()))
    if not classes:
        raise ValueError(f"--classes {' '.join(values)!r}: give names with commas between them, or "
                         "a file with one per line")
    return classes


def chosen_classes(args, chosen):
    """The classes of --classes, else those that the checkpoint was trained on; [] for features."""
    known = list(chosen.recipe.get("classes", ()))
    if args.classes:
        names = named_classes(args.classes)
        warn_of_tiny_clip(chosen.model, names, known)
        return names
    if not known and (args.picture or not args.features):
        raise ValueError(f"{args.checkpoint} does not tell its classes: give --classes, such as "
                         "--classes \"juggling, running\"")
    return known


def warn_of_tiny_clip(model, names, known):
    """Warns if a CLIP that knows few words is asked for classes of other words than its own."""
    strange = {*" ".join(names).split()} - {*" ".join(known).split()}
    embedding = getattr(model.clip, "token_embedding", None)
    if strange and embedding is not None and len(embedding.weight) <= BYTES:
        print(f"warning: this model's CLIP is a tiny one that was never trained on words such as "
              f"{data.some(sorted(strange))}: its answers mean nothing for them", file=sys.stderr)


class Window(NamedTuple):
    """A part of a video, and what a model says of it."""

    start: float  # seconds
    end: float | None  # seconds; None for a whole video
    clip: torch.Tensor  # (T,3,R,R) uint8, its first view
    values: np.ndarray  # (C,) probabilities, or of a single class its cosine similarity
    feature: np.ndarray | None  # (E,) if it is asked for
    seconds: np.ndarray | None  # (T,) of a whole video: the times of the clip's frames, if known


def batches_of(items, size):
    """Lists of `size` items; the last one may be shorter."""
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def parts_of(path, views, args, damage):
    """Yields (start, end, (V,T,3,R,R) uint8, seconds (T,) of the first view's frames or None) of
    each window of a video, or once for all of it. `damage` is a data.Damage."""
    threads = min(os.cpu_count(), 16)  # nothing else decodes meanwhile
    if not args.every:
        reading = data.inspect_test(path, views, threads)
        damage.count += reading.damaged
        seconds = None if reading.seconds is None else reading.seconds[0]
        yield 0.0, None, reading.frames, seconds
        return
    windows = data.read_windows(path, args.every, views.frames, views.size, views.short_side,
                                data.SAMPLERS[views.sampling], args.stride, threads, damage)
    for start, end, clip in windows:
        yield start, end, clip[None], None


def class_values(chosen, views):
    """uint8 (b,V,T,3,R,R) -> the classes' probabilities or a single class's cosine (b,C)."""
    logits = view_logits(chosen.model, views, chosen.views.pixels, chosen.precision)  # (b,V,C)
    if logits.shape[-1] > 1:
        values = logits.softmax(dim=-1)
    else:
        values = logits / chosen.model.clip.logit_scale.exp()
    return values.mean(dim=1).cpu().numpy()


def video_features(chosen, views):
    """uint8 (b,V,T,3,R,R) -> the mean of the views' features (b,E) float32, not normalised."""
    model = getattr(chosen.model, "model", chosen.model)  # inside a linear probe
    device = device_of(model)
    video = data.normalise(views.flatten(0, 1).to(device), chosen.views.pixels)
    with autocast(device, chosen.precision):
        features = model.encode_video(video)
    return features.float().unflatten(0, views.shape[:2]).mean(dim=1).cpu().numpy()


@torch.no_grad()
def read_parts(chosen, path, names, args, damage):
    """Yields a Window for each window of --every, or one for the whole video."""
    for parts in batches_of(parts_of(path, chosen.views, args, damage), args.batch or 8):
        views = torch.stack([view for _, _, view, _ in parts])  # (b,V,T,3,R,R)
        values = class_values(chosen, views) if names else np.zeros((len(parts), 0))
        features = video_features(chosen, views) if args.features else [None] * len(parts)
        for (start, end, view, seconds), row, feature in zip(parts, values, features):
            yield Window(start, end, view[0], row, feature, seconds)


@torch.no_grad()
def frame_distance(model, clip, pixels):
    """Mean earth mover's distance between adjacent frames' patches [paper, ILA Table 5].

    clip: (T,3,R,R) uint8; the patches are those of ILA's last block.
    """
    video = data.normalise(clip.to(device_of(model)), pixels)[None]
    frames = F.normalize(model.encode(video)[0][0, :, 1:], dim=-1)  # (T,P,D)
    return float(np.mean([earth_movers_distance(a, b) for a, b in zip(frames, frames[1:])]))


def describe_window(window, names, top):
    """A line about a window: its times and its most probable classes."""
    order = np.argsort(-window.values, kind="stable")[:top]
    best = "  ".join(f"{window.values[i]:.2f} {data.quoted(names[i])}" for i in order)
    return f"  {clock(window.start)}-{clock(window.end)}  {best}"


def describe_whole(chosen, window, names, top):
    """The lines about a whole video: its most probable classes, and of ILA a distance."""
    order = np.argsort(-window.values, kind="stable")[:top]
    lines = [f"  {window.values[i]:.3f}  {data.quoted(names[i])}" for i in order]
    if isinstance(chosen.model, ILA):
        distance = frame_distance(chosen.model, window.clip, chosen.views.pixels)
        lines.append(f"  {distance:.3f}  earth mover's distance between adjacent frames")
    return lines


def titles_of(names):
    """The names as they are shown: beside a single one that its value is no probability."""
    return names if len(names) != 1 else [f"{names[0]} (cosine similarity)"]


def measure_of(names):
    """What the values of the classes are."""
    return "cosine similarity" if len(names) == 1 else "probability"


def short_name(path):
    """A file's name, its middle left out if it is longer than 70 characters."""
    return data.quoted(Path(path).name, 70)


def draw_video(chosen, path, names, windows, frames, args, picture):
    """The picture of a video: its classes over time, or what the model made of it."""
    if args.every:
        strip = [(window.start, window.end, window.values) for window in windows]
        title = f"{short_name(path)}: {measure_of(names)} over time"
        draw_strip(picture, title, strip, names, frames)
        return
    window = windows[0]
    titles = titles_of(names)
    best = np.argsort(-window.values, kind="stable")[:args.top or 5]
    draw_clip(chosen.model, window.clip, picture, [titles[i] for i in best],
              window.values[best].tolist(), chosen.views.pixels, short_name(path), window.seconds)


def classify_video(chosen, path, names, args, picture):
    """Prints the classes of a video or of its windows, draws them to `picture`.

    Returns its Windows, of --every without their clips, and how many damaged frames were met.
    Raises VideoError.
    """
    titles, output, windows, frames = titles_of(names), text_output(args), [], data.Thinned(64)
    damage = data.Damage()
    for window in read_parts(chosen, path, names, args, damage):
        lines = [] if windows else [data.quoted(path, 300)]
        if args.every:
            lines.append(describe_window(window, titles, args.top or 3))
            frames.add(((window.start + window.end) / 2, window.clip[len(window.clip) // 2]))
            window = window._replace(clip=None)
        elif names:
            lines += describe_whole(chosen, window, titles, args.top or 5)
        tqdm.write("\n".join(lines), file=output)
        windows.append(window)
    if picture:
        draw_video(chosen, path, names, windows, frames.items, args, picture)
    if damage.count:
        tqdm.write(f"warning: {data.quoted(path, 300)}: {damage.count} of the frames that were "
                   "decoded are damaged", file=sys.stderr)
    return windows, damage.count


def json_record(path, names, windows, damaged, error):
    """What the JSON says of a video, values from high to low."""
    record = {"video": path, "measure": measure_of(names), "damaged": damaged, "windows": []}
    for window in windows:
        order = np.argsort(-window.values, kind="stable")
        classes = {names[i]: round(float(window.values[i]), 6) for i in order}
        record["windows"].append({"start": window.start, "end": window.end, "classes": classes})
    if error:
        record["error"] = str(error)
    return record


def write_features(path, found):
    """Features of [(path, Window)] as an .npz file of arrays without pickles.

    features (n,E) float32, not normalised, as `normalised` says; paths and names (n,); start and
    end (n,) in seconds, end NaN for a whole video.
    """
    windows = [window for _, window in found]
    arrays = {
        "features": np.stack([window.feature for window in windows]),
        "paths": np.array([video for video, _ in found]),
        "names": np.array([Path(video).name for video, _ in found]),
        "start": np.array([window.start for window in windows]),
        "end": np.array([window.end for window in windows], dtype=float),
        "normalised": np.array(False),
    }
    write_atomically(path, lambda file: np.savez(file, **arrays))


def named_videos(names):
    """The videos that --video names, for a folder all below it."""
    paths = []
    for name in names:
        found = [name] if os.path.exists(name) else []
        if os.path.isdir(name):
            found = [str(path) for path in data.videos_below(name)]
            tell_passed_over(name)
        if not found:
            raise ValueError(f"{name}: no such video, or a folder without any")
        paths += found
    return paths


def tell_passed_over(folder):
    """Says on standard error which files of a folder are no known videos."""
    line = data.passed_over(folder)
    if line:
        print(line, file=sys.stderr)


def is_folder(path):
    """Whether a path for pictures is meant as a folder: it is one, or has no suffix."""
    return os.path.isdir(path) or not os.path.splitext(path)[1]


def picture_paths(args, paths):
    """{video: its picture or None}; several pictures lie in the folder --picture, which is made."""
    if not args.picture or len(paths) == 1 and not is_folder(args.picture):
        return dict.fromkeys(paths, args.picture)
    if os.path.exists(args.picture) and not os.path.isdir(args.picture):
        raise ValueError(f"--picture {args.picture}: must end in .png or .jpg, or be a folder")
    if not is_folder(args.picture):
        raise ValueError(f"--picture {args.picture}: --video names {len(paths)} videos; name a "
                         "folder, for a picture of each")
    os.makedirs(args.picture, exist_ok=True)
    stems = [Path(path).stem for path in paths]
    if len({*stems}) < len(stems):  # as in class folders
        stems = ["-".join(Path(path).with_suffix("").parts[-2:]) for path in paths]
    if len({*stems}) < len(stems):
        stems = [f"{stem}-{i}" for i, stem in enumerate(stems, 1)]
    pictures = [os.path.join(args.picture, f"{stem}.png") for stem in stems]
    for picture in pictures:
        if os.path.exists(picture) and not is_drawn(picture):
            raise ValueError(f"--picture {args.picture}: {picture} is there and was not drawn by "
                             "this command; name another folder")
    return dict(zip(paths, pictures))


def run_video(args):
    """--video: the classes of each video or of its windows. Status 1 if one of several fails.

    JSON: [{"video", "measure", "damaged",
    "windows": [{"start", "end", "classes": {name: value}}]}], values from high to low, times in
    seconds, end null for a whole video; "damaged" counts frames that are so among those decoded;
    "error" says why a video cannot be read.
    """
    if args.classes:
        named_classes(args.classes)  # what is wrong with them is told before the model is loaded
    paths = named_videos(args.video)
    check_outputs(args, paths)
    pictures = picture_paths(args, paths)
    chosen = chosen_model(args, "ViT-B/16")
    names = chosen_classes(args, chosen)
    if names:
        set_classes(chosen.model, names, args.prompt)
    next(ensembled(args, chosen))  # sets the one weight of --ensemble
    print(describe_chosen(chosen), file=sys.stderr)
    records, features, failed = [], [], 0
    bar = data.progress_bar(paths, desc="videos", leave=False) if len(paths) > 2 else paths
    for path in bar:
        windows, damaged, error = [], 0, None
        try:
            windows, damaged = classify_video(chosen, path, names, args, pictures[path])
        except data.VideoError as caught:
            if len(paths) == 1:
                raise
            error, failed = caught, 1
            tqdm.write(f"unreadable: {data.quoted(error, 300)}", file=sys.stderr)
        if args.features:
            features += [(path, window._replace(clip=None)) for window in windows]
        if args.json:
            records.append(json_record(path, names, windows, damaged, error))
    if args.json:
        write_json(args.json, records)
    if features:
        write_features(args.features, features)
    return failed


# ---- checking files --------------------------------------------------------------------------

def run_check(args):
    """--check: reads every video below a folder, and decodes every frame of it; names those that
    fail or are damaged. Status 1 if there are any."""
    if not os.path.isdir(args.check):
        raise ValueError(f"--check {args.check}: no such folder; give one with videos below it")
    paths = data.videos_below(args.check)
    tell_passed_over(args.check)
    if not paths:
        raise ValueError(f"{args.check}: no videos below this folder")
    loader = data.load_batches(data.CheckedVideos(paths), args.workers)
    errors = []
    for found in data.progress_bar(loader, desc="reading", unit="video"):
        errors += filter(None, found)
    for error in errors:
        print(data.quoted(error, 300))
    print(f"{len(errors)} of {len(paths)} videos cannot be read, or are damaged")
    return 1 if errors else 0


# ---- the command line ------------------------------------------------------------------------

TASKS = {"test": run_test, "video": run_video, "check": run_check}
MODEL_FLAGS = {"checkpoint", "ensemble", "clip", "merges", "set", "views", "frames", "pixels",
               "prompt", "batch", "precision", "device", "json", "picture"}
HEEDED = {  # the flags that each task heeds
    "test": MODEL_FLAGS | {"data", "labels", "upstream_labels", "half", "temporal", "static",
                           "workers"},
    "video": MODEL_FLAGS | {"classes", "every", "stride", "top", "features"},
    "check": {"workers"},
}


def duration(text):
    """The seconds in a time such as 2s, 500ms, 1.5min or 2; for argparse."""
    match = re.fullmatch(r"(\d*\.?\d+)(ms|s|min|)", text)
    value = 0.0
    if match:
        value = float(match[1]) * {"ms": 0.001, "s": 1, "min": 60, "": 1}[match[2]]
    if not 0.001 <= value <= 10**6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 2s, 500ms or 1.5min")
    return value


def views_of(text):
    """(clips, crops) of 4x3; for argparse."""
    match = re.fullmatch(r"([1-9]\d?)x([13])", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not CLIPSxCROPS such as 2x1 or 4x3, up to "
                                         "99 clips and 1 or 3 crops")
    return int(match[1]), int(match[2])


def ensemble_weights(text):
    """The weights of 0.7, of 0,0.5,1 or of 0,0.1,...,1; for argparse."""
    before, dots, last = text.partition(",...,")
    try:
        weights = [float(part) for part in before.split(",")]
        if dots:
            step, last = weights[-1] - weights[-2], float(last)
            while step > 0 and weights[-1] + step < last + 1e-9 and len(weights) < 1000:
                weights.append(round(weights[-1] + step, 9))
    except (ValueError, IndexError):
        weights = []
    if not weights or not all(0 <= weight <= 1 for weight in weights):
        raise argparse.ArgumentTypeError(f"{text!r} is no weight between 0 and 1 such as 0.7, and "
                                         "no list of them such as 0,0.1,...,1")
    return weights


def setting(text):
    """(key, value) of activation=gelu or head_width=80; for argparse."""
    key, _, value = text.partition("=")
    if key == "activation" and value in ACTIVATIONS:
        return key, value
    if key == "head_width" and re.fullmatch(r"[1-9]\d{0,4}", value):
        return key, int(value)
    raise argparse.ArgumentTypeError(f"{text!r}: known are activation={'|'.join(ACTIVATIONS)} and "
                                     "head_width=NUMBER, of CLIP files that do not tell them")


def check_output(parser, flag, path):
    """Refuses a path at which no file can be written."""
    folder = os.path.dirname(path) or "."
    try:
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if not os.path.exists(path) or os.path.isfile(path):
            with tempfile.TemporaryFile(dir=folder):
                pass
    except OSError as error:
        parser.error(f"{flag} {path}: no file can be written there ({error.strerror}); name one in "
                     "a folder that exists")


def task_of(args):
    """The name of the task that the flags ask for, or None."""
    for name in TASKS:
        if getattr(args, name):
            return name
    return None


def check_task(parser, args):
    """Refuses, before anything is loaded, flags that the task does not heed, and wrong values."""
    task = task_of(args)
    if not task:
        parser.error("give one of --test, --video and --check")
    if task != "test" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error(f"--{task} is for one process: leave torchrun out")
    for name, value in vars(args).items():
        flag = flag_of(name)
        if value != parser.get_default(name) and name not in HEEDED[task] | {task}:
            parser.error(f"{flag} means nothing to --{task}: leave it out")
        least = 0 if name == "workers" else 1
        most = 1024 if name == "frames" else 10**6
        if type(value) is int and not least <= value <= most:
            parser.error(f"{flag} {value}: must lie between {least} and {most}")
    if args.ensemble and not args.checkpoint:
        parser.error("--ensemble is the weight of a --checkpoint: give one")
    for name in ("json", "picture", "features"):
        path = getattr(args, name)
        if path and path != "-" and not (name == "picture" and is_folder(path) and args.video):
            check_output(parser, flag_of(name), path)
    picture = args.picture or ".png"
    if not (picture.lower().endswith((".png", ".jpg")) or args.video and is_folder(picture)):
        kind = ", or be a folder" if args.video else ""
        parser.error(f"--picture {picture}: its name must end in .png or .jpg{kind}")
    if args.video:
        check_video_flags(parser, args)
    args.set = dict(args.set)
    return args


def check_video_flags(parser, args):
    """Refuses flags that do not go together in --video."""
    if args.features and not args.features.endswith(".npz"):
        parser.error(f"--features {args.features}: its name must end in .npz")
    if not (args.classes or args.checkpoint or args.features):
        parser.error("--video needs --classes, such as --classes \"juggling, running\"")
    if args.picture and not (args.classes or args.checkpoint):
        parser.error("--picture draws classes: give --classes too")
    if args.stride and not args.every:
        parser.error("--stride is the time from one window to the next: give --every too")
    if args.views and args.every:
        parser.error("--views means nothing with --every: a window is seen once")
    if len(args.ensemble or ()) > 1:
        parser.error("--ensemble takes several weights only with --test")


def add_task_flags(parser):
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--test", "--zeroshot", choices=data.DATASETS, metavar="DATASET",
                       help=f"test on one of {', '.join(data.DATASETS)}")
    group.add_argument("--video", nargs="+", metavar="PATH",
                       help="classify videos, and all videos in folders")
    group.add_argument("--check", metavar="DIR",
                       help="read every video below DIR as a test does, and name those that fail")


def add_test_flags(flag):
    flag("--data", metavar="DIR", help="folder of the data; default data/DATASET")
    flag("--half", choices=("base", "novel"),
         help="only these classes, for base-to-novel checkpoints; default: all classes")
    flag("--labels", metavar="FILE",
         help="other class names for the same ids, CSV id,name or JSON; llm: the published "
         "LLM-rephrased ones in the data folder; default: the dataset's")
    flag("--upstream-labels", action="store_true",
         help="HMDB-51: the published names, four swapped; default: right")
    flag("--temporal", metavar="FILE",
         help="classes, one per line, whose own top-1 is wanted too; default: none")
    flag("--static", metavar="FILE",
         help="the same; with both, their difference, the temporal score; default: none")


def add_video_flags(flag):
    flag("--classes", nargs="+", metavar="NAMES",
         help="names or sentences with commas between them, or in quotes each; or a file, one per "
         "line, CSV id,name or JSON; a single one gets its cosine similarity, not a probability; "
         "default: those that the checkpoint was trained on")
    flag("--every", type=duration, metavar="TIME",
         help="windows of this length: 2s, 500ms, 1.5min or 2 (seconds); default: the whole video")
    flag("--stride", type=duration, metavar="TIME",
         help="from one window's start to the next's; default: as --every")
    flag("--top", type=int, metavar="K", help="classes to print; default 5, of a window 3")
    flag("--features", metavar="NPZ",
         help="write the videos' features, not normalised, with paths and times; default: no file")


def add_model_flags(flag):
    flag("--checkpoint", metavar="FILE",
         help="a best.pt of train.py, or a released file; default: vanilla CLIP")
    flag("--ensemble", type=ensemble_weights, metavar="W",
         help="(1 - W) x CLIP's weights + W x the checkpoint's; 0,0.1,...,1 tests each and draws "
         "the curve; default 1")
    flag("--clip", metavar="NAME",
         help="OpenAI's name or a file; default ViT-B/16, for shapes its own")
    flag("--merges", metavar="FILE",
         help="CLIP's BPE merges; default: the cache folder's, downloaded once")
    flag("--set", nargs="+", action="extend", type=setting, default=[], metavar="KEY=VALUE",
         help="activation=gelu|quick_gelu and head_width=NUMBER, of CLIP files that do not tell "
         "them; default: as the file says")
    flag("--views", type=views_of, metavar="CLIPSxCROPS",
         help="views of a video in time and in space; default: the recipe's, 2x1 for CLIP")
    flag("--frames", type=int, help="frames of a view; default: the recipe's, 16 for CLIP")
    flag("--pixels", choices=data.MEANS,
         help="whose mean and deviation pixels are normalised with; default: the recipe's")
    flag("--prompt", nargs="+", metavar="TEXT",
         help='templates such as "a video of {}.", averaged; default: "a photo of a {}."')
    flag("--batch", type=int, help="videos (or windows) per pass; default 8")
    flag("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
         help="default %(default)s: 16 bits on a GPU, fp32 on a CPU")
    flag("--device", choices=("cuda", "cpu"), help="default: a GPU where there is one")
    flag("--json", metavar="FILE",
         help='also write the results, - to standard output; of --video [{"video", "measure", '
         '"damaged", "windows": [{"start", "end", "classes": {name: value}}]}], in seconds, end '
         "null for a whole video; default: no file")
    flag("--picture", metavar="PNG",
         help="draw what the model made of the video, of several into a folder; with --every what "
         "happens when; with --test which classes are taken for which, with predictions.csv "
         "beside; default: no picture")


def parse_args(arguments=None):
    usage = "eval.py (--test | --video | --check) ... [flags]"
    parser = Parser(description=__doc__, usage=usage)
    add_task_flags(parser)
    add_test_flags(parser.add_argument_group("for --test").add_argument)
    add_video_flags(parser.add_argument_group("for --video").add_argument)
    add_model_flags(parser.add_argument_group("for --test and --video").add_argument)
    flag = parser.add_argument_group("for --test and --check").add_argument
    flag("--workers", type=int, default=min(8, os.cpu_count()),
         help="loader processes; default %(default)s")
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and os.path.exists(arguments[0]):
        path = shlex.quote(arguments[0])
        tasks = f"--video {path}"
        if os.path.isdir(arguments[0]):
            tasks += f", --check {path} or --test folder --data {path}"
        parser.error(f"{path}: write {tasks}")
    return check_task(parser, check_flags(parser, parser.parse_args(arguments)))


def main(args):
    return TASKS[task_of(args)](args)


if __name__ == "__main__":
    sys.exit(run_command(main, parse_args))
