"""How far logits and gradients are from the released codes', in float64: `python tests/bench_exactness.py`.

The figures in tests/figures were computed by the released codes with synthetic weights, which tests/figures/weights.py
makes again. Class names need CLIP's BPE merges, in ../shared/vocab or in ~/.cache/clip.
"""
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from figures import weights  # noqa: E402
from helpers import FIGURES, MERGES  # noqa: E402
from test_ila_released import released_name  # noqa: E402
from test_tc import released_gradient, released_model  # noqa: E402

from clip_vit import FramePool, load_clip  # noqa: E402
from ila import ILA, ILAConfig, load_released  # noqa: E402


def largest(differences):
    return max(float(torch.as_tensor(difference).abs().max()) for difference in differences)


def report(title, ours, figures, gradients=None):
    """A line: the largest difference of logits; of gradients' norms and sums, relative to the norm and what it allows."""
    logits = largest([ours.detach() - torch.from_numpy(figures["logits"])])
    line = f"{title:56} logits {logits:.0e}"
    if gradients is not None:
        apart = []
        for name, norm, total in zip(*(figures[f"grad_{key}"] for key in ("names", "norms", "sums"))):
            gradient = gradients(str(name))
            if norm > 1e-10:
                apart.append([(gradient.norm() - norm) / norm, (gradient.sum() - total) / norm / gradient.numel() ** 0.5])
        line += f"   gradients {largest(apart):.0e} ({len(apart)} tensors)"
    print(line, flush=True)


def frame_pooling():
    model = FramePool(load_clip(weights.openai_state_dict("ViT-B/16"), MERGES)).eval()
    model.set_classes(weights.CLASS_NAMES)
    with torch.no_grad():
        logits, _ = model(torch.from_numpy(weights.video(2, 8, 224)))
    report("ViFi-CLIP, ViT-B/16, 8 frames", logits, np.load(FIGURES / "b_vifi_b16_t8.npz"))


def tc_clip():
    model, _ = released_model("tiny", frames=4)
    figures = np.load(FIGURES / "c_tc_tiny.npz")
    labels = json.loads((FIGURES / "c_tc_tiny.json").read_text())["labels"]
    logits, _ = model.train()(torch.from_numpy(weights.video(2, 4, 224)))
    F.cross_entropy(logits, torch.tensor(labels)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    report("TC-CLIP, 2 blocks, 4 frames, training", logits, figures, lambda name: released_gradient(name, gradients))
    model, _ = released_model("ViT-B/16", frames=8)
    with torch.no_grad():
        logits, _ = model.eval()(torch.from_numpy(weights.video(1, 8, 224)))
    report("TC-CLIP, ViT-B/16, 8 frames", logits, np.load(FIGURES / "d_tc_b16_t8.npz"))


def ila():
    layout = json.loads((FIGURES / "released_layouts.json").read_text())["ila k400 ViT-B/32 T=8"]
    layout = {key: tuple(shape) for key, shape in layout.items()} | {"mit.positional_embedding": (1, 4, 512)}
    clip = load_clip(weights.openai_state_dict("ViT-B/32"), MERGES)
    model = ILA(clip, ILAConfig(form="released", frames=4))
    load_released(model, {key: weights.tensor(key, shape) for key, shape in layout.items()})
    model.set_classes(weights.CLASS_NAMES)
    model.train().clip.requires_grad_(True).visual.requires_grad_(False)  # as the figures were made
    logits, aux = model(torch.from_numpy(weights.video(2, 4, 224)))
    (F.cross_entropy(logits, torch.tensor([1, 3])) + aux).backward()
    gradients = {released_name(name): p.grad for name, p in model.named_parameters()}
    report("ILA, released form, ViT-B/32, 4 frames, training", logits, np.load(FIGURES / "f_ila_b32_t4_train.npz"),
           gradients.get)


if __name__ == "__main__":
    if not MERGES.is_file():
        sys.exit(f"error: {MERGES} is missing: any command with CLIP, such as eval.py --video, downloads it")
    for method in (frame_pooling, tc_clip, ila):
        method()
