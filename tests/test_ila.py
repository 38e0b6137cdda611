"""ILA against naive loops, and what it promises. (test_ila_released.py has the released figures.)"""

from functools import lru_cache
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_clip

from clip_vit import load_clip
from ila import (ILA, RIVALS, ILAConfig, WindowAttention, assignment, earth_movers_distance, frame_pairs,
                 interactive_mask)

NAMES = ["red to blue", "blue to red", "a dog"]


def lively(module, seed=0):
    """The module with every tensor that starts at zero or one shaken, and batch statistics that are not 0 and 1."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if name.startswith("clip.") or not tensor.is_floating_point() or name == "delta":
                continue
            noise = torch.randn(tensor.shape, generator=rng, dtype=torch.float64).to(tensor)
            scale = 0.5 if name.endswith("point.weight") else 0.1
            tensor += scale * (noise.abs() if name.endswith("running_var") else noise)
    return module


def shaken(module):
    """The module with matrices of deviation 0.1 and biases of 0."""
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
        elif parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return module


def toy(seed=0, dtype=torch.float64, **changes):
    """A lively tiny ILA in eval mode, with its classes set."""
    torch.manual_seed(seed)
    model = lively(ILA(tiny_clip(dtype), ILAConfig(**{"frames": 4, **changes})), seed)
    model.set_classes(NAMES)
    return model.eval()


def clips(batch=2, frames=4, dtype=torch.float64, seed=1):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(batch, frames, 3, 32, 32, generator=rng, dtype=torch.float64).to(dtype)


def stray(model):
    """Parameters that should have a gradient and have none."""
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


# ---- masks and pairs -------------------------------------------------------------------------------------------------

def naive_mask(point, grid):
    def f(s):
        return 1 if abs(s) <= 0.25 else max(0, 1 - 1.5 * (abs(s) - 0.25))
    x, y = point
    e = [2 * i / (grid - 1) - 1 for i in range(grid)]
    return np.array([[f(e[i] - y) * f(e[j] - x) for j in range(grid)] for i in range(grid)])


def test_mask_of_a_point():
    for grid in (4, 9, 14):
        for point in ((0.0, 0.0), (0.3, -0.6), (-0.75, 0.75)):
            mask = interactive_mask(torch.tensor(point).double(), grid)
            assert np.abs(mask.numpy() - naive_mask(point, grid)).max() < 1e-6
            mirrored = interactive_mask(-torch.tensor(point).double(), grid)
            assert torch.allclose(mask, mirrored.flip(0, 1), atol=1e-12)  # symmetric about the point
    ramp = interactive_mask(torch.zeros(2).double(), 25)[12]  # steps of 1/12 from the middle
    assert (ramp[9:16] > 1 - 1e-12).all() and ramp[16] < 1 and ramp[12 + 10] > 0.1  # |s| <= 0.25; 10/12
    assert ramp[12 + 11] < 1e-12 and ramp[12 + 12] == 0  # 11/12; 1
    point = torch.tensor([0.1, -0.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: interactive_mask(p, 7), point)
    (interactive_mask(point, 7) * torch.randn(7, 7).double()).sum().backward()
    assert (point.grad != 0).all()


def test_pairs():
    pairs, own = frame_pairs(4, "adjacent")
    assert pairs.tolist() == [[0, 1], [1, 2], [2, 3]] and own.tolist() == [[0, 0], [1, 0], [2, 0], [2, 1]]
    pairs, own = frame_pairs(4, "first")
    assert pairs.tolist() == [[1, 0], [2, 0], [3, 0]] and own.tolist() == [[0, 1], [0, 0], [1, 0], [2, 0]]
    pairs, own = frame_pairs(5, "middle")
    assert pairs.tolist() == [[0, 2], [1, 2], [3, 2], [4, 2]]
    for frames in (2, 3, 8):
        for align in ("adjacent", "first", "middle"):
            pairs, own = frame_pairs(frames, align)
            assert [int(pairs[p, s]) for p, s in own.tolist()] == list(range(frames))  # each frame speaks for itself


# ---- the aligned block against loops ---------------------------------------------------------------------------------

@pytest.mark.parametrize("align", ["adjacent", "first", "middle"])
def test_block_equals_a_loop_over_pairs(align):
    model = toy(align=align, frames=5)
    aligner, block = model.aligners[0], model.clip.visual.transformer.resblocks[0]
    B, T, g, D = 2, 5, 4, 128
    x = torch.randn(B, T, 1 + g * g, D, dtype=torch.float64)
    with torch.no_grad():
        got, loss, points = aligner(x, block, None)
        pairs, own = frame_pairs(T, align)
        aligned, losses = {}, []
        for i, (left, right) in enumerate(pairs.tolist()):
            for b in range(B):
                F_1, F_2 = x[b:b + 1, left:left + 1, 1:], x[b:b + 1, right:right + 1, 1:]
                p = aligner.point_net(F_1, F_2)[0, 0]
                assert torch.allclose(p, points[b, i], atol=1e-12)
                a = [frame[0, 0] * torch.from_numpy(naive_mask(q.tolist(), g)).view(-1, 1)
                     for frame, q in zip((F_1, F_2), p)]  # the aligned features themselves
                aligned[b, i, 0], aligned[b, i, 1] = a
                losses.append(1 - F.cosine_similarity(a[0].mean(0), a[1].mean(0), dim=0))
        assert abs(float(loss) - float(torch.stack(losses).mean())) < 1e-12
        for b in range(B):
            for t in range(T):
                mi = aligned[b, *own[t].tolist()].mean(dim=0, keepdim=True)  # (1,D)
                y, z = block.ln_1(x[b, t]), block.ln_1(torch.cat([x[b, t], mi]))
                h = x[b, t] + block.attn(y, z)
                h = h + block.mlp(block.ln_2(h))
                assert torch.allclose(h, got[b, t], atol=1e-12)
    assert got.shape == x.shape  # the token left before the MLP


def test_uses_of_aligned_features():
    x = torch.randn(1, 4, 17, 128, dtype=torch.float64)
    outs = {}
    for use in ("mi", "add", "concat"):
        model = toy(use=use)
        aligner, block = model.aligners[0], model.clip.visual.transformer.resblocks[0]
        with torch.no_grad():
            outs[use], _, points = aligner(x, block, None)
            pair, side = frame_pairs(4, "adjacent")[1].T
            a = interactive_mask(points[:, pair, side], 4).flatten(2).unsqueeze(-1) * x[:, :, 1:]  # (1,T,P,D)
            if use == "add":
                want = block(x + torch.cat([torch.zeros_like(x[:, :, :1]), a], dim=2))
            else:
                extra = a if use == "concat" else a.mean(dim=2, keepdim=True)
                h = x + block.attn(block.ln_1(x), block.ln_1(torch.cat([x, extra], dim=2)))
                want = h + block.mlp(block.ln_2(h))
        assert torch.allclose(outs[use], want, atol=1e-12)


def test_identical_frames_have_no_alignment_loss_when_points_agree():
    model = toy()
    frame = torch.randn(1, 1, 3, 32, 32, dtype=torch.float64)
    for aligner in model.aligners:  # the second point becomes the first
        aligner.point_net.point.weight.data[2:], aligner.point_net.point.bias.data[2:] = \
            aligner.point_net.point.weight.data[:2].clone(), aligner.point_net.point.bias.data[:2].clone()
    with torch.no_grad():
        assert abs(float(model(frame.expand(1, 4, 3, 32, 32))[1])) < 1e-12
        assert float(model(clips())[1]) > 1e-3


def test_window_attention_equals_a_loop():
    torch.manual_seed(0)
    layer = WindowAttention(128, 64).double()
    shaken(layer)
    maps = torch.randn(2, 128, 3, 4, 4, dtype=torch.float64)[:, :, 0]
    with torch.no_grad():
        got = layer(maps)
        padded = F.pad(maps, (1, 1, 1, 1))
        for i in range(4):
            for j in range(4):
                window = padded[:, :, i:i + 3, j:j + 3].flatten(2).mT  # (n,9,c)
                want = layer.attn(window[:, 4:5], window)[:, 0]
                assert torch.allclose(got[:, :, i, j], want, atol=1e-12)
    assert got.shape == (2, 64, 4, 4)


# ---- matching, and the rivals ----------------------------------------------------------------------------------------

def test_assignment_is_the_cheapest():
    rng = np.random.default_rng(0)
    for n in (1, 2, 4, 6):
        for cost in (rng.normal(size=(n, n)), rng.integers(0, 3, (n, n)).astype(float)):
            rows, found = np.arange(n), assignment(cost)
            assert sorted(found) == list(rows)
            best = min(cost[rows, list(p)].sum() for p in permutations(range(n)))
            assert abs(cost[rows, found].sum() - best) < 1e-12
    shuffle = rng.permutation(40)
    assert (assignment(-np.eye(40)[shuffle]) == shuffle).all()


def test_earth_movers_distance():
    a = torch.randn(30, 5, dtype=torch.float64)
    assert earth_movers_distance(a, a[torch.randperm(30)]) < 1e-6
    assert abs(earth_movers_distance(a, a + torch.tensor([0, 3, 0, 4, 0])) - 5) < 1e-9  # a translation is optimal
    assert abs(earth_movers_distance(a, 2 * a) - earth_movers_distance(2 * a, a)) < 1e-9


def rival_block(name, frames=4):
    torch.manual_seed(0)
    rival = lively(RIVALS[name](128, frames).double())
    return rival, shaken(tiny_clip(torch.float64).visual.transformer.resblocks[0])


def test_temporal_shift_equals_a_loop():
    rival, block = rival_block("shift")
    x = torch.randn(1, 4, 17, 128, dtype=torch.float64)
    with torch.no_grad():
        got = rival(x, block, None)[0]
        y = block.ln_1(x)
        for t in range(4):
            z = y[:, t].clone()
            z[..., :16] = y[:, t - 1, :, :16] if t > 0 else 0
            z[..., 16:32] = y[:, t + 1, :, 16:32] if t < 3 else 0
            h = x[:, t] + block.attn(z, z)
            assert torch.allclose(got[:, t], h + block.mlp(block.ln_2(h)), atol=1e-12)


def test_hungarian_alignment_follows_moving_patches():
    rival, block = rival_block("hungarian")
    divided, _ = rival_block("divided")
    divided.load_state_dict(rival.state_dict())
    still = torch.randn(1, 1, 17, 128, dtype=torch.float64).expand(1, 4, 17, 128)
    paths = [torch.cat([torch.zeros(1, dtype=int), 1 + torch.randperm(16)]) for _ in range(4)]
    moving = torch.stack([still[:, t, path] for t, path in enumerate(paths)], dim=1)
    with torch.no_grad():
        want = divided(still, block, None)[0]  # patches that stand still need no matching
        got = rival(moving, block, None)[0]
    for t, path in enumerate(paths):
        assert torch.allclose(got[:, t], want[:, t, path], atol=1e-10)


def test_messages_reach_every_frame():
    rival, block = rival_block("xclip")
    x = torch.randn(1, 4, 17, 128, dtype=torch.float64)
    changed = x.clone()
    changed[:, 3, 0] += torch.randn(128)  # the last frame's class token
    with torch.no_grad():
        difference = (rival(x, block, None)[0] - rival(changed, block, None)[0]).abs().amax(dim=(0, 2, 3))
    assert (difference > 1e-6).all()


def test_average_pooling_cannot_see_order_and_ila_can():
    video = clips(1)
    with torch.no_grad():
        for rival, blind in (("average", True), ("none", True), ("ila", False), ("shift", False)):
            model = toy(rival=rival)
            there, back = model.encode(video)[0], model.encode(video.flip(1))[0].flip(1)
            assert torch.allclose(there, back, atol=1e-10) == blind, rival


@torch.no_grad()
@pytest.mark.parametrize("changes", [dict(num_classes=3), *(dict(num_classes=3, rival=name) for name in RIVALS)], ids=str)
def test_a_tower_without_text(changes):
    """An image classifier's tower takes the place of CLIP's, if there is a linear head."""
    tower = load_clip({key: value for key, value in tiny_clip().state_dict().items()
                       if key.startswith("visual.") and "ln_pre" not in key and key != "visual.proj"})
    model = ILA(tower, ILAConfig(frames=4, **changes)).eval()
    model.set_classes(NAMES)
    assert model(clips(dtype=torch.float32))[0].shape == (2, 3)
    assert model.encode_video(clips(dtype=torch.float32)).shape == (2, 128)
    with pytest.raises(ValueError, match="text"):
        ILA(tower, ILAConfig(frames=4, rival=changes.get("rival", "ila")))


ABLATIONS = [dict(align="first"), dict(align="middle"), dict(blocks="1-1"), dict(blocks="2-3"), dict(blocks="4-4"),
             dict(operator="window"), dict(use="add"), dict(use="concat"), *(dict(rival=name) for name in RIVALS),
             dict(video_prompt=False), dict(multi_frame=False), dict(num_classes=3),
             dict(num_classes=3, operator="window"), dict(form="released"), dict(form="released-ssv2", num_classes=3)]


@lru_cache(None)
def default_logits():
    with torch.no_grad():
        return toy(dtype=torch.float32)(clips(dtype=torch.float32))[0]


@pytest.mark.slow
@pytest.mark.parametrize("changes", ABLATIONS, ids=str)
def test_every_ablation_runs_and_matters(changes):
    video = clips(dtype=torch.float32)
    model = toy(dtype=torch.float32, **changes)
    with torch.no_grad():
        logits, loss = model(video)
        assert logits.shape == (2, 3) and loss.shape == () and logits.isfinite().all()
        assert (logits - default_logits()).abs().max() > 1e-4
    model.train()
    logits, loss = model(video)
    (F.cross_entropy(logits, torch.tensor([0, 2])) + loss).backward()
    assert stray(model) == [] and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    model.eval()
    model(video)[0].sum().backward()


def test_configuration_errors():
    for wrong, words in (
            (dict(align="last"), "adjacent, first, middle"), (dict(frames=1), "at least 2"),
            (dict(form="released-ssv2"), "num_classes"), (dict(form="released", num_classes=4), "num_classes"),
            (dict(form="released", rival="none"), "rival"), (dict(form="released", blocks="1-3"), "blocks")):
        with pytest.raises(ValueError, match=words):
            ILAConfig(**wrong)
    clip = tiny_clip()
    for blocks in ("0-1", "3-2", "10-12", "first", "all-3"):
        with pytest.raises(ValueError, match="blocks"):
            ILA(clip, ILAConfig(blocks=blocks))
    with pytest.raises(ValueError, match="set_classes"):
        ILA(clip, ILAConfig(frames=4)).eval()(clips(dtype=torch.float32))
    with pytest.raises(ValueError, match="takes"):
        toy()(clips(frames=5))
    with pytest.raises(ValueError, match="3 class names"):
        toy(num_classes=4)
    with pytest.raises(ValueError, match="list of strings"):
        toy(num_classes=3).set_classes("abc")


def test_sizes_that_a_form_cannot_take():
    odd = tiny_clip(embed=96)  # no multiple of the head width
    for changes in (dict(), dict(multi_frame=False), dict(num_classes=3), dict(form="released")):
        with pytest.raises(ValueError, match="joint width 96 .* multi_frame=false"):
            ILA(odd, ILAConfig(frames=4, **changes))
    plain = ILA(odd, ILAConfig(frames=4, multi_frame=False, video_prompt=False)).eval()
    plain.set_classes(NAMES)
    assert plain(clips(dtype=torch.float32))[0].shape == (2, 3)
    linear = ILA(odd, ILAConfig(frames=4, multi_frame=False, num_classes=3)).eval()
    assert linear(clips(dtype=torch.float32))[0].shape == (2, 3)
    for resolution in (8, 16, 24):
        small = tiny_clip(resolution=resolution)
        for changes in (dict(form="released"), dict(form="released-ssv2", num_classes=3)):
            with pytest.raises(ValueError, match="form=paper"):
                ILA(small, ILAConfig(frames=4, **changes))


@pytest.mark.parametrize("changes", [dict(), dict(num_classes=3), dict(operator="window"), dict(form="released"),
                                     dict(form="released-ssv2", num_classes=3)], ids=str)
def test_gradients_lie_in_memory_as_their_parameters_do(changes):
    """Else every process of a DDP run warns, and copies."""
    model = toy(dtype=torch.float32, **changes).train()
    logits, loss = model(clips(dtype=torch.float32))
    (logits.sum() + loss).backward()
    differ = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.stride() != p.stride()]
    assert differ == []


# ---- the model: modes, text, what trains -----------------------------------------------------------------------------

def test_eval_repeats_bitwise_changes_nothing_and_videos_do_not_meet():
    model, video = toy(), clips(3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        first, again = model(video), model(video)
        alone = torch.cat([model(v[None])[0] for v in video])
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert torch.allclose(first[0], alone, atol=1e-10)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_training_uses_batch_statistics_and_moves_them():
    model, video = toy(), clips(3)
    norm = model.aligners[0].point_net.layers[0][0]
    mean = norm.running_mean.clone()
    with torch.no_grad():
        evaluated = model(video)[0]
        trained = model.train()(video)[0]
        assert norm.num_batches_tracked == 1 and not torch.equal(norm.running_mean, mean)
        assert (evaluated - trained).abs().max() > 1e-6


def test_disturbance_is_a_buffer_that_decays():
    model = toy()
    assert abs(float(model.state_dict()["delta"]) - 0.2) < 1e-12
    for epoch, delta in ((0, 0.2), (29, 0.2), (30, 0.1), (32, 0.025)):
        model.set_epoch(epoch)
        assert abs(float(model.delta) - delta) < 1e-12
    resumed = toy(seed=1)
    resumed.load_state_dict(model.state_dict())
    assert float(resumed.delta) == float(model.delta)
    video = clips()
    with torch.no_grad():
        model.train(), resumed.set_epoch(0), resumed.train()
        assert (model(video)[0] - resumed(video)[0]).abs().max() > 1e-9  # nine points count in training
        model.eval(), resumed.eval(), resumed.load_state_dict({**model.state_dict(), "delta": torch.tensor(0.2)})
        assert torch.equal(model(video)[0], resumed(video)[0])  # and never in evaluation


def test_what_trains():
    kinetics, ssv2 = toy(), toy(num_classes=3)
    for name, parameter in kinetics.named_parameters():
        text = name.startswith("clip.") and not name.startswith("clip.visual.") and name != "clip.logit_scale"
        assert parameter.requires_grad != text, name
    assert all(p.requires_grad != name.startswith("clip.") for name, p in ssv2.named_parameters())
    assert {name.split(".")[0] for name in kinetics.state_dict()} == {
        "clip", "aligners", "integration", "frame_positions", "video_prompt", "delta"}


def test_training_starts_at_clip():
    """Before training every mask is in the middle, and the released and divided forms are CLIP's tower itself."""
    clip, video = tiny_clip(torch.float64), clips()
    with torch.no_grad():
        want = clip.encode_image(video.flatten(0, 1)).unflatten(0, (2, 4)).mean(dim=1)
        for changes in (dict(form="released"), dict(rival="divided"), dict(rival="hungarian"), dict(rival="none")):
            model = ILA(clip, ILAConfig(frames=4, multi_frame=False, video_prompt=False, **changes)).eval()
            x = model.encode(video)[0][:, :, 0]
            assert torch.allclose((clip.visual.ln_post(x) @ clip.visual.proj).mean(dim=1), want, atol=1e-10), changes
        assert all((p == 0).all() for p in ILA(clip, ILAConfig(frames=4)).eval().interactive_points(video))


def count_text(model, monkeypatch):
    calls, encode = [], model.clip.encode_text
    monkeypatch.setattr(model.clip, "encode_text", lambda tokens: calls.append(1) or encode(tokens))
    return calls


def test_class_embeddings_are_kept_until_something_can_have_changed_them(monkeypatch):
    model, video = toy(), clips()
    calls = count_text(model, monkeypatch)
    with torch.no_grad():
        for drop in (lambda: None, lambda: model.load_state_dict(model.state_dict()), lambda: model.train(),
                     lambda: model.eval(), lambda: model.set_classes(NAMES[::-1]), lambda: model.float().double()):
            drop(), calls.clear()
            model(video), model(video)
            assert len(calls) == 1
    model.train()
    model.clip.text_projection.requires_grad_(True)  # the text tower is made to train: nothing is kept
    calls.clear()
    for _ in range(2):
        model(video)[0].sum().backward()
    assert len(calls) == 2 and model.clip.text_projection.grad is not None


def test_other_sizes_dtypes_and_fewest_frames():
    for resolution, patch, frames in ((40, 8, 2), (48, 16, 3)):
        clip = tiny_clip(resolution=resolution, patch=patch, vision_width=192, vision_layers=2, embed=64)
        for changes in (dict(), dict(align="first"), dict(num_classes=3)):
            model = ILA(clip, ILAConfig(frames=frames, **changes)).eval()
            model.set_classes(NAMES)
            assert model(torch.randn(1, frames, 3, resolution, resolution))[0].shape == (1, 3)
    model = toy(dtype=torch.float32).bfloat16()
    logits, loss = model(clips(dtype=torch.bfloat16))
    assert logits.dtype == loss.dtype == torch.bfloat16 and logits.isfinite().all()
    with torch.no_grad():
        close = toy(dtype=torch.float32).double()(clips())[0] - toy(dtype=torch.float32)(clips(dtype=torch.float32))[0]
        assert close.abs().max() < 1e-3


def test_embedding_of_names_and_videos():
    """What encode_video and encode_names give is what forward compares."""
    video = clips()
    with torch.no_grad():
        for changes, shape in ((dict(), (2, 3, 128)), (dict(video_prompt=False), (2, 3, 128))):
            model = toy(**changes)
            embedded, text = model.encode_video(video), model.encode_names(NAMES, video)
            assert text.shape == shape
            cosines = torch.einsum("be,bce->bc", F.normalize(embedded, dim=-1), F.normalize(text, dim=-1))
            assert torch.allclose(model.clip.logit_scale.exp() * cosines, model(video)[0], atol=1e-10)
            assert torch.equal(model.encode_names(NAMES), model.class_text())
        several = ["a video of {}.", "{}"]
        apart = [F.normalize(model.encode_names(NAMES, templates=[one]), dim=-1) for one in several]
        assert torch.allclose(model.encode_names(NAMES, templates=several), sum(apart) / 2, atol=1e-12)
        model.set_classes(NAMES, several)
        assert torch.allclose(model.class_text(), sum(apart) / 2, atol=1e-12)
    with pytest.raises(ValueError, match="linear head"):
        toy(num_classes=3).encode_names(NAMES)


@pytest.mark.parametrize("changes", [dict(), dict(form="released"), dict(rival="hungarian"), dict(num_classes=3)], ids=str)
def test_points_masks_and_loss_stay_whole_under_autocast(changes):
    """bf16 has three digits: points, masks, matching and 1 - cos are computed in float32 all the same."""
    model, video = toy(dtype=torch.float32, **changes), clips(dtype=torch.float32)
    with torch.no_grad():
        want, (logits, _) = model.encode(video), model(video)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, (rough, _) = model.encode(video), model(video)
    assert got.x.dtype == got.loss.dtype == torch.float32 and all(p.dtype == torch.float32 for p in got.points)
    assert abs(got.loss - want.loss) < 0.01 * want.loss.clamp(min=1)
    assert all((p - q).abs().max() < 0.15 for p, q in zip(got.points, want.points))
    assert (rough - logits).abs().max() < 0.1
    if changes == {}:  # the other points lie at the end of their reach
        assert not torch.equal(got.points[0], got.points[0].bfloat16().float())  # not rounded at the end


def test_masked_means_in_autocast_are_float32_ones():
    """The aligned block's own part, given the same points, does not depend on autocast at all."""
    model, x = toy(dtype=torch.float32), torch.randn(1, 4, 17, 128)
    aligner, block = model.aligners[0], model.clip.visual.transformer.resblocks[0]
    points = torch.rand(1, 3, 2, 2) - 0.5
    aligner.point_net.forward = lambda first, second: points
    with torch.no_grad():
        want = aligner(x, block, None).loss
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(aligner(x, block, None).loss, want)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("changes", [dict(), dict(form="released"), dict(num_classes=3), dict(rival="xclip")], ids=str)
def test_export_with_any_batch(changes):
    """torch.export keeps the batch free; what it gives is bit-equal. (Hungarian matching leaves PyTorch: no export.)"""
    model = toy(dtype=torch.float32, **changes)
    model(clips(dtype=torch.float32))  # computes and keeps the class text, which is a constant of the program
    program = torch.export.export(model, (clips(2, dtype=torch.float32),),
                                  dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    for batch in (1, 5):
        video = clips(batch, dtype=torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(program.module()(video), model(video)))


def test_points_for_pictures():
    model, video = toy(blocks="2-3"), clips()
    found = model.interactive_points(video)
    assert [p.shape for p in found] == [(2, 4, 2)] * 2 and all((p.abs() <= 0.75).all() for p in found)
    with torch.no_grad():
        points = model.encode(video)[2][0]
    assert torch.equal(found[0][:, :3], points[:, :, 0]) and torch.equal(found[0][:, 3], points[:, -1, 1])
    assert toy(rival="none").interactive_points(video) == []
