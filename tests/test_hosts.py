"""ILA in other hosts: TimeSformer, EVL and a tower without text, against figures of the released codes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from figures import make_files, weights
from helpers import tiny_clip
from test_ila import clips, lively, stray

import eval as evaluation
import train
from clip_vit import load_clip
from ila import ILA, EVLLayer, HostedILA, ILAConfig, RecordedBlock, load_released, make_ila, released_clip, released_config

FIGURES = Path(__file__).with_name("figures")
NAMES = ["a", "b", "c"]
KINDS = {  # what a user sets beside num_classes
    "TimeSformer": dict(host="timesformer", rival="divided"), "TimeSformer + ILA": dict(host="timesformer"),
    "EVL": dict(host="evl", rival="none"), "EVL + ILA": dict(host="evl"),
    "ILA from an image ViT": dict(finetune=True)}
each_kind = pytest.mark.parametrize("kind", KINDS)


def fixture(name, layout, prefix=""):
    """A fixture's state_dict, and its figures by name."""
    described = json.loads((FIGURES / f"{name}.json").read_text())
    state = {prefix + key: torch.from_numpy(weights.tensor(key, tuple(shape)))
             for key, shape in described["layouts"][layout].items()}
    return state, np.load(FIGURES / f"{name}.npz")


def video(frames=4):
    return torch.from_numpy(weights.video(2, frames, 64, "dev"))


def agree(got, want):
    assert np.abs(got.detach().numpy() - want).max() < 1e-10


def released(state, clip=None):
    """The model of a released state_dict, all read off its tensors."""
    model = make_ila(load_clip(clip or released_clip(state)), released_config(state))
    load_released(model, state)
    return model.eval()


def image_tower(dtype=torch.float64, **sizes):
    """An image classifier's tower, of random weights."""
    return load_clip({key: value for key, value in tiny_clip(dtype, **sizes).state_dict().items()
                      if key.startswith("visual.") and "ln_pre" not in key and key != "visual.proj"})


def toy(kind, dtype=torch.float64, **changes):
    """A lively tiny model of three classes, in eval mode."""
    torch.manual_seed(0)
    clip = tiny_clip(dtype) if "EVL" in kind else image_tower(dtype)
    model = lively(make_ila(clip, ILAConfig(**{"frames": 4, "num_classes": 3, **KINDS[kind], **changes})))
    model.set_classes(NAMES)
    return model.eval()


# ---- figures of the released codes -----------------------------------------------------------------------------------

@torch.no_grad()
def test_timesformer():
    state, want = fixture("timesformer", "timesformer")
    assert released_config(state) == ILAConfig(frames=4, host="timesformer", rival="divided", num_classes=7)
    model = released(state)
    agree(model(video())[0], want["logits"])
    agree(model.encode_video(video()), want["features"])
    agree(model(video(8))[0], want["logits_twice_frames"])  # time positions are stretched
    visual, x = model.clip.visual, video()
    x = (visual.tokens(x.flatten(0, 1)) + visual.positional_embedding).unflatten(0, (2, 4))
    x[:, :, 1:] += model.host.positions
    for i, (block, aligner) in enumerate(zip(visual.transformer.resblocks, model.host.aligners)):
        x = aligner(x, block, None).x
        assert torch.equal(x[:, 0, 0], x[:, 3, 0])  # one class token
        agree(x[:, 0, 0], want["class_token"][i])
        if i == 0:  # two patches, frame after frame
            flat = [x[:, :, 1:].flatten(1, 2), x[:, :, 1:].transpose(1, 2).flatten(1, 2)]
            assert min(np.abs(rows[:, :8].numpy() - want["first_patches_block0"]).max() for rows in flat) < 1e-10


@torch.no_grad()
def test_timesformer_begins_as_the_image_vit():
    start, want = fixture("timesformer", "vit")
    tower = load_clip(start)
    model = make_ila(tower, ILAConfig(frames=4, host="timesformer", rival="divided", num_classes=7)).eval()
    agree(model.encode_video(video()), want["features_start"])
    block, aligner = tower.visual.transformer.resblocks[1], model.host.aligners[1]
    assert torch.equal(aligner.attn.in_proj_weight, block.attn.in_proj_weight)
    assert aligner.attn.in_proj_weight is not block.attn.in_proj_weight and (model.host.positions == 0).all()


@torch.no_grad()
def test_evl():
    (state, want), (clip, _) = fixture("evl", "evl", "module."), fixture("evl", "clip")
    assert released_config(state) == ILAConfig(4, host="evl", rival="none", num_classes=7, decoder_layers=3)
    model = released(state, clip)
    agree(model(video())[0], want["logits"])
    agree(model.encode_video(video()), want["decoder_outputs"][-1])
    terms = {"conv": ("conv.weight", "conv.bias"), "pos": ("positions",), "cross": ("w1", "w2")}
    for name, kept in (("conv_only", "conv"), ("pos_only", "pos"), ("cross_only", "cross"), ("no_temporal", "")):
        load_released(model, state)
        for layer in model.host.layers:
            for term in terms.keys() - {kept}:
                for parameter in terms[term]:
                    layer.get_parameter(parameter).zero_()
        agree(model(video())[0], want[f"logits_{name}"])


@torch.no_grad()
def test_evl_layer_by_layer():
    (state, want), (clip, _) = fixture("evl", "evl", "module."), fixture("evl", "clip")
    model = released(state, clip)
    visual, token = model.clip.visual, model.host.token.expand(2, 1, -1)
    x = visual.ln_pre(visual.tokens(video().flatten(0, 1)) + visual.positional_embedding)
    for i, block in enumerate(visual.transformer.resblocks):
        plain, recorded = block(x), RecordedBlock(block)
        x = recorded(x)
        assert torch.allclose(x, plain, atol=1e-12)  # the block itself
        if i > 0:
            parts = [rows.unflatten(0, (2, 4)) for rows in (recorded.out, recorded.q, recorded.k)]
            layer = model.host.layers[i - 1]
            if i == 1:
                agree(parts[0][:, :, :3], want["backbone_out"])
                agree(layer.video_rows(*parts)[:, :, :3], want["y_first"])
            token = layer(token, *parts)
            agree(token[:, 0], want["decoder_outputs"][i - 1])


def test_cross_term_equals_loops():
    torch.manual_seed(0)
    layer = EVLLayer(tiny_clip().visual, ILAConfig(frames=3)).double()
    g, H, d, D = layer.grid, 2, 64, 128
    q, k = torch.randn(2, 1, 2, H, g * g, d, dtype=torch.float64)
    w = torch.randn((2 * g - 1) ** 2, D, dtype=torch.float64)
    got = layer.cross(q, k, w)
    for t in range(2):
        A = sum((q[0, t, h] @ k[0, t, h].T / d ** 0.5).softmax(dim=-1) for h in range(H)) / H
        for p in range(g * g):
            want = 0
            for other in range(g * g):
                r = (p // g - other // g + g - 1) * (2 * g - 1) + p % g - other % g + g - 1
                want = want + A[p, other] * w[r]
            assert torch.allclose(got[0, t, p], want, atol=1e-12)


@pytest.mark.parametrize("name, layout, prefix", [("timesformer", "timesformer", ""), ("evl", "evl", "module.")])
def test_loading_is_strict(name, layout, prefix):
    state, _ = fixture(name, layout, prefix)
    clip, _ = fixture("evl", "clip")
    model = released(state, clip if name == "evl" else None)
    key = next(key for key in state if key.endswith("norm2.bias"))
    for wrong in ({k: v for k, v in state.items() if k != key}, state | {prefix + "decoder.other": torch.zeros(3)},
                  state | {prefix + "model.blocks.0.other": torch.zeros(3)}):
        with pytest.raises(ValueError, match="not released weights"):
            load_released(model, wrong)
    with pytest.raises(ValueError, match="not a released ILA, TimeSformer or EVL"):
        released_config({"a": torch.zeros(3)})


@pytest.mark.parametrize("name, file, views", [
    ("timesformer", "checkpoint_epoch_00015.pyth", {"pixels": "slowfast", "clips": 1, "crops": 3, "sampling": "uniform"}),
    ("evl", "checkpoint-50000.pth", {"pixels": "clip", "clips": 3, "crops": 1})])
def test_released_files(name, file, views, tmp_path):
    """As they are distributed: nothing else is needed, except EVL's CLIP."""
    make_files.make(FIGURES / f"{name}.json", tmp_path)
    model, recipe = evaluation.load_model(tmp_path / file, tmp_path / "clip.pt" if name == "evl" else "nothing")
    assert recipe["method"] == "ila" and recipe["frames"] == 4 and views.items() <= recipe.items()
    with torch.no_grad():
        agree(model(video())[0], np.load(FIGURES / f"{name}.npz")["logits"])
    again = evaluation.build_model(recipe, model.clip)  # the recipe alone builds it
    again.load_state_dict(model.state_dict())


# ---- other sizes, by loops -------------------------------------------------------------------------------------------

OTHER = dict(width=192, layers=3, grid=3, patch=8, frames=5, classes=4)  # three heads


def other_state(shapes):
    return {key: torch.from_numpy(weights.tensor(key, shape)) for key, shape in shapes.items()}


def linear_shapes(name, out, into):
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm_shapes(*names):
    return {f"{name}.{kind}": (OTHER["width"],) for name in names for kind in ("weight", "bias")}


def attend(x, y, parts):
    """Attention of x (n,D) on y (m,D), head by head; `parts` are four pairs of a weight and a bias."""
    q, k, v = (F.linear(rows, *part) for rows, part in zip((x, y, y), parts))
    heads = [(q[:, h:h + 64] @ k[:, h:h + 64].T / 8).softmax(dim=-1) @ v[:, h:h + 64] for h in range(0, x.shape[1], 64)]
    return F.linear(torch.cat(heads, dim=1), *parts[3])


@torch.no_grad()
def test_timesformer_of_another_size():
    D, layers, g, patch, T, C = OTHER.values()
    shapes = {"cls_token": (1, 1, D), "pos_embed": (1, g * g + 1, D), "time_embed": (1, T, D),
              "patch_embed.proj.weight": (D, 3, patch, patch), "patch_embed.proj.bias": (D,),
              **norm_shapes("norm"), **linear_shapes("head", C, D)}
    for b in (f"blocks.{i}." for i in range(layers)):
        shapes |= norm_shapes(b + "norm1", b + "norm2", b + "temporal_norm1") | linear_shapes(b + "temporal_fc", D, D)
        shapes |= linear_shapes(b + "mlp.fc1", 4 * D, D) | linear_shapes(b + "mlp.fc2", D, 4 * D)
        for attn in (b + "attn", b + "temporal_attn"):
            shapes |= linear_shapes(attn + ".qkv", 3 * D, D) | linear_shapes(attn + ".proj", D, D)
    s = other_state(shapes)

    def linear(x, name):
        return F.linear(x, s[name + ".weight"], s[name + ".bias"])

    def norm(x, name):
        return F.layer_norm(x, (D,), s[name + ".weight"], s[name + ".bias"], 1e-6)

    def attention(x, name):
        qkv = zip(s[name + ".qkv.weight"].chunk(3), s[name + ".qkv.bias"].chunk(3))
        return attend(x, x, [*qkv, (s[name + ".proj.weight"], s[name + ".proj.bias"])])

    videos = torch.from_numpy(weights.video(2, T, g * patch, "other"))
    got = released({"model." + key: value for key, value in s.items()})(videos)[0]
    for n in range(2):
        maps = F.conv2d(videos[n], s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=patch)
        x = maps.flatten(2).mT + s["pos_embed"][0, 1:] + s["time_embed"][0, :, None]  # (T,P,D)
        cls = s["cls_token"][0] + s["pos_embed"][0, :1]  # (1,D)
        for b in (f"blocks.{i}." for i in range(layers)):
            for p in range(g * g):
                x[:, p] += linear(attention(norm(x[:, p], b + "temporal_norm1"), b + "temporal_attn"), b + "temporal_fc")
            seen = [attention(norm(torch.cat([cls, x[t]]), b + "norm1"), b + "attn") for t in range(T)]
            x = torch.stack([x[t] + seen[t][1:] for t in range(T)])
            cls = cls + sum(r[:1] for r in seen) / T
            x, cls = (y + linear(F.gelu(linear(norm(y, b + "norm2"), b + "mlp.fc1")), b + "mlp.fc2") for y in (x, cls))
        agree(got[n], linear(norm(cls, "norm"), "head")[0].numpy())


@torch.no_grad()
def test_evl_of_another_size():
    D, layers, g, patch, T, C = OTHER.values()
    read, hidden = 2, 3 * D
    shapes = {"decoder.cls_token": (D,), **norm_shapes("proj.0"), **linear_shapes("proj.2", C, D)}
    for i in range(read):
        a = f"decoder.decoder_layers.{i}."
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear_shapes(f"{a}attn.{part}", D, D)
        shapes |= linear_shapes(a + "mlp.fc1", hidden, D) | linear_shapes(a + "mlp.fc2", D, hidden)
        shapes |= norm_shapes(a + "norm1", a + "norm2", a + "norm3")
        shapes |= {f"decoder.temporal_conv.{i}.weight": (D, 1, 3), f"decoder.temporal_conv.{i}.bias": (D,),
                   f"decoder.temporal_pos_embed.{i}": (T, D)}
        shapes |= {f"decoder.cross_attention.{i}.{w}": ((2 * g - 1) ** 2, D) for w in ("w1", "w2")}
    s = other_state(shapes)

    def pair(name):
        return s[name + ".weight"], s[name + ".bias"]
    clip = tiny_clip(torch.float64, resolution=g * patch, patch=patch, vision_width=D, vision_layers=layers)
    model = make_ila(clip, released_config(s)).eval()
    load_released(model, s)
    videos = torch.from_numpy(weights.video(2, T, g * patch, "other"))
    got = model(videos)[0]
    for n in range(2):
        x = clip.visual.ln_pre(clip.visual.tokens(videos[n]) + clip.visual.positional_embedding)
        token = s["decoder.cls_token"][None]
        for i, block in enumerate(clip.visual.transformer.resblocks, start=read - layers):
            w, b = block.attn.in_proj_weight, block.attn.in_proj_bias
            q, k, _ = F.linear(block.ln_1(x), w, b).chunk(3, dim=-1)
            x = block(x)
            if i < 0:
                continue
            a, y = f"decoder.decoder_layers.{i}.", x.clone()
            kernel, bias = pair(f"decoder.temporal_conv.{i}")
            for t in range(T):
                y[t] += bias + s[f"decoder.temporal_pos_embed.{i}"][t]
                for other in range(max(t - 1, 0), min(t + 2, T)):
                    y[t] += kernel[:, 0, 1 + other - t] * x[other]
                for other, w in ((t - 1, "w1"), (t + 1, "w2")):
                    if 0 <= other < T:
                        A = sum((q[t, 1:, h:h + 64] @ k[other, 1:, h:h + 64].T / 8).softmax(dim=-1)
                                for h in range(0, D, 64)) / (D // 64)
                        for p in range(g * g):
                            for o in range(g * g):
                                r = (p // g - o // g + g - 1) * (2 * g - 1) + p % g - o % g + g - 1
                                y[t, 1 + p] += A[p, o] * s[f"decoder.cross_attention.{i}.{w}"][r]
            rows = F.layer_norm(y.flatten(0, 1), (D,), *pair(a + "norm3"))
            parts = [pair(f"{a}attn.{part}") for part in ("q_proj", "k_proj", "v_proj", "out_proj")]
            token = token + attend(F.layer_norm(token, (D,), *pair(a + "norm1")), rows, parts)
            h = F.linear(F.layer_norm(token, (D,), *pair(a + "norm2")), *pair(a + "mlp.fc1"))
            token = token + F.linear(h * torch.sigmoid(1.702 * h), *pair(a + "mlp.fc2"))
        agree(got[n], F.linear(F.layer_norm(token, (D,), *pair("proj.0")), *pair("proj.2"))[0].numpy())


# ---- what every host promises ----------------------------------------------------------------------------------------

@each_kind
def test_interface(kind):
    model, x = toy(kind), clips(3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        (logits, loss), again = model(x), model(x)
        alone = torch.cat([model(one[None])[0] for one in x])
    assert logits.shape == (3, 3) and loss.shape == () and torch.equal(logits, again[0])
    assert torch.allclose(logits, alone, atol=1e-10)
    assert (loss > 0) == (model.config.rival == "ila")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.encode_video(x).shape == (3, 128)
    points = model.interactive_points(x)
    assert [p.shape for p in points] == ([(3, 4, 2)] * 4 if model.config.rival == "ila" else [])
    with pytest.raises(ValueError, match="no text"):
        model.encode_names(NAMES)
    for names in (NAMES[:2], NAMES[::-1], "abc"):
        with pytest.raises(ValueError):
            model.set_classes(names)
    model.set_epoch(31)
    assert abs(float(model.delta) - 0.05) < 1e-12
    with torch.no_grad():  # who sees time tells a video from its reversal
        assert (model(x)[0] - model(x.flip(1))[0]).abs().max() > 1e-6


@each_kind
def test_what_trains(kind):
    """All that trains gets a gradient; EVL's tower is frozen, every other one trains."""
    model = toy(kind).train()
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    tower = {name for name in names if name.startswith("clip.")}
    assert tower == (set() if "EVL" in kind else {"clip." + name for name, _ in model.clip.named_parameters()
                                                  if name.startswith("visual.")})
    torch.manual_seed(0)
    logits, loss = model(clips())
    (F.cross_entropy(logits, torch.tensor([0, 2])) + loss).backward()
    assert stray(model) == []
    aligners = {name for name in names if ".aligners." in name or name.startswith("aligners.")}
    assert bool(aligners) == (kind != "EVL")


def test_a_finetuned_linear_head_leaves_the_text_and_its_scale_alone():
    """DDP waits for the gradient of every parameter that trains, and a linear head needs no text."""
    model = ILA(tiny_clip(context=77), ILAConfig(frames=4, num_classes=3, finetune=True)).train()
    names = {name for name, parameter in model.clip.named_parameters() if parameter.requires_grad}
    assert names == {name for name, _ in model.clip.named_parameters() if name.startswith("visual.")}
    model.set_classes(["a", "b", "c"])
    logits, loss = model(torch.randn(2, 4, 3, 32, 32))
    (F.cross_entropy(logits, torch.tensor([0, 2])) + loss).backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def kept_bytes(model):
    """Bytes that a training step keeps for its backward pass."""
    kept = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits, loss = model.train()(clips(dtype=torch.float32))
        (logits.sum() + loss).backward()
    return sum(kept.values())


def test_evl_keeps_little_for_backward():
    """A frozen tower's values are not kept: with 12 blocks less than half of what fine-tuning all keeps."""
    def model(**settings):
        return make_ila(tiny_clip(vision_layers=12), ILAConfig(frames=4, num_classes=3, **settings))
    evl, full = model(host="evl", rival="none"), model(finetune=True, rival="none")
    assert kept_bytes(evl) < 0.4 * kept_bytes(full)


def test_drop_path():
    model, x = toy("TimeSformer"), torch.ones(4000, 1, 2, dtype=torch.float64)
    last = model.host.aligners[-1]
    assert [round(block.drop, 6) for block in model.host.aligners] == [0, 0.033333, 0.066667, 0.1]
    assert torch.equal(last.drop_path(x), x)  # not in evaluation
    dropped = last.train().drop_path(x)
    share = float((dropped == 0).all(dim=(1, 2)).double().mean())
    assert 0.08 < share < 0.12 and abs(float(dropped.mean()) - 1) < 0.03
    assert ((dropped == 0).all(dim=(1, 2)) | (dropped > 1).all(dim=(1, 2))).all()  # a video as a whole


@pytest.mark.slow
@each_kind
def test_learns_order(kind):
    """Brightening against darkening videos. In the miniature world all reach .98, and .99 inside reversed pairs:
    train.py --protocol fewshot --method ila --set num_classes=20 host=evl rival=none, and so on."""
    torch.manual_seed(0)
    sizes = dict(resolution=16, vision_layers=2)
    clip = tiny_clip(**sizes) if "EVL" in kind else image_tower(torch.float32, **sizes)
    config = ILAConfig(frames=4, num_classes=2, align_weight=0.01, decoder_layers=2, **KINDS[kind])
    model = make_ila(clip, config).train()
    ramp = torch.linspace(-1, 1, 4).view(1, 4, 1, 1, 1)

    def batch(n):
        label = torch.arange(n) % 2
        sign = 1 - 2 * label.view(n, 1, 1, 1, 1)
        return sign * ramp + 0.1 * torch.randn(n, 4, 3, 16, 16), label
    groups = {True: [], False: []}  # positions in time learn faster, as in the miniature
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["positions" in name].append(parameter)
    optimizer = torch.optim.AdamW([{"params": groups[True], "lr": 2e-2}, {"params": groups[False]}], 5e-4)
    for _ in range(60):
        x, label = batch(8)
        logits, loss = model(x)
        optimizer.zero_grad()
        (F.cross_entropy(logits, label) + loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    x, label = batch(40)
    with torch.no_grad():
        assert (model.eval()(x)[0].argmax(dim=1) == label).float().mean() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("kind, more", [(kind, []) for kind in KINDS] + [
    ("TimeSformer", ["optimizer=sgd", "schedule=steps", "clip_grad=0"])])
def test_one_command(kind, more, world, tmp_path):
    """train.py trains each on the miniature and tests it on the classes that its head knows; best.pt loads again."""
    settings = [f"{name}={str(value).lower()}" for name, value in KINDS[kind].items()]
    words = ["--protocol", "fewshot", "--method", "ila", "--data", str(world), "--out", str(tmp_path / "run"), "--set",
             "num_classes=20", "shots=1", "epochs=1", "short_side=0", "warmup_epochs=0.5", *settings, *more]
    resolution = 32
    if "EVL" not in kind:  # an image ViT in timm's layout
        make_files.make(FIGURES / "timesformer.json", tmp_path, "float32", ["start.pth"])
        words += ["--clip", str(tmp_path / "start.pth")]
        resolution = 64
    train.main(train.parse_args(words))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(results["tests"]) == ["base"] and 0 <= results["tests"]["base"]["pairs"] <= 1
    model, recipe = evaluation.load_model(tmp_path / "run" / "best.pt")
    assert recipe["model"]["num_classes"] == 20 and model(torch.zeros(1, 8, 3, resolution, resolution))[0].shape == (1, 20)


@pytest.mark.parametrize("settings, words", [
    (dict(host="evl"), "needs num_classes"), (dict(host="timesformer"), "needs num_classes"),
    (dict(host="evl", num_classes=3, rival="shift"), "rival=ila or rival=none"), (dict(host="vivit"), "allowed: clip"),
    (dict(host="timesformer", num_classes=3, form="released-ssv2"), "form 'paper'"),
    (dict(host="timesformer", num_classes=3, rival="divided", blocks="1-2"), "blocks=all"),
    (dict(finetune=True), "with num_classes"), (dict(finetune=True, host="evl", num_classes=3), "host=clip")])
def test_wrong_combinations(settings, words):
    with pytest.raises(ValueError, match=words):
        ILAConfig(**settings)


def test_towers_that_do_not_fit():
    with pytest.raises(ValueError, match="decoder_layers is 5; the tower has 4"):
        make_ila(tiny_clip(), ILAConfig(frames=4, host="evl", num_classes=3, decoder_layers=5))
    with pytest.raises(ValueError, match="make_ila"):
        ILA(tiny_clip(), ILAConfig(frames=4, host="evl", num_classes=3))
    for kind in KINDS:
        if kind != "TimeSformer":
            with pytest.raises(ValueError, match="takes"):
                toy(kind)(clips(frames=5))


@pytest.mark.slow
@torch.no_grad()
@each_kind
def test_export_with_any_batch(kind):
    model = toy(kind, torch.float32).requires_grad_(False)
    program = torch.export.export(model, (clips(2, dtype=torch.float32),),
                                  dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    for batch in (1, 5):
        x = clips(batch, dtype=torch.float32)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(program.module()(x), model(x)))


def test_hosts_are_hosted():
    assert all(isinstance(toy(kind), ILA if "host" not in KINDS[kind] else HostedILA) for kind in KINDS)
