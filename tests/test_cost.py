"""What the models cost, counted on the meta device: no weight is made and nothing is computed."""

from unittest.mock import patch

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import temporal_context
from clip_vit import CLIP, FramePool
from bench_speed import ARCHITECTURES, PAPER_COSTS
from ila import ILA, ILAConfig
from video_prompt import TCCLIP, ClassSide, TCConfig

pytestmark = pytest.mark.slow


def multiply_adds(call):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 2e9


def tc_clip(frames=16, **settings):
    """TC-CLIP B/16 on the meta device, after its words were looked up on an ordinary one."""
    words = CLIP(**ARCHITECTURES["ViT-B/32"] | {"vision_layers": 1, "text_layers": 1}).tokenize(["a pic"])
    with torch.device("meta"):
        clip = CLIP(**ARCHITECTURES["ViT-B/16"])
        clip.tokenize = lambda texts, length=None: words
        return TCCLIP(clip, TCConfig(frames=frames, prompt="a pic", **settings)).eval()


def video_cost(model, trimmed, frames=16):
    """G multiply-adds of the vision tower: as it computes, or plainly, as the papers count (every row of the last block,
    only the products that the formulas have)."""
    video = torch.empty(1, frames, 3, 224, 224, device="meta")
    if trimmed:
        return multiply_adds(lambda: model.vision(model.clip.visual, video))

    def whole():
        visual, context = model.clip.visual, None
        tokens = visual.tokens(video[0])[None]
        for i, block in enumerate(visual.transformer.resblocks):
            tokens, summary = model.vision.run_block(block, i, tokens, context)
            context = summary.context if summary else None
        tokens[:, :, 0] @ visual.proj, context @ visual.proj
    with patch.object(temporal_context, "class_logits", lambda q, keys: q @ keys.transpose(-1, -2)):
        return multiply_adds(whole)


def text_cost(model, length=77):
    """G multiply-adds of one class's prompt, as the papers count it."""
    prompt = torch.empty(1, length, 512, device="meta")

    def run(x):
        for block in model.clip.transformer.resblocks:
            x = block(x, causal=True)
    return multiply_adds(lambda: run(prompt))


def video_text_cost(model, classes):
    """G multiply-adds that a video's prompts add, once what the class set needs is computed."""
    def meta(*shape):
        return torch.empty(*shape, device="meta")
    side = ClassSide(meta(classes, 512), meta(classes, 8, 64), meta(classes, 8),
                     meta(classes, 8, 64), meta(4, 512))
    model.text_cache.keep(side)
    return multiply_adds(lambda: model.encode_text({11: meta(1, 96, 512)}))


def test_the_papers_counts():
    """Untrimmed, with one class of text at 77 tokens: 303 for TC-CLIP ("304"), 291 for the lightweight form."""
    full, light = tc_clip(), tc_clip(reference_blocks=(8, 9, 10, 11))
    for name, model in (("TC-CLIP", full), ("lightweight", light)):
        print(f"{name}: {video_cost(model, trimmed=False) + text_cost(model):.1f} G")
    assert abs(text_cost(full) - 2.98) < 0.05
    assert abs(video_cost(full, trimmed=False) - 300.0) < 0.3  # the released code, measured
    assert abs(video_cost(light, trimmed=False) + text_cost(light) - 291) < 1


# The paper's last row on SSv2, L/14@336 with 3723 G, is left out: no module of constant cost per position reaches it beside
# the others, its 3x3 convolutions see 24 x 24 patches (4227 G).
ILA_COSTS = {key[1:]: cost for key, cost in PAPER_COSTS.items() if key[0] == "ILA"} | {
    ("ViT-B/16", 8, 174): 214, ("ViT-B/16", 16, 174): 438, ("ViT-L/14", 8, 174): 907}  # (model, frames, SSv2's classes)


def ila_cost(name, frames, num_classes=None):
    """G multiply-adds of ILA for a video and, as the paper counts, one class of text at 77 tokens; on the meta device."""
    counts, sizes = [], ARCHITECTURES[name]
    for layers in (1, 2):  # all blocks cost the same
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            clip = CLIP(**sizes | {"vision_layers": layers})
            model = ILA(clip, ILAConfig(frames=frames, num_classes=num_classes)).eval()
            model.tokens = torch.empty(1, 77)
            model.text_cache.keep(torch.empty(1, sizes["embed"]))
            model(torch.empty(1, frames, 3, sizes["resolution"], sizes["resolution"]))
            prompt = torch.empty(1, 77, sizes["text_width"])
            for block in clip.transformer.resblocks if num_classes is None else ():
                prompt = block(prompt, causal=True)
        counts.append(counter.get_total_flops() / 2e9)
    return counts[0] + (sizes["vision_layers"] - 1) * (counts[1] - counts[0])


@pytest.mark.parametrize("key", ILA_COSTS, ids=str)
def test_the_papers_counts_of_ila(key):
    cost = ila_cost(*key)
    print(f"{key}: {cost:.1f} G, in the paper {ILA_COSTS[key]}: {cost / ILA_COSTS[key] - 1:+.1%}")
    assert abs(cost / ILA_COSTS[key] - 1) < 0.03


def test_a_video_at_400_classes():
    """At most 284 G, where the released code needs 782; what 400 classes add to a video is about 1 G."""
    model = tc_clip()
    text = video_text_cost(model, 400)
    assert text < 1.2 and video_cost(model, trimmed=True) + text < 284
    assert video_cost(model, trimmed=True) < video_cost(model, trimmed=False) - 15


def test_frame_pooling_computes_the_class_row_alone_in_its_last_block():
    with torch.device("meta"):
        clip = CLIP(**ARCHITECTURES["ViT-B/16"])
    model, images = FramePool(clip), torch.empty(16, 3, 224, 224, device="meta")
    trimmed = multiply_adds(lambda: model.clip.encode_image(images))

    def whole():
        x = clip.visual.tokens(images)
        for block in clip.visual.transformer.resblocks:
            x = block(x)
        x[:, 0] @ clip.visual.proj
    assert abs(multiply_adds(whole) - 281.0) < 0.3 and 261 < trimmed < 263


@pytest.mark.parametrize("name", ["ViT-B/32", "ViT-L/14", "ViT-L/14@336px"])
def test_every_published_architecture_builds(name):
    """Shapes fit for every OpenAI ViT; nothing about B/16 is written into the code."""
    sizes = ARCHITECTURES[name] | {"text_layers": 1, "vision_layers": 2}
    words = CLIP(**sizes | {"vision_layers": 1}).tokenize(["a pic"])
    with torch.device("meta"):
        clip = CLIP(**sizes)
        clip.tokenize = lambda texts, length=None: words
        model = TCCLIP(clip, TCConfig(frames=3, prompt="a pic", positions="joint", seed_ratio=0.29)).eval()
        frames, contexts, _ = model.vision(clip.visual, torch.empty(2, 3, 3, *2 * [sizes["resolution"]]))
    assert frames.shape == (2, 3, sizes["embed"])
    expected = min(96, 3 * int((sizes["resolution"] // sizes["patch"]) ** 2 * 0.29))
    assert contexts[1].shape == (2, expected, sizes["embed"])
