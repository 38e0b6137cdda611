"""ILA's released form against the figures of the public code, in float64, and the loading of its checkpoints."""

import json
import os
import re
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from figures import weights
from helpers import MERGES, need_merges, tiny_clip
from test_ila import clips, lively, toy

from clip_vit import VisionOnly, load_clip
from ila import (ILA, ILAConfig, alignment_loss, interactive_mask, load_released, released_clip,
                 released_config)

# Blocks of each tower in the comparisons. The whole models, with logits and gradients, take a minute of float64:
# WHOLE_MODELS=1 python -m pytest tests/test_ila_released.py
BLOCKS = 12 if os.environ.get("WHOLE_MODELS") else 2


def test_masks_are_the_released_ones():
    figures = np.load(Path(__file__).with_name("figures") / "ila_masks.npz")
    points, offsets = torch.from_numpy(figures["points"]), torch.from_numpy(figures["offsets"])
    for grid in (7, 14):
        nine = interactive_mask(points, grid, torch.tensor(0.2, dtype=torch.float64))  # as a product of means
        one_by_one = interactive_mask(points[:, None] + offsets, grid).mean(dim=1)
        assert np.abs(interactive_mask(points, grid).numpy() - figures[f"mask_{grid}"]).max() < 1e-12
        assert np.abs(nine.numpy() - figures[f"mean9_{grid}"]).max() < 1e-12
        assert torch.allclose(nine, one_by_one, atol=1e-12)
    loss = alignment_loss(*(torch.from_numpy(figures[k])[0] for k in ("cos_x", "cos_y")))
    assert abs(float(loss) - float(figures["cos_loss"])) < 1e-10


def released_name(ours):
    """The released key of one of our parameters' names, written out by hand: the inverse of RELEASED_NAMES."""
    ours = re.sub(r"^clip\.", "", ours)
    ours = re.sub(r"^aligners\.(\d+)\.(?=message|temporal)", r"visual.transformer.resblocks.\1.", ours)
    ours = re.sub(r"^aligners\.(\d+)\.", r"visual.transformer.resblocks.\1.message_attn.", ours)
    ours = re.sub(r"^(video_prompt\.decoder\.\d\.)(?=[qkv]_proj|proj)", r"\1cross_attn.", ours)
    for a, b in (("frame_positions", "mit.positional_embedding"), ("integration.", "mit.resblocks.0."),
                 ("head.", "mit.classify_head."), ("video_prompt.patch_norm.", "prompts_visual_ln."),
                 ("video_prompt.patch_proj", "prompts_visual_proj"), ("video_prompt.", "prompts_generator.")):
        ours = b + ours[len(a):] if ours.startswith(a) else ours
    return ours


def test_load_released_is_strict():
    source = toy(form="released")
    state = {released_name(name): tensor for name, tensor in source.state_dict().items() if name != "delta"}
    model = toy(seed=1, form="released")
    load_released(model, {"module." + name: tensor for name, tensor in state.items()})
    assert torch.equal(model(clips())[0], source(clips())[0])
    load_released(model, state)
    key = "visual.transformer.resblocks.2.message_attn.fc.weight"
    for wrong, words in (({k: v for k, v in state.items() if k != key}, "Missing.*aligners.2.fc.weight"),
                         ({k: v for k, v in state.items() if k != "ln_final.bias"}, "Missing.*clip.ln_final.bias"),
                         ({**state, "prompts_generator.gamma": torch.ones(1)}, "Unexpected.*video_prompt.gamma"),
                         ({**state, key: torch.zeros(3, 3)}, "size mismatch.*aligners.2.fc.weight")):
        with pytest.raises(ValueError, match=words):
            load_released(model, wrong)
    ssv2 = toy(form="released-ssv2", num_classes=3)
    load_released(ssv2, {released_name(name): tensor for name, tensor in ssv2.state_dict().items() if name != "delta"
                         and (not name.startswith("clip.") or name.startswith("clip.visual."))})  # no text tower


FIGURES = Path(__file__).with_name("figures")


def fixture(name):
    """A released checkpoint's description in tests/figures, its state_dict with "module.", and its figures."""
    described = json.loads((FIGURES / f"{name}.json").read_text())
    layout = described["layouts"]["ila"]
    state = {f"module.{key}": weights.tensor(key, tuple(shape)) for key, shape in layout.items()}
    return described, state, np.load(FIGURES / f"{name}.npz")


def test_kinetics_file_needs_no_other_file():
    """CLIP, its text tower included, and all settings are read off the file's own tensors."""
    described, state, want = fixture("ila_tiny")
    config = released_config(state)
    assert config == ILAConfig(frames=4, form="released")
    model = ILA(load_clip(released_clip(state)), config).eval()
    load_released(model, state)
    names = described["config"]["classes"]
    model.set_classes(names)
    video = torch.from_numpy(weights.video(2, 4, 64, "dev"))
    with torch.no_grad():
        logits, loss = model(video)
        assert (model.tokens[0].numpy() == want["tokens"]).all()
        assert np.abs(logits.numpy() - want["logits"]).max() < 1e-9
        assert abs(float(loss) - want["cosine_losses"].sum()) < 1e-9
        assert np.abs(model.encode_video(video).numpy() - want["video_features"]).max() < 1e-9
        assert np.abs(model.encode_names(names).numpy() - want["text_features"]).max() < 1e-9


def test_ssv2_file_holds_the_vision_tower_and_a_wide_head():
    source = lively(ILA(tiny_clip(torch.float64), ILAConfig(frames=4, form="released-ssv2", num_classes=7))).eval()
    state = {released_name(name): tensor for name, tensor in source.state_dict().items()
             if name != "delta" and (not name.startswith("clip.") or name.startswith("clip.visual."))}
    config = released_config(state)
    assert config == ILAConfig(frames=4, form="released-ssv2", num_classes=7)
    clip = load_clip(released_clip(state))
    assert isinstance(clip, VisionOnly)
    model = ILA(clip, config).eval()
    load_released(model, state)
    wide = source(clips())[0]
    assert torch.equal(model(clips())[0], wide) and wide.shape == (2, 7)
    with pytest.warns(UserWarning, match="7 outputs; only the first 3"):
        model.set_classes(["a", "b", "c"])
    model.set_classes(["a", "b", "c"])  # the same again: no word
    assert torch.equal(model(clips())[0], wide[:, :3])
    for names in (["a", "b"], ["a", "b", "d"], list("abcdefgh")):
        with pytest.raises(ValueError, match="class names for a linear head"):
            model.set_classes(names)
    trained = toy(num_classes=3)  # not released: a head is never cut
    with pytest.raises(ValueError, match="class names for a linear head"):
        trained.set_classes(["a", "b"])


def test_small_figures():
    """The released form at toy size. These figures are this code's own, of a day when the whole models agreed."""
    model = toy(form="released")
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and name != "delta":
                rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
                noise = torch.from_numpy(rng.standard_normal(tensor.shape))
                tensor.copy_(2 if name == "clip.logit_scale" else 1 + 0.1 * noise.abs() if tensor.dim() == 1
                             and re.search("weight|var", name) else noise / max(noise[0].numel(), 9) ** 0.5)
    video = torch.from_numpy(np.random.Generator(np.random.PCG64(0)).standard_normal((2, 4, 3, 32, 32)))
    with torch.no_grad():
        logits, aux = model(video)
    want = [[-0.8380814665176, -0.6075277434087, -0.8317897986892],
            [-0.8825343667254, -0.6365682016610, -0.8808514161541]]
    assert np.abs(logits.numpy() - want).max() < 1e-9 and abs(float(aux) - 0.864715698959) < 1e-9
    logits, aux = model.train()(video)
    (F.cross_entropy(logits, torch.tensor([0, 2])) + aux).backward()
    assert abs(aux.item() - 0.860819053507) < 1e-9
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert abs(float(norm) - 5.81753278779) < 1e-7


@pytest.fixture(scope="module")
def released():
    """build(arch, layout, config) -> our model with the figures' weights; each tower's first BLOCKS blocks."""
    need_merges()
    layouts = json.loads((FIGURES / "released_layouts.json").read_text())
    tensor = lru_cache(None)(weights.tensor)

    def build(arch, layout, config):
        def keep(shapes):
            found = {key: tuple(shape) for key, shape in shapes.items()
                     if not (depth := re.search(r"transformer\.resblocks\.(\d+)", key)) or int(depth[1]) < BLOCKS}
            if "mit.positional_embedding" in found:
                found["mit.positional_embedding"] = (1, config.frames, 512)
            return {key: tensor(key, shape) for key, shape in found.items()}
        model = ILA(load_clip(keep(weights.openai_shapes(arch)), merges=MERGES), config)
        load_released(model, keep(layouts[layout]))
        model.set_classes([str(i) for i in range(10)] if config.num_classes else weights.CLASS_NAMES)
        return model.eval()
    return build


def figures(name):
    return {key: torch.from_numpy(value) if value.dtype.kind == "f" else value
            for key, value in np.load(FIGURES / f"{name}.npz").items()}


def check_blocks(loss, points, want):
    """Alignment losses and points of the first blocks, which no later block can change."""
    assert abs(loss - want["cosine_losses"][:BLOCKS].sum()) < 1e-9
    assert (torch.stack(points).flatten(3) - want["points"][:BLOCKS]).abs().max() < 1e-10


@torch.no_grad()
def test_released_kinetics_in_evaluation(released):
    want = figures("f_ila_b32_t8")
    model, video = released("ViT-B/32", "ila k400 ViT-B/32 T=8", ILAConfig(form="released")), weights.video(1, 8, 224)
    assert (model.tokens.numpy() == want["tokens"]).all()
    check_blocks(*model.encode(torch.from_numpy(video))[1:], want)
    frames = want["frame_features"][None]  # the multi-frame head alone, from the released frame features
    pooled = (model.integration(frames + model.frame_positions) + frames).mean(dim=1)
    assert (pooled - want["video_output"]).abs().max() < 1e-10
    if BLOCKS == 12:
        assert (model(torch.from_numpy(video))[0] - want["logits"]).abs().max() < 1e-9


@torch.no_grad()
def test_released_ssv2_in_evaluation(released):
    want = figures("g_ila_ssv2_b16_t8")
    config = ILAConfig(form="released-ssv2", num_classes=10)
    model = released("ViT-B/16", "ila ssv2 ViT-B/16 T=8, 10 classes", config)
    video = torch.from_numpy(weights.video(1, 8, 224))
    check_blocks(*model.encode(video)[1:], want)
    frames = want["frame_features"][None]
    pooled = (model.integration(frames + model.frame_positions) + frames).mean(dim=1)
    assert (model.head(F.normalize(pooled, dim=-1)) - want["logits"]).abs().max() < 1e-9
    if BLOCKS == 12:
        assert (model(video)[0] - want["logits"]).abs().max() < 1e-9


def test_released_kinetics_in_training(released):
    """Batch statistics and nine points; with the whole model also loss and all gradients. There the text tower trains
    and CLIP's image tower is frozen, the reverse of the paper's recipe."""
    want = figures("f_ila_b32_t4_train")
    model = released("ViT-B/32", "ila k400 ViT-B/32 T=8", ILAConfig(form="released", frames=4)).train()
    video = torch.from_numpy(weights.video(2, 4, 224))
    if BLOCKS < 12:
        with torch.no_grad():
            return check_blocks(*model.encode(video)[1:], want)
    model.clip.requires_grad_(True).visual.requires_grad_(False)
    logits, aux = model(video)
    loss = F.cross_entropy(logits, torch.tensor([1, 3])) + aux
    loss.backward()
    assert (logits - want["logits"]).abs().max() < 1e-9 and abs(loss - want["loss"]) < 1e-9
    gradients = {released_name(name): p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == set(want["grad_names"])
    for name, norm, total in zip(want["grad_names"], want["grad_norms"], want["grad_sums"]):
        if norm < 1e-10:  # zero by mathematics: a bias before a batch norm
            assert gradients[name].norm() < 1e-10
        else:
            assert abs(gradients[name].norm() - norm) < 1e-8 * norm, name
            assert abs(gradients[name].sum() - total) < 1e-7 * norm, name
