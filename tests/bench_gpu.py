"""One page on what the models do on a GPU; started by tests/bench_gpu.sh, which says how.

Sections: exactness against the CPU; where a step's time goes; training runs (fp16 scaling, one NCCL
process, sync_bn, kill -9); speed of forward passes and training steps; text once per step; training
steps with checkpointing, in the published form, and compiled.

Every part is given the time that is left of the limit; a row for which none is left says so.
With --tiny everything is small, and the CPU stands in for the GPU: a dry run.
"""

import argparse
import contextlib
import copy
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from bench_speed import ARCHITECTURES, Published, random_clip  # noqa: E402
from helpers import tiny_clip  # noqa: E402
from torch import nn  # noqa: E402

import data  # noqa: E402
from clip_vit import Block, read_checkpoint, text_once  # noqa: E402
from eval import autocast, build_model  # noqa: E402
from token_merge import bipartite, fast_bipartite, merge_to  # noqa: E402

METHODS = {"frame pooling": "vifi", "TC-CLIP": "tc", "ILA": "ila"}
PARTS = ("exactness", "profile", "merging", "runs", "speed", "text", "variants", "compiled")
LIMIT = 340  # seconds for the whole page
BEGAN = time.monotonic()


def left():
    """Seconds left of the limit."""
    return LIMIT - (time.monotonic() - BEGAN)


def section(title):
    print(f"\n== {title} ({LIMIT - left():.0f} s after the start)", flush=True)


def synchronise():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ---- exactness -----------------------------------------------------------------------------------

def small_model(method):
    """A method around a tiny random CLIP, on the CPU in float32, with three classes."""
    torch.manual_seed(0)
    settings = {} if method == "ila" else {"prompt": "a pic"}
    if method == "tc":
        settings["context_tokens"] = 5  # below the 8 x 4 seeds, so that they are merged
    clip = tiny_clip(vision_layers=3, text_layers=2)
    model = build_model({"method": method, "frames": 8, "model": settings}, clip)
    model.set_classes(["red to blue", "blue to red", "green"])
    return model


def logits_and_gradients(model, video, precision):
    """Both as vectors on the CPU in float64: logits in eval mode, all gradients in train mode."""
    device = video.device
    with torch.no_grad(), autocast(device, precision):
        logits, _ = model.eval()(video)
    for module in model.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # statistics of a batch magnify rounding; they are compared by the tests
    with autocast(device, precision):
        trained, aux = model(video)
    labels = torch.arange(len(video), device=device) % 3
    (F.cross_entropy(trained.float(), labels) + aux).backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return logits.double().cpu().flatten(), torch.cat(gradients).double().cpu()


def exactness(device):
    """Relative differences (norm of the difference over norm) of the GPU against the CPU's float32."""
    section("logits and gradients against the CPU in float32: norm of the difference / norm")
    print(f"{'':16}{'fp32 logits':>13}{'gradients':>12}{'bf16 logits':>13}{'gradients':>12}")
    video = torch.randn(4, 8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for title, method in METHODS.items():
        model = small_model(method)
        wanted = logits_and_gradients(copy.deepcopy(model), video, "fp32")
        cells = []
        for precision in ("fp32", "bf16"):
            found = logits_and_gradients(copy.deepcopy(model).to(device), video.to(device), precision)
            for one, two in zip(found, wanted):
                cells.append(((one - two).norm() / two.norm()).item())
        fp32_logits, fp32_gradients, bf16_logits, bf16_gradients = cells
        print(f"{title:16}{fp32_logits:13.1e}{fp32_gradients:12.1e}{bf16_logits:13.1e}"
              f"{bf16_gradients:12.1e}")


# ---- speed ---------------------------------------------------------------------------------------

def full_model(method, args, classes, device):
    """A method around a random CLIP of full size (tiny in a dry run), with 14-token prompts."""
    torch.manual_seed(0)
    clip = tiny_clip(context=77) if args.tiny else random_clip("ViT-B/16")
    settings = {} if method == "ila" else {"prompt": "a pic"}
    model = build_model({"method": method, "frames": args.frames, "model": settings}, clip)
    model.set_classes([f"{i:07d}" for i in range(classes)])
    return model.to(device)


def random_video(model, batch, args, device):
    side = model.clip.visual.resolution
    return torch.randn(batch, args.frames, 3, side, side, device=device)


def step(model, video, precision, train):
    """A forward pass, or a training step without the optimiser's part."""
    with torch.set_grad_enabled(train), autocast(video.device, precision):
        logits, aux = model(video)
    if train:
        labels = torch.zeros(len(video), dtype=torch.int64, device=video.device)
        (F.cross_entropy(logits.float(), labels) + aux).backward()
        model.zero_grad(set_to_none=True)


def measure(model, video, train, repeats=5, precision="bf16"):
    """(median seconds of a pass, peak GB); the first two passes are warm-ups."""
    model.train(train)
    for _ in range(2):
        step(model, video, precision, train)
    synchronise()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        step(model, video, precision, train)
        synchronise()
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
    return float(np.median(seconds)), peak


def matmul_rate(device, tiny):
    """What this card's bf16 matrix products reach, in TFLOP/s."""
    n = 256 if tiny else 8192
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    b = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        a @ b
    synchronise()
    began = time.perf_counter()
    for _ in range(10):
        a @ b
    synchronise()
    return 10 * 2 * n**3 / (time.perf_counter() - began) / 1e12


GIGA = {"vifi": 261.6, "tc": 283.3, "ila": 292.2}  # multiply-adds a video, B/16, 16 frames (bench_speed)


def print_row(label, batch, seconds, base, peak, share):
    ratio = f"{seconds / batch / base:8.2f}" if base else f"{'':8}"
    part = f"{share:8.0%}" if share else ""
    print(f"{label:44}{batch:6}{batch / seconds:10.1f}{ratio}{peak:9.1f}{part}", flush=True)


def speed(args, device, peak_rate):
    """Videos per second of each method, as a table; ratios of time are against frame pooling."""
    section(f"videos/s, {'tiny' if args.tiny else 'ViT-B/16'}, {args.frames} frames, bf16 autocast; "
            f"share of {peak_rate:.0f} TFLOP/s, this card's own bf16 matrix product")
    print(f"{'':44}{'batch':>6}{'videos/s':>10}{'x time':>8}{'GB':>9}{'share':>8}")
    for train, classes, batches in ((False, 400, (1, 8, 32)), (True, 400, (1, 8, 32)),
                                    (True, 51, (8,))):
        bases = {}
        for title, method in METHODS.items():
            for batch in batches[:2] if args.tiny else batches:
                if left() < 110 and batch != 8:
                    continue
                model = full_model(method, args, classes, device)
                video = random_video(model, batch, args, device)
                try:
                    seconds, peak = measure(model, video, train)
                except torch.OutOfMemoryError:
                    print(f"{title}: batch {batch} does not fit")
                    continue
                base = bases.setdefault(batch, seconds / batch)
                work = GIGA[method] * 2e9 * batch * (3 if train else 1)
                kind = f"{title}, {'training step' if train else 'forward'}, {classes} classes"
                print_row(kind, batch, seconds, base, peak, work / seconds / peak_rate / 1e12)
                del model, video


def variants(args, device):
    """Rows beside the main ones: checkpointing, compiled, and the published form."""
    section("training steps at 400 classes, batch 8, in other forms (x time: of the same, eager)")
    batch = 2 if args.tiny else 8
    for title, method in METHODS.items():
        model = full_model(method, args, 400, device)
        video = random_video(model, batch, args, device)
        base, peak = measure(model, video, True)
        for block in model.modules():
            if isinstance(block, Block):
                block.checkpointing = True
        seconds, peak = measure(model, video, True)
        print_row(f"{title}, checkpointing", batch, seconds, base / batch, peak, 0)
    if left() > 60:
        model = full_model("tc", args, 400, device)
        base, _ = measure(model, random_video(model, 1, args, device), True)
        names = [f"{i:07d}" for i in range(400)]
        published = Published(model, names)
        seconds, peak = measure(published, random_video(model, 1, args, device), True)
        print_row("TC-CLIP as published (x time: of ours)", 1, seconds, base, peak, 0)


def compiled(args, device, title):
    """One method's training step under torch.compile, and how long the first steps took."""
    section(f"{title}, training step at 400 classes, compiled (x time: of the same, eager)")
    batch = 2 if args.tiny else 8
    model = full_model(METHODS[title], args, 400, device)
    video = random_video(model, batch, args, device)
    base, _ = measure(model, video, True)
    backend = "aot_eager" if args.tiny else "inductor"
    fast = torch.compile(model, backend=backend)
    began = time.perf_counter()
    step(fast, video, "bf16", True)
    synchronise()
    print(f"the first step, with compiling: {time.perf_counter() - began:.0f} s", flush=True)
    seconds, peak = measure(fast, video, True)
    print_row(f"{title}, compiled", batch, seconds, base / batch, peak, 0)
    torch.compiler.reset()


def accumulated_step(model, video, micro_batches, shared):
    """An optimiser step's gradients over equal micro-batches; the text once, or in each of them."""
    labels = torch.zeros(len(video), dtype=torch.int64, device=video.device)
    with text_once(model) if shared else contextlib.nullcontext() as text:
        for i in range(micro_batches):
            if shared:
                text.last = i + 1 == micro_batches
            with autocast(video.device, "bf16"):
                logits, aux = model(video)
            loss = F.cross_entropy(logits.float(), labels) + aux
            text.backward(loss) if shared else loss.backward()
    model.zero_grad(set_to_none=True)


def text_once_per_step(args, device):
    """Optimiser steps with the text once per step, as train.py does, and once per micro-batch."""
    videos = 8 if args.tiny else 32
    section(f"training steps of {videos} videos at 400 classes, steps/s")
    print(f"{'':32}{'micro_batch':>12}{'text once':>12}{'text in each':>14}{'ratio':>8}")
    for title in ("frame pooling", "TC-CLIP"):
        model = full_model(METHODS[title], args, 400, device).train()
        for size in (2, 8):
            video = random_video(model, size, args, device)
            medians = []
            for shared in (True, False):
                seconds = []
                for _ in range(2 if args.tiny else 4):
                    synchronise()
                    began = time.perf_counter()
                    accumulated_step(model, video, videos // size, shared)
                    synchronise()
                    seconds.append(time.perf_counter() - began)
                medians.append(float(np.median(seconds[1:])))
            once, each = medians
            print(f"{title:32}{size:12}{1 / once:12.2f}{1 / each:14.2f}{each / once:8.2f}", flush=True)


# ---- where the time goes -------------------------------------------------------------------------

def host_waits(model, video, train):
    """How often a pass makes the CPU wait for the GPU, and the first places that do."""
    step(model, video, "bf16", train)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step(model, video, "bf16", train)
        torch.cuda.set_sync_debug_mode("default")
    places = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchron" in str(w.message)]
    return places


def profile(args, device):
    """The ten kernels that take the most time in a training step of TC-CLIP, and CPU-GPU waits."""
    section("TC-CLIP, training step, 400 classes, batch 8: the kernels that take longest")
    model = full_model("tc", args, 400, device).train()
    video = random_video(model, 2 if args.tiny else 8, args, device)
    step(model, video, "bf16", True)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as found:
        step(model, video, "bf16", True)
        synchronise()
    totals = {}
    for event in found.events():
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if on_gpu or not torch.cuda.is_available():
            count, spent = totals.get(event.name, (0, 0.0))
            own = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
            totals[event.name] = count + 1, spent + own
    whole = sum(spent for _, spent in totals.values())
    for name, (count, spent) in sorted(totals.items(), key=lambda item: -item[1][1])[:10]:
        print(f"{spent / 1e3:9.2f} ms {spent / whole:6.1%} {count:6} x  {name[:80]}")
    print(f"{whole / 1e3:9.2f} ms in {sum(count for count, _ in totals.values())} kernels")
    if torch.cuda.is_available():
        for title, method in METHODS.items():
            model = full_model(method, args, 400, device).train()
            small = random_video(model, 1, args, device)
            for train in (True, False):
                places = host_waits(model.train(train), small, train)
                kind = "training step" if train else "forward"
                print(f"{title}, {kind}: {len(places)} waits of the CPU for the GPU "
                      f"{', '.join(dict.fromkeys(places[:6]))}")


def merging(args, device):
    """Milliseconds of one block's merging, and whether its CUDA graph gives bipartite's groups."""
    section("merging 16 x 58 seeds to 96 context tokens, bf16, ms (12 times a pass)")
    for batch in (1, 8):
        seeds = torch.randn(batch, 928, 768, device=device, dtype=torch.bfloat16)
        seconds = []
        for _ in range(12):
            synchronise()
            began = time.perf_counter()
            merge_to(seeds, 96, 100)
            synchronise()
            seconds.append(time.perf_counter() - began)
        plain = bipartite(seeds.float(), 96, 100)
        same = (fast_bipartite(seeds.float(), 96, 100) == plain).double().mean().item()
        again = (bipartite(seeds.float(), 96, 100) == plain).double().mean().item()
        print(f"batch {batch}: {1e3 * np.median(seconds[2:]):.2f} ms; tokens in the same group as "
              f"without the graph: {same:.2%}, without it once more: {again:.2%}")


# ---- training runs -------------------------------------------------------------------------------

def train_words(world, out, *settings, method="tc"):
    """The arguments of a small training run on the miniature world."""
    return [str(ROOT / "train.py"), "--protocol", "fewshot", "--method", method, "--data", str(world),
            "--out", str(out), "--set", "shots=4", "batch=16", "micro_batch=8", "eval_every=9",
            "save_every=2", "lr=1e-4", *settings]


def finish(words, torchrun=False):
    """Runs to the end: (exit status, the last lines of its output)."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"] if torchrun else []
    done = subprocess.run([sys.executable, *launcher, *words], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=max(10, left()))
    return done.returncode, done.stdout.strip().splitlines()[-3:]


def report(title, words, torchrun=False):
    began = time.monotonic()
    try:
        status, lines = finish(words, torchrun)
    except subprocess.TimeoutExpired:
        status, lines = "none: out of time", []
    said = "" if status == 0 else "; ".join(lines)
    print(f"{title}: status {status}, {time.monotonic() - began:.0f} s {said}", flush=True)


def kill_and_resume(world, folder):
    """A run that is killed with -9 in the middle and goes on, against one that nothing happened to."""
    settings = ("epochs=6", "precision=bf16" if torch.cuda.is_available() else "precision=fp32")
    process = subprocess.Popen([sys.executable, *train_words(world, folder / "killed", *settings)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    last = folder / "killed" / "last.pt"
    while not last.exists() and process.poll() is None and left() > 0:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not last.exists():
        print("killed with -9: there was no checkpoint yet")
        return
    step_at = read_checkpoint(last)["progress"]["step"]
    weights = {}
    for name in ("killed", "undisturbed", "again"):
        finish(train_words(world, folder / name, *settings))
        weights[name] = read_checkpoint(folder / name / "last.pt")["model"]
    print(f"largest relative difference of a tensor from an undisturbed run's: killed with -9 at step "
          f"{step_at} and resumed {difference(weights['killed'], weights['undisturbed']):.1e}, "
          f"undisturbed once more {difference(weights['again'], weights['undisturbed']):.1e}")


def difference(one, two):
    """The largest norm of a tensor's difference over the norm of that tensor."""
    return max(((one[key].double() - two[key].double()).norm() /
                two[key].double().norm().clamp(min=1e-12)).item() for key in one)


def runs(args):
    """Small training runs through train.py, each a process of its own."""
    section("training runs on the miniature world (random CLIP)")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        world = folder / "world"
        with contextlib.redirect_stderr(open(os.devnull, "w")):
            data.write_shapes(world, seed=1, shots_max=4, base_clips=1, novel_clips=1)
        torch.save(tiny_clip().state_dict(), world / "clip.pt")
        kill_and_resume(world, folder)
        if torch.cuda.is_available():
            report("fp16 with scaling", train_words(world, folder / "fp16", "epochs=1", "precision=fp16"))
            report("one NCCL process, bf16", train_words(world, folder / "nccl", "epochs=1",
                                                         "precision=bf16"), torchrun=True)
            report("ILA with sync_bn, NCCL", train_words(world, folder / "sync", "epochs=1", "lr=1e-5",
                                                         "sync_bn=true", method="ila"), torchrun=True)


def main(args):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.tiny:
        sys.exit("error: PyTorch finds no GPU here; for a dry run on the CPU give --tiny")
    args.frames = 4 if args.tiny else 16
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU (dry run)"
    print(f"{card}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}, "
          f"Python {sys.version.split()[0]}")
    parts = args.parts or PARTS
    if "exactness" in parts:
        exactness(device)
    torch.set_float32_matmul_precision("high")  # as the scripts do: TF32 for what stays float32
    if "profile" in parts:
        profile(args, device)
    if "merging" in parts and not args.tiny:
        merging(args, device)
    if "runs" in parts:
        runs(args)
    if "speed" in parts:
        speed(args, device, matmul_rate(device, args.tiny))
    if "text" in parts:
        text_once_per_step(args, device)
    if "variants" in parts:
        variants(args, device)
    if "compiled" in parts:
        for title in METHODS:
            if args.parts or left() > 60:
                compiled(args, device, title)
            else:
                print(f"{title}, compiled: no time left; give --parts compiled")
    print(f"\ndone in {LIMIT - left():.0f} s")


def parse_args(arguments=None):
    parser = argparse.ArgumentParser(prog="bench_gpu.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a dry run; the CPU may stand in")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse_args())
