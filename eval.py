"""Evaluates models, looks at single videos, checks folders, measures speed.

    python eval.py --zeroshot hmdb51 --data /videos/hmdb51                     # vanilla CLIP, or --checkpoint FILE
    python eval.py --zeroshot ucf101 --checkpoint runs/k400/best.pt --ensemble 0.7
    python eval.py --video clip.mp4 --classes "juggling, running" --checkpoint FILE --picture out.png
    python eval.py --check /videos/hmdb51
    python eval.py --benchmark --clip ViT-B/16
"""

import argparse
import math
import multiprocessing
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
from clip_vit import CLIP, FramePool, PoolConfig, clip_weights, load_clip, read_checkpoint
from ila import FLAT, SLOPE, ILA, ILAConfig, earth_movers_distance, interactive_mask
from ila import load_released as load_released_ila
from video_prompt import TCCLIP, TCConfig
from video_prompt import load_released as load_released_tc

METHODS = {"tc": (TCCLIP, TCConfig), "ila": (ILA, ILAConfig), "vifi": (FramePool, PoolConfig)}
VANILLA = dict(method="vifi", frames=16, sampling="tsn", clips=2, crops=1, pixels="clip", short_side=0, clip="ViT-B/16",
               model={})  # how vanilla CLIP sees a video, as a recipe
SCORES = {"top1": "top-1", "top5": "top-5", "pairs": "inside reversed pairs"}
BAD_SHARE = 0.05  # more unreadable videos than this stop a run


# ---- models ----------------------------------------------------------------------------------------------------------

def build_model(method, clip, frames, settings):
    """The model of a method around a CLIP; `settings` override its configuration's defaults."""
    Model, Config = METHODS[method]
    frames = {"frames": frames} if "frames" in Config.__dataclass_fields__ else {}
    return Model(clip, Config(**frames | settings))


def load_model(path, clip="ViT-B/16", merges=None):
    """The model in a checkpoint, and the recipe it was trained with: ours, a released TC-CLIP's or ILA's, or plain CLIP's.

    A released file lacks some of CLIP, such as its token embedding: that comes from `clip`, a name or a file. Raises
    ValueError that names the file.
    """
    content = read_checkpoint(path)
    try:
        if isinstance(content, dict) and "recipe" in content:
            recipe = content["recipe"]
            model = build_model(recipe["method"], load_clip(content["model"], merges or recipe["merges"] or None),
                                recipe["frames"], recipe["model"])
            model.load_state_dict(content["model"])
            return model.eval(), recipe
        weights = {key.removeprefix("module."): value for key, value in clip_weights(content).items()}
        if any(key.startswith("image_encoder.") for key in weights):
            model, recipe = TCCLIP(load_clip(clip, merges)), VANILLA | {"method": "tc", "pixels": "imagenet"}
            load_released_tc(model, weights)
        elif "mit.positional_embedding" in weights:
            head, frames = weights.get("mit.classify_head.2.weight"), weights["mit.positional_embedding"].shape[1]
            settings = {"form": "released"} if head is None else {"form": "released-ssv2", "num_classes": len(head)}
            model = build_model("ila", load_clip(clip, merges), frames, settings)
            load_released_ila(model, weights)
            recipe = VANILLA | {"method": "ila", "pixels": "imagenet", "frames": frames, "model": settings}
        else:
            model, recipe = FramePool(load_clip(content, merges)), VANILLA
        return model.eval(), recipe
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: " + " ".join(str(error).split())) from error


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


def views(recipe, model, **changes):
    """How a model sees a video at test time, from its recipe (a dict): a data.Views."""
    size = model.clip.visual.resolution
    kept = {key: recipe[key] for key in ("frames", "sampling", "clips", "crops", "pixels")}
    return data.Views(size=size, short_side=recipe["short_side"] or round(size * 256 / 224), **kept | changes)


# ---- evaluation, on one process or many ------------------------------------------------------------------------------

def rank_and_world():
    """(number of this process, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def start_processes():
    """Joins the other processes of a torchrun, if there are any; the device of this one."""
    cuda, local = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():  # the long timeout lets one prepare what the others wait for
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=4))
    return device


def gather(items):
    """Every process's list, joined, on every process."""
    rank, world = rank_and_world()
    if world == 1:
        return items
    lists = [None] * world
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def autocast(device, precision):
    """The context in which the models run: fp32, bf16 or fp16."""
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def first_alone(call):
    """call() on every process, but on each node's first one before the others: it downloads for all."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    result = call() if first else None
    gather([])  # the others wait here
    return result if first else call()


def on_first(call):
    """call() on the first process alone, while the others wait; where it fails, all fail with its words."""
    error = None
    if rank_and_world()[0] == 0:
        try:
            call()
        except (ValueError, OSError) as caught:
            error = caught
    for caught in gather([error]):
        if caught is not None:
            raise caught


@torch.no_grad()
def predict(model, videos, batch=8, workers=0, precision="fp32", title="evaluating"):
    """Class probabilities of a data.TestVideos, softmaxed, then averaged over the views; every video exactly once.

    -> (n,C) float32, NaN in the rows of unreadable videos, and [(index, what is wrong)], the same on all processes.
    Raises ValueError with the list where more than 5 % cannot be read.
    """
    rank, world = rank_and_world()
    device, found, bad = next(model.parameters()).device, [], []
    model.eval()
    loader = videos.loader(range(rank, len(videos), world), batch, workers)
    for indices, clips, errors in tqdm(loader, desc=title, leave=False, disable=rank > 0):
        bad += errors
        if indices:
            clips = data.normalise(clips.to(device, non_blocking=True), videos.views.pixels)  # (b,V,T,3,R,R)
            with autocast(device, precision):
                logits, _ = model(clips.flatten(0, 1))  # (b*V,C)
            mean = logits.float().softmax(dim=-1).unflatten(0, (len(indices), -1)).mean(dim=1)  # (b,C)
            found += zip(indices, mean.cpu().numpy())
    found, bad = gather(found), sorted(gather(bad))
    refuse_if_bad([error for _, error in bad], len(videos))
    result = np.full((len(videos), len(videos.videos.classes)), np.nan, dtype=np.float32)
    for i, probabilities in found:
        result[i] = probabilities
    return result, bad


def refuse_if_bad(errors, total):
    """Raises ValueError that lists the unreadable videos where they are more than 5 % of the total."""
    if len(errors) > BAD_SHARE * total:
        raise ValueError(f"{len(errors)} of {total} videos cannot be read, more than {BAD_SHARE:.0%}: " + "; ".join(errors))


def top_k(probabilities, labels, k):
    """Share of videos whose class is among the k most probable; an unreadable video counts as wrong."""
    labels = np.asarray(labels)
    own = probabilities[np.arange(len(labels)), labels][:, None]  # (n,1)
    return float((((probabilities > own).sum(axis=1) < k) & ~np.isnan(own[:, 0])).mean())


def inside_pairs(probabilities, videos):
    """Share of videos that prefer their class to its reversal, "red to blue" to "blue to red"; a tie counts half.

    What cannot see the order of frames scores exactly .5 on clips and their reversals. None where no class has one.
    """
    names = {name: i for i, name in enumerate(videos.classes)}
    opposite = [names.get(data.opposite(name)) for name in videos.classes]
    rows = [i for i, label in enumerate(videos.labels) if opposite[label] not in (None, label)]
    if not rows:
        return None
    labels = np.asarray(videos.labels)[rows]
    own, other = probabilities[rows, labels], probabilities[rows, np.asarray(opposite, dtype=object)[labels].astype(int)]
    return float(((own > other) + 0.5 * (own == other)).mean())


def scores(probabilities, bad, videos):
    """The numbers of one test set, as results.json holds them."""
    result = {"videos": len(videos.labels), "top1": top_k(probabilities, videos.labels, 1),
              "top5": top_k(probabilities, videos.labels, 5)}
    pairs = inside_pairs(probabilities, videos)
    return result | ({} if pairs is None else {"pairs": pairs}) | {"bad": [error for _, error in bad]}


# ---- pictures --------------------------------------------------------------------------------------------------------

INK, PAPER, COLOURS = (40, 40, 40), (255, 255, 255), ((0, 95, 175), (205, 85, 0))


def text(draw, xy, words, size=18, fill=INK, anchor="la"):
    draw.text(xy, words, fill=fill, font=ImageFont.load_default(size), anchor=anchor)


def draw_curves(history, path):
    """Training loss and validation accuracy over the epochs, side by side, as a PNG of 1000 x 400 pixels."""
    picture = Image.new("RGB", (1000, 400), PAPER)
    draw = ImageDraw.Draw(picture)
    for left, key, title, colour in ((70, "loss", "training loss", COLOURS[0]),
                                     (570, "top1", "validation top-1", COLOURS[1])):
        points = [(line["epoch"], line[key]) for line in history if key in line]
        if not points:
            continue
        high = 1.0 if key == "top1" else max(value for _, value in points) or 1.0
        width, height, last = 390, 290, max(2, history[-1]["epoch"])
        text(draw, (left, 12), title, 22)
        for share in (0, 0.25, 0.5, 0.75, 1):
            y = 60 + height * (1 - share)
            draw.line([(left, y), (left + width, y)], fill=(220, 220, 220))
            text(draw, (left - 8, y), f"{share * high:.2f}", 15, anchor="rm")
        place = [(left + width * (epoch - 1) / (last - 1), 60 + height * (1 - value / high)) for epoch, value in points]
        draw.line(place, fill=colour, width=3)
        for x, y in place:
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=colour)
        text(draw, (left, 365), "epoch 1", 15)
        text(draw, (left + width, 365), f"epoch {last}", 15, anchor="ra")
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


def draw_columns(path, title, rows, column, shown, classes, probabilities, width=1600):
    """A picture of `width` pixels: the images column(t, side) of the frames `shown`, below one another; class bars."""
    left, gap, top = 190, 6, 70
    side = min((width - left - 20) // len(shown) - gap, 300)
    picture = Image.new("RGB", (width, top + len(rows) * (side + gap) + 60 + 34 * len(classes)), PAPER)
    draw = ImageDraw.Draw(picture)
    text(draw, (20, 16), title, 26)
    for row, words in enumerate(rows):
        text(draw, (20, top + row * (side + gap) + side // 2 - 20), words, 20)
    for place, t in enumerate(shown):
        for row, image in enumerate(column(t, side)):
            picture.paste(image, (left + place * (side + gap), top + row * (side + gap)))
        text(draw, (left + place * (side + gap) + side // 2, top - 4), f"{t + 1}", 16, anchor="ms")
    draw_classes(draw, (20, top + len(rows) * (side + gap) + 24), classes, probabilities, width)
    picture.save(path)


@torch.no_grad()
def draw_seen(model, clip, path, classes, probabilities, pixels="imagenet"):
    """What TC-CLIP or ILA saw in a clip (T,3,R,R) uint8, in the last block that shows it; a PNG at `path`."""
    video = data.normalise(clip.to(model.clip.logit_scale.device), pixels)[None]
    shown = np.unique(np.linspace(0, len(clip) - 1, min(len(clip), 8)).round().astype(int))
    if isinstance(model, TCCLIP):
        summaries = model.vision(model.clip.visual, video)[2]
        if not summaries:
            raise ValueError("this model summarises nothing: it has no context tokens to draw")
        block, summary = max(summaries.items())
        (T, S), k = summary.seeds.shape[1:], summary.sizes.shape[1]
        group = summary.group.view(T, S).cpu().numpy()
        title = f"TC-CLIP, block {block + 1}: {T} frames x {S} seeds, merged to {k} context tokens"
        rows = "frame", "attention of\nthe class token", f"the {S} seeds", "context tokens\n(one colour each)"
        def column(t, side):
            return context_column(clip[t], summary.scores[0, t].cpu().numpy(), summary.seeds[0, t].cpu().numpy(),
                                  group[t], context_colours(k), side)
    else:
        points = model.interactive_points(video)
        if not points:
            raise ValueError("this model has no interactive points to draw: its frames are not aligned")
        masks = interactive_mask(points[-1], math.isqrt(len(model.clip.visual.positional_embedding) - 1)).flatten(2)
        title = f"ILA, aligned block {len(points)}: interactive points, and the masks around them"
        rows = "frame, point\nand box", "mask"
        def column(t, side):
            return point_column(clip[t], points[-1][0, t].cpu().numpy(), masks[0, t].cpu().numpy(), side)
    draw_columns(path, title, rows, column, shown, classes, probabilities)


def draw_classes(draw, corner, classes, probabilities, width):
    """Bars of the classes' probabilities, one line each."""
    x, y = corner
    for i, (name, p) in enumerate(zip(classes, probabilities)):
        text(draw, (x, y + 34 * i), name if len(name) < 42 else name[:40] + "...", 20)
        draw.rectangle([x + 440, y + 34 * i, x + 440 + max(1, int((width - 600) * p)), y + 34 * i + 22], fill=COLOURS[0])
        text(draw, (x + 450 + max(1, int((width - 600) * p)), y + 34 * i), f"{p:.3f}", 20)


# ---- benchmark -------------------------------------------------------------------------------------------------------

ARCHITECTURES = {  # what CLIP(...) needs, for random weights: no download; see clip_vit.sizes_of
    name: dict(resolution=side, patch=patch, vision_width=width, vision_layers=layers, text_width=text, text_layers=12,
               embed=text, context=77, vocabulary=514)
    for name, side, patch, width, layers, text in (
        ("ViT-B/32", 224, 32, 768, 12, 512), ("ViT-B/16", 224, 16, 768, 12, 512), ("ViT-L/14", 224, 14, 1024, 24, 768),
        ("ViT-L/14@336px", 336, 14, 1024, 24, 768))}
VARIANTS = {"frame pooling": ("vifi", {}), "TC-CLIP": ("tc", {}), "ILA": ("ila", {}),
            "TC-CLIP, lightweight": ("tc", {"reference_blocks": (8, 9, 10, 11)})}
ILA_COSTS = {  # [paper, ILA] (model, frames, SSv2's classes or None): G multiply-adds
    ("ViT-B/32", 8, None): 40, ("ViT-B/32", 16, None): 75, ("ViT-B/16", 8, None): 149, ("ViT-B/16", 16, None): 295,
    ("ViT-L/14", 8, None): 673, ("ViT-L/14@336px", 16, None): 3130, ("ViT-B/16", 8, 174): 214, ("ViT-B/16", 16, 174): 438,
    ("ViT-L/14", 8, 174): 907, ("ViT-L/14@336px", 16, 174): 3723}  # the last is not reached: see README


def benchmark_model(variant, args, device):
    """A method around random weights of the architecture, with 14-token prompts, Kinetics' longest, for its classes."""
    method, settings = VARIANTS[variant]
    torch.manual_seed(0)
    if args.clip and args.clip not in ARCHITECTURES:
        clip = load_clip(args.clip)
    else:
        clip = CLIP(**ARCHITECTURES[args.clip or "ViT-B/16"])
        for name, p in clip.named_parameters():
            if p.dim() != 1 or "embedding" in name:
                nn.init.normal_(p, std=0.02)
    prompt = {} if method == "ila" else {"prompt": "a pic"}
    model = build_model(method, clip, args.frames, settings | prompt).to(device)
    model.set_classes([f"{i:07d}" for i in range(args.num_classes)])  # bytes: start + 4 + 7 + "." + end = 14
    return model


def count_multiply_adds(model, video):
    """(per video, once per class set) in G: half the FLOPs of a forward pass. The math kernel, as the fused one hides."""
    counts = []
    for _ in range(2):  # the first forward also computes what is the same for all videos
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            model.eval()(video[:1]) if not counts else model(video[:1])
        counts.append(counter.get_total_flops() / 2e9)
    return counts[1], counts[0] - counts[1]


def ila_cost(name, frames, num_classes=None):
    """G multiply-adds of ILA for a video and, as the paper counts, one class of text at 77 tokens; on the meta device."""
    counts, sizes = [], ARCHITECTURES[name]
    for layers in (1, 2):  # all blocks cost the same
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            clip = CLIP(**sizes | {"vision_layers": layers})
            model = ILA(clip, ILAConfig(frames=frames, num_classes=num_classes)).eval()
            model.tokens = torch.empty(1, 77)
            model.text_cache.keep(torch.empty(1, sizes["embed"]))
            model(torch.empty(1, frames, 3, sizes["resolution"], sizes["resolution"]))
            prompt = torch.empty(1, 77, sizes["text_width"])
            for block in clip.transformer.resblocks if num_classes is None else ():
                prompt = block(prompt, causal=True)
        counts.append(counter.get_total_flops() / 2e9)
    return counts[0] + (sizes["vision_layers"] - 1) * (counts[1] - counts[0])


def one_pass(model, video, args):
    """Seconds of a forward pass or, with --train, of a training step without the optimiser's part."""
    began = time.perf_counter()
    with torch.set_grad_enabled(args.train), autocast(video.device, args.precision):
        logits, aux = model.train(args.train)(video) if args.train else model(video)
        if args.train:
            (F.cross_entropy(logits, torch.zeros_like(logits[:, 0], dtype=torch.int64)) + aux).backward()
    model.zero_grad()
    if video.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_memory(variant, args, results):
    """Puts the highest memory of one pass, in GB, into the queue `results`; to be run in a process of its own."""
    device = start_processes()
    model = benchmark_model(variant, args, device)
    side = model.clip.visual.resolution
    one_pass(model, torch.randn(args.batch, args.frames, 3, side, side, device=device), args)
    if device.type == "cuda":
        results.put(torch.cuda.max_memory_allocated() / 1e9)
    else:  # Linux's high-water mark of this process; ru_maxrss would start at its parent's
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        results.put(int(status["VmHWM"].split()[0]) / 1e6)


def memory_of(variant, args):
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    child = context.Process(target=peak_memory, args=(variant, args, results))
    child.start()
    child.join()
    if child.exitcode:
        raise ValueError(f"measuring the memory of {variant} failed; it may be more than there is: lower --batch")
    return results.get()


def benchmark(args):
    """The methods side by side in one run: parameters, multiply-adds, time and memory, each against frame pooling."""
    args.batch = args.batch or 2
    device = start_processes()
    models = {variant: benchmark_model(variant, args, device) for variant in VARIANTS}
    base, side = "frame pooling", models["frame pooling"].clip.visual.resolution
    video, seconds = torch.randn(args.batch, args.frames, 3, side, side, device=device), {name: [] for name in models}
    costs = {name: count_multiply_adds(model, video) for name, model in models.items()}
    for repeat in tqdm(range(args.repeats + 1), desc="training steps" if args.train else "forward passes"):
        for name, model in models.items():
            seconds[name].append(one_pass(model, video, args))
    seconds = {name: np.array(taken[1:]) for name, taken in seconds.items()}  # the first is a warm-up
    memory = {name: memory_of(name, args) for name in models}
    processor = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.clip or 'ViT-B/16'}, {'training step' if args.train else 'forward'}, {args.frames} frames, "
          f"batch {args.batch}, {args.num_classes} classes, {args.precision}, {processor}; medians of {args.repeats} "
          "(smallest to largest ratio)")
    print(f"{'':22}{'parameters':>12}{'G per video':>13}{'G per class set':>17}{'videos/s':>10}{'time ratio':>20}"
          f"{'peak GB':>9}{'ratio':>7}")
    for name, model in models.items():
        ratios = seconds[name] / seconds[base]
        count = sum(p.numel() for key, p in model.named_parameters() if "token_embedding" not in key) / 1e6
        print(f"{name:22}{count:10.1f} M{costs[name][0]:13.1f}{costs[name][1]:17.1f}"
              f"{args.batch / np.median(seconds[name]):10.2f}{np.median(ratios):8.3f} ({ratios.min():.2f}-{ratios.max():.2f})"
              f"{memory[name]:9.2f}{memory[name] / memory[base]:7.2f}")
    print("\nILA, G multiply-adds with one class of text at 77 tokens, here and in the paper:")
    for (name, frames, classes), paper in ILA_COSTS.items():
        cost = ila_cost(name, frames, classes)
        print(f"{name:16}{frames:4} frames{'  SSv2' if classes else '':8}{cost:10.1f}{paper:8}{cost / paper - 1:+8.1%}")
    return 0


# ---- the command line ------------------------------------------------------------------------------------------------

def run_command(main, parse):
    """Exit status of a script: 2 and one line for wrong use or missing input, 130 where it was interrupted."""
    try:
        return main(parse())
    except (ValueError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


def chosen_model(args, default_clip):
    """The model that the command line names, on the best device, and the recipe of how it sees videos."""
    clip = args.clip or default_clip
    if args.checkpoint:
        model, recipe = load_model(args.checkpoint, clip, args.merges)
    else:
        model, recipe = FramePool(load_clip(clip, args.merges)).eval(), VANILLA
    if args.ensemble is not None:
        if not args.checkpoint or not 0 <= args.ensemble <= 1:
            raise ValueError(f"--ensemble {args.ensemble}: it is the weight, in [0, 1], of a --checkpoint")
        base = build_model(recipe["method"], load_clip(args.clip or recipe["clip"], args.merges), recipe["frames"],
                           recipe["model"])
        model.load_state_dict(ensemble(base.state_dict(), model.state_dict(), args.ensemble))
    return model.to(start_processes()), recipe


def zeroshot(args):
    """Accuracy on every test set of a dataset; over several splits also their mean and standard deviation."""
    root = Path(args.data or f"data/{args.zeroshot}")
    start_processes()
    tests = data.load_tests(args.zeroshot, root)
    model, recipe = first_alone(lambda: chosen_model(args, root / "clip.pt" if args.zeroshot == "shapes" else "ViT-B/16"))
    results = {}
    for name, videos in tests.items():
        model.set_classes(videos.classes)
        videos = data.TestVideos(videos, views(recipe, model))
        results[name] = scores(*predict(model, videos, args.batch or 8, args.workers, args.precision, name), videos.videos)
        if rank_and_world()[0] == 0:
            print(f"{args.zeroshot} {name}: {results[name]['videos']} videos, {len(videos.videos.classes)} classes, "
                  + ", ".join(f"{title} {100 * results[name][key]:.2f}" for key, title in SCORES.items()
                              if key in results[name]))
            for error in results[name]["bad"]:
                print(f"unreadable, counted as wrong: {error}")
    if len(tests) > 1 and args.zeroshot != "shapes" and rank_and_world()[0] == 0:
        top1 = [100 * result["top1"] for result in results.values()]
        print(f"{args.zeroshot}: top-1 {np.mean(top1):.2f} +- {np.std(top1):.2f} over {len(top1)} splits")
    return 0


@torch.no_grad()
def frame_distance(model, clip, pixels):
    """[paper, ILA Table 5] mean earth mover's distance between adjacent frames' last patch features, for a uint8 clip."""
    video = data.normalise(clip.to(model.clip.logit_scale.device), pixels)[None]
    frames = F.normalize(model.encode(video)[0][0, :, 1:], dim=-1)  # (T,P,D)
    return float(np.mean([earth_movers_distance(a, b) for a, b in zip(frames, frames[1:])]))


def look(args):
    """The most probable classes of each video, and a picture of what the model saw."""
    source = Path(args.classes)
    names = source.read_text("utf-8").splitlines() if source.is_file() else args.classes.split(",")
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise ValueError(f"--classes {args.classes!r}: give names with commas between them, or a file with one per line")
    model, recipe = chosen_model(args, "ViT-B/16")
    if args.picture and (isinstance(model, FramePool) or len(args.video) > 1):
        raise ValueError("--picture draws what TC-CLIP or ILA saw in one video: it needs such a --checkpoint")
    model.set_classes(names)
    seen = views(recipe, model)
    for path in args.video:
        clip = data.read_test(path, seen)  # (V,T,3,R,R)
        with torch.no_grad():
            logits, _ = model(data.normalise(clip.to(model.clip.logit_scale.device), seen.pixels))
        p, order = logits.softmax(dim=-1).mean(dim=0).cpu().sort(descending=True)
        print(path)
        for value, i in zip(p[:5].tolist(), order[:5].tolist()):
            print(f"  {value:.3f}  {names[i]}")
        if isinstance(model, ILA):
            print(f"  {frame_distance(model, clip[0], seen.pixels):.3f}  earth mover's distance between adjacent frames")
        if args.picture:
            draw_seen(model, clip[0], args.picture, [names[i] for i in order[:5]], p[:5].tolist(), seen.pixels)
    return 0


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


def parse_args(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--zeroshot", choices=data.DATASETS, metavar="DATASET", help=f"one of {', '.join(data.DATASETS)}")
    task.add_argument("--video", nargs="+", metavar="FILE", help="videos to look at; needs --classes")
    task.add_argument("--check", metavar="DIR", help="read every video below DIR and name those that fail")
    task.add_argument("--benchmark", action="store_true", help="speed, cost and memory of the methods, side by side")
    parser.add_argument("--data", help="folder of the data; default data/DATASET")
    parser.add_argument("--checkpoint", help="a best.pt of train.py, or a released file; default: vanilla CLIP")
    parser.add_argument("--clip", help="OpenAI name or file; default ViT-B/16")
    parser.add_argument("--merges", help="file of CLIP's BPE merges; default: the cache folder, downloaded once")
    parser.add_argument("--ensemble", type=float, metavar="W", help="(1 - W) x CLIP's weights + W x the checkpoint's")
    parser.add_argument("--classes", help="class names with commas between them, or a file with one per line")
    parser.add_argument("--picture", metavar="PNG", help="draw what the model saw in the video")
    parser.add_argument("--frames", type=int, default=16, help="frames per video in the benchmark; default %(default)s")
    parser.add_argument("--batch", type=int, help="videos per pass; default 8, in the benchmark 2")
    parser.add_argument("--num-classes", type=int, default=400, help="classes in the benchmark; default %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="passes per median in the benchmark; default %(default)s")
    parser.add_argument("--train", action="store_true", help="benchmark training steps instead of forward passes")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="default %(default)s")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count()), help="loader processes; default %(default)s")
    args = parser.parse_args(arguments)
    for name in ("frames", "batch", "num_classes", "repeats"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.video and not args.classes:
        parser.error("--video needs --classes, such as --classes \"juggling, running\"")
    return args


def main(args):
    return (zeroshot if args.zeroshot else look if args.video else check if args.check else benchmark)(args)


if __name__ == "__main__":
    sys.exit(run_command(main, parse_args))
