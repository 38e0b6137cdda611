"""TC-CLIP: the plain form against the fast one, properties, the released code's figures."""

import json

import numpy as np
import plain
import pytest
import torch
import torch.nn.functional as F
from figures import weights
from helpers import FIGURES, MERGES, need_merges, tiny_clip
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_vit import FramePool, PoolConfig, load_clip
from temporal_context import CHOICES, Seen, biased_attention, class_logits, reference_kv, seed_scores
from video_prompt import TCCLIP, TCConfig, load_released, released_config

NAMES = ["red to blue", "green_to_cyan", "OneTwo", "x"]


def make(seed=0, dtype=torch.float64, clip=None, **settings):
    """A TC-CLIP of the miniature's size whose new parameters are random, so that each of them matters."""
    torch.manual_seed(seed)
    settings = dict(frames=3, context_tokens=5, seed_ratio=0.2, merge_step=2, prompt="a pic") | settings
    model = TCCLIP(clip or tiny_clip(dtype, seed=seed), TCConfig(**settings))
    rng = torch.Generator().manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        if not name.startswith("clip."):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64).to(dtype)
    model.set_classes(NAMES)
    return model


def clips(batch=2, frames=3, seed=0, dtype=torch.float64):
    return torch.randn(batch, frames, 3, 32, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---- the plain form (plain.py) against the fast one ----------------------------------------------

PLAIN_CASES = [
    dict(),
    dict(positions="joint", seed_ratio=0.45, context_tokens=7, merge_step=100),  # an odd number of seeds, 7
    dict(local_global_bias=False, context_tokens=100),  # nothing to merge
    dict(stop_gradient=False, prompt_blocks=(0, 2), context_blocks=(1, 3)),
    dict(prompt_blocks=(1,), context_blocks=(-1,)),
    dict(prompting="learned"),
    dict(merge="none", stop_gradient=False),
]


@pytest.mark.parametrize("case", PLAIN_CASES, ids=str)
def test_fast_form_equals_the_plain_form(case):
    model, video = make(**case).train(), clips()
    labels = torch.tensor([1, 3])
    logits, aux = model(video)
    F.cross_entropy(logits, labels).backward()
    fast = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = plain.logits(model, video, plain.prompts(model, NAMES))
    F.cross_entropy(expected, labels).backward()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
    assert aux == 0 and logits.shape == (2, len(NAMES))
    slow = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert fast.keys() == slow.keys()
    for name in slow:
        torch.testing.assert_close(fast[name], slow[name], rtol=1e-8, atol=1e-11, msg=lambda m: f"{name}: {m}")


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_biased_attention_and_its_gradients(n, H, local, m, seed):
    torch.manual_seed(seed)
    q, k, v, bias = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in
                     ((n, H, 3, 8), (n, H, local + m, 8), (n, H, local + m, 8), (H,)))
    fast = biased_attention(q, k, v, bias, m)
    columns = torch.cat([bias.new_zeros(H, local), bias[:, None].expand(H, m)], dim=1)[:, None]
    formula = (q @ k.transpose(-1, -2) / 8 ** 0.5 + columns).softmax(-1) @ v
    weight = torch.randn_like(formula)
    torch.testing.assert_close(fast, formula)
    for a, b in zip(torch.autograd.grad((fast * weight).sum(), (q, k, v, bias)),
                    torch.autograd.grad((formula * weight).sum(), (q, k, v, bias))):
        torch.testing.assert_close(a, b)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_class_logits(n, H, columns, seed):
    """Keys as the tower has them, heads side by side, and keys of another layout."""
    torch.manual_seed(seed)
    q, kv = torch.randn(n, H, 1, 8, dtype=torch.float64), torch.randn(n, columns, 2 * H * 8, dtype=torch.float64)
    keys = kv[..., :H * 8].unflatten(-1, (H, 8)).transpose(1, 2)
    for layout in (keys, keys.contiguous()):
        torch.testing.assert_close(class_logits(q, layout), q @ keys.transpose(-1, -2))


@pytest.mark.parametrize("kind", ["class", "neighbour", "all", "context"])
@pytest.mark.parametrize("T", [2, 3, 5])
def test_references_are_what_the_paper_names(kind, T):
    """[paper, Table 1] What frame t sees beside itself, gathered one frame at a time."""
    kv, context = torch.randn(2, T, 4, 6), torch.randn(2, 3, 6)  # N = 1 + 3 rows per frame
    seen = reference_kv(kind, kv, context)
    for t in range(T):
        near = [s for s in (t - 1, t + 1) if 0 <= s < T]
        near = near if len(near) == 2 else near * 2  # the ends see their one neighbour twice [ours]
        expected = {"class": [kv[:, s, :1] for s in range(T)], "neighbour": [kv[:, s, 1:] for s in near],
                    "all": [kv[:, s, 1:] for s in range(T)], "context": [context]}[kind]
        assert torch.equal(seen[:, t], torch.cat(expected, dim=1))


def test_an_unknown_reference_is_an_error():
    with pytest.raises(ValueError, match="'everything' is unknown.*neighbour"):
        reference_kv("everything", torch.randn(2, 3, 4, 6), None)


# ---- properties --------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_without_context_it_is_frame_pooling():
    clip = tiny_clip(torch.float64)
    model = TCCLIP(clip, TCConfig(reference="none", prompting="none", prompt="a pic"))
    pool = FramePool(clip, PoolConfig("a pic"))
    names = ["red to blue", "x"]
    model.set_classes(names)
    pool.set_classes(names)
    torch.testing.assert_close(model.eval()(clips())[0], pool.eval()(clips())[0], rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, dict(positions="joint"), dict(reference="all"), dict(merge="kmeans")], ids=str)
def test_a_video_does_not_depend_on_its_batch_mates(settings):
    model, video = make(**settings).eval(), clips(3)
    torch.testing.assert_close(model(video)[0][1:2], model(video[1:2])[0], rtol=0, atol=1e-11)
    assert torch.equal(model(video)[0], model(video)[0])


@torch.no_grad()
def test_order_of_frames():
    """With one position for all frames and an order-free merge, order cannot be seen; with joint positions it can."""
    video, shuffled = clips(2, 4), clips(2, 4)[:, [2, 0, 3, 1]]
    blind = make(frames=4, merge="none").eval()
    seeing = make(frames=4, merge="none", positions="joint").eval()
    torch.testing.assert_close(blind(video)[0], blind(shuffled)[0], rtol=0, atol=1e-11)
    assert (seeing(video)[0] - seeing(shuffled)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("stop", [True, False])
def test_stop_gradient_really_stops(stop):
    """The context tokens, as the vision tower hands them out, get a gradient from the text only without the stop."""
    model, seen = make(stop_gradient=stop).train(), {}

    def remember(module, inputs, outputs):
        seen.update(outputs[1])
        for context in outputs[1].values():
            context.retain_grad()
    model.vision.register_forward_hook(remember)
    logits, _ = model(clips())
    logits.square().sum().backward()
    last = seen[max(seen)]  # nobody but the prompt reads the last block's context
    assert (last.grad is None or float(last.grad.abs().sum()) == 0) == stop
    assert float(model.prompt_layers[0].attn.in_proj_weight.grad.abs().sum()) > 0


@torch.no_grad()
def test_text_is_computed_once_in_eval_and_every_time_in_training():
    model, video, calls = make(), clips(), []
    model.clip.transformer.resblocks[0].register_forward_hook(lambda *_: calls.append(1))
    model.eval()
    first = model(video)[0]
    model(video[:1])
    assert len(calls) == 1
    model.train()
    model(video), model(video)
    assert len(calls) == 3
    model.eval()
    model(video)
    assert len(calls) == 4
    changed = {k: v.flip(0) if k == "vectors" else v for k, v in model.state_dict().items()}
    model.load_state_dict(changed)
    assert (model(video)[0] - first).abs().max() > 1e-9 and len(calls) == 5
    model.float()
    assert model(video.float())[0].dtype == torch.float32 and len(calls) == 6
    model.set_classes(["one", "two"])
    assert model(video.float())[0].shape == (2, 2)


def test_without_classes_the_error_says_so():
    for model in (TCCLIP(tiny_clip(), TCConfig(frames=3, prompt="a pic")), FramePool(tiny_clip(), PoolConfig("a pic"))):
        with pytest.raises(ValueError, match="set_classes"):
            model(clips(dtype=torch.float32))


def test_only_the_contexts_that_the_text_reads_are_projected():
    model = make(prompt_blocks=(0, 1), context_blocks=(-1, 1))
    _, contexts, summaries = model.vision(model.clip.visual, clips())
    blocks = len(model.clip.visual.transformer.resblocks)
    assert set(contexts) == {1, blocks - 1} and set(summaries) == set(range(blocks))


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, dict(prompt_blocks=(0, 1), context_blocks=(-1, 1))], ids=str)
def test_names_and_videos_are_embedded_as_the_model_compares_them(settings):
    model, video = make(**settings).eval(), clips()
    other = ["a", "a much longer name", "green"]
    text, feature = model.encode_names(other, video), model.encode_video(video)
    logits = model(video)[0]
    assert text.shape == (2, 3, 128) and feature.shape == (2, 128)
    assert torch.equal(model(video)[0], logits)  # the classes that were set are still there
    model.set_classes(other)
    cosine = torch.einsum("bce,be->bc", F.normalize(text, dim=-1), F.normalize(feature, dim=-1))
    torch.testing.assert_close(model.clip.logit_scale.exp() * cosine, model(video)[0], rtol=0, atol=1e-12)


@torch.no_grad()
def test_names_without_a_video_keep_the_learned_vectors():
    model, learned = make().eval(), make(prompting="learned").eval()
    learned.vectors.copy_(model.vectors)
    expected = learned.encode_names(NAMES)
    assert torch.equal(model.encode_names(NAMES), expected) and expected.shape == (4, 128)
    assert torch.equal(learned.encode_names(NAMES, clips()), expected)  # here no video is prompted in
    assert not torch.allclose(model.encode_names(NAMES, clips())[0], expected)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("settings", [
    dict(positions="joint"), dict(merge="random"), dict(merge="dpc-knn"), dict(merge="kmeans"),
    dict(reference="neighbour", prompt_blocks=(0,))], ids=str)
def test_export_with_any_batch(settings):
    """After a first call, which keeps the class text, torch.export gives a graph of any batch."""
    clip, video = tiny_clip(vision_layers=2, text_layers=2), clips(5, dtype=torch.float32)
    model = make(dtype=torch.float32, clip=clip, **settings).eval()
    model(video)
    shapes = {"video": {0: torch.export.Dim("batch")}}
    graph = torch.export.export(model, (video[:2],), dynamic_shapes=shapes).module()
    for batch in (1, 3, 5):
        assert torch.equal(graph(video[:batch])[0], model(video[:batch])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(dtype):
    model, exact = make(dtype=torch.float32).to(dtype), make()
    with torch.no_grad():
        logits, _ = model.eval()(clips(dtype=dtype))
        expected, _ = exact.eval()(clips())
    assert logits.dtype == dtype
    tolerance = 1e-3 if dtype == torch.float32 else 2.0  # logits reach e^2; bf16 keeps 8 bits, and may choose other seeds
    assert (logits.double() - expected).abs().max() < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_seeds_are_fp32_under_autocast(dtype):
    """As from the formula in fp32, from the very queries and keys that attention has."""
    torch.manual_seed(0)
    q, keys, bias = torch.randn(6, 2, 1, 64).to(dtype), torch.randn(6, 2, 21, 64).to(dtype), torch.randn(2)
    columns = torch.cat([torch.zeros(2, 17), bias[:, None].expand(2, 4)], dim=1)[:, None]
    A = ((q.float() / 8) @ keys.float().transpose(2, 3) + columns).softmax(dim=-1)
    with torch.autocast("cpu", dtype=dtype):
        scores = seed_scores(q, Seen(keys, keys, 4, bias), patches=16)
    in_fp32 = seed_scores(q.float(), Seen(keys.float(), keys.float(), 4, bias), patches=16)
    assert scores.dtype == torch.float32 and torch.equal(scores, in_fp32)
    torch.testing.assert_close(scores, A[:, :, 0, 1:17].mean(dim=1), rtol=1e-6, atol=1e-7)


def test_groups_are_those_of_fp32_under_autocast():
    """What autocast changes in a block is its tokens; from them, seeds are merged as in fp32."""
    model = make(dtype=torch.float32).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        summaries = model.vision(model.clip.visual, clips(dtype=torch.float32)).summaries
    for summary in summaries.values():
        assert summary.merged.dtype == summary.scores.dtype == summary.sizes.dtype == torch.float32
        order = summary.scores.argsort(dim=-1, descending=True, stable=True)
        assert torch.equal(summary.seeds, order[..., :model.vision.seeds])


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    *({name: value} for name, known in CHOICES.items() for value in known), *(dict(prompting=p) for p in ("video", "learned", "none")),
    dict(local_global_bias=False), dict(stop_gradient=False), dict(reference_blocks=(2, 3)), dict(context_tokens=1),
    dict(seed_ratio=1.0), dict(merge_step=1), dict(reference_blocks=(-1,))], ids=str)
def test_every_ablation_trains(settings):
    """A few steps on two clips lower the loss, and every trainable parameter gets a gradient (DDP needs that)."""
    torch.manual_seed(0)
    model, video, labels = make(dtype=torch.float32, **settings).train(), clips(dtype=torch.float32), torch.tensor([0, 2])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-3), []
    for _ in range(6):
        loss = F.cross_entropy(model(video)[0], labels)
        optimizer.zero_grad()
        loss.backward()
        missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("settings, words", [
    (dict(reference="everything"), "context, class, neighbour, all, none"), (dict(merge="mean"), "dpc-knn"),
    (dict(positions="time"), "joint"), (dict(seed_ratio=0.0), "seed_ratio"),
    (dict(seed_ratio=float("nan")), "seed_ratio"), (dict(reference_blocks=(0,)), "block 0"),
    (dict(context_tokens=0), "context_tokens"), (dict(prompt_blocks=(0, 1)), "pair up"),
    (dict(seed_ratio=0.05), "seed_ratio 0.05 makes no seed of 16 patches"),
    (dict(reference_blocks=(1, 4)), "blocks 0 to 3"), (dict(context_blocks=(-5,)), "context_blocks"),
    (dict(prompt_blocks=(-1, 2), context_blocks=(1, 2)), "name a block twice")])
def test_wrong_settings_say_what_is_right(settings, words):
    with pytest.raises(ValueError, match=words):
        make(**settings)


def test_widths_that_do_not_allow_prompting():
    clip = tiny_clip(embed=192)
    with pytest.raises(ValueError, match="192.*128"):
        TCCLIP(clip, TCConfig(prompt="a pic"))
    model = TCCLIP(clip, TCConfig(prompt="a pic", prompting="learned", context_tokens=4))
    model.set_classes(["a", "b"])
    assert model(clips(dtype=torch.float32))[0].shape == (2, 2)


def test_frame_count_of_joint_positions():
    with pytest.raises(ValueError, match="4 frames"):
        make(positions="joint")(clips(2, 4))


# ---- the released code's figures ---------------------------------------------------------------------------------------

def released_state(weights, arch, layers):
    """A state_dict as the released code saves it, with the synthetic weights of the figures."""
    layout = json.loads((FIGURES / "released_layouts.json").read_text())
    layout = layout["tc tiny T=4" if arch == "tiny" else "tc ViT-B/16 T=8"]
    for name, shape in list(layout.items()):
        for j in range(1, layers):
            layout[name.replace("generation_layer.0.", f"generation_layer.{j}.")] = shape
    openai, state = weights.openai_state_dict(arch), {}
    for name, shape in layout.items():
        plain = name.replace("image_encoder.", "visual.").replace("text_encoder.", "")
        part = next((i for i, p in enumerate("qkv") if f".{p}_proj." in plain), None)
        if part is not None and "visual" in plain:
            whole = openai[plain.replace(f".{'qkv'[part]}_proj.", ".in_proj_")]
            state[name] = whole[part * len(whole) // 3:(part + 1) * len(whole) // 3]
        else:
            state[name] = openai[plain] if plain in openai else weights.tensor(name, shape)
    return state, openai


def released_model(arch, layers=1, wrap="", **settings):
    need_merges()
    state, openai = released_state(weights, arch, layers)
    clip = load_clip(openai, MERGES)
    words = clip.tokenize(["a photo of a"])[0, 1:5]
    state["prompt_learner.ctx"] = clip.token_embedding.weight[words].detach().numpy()
    model = TCCLIP(clip, TCConfig(**settings))
    load_released(model, {wrap + name: value for name, value in state.items()})
    model.set_classes(weights.CLASS_NAMES)
    return model, weights


def released_gradient(name, gradients):
    """Our gradient of the parameter that the released code calls `name`."""
    for old, new in (("image_encoder.", "clip.visual."), ("text_encoder.prompt_generation_layer.", "prompt_layers."),
                     ("text_encoder.", "clip."), ("prompt_learner.ctx", "vectors"), ("logit_scale", "clip.logit_scale")):
        if name.startswith(old):
            ours = new + name[len(old):]
            break
    if ours.endswith("local_global_bias_table"):
        return gradients[f"vision.local_global_bias.{ours.split('.')[4]}"][:, None]
    for i, p in enumerate("qkv"):
        if f".{p}_proj." in ours:
            return gradients[ours.replace(f".{p}_proj.", ".in_proj_")].chunk(3)[i]
    return gradients[ours]


@pytest.mark.parametrize("fixture, settings, layers", [
    ("c_tc_tiny", {}, 1), ("c_tc_tiny_literal", dict(context_blocks=(1,)), 1),
    ("c_tc_tiny_multilevel", dict(prompt_blocks=(0, 1), context_blocks=(0, 1)), 2)])
def test_released_figures(fixture, settings, layers):
    model, weights = released_model("tiny", layers, wrap="module.", frames=4, **settings)
    figures = np.load(FIGURES / f"{fixture}.npz")
    notes = json.loads((FIGURES / f"{fixture}.json").read_text())
    video = torch.from_numpy(weights.video(2, 4, 224))
    logits, _ = model.train()(video)
    np.testing.assert_allclose(logits.detach().numpy(), figures["logits"], rtol=0, atol=1e-9)
    frames, contexts, summaries = model.vision(model.clip.visual, video)
    text = F.normalize(model.encode_text(contexts), dim=-1)
    np.testing.assert_allclose(text.detach().numpy(), figures["text_features"], rtol=0, atol=1e-10)
    if "grad_names" not in figures:
        return
    np.testing.assert_allclose(frames.detach().numpy(), figures["frame_features"], rtol=0, atol=1e-10)
    for l, s in summaries.items():
        assert (s.seeds.sort().values.numpy() == figures["seed_index"][l]).all()
        assert (s.sizes.numpy() == figures["context_sizes"][l]).all()
        np.testing.assert_allclose(s.merged.detach().norm(dim=-1).numpy(), figures["context_norms"][l], rtol=1e-10)
    loss = F.cross_entropy(logits, torch.tensor(notes["labels"]))
    loss.backward()
    assert abs(float(loss.detach()) - figures["loss"]) < 1e-9
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for name, norm, total in zip(figures["grad_names"], figures["grad_norms"], figures["grad_sums"]):
        ours = released_gradient(str(name), gradients)
        assert abs(float(ours.norm()) - norm) <= 1e-8 * norm + 1e-10, name
        assert abs(float(ours.sum()) - total) <= 1e-8 * norm + 1e-10, name
        if f"grad.{name}" in figures:
            np.testing.assert_allclose(ours.numpy(), figures[f"grad.{name}"], rtol=1e-8, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("fixture, settings, layers", [
    ("c_tc_tiny", {}, 1), ("c_tc_tiny_multilevel", dict(prompt_blocks=(0, 1), context_blocks=(0, 1)), 2)])
def test_the_plain_form_equals_the_released_figures(fixture, settings, layers):
    model, weights = released_model("tiny", layers, frames=4, **settings)
    figures = np.load(FIGURES / f"{fixture}.npz")
    video = torch.from_numpy(weights.video(2, 4, 224))
    logits = plain.logits(model, video, plain.prompts(model, weights.CLASS_NAMES))
    np.testing.assert_allclose(logits.numpy(), figures["logits"], rtol=0, atol=1e-9)


@torch.no_grad()
def test_released_start_from_clip_weights():
    """The prompt layer begins as the last text block; the released code copies it through float32, hence the tolerance."""
    need_merges()
    model, _ = released_model("tiny", frames=4)
    fresh = TCCLIP(model.clip, TCConfig(frames=4))
    model.prompt_layers.load_state_dict(fresh.prompt_layers.state_dict())
    logits, _ = model.eval()(torch.from_numpy(weights.video(2, 4, 224)))
    np.testing.assert_allclose(logits.numpy(), np.load(FIGURES / "c_tc_tiny_clipinit.npz")["logits"], atol=1e-6)


@pytest.mark.slow
@torch.no_grad()
def test_released_figures_at_full_size():
    model, weights = released_model("ViT-B/16", frames=8)
    figures = np.load(FIGURES / "d_tc_b16_t8.npz")
    video = torch.from_numpy(weights.video(1, 8, 224))
    frames, contexts, summaries = model.eval().vision(model.clip.visual, video)
    np.testing.assert_allclose(frames.numpy(), figures["frame_features"], rtol=0, atol=1e-10)
    logits = model.clip.logit_scale.exp() * torch.einsum(
        "be,bce->bc", F.normalize(frames.mean(1), dim=-1), F.normalize(model.encode_text(contexts), dim=-1))
    np.testing.assert_allclose(logits.numpy(), figures["logits"], rtol=0, atol=1e-9)
    for l, s in summaries.items():
        assert (s.seeds.sort().values.numpy() == figures["seed_index"][l]).all()
        assert (s.sizes.numpy() == figures["context_sizes"][l]).all()


def test_released_joint_positions():
    """A checkpoint with one position per frame and token loads into a joint model; one of another length is an error."""
    need_merges()
    state, openai = released_state(weights, "tiny", 1)
    model = TCCLIP(load_clip(openai, MERGES), TCConfig(frames=4, positions="joint"))
    state["prompt_learner.ctx"] = model.vectors.detach().numpy()
    joint = np.random.default_rng(0).standard_normal((4, 197, 128))
    for shape in ((4, 197, 128), (1, 4 * 197, 128)):
        load_released(model, state | {"image_encoder.positional_embedding": joint.reshape(shape)})
        assert (model.vision.positions.detach().numpy() == joint).all()
    for rows in (197, 5 * 197, 100):
        with pytest.raises(ValueError, match="vision.positions"):
            load_released(model, state | {"image_encoder.positional_embedding": np.zeros((rows, 128))})


def test_released_errors_list_the_keys():
    need_merges()
    model, _ = released_model("tiny", frames=4)
    state, _ = released_state(weights, "tiny", 1)
    state["prompt_learner.ctx"] = model.vectors.detach().numpy()
    lost = "image_encoder.transformer.resblocks.1.mlp.c_fc.bias"
    with pytest.raises(ValueError, match="resblocks.1.mlp.c_fc.bias"):
        load_released(model, {k: v for k, v in state.items() if k != lost})
    with pytest.raises(ValueError, match="image_encoder_extra"):
        load_released(model, state | {"image_encoder_extra": np.zeros(2)})
    attention, apart = "text_encoder.prompt_generation_layer.0.attn.", dict(state)
    for kind in ("weight", "bias"):
        parts = np.split(np.asarray(apart.pop(f"{attention}in_proj_{kind}")), 3)
        apart |= {f"{attention}{part}_proj.{kind}": value for part, value in zip("qkv", parts)}
    load_released(model, apart)
    with pytest.raises(ValueError, match="k_proj.weight"):
        load_released(model, {k: v for k, v in apart.items() if not k.endswith(".k_proj.weight")})


def test_released_files_tell_their_config():
    layout = json.loads((FIGURES / "released_layouts.json").read_text())
    for name in ("tc tiny T=4", "tc ViT-B/16 T=8"):
        state = {f"module.{key}": np.zeros(shape) for key, shape in layout[name].items()}
        assert released_config(state) == TCConfig()
    state = {key: np.zeros(shape) for key, shape in layout["tc tiny T=4"].items()}
    suffix, positions = "prompt_learner.token_suffix", "image_encoder.positional_embedding"

    def config(**changes):
        return released_config(state | changes)
    assert config(**{suffix: np.zeros((5, 72, 512))}) == TCConfig(text_length=77)
    assert released_config({key: value for key, value in state.items() if key != suffix}) == TCConfig()
    for T, N in ((4, 197), (16, 197), (8, 50), (16, 257), (32, 577), (5, 197)):
        for shape in ((T, N, 128), (1, T * N, 128), (T * N, 128)):
            assert config(**{positions: np.zeros(shape)}) == TCConfig(positions="joint", frames=T)
        assert config(**{positions: np.zeros((N, 128))}) == TCConfig()
    with pytest.raises(ValueError, match="103 rows"):
        config(**{positions: np.zeros((103, 128))})
    layers = {key.replace("layer.0.", "layer.1."): value for key, value in state.items() if "layer.0." in key}
    assert config(**layers) == TCConfig(prompt_blocks=(0, 1), context_blocks=(0, 1))
    third = {"text_encoder.transformer.resblocks.2.ln_1.bias": np.zeros(512)}
    with pytest.raises(ValueError, match="set prompt_blocks and context_blocks"):
        config(**layers, **third)
    given = dict(prompt_blocks=(0, 2), context_blocks=(0, 2))
    assert released_config(state | layers | third, **given) == TCConfig(**given)
    tables = [key for key in state if key.endswith("local_global_bias_table")]
    fewer = {key: value for key, value in state.items() if key not in tables}
    assert released_config(fewer) == TCConfig(local_global_bias=False)
    fewer[tables[-1]] = state[tables[-1]]
    assert released_config(fewer) == TCConfig(reference_blocks=(2,))
