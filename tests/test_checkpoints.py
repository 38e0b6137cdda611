"""Checkpoints: the formats that people have, against figures; what is refused, and hostile files."""

import argparse
import errno
import hashlib
import http.server
import io
import json
import multiprocessing
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
        file = dict.fromkeys([*shapes, *more], torch.zeros(())) | {"mit.positional_embedding": torch.zeros(1, 8, embed)}
        assert released_clip(file).keys() == shapes.keys()
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


# ---- sources -------------------------------------------------------------------------------------

class Scripted(nn.Module):
    """A module tree with OpenAI's names, to be traced into a TorchScript archive as OpenAI's files are."""

    def __init__(self, state):
        super().__init__()
        for name, value in state.items():
            module, *rest = self, *name.split(".")
            for part in rest[:-1]:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(rest[-1], nn.Parameter(value, requires_grad=False))
        self.register_buffer("input_resolution", torch.tensor(32))

    def forward(self, x):
        return x + self.input_resolution


@pytest.mark.filterwarnings("ignore")
def test_torchscript_archives_are_read_without_torchscript(tmp_path, monkeypatch):
    clip = tiny_clip(torch.float16)
    state = {name: value.half() for name, value in clip.state_dict().items()}
    torch.jit.trace(Scripted(state), torch.zeros(1)).save(str(tmp_path / "clip.pt"))
    with zipfile.ZipFile(tmp_path / "clip.pt") as whole, zipfile.ZipFile(tmp_path / "old.pt", "w") as old:
        for item in whole.infolist():  # OpenAI's files are older: no byteorder record
            if not item.filename.endswith("byteorder"):
                old.writestr(item, whole.read(item))
    monkeypatch.setattr(torch.jit, "load", None)
    for name in ("clip.pt", "old.pt"):
        read = load_clip(tmp_path / name).state_dict()
        assert read.keys() == state.keys()
        assert all(value.dtype == torch.float32 and torch.equal(value, state[key].float()) for key, value in read.items())


def test_sources_and_dtypes(tmp_path):
    clip = tiny_clip(torch.float64)
    state = clip.state_dict()
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"model": {f"clip.{k}": v for k, v in state.items()} | {"vectors": torch.zeros(2)}}, tmp_path / "ours.pt")
    torch.save({"state_dict": state}, tmp_path / "wrapped.pt")
    arrays, theirs = {k: v.numpy() for k, v in state.items()}, {}
    for key, value in state.items():
        theirs |= {k: v.numpy() for k, v in hugging_face_key(key, value).items()}
    for source in (state, arrays, theirs, tmp_path / "plain.pt", str(tmp_path / "ours.pt"), tmp_path / "wrapped.pt"):
        loaded = load_clip(source)
        assert all(torch.equal(v, state[k]) and v.dtype == torch.float64 for k, v in loaded.state_dict().items())
        assert not loaded.training
    loaded.logit_scale.data += 1  # the caller's tensors are not the model's
    assert state["logit_scale"] == 2
    half = load_clip({k: v.half() for k, v in state.items()})
    assert half.logit_scale.dtype == torch.float32


@pytest.mark.parametrize("change, words", [
    (lambda s: s.pop("ln_final.weight"), "ln_final.weight"),
    (lambda s: s.update(extra=torch.zeros(1)), "extra"),
    (lambda s: s.update({"ln_final.weight": torch.zeros(3)}), "ln_final.weight"),
    (lambda s: s.pop("visual.conv1.weight"), "visual.conv1.weight"),
    (lambda s: s.update({"visual.layer1.0.conv1.weight": torch.zeros(1)}), "ResNet"),
    (lambda s: s.update({"visual.conv1.weight": torch.zeros(100, 3, 8, 8)}), "multiples of the head width")])
def test_wrong_weights_are_named(change, words):
    state = tiny_clip().state_dict()
    change(state)
    with pytest.raises(ValueError, match=words):
        load_clip(state)


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match="ViT-B/32, ViT-B/16, ViT-L/14, ViT-L/14@336px"):
        load_clip("ViT-B/15")


def test_names_files_and_folders_are_taken_alike(tmp_path, monkeypatch):
    """An OpenAI name stands for the file in the cache folder; a folder for the weights in it."""
    save_clip(tmp_path / "best.pt")
    monkeypatch.setattr(clip_vit, "cached", lambda url, sha256: tmp_path / "best.pt")
    expected = tiny_clip().state_dict()
    for source in ("ViT-B/16", tmp_path / "best.pt", str(tmp_path), tmp_path):
        model, recipe = evaluation.load_model(source, device="cpu")
        assert recipe["method"] == "vifi" and not model.training
        assert all(torch.equal(v, expected[k]) for k, v in model.clip.state_dict().items())
        assert load_clip(source).visual.resolution == 32
    assert evaluation.load_model("ViT-B/16")[1]["clip"] == "ViT-B/16"
    (tmp_path / "empty").mkdir()
    refused(lambda: load_clip(tmp_path / "empty"), "empty: a folder without", "model.safetensors")


def test_our_own_checkpoints_keep_what_no_tensor_tells(tmp_path):
    """A CLIP of Hugging Face in GELU, wrapped in a model of ours and saved as train.py does."""
    notes, figures = made("hf_clip_gelu", tmp_path)
    clip = load_clip(tmp_path / "hub")
    recipe = train.resolve_recipe("fewshot", "vifi", "shapes")
    model = evaluation.build_model(vars(recipe), clip)
    content = {"recipe": vars(recipe), "classes": ["a"], "model": model.state_dict(), "clip": clip_facts(clip)}
    torch.save(content, tmp_path / "best.pt")
    loaded = evaluation.load_model(tmp_path / "best.pt")[0]
    for found in (loaded.clip, load_clip(tmp_path / "best.pt")):
        assert clip_facts(found) == {"activation": "gelu", "head_width": 64, "text_head_width": 64}
        for key, value in features(found, notes, figures).items():
            np.testing.assert_allclose(value.detach().numpy(), figures[key], rtol=0, atol=1e-10)
    del content["clip"]  # an older checkpoint: OpenAI's activation
    torch.save(content, tmp_path / "best.pt")
    assert clip_facts(evaluation.load_model(tmp_path / "best.pt")[0].clip)["activation"] == "quick_gelu"


def own_checkpoint(path, kind="tc", model={}, **changes):
    """A checkpoint as train.py writes it, with changes to its recipe."""
    recipe = vars(train.resolve_recipe("fewshot", kind, "shapes"))
    content = {"recipe": recipe | changes, "classes": ["a"],
               "model": evaluation.build_model(recipe, tiny_clip()).state_dict()}
    content["recipe"]["model"] = content["recipe"]["model"] | model
    torch.save(content, path)


@pytest.mark.slow
@pytest.mark.parametrize("method, changes, words", [
    ("vifi", {"frames": 10**9}, ["frames"]), ("vifi", {"clips": 10**6}, ["clips"]), ("vifi", {"crops": -1}, ["crops"]),
    ("vifi", {"short_side": 10**9}, ["short_side"]), ("vifi", {"frames": "8"}, ["frames"]), ("vifi", {"frames": True}, ["frames"]),
    ("vifi", {"sampling": "all"}, ["sampling", "all"]), ("vifi", {"pixels": "none"}, ["pixels"]), ("vifi", {"method": "x"}, ["method"]),
    ("vifi", {"method": []}, []), ("tc", {"model": {"context_tokens": 10**12}}, ["context_tokens"]),
    ("tc", {"model": {"colour": 3}}, ["'colour'"]), ("tc", {"model": {"seed_ratio": float("nan")}}, ["seed_ratio"]),
    ("tc", {"model": {"prompt_blocks": (10**9,)}}, ["prompt_blocks"]), ("tc", {"model": {"prompt": "a" * 10**6}}, ["fit"]),
    ("tc", {"model": {"prompt": 3}}, []), ("ila", {"model": {"num_classes": 10**7}}, ["num_classes"])])
def test_odd_numbers_in_a_recipe_are_refused(method, changes, words, tmp_path):
    own_checkpoint(tmp_path / "best.pt", method, **changes)
    refused(lambda: evaluation.load_model(tmp_path / "best.pt"), "best.pt: not weights that can be used", *words)


@pytest.mark.parametrize("merges", ["fifo", "/dev/zero", 3, "nowhere", "folder"])
def test_merges_named_in_a_file_are_opened_only_if_ordinary(merges, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    path = str(tmp_path / merges) if merges in ("fifo", "folder") else merges
    own_checkpoint(tmp_path / "best.pt", merges=path)
    assert evaluation.load_model(tmp_path / "best.pt")[0].clip.merges is None
    refused(lambda: load_clip(tmp_path / "fifo"), "no such file")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    state = tiny_clip().state_dict()
    state["visual.proj"][3, 4] = torch.nan
    refused(lambda: load_clip(state), "visual.proj not finite")
    made("ila_tiny", tmp_path)
    content = torch.load(tmp_path / "bare.pth", weights_only=True)
    content["model"]["module.mit.positional_embedding"][0, 0, 0] = torch.inf
    torch.save(content, tmp_path / "inf.pth")
    refused(lambda: evaluation.load_model(tmp_path / "inf.pth"), "frame_positions not finite")
    own_checkpoint(tmp_path / "best.pt")
    content = torch.load(tmp_path / "best.pt", weights_only=True)
    content["model"]["vectors"][0, 0] = -torch.inf
    torch.save(content, tmp_path / "best.pt")
    refused(lambda: evaluation.load_model(tmp_path / "best.pt"), "vectors not finite")


# ---- damaged files -------------------------------------------------------------------------------

@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK\x03\x04 and then nothing", b"\x80", b"12345678{",
                                     b"\xff" * 8 + b"{}", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"])
def test_broken_files_are_named(content, tmp_path):
    (tmp_path / "broken.pt").write_bytes(content)
    refused(lambda: load_clip(tmp_path / "broken.pt"), "broken.pt: refused", "git lfs pull" if b"lfs" in content else "")


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.999])
def test_files_cut_off_are_refused(options, share, tmp_path):
    torch.save(tiny_clip().state_dict(), tmp_path / "cut.pt", **options)
    whole = (tmp_path / "cut.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:int(share * len(whole))])
    refused(lambda: load_clip(tmp_path / "cut.pt"), "cut.pt: refused")


def test_one_flipped_bit_anywhere_in_the_numbers_is_found(tmp_path):
    state = tiny_clip().state_dict()
    torch.save(state, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "whole.pt") as archive:
        records = [record for record in archive.infolist() if record.file_size]
    rng = np.random.default_rng(0)
    for record in rng.choice(np.array(records, dtype=object), 20):
        start = whole.index(record.filename.encode()) + len(record.filename)
        start += -start % 64 if "/data/" in record.filename else 0  # torch aligns the tensors
        rotten = bytearray(whole)
        rotten[start + int(rng.integers(record.file_size))] ^= 1 << int(rng.integers(8))
        (tmp_path / "rotten.pt").write_bytes(rotten)
        try:
            read = read_checkpoint(tmp_path / "rotten.pt")
        except ValueError as error:
            assert "rotten.pt: refused" in str(error)
        else:  # a bit between the records
            assert all(torch.equal(value, read[key]) for key, value in state.items()), record


def test_every_mutation_is_refused_or_harmless(tmp_path):
    """Random bytes overwritten in small files of every kind: a ValueError, or content."""
    small = {"a": torch.arange(3.0), "b": {"c": torch.ones(2, 2, dtype=torch.float16)}, "lr": 0.1}
    torch.save(small, tmp_path / "zip")
    torch.save(small, tmp_path / "legacy", _use_new_zipfile_serialization=False)
    make_files.write_safetensors(tmp_path / "safe", {"a": torch.arange(3.0)}, {"format": "pt"})
    np.savez(tmp_path / "arrays.npz", a=np.arange(3.0))
    rng = np.random.default_rng(1)
    for name in ("zip", "legacy", "safe", "arrays.npz"):
        whole = (tmp_path / name).read_bytes()
        for _ in range(150):
            changed = bytearray(whole)
            for place in rng.integers(len(whole), size=rng.integers(1, 6)):
                changed[place] = rng.integers(256)
            (tmp_path / "changed").write_bytes(changed[:rng.integers(1, len(whole) + 1)] if rng.random() < 0.2 else changed)
            try:
                read_checkpoint(tmp_path / "changed")
            except ValueError as error:
                assert "changed: refused" in str(error) and len(str(error)) < 300 and "\n" not in str(error)


def test_what_the_system_says_is_not_called_damage(tmp_path, monkeypatch):
    save_clip(tmp_path / "clip.pt")

    def fails(error):
        def open_(*args, **settings):
            raise error
        return open_
    for number in (errno.EIO, errno.EACCES, errno.ESTALE, errno.EMFILE):
        with monkeypatch.context() as patch:
            patch.setattr(clip_vit, "open", fails(OSError(number, os.strerror(number), "clip.pt")), raising=False)
            with pytest.raises(OSError, match=os.strerror(number)):
                load_clip(tmp_path / "clip.pt")
    with monkeypatch.context() as patch:
        patch.setattr(clip_vit, "empty_bytes", fails(MemoryError()))
        with pytest.raises(MemoryError, match="allocate.*clip.pt"):
            load_clip(tmp_path / "clip.pt")


# ---- hostile files -------------------------------------------------------------------------------

class Hostile:
    """Unpickled in the ordinary way, it leaves a trace."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


class HostileBuiltin(Hostile):
    def __reduce__(self):
        return exec, (f"open({str(self.trace)!r}, 'w')",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("kind", [Hostile, HostileBuiltin])
@pytest.mark.parametrize("wrap", [lambda state, bad: bad, lambda state, bad: {"model": state, "config": bad},
                                  lambda state, bad: OrderedDict(state, evil=bad)])
def test_a_hostile_pickle_is_refused_and_runs_nothing(wrap, kind, protocol, tmp_path):
    trace = tmp_path / "trace"
    state = tiny_clip().state_dict()
    torch.save(wrap(state, kind(trace)), tmp_path / "hostile.pt", pickle_protocol=protocol)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(wrap({}, kind(trace)), protocol))
    torch.save(wrap(state, kind(trace)), tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(tmp_path / "hostile.pt") as whole, zipfile.ZipFile(tmp_path / "script.pt", "w") as script:
        for item in whole.infolist():
            script.writestr(item, whole.read(item))
        script.writestr("hostile/constants.pkl", b"")
    for name in ("hostile.pt", "bare.pt", "legacy.pt", "script.pt"):
        refused(lambda: load_clip(tmp_path / name), name, "wants to run")
    assert not trace.exists()
    pickle.loads(pickle.dumps(kind(trace)))  # the file would have left its trace
    assert trace.exists()


def spoiled(value):
    """A state_dict of a tiny CLIP, one of whose tensors is another kind of value."""
    return tiny_clip().state_dict() | {"visual.proj": value}


ODD_TENSORS = {
    "csr": lambda: torch.eye(128).to_sparse_csr(), "coo": lambda: torch.eye(128).to_sparse(), "meta": lambda: torch.empty(128, 128, device="meta"),
    "quantised": lambda: torch.quantize_per_tensor(torch.eye(128), 0.1, 0, torch.qint8), "expanded": lambda: torch.ones(1).expand(128, 128),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "number": lambda: 3.0, "list": lambda: [1.0],
    "complex": lambda: torch.eye(128, dtype=torch.complex64), "float8": lambda: torch.eye(128).to(torch.float8_e4m3fn)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ODD_TENSORS)
def test_only_plain_tensors_are_taken(kind, tmp_path):
    torch.save(spoiled(ODD_TENSORS[kind]()), tmp_path / "odd.pt")
    refused(lambda: load_clip(tmp_path / "odd.pt"), "odd.pt: ")


def archive(path, pickled, records, compression=zipfile.ZIP_STORED):
    """A file of torch.save put together by hand."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("a/data.pkl", pickled)
        for name, content in records.items():
            file.writestr(f"a/data/{name}", content)


def tensor_pickle(sizes, key="0", names=("w",), stride=None, count=None):
    """A pickle of {name: tensor of these sizes over record `key`}, by opcodes."""
    def number(n):
        return b"\x8a\x08" + struct.pack("<q", n)
    def text(words):
        return b"X" + struct.pack("<I", len(words)) + words.encode()
    stride = stride or [int(np.prod(sizes[i + 1:])) for i in range(len(sizes))]
    out = b"\x80\x02}("
    for name in names:
        out += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(("
        out += text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + number(count or 1) + b"tQ" + number(0)
        out += b"(" + b"".join(map(number, sizes)) + b"t(" + b"".join(map(number, stride)) + b"t\x89}tR"
    return out + b"u."


@pytest.mark.parametrize("sizes, stride", [([10**12], None), ([2**62, 4], None), ([4], [0]), ([-4], None), ([4], [2**40]), ([2, 2], [-1, 1]),
                                           ([5], None)])
def test_tensors_are_no_larger_than_their_record(sizes, stride, tmp_path):
    archive(tmp_path / "good.pt", tensor_pickle([4]), {"0": bytes(16)})
    assert read_checkpoint(tmp_path / "good.pt")["w"].tolist() == [0] * 4
    archive(tmp_path / "large.pt", tensor_pickle(sizes, stride=stride), {"0": bytes(16)})
    if sizes == [4] and stride == [0]:  # a view of one number, no larger than the record
        assert read_checkpoint(tmp_path / "large.pt")["w"].tolist() == [0] * 4
    else:
        refused(lambda: read_checkpoint(tmp_path / "large.pt"), "large.pt: refused")


@pytest.mark.slow
def test_bombs_are_refused_quickly(tmp_path, monkeypatch):
    """Files of a few kilobytes that would take gigabytes or years."""
    archive(tmp_path / "bomb.pt", tensor_pickle([2**26]), {"0": bytes(2**28)}, zipfile.ZIP_DEFLATED)
    refused(lambda: read_checkpoint(tmp_path / "bomb.pt"), "unpack")
    names = [f"w{i}" for i in range(60)]
    archive(tmp_path / "shared.pt", tensor_pickle([2**20], names=names), {"0": bytes(2**22)})
    refused(lambda: load_clip(tmp_path / "shared.pt"), "more numbers than the file")
    deep = b"\x80\x02)" + b"\x85" * 300_000 + b"."
    archive(tmp_path / "deep.pt", deep, {})
    refused(lambda: load_clip(tmp_path / "deep.pt"), "deep.pt")
    for as_key in (b"}" + deep[2:-1] + b"Ns.", b"\x8f(" + deep[2:-1] + b"\x90.", b"(" + deep[2:-1] + b"\x91."):
        archive(tmp_path / "key.pt", b"\x80\x04" + as_key, {})  # a dict's key, in a set, in a frozenset
        refused(lambda: load_clip(tmp_path / "key.pt"), "key.pt")
    archive(tmp_path / "memo.pt", b"\x80\x02Nr\xff\xff\xff\x7f.", {})  # far down the memo
    refused(lambda: load_clip(tmp_path / "memo.pt"), "memo.pt")
    monkeypatch.setattr(clip_vit, "MOST_PICKLE", 2**16)
    archive(tmp_path / "long.pt", b"\x80\x02" + b"N" * 2**17 + b".", {})
    refused(lambda: load_clip(tmp_path / "long.pt"), "pickle")
    (tmp_path / "legacy.pt").write_bytes(legacy_with_count(2**40))
    refused(lambda: load_clip(tmp_path / "legacy.pt"), "larger than the file")


def legacy_with_count(count):
    """An old file of torch.save that claims a storage of `count` numbers."""
    start = b"".join(pickle.dumps(value, 2) for value in (clip_vit.MAGIC, 1001, {}))
    pickled = tensor_pickle([4], count=count)
    return start + pickled + pickle.dumps(["0"], 2) + struct.pack("<q", 4) + bytes(16)


def test_modules_that_nest_without_end_are_refused(tmp_path):
    """2^40 names of one module: each holds the next twice. A module that holds itself."""
    def module(content):
        return b"c__torch__\nM\n)\x81}(" + content + b"ub"
    twice = module(b"")
    for level in range(40):
        memo = b"q" + bytes([level])
        twice = module(b"X\x01\0\0\0a" + twice + memo + b"X\x01\0\0\0bh" + bytes([level]))
    itself = b"c__torch__\nM\n)\x81q\x01}X\x01\0\0\0ah\x01sb"
    for name, pickled in (("twice", twice), ("itself", itself)):
        archive(tmp_path / name, b"\x80\x02" + pickled + b".", {})
        refused(lambda: load_clip(tmp_path / name), "nest")


@pytest.mark.parametrize("entry, words", [
    ({"dtype": "F32", "shape": [4], "data_offsets": [0, 160]}, "outside"), ({"dtype": "F32", "shape": [40], "data_offsets": [0, 16]}, "outside"),
    ({"dtype": "F32", "shape": [-4], "data_offsets": [16, 0]}, "outside"), ({"dtype": "F8_E4M3", "shape": [16], "data_offsets": [0, 16]}, "F8_E4M3"),
    ({"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 16]}, "outside"), ({"dtype": "F32", "shape": "4", "data_offsets": [0, 16]}, ""),
    ({"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}, "outside"), ([], "")])
def test_safetensors_stay_within_the_file(entry, words, tmp_path):
    header = json.dumps({"a": entry}).encode()
    (tmp_path / "bad.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    refused(lambda: read_checkpoint(tmp_path / "bad.safetensors"), "bad.safetensors: refused", words)


def test_safetensors_count_shared_numbers_once(tmp_path):
    header = json.dumps({f"w{i}": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]} for i in range(50)}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4000))
    refused(lambda: read_checkpoint(tmp_path / "a.safetensors"), "outside")


# ---- downloads -----------------------------------------------------------------------------------

CONTENT = bytes(range(256)) * 5000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT; breaks off half-way, or answers with an error, as often as `breaks` and `fails` say."""

    breaks = fails = asked = 0
    together = None  # a barrier at which downloads wait for one another

    def do_GET(self):
        Server.asked += 1
        if Server.fails > 0:
            Server.fails -= 1
            self.send_error(503)
            return
        if Server.together:
            Server.together.wait(timeout=60)
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        Server.breaks -= 1
        self.wfile.write(CONTENT[:len(CONTENT) // 2] if Server.breaks >= 0 else CONTENT)

    def log_message(self, *_):
        pass


@pytest.fixture
def url():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Server.breaks = Server.fails = Server.asked = 0
    Server.together = None
    yield f"http://127.0.0.1:{server.server_port}/file.pt"
    server.shutdown()


def test_downloads_are_checked_and_kept(tmp_path, url):
    path = cached(url, SHA256, tmp_path / "new")
    assert path.read_bytes() == CONTENT and cached(url, SHA256, tmp_path / "new") == path and Server.asked == 1
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["file.pt"]
    old, young = tmp_path / "file.pt.abc.partial", tmp_path / "file.pt.def.partial"
    for left in (old, young):
        left.write_bytes(b"half")
    os.utime(old, (0, 0))
    assert cached(url, SHA256, tmp_path).read_bytes() == CONTENT
    assert not old.exists() and young.exists()  # what a killed download left; what may be under way


def test_what_goes_wrong_with_a_download_is_said(tmp_path, url):
    Server.fails = 1
    refused(lambda: cached(url, SHA256, tmp_path), "cannot download file.pt", "503", url, "by hand", "--clip FILE")
    Server.breaks = 1
    refused(lambda: cached(url, SHA256, tmp_path), "invalid hash")
    refused(lambda: cached(url, "0" * 64, tmp_path), "invalid hash")
    refused(lambda: cached("http://127.0.0.1:9/none.pt", SHA256, tmp_path), "cannot download", "by hand")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("in the way")
    refused(lambda: cached(url, SHA256, tmp_path / "file"), "cannot download")
    assert cached(url, SHA256, tmp_path).read_bytes() == CONTENT


def test_a_server_that_falls_silent_is_given_up(tmp_path, monkeypatch):
    import socket
    silent = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr(clip_vit, "TIMEOUT", 0.5)
    refused(lambda: cached(f"http://127.0.0.1:{silent.getsockname()[1]}/a.pt", SHA256, tmp_path), "timed out")
    assert socket.getdefaulttimeout() is None
    silent.close()


def test_two_processes_that_download_at_once(tmp_path, url):
    Server.together = threading.Barrier(2)  # both have begun before either ends
    start = multiprocessing.get_context("fork").Process
    both = [start(target=cached, args=(url, SHA256, tmp_path)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert (tmp_path / "file.pt").read_bytes() == CONTENT and len(list(tmp_path.iterdir())) == 1


def test_no_home_and_a_home_that_cannot_be_written(tmp_path, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")
    with monkeypatch.context() as patch:
        patch.setattr(clip_vit.Path, "home", no_home)
        refused(lambda: load_clip("ViT-B/16"), "set HOME", "--clip FILE", "--merges FILE")
    (tmp_path / ".cache").write_text("no folder")
    monkeypatch.setenv("HOME", str(tmp_path))
    refused(lambda: load_clip("ViT-B/16"), "cannot download ViT-B-16.pt", "give --clip FILE")


# ---- both scripts --------------------------------------------------------------------------------

def test_loading_to_a_device():
    model, _ = evaluation.load_model(tiny_clip().state_dict(), device=torch.device("cpu"))
    assert model.clip.visual.proj.device.type == "cpu"
