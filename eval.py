"""Evaluates models, looks at single videos, checks folders, measures speed.

    python eval.py --zeroshot hmdb51 --data /videos/hmdb51                     # vanilla CLIP, or --checkpoint FILE
    python eval.py --zeroshot ucf101 --checkpoint runs/k400/best.pt --ensemble 0.7
    python eval.py --video clip.mp4 --classes "juggling, running" --checkpoint FILE --picture out.png
    python eval.py --check /videos/hmdb51
    python eval.py --benchmark --clip ViT-B/16
"""

import argparse
import multiprocessing
import os
import resource
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
from clip_vit import CLIP, FramePool, PoolConfig, clip_weights, load_clip, read_checkpoint
from video_prompt import TCCLIP, TCConfig
from video_prompt import load_released as load_released_tc

METHODS = {"tc": (TCCLIP, TCConfig), "vifi": (FramePool, PoolConfig)}
VANILLA = dict(method="vifi", frames=16, sampling="tsn", clips=2, crops=1, pixels="clip", short_side=0, model={})
RELEASED_TC = VANILLA | dict(method="tc", pixels="imagenet", clip="ViT-B/16")
SCORES = {"top1": "top-1", "top5": "top-5", "pairs": "inside reversed pairs"}
BAD_SHARE = 0.05  # more unreadable videos than this stop a run


# ---- models ----------------------------------------------------------------------------------------------------------

def build_model(method, clip, frames, settings):
    """The model of a method around a CLIP; `settings` override its configuration's defaults."""
    Model, Config = METHODS[method]
    frames = {"frames": frames} if "frames" in Config.__dataclass_fields__ else {}
    return Model(clip, Config(**frames | settings))


def load_model(path, clip="ViT-B/16", merges=None):
    """The model in a checkpoint, and the recipe it was trained with: ours, a released TC-CLIP's, or plain CLIP weights.

    A released file lacks CLIP's token embedding: it comes from `clip`, a name or a file. Raises ValueError that names
    the file.
    """
    content = read_checkpoint(path)
    try:
        if isinstance(content, dict) and "recipe" in content:
            recipe = content["recipe"]
            model = build_model(recipe["method"], load_clip(content["model"], merges or recipe["merges"] or None),
                                recipe["frames"], recipe["model"])
            model.load_state_dict(content["model"])
            return model.eval(), recipe
        weights = clip_weights(content)
        if any("image_encoder." in key for key in weights):
            model = TCCLIP(load_clip(clip, merges), TCConfig())
            load_released_tc(model, weights)
            return model.eval(), RELEASED_TC
        return FramePool(load_clip(content, merges)).eval(), VANILLA
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: " + " ".join(str(error).split())) from error


def ensemble(base, tuned, weight):
    """Weight ensembling (WiSE-FT): (1 - w) CLIP + w fine-tuned, of two state_dicts with the same keys.

    What CLIP lacks stays as it was fine-tuned [released]; temporal positions, begun as CLIP's, are mixed.
    """
    return {key: torch.lerp(base[key].to(value.dtype), value, weight)
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
    opposite = [names.get(" to ".join(reversed(name.split(" to ")))) for name in videos.classes]
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

INK, PAPER, COLOURS = (40, 40, 40), (255, 255, 255), ((0, 95, 175), (205, 85, 0), (0, 130, 90), (150, 60, 150))


def text(draw, xy, words, size=18, fill=INK, anchor="la"):
    draw.text(xy, words, fill=fill, font=ImageFont.load_default(size), anchor=anchor)


def draw_curves(history, path):
    """Training loss and validation accuracy over the epochs, side by side, as a PNG of 1000 x 400 pixels."""
    picture = Image.new("RGB", (1000, 400), PAPER)
    draw = ImageDraw.Draw(picture)
    for left, key, title, colour in ((70, "loss", "training loss", COLOURS[0]), (570, "top1", "validation top-1", COLOURS[1])):
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


def context_strips(frame, scores, seeds, group, colours, side):
    """One column of the TC-CLIP picture: a frame (3,R,R), its attention (P,), its seeds (S,) and their groups (S,)."""
    frame = Image.fromarray(frame.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.BICUBIC)
    pale = Image.blend(frame.convert("L").convert("RGB"), Image.new("RGB", frame.size, PAPER), 0.45)
    heat = (scores - scores.min()) / (scores.max() - scores.min() + 1e-12)  # (P,) in [0,1]
    warm = np.stack([255 * heat ** 0.5, 255 * heat ** 1.5, 80 * (1 - heat)], axis=-1).astype(np.uint8)  # (P,3)
    chosen = np.zeros((len(scores), 3), np.uint8)
    chosen[seeds] = 255
    mask, painted = patch_image(chosen, side).convert("L"), np.zeros_like(chosen)
    painted[seeds] = colours[group]
    return (frame, Image.blend(frame, patch_image(warm, side), 0.6), Image.composite(frame, pale, mask),
            Image.composite(Image.blend(frame, patch_image(painted, side), 0.75), pale, mask))


@torch.no_grad()
def draw_context(model, clip, classes, probabilities, path, pixels="imagenet", width=1600):
    """What TC-CLIP saw in a clip (T,3,R,R) uint8, in its last summarising block; PNG at `path`.

    Rows: frames; attention of the class token; seeds; the context token that each seed went into, one colour each.
    """
    device = model.clip.logit_scale.device
    _, _, summaries = model.vision(model.clip.visual, data.normalise(clip.to(device), pixels)[None])
    block, summary = max(summaries.items())
    T, S = summary.seeds.shape[1:]
    shown = np.unique(np.linspace(0, T - 1, min(T, 8)).round().astype(int))
    left, gap, top = 190, 6, 70
    side = (width - left - 20) // len(shown) - gap
    picture = Image.new("RGB", (width, top + 4 * (side + gap) + 60 + 34 * len(classes)), PAPER)
    draw = ImageDraw.Draw(picture)
    k = summary.sizes.shape[1]
    text(draw, (20, 16), f"TC-CLIP, block {block + 1}: {T} frames x {S} seeds, merged to {k} context tokens", 26)
    for row, words in enumerate(("frame", "attention of\nthe class token", f"the {S} seeds", "context tokens\n(one colour each)")):
        text(draw, (20, top + row * (side + gap) + side // 2 - 20), words, 20)
    group = summary.group[0].view(T, S).cpu().numpy()
    for column, t in enumerate(shown):
        strips = context_strips(clip[t], summary.scores[0, t].cpu().numpy(), summary.seeds[0, t].cpu().numpy(), group[t],
                                context_colours(k), side)
        for row, image in enumerate(strips):
            picture.paste(image, (left + column * (side + gap), top + row * (side + gap)))
        text(draw, (left + column * (side + gap) + side // 2, top - 4), f"{t + 1}", 16, anchor="ms")
    draw_classes(draw, (20, top + 4 * (side + gap) + 24), classes, probabilities, width)
    picture.save(path)


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
VARIANTS = {"frame pooling": ("vifi", {}), "TC-CLIP": ("tc", {}), "TC-CLIP, lightweight": ("tc", {"reference_blocks": (8, 9, 10, 11)})}


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
    model = build_model(method, clip, args.frames, settings | {"prompt": "a pic"}).to(device)
    model.set_classes([f"{i:07d}" for i in range(args.num_classes)])  # bytes: start, 4, 7, "." and end are 13, or so
    return model


def count_multiply_adds(model, video):
    """(per video, once per class set) in G: half the FLOPs of a forward pass. The math kernel, as the fused one hides."""
    counts = []
    for _ in range(2):  # the first forward also computes what is the same for all videos
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            model.eval()(video[:1]) if not counts else model(video[:1])
        counts.append(counter.get_total_flops() / 2e9)
    return counts[1], counts[0] - counts[1]


def one_pass(model, video, training):
    """A forward pass, or a training step without the optimiser's; waits for the device."""
    if training:
        logits, aux = model.train()(video)
        (torch.nn.functional.cross_entropy(logits, torch.zeros(len(video), dtype=torch.int64, device=video.device)) + aux).backward()
        model.zero_grad()
    else:
        with torch.no_grad():
            model(video)
    if video.is_cuda:
        torch.cuda.synchronize()


def peak_memory(variant, args, training, results):
    """Puts the highest memory of one pass, in GB, into the queue `results`: run in a process of its own."""
    device = start_processes()
    model = benchmark_model(variant, args, device)
    with autocast(device, args.precision):
        one_pass(model.eval(), torch.randn(args.batch, args.frames, 3, *2 * [model.clip.visual.resolution], device=device), training)
    results.put(torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)


def benchmark(args):
    """The methods side by side in one run: parameters, multiply-adds, time and memory, each against frame pooling."""
    device, spawn = start_processes(), multiprocessing.get_context("spawn")
    models = {variant: benchmark_model(variant, args, device) for variant in VARIANTS}
    side = next(iter(models.values())).clip.visual.resolution
    video = torch.randn(args.batch, args.frames, 3, side, side, device=device)
    seconds = {(variant, training): [] for variant in models for training in (False, True)}
    costs = {variant: count_multiply_adds(model, video) for variant, model in models.items()}
    for training in (False, True):
        for repeat in tqdm(range(args.repeats + 1), desc="training steps" if training else "forward passes"):
            for variant, model in models.items():
                model.train(training)
                with autocast(device, args.precision):
                    if not training and not repeat:
                        one_pass(model, video, False)  # the text, once per class set
                    began = time.perf_counter()
                    one_pass(model, video, training)
                if repeat:  # the first is a warm-up
                    seconds[variant, training].append(time.perf_counter() - began)
    print(f"{args.clip or 'ViT-B/16'}, {args.frames} frames, batch {args.batch}, {args.num_classes} classes, {args.precision}, "
          f"{torch.cuda.get_device_name() if device.type == 'cuda' else f'CPU, {torch.get_num_threads()} threads'}; "
          f"medians of {args.repeats} (smallest to largest)")
    print(f"{'':22}{'parameters':>12}{'G per video':>13}{'G per class set':>17}{'videos/s':>10}{'forward ratio':>22}"
          f"{'training ratio':>22}{'training GB':>13}{'ratio':>7}")
    base, memory = next(iter(models)), {}
    for variant, model in models.items():
        results = spawn.SimpleQueue()
        child = spawn.Process(target=peak_memory, args=(variant, args, True, results))
        child.start()
        child.join()
        memory[variant] = results.get()
        ratios = {training: np.array(seconds[variant, training]) / seconds[base, training] for training in (False, True)}
        counted = sum(p.numel() for name, p in model.named_parameters() if "token_embedding" not in name) / 1e6
        print(f"{variant:22}{counted:10.1f} M{costs[variant][0]:13.1f}{costs[variant][1]:17.1f}"
              f"{args.batch / np.median(seconds[variant, False]):10.2f}" + "".join(
                  f"{np.median(r):9.3f} ({r.min():.2f}-{r.max():.2f})" for r in ratios.values())
              + f"{memory[variant]:13.2f}{memory[variant] / memory[base]:7.2f}")
    return 0


# ---- the command line ------------------------------------------------------------------------------------------------

def run_command(main, parse):
    """Exit status of a script: 2 and one line for wrong use or missing input, 130 where it was interrupted."""
    try:
        return main(parse())
    except (ValueError, OSError) as error:
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
    tests = data.load_tests(args.zeroshot, root)
    model, recipe = chosen_model(args, root / "clip.pt" if args.zeroshot == "shapes" else "ViT-B/16")
    results = {}
    for name, videos in tests.items():
        model.set_classes(videos.classes)
        videos = data.TestVideos(videos, views(recipe, model))
        results[name] = scores(*predict(model, videos, workers=args.workers, title=name), videos.videos)
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


def look(args):
    """The most probable classes of each video, and a picture of what the model saw."""
    source = Path(args.classes)
    names = source.read_text("utf-8").splitlines() if source.is_file() else args.classes.split(",")
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise ValueError(f"--classes {args.classes!r}: give names with commas between them, or a file with one per line")
    model, recipe = chosen_model(args, "ViT-B/16")
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
        if args.picture:
            if not isinstance(model, TCCLIP) or len(args.video) > 1:
                raise ValueError("--picture draws one video's context tokens: it needs a TC-CLIP --checkpoint")
            draw_context(model, clip[0], [names[i] for i in order[:5]], p[:5].tolist(), args.picture, seen.pixels)
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
    parser.add_argument("--batch", type=int, default=2, help="videos per pass in the benchmark; default %(default)s")
    parser.add_argument("--num-classes", type=int, default=400, help="classes in the benchmark; default %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="passes per median in the benchmark; default %(default)s")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="default %(default)s")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count()), help="loader processes; default %(default)s")
    args = parser.parse_args(arguments)
    if args.video and not args.classes:
        parser.error("--video needs --classes, such as --classes \"juggling, running\"")
    return args


def main(args):
    return (zeroshot if args.zeroshot else look if args.video else check if args.check else benchmark)(args)


if __name__ == "__main__":
    sys.exit(run_command(main, parse_args))
