"""Speed, cost and memory of the methods, side by side in one process: forward passes or training steps.

    python tests/bench_speed.py --clip ViT-B/16
    python tests/bench_speed.py --train --frames 8 --batch 1 --num-classes 51 --repeats 3
    python tests/bench_speed.py --published --batch 1 --repeats 3
    python tests/bench_speed.py --parts

The weights are random unless --clip names a file. Every row is compared with frame pooling. With
--published there is one more row: TC-CLIP as the published code computes it, the text tower once per
video and every row of every block (tests/plain.py). With --parts it prints where the time of a
forward pass of frame pooling and of TC-CLIP goes instead. As in an evaluation, forward passes
compute the text of the classes once, in the warm-up.
"""

import multiprocessing
import re
import resource
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import plain  # noqa: E402

import data  # noqa: E402
import temporal_context  # noqa: E402
from clip_vit import CLIP, load_clip  # noqa: E402
from eval import Parser, autocast, build_model, check_flags, run_command  # noqa: E402


def architecture(resolution, patch, vision_width, vision_layers, text_width):
    """What CLIP(...) takes, for random weights and the vocabulary of bytes: no download."""
    return {"resolution": resolution, "patch": patch, "vision_width": vision_width,
            "vision_layers": vision_layers, "text_width": text_width, "text_layers": 12,
            "embed": text_width, "text_length": 77, "vocabulary": 514}


ARCHITECTURES = {"ViT-B/32": architecture(224, 32, 768, 12, 512),
                 "ViT-B/16": architecture(224, 16, 768, 12, 512),
                 "ViT-L/14": architecture(224, 14, 1024, 24, 768),
                 "ViT-L/14@336px": architecture(336, 14, 1024, 24, 768)}


class Variant(NamedTuple):
    """A row of the table: a method with settings of its own."""

    method: str
    light: bool = False  # only the last third of the blocks looks at the context
    published: bool = False  # computed by tests/plain.py


VARIANTS = {"frame pooling": Variant("vifi"), "TC-CLIP": Variant("tc"), "ILA": Variant("ila"),
            "TC-CLIP, lightweight": Variant("tc", light=True),
            "TC-CLIP as published": Variant("tc", published=True)}
PAPER_COSTS = {  # [paper] (variant, backbone, frames): G multiply-adds per video with one class of text
    ("frame pooling", "ViT-B/16", 16): 285, ("TC-CLIP", "ViT-B/16", 16): 304,
    ("TC-CLIP, lightweight", "ViT-B/16", 16): 291, ("ILA", "ViT-B/32", 8): 40,
    ("ILA", "ViT-B/32", 16): 75, ("ILA", "ViT-B/16", 8): 149, ("ILA", "ViT-B/16", 16): 295,
    ("ILA", "ViT-L/14", 8): 673, ("ILA", "ViT-L/14@336px", 16): 3130}


class Published(nn.Module):
    """TC-CLIP with the forward pass of tests/plain.py, in which nothing is shared between videos."""

    def __init__(self, model, names):
        super().__init__()
        self.model = model
        self.clip = model.clip
        self.register_buffer("tokens", plain.prompts(model, names))

    def forward(self, video):
        return plain.logits(self.model, video, self.tokens), video.new_zeros(())


def random_clip(name):
    """A CLIP of the named architecture with random weights."""
    clip = CLIP(**ARCHITECTURES[name])
    for key, parameter in clip.named_parameters():
        if parameter.dim() != 1 or "embedding" in key:
            nn.init.normal_(parameter, std=0.02)
    return clip


def benchmark_model(variant, args, device):
    """A variant's model on the device, with classes whose prompts have 14 tokens, Kinetics' longest."""
    variant = VARIANTS[variant]
    torch.manual_seed(0)
    known = args.clip in ARCHITECTURES
    clip = random_clip(args.clip) if known else load_clip(args.clip, args.merges)
    settings = {} if variant.method == "ila" else {"prompt": "a pic"}
    if variant.light:
        layers = len(clip.visual.transformer.resblocks)
        settings["reference_blocks"] = tuple(range(-(layers // 3), 0))
    recipe = {"method": variant.method, "frames": args.frames, "model": settings}
    model = build_model(recipe, clip)
    names = [f"{i:07d}" for i in range(args.num_classes)]  # start, 4 bytes, 7 digits, ".", end: 14
    model.set_classes(names)
    if variant.published:
        model = Published(model, names)
    return model.to(device).train(args.train)


def count_multiply_adds(model, video):
    """(per video, once per class set) in G: half the FLOPs of a forward pass.

    The math kernel of attention, since the counter does not see into the fused one.
    """
    counts = []
    was_training = model.training
    model.eval()
    for _ in range(2):  # only the first forward computes what is the same for all videos
        counter = FlopCounterMode(display=False)
        with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            model(video[:1])
        counts.append(counter.get_total_flops() / 2e9)
    model.train(was_training)
    return counts[1], counts[0] - counts[1]


def one_pass(model, video, args):
    """Seconds of a forward pass or, with --train, of a training step without the optimiser's part."""
    began = time.perf_counter()
    with torch.set_grad_enabled(args.train), autocast(video.device, args.precision):
        logits, aux = model(video)
    if args.train:
        labels = torch.zeros(len(video), dtype=torch.int64, device=video.device)
        (F.cross_entropy(logits.float(), labels) + aux).backward()
    model.zero_grad()
    if video.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def random_video(model, args, device):
    """A batch of noise, (B,T,3,R,R)."""
    side = model.clip.visual.resolution
    return torch.randn(args.batch, args.frames, 3, side, side, device=device)


def peak_memory(variant, args):
    """The highest memory of one pass, in GB; to be run in a process of its own."""
    device = data.start_processes(args.device)
    model = benchmark_model(variant, args, device)
    one_pass(model, random_video(model, args, device), args)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    if sys.platform == "linux":  # there ru_maxrss would start at the parent's
        return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1e6
    bytes_per_unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * bytes_per_unit / 1e9


def memory_of(variant, args):
    """peak_memory in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
        try:
            return child.submit(peak_memory, variant, args).result()
        except RuntimeError as error:  # the process was killed, or says that memory is out
            raise ValueError(f"{variant}: measuring its memory failed; if there was too little, "
                             "lower --batch") from error


def parameters(model):
    """Millions of parameters, all and those that train; the token embedding is not counted [paper]."""
    counted = [p for name, p in model.named_parameters() if "token_embedding" not in name]
    trained = [p for p in counted if p.requires_grad]
    return sum(p.numel() for p in counted) / 1e6, sum(p.numel() for p in trained) / 1e6


def print_head(args, device):
    processor = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        processor = torch.cuda.get_device_name()
    kind = "training step" if args.train else "forward"
    print(f"{args.clip}, {kind}, {args.frames} frames, batch {args.batch}, {args.num_classes} "
          f"classes, {args.precision}, {processor}; medians of {args.repeats} (smallest to largest "
          "ratio)")
    print(f"{'':22}{'parameters':>11}{'trained':>9}{'G per video':>13}{'paper G':>9}"
          f"{'G per class set':>17}{'videos/s':>10}{'time ratio':>20}{'peak GB':>9}{'ratio':>7}")


def time_all(models, video, args):
    """{variant: seconds of each pass}, the variants in turn; the first pass is a warm-up."""
    seconds = {name: [] for name in models}
    title = "training steps" if args.train else "forward passes"
    for _ in tqdm(range(args.repeats + 1), desc=title):
        for name, model in models.items():
            seconds[name].append(one_pass(model, video, args))
    return {name: np.array(taken[1:]) for name, taken in seconds.items()}


class Stopwatch(TorchFunctionMode):
    """Adds up the seconds of each of PyTorch's functions, and of the parts that only TC-CLIP has."""

    PARTS = {"merge_to": "merging", "seed_scores": "scores of the seeds", "take_rows": "taking rows"}
    NAMES = {"linear": "matrix products", "scaled_dot_product_attention": "attention",
             "cat": "joining keys and values", "layer_norm": "layer norm", "mul": "activation",
             "silu": "activation", "div_": "activation"}

    def __init__(self):
        super().__init__()
        self.seconds, self.in_part = Counter(), False

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        began = time.perf_counter()
        result = function(*arguments, **keywords or {})
        if not self.in_part:
            name = self.NAMES.get(getattr(function, "__name__", ""), "all else")
            self.seconds[name] += time.perf_counter() - began
        return result

    def timed(self, name, function):
        """The function, which now counts as a part."""
        def part(*arguments, **keywords):
            began, self.in_part = time.perf_counter(), True
            result = function(*arguments, **keywords)
            self.seconds[name] += time.perf_counter() - began
            self.in_part = False
            return result
        return part

    def measure(self, model, video, args):
        """{part: seconds} of one pass."""
        self.seconds.clear()
        with ExitStack() as stack:
            for function, name in self.PARTS.items():
                timed = self.timed(name, getattr(temporal_context, function))
                stack.enter_context(patch.object(temporal_context, function, timed))
            stack.enter_context(self)
            one_pass(model, video, args)
        return dict(self.seconds)


def print_parts(args, device):
    """Prints where the time of forward passes goes: medians of each part, in ms."""
    models = {name: benchmark_model(name, args, device) for name in ("frame pooling", "TC-CLIP")}
    video = random_video(models["frame pooling"], args, device)
    parts = {name: [] for name in models}
    for _ in tqdm(range(args.repeats + 1), desc="forward passes"):
        for name, model in models.items():
            parts[name].append(Stopwatch().measure(model, video, args))
    medians = {}  # {part: [ms of frame pooling, ms of TC-CLIP]}
    for part in sorted({part for taken in parts.values() for part in taken[1]}):
        medians[part] = [1e3 * np.median([taken.get(part, 0) for taken in parts[name][1:]])
                         for name in models]
    total = np.sum(list(medians.values()), axis=0)
    print(f"{args.clip}, forward, {args.frames} frames, batch {args.batch}, {args.precision}, CPU, "
          f"{torch.get_num_threads()} threads; ms, medians of {args.repeats}")
    print(f"{'':26}{'frame pooling':>14}{'TC-CLIP':>10}{'more':>8}{'share':>8}")
    more = {part: after - before for part, (before, after) in medians.items()}
    for part in sorted(medians, key=more.get, reverse=True) + ["all"]:
        before, after = medians.get(part, total)
        print(f"{part:26}{before:14.0f}{after:10.0f}{after - before:8.0f}"
              f"{(after - before) / total[0]:8.1%}")
    return 0


def main(args):
    """Prints parameters, multiply-adds, time and memory of each variant, against frame pooling."""
    device = data.start_processes(args.device)
    if args.parts:
        return print_parts(args, device)
    names = [name for name, variant in VARIANTS.items() if args.published or not variant.published]
    models = {name: benchmark_model(name, args, device) for name in names}
    video = random_video(models["frame pooling"], args, device)
    costs = {name: count_multiply_adds(model, video) for name, model in models.items()}
    seconds = time_all(models, video, args)
    memory = {name: memory_of(name, args) for name in models}
    print_head(args, device)
    for name, model in models.items():
        count, trained = parameters(model)
        per_video, per_class_set = costs[name]
        paper = PAPER_COSTS.get((name, args.clip, args.frames), "")
        ratios = seconds[name] / seconds["frame pooling"]
        spread = f"({ratios.min():.2f}-{ratios.max():.2f})"
        print(f"{name:22}{count:9.1f} M{trained:7.1f} M{per_video:13.1f}{paper:>9}"
              f"{per_class_set:17.1f}{args.batch / np.median(seconds[name]):10.2f}"
              f"{np.median(ratios):8.3f} {spread}{memory[name]:9.2f}"
              f"{memory[name] / memory['frame pooling']:7.2f}")
    print("G: multiply-adds. The paper's include one class of text, and rows that are not computed "
          "here.")
    return 0


def parse_args(arguments=None):
    parser = Parser(prog="bench_speed.py", description=__doc__)
    flag = parser.add_argument
    flag("--clip", metavar="NAME", default="ViT-B/16",
         help="OpenAI's name, for random weights of its sizes, or a file; default %(default)s")
    flag("--merges", metavar="FILE", help="CLIP's BPE merges; default: the cache folder's")
    flag("--frames", type=int, default=16, help="per video; default %(default)s")
    flag("--batch", type=int, default=2, help="videos per pass; default %(default)s")
    flag("--num-classes", type=int, default=400, help="default %(default)s")
    flag("--repeats", type=int, default=5, help="passes per median; default %(default)s")
    flag("--train", action="store_true", help="time training steps; default: forward passes")
    flag("--published", action="store_true",
         help="also TC-CLIP as the published code computes it; default: not")
    flag("--parts", action="store_true",
         help="where the time of a forward pass goes, on a CPU; default: not")
    flag("--precision", choices=("fp32", "bf16", "fp16"), default="fp32",
         help="default %(default)s")
    flag("--device", choices=("cuda", "cpu"), help="default: a GPU if there is one")
    args = check_flags(parser, parser.parse_args(arguments))
    for name in ("frames", "batch", "num_classes", "repeats"):
        if not 1 <= getattr(args, name) <= 10**6:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must lie between 1 and "
                         "1000000")
    if args.parts and (args.train or args.published or args.device == "cuda"):
        parser.error("--parts times forward passes on a CPU: leave out --train, --published and "
                     "--device cuda")
    args.device = "cpu" if args.parts else args.device
    return args


if __name__ == "__main__":
    sys.exit(run_command(main, parse_args))
