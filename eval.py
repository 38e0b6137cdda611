"""Evaluates models, looks at single videos and checks folders.

    python eval.py --zeroshot hmdb51 --data /videos/hmdb51      # vanilla CLIP, or --checkpoint FILE
    python eval.py --zeroshot ucf101 --checkpoint runs/k400/best.pt --ensemble 0.7
    python eval.py --video clip.mp4 --classes "juggling, running" --checkpoint FILE --picture a.png
    python eval.py --video long.mp4 more/ --classes names.txt --every 2s --json a.json   # what when
    python eval.py --check /videos/hmdb51
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import re
import sys
import time
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from tqdm import tqdm

import data
from clip_vit import FramePool, PoolConfig, clip_weights, load_clip, read_checkpoint
from ila import FLAT, SLOPE, ILA, ILAConfig, earth_movers_distance, interactive_mask
from ila import load_released as load_released_ila
from video_prompt import TCCLIP, TCConfig
from video_prompt import load_released as load_released_tc



class Method(NamedTuple):
    """A method that the scripts offer."""

    title: str
    model: type  # built from a CLIP and a config, see FramePool for all that it must offer
    config: type  # its settings, a frozen dataclass


METHODS = {"tc": Method("TC-CLIP", TCCLIP, TCConfig), "ila": Method("ILA", ILA, ILAConfig),
           "vifi": Method("frame pooling", FramePool, PoolConfig)}
VANILLA = dict(method="vifi", frames=16, sampling="tsn", clips=2, crops=1, pixels="clip", short_side=0, clip="ViT-B/16",
               model={})  # how vanilla CLIP sees a video, as a recipe
SCORES = {"top1": "top-1", "top5": "top-5", "pairs": "inside reversed pairs",
          **{key: key for key in ("temporal", "static", "temporal score")}}
BAD_SHARE = 0.05  # more unreadable videos than this stop a run


# [paper] top-1 in %, by protocol, method, training data, backbone and frames; the columns are those of train.py's tables
PAPERS = {
    "zeroshot tc k400 ViT-B/16 16": {"hmdb51": 54.2, "ucf101": 82.9, "k600": 75.8},
    "zeroshot tc k400 ViT-B/16 16, LLM names": {"hmdb51": 56.0, "ucf101": 85.4, "k600": 78.1},
    "fewshot tc hmdb51 ViT-B/16 16": {"2 shots": 57.3, "4 shots": 62.3, "8 shots": 67.3, "16 shots": 68.6},
    "fewshot tc ucf101 ViT-B/16 16": {"2 shots": 85.9, "4 shots": 89.9, "8 shots": 92.5, "16 shots": 94.6},
    "fewshot tc ssv2 ViT-B/16 16": {"2 shots": 7.3, "4 shots": 8.6, "8 shots": 9.3, "16 shots": 14.0},
    **{f"base2novel tc {name} ViT-B/16 16": {"harmonic mean": top1}
       for name, top1 in (("k400", 70.4), ("hmdb51", 62.2), ("ucf101", 85.9), ("ssv2", 15.2))},
    "supervised tc k400 ViT-B/16 16": {"top-1": 85.2, "top-5": 96.9},
    **{f"supervised ila {name}": {"top-1": top1} for name, top1 in (
        ("k400 ViT-B/32 8", 81.3), ("k400 ViT-B/32 16", 82.4), ("k400 ViT-B/16 8", 84.0), ("k400 ViT-B/16 16", 85.7),
        ("k400 ViT-L/14 8", 88.0), ("k400 ViT-L/14@336px 16", 88.7), ("ssv2 ViT-B/16 8", 65.0),
        ("ssv2 ViT-B/16 16", 66.8), ("ssv2 ViT-L/14 8", 67.8), ("ssv2 ViT-L/14@336px 16", 70.2))}}


# ---- models ----------------------------------------------------------------------------------------------------------

class LinearProbe(nn.Module):
    """A linear classifier over the standardised video feature of a frozen model [paper, ILA Table 12]."""

    def __init__(self, model, num_classes):
        super().__init__()
        self.model = model.requires_grad_(False)
        embed = model.clip.visual.proj.shape[1]
        self.head = nn.Sequential(nn.LayerNorm(embed, elementwise_affine=False), nn.Linear(embed, num_classes))
        self.names = None

    @property
    def clip(self):
        return self.model.clip

    def train(self, mode=True):
        """As always, but the frozen model stays in eval mode: its batch norm and dropout rest."""
        super().train(mode)
        self.model.eval()
        return self

    def set_classes(self, names):
        if len(names) != self.head[1].out_features or self.names not in (None, [*names]):
            raise ValueError(f"{len(names)} classes for a linear probe of {self.head[1].out_features}: it knows its "
                             "training classes alone")
        self.names = [*names]

    def forward(self, video):
        """Normalised video (B,T,3,R,R) -> logits (B,C), and the auxiliary loss 0."""
        with torch.no_grad():
            feature = self.model.encode_video(video)  # (B,E)
        logits = self.head(feature)
        return logits, logits.new_zeros(())


def build_model(recipe, clip):
    """The model of a recipe (a dict) around a CLIP; recipe["model"] overrides its configuration's defaults."""
    method = METHODS[recipe["method"]]
    frames = {"frames": recipe["frames"]} if "frames" in method.config.__dataclass_fields__ else {}
    return method.model(clip, method.config(**frames | recipe["model"]))


def load_model(path, clip="ViT-B/16", merges=None):
    """The model in a checkpoint, and the recipe it was trained with: ours, a released TC-CLIP's or ILA's, or plain CLIP's.

    A released file lacks some of CLIP, such as its token embedding: that comes from `clip`, a name or a file. Raises
    ValueError that names the file.
    """
    content = read_checkpoint(path)
    try:
        if isinstance(content, dict) and "recipe" in content:
            recipe, weights = content["recipe"], content.get("model")
            missing = [key for key in (*VANILLA, "merges", "probe") if key not in recipe]
            missing += [key for key in ("model", "classes") if key not in content]
            if missing:
                raise ValueError(f"no {', '.join(missing)} in it: another version of train.py wrote it; train anew")
            original = {key.removeprefix("model."): value for key, value in weights.items()}  # of what a probe probes
            model = build_model(recipe, load_clip(original, merges or recipe["merges"]))
            model = LinearProbe(model, len(content["classes"])) if recipe["probe"] else model
            model.load_state_dict(weights)
            if recipe["probe"] or recipe["model"].get("num_classes"):
                model.set_classes(content["classes"])  # a linear head's, and no others from now on
            return model.eval(), recipe
        weights = {key.removeprefix("module."): value for key, value in clip_weights(content).items()}
        if any(key.startswith("image_encoder.") for key in weights):
            model, recipe = TCCLIP(load_clip(clip, merges)), VANILLA | {"method": "tc", "pixels": "imagenet"}
            load_released_tc(model, weights)
        elif "mit.positional_embedding" in weights:
            head, frames = weights.get("mit.classify_head.2.weight"), weights["mit.positional_embedding"].shape[1]
            settings = {"form": "released"} if head is None else {"form": "released-ssv2", "num_classes": len(head)}
            recipe = VANILLA | {"method": "ila", "pixels": "imagenet", "frames": frames, "model": settings}
            model = build_model(recipe, load_clip(clip, merges))
            load_released_ila(model, weights)
        else:
            model, recipe = FramePool(load_clip(content, merges)), VANILLA
        return model.eval(), recipe
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not weights that can be used: " + " ".join(str(error).split())) from error


def load_tuned(model, path, clip, merges=None):
    """Loads a checkpoint, ours or released, into a model of the same method and configuration, or raises ValueError."""
    tuned, recipe = load_model(path, clip, merges)
    try:
        model.load_state_dict(tuned.state_dict())
    except RuntimeError as error:
        raise ValueError(f"{path}: not weights for this run, but of {recipe['method']} with {recipe['frames']} frames and "
                         f"model settings {recipe['model']} ({' '.join(str(error).split()):.120}...)") from error


def ensemble(base, tuned, weight):
    """Weight ensembling (WiSE-FT): (1 - w) CLIP + w fine-tuned, of two state_dicts with the same keys.

    What CLIP lacks stays as it was fine-tuned [released]; temporal positions, begun as CLIP's, are mixed.
    """
    differ = [key for key, value in tuned.items() if key not in base or base[key].shape != value.shape]
    if differ:
        raise ValueError(f"the checkpoint was not tuned from this CLIP; they differ in {', '.join(differ[:3])}: "
                         "give its --clip")
    return {key: torch.lerp(base[key].to(value), value, weight)
            if key.startswith("clip.") or key == "vision.positions" else value for key, value in tuned.items()}


def eval_views(recipe, model):
    """How a model sees a video at test time, from its recipe (a dict): a data.Views."""
    size = model.clip.visual.resolution
    if 0 < recipe["short_side"] < size:
        raise ValueError(f"short_side={recipe['short_side']}: must be at least the model's {size} pixels, or 0")
    kept = {key: recipe[key] for key in ("frames", "sampling", "clips", "crops", "pixels")}
    return data.Views(size=size, short_side=recipe["short_side"] or round(size * 256 / 224), **kept)


# ---- evaluation ------------------------------------------------------------------------------

def autocast(device, precision):
    """The context in which the models run: fp32, bf16 or fp16."""
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


@torch.no_grad()
def predict(model, videos, batch=8, workers=0, precision="fp32", title="evaluating"):
    """Probabilities of a data.TestVideos' classes, softmaxed, then averaged over the views; every video exactly once.

    -> (n,C) float32, NaN in the rows of unreadable videos, and [(index, what is wrong)], the same on all processes.
    Raises ValueError with the list where more than 5 % cannot be read.
    """
    rank, world = data.rank_and_world()
    device, found, bad = next(model.parameters()).device, [], []
    model.eval().set_classes(videos.video_list.classes)
    loader = videos.loader(range(rank, len(videos), world), batch, workers)
    for indices, clips, errors in data.progress_bar(loader, desc=title, leave=False):
        bad += errors
        if indices:
            clips = data.normalise(clips.to(device, non_blocking=True), videos.views.pixels)  # (b,V,T,3,R,R)
            with autocast(device, precision):
                logits, _ = model(clips.flatten(0, 1))  # (b*V,C)
            mean = logits.float().softmax(dim=-1).unflatten(0, (len(indices), -1)).mean(dim=1)  # (b,C)
            found += zip(indices, mean.cpu().numpy())
    found, bad = data.gather(found), sorted(data.gather(bad))
    stop_if_unreadable([error for _, error in bad], len(videos))
    result = np.full((len(videos), len(videos.video_list.classes)), np.nan, dtype=np.float32)
    for i, probabilities in found:
        result[i] = probabilities
    return result, bad


def stop_if_unreadable(errors, total):
    """Raises ValueError that lists the unreadable videos where they are more than 5 % of the total."""
    if len(errors) > BAD_SHARE * total:
        raise ValueError(f"{len(errors)} of {total} videos cannot be read, more than {BAD_SHARE:.0%}: " + "; ".join(errors))


def top_k(probabilities, labels, k):
    """Share of videos whose class is among the k most probable; an unreadable video counts as wrong.

    Of equal probabilities the one of the lower label counts as more, as in argmax.
    """
    labels = np.asarray(labels)[:, None]  # (n,1)
    own = np.take_along_axis(probabilities, labels, axis=1)
    above = (probabilities > own) | (probabilities == own) & (np.arange(probabilities.shape[1]) < labels)  # (n,C)
    return float(((above.sum(axis=1) < k) & ~np.isnan(own[:, 0])).mean())


def inside_pairs(probabilities, videos):
    """Share of videos that prefer their class to its reversal, "red to blue" to "blue to red"; a tie counts half.

    What cannot see the order of frames scores exactly .5 on clips and their reversals. None where no class has one.
    """
    names = {name: i for i, name in enumerate(videos.classes)}
    labels = np.asarray(videos.labels)
    opposite = np.array([names.get(data.opposite(name), i) for i, name in enumerate(videos.classes)])  # or itself
    rows = np.flatnonzero(opposite[labels] != labels)
    if not len(rows):
        return None
    own, other = probabilities[rows, labels[rows]], probabilities[rows, opposite[labels[rows]]]
    return float(((own > other) + 0.5 * (own == other)).mean())


def subset_scores(probabilities, labels, subsets):
    """Top-1 on the videos of each of `subsets` {name: labels}, among all classes; given temporal and static ones also the
    temporal score [paper, ILA Table 13], here the first minus the second [ours: the paper's formula is not at hand]."""
    top1 = {}
    for name, members in subsets.items():
        rows = np.isin(labels, members)
        if rows.any():
            top1[name] = top_k(probabilities[rows], np.asarray(labels)[rows], 1)
    return top1 | ({"temporal score": top1["temporal"] - top1["static"]} if len(top1) == 2 else {})


# ---- pictures --------------------------------------------------------------------------------------------------------

INK, GRID, PAPER, COLOURS = (40, 40, 40), (220, 220, 220), (255, 255, 255), ((0, 95, 175), (205, 85, 0))


def sheet(width, height, title):
    """An empty picture with a title, and what draws on it."""
    picture = Image.new("RGB", (width, round(height)), PAPER)
    draw = ImageDraw.Draw(picture)
    text(draw, (20, 16), title, 26)
    return picture, draw


@lru_cache
def letters(size, ascii):
    """Pillow's own font, or for what it lacks, all but ASCII, one of the system's, if there is any."""
    for name in () if ascii else ("DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf"):
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def text(draw, xy, words, size=18, anchor="la", width=None):
    """Writes words, or as many of their letters as fit into `width` pixels."""
    font, kept = letters(size, words.isascii()), words
    while width and len(kept) > 3 and font.getlength(kept) > width:
        kept = kept[:-4] + "..."
    draw.text(xy, kept, fill=INK, font=font, anchor=anchor)


def draw_curves(history, path):
    """Training loss and validation accuracy over the epochs, side by side, as a PNG of 1000 x 400 pixels."""
    picture, draw = sheet(1000, 400, "")
    for left, key, title, colour in ((70, "loss", "training loss", COLOURS[0]),
                                     (570, "top1", "validation top-1", COLOURS[1])):
        points = [(line["epoch"], line[key]) for line in history if key in line]
        if not points:
            continue
        top = 1 if key == "top1" else max(value for _, value in points)
        high = next((m * 10.0**e for e in range(-6, 6) for m in (1, 2, 4, 6, 8) if m * 10.0**e >= top), top)  # round
        width, height, last = 390, 290, max(2, history[-1]["epoch"])
        text(draw, (left, 12), title, 22)
        for share in (0, 0.25, 0.5, 0.75, 1):
            y = 60 + height * (1 - share)
            draw.line([(left, y), (left + width, y)], fill=GRID)
            text(draw, (left - 8, y), f"{share * high:g}", 15, "rm")
        place = [(left + width * (epoch - 1) / (last - 1), 60 + height * (1 - value / high)) for epoch, value in points]
        draw.line(place, fill=colour, width=3)
        for x, y in place:
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=colour)
        text(draw, (left, 365), "epoch 1", 15)
        text(draw, (left + width, 365), f"epoch {last}", 15, "ra")
    picture.save(path)


def context_colours(k):
    """k colours that neighbours in number do not share: hues in steps of the golden ratio -> uint8 (k,3)."""
    hues = np.arange(k) * 0.618034 % 1
    wheel = np.clip(np.abs((hues[:, None] * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)  # (k,3)
    return (255 * (0.25 + 0.75 * wheel)).astype(np.uint8)


def patch_image(values, side):
    """Values per patch, uint8 (P,3), as an image of side x side pixels, patches at their true places."""
    grid = int(len(values) ** 0.5)
    return Image.fromarray(values.reshape(grid, grid, 3)).resize((side, side), Image.Resampling.NEAREST)


def thumbnail(frame, side):
    """A frame (3,R,R) uint8 as an image of side x side pixels."""
    return Image.fromarray(frame.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.BICUBIC)


def heat(values):
    """Values (P,) from their lowest, dark blue, to their highest, yellow: uint8 (P,3)."""
    x = (values - values.min()) / (values.max() - values.min() + 1e-12)
    return np.stack([255 * x ** 0.5, 255 * x ** 1.5, 80 * (1 - x)], axis=-1).astype(np.uint8)


def context_column(frame, scores, seeds, group, colours, side):
    """A column of TC-CLIP's picture: a frame, its attention (P,), its seeds (S,), the groups (S,) they went into."""
    frame = thumbnail(frame, side)
    pale = Image.blend(frame.convert("L").convert("RGB"), Image.new("RGB", frame.size, PAPER), 0.45)
    chosen = np.zeros((len(scores), 3), np.uint8)
    painted = np.zeros_like(chosen)
    chosen[seeds], painted[seeds] = 255, colours[group]
    mask = patch_image(chosen, side).convert("L")
    return (frame, Image.blend(frame, patch_image(heat(scores), side), 0.6), Image.composite(frame, pale, mask),
            Image.composite(Image.blend(frame, patch_image(painted, side), 0.75), pale, mask))


def point_column(frame, point, mask, side):
    """A column of ILA's picture: a frame with its interactive point (x, y) and the box around it, and its mask (P,)."""
    frame = thumbnail(frame, side)
    masked = Image.blend(frame, patch_image(heat(mask), side), 0.6)
    patch, grid, draw = side / len(mask) ** 0.5, len(mask) ** 0.5, ImageDraw.Draw(frame)
    x, y = ((point + 1) / 2 * (grid - 1) + 0.5) * patch  # -1 and 1 are the middles of the outermost patches
    reach = (FLAT + 1 / SLOPE / 2) / 2 * (grid - 1) * patch  # where the mask has fallen to 1/2
    draw.rectangle([x - reach, y - reach, x + reach, y + reach], outline=COLOURS[1], width=3)
    draw.ellipse([x - 5, y - 5, x + 5, y + 5], fill=COLOURS[1], outline=PAPER)
    return frame, masked


@torch.no_grad()
def draw_seen(model, clip, path, classes, probabilities, pixels="imagenet"):
    """Eight frames of a clip (T,3,R,R) uint8, what TC-CLIP or ILA saw in them in the last block that shows it, and bars
    of the classes; a PNG at `path`. A model without context tokens or points shows the frames alone."""
    video = data.normalise(clip.to(model.clip.logit_scale.device), pixels)[None]  # (1,T,3,R,R)
    shown = np.unique(np.linspace(0, len(clip) - 1, min(len(clip), 8)).round().astype(int))
    side, title, rows = min(1400 // len(shown) - 6, 300), f"What the model saw: {len(clip)} frames", ("frame",)
    columns = [(thumbnail(clip[t], side),) for t in shown]
    if isinstance(model, TCCLIP) and (summaries := model.vision(model.clip.visual, video)[2]):
        block, summary = max(summaries.items())
        (T, S), k = summary.seeds.shape[1:], summary.sizes.shape[1]
        scores, seeds, group = (x.reshape(T, -1).cpu().numpy() for x in (summary.scores, summary.seeds, summary.group))
        title = f"TC-CLIP, block {block + 1}: {T} frames x {S} seeds, merged to {k} context tokens"
        rows = "frame", "attention of\nthe class token", f"the {S} seeds", "context tokens\n(one colour each)"
        columns = [context_column(clip[t], scores[t], seeds[t], group[t], context_colours(k), side) for t in shown]
    elif isinstance(model, ILA) and (points := model.interactive_points(video)):
        masks = interactive_mask(points[-1], math.isqrt(len(model.clip.visual.positional_embedding) - 1)).flatten(2)
        title = f"ILA, aligned block {len(points)}: interactive points, and the masks around them"
        rows = "frame, point\nand box", "mask"
        columns = [point_column(clip[t], *(x[0, t].cpu().numpy() for x in (points[-1], masks)), side) for t in shown]
    top, bars = 80, 104 + len(rows) * (side + 6)
    picture, draw = sheet(1600, bars + 36 + 34 * len(classes), title)
    for row, words in enumerate(rows):
        text(draw, (20, top + row * (side + 6) + side // 2), words, 20, "lm")
    for left, t, column in zip(range(190, 1600, side + 6), shown, columns):
        text(draw, (left + side // 2, top - 5), f"{t + 1}", 16, "ms")
        for row, image in enumerate(column):
            picture.paste(image, (left, top + row * (side + 6)))
    for y, name, p in zip(range(bars, bars + 34 * len(classes), 34), classes, probabilities):
        text(draw, (450, y + 11), name, 20, "rm", width=430)
        draw.rectangle([460, y, 461 + max(0, 1040 * p), y + 22], fill=COLOURS[0])
        text(draw, (472 + max(0, 1040 * p), y + 11), f"{p:.3f}", 20, "lm")
    picture.save(path)


def clock(seconds):
    """Seconds as minutes and seconds, 0:02 or 0:00.5, or with hours, 1:02:03."""
    minutes, seconds = divmod(round(seconds, 2), 60)
    second = f"{seconds:05.2f}".rstrip("0").rstrip(".") if seconds % 1 else f"{seconds:02.0f}"
    return f"{minutes:.0f}:{second}" if minutes < 60 else f"{minutes // 60:.0f}:{minutes % 60:02.0f}:{second}"


def draw_strip(path, title, windows, classes, frames):
    """What happens when: eight of `frames` [(seconds, (3,R,R) uint8)], in time order, and below them a band for each of
    the six classes that reach highest. windows: [(start, end, values (C,))]; a band is 1 high (one class: its highest).
    """
    left, width, band, last = 330, 1190, 64, max(windows[-1][1], 1e-3)  # a single picture takes no time
    values = np.stack([value for _, _, value in windows]).clip(0)  # (windows, C)
    chosen = sorted(np.argsort(-values.max(axis=0))[:6], key=lambda c: values[:, c].argmax())  # as they come
    high, count = 1 if len(classes) > 1 else values.max() + 1e-9, min(8, len(frames))
    side = min(width // count - 6, 240)
    top = 110 + side
    picture, draw = sheet(1600, top + band * len(chosen) + 50, title)
    for share in (np.arange(count) + 0.5) / count:
        shown = frames[:int(share * len(frames)) + 1] if len(frames) == count else [f for f in frames if f[0] <= share * last]
        seconds, frame = shown[-1] if shown else frames[0]
        picture.paste(thumbnail(frame, side), (int(left + width * share - side / 2), 70))
        text(draw, (left + width * share, 76 + side), clock(seconds), 18, "ma")
    for place, c in enumerate(chosen):
        base = top + band * (place + 1)
        text(draw, (left - 14, base - band / 2 + 6), classes[c], 20, "rm", width=left - 34)
        for (start, end, _), value in zip(windows, values[:, c]):
            x = left + width * start / last
            draw.rectangle([x, base - (band - 14) * value / high, max(x, left + width * end / last - 1), base],
                           fill=COLOURS[place % 2])
        draw.line([left, base, left + width, base], fill=INK)
        text(draw, (left + width + 6, base), f"max {values[:, c].max():.2f}", 15, "ls")
    for share in (0, 0.25, 0.5, 0.75, 1):
        draw.line([left + width * share, base, left + width * share, base + 6], fill=INK)
        text(draw, (left + width * share, base + 10), clock(round(last * share, 1)), 16, "ma")
    picture.save(path)


def draw_confusion(probabilities, labels, classes, path):
    """Which classes (rows) are taken for which (columns), named up to 51, and the ten worst pairs; a PNG at `path`.

    probabilities (n,C): NaN in the rows of unreadable videos, which are left out. Shades: the root of a row's shares.
    """
    labels, C, read = np.asarray(labels), len(classes), ~np.isnan(probabilities[:, 0])
    counts = np.zeros((C, C), dtype=int)
    np.add.at(counts, (labels[read], probabilities[read].argmax(axis=1)), 1)
    wrong = counts * (1 - np.eye(C, dtype=int))
    worst = [divmod(int(i), C) for i in np.argsort(-wrong, axis=None, kind="stable")[:10] if wrong.flat[i]]
    shares = counts / counts.sum(axis=1, keepdims=True).clip(1)
    hue = np.where(np.eye(C, dtype=bool)[..., None], *COLOURS)  # (C,C,3)
    shade = (255 - (255 - hue) * shares[..., None] ** 0.5).astype(np.uint8)
    names, cell = classes if C <= 51 else (), max(1, min(36, 816 // C))
    size, side = min(cell, 18), cell * C
    room = int(min(240, max((ImageFont.load_default(size).getlength(name) for name in names), default=0))) + 10
    left, top = 20 + room, 70 + room
    title = f"Rows: the true class; columns: what it is taken for (blue: rightly); top-1 {np.trace(counts) / len(labels):.1%}"
    picture, draw = sheet(max(left + side + 30, 1000), top + side + 60 + 28 * len(worst), title)
    picture.paste(Image.fromarray(shade).resize((side, side), Image.Resampling.NEAREST), (left, top))
    for i, name in enumerate(names):
        draw.line([left, top + cell * i, left + side, top + cell * i], fill=GRID)
        draw.line([left + cell * i, top, left + cell * i, top + side], fill=GRID)
        text(draw, (left - 8, top + cell * (i + 0.5)), name, size, "rm", width=room - 8)
        column = Image.new("RGB", (room, cell), PAPER)
        text(ImageDraw.Draw(column), (8, cell / 2), name, size, "lm", width=room - 8)
        picture.paste(column.rotate(90, expand=True), (left + cell * i, top - room))
    draw.rectangle([left, top, left + side, top + side], outline=INK)
    for y, (own, other) in zip(range(top + side + 30, picture.height, 28), worst):
        text(draw, (left, y), f"{counts[own, other]} of {counts[own].sum()}:  {classes[own]}  ->  {classes[other]}",
             width=picture.width - left - 20)
    picture.save(path)


@torch.no_grad()
def draw_reversal(models, clip, names, path, pixels="imagenet"):
    """A clip and its reversal, and the probabilities that models give its class and the opposite; a PNG at `path`.

    models: {title: model}, whose classes become the two `names`, own and opposite. clip: (T,3,R,R) uint8.
    """
    left, top, side, width = 190, 110, min(760 // len(clip), 150), 620 // len(models)
    height, start = max(side, 110) + 30, left + len(clip) * (side + 4) + 20
    picture, draw = sheet(1600, top + 2 * height, "One clip, forwards and backwards")
    clips = torch.stack([clip, clip.flip(0)])  # (2,T,3,R,R)
    for line, (frames, words) in enumerate(zip(clips, ("forwards", "backwards"))):
        text(draw, (20, top + line * height + side // 2), f"{words}:\n{names[line]}", 20, "lm")
        for t, frame in enumerate(frames):
            picture.paste(thumbnail(frame, side), (left + t * (side + 4), top + line * height))
    for place, (title, model) in enumerate(models.items()):
        text(draw, (start + place * width, top - 12), title, 20, "ls")
        model.eval().set_classes(names)
        logits, _ = model(data.normalise(clips.to(model.clip.logit_scale.device), pixels))  # (2,2)
        for line, values in enumerate(logits.softmax(dim=-1).tolist()):
            for i, (name, p, colour) in enumerate(zip(names, values, COLOURS)):
                x, y = start + place * width, top + line * height + 55 * i
                text(draw, (x, y), f"{name}  {p:.3f}", 17, width=width - 20)
                draw.rectangle([x, y + 24, x + max(1, (width - 30) * p), y + 40], fill=colour)
    picture.save(path)


# ---- the command line ------------------------------------------------------------------------------------------------

def flush_output():
    """Writes what print has kept back, so that it fails here and not, past all handlers, when Python ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def run_command(main, parse):
    """Exit status of a script: 2 and one line for wrong use, missing input or too little memory, 130 where it was
    interrupted, 141 where nobody reads its output any more, as `| head` does."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # file names may hold what no encoding has
    try:
        try:
            status = main(parse())
            if dist.is_initialized():  # else one that ends may tear down what the others still read from
                dist.destroy_process_group()
            return status
        finally:
            flush_output()
    except BrokenPipeError:
        return 141
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        words = " ".join(str(error).split())
        if not isinstance(error, (ValueError, OSError)):
            if not re.search(r"allocate|DataLoader worker \(pid", words):  # PyTorch's and NumPy's words for no memory
                raise
            words = f"memory is out: lower micro_batch or workers, or eval.py's --batch or --workers ({words:.160})"
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(5)  # where a node's first process fails alike, torchrun ends this one meanwhile: one line, not eight
        print(f"error: {words}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command starts again, a training run from its last checkpoint", file=sys.stderr)
        return 130


def chosen_model(args, default_clip):
    """The model that the command line names, on the best device, and the recipe of how it sees videos."""
    clip = args.clip or default_clip
    if args.checkpoint:
        model, recipe = load_model(args.checkpoint, clip, args.merges)
    else:
        model, recipe = FramePool(load_clip(clip, args.merges)).eval(), VANILLA
    if args.ensemble is not None and recipe.get("probe"):
        raise ValueError("--ensemble: of a linear probe CLIP was never tuned; leave it out")
    if isinstance(model, TCCLIP):  # sentences are longer than the names that it was trained on
        model.config = replace(model.config, text_length=len(model.clip.positional_embedding))
    if args.ensemble is not None:
        base = build_model(recipe, load_clip(args.clip or recipe["clip"], args.merges))
        model.load_state_dict(ensemble(base.state_dict(), model.state_dict(), args.ensemble))
    return model.to(data.start_processes(args.device)), recipe


def evaluate(model, videos, batch, workers, precision, title="evaluating", picture=None, subsets={}):
    """The scores of a model on a data.TestVideos, as results.json has them, and a picture of what is taken for what."""
    probabilities, bad = predict(model, videos, batch, workers, precision, title)
    videos = videos.video_list
    if picture and data.rank_and_world()[0] == 0:
        draw_confusion(probabilities, videos.labels, videos.classes, picture)
    pairs = inside_pairs(probabilities, videos)
    return {"videos": len(videos.labels), "classes": len(videos.classes),
            "top1": top_k(probabilities, videos.labels, 1), "top5": top_k(probabilities, videos.labels, 5),
            **({} if pairs is None else {"pairs": pairs}), "bad": [error for _, error in bad],
            "absent": list(videos.absent), **subset_scores(probabilities, videos.labels, subsets)}


def describe_scores(name, score):
    """The lines that tell of one test set's scores."""
    numbers = ", ".join(f"{title} {100 * score[key]:.2f}" for key, title in SCORES.items() if key in score)
    lines = [f"{name}: {score['videos']} videos, {score['classes']} classes, {numbers}"]
    if score["absent"]:
        lines.append(f"{name}: {len(score['absent'])} annotated videos are not there and left out, such as {score['absent'][0]}")
    return "\n".join([*lines, *(f"unreadable, counted as wrong: {error}" for error in score["bad"])])


def class_list(path, classes):
    """The classes that a file lists, one name per line, all of them among `classes`."""
    with data.expecting(path, "text in UTF-8, one class per line"):
        names = [line.strip() for line in Path(path).read_text("utf-8-sig").splitlines() if line.strip()]
    unknown = [name for name in names if name not in classes]
    if unknown or not names:
        raise ValueError(f"{path}: it must list classes of the data, one per line; not one: {', '.join(unknown[:3])}")
    return names


def zeroshot(args):
    """Accuracy on every test set of a dataset; over several splits also their mean and standard deviation."""
    root = Path(args.data or f"data/{args.zeroshot}")
    data.start_processes(args.device)
    tests = data.load_tests(args.zeroshot, root, labels=args.labels or "", upstream_labels=args.upstream_labels)
    subsets = {kind: path for kind, path in (("temporal", args.temporal), ("static", args.static)) if path}
    known = {name for videos in tests.values() for name in videos.classes}
    subsets = {kind: class_list(path, known) for kind, path in subsets.items()}
    model, recipe = data.node_leader_first(lambda: chosen_model(args, root / "clip.pt" if args.zeroshot == "shapes" else "ViT-B/16"))
    results, first, out = {}, data.rank_and_world()[0] == 0, sys.stderr if args.json == "-" else sys.stdout
    for name, videos in tests.items():
        results[name] = evaluate(model, data.TestVideos(videos, eval_views(recipe, model)), args.batch or 8, args.workers,
                             args.precision, name, None if results else args.picture,
                             {kind: [i for i, own in enumerate(videos.classes) if own in names]
                              for kind, names in subsets.items()})
        if first:
            print(describe_scores(f"{args.zeroshot} {name}", results[name]), file=out)
    if first and "split1" in results:
        top1 = [100 * result["top1"] for result in results.values()]
        key = f"zeroshot {recipe['method']} k400 {recipe['clip']} {recipe['frames']}" + ", LLM names" * bool(args.labels)
        paper = f" ({PAPERS[key][args.zeroshot]} in the paper, after Kinetics-400)" if key in PAPERS else ""
        print(f"{args.zeroshot}: top-1 {np.mean(top1):.2f} +- {np.std(top1):.2f} over {len(top1)} splits{paper}", file=out)
    if first and args.json:
        write_json(args.json, results)
    return 0


@torch.no_grad()
def frame_distance(model, clip, pixels):
    """[paper, ILA Table 5] mean earth mover's distance between adjacent frames' last patch features, for a uint8 clip."""
    video = data.normalise(clip.to(model.clip.logit_scale.device), pixels)[None]
    frames = F.normalize(model.encode(video)[0][0, :, 1:], dim=-1)  # (T,P,D)
    return float(np.mean([earth_movers_distance(a, b) for a, b in zip(frames, frames[1:])]))


def named_classes(words):
    """The names in --classes, each once: with commas between them, or a file's, a name per line or data.read_labels'."""
    if words.endswith((".csv", ".json")):
        names = data.read_labels(words)
    elif words.endswith(".txt") or os.path.isfile(words) or os.sep in words and os.path.isdir(words):
        with data.expecting(words, "text in UTF-8, one class per line"):
            names = Path(words).read_text("utf-8-sig").splitlines()
    else:
        names = words.split(",")
    names = list(dict.fromkeys(name.strip() for name in names if name.strip()))
    if not names:
        raise ValueError(f"--classes {words!r}: give names with commas between them, or a file with one per line")
    return names


@torch.no_grad()
def windows_of(model, path, seen, args):
    """Yields (start, end, values (C,), clip (T,3,R,R)) for the windows of --every, or once for the whole video.

    start, end: seconds; 0 and None for a whole video. values: probabilities averaged over the views; of a class alone, its
    cosine similarity.
    """
    scale, positions = model.clip.logit_scale.exp(), data.SAMPLERS[seen.sampling]
    if args.every:
        windows = data.read_windows(path, args.every, seen.frames, seen.size, seen.short_side, positions)
    else:
        windows = iter([(0.0, None, data.read_test(path, seen))])
    while batch := list(itertools.islice(windows, args.batch or 8)):
        clips = torch.stack([clip for *_, clip in batch]).view(len(batch), -1, seen.frames, 3, seen.size, seen.size)
        with autocast(scale.device, args.precision):
            logits, _ = model(data.normalise(clips.flatten(0, 1).to(scale.device), seen.pixels))  # (b*V,C)
        values = logits.float().softmax(dim=-1) if logits.shape[1] > 1 else logits.float() / scale
        values = values.unflatten(0, clips.shape[:2]).mean(dim=1).cpu().numpy()
        yield from ((start, end, p, clip) for (start, end, _), p, clip in zip(batch, values, clips[:, 0]))


def write_json(path, content):
    """Writes content as JSON to a file, or where path is - to standard output."""
    words = json.dumps(content, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace")  # odd file names
    print(words.decode()) if path == "-" else Path(path).write_bytes(words + b"\n")


def look_at(model, path, names, seen, args, out):
    """Says to the file `out` what a video shows, and draws it -> the windows of its JSON record. Raises VideoError."""
    titles = names if len(names) > 1 else [f"{names[0]} (cosine similarity)"]
    record, strip, frames, stride = [], [], [], 1
    for start, end, values, clip in windows_of(model, path, seen, args):
        order = np.argsort(-values, kind="stable")
        lines = [] if record else [path]
        classes = {names[i]: round(float(values[i]), 6) for i in order} if args.json else {}
        record.append({"start": start, "end": end, "classes": classes})
        if args.every:
            top = "  ".join(f"{values[i]:.2f} {titles[i]}" for i in order[:3])
            lines.append(f"  {clock(start)}-{clock(end)}  {top}")
            if len(strip) % stride == 0:  # eight will be drawn, and how many there will be nobody knows
                frames.append((start, clip[len(clip) // 2]))
            if len(frames) == 64:
                frames, stride = frames[::2], 2 * stride
            strip.append((start, end, values))
        else:
            lines += [f"  {values[i]:.3f}  {titles[i]}" for i in order[:5]]
            if isinstance(model, ILA):
                distance = frame_distance(model, clip, seen.pixels)
                lines.append(f"  {distance:.3f}  earth mover's distance between adjacent frames")
        tqdm.write("\n".join(lines), file=out)
        if args.picture and not args.every:
            draw_seen(model, clip, args.picture, [titles[i] for i in order[:5]], values[order[:5]].tolist(), seen.pixels)
    if args.picture and args.every:
        measure = "probability" if len(names) > 1 else "cosine similarity"
        name = Path(path).name
        name = name if len(name) <= 70 else f"{name[:40]}...{name[-27:]}"
        draw_strip(args.picture, f"{name}: {measure} over time", strip, names, frames)
    return record


def look(args):
    """The most probable classes of each video or of its windows: lines, JSON, a picture. 1 if one of several fails.

    JSON: a list of {"video", "measure", "windows": [{"start", "end", "classes": {name: value}}]}, highest first, with
    "error" where a video cannot be read; "end" is null for a whole video; "measure": probability or cosine similarity.
    """
    names, paths, records, failed = named_classes(args.classes), [], [], 0
    for path in args.video:
        found = list(map(str, data.videos_below(path))) if os.path.isdir(path) else [path] * os.path.exists(path)
        if not found:
            raise ValueError(f"{path}: no such video, or a folder without any")
        paths += found
    if args.picture and len(paths) > 1:
        raise ValueError(f"--picture draws one video; --video names {len(paths)}")
    model, recipe = chosen_model(args, "ViT-B/16")
    model.set_classes(names)
    seen = eval_views(recipe | ({"clips": 1, "crops": 1} if args.every else {}), model)
    for path in tqdm(paths, desc="videos", leave=False, disable=len(paths) < 3):
        record = {"video": path, "measure": "probability" if len(names) > 1 else "cosine similarity", "windows": []}
        try:
            record["windows"] = look_at(model, path, names, seen, args, sys.stderr if args.json == "-" else sys.stdout)
        except data.VideoError as error:
            if len(paths) == 1:
                raise
            record["error"], failed = str(error), 1
            tqdm.write(f"unreadable: {error}", file=sys.stderr)
        records.append(record)
    if args.json:
        write_json(args.json, records)
    return failed


def check(args):
    """Reads every video below a folder; names each that fails, and why. Exit status 1 if there are any."""
    paths = data.videos_below(args.check)
    if not paths:
        raise ValueError(f"{args.check}: no videos below this folder")
    videos = data.TestVideos(data.VideoList(("",), tuple(paths), (0,) * len(paths)), data.Views())
    bad = []
    for _, _, errors in tqdm(videos.loader(range(len(paths)), 1, args.workers), desc="reading", unit="video"):
        bad += [error for _, error in errors]
    print("\n".join([*bad, f"{len(bad)} of {len(paths)} videos cannot be read"]))
    return 1 if bad else 0


def duration(words):
    """The seconds in a time such as 2s, 500ms, 1.5min or 2; for argparse."""
    match = re.fullmatch(r"(\d*\.?\d+)(ms|s|min|)", words)
    value = float(match[1]) * {"ms": 0.001, "s": 1, "min": 60, "": 1}[match[2]] if match else 0
    if value < 0.001:
        raise argparse.ArgumentTypeError(f"{words!r} is not a time such as 2s, 500ms or 1.5min")
    return value


TASKS_OF = {name: tasks for names, tasks in (  # the tasks that heed a flag; what is not here goes with all
    ("data labels upstream_labels temporal static", ("zeroshot",)), ("classes every", ("video",)),
    ("checkpoint ensemble json picture", ("zeroshot", "video")),
    ("clip merges batch precision device", ("zeroshot", "video"))) for name in names.split()}


class Parser(argparse.ArgumentParser):
    """For both scripts: an error is a ValueError, for run_command's one line; help is as wide on every terminal."""

    def __init__(self, **settings):
        super().__init__(formatter_class=partial(argparse.RawDescriptionHelpFormatter, width=100), **settings)

    def error(self, message):
        raise ValueError(f"{message} ({self.prog} --help tells all flags)")


def check_flags(parser, args):
    """For both scripts: a flag may be neither empty, as a shell's unset variable leaves it, nor name an absent file."""
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')}"
        if value == "" or isinstance(value, list) and "" in value:
            parser.error(f"{flag} is empty: give a value, or leave the flag out")
        if name in ("checkpoint", "merges", "temporal", "static") and value and not os.path.isfile(value):
            parser.error(f"{flag} {value}: no such file")
    return args


def check_task(parser, args):
    """Refuses, before anything is loaded, flags that the task does not heed and values that cannot be meant."""
    task = next((name for name in ("zeroshot", "video", "check") if getattr(args, name)), None)
    if not task:
        parser.error("give one of --zeroshot, --video and --check")
    if task != "zeroshot" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error(f"--{task} is for one process: leave torchrun out")
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')}"
        if value != parser.get_default(name) and task not in TASKS_OF.get(name, (task,)):
            parser.error(f"{flag} means nothing to --{task}: leave it out")
        if type(value) is int and not (name != "workers") <= value <= 10**6:
            parser.error(f"{flag} {value}: must lie between {name != 'workers':d} and 1000000")
    for flag, path in (("--json", args.json), ("--picture", args.picture)):
        if path and (os.path.isdir(path) or not os.path.isdir(os.path.dirname(path) or ".")):
            parser.error(f"{flag} {path}: no file can be written there; name one in a folder that exists")
    if args.picture and not args.picture.lower().endswith((".png", ".jpg")):
        parser.error(f"--picture {args.picture}: its name must end in .png or .jpg")
    if args.video and not args.classes:
        parser.error("--video needs --classes, such as --classes \"juggling, running\"")
    if args.ensemble is not None and not (args.checkpoint and 0 <= args.ensemble <= 1):
        parser.error(f"--ensemble {args.ensemble}: it is the weight, between 0 and 1, of a --checkpoint")
    return args


def parse_args(arguments=None):
    parser = Parser(description=__doc__, usage="eval.py (--zeroshot | --video | --check) ... [flags]")
    task = parser.add_mutually_exclusive_group()
    flag = task.add_argument
    flag("--zeroshot", choices=data.DATASETS, metavar="DATASET", help=f"test on one of {', '.join(data.DATASETS)}")
    flag("--video", nargs="+", metavar="PATH", help="look at videos and at all videos in folders")
    flag("--check", metavar="DIR", help="read every video below DIR as a test does, and name those that fail")
    flag = parser.add_argument_group("for --zeroshot").add_argument
    flag("--data", metavar="DIR", help="folder of the data; default data/DATASET")
    flag("--labels", metavar="FILE", help="other class names for the same ids, CSV id,name or JSON; llm: the published "
         "LLM-rephrased ones in the data folder; default: the dataset's")
    flag("--upstream-labels", action="store_true", help="HMDB-51: the published names, four swapped; default: right")
    flag("--temporal", metavar="FILE", help="classes, one per line, whose own top-1 is wanted too; default: none")
    flag("--static", metavar="FILE", help="the same; with both, their difference, the temporal score; default: none")
    flag = parser.add_argument_group("for --video").add_argument
    flag("--classes", metavar="NAMES", help="needed: names or sentences with commas between them, or a file, one per "
         "line, CSV id,name or JSON; one alone gets its cosine similarity, not a probability")
    flag("--every", type=duration, metavar="TIME", help="windows of this length, one after the other: 2s, 500ms, "
         "1.5min or 2 (seconds); default: the whole video at once")
    flag = parser.add_argument_group("for --zeroshot and --video").add_argument
    flag("--checkpoint", metavar="FILE", help="a best.pt of train.py, or a released file; default: vanilla CLIP")
    flag("--ensemble", type=float, metavar="W", help="(1 - W) x CLIP's weights + W x the checkpoint's; default 1")
    flag("--json", metavar="FILE", help='also write the results, - to standard output; of --video [{"video", "measure"'
         ', "windows": [{"start", "end", "classes": {name: value}}]}], in seconds, end null for a whole video; default: no file')
    flag("--picture", metavar="PNG", help="draw what the model saw; with --every what happens when; with --zeroshot "
         "which classes are taken for which; default: no picture")
    flag = parser.add_argument_group("for all of these; --workers also for --check").add_argument
    flag("--clip", metavar="NAME", help="OpenAI's name or a file; default ViT-B/16, for shapes its own")
    flag("--merges", metavar="FILE", help="CLIP's BPE merges; default: the cache folder's, downloaded once")
    flag("--batch", type=int, help="videos (or windows) per pass; default 8")
    flag("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="default %(default)s")
    flag("--device", choices=("cuda", "cpu"), help="default: a GPU where there is one")
    flag("--workers", type=int, default=min(8, os.cpu_count()), help="loader processes; default %(default)s")
    return check_task(parser, check_flags(parser, parser.parse_args(arguments)))


def main(args):
    return (zeroshot if args.zeroshot else look if args.video else check)(args)


if __name__ == "__main__":
    sys.exit(run_command(main, parse_args))
