"""Augmentation acts on all frames alike, does nothing when told so, and mixing keeps its pairs and its sums."""
import colorsys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from data import recolour, resize, augment, mix_draw, mix_pairs, soft_targets

few = settings(deadline=None, max_examples=40)
seeds = st.integers(0, 2**32 - 1)
sides = st.integers(8, 40)
EVERYTHING = dict(flip=0.5, jitter=0.8, grey=0.2, shift=0.125)
NOTHING = dict(scales=(1,))


def noise(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def generator(seed):
    return np.random.default_rng(seed)


# ---------------------------------------------------------------- augmentation


@few
@given(seeds, st.integers(1, 4), sides, sides, st.integers(4, 40))
def test_shape_type_and_repeatability(seed, frames, height, width, size):
    clip = noise(frames, 3, height, width)
    kept = clip.clone()
    first, second = (augment(clip, size, generator(seed), **EVERYTHING) for _ in range(2))
    assert first.shape == (frames, 3, size, size) and first.dtype == torch.uint8
    assert torch.equal(first, second) and torch.equal(clip, kept)


@few
@given(seeds, sides, sides)
def test_all_frames_get_the_same_transform(seed, height, width):
    still = noise(1, 3, height, width).expand(5, -1, -1, -1)
    clip = augment(still, 16, generator(seed), **EVERYTHING)
    assert (clip == clip[:1]).all()
    moving = noise(5, 3, height, width)  # contrast refers to the clip's mean; all else is done to each frame by itself
    changes = dict(flip=0.5, jitter=1.0, grey=0.2, shift=0.125, strengths=(0.4, 0, 0.2, 0.1))
    whole = augment(moving, 16, generator(seed), **changes)
    alone = torch.cat([augment(frame[None], 16, generator(seed), **changes) for frame in moving])
    assert (whole.int() - alone.int()).abs().max() <= 1


@few
@given(seeds, sides)
def test_no_op_changes_are_the_identity(seed, side):
    clip = noise(2, 3, side, side)
    assert torch.equal(augment(clip, side, generator(seed), **NOTHING), clip)
    no_strength = dict(jitter=1.0, strengths=(0, 0, 0, 0))
    assert torch.equal(augment(clip, side, generator(seed), **NOTHING, **no_strength), clip)


@few
@given(seeds, sides)
def test_flipping_twice_is_the_identity(seed, side):
    clip = noise(2, 3, side, side)
    once = augment(clip, side, generator(seed), flip=1.0, **NOTHING)
    assert torch.equal(once, clip.flip(-1))
    assert torch.equal(augment(once, side, generator(seed), flip=1.0, **NOTHING), clip)


def test_probabilities_are_kept():
    clip = noise(1, 3, 8, 8)
    flips = [torch.equal(augment(clip, 8, generator(seed), flip=0.3, **NOTHING), clip.flip(-1)) for seed in range(600)]
    results = [augment(clip, 8, generator(seed), grey=0.3, **NOTHING) for seed in range(600)]
    greys = [bool((result == result[:, :1]).all()) for result in results]
    assert abs(np.mean(flips) - 0.3) < 0.08 and abs(np.mean(greys) - 0.3) < 0.08  # 4 standard deviations


def test_crops_take_every_scale_and_place():
    """On coordinates as colours, the crop is read off the result: sides from the list, one step apart, five places."""
    height, width, scales = 48, 64, (1, 0.75, 0.5)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    clip = torch.stack([y, x, x], 0)[None].byte()
    seen = set()
    for seed in range(400):
        crop = augment(clip, 96, generator(seed), scales=scales)[0]
        (top, bottom), (left, right) = crop[0].aminmax(), crop[1].aminmax()
        seen.add((int(top), int(left), int(bottom - top) + 1, int(right - left) + 1))
    steps = [(48, 48), (48, 36), (36, 48), (36, 36), (36, 24), (24, 36), (24, 24)]
    places = [(0, 0), (0, 1), (1, 0), (1, 1), (0.5, 0.5)]
    assert seen == {(int((height - h) * v), int((width - w) * u), h, w) for h, w in steps for v, u in places}


def test_each_pair_of_sides_comes_as_often_as_the_others():
    """[released] four scales give ten pairs, each drawn with 10 %."""
    clip, rng = torch.zeros(1, 3, 100, 120), generator(0)
    counts = Counter(tuple(data.random_crop(clip, data.SCALES, rng).shape[-2:]) for _ in range(10000))
    pairs = [(100, 100), (100, 88), (88, 100), (88, 88), (88, 75), (75, 88), (75, 75), (75, 66), (66, 75), (66, 66)]
    assert sorted(counts) == sorted(pairs)
    assert all(abs(count - 1000) < 150 for count in counts.values())  # five standard deviations


@few
@given(seeds, sides, st.sampled_from([0.0, 0.125, 0.3]))
def test_shift_moves_and_repeats_the_border(seed, side, shift):
    clip = noise(2, 3, side, side)
    moved = augment(clip, side, generator(seed), shift=shift, **NOTHING)
    reach, here = int(shift * side), np.arange(side)
    shifted = {(dy, dx): clip[..., np.clip(here + dy, 0, side - 1), :][..., np.clip(here + dx, 0, side - 1)]
               for dy in range(-reach, reach + 1) for dx in range(-reach, reach + 1)}
    assert any(torch.equal(moved, other) for other in shifted.values())


# ---------------------------------------------------------------- colours


def test_each_colour_change_does_what_it_says():
    clip = noise(2, 3, 9, 9) // 2
    pixels = clip.double()
    luma = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    grey = (pixels * luma[:, None, None]).sum(1, keepdim=True)
    for factor in (0.6, 1.0, 1.4):
        for got, wanted in ((recolour(clip, brightness=factor), factor * pixels),
                            (recolour(clip, contrast=factor), factor * pixels + (1 - factor) * grey.mean()),
                            (recolour(clip, saturation=factor), factor * pixels + (1 - factor) * grey)):
            assert (got - wanted.clamp(0, 255)).abs().max() <= 0.51
    assert torch.equal(recolour(clip, hue=1 / 3), clip.roll(1, 1))  # red becomes green, green blue, blue red
    assert torch.equal(recolour(clip, hue=1.0), clip)


def test_hue_turns_as_hsv_does():
    red = torch.tensor([200, 50, 50], dtype=torch.uint8).view(1, 3, 1, 1)
    for hue in (-0.1, -0.05, 0.05, 0.1):
        turned = colorsys.rgb_to_hsv(*(recolour(red, hue=hue).flatten() / 255).tolist())[0]
        assert abs((turned - hue + 0.5) % 1 - 0.5) < 0.02


@few
@given(seeds, st.floats(0.6, 1.4), st.floats(-0.5, 0.5))
def test_grey_stays_grey(seed, saturation, hue):
    clip = noise(1, 1, 5, 5, seed=seed).expand(2, 3, 5, 5)
    assert (recolour(clip, 1, 1, saturation, hue).int() - clip.int()).abs().max() <= 1


def test_resizing_keeps_flat_colours_and_its_own_size():
    flat = torch.full((2, 3, 20, 30), 77, dtype=torch.uint8)
    assert (resize(flat, 7, 50) == 77).all() and resize(flat, 20, 30) is flat


# ---------------------------------------------------------------- mixing


def is_box(rows):
    """Whether the zeros of a mask (R,R) fill a rectangle, and all else is one."""
    down, right = (rows == 0).any(1).nonzero(), (rows == 0).any(0).nonzero()
    expected = torch.ones_like(rows)
    if len(down):
        expected[down[0]:down[-1] + 1, right[0]:right[-1] + 1] = 0
    return torch.equal(rows, expected)


@few
@given(seeds, st.integers(1, 64), st.sampled_from([(0.8, 1.0), (0.8, 0.0), (0.0, 1.0), (0.0, 0.0)]))
def test_the_target_keeps_the_share_that_the_clip_keeps(seed, size, alphas):
    own = mix_draw(generator(seed), size, *alphas)
    assert torch.equal(own, mix_draw(generator(seed), size, *alphas)) and own.shape == (size, size)
    flat = bool((own == own[0, 0]).all()) and 0 <= own[0, 0] <= 1
    assert flat if not alphas[1] else is_box(own) or alphas[0] and flat
    if not any(alphas):
        assert (own == 1).all()
    video = torch.arange(2.0).view(2, 1, 1, 1, 1).expand(2, 2, 3, size, size)
    mixed, targets = mix_pairs(video, torch.eye(2), own[None])
    share = own.mean().item()
    assert mixed[0].mean().item() == pytest.approx(1 - share, abs=1e-5)
    assert targets[0].tolist() == pytest.approx([share, 1 - share], abs=1e-6)


def test_switch_chooses_between_the_two():
    for switch in (0.0, 0.3, 1.0):
        cuts = [bool((mix_draw(generator(seed), 32, switch=switch) == 1).any()) for seed in range(600)]
        assert abs(np.mean(cuts) - switch) < 0.08
    shares = np.array([mix_draw(generator(seed), 1, cutmix=0).item() for seed in range(2000)])
    assert abs(shares.mean() - 0.5) < 0.03 and abs(shares.var() - 1 / (4 * 2.6)) < 0.01  # Beta(0.8, 0.8)


@few
@given(seeds, st.integers(1, 7))
def test_pairs_never_cross(seed, batch):
    """Against a loop over the clips, and any pair alone, as a batch may be dealt out in even parts."""
    rng = generator(seed)
    own = torch.stack([mix_draw(rng, 8) for _ in range(0, batch, 2)])
    video = torch.rand(batch, 2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    targets = soft_targets(torch.from_numpy(rng.integers(0, 5, batch)), 5, 0.1)
    kept = video.clone(), targets.clone()
    mixed, soft = mix_pairs(video, targets, own)
    assert torch.equal(video, kept[0]) and torch.equal(targets, kept[1])
    assert mixed.shape == video.shape and torch.allclose(soft.sum(1), torch.ones(batch))
    for i in range(batch):
        j, keep = i ^ 1, own[i // 2]
        if j == batch:  # a last odd clip
            assert torch.equal(mixed[i], video[i]) and torch.equal(soft[i], targets[i])
            continue
        assert torch.allclose(mixed[i], keep * video[i] + (1 - keep) * video[j], atol=1e-6)
        assert torch.allclose(soft[i], keep.mean() * targets[i] + (1 - keep.mean()) * targets[j], atol=1e-6)
    for i in range(0, batch - 1, 2):
        alone, alone_soft = mix_pairs(video[i:i + 2], targets[i:i + 2], own[i // 2:i // 2 + 1])
        assert torch.equal(mixed[i:i + 2], alone) and torch.equal(soft[i:i + 2], alone_soft)


@few
@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.sampled_from([0.0, 0.1, 0.3]))
def test_soft_targets(labels, smoothing):
    targets = soft_targets(torch.tensor(labels), 7, smoothing)
    assert targets.shape == (len(labels), 7) and torch.allclose(targets.sum(1), torch.ones(len(labels)))
    assert targets.argmax(1).tolist() == labels and targets.min().item() == pytest.approx(smoothing / 7)
