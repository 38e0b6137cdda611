"""What scale costs on a CPU: processes, resuming, checkpoints, collectives, memory with checkpointing, compiling.

python tests/bench_scale.py [processes resume checkpoints collectives memory compile]      # default: all but compile
"""
import argparse
import contextlib
import copy
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from helpers import save_clip, tiny_clip  # noqa: E402

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import train  # noqa: E402
from clip_vit import Block, read_checkpoint  # noqa: E402

B16 = dict(resolution=224, patch=16, vision_width=768, vision_layers=12, text_width=512, text_layers=12, embed=512,
           context=77)
SETTINGS = {"tc": {"prompt": "a pic"}, "ila": {}, "vifi": {"prompt": "a pic"}}
HEADS = {  # the same tower under a linear head: EVL's decoder over it trains, or the tower itself
    "evl": {"host": "evl", "rival": "none", "num_classes": 50},
    "full fine-tuning": {"finetune": True, "rival": "none", "num_classes": 50}}


def timed(call):
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


def small_world(folder):
    data.write_shapes(folder, seed=1, shots_max=16, base_clips=1, novel_clips=1)
    save_clip(folder / "clip.pt")
    return folder


def train_words(world, out, *more):
    return ["--protocol", "fewshot", "--method", "tc", "--data", str(world), "--out", str(out), "--set", "shots=16",
            "eval_every=9", "batch=32", "micro_batch=16", *more]


def processes(folder):
    """Training steps per second on the miniature, 32 videos each, on one process and on two, of one thread each."""
    rates = []
    for count in (1, 2):
        out = folder / f"processes {count}"
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        words = [ROOT / "train.py", *train_words(folder / "world", out, "epochs=6")]
        subprocess.run([sys.executable, *torchrun, *words], check=True, capture_output=True)
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        seconds = np.diff([line["seconds"] for line in lines])  # the first epoch decodes: left out
        rates.append(lines[0]["step"] / float(np.median(seconds)))
    print(f"processes: {rates[0]:.2f} steps/s on one, {rates[1]:.2f} on two: x {rates[1] / rates[0]:.2f}", flush=True)


class Resumed(Exception):
    pass


def resume(folder):
    """Seconds from train.main to the first new step's end, imports done, of a run broken off in its second epoch."""
    step, words = train.train_step, train_words(folder / "world", folder / "resumed", "epochs=3", "save_every=3")

    def until_13(run, *rest):
        if run.progress["step"] == 13:
            raise Resumed
        return step(run, *rest)

    def once():
        with contextlib.suppress(Resumed):
            train.main(train.parse_args(words))
    train.train_step = until_13
    once()  # last.pt holds step 12: from now on it is one step
    seconds = min(timed(once)[0] for _ in range(3))
    print(f"resume, miniature: {seconds:.2f} s to the end of the first new step", flush=True)
    train.train_step = step


def checkpoints(folder):
    """Bytes and seconds of last.pt: weights and AdamW's two moments of a TC-CLIP."""
    for name, sizes in (("miniature", {}), ("ViT-B/16", B16)):
        model = evaluation.build_model({"method": "tc", "frames": 16, "model": SETTINGS["tc"]}, tiny_clip(**sizes))
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        optimizer.step()
        path = folder / "last.pt"
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        written = min(timed(lambda: train.save(path, state))[0] for _ in range(3))
        read = min(timed(lambda: read_checkpoint(path))[0] for _ in range(2))
        print(f"checkpoint, {name}: {path.stat().st_size / 1e6:.0f} MB, written in {written:.2f} s, "
              f"read in {read:.2f} s", flush=True)


def collective(rank, port):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device = data.start_processes()
    found = [(i, np.random.rand(400).astype(np.float32)) for i in range(rank, 20_000, 2)]  # as in predict
    data.gather([])
    seconds, result = timed(lambda: data.gather(found))
    flags = [timed(lambda: data.any_process(False, device))[0] for _ in range(1000)]
    if rank == 0:
        print(f"collectives, two processes: {len(result)} x 400 probabilities gathered in {seconds:.2f} s; the flag of "
              f"every step in {1e6 * np.median(flags):.0f} us", flush=True)
    dist.destroy_process_group()


def collectives(_):
    torch.multiprocessing.spawn(collective, (29_876,), nprocs=2)


def one_step(name, checkpointing, batch, results):
    """Memory in GB at most, and seconds, of forward and backward on videos of 8 frames, 50 classes, at ViT-B/16."""
    method = "ila" if name in HEADS else name
    settings = (SETTINGS | HEADS)[name]
    model = evaluation.build_model({"method": method, "frames": 8, "model": settings}, tiny_clip(**B16)).train()
    model.set_classes([f"{i:07d}" for i in range(50)])
    for block in (module for module in model.modules() if isinstance(module, Block)):
        block.checkpointing = checkpointing
    video = torch.randn(batch, 8, 3, 224, 224)
    def step():
        logits, aux = model(video)
        (logits.square().sum() + aux).backward()
        model.zero_grad()
    seconds = [timed(step)[0] for _ in range(2 if batch == 1 else 1)]
    peak = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]  # KB
    results.put((int(peak) / 1e6, min(seconds)))


def memory(_):
    context = multiprocessing.get_context("spawn")
    print("memory, ViT-B/16, 8 frames, fp32, weights and gradients included: GB at most")
    print(f"{'':22}{'1 video':>9}{'a further one':>15}{'seconds':>9}{'ratio':>7}")
    for method in (*SETTINGS, *HEADS):
        plain = None
        for checkpointing in (False,) if method in HEADS else (False, True):
            found = []
            for batch in (1, 3):
                results = context.SimpleQueue()
                child = context.Process(target=one_step, args=(method, checkpointing, batch, results))
                child.start()
                found.append(results.get())
                child.join()
            (one, seconds), (three, _) = found
            plain = plain or seconds
            print(f"{method + ', checkpointing' * checkpointing:22}{one:9.2f}{(three - one) / 2:15.2f}{seconds:9.1f}"
                  f"{seconds / plain:7.2f}", flush=True)


def compile(_):
    """torch.compile with its default code generator: one step of the miniature's size against the plain one."""
    for method in SETTINGS:
        torch.manual_seed(0)
        clip = tiny_clip(vision_layers=2, text_layers=1)
        model = evaluation.build_model({"method": method, "frames": 8, "model": SETTINGS[method]}, clip).train()
        model.set_classes(["red", "green", "blue"])
        wrapped, video = torch.compile(copy.deepcopy(model)), torch.randn(8, 8, 3, 32, 32)
        first, (logits, _) = timed(lambda: wrapped(video))
        difference = float((logits - model(video)[0]).abs().max())
        def step(module):
            (module(video)[0].square().sum()).backward()
        step(wrapped)
        plain, fast = (min(timed(lambda: step(module))[0] for _ in range(10)) for module in (model, wrapped))
        print(f"compile, {method}: {first:.0f} s at first, largest difference of a logit {difference:.1e}, a step in "
              f"{1e3 * fast:.0f} ms, plain {1e3 * plain:.0f} ms", flush=True)


BENCHMARKS = (processes, resume, checkpoints, collectives, memory, compile)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", nargs="*", default=[call.__name__ for call in BENCHMARKS[:-1]])
    chosen = parser.parse_args().which
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        small_world(Path(folder) / "world")
        for call in BENCHMARKS:
            if call.__name__ in chosen:
                call(Path(folder))
