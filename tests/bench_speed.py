"""Speed, cost and memory of the methods, side by side in one process: forward passes or training steps.

    python tests/bench_speed.py --clip ViT-B/16
    python tests/bench_speed.py --train --frames 8 --batch 1 --num-classes 51 --repeats 3

The weights are random unless --clip names a file. Every row is compared with frame pooling.
"""

import multiprocessing
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data  # noqa: E402
from clip_vit import CLIP, load_clip  # noqa: E402
from eval import Parser, autocast, build_model, check_flags, run_command  # noqa: E402

ARCHITECTURES = {  # what CLIP(...) needs, for random weights: no download; see clip_vit.sizes_of
    name: dict(resolution=side, patch=patch, vision_width=width, vision_layers=layers, text_width=text, text_layers=12,
               embed=text, text_length=77, vocabulary=514)
    for name, side, patch, width, layers, text in (
        ("ViT-B/32", 224, 32, 768, 12, 512), ("ViT-B/16", 224, 16, 768, 12, 512), ("ViT-L/14", 224, 14, 1024, 24, 768),
        ("ViT-L/14@336px", 336, 14, 1024, 24, 768))}
VARIANTS = {"frame pooling": ("vifi", {}), "TC-CLIP": ("tc", {}), "ILA": ("ila", {}),
            "TC-CLIP, lightweight": ("tc", {"reference_blocks": ()})}  # the last third; see benchmark_model
PAPER_COSTS = {  # [paper] (variant, backbone, frames): G multiply-adds per video, with one class of text
    ("frame pooling", "ViT-B/16", 16): 285, ("TC-CLIP", "ViT-B/16", 16): 304,
    ("TC-CLIP, lightweight", "ViT-B/16", 16): 291, ("ILA", "ViT-B/32", 8): 40, ("ILA", "ViT-B/32", 16): 75,
    ("ILA", "ViT-B/16", 8): 149, ("ILA", "ViT-B/16", 16): 295, ("ILA", "ViT-L/14", 8): 673,
    ("ILA", "ViT-L/14@336px", 16): 3130}


def benchmark_model(variant, args, device):
    """A method around random weights of the architecture, with 14-token prompts, Kinetics' longest, for its classes."""
    method, settings = VARIANTS[variant]
    torch.manual_seed(0)
    if args.clip not in ARCHITECTURES:
        clip = load_clip(args.clip, args.merges)
    else:
        clip = CLIP(**ARCHITECTURES[args.clip])
        for name, p in clip.named_parameters():
            if p.dim() != 1 or "embedding" in name:
                nn.init.normal_(p, std=0.02)
    settings = settings | ({} if method == "ila" else {"prompt": "a pic"})
    if "reference_blocks" in settings:
        settings["reference_blocks"] = tuple(range(-(len(clip.visual.transformer.resblocks) // 3), 0))
    model = build_model({"method": method, "frames": args.frames, "model": settings}, clip).to(device)
    model.set_classes([f"{i:07d}" for i in range(args.num_classes)])  # bytes: start + 4 + 7 + "." + end = 14
    return model


def count_multiply_adds(model, video):
    """(per video, once per class set) in G: half the FLOPs of a forward pass. The math kernel, as the fused one hides."""
    counts = []
    model.eval()
    for _ in range(2):  # the first forward also computes what is the same for all videos
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            model(video[:1])
        counts.append(counter.get_total_flops() / 2e9)
    return counts[1], counts[0] - counts[1]


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


def peak_memory(variant, args):
    """The highest memory of one pass, in GB; to be run in a process of its own."""
    device = data.start_processes(args.device)
    model = benchmark_model(variant, args, device)
    side = model.clip.visual.resolution
    one_pass(model, torch.randn(args.batch, args.frames, 3, side, side, device=device), args)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    # Linux's high-water mark of this process; ru_maxrss would start at its parent's
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1e6


def memory_of(variant, args):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
        try:
            return child.submit(peak_memory, variant, args).result()
        except RuntimeError as error:  # it was killed, or says itself that memory is out
            raise ValueError(f"{variant}: measuring its memory failed; if it was too little, lower --batch") from error


def main(args):
    """The methods side by side in one run: parameters, multiply-adds, time and memory, each against frame pooling."""
    device = data.start_processes(args.device)
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
    print(f"{args.clip}, {'training step' if args.train else 'forward'}, {args.frames} frames, batch {args.batch}, "
          f"{args.num_classes} classes, {args.precision}, {processor}; medians of {args.repeats} "
          "(smallest to largest ratio)")
    print(f"{'':22}{'parameters':>11}{'trained':>9}{'G per video':>13}{'paper G':>9}{'G per class set':>17}"
          f"{'videos/s':>10}{'time ratio':>20}{'peak GB':>9}{'ratio':>7}")
    for name, model in models.items():
        ratios = seconds[name] / seconds[base]
        count, trained = (sum(p.numel() for key, p in model.named_parameters() if "token_embedding" not in key
                              and (p.requires_grad or every)) / 1e6 for every in (True, False))
        print(f"{name:22}{count:9.1f} M{trained:7.1f} M{costs[name][0]:13.1f}"
              f"{PAPER_COSTS.get((name, args.clip, args.frames), ''):>9}{costs[name][1]:17.1f}"
              f"{args.batch / np.median(seconds[name]):10.2f}"
              f"{np.median(ratios):8.3f} ({ratios.min():.2f}-{ratios.max():.2f})"
              f"{memory[name]:9.2f}{memory[name] / memory[base]:7.2f}")
    print("G: multiply-adds. The paper's include one class of text, and rows that are not computed here.")
    return 0


def parse_args(arguments=None):
    parser = Parser(prog="bench_speed.py", description=__doc__)
    flag = parser.add_argument
    flag("--clip", metavar="NAME", default="ViT-B/16", help="OpenAI's name, for random weights of its sizes, or a file; "
         "default %(default)s")
    flag("--merges", metavar="FILE", help="CLIP's BPE merges; default: the cache folder's")
    flag("--frames", type=int, default=16, help="per video; default %(default)s")
    flag("--batch", type=int, default=2, help="videos per pass; default %(default)s")
    flag("--num-classes", type=int, default=400, help="default %(default)s")
    flag("--repeats", type=int, default=5, help="passes per median; default %(default)s")
    flag("--train", action="store_true", help="time training steps; default: forward passes")
    flag("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="default %(default)s")
    flag("--device", choices=("cuda", "cpu"), help="default: a GPU if there is one")
    args = check_flags(parser, parser.parse_args(arguments))
    for name in ("frames", "batch", "num_classes", "repeats"):
        if not 1 <= getattr(args, name) <= 10**6:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must lie between 1 and 1000000")
    return args


if __name__ == "__main__":
    sys.exit(run_command(main, parse_args))
