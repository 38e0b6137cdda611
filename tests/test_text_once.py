"""The text once per optimiser step: gradients equal the plain form's, which computes it for every micro-batch."""

import contextlib

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import tiny_clip
from torch.nn.parallel import DistributedDataParallel

from clip_vit import Block, FramePool, PoolConfig, TextCache, text_once
from video_prompt import TCCLIP, TCConfig

NAMES = ["red to blue", "green_to_cyan", "OneTwo", "x"]
METHODS = {
    "frame pooling": lambda clip: FramePool(clip, PoolConfig("a pic")),
    "tc": lambda clip: TCCLIP(clip, TCConfig(frames=3, context_tokens=5, prompt="a pic")),
    "tc, gradient into the vision tower": lambda clip: TCCLIP(clip, TCConfig(
        frames=3, context_tokens=5, prompt="a pic", stop_gradient=False)),
    "tc, two levels": lambda clip: TCCLIP(clip, TCConfig(
        frames=3, context_tokens=5, prompt="a pic", prompt_blocks=(1, 2), context_blocks=(1, 3))),
    "tc, learned": lambda clip: TCCLIP(clip, TCConfig(
        frames=3, context_tokens=5, prompt="a pic", prompting="learned")),
}


def make(method, dtype=torch.float64, checkpointing=False):
    torch.manual_seed(0)
    model = METHODS[method](tiny_clip(dtype)).to(dtype)
    model.set_classes(NAMES)
    for block in model.modules():
        if isinstance(block, Block):
            block.checkpointing = checkpointing
    return model.train()


def batches(rank=0, dtype=torch.float64):
    """Three micro-batches of two videos with labels."""
    rng = torch.Generator().manual_seed(rank)
    return [(torch.randn(2, 3, 3, 32, 32, generator=rng, dtype=torch.float64).to(dtype),
             torch.randint(len(NAMES), (2,), generator=rng)) for _ in range(3)]


def gradients(model, micro_batches, wrapped=None, scale=1.0):
    """One step's gradients in the shared form."""
    wrapped = wrapped or model
    with text_once(model) as text:
        for i, (video, labels) in enumerate(micro_batches, 1):
            text.last = i == len(micro_batches)
            alone = isinstance(wrapped, DistributedDataParallel) and not text.last
            with wrapped.no_sync() if alone else contextlib.nullcontext():
                text.backward(scale * F.cross_entropy(wrapped(video)[0], labels))
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def plain_gradients(model, micro_batches):
    for video, labels in micro_batches:
        F.cross_entropy(model(video)[0], labels).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(found, expected, tolerance=1e-12):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=tolerance, atol=tolerance,
                                   msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_text_once_equals_the_plain_form(method, checkpointing):
    model, plain = make(method, checkpointing=checkpointing), make(method)
    calls = []
    model.clip.transformer.resblocks[0].ln_1.register_forward_hook(lambda *_: calls.append("text"))
    found = gradients(model, batches())
    assert calls.count("text") == 1 + checkpointing  # computed again in the one backward pass
    assert_equal(found, plain_gradients(plain, batches()))
    assert all(cache.once is None for cache in model.modules() if isinstance(cache, TextCache))


@pytest.mark.parametrize("method", METHODS)
def test_a_scaled_loss_scales_all_gradients(method):
    """As fp16 scaling does: 2^16 times the loss gives exactly 2^16 times the gradients."""
    found, scaled = gradients(make(method), batches()), gradients(make(method), batches(), scale=2.0**16)
    assert all(torch.equal(scaled[name], 2**16 * found[name]) for name in found)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["frame pooling", "tc"])
def test_autocast_adds_gradients_up_in_fp32(method):
    """In bf16 the two forms differ by rounding only, and the shared one is no further from fp32."""
    exact = plain_gradients(make(method, torch.float32), 8 * batches(dtype=torch.float32))
    shared, plain = make(method, torch.float32), make(method, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(shared, 8 * batches(dtype=torch.float32))
        expected = plain_gradients(plain, 8 * batches(dtype=torch.float32))

    def error(some):
        return sum(float((some[name] - exact[name]).norm()**2) for name in exact)**0.5
    assert error(found) < 1.2 * error(expected)


def test_other_loops_are_as_before():
    """Outside of text_once every forward pass computes its own text; an error inside leaves nothing."""
    model = make("tc")
    with pytest.raises(KeyError), text_once(model) as text:
        text.last = False
        model(batches()[0][0])
        raise KeyError
    assert_equal(plain_gradients(model, batches()), plain_gradients(make("tc"), batches()))


CASES = [("frame pooling", False), ("tc", False), ("tc", True)]


def work(rank, folder):
    """One of two processes: the gradients of its second step in each case."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    found = []
    for method, checkpointing in CASES:
        model = make(method, checkpointing=checkpointing)
        wrapped = DistributedDataParallel(model, broadcast_buffers=False)
        for _ in range(2):  # the second step meets DDP's rebuilt buckets
            model.zero_grad()
            step = gradients(model, batches(rank), wrapped)
        found.append(step)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(work, (tmp_path,), nprocs=2)
    first, second = torch.load(tmp_path / "0.pt"), torch.load(tmp_path / "1.pt")
    for (method, _), one, other in zip(CASES, first, second, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
        summed = plain_gradients(make(method), batches(0) + batches(1))
        assert_equal(one, {name: gradient / 2 for name, gradient in summed.items()})
