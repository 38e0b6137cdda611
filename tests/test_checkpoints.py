"""Checkpoints: the formats that people have, against figures; what is refused, and hostile files."""

import argparse
import errno
import hashlib
import http.server
import io
import json
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import threading
import types
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from figures import make_files, weights
from helpers import MERGES, save_clip, tiny_clip
from torch import nn

import clip_vit
import eval as evaluation
import train
from clip_vit import cached, clip_facts, load_clip, read_checkpoint
from ila import ILA, ILAConfig, released_clip
from video_prompt import TCCLIP, TCConfig

ROOT = Path(__file__).resolve().parents[1]
FIGURES = Path(__file__).parent / "figures"


def made(name, folder, dtype="float64", only=None):
    """A fixture: its files written into a folder, its JSON and its arrays."""
    make_files.make(FIGURES / f"{name}.json", folder, dtype, only)
    return json.loads((FIGURES / f"{name}.json").read_text()), np.load(FIGURES / f"{name}.npz")


def refused(call, *words, most=300):
    """A call ends in a ValueError whose one short line holds all words."""
    with pytest.raises(ValueError) as caught:
        call()
    line = str(caught.value)
    assert all(word in line for word in words), line
    assert len(line) <= most and "\n" not in line, line
    return line


# ---- formats of CLIP -----------------------------------------------------------------------------

CLIP_FILES = [(f"hf_clip_{kind}", path) for kind in ("quick", "gelu")
              for path in ("hub", "hub/model.safetensors", "old", "old/pytorch_model.bin")]
CLIP_FILES += [(f"openclip_{kind}", path) for kind in ("quick", "gelu", "h80")
               for path in ("hub", "bin", "bin/open_clip_pytorch_model.bin", "train/epoch_3.pt")]


def features(clip, notes, figures):
    """What a CLIP computes of a fixture, under the names of its arrays."""
    video = notes["video"]
    images = torch.from_numpy(weights.video(1 * video["batch"], 1, video["size"])[:, 0])
    images = images.to(clip.logit_scale.dtype)
    image, text = clip.encode_image(images), clip.encode_text(torch.from_numpy(figures["tokens"]))
    kind = "embeds" if "image_embeds" in figures else "features"
    return {f"image_{kind}": image, f"text_{kind}": text,
            "logits_per_image": clip_vit.cosine_logits(image, text, clip.logit_scale)}


@torch.no_grad()
@pytest.mark.parametrize("name, path", CLIP_FILES)
def test_files_of_other_libraries_give_their_figures(name, path, tmp_path):
    notes, figures = made(name, tmp_path)
    told = {"activation": "quick_gelu" if name.endswith("quick") else "gelu",
            "head_width": 80 if name.endswith("h80") else None}
    clip = load_clip(tmp_path / path, **told if path.startswith("train") else {})
    for key, found in features(clip, notes, figures).items():
        np.testing.assert_allclose(found.numpy(), figures[key], rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name, path", [("hf_clip_gelu", "hub"), ("openclip_h80", "hub"), ("openclip_quick", "bin")])
def test_files_of_less_precision_are_run_in_float32(name, path, dtype, tmp_path):
    notes, figures = made(name, tmp_path, dtype)
    clip = load_clip(tmp_path / path)
    assert {value.dtype for value in clip.state_dict().values()} == {torch.float32}
    tolerance = notes["tolerance"][f"{dtype} file, computed in float32 by the library"]
    for key, found in features(clip, notes, figures).items():
        assert np.abs(found.numpy() - figures[key]).max() <= 2 * tolerance[key]


@torch.no_grad()
def test_sizes_heads_and_widths_of_the_mlp_are_derived(tmp_path):
    """Heads of 48 and 40 and MLPs of 3 D, in Hugging Face's layout, against blocks built by hand."""
    shapes = dict(embed=56, resolution=48, patch=12, vision_width=144, vision_layers=2, text_length=20,
                  vocabulary=514, text_width=120, text_layers=1, vision_mlp_width=432, text_mlp_width=360)
    clip = clip_vit.CLIP(**shapes, activation="gelu", head_width=48, text_head_width=40)
    state = {k: torch.from_numpy(weights.tensor(k, v.shape)) for k, v in clip.state_dict().items()}
    clip.double().load_state_dict(state)
    theirs = {}
    for key, value in state.items():
        theirs |= hugging_face_key(key, value)
    config = {"vision_config": {"hidden_act": "gelu", "num_attention_heads": 3},
              "text_config": {"hidden_act": "gelu", "num_attention_heads": 3}}
    torch.save(theirs, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded, images = load_clip(tmp_path), torch.randn(2, 3, 48, 48, dtype=torch.float64)
    assert torch.equal(loaded.encode_image(images), clip.encode_image(images))
    tokens = clip.tokenize(["red", "to blue"])
    torch.testing.assert_close(loaded.encode_text(tokens), clip.encode_text(tokens), rtol=0, atol=1e-12)
    assert clip_facts(loaded) == {"activation": "gelu", "head_width": 48, "text_head_width": 40}


def hugging_face_key(key, value):
    """One tensor of OpenAI's layout in Hugging Face's, written down independently of the reader."""
    plain = {"logit_scale": "logit_scale", "positional_embedding": "text_model.embeddings.position_embedding.weight",
             "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
             "visual.class_embedding": "vision_model.embeddings.class_embedding",
             "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
             "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight"}
    if key in plain:
        return {plain[key]: value}
    if key in ("visual.proj", "text_projection"):
        return {"visual_projection.weight" if key == "visual.proj" else "text_projection.weight": value.T}
    tower, rest = ("vision_model", key[7:]) if key.startswith("visual.") else ("text_model", key)
    for ours, theirs in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm"), ("ln_final", "final_layer_norm"),
                         ("transformer.resblocks", "encoder.layers"), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"),
                         ("attn.out", "self_attn.out"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")):
        rest = rest.replace(ours, theirs)
    if "attn.in_proj_" not in rest:
        return {f"{tower}.{rest}": value}
    parts = value.chunk(3)
    return {f"{tower}." + rest.replace("attn.in_proj_", f"self_attn.{part}_proj."): value
            for part, value in zip("qkv", parts)}


def test_a_file_that_tells_no_activation_asks_for_it(tmp_path):
    made("openclip_h80", tmp_path)
    (tmp_path / "bin" / "open_clip_config.json").unlink()
    for path in ("bin", "train/epoch_3.pt", "bin/open_clip_pytorch_model.bin"):
        refused(lambda: load_clip(tmp_path / path), "activation=gelu", "activation=quick_gelu")
        refused(lambda: load_clip(tmp_path / path, activation="gelu"), "head_width", "320")
    refused(lambda: load_clip(tmp_path / "bin", activation="relu", head_width=80), "'relu'")
    assert load_clip(tmp_path / "bin", activation="gelu", head_width=80).visual.embed == 96
    made("hf_clip_gelu", tmp_path)
    (tmp_path / "hub" / "config.json").unlink()
    refused(lambda: load_clip(tmp_path / "hub"), "activation", "config.json")


def test_wide_towers_need_their_head_width(tmp_path):
    state = tiny_clip(vision_width=1280, vision_layers=1).state_dict()
    refused(lambda: load_clip(state), "head_width", "1280")
    torch.save(state, tmp_path / "vith.pt")
    refused(lambda: load_clip(tmp_path / "vith.pt"), "head_width")
    assert load_clip(tmp_path / "vith.pt", head_width=80).visual.transformer.resblocks[0].attn.heads == 16


@pytest.mark.parametrize("file, change, words", [
    ("hf_clip_gelu/hub/config.json", lambda c: c.update(model_type="siglip"), ["siglip"]),
    ("hf_clip_gelu/hub/config.json", lambda c: c["vision_config"].update(hidden_act="relu"), ["differ"]),
    ("hf_clip_gelu/hub/config.json", lambda c: c["text_config"].update(layer_norm_eps=1e-6), ["layer_norm_eps"]),
    ("hf_clip_gelu/hub/config.json", lambda c: c["text_config"].update(num_attention_heads=5), ["head width"]),
    ("hf_clip_gelu/hub/config.json", lambda c: c["vision_config"].update(num_attention_heads=0), ["config"]),
    ("hf_clip_gelu/hub/config.json", lambda c: c.update(text_config=3), ["config"]),
    ("openclip_gelu/hub/open_clip_config.json", lambda c: c["model_cfg"]["vision_cfg"].update(pool_type="avg"), ["pool_type"]),
    ("openclip_gelu/hub/open_clip_config.json", lambda c: c["model_cfg"]["text_cfg"].update(no_causal_mask=True), ["no_causal_mask"]),
    ("openclip_gelu/hub/open_clip_config.json", lambda c: c["model_cfg"]["vision_cfg"].update(head_width=-8), ["head_width"]),
    ("openclip_gelu/hub/open_clip_config.json", lambda c: c["model_cfg"]["vision_cfg"].update(head_width="64"), ["head_width"]),
    ("openclip_gelu/hub/open_clip_config.json", lambda c: c.pop("model_cfg"), ["config"])])
def test_configs_that_make_other_towers_are_refused(file, change, words, tmp_path):
    made(file.split("/")[0], tmp_path)
    path = tmp_path / file.split("/", 1)[1]
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    refused(lambda: load_clip(path.parent), *words)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\x00", '{"a":' * 100_000])
def test_broken_configs_are_refused(text, tmp_path):
    for name, config in (("hf_clip_gelu", "config.json"), ("openclip_gelu", "open_clip_config.json")):
        made(name, tmp_path)
        (tmp_path / "hub" / config).write_text(text)
        refused(lambda: load_clip(tmp_path / "hub" / ("model.safetensors" if name[0] == "h" else "open_clip_model.safetensors")),
                config)


REFUSED = [  # a key that a format has beside those of a CLIP, and its name
    ("visual.transformer.resblocks.0.message_attn.in_proj_weight", "X-CLIP"),
    ("vision_model.encoder.layers.0.message_fc.weight", "X-CLIP"),
    ("raw_model.visual.proj", "FROSTER"), ("model.visual.proj", "Open-VCLIP"),
    ("fusion_model.transformer.resblocks.0.ln_1.weight", "Text4Vis"),
    ("fusion_model.transformer.resblocks.0.mlp.experts.0.c_fc.weight", "MoTE"),
    ("decoder.decoder_layers.0.attn.q_proj.weight", "EVL"),
    ("visual.transformer.resblocks.0.MLP_Adapter.D_fc1.weight", "AIM"), ("logit_bias", "SigLIP"),
    ("image_encoder.transformer.resblocks.1.VPT_shallow", "prompted ViFi-CLIP"),
    ("visual.layer1.0.conv1.weight", "ResNet"), ("text.transformer.resblocks.0.ln_1.weight", "open_clip"),
    ("model.blocks.0.temporal_attn.qkv.weight", "TimeSformer")]


@pytest.mark.parametrize("key, title", REFUSED)
@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"model_state": {f"module.{k}": v for k, v in state.items()}}])
def test_other_models_are_named(key, title, wrap, tmp_path):
    torch.save(wrap(tiny_clip().state_dict() | {key: torch.zeros(1)}), tmp_path / "other.pth")
    video_model = title in evaluation.RELEASED  # no CLIP, but --checkpoint takes it
    for load in (load_clip,) if video_model else (load_clip, evaluation.load_model):
        refused(lambda: load(tmp_path / "other.pth"), "other.pth: ", title)


def test_actionclip_is_named(tmp_path):
    state = tiny_clip().state_dict()
    torch.save({"epoch": 3, "model_state_dict": state, "fusion_model_state_dict": {"a": torch.zeros(1)}}, tmp_path / "a.pt")
    refused(lambda: evaluation.load_model(tmp_path / "a.pt"), "ActionCLIP")


# ---- released video models -----------------------------------------------------------------------

def logits_of(model, notes, names=None):
    video = notes["video"]
    model.set_classes(names or notes["config"]["classes"])
    with torch.no_grad():
        return model(torch.from_numpy(weights.video(video["batch"], video["frames"], video["size"])))[0].numpy()


def test_released_vifi_clip_is_frame_pooling(tmp_path):
    notes, figures = made("vifi", tmp_path)
    model, recipe = evaluation.load_model(tmp_path / "best.pth", tmp_path / "clip.pt")
    assert recipe["method"] == "vifi" and recipe["pixels"] == "imagenet"
    np.testing.assert_allclose(logits_of(model, notes), figures["logits_split"], rtol=0, atol=1e-10)
    vanilla, recipe = evaluation.load_model(tmp_path / "clip.pt", activation="quick_gelu")
    assert recipe["pixels"] == "clip"
    np.testing.assert_allclose(
        logits_of(vanilla, notes, ["a"]).shape, (2, 1))
    refused(lambda: load_clip(tmp_path / "best.pth"), "ViFi-CLIP", "--checkpoint")
    save_clip(tmp_path / "other.pt")
    refused(lambda: evaluation.load_model(tmp_path / "best.pth", tmp_path / "other.pt"), "--clip")
    prompted = torch.load(tmp_path / "clip.pt") | {k: torch.zeros(v) for k, v in notes["prompted_only_keys"].items()}
    torch.save({"model": {f"module.{k}": v for k, v in prompted.items()}}, tmp_path / "prompted.pth")
    refused(lambda: evaluation.load_model(tmp_path / "prompted.pth", tmp_path / "clip.pt"), "prompted ViFi-CLIP")


@pytest.mark.parametrize("file", ["best.pth", "bare.pth"])
def test_released_ila_needs_no_other_file(file, tmp_path, monkeypatch):
    notes, figures = made("ila_tiny", tmp_path)
    monkeypatch.setattr(clip_vit, "cached", None)
    model, recipe = evaluation.load_model(tmp_path / file)
    assert recipe["frames"] == 4 and recipe["sampling"] == "tsn" and recipe["model"]["form"] == "released"
    np.testing.assert_allclose(logits_of(model, notes), figures["logits"], rtol=0, atol=1e-9)


def ssv2_state(classes):
    """A released ILA for SSv2 of small size: the keys of the other one without text, other convolutions, a head."""
    clip = load_clip({k: v for k, v in tiny_clip(resolution=64, patch=16).state_dict().items() if k.startswith("visual.")})
    model = ILA(clip, ILAConfig(frames=4, form="released-ssv2", num_classes=classes))
    state = {}
    for key, value in model.state_dict().items():
        parts = key.split(".")
        if parts[0] == "aligners":
            rest = ".".join(parts[2:])
            middle = "" if rest.startswith(("message_", "temporal_")) else "message_attn."
            key = f"clip.visual.transformer.resblocks.{parts[1]}.{middle}{rest}"
        for ours, theirs in (("frame_positions", "clip.mit.positional_embedding"), ("head.", "clip.mit.classify_head."),
                             ("integration.", "clip.mit.resblocks.0.")):
            key = theirs + key.removeprefix(ours) if key.startswith(ours) else key
        state[key] = value
    del state["delta"]
    return model.eval(), {f"module.{key.removeprefix('clip.')}": value for key, value in state.items()}


def test_released_ila_for_ssv2_brings_its_vision_tower(tmp_path, monkeypatch):
    expected, state = ssv2_state(10)
    torch.save({"model": state, "epoch": 3}, tmp_path / "ssv2.pth")
    monkeypatch.setattr(clip_vit, "cached", None)
    model, recipe = evaluation.load_model(tmp_path / "ssv2.pth")
    assert recipe["sampling"] == "uniform" and recipe["model"] == {"form": "released-ssv2", "num_classes": 10}
    video = torch.randn(1, 4, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(video)[0], expected(video)[0])


def test_real_ila_files_have_the_keys_that_are_read():
    layouts = json.loads((FIGURES / "ila_layouts.json").read_text())
    for name, arch in layouts["archs"].items():
        shapes = weights.openai_shapes(name)
        state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        sizes = clip_vit.sizes_of(state)
        image, patch, width, layers, text_width, text_layers, embed = weights.ARCHS[name]
        assert (sizes["resolution"], sizes["patch"], sizes["vision_width"]) == (image, patch, width)
        assert (sizes["text_width"], sizes["text_layers"], sizes["embed"]) == (text_width, text_layers, embed)
        more = [key.format(i=3) for key in arch["more"]]
        assert released_clip(dict.fromkeys([*shapes, *more], torch.zeros(()))).keys() == shapes.keys()
        with torch.device("meta"):
            tower = clip_vit.CLIP(**sizes).visual
        assert evaluation.openai_name(tower) == name


# ---- what lies beside the weights ----------------------------------------------------------------

class Config(dict):
    """Stands for config objects of other projects: an object of a class that is not to be imported."""


@pytest.fixture
def beside(monkeypatch):
    """All sorts of objects that training programs save beside the weights."""
    config = Config(a=[1, 2])
    config.child = Config(b=np.float64(3))
    settings = {"config": make_files.yacs_config({"MODEL": {"ARCH": "ViT-B/16"}}), "other": config, "epoch": 4,
                "args": argparse.Namespace(lr=1e-3, names={"a", "b"}), "best": np.float32(0.5), "scores": np.arange(3),
                "set": {1, 2}, "frozen": frozenset("ab"), "path": pathlib.PurePosixPath("a/b"), "shape": torch.Size([1, 2]),
                "simple": types.SimpleNamespace(a=1), "counts": defaultdict(list, a=[1]), "device": torch.device("cpu"),
                "dtype": torch.float32, "complex": 1 + 2j, "slice": slice(1, 2), "none": None, "bytes": b"ab",
                "long": 10**30, ("a", 1): "a key that is a tuple"}
    linear = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(linear.parameters())
    linear(torch.ones(2)).sum().backward()
    optimizer.step()
    return settings | {"optimizer": optimizer.state_dict(), "random": torch.get_rng_state(),
                       "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9).state_dict()}


@pytest.mark.parametrize("options", [{}, {"pickle_protocol": 4}, {"pickle_protocol": 5}, {"_use_new_zipfile_serialization": False}])
def test_objects_beside_the_weights_are_inert(beside, options, tmp_path, monkeypatch):
    state = tiny_clip().state_dict()
    torch.save({"model": state} | beside, tmp_path / "released.pt", **options)
    monkeypatch.delattr("test_checkpoints.Config")  # not importable where the file is read
    monkeypatch.delitem(sys.modules, "yacs.config")
    content = read_checkpoint(tmp_path / "released.pt")
    assert content["epoch"] == 4 and all(torch.equal(content["model"][k], v) for k, v in state.items())
    assert content["config"].name == "yacs.config.CfgNode" and content["other"].name.endswith("Config")
    assert sorted(content["set"]) == [1, 2] and sorted(content["frozen"]) == ["a", "b"]
    assert content["long"] == 10**30 and content["none"] is None
    for key, value in beside["optimizer"]["state"][0].items():
        assert torch.equal(content["optimizer"]["state"][0][key], value)
    assert content["lr_scheduler"]["gamma"] == 0.9 and torch.equal(content["random"], beside["random"])
    loaded = load_clip(tmp_path / "released.pt")
    assert torch.equal(loaded.text_projection, state["text_projection"])


WRAPS = [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s}, lambda s: {"model_state": s, "epoch": 1},
         lambda s: {"model_state_dict": s, "optimizer_state_dict": {"state": {}}}, lambda s: {"model": {"state_dict": s}},
         lambda s: {"state_dict": {"model": {"module": s}}}, lambda s: {"net": s}, lambda s: {"checkpoint": {"model_state": s}},
         lambda s: {"model": {f"module.{k}": v for k, v in s.items()}}, lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
         lambda s: OrderedDict((f"module.module.{k}", v) for k, v in s.items())]


@pytest.mark.parametrize("wrap", range(len(WRAPS)))
def test_whatever_is_wrapped_around_the_weights(wrap, tmp_path):
    state = tiny_clip().state_dict()
    torch.save(WRAPS[wrap](state), tmp_path / "wrapped.pt")
    for loaded in (load_clip(tmp_path / "wrapped.pt"), load_clip(WRAPS[wrap](state)),
                   evaluation.load_model(tmp_path / "wrapped.pt")[0].clip):
        assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
