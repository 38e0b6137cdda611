"""ILA, implicit learnable alignment (Tu et al., ICCV 2023): CLIP's image tower, in which each frame
is aligned with the next one before every block.

    patches F_t, F_{t+1} of two frames -> PointNet -> a point p in each frame -> masks m(p)
    MI token of frame t = mean over space of m(p_t) . F_t
    CLIP's block on frame t, with the MI token as one more key and value

MI stands for mutual information, what two frames share. Sections, in reading order:

    masks and losses; two frames -> two points; the aligned block    the paper's method
    heads; configuration; the model                                  the paper's model
    the released form; rivals; what stands before a block            variants
    other hosts: TimeSformer, EVL; released files                    the rest

Who wants only the paper's method stops at the variants. What trains: everything outside `clip.`;
without `num_classes` also CLIP's image tower and logit_scale; with `finetune` and in TimeSformer
the image tower; never the text tower.

Letters as in clip_vit, and: g x g = P the patch grid, P patches, points (x, y) in [-1, 1].
"""

import copy
import math
import re
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from clip_vit import (HEAD_WIDTH, Attention, Block, QuickGELU, TextCache, class_features,
                      class_tokens, cosine_logits, from_timm, full_precision, knob, no_string,
                      require_text)

FLAT = 0.25  # [released] half width of a mask's flat middle
SLOPE = 1.5  # [released] how fast a mask falls beside it
REACH = 0.75  # [released] points are tanh * 0.75
DISTURBANCE = 0.2  # [released] distance of the nine training points
DECAY_EPOCH = 29  # [released] the disturbance halves in every epoch after this one
CHANNELS = 128  # of PointNet's maps


# ---- masks and losses ----------------------------------------------------------------------------

def interactive_mask(points, grid, delta=None):
    """Masks of points: (...,2) -> (...,g,g) in [0, 1], rows are y, columns are x. [paper]

    With `delta`, as in training, the mean of nine masks around each point. [released]
    """
    # m[i,j] = f(e_i - p_y) f(e_j - p_x),  e_i = 2i/(g-1) - 1  [paper; constants: released]
    # f(s) = 1 if |s| <= 0.25 else max(0, 1 - 1.5(|s| - 0.25))
    # In training: the mean of m over the points p + delta {-1,0,1} x {-1,0,1}. A mean of products
    # over all pairs of offsets is the product of two means over three offsets [ours, exact].
    if delta is None:
        offsets = points.new_zeros(1)
    else:
        offsets = delta * torch.arange(-1, 2, device=points.device)
    p = points.unsqueeze(-1) + offsets  # (...,2,3), or (...,2,1) without delta
    e = torch.linspace(-1, 1, grid, dtype=p.dtype, device=p.device)  # (g,)
    s = e - p.unsqueeze(-1)  # (...,2,3,g)
    f = (1 - SLOPE * (s.abs() - FLAT)).clamp(0, 1).mean(dim=-2)  # (...,2,g)
    x, y = f.unbind(-2)  # (...,g) each
    return y.unsqueeze(-1) * x.unsqueeze(-2)


def alignment_loss(first, second):
    """L_align of both frames' pooled aligned features, (B,T-1,D) each -> a scalar. [paper]"""
    # L_align = mean over pairs of 1 - cos(first, second)
    return (1 - F.cosine_similarity(first, second, dim=-1)).mean()


def frame_pairs(frames, align):
    """Which frames are aligned with which: two tensors of integers.

    `pairs` (T-1,2): the two frame numbers of each pair. `own` (T,2): where frame t finds its own
    aligned features, as (pair, side). `align` is one of
    adjacent       pairs (t, t+1); the last frame takes the second side of the last pair [paper]
    first, middle  pairs (t, reference) [paper, Table 6]; the reference frame takes the second side
                   of the pair of the frame before it, frame 0 that of frame 1's [ours]
    """
    if align == "adjacent":
        pairs = [(t, t + 1) for t in range(frames - 1)]
        left = frames - 1  # the frame that is first in no pair
    else:
        left = 0 if align == "first" else frames // 2
        pairs = [(t, left) for t in range(frames) if t != left]
    own = [(pair, 0) for pair in range(frames - 1)]
    own.insert(left, (max(left - 1, 0), 1))
    return torch.tensor(pairs), torch.tensor(own)


# ---- two frames -> two points --------------------------------------------------------------------

def start_normal(module):
    """Weights normal with deviation 0.02, biases zero [ours]. Returns the module."""
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    return module


def start_zero(module):
    """All parameters zero: the layer does nothing when training starts. Returns the module."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def conv3x3(c_in, c_out, groups=1):
    return nn.Conv2d(c_in, c_out, 3, padding=1, groups=groups, bias=False)


def norm_relu(channels):
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())


class PointNet(nn.Module):
    """Two frames' patches -> a point in each. The paper does not give it; this has its cost [ours].

    Kinetics: a 1x1 layer, a 3x3 one per channel, pooling, a 3x3 one. SSv2, twice as wide: a 3x3
    layer, two 3x3 ones, pooling, a 3x3 one [paper: "more convolutions"].
    `local(c_in, c_out, groups)` makes a layer that looks at 3x3 windows of a map (n,c_in,g,g).
    """

    def __init__(self, width, local=conv3x3, ssv2=False):
        super().__init__()
        if ssv2:
            kernel, wide = 3, 2 * CHANNELS
            middle = [local(wide, wide), norm_relu(wide), local(wide, CHANNELS)]
        else:
            kernel, wide = 1, CHANNELS
            middle = [local(wide, CHANNELS, groups=CHANNELS)]
        # The first layer's two halves. Checkpoints call them A and B: no letters of this file.
        self.A = nn.Conv2d(width, wide, kernel, padding="same", bias=False)  # for frame t
        self.B = nn.Conv2d(width, wide, kernel, padding="same", bias=False)  # for frame t + 1
        self.layers = nn.Sequential(
            norm_relu(wide), *middle, norm_relu(CHANNELS), nn.MaxPool2d(2, ceil_mode=True),
            local(CHANNELS, CHANNELS), norm_relu(CHANNELS))
        self.point = start_zero(nn.Linear(CHANNELS, 4))  # both points start in the middle
        # Patches arrive as (P,D), which as maps is "channels last": gradients have that layout too,
        # and DDP wants a parameter and its gradient in one layout.
        self.to(memory_format=torch.channels_last)

    def forward(self, first, second):
        """Patches of the pairs' two frames, (B,T-1,P,D) each -> a point in both, (B,T-1,2,2)."""
        # g([F_t; F_{t+1}]): the first layer of the concatenated maps is A F_t + B F_{t+1}
        h = self.A(as_maps(first)) + self.B(as_maps(second))  # (B*(T-1),c,g,g)
        h = self.layers(h).amax(dim=(2, 3))  # (B*(T-1),c)
        with full_precision(h.device):
            points = REACH * self.point(h.to(self.point.weight.dtype)).tanh()  # (B*(T-1),4)
        return points.view(*first.shape[:2], 2, 2)


def as_maps(patches):
    """Patches (B,T,P,D) -> maps (B*T,D,g,g)."""
    grid = math.isqrt(patches.shape[2])
    return patches.flatten(0, 1).mT.unflatten(2, (grid, grid))


# ---- the aligned block ---------------------------------------------------------------------------

class Aligned(NamedTuple):
    """What every aligner returns. An aligner is a module that is called with (x, CLIP's block,
    disturbance) and runs the block on x, aligned in its own way."""

    x: torch.Tensor  # (B,T,N,D) after the block
    loss: torch.Tensor | float = 0.0  # L_align, a scalar
    points: torch.Tensor | None = None  # (B,T-1,2,2) the points of each pair


def run_block(block, x, extra=None):
    """CLIP's block on each frame of x (B,T,N,D). `extra` (B,T,n,D) are further keys and values.

    PointNet is not run in here: with checkpointing it would run twice, and so would its batch norm.
    """
    if extra is not None:
        extra = extra.flatten(0, 1)  # fused attention wants one batch axis
    return block(x.flatten(0, 1), extra=extra).view_as(x)


class Encoded(NamedTuple):
    """What a tower of aligned blocks makes of videos."""

    x: torch.Tensor  # (B,T,N,D) after the last block; from a host the video's feature
    loss: torch.Tensor  # weight * sum of the blocks' L_align [paper]
    points: list  # (B,T-1,2,2) of each block that aligns


def run_blocks(blocks, aligners, x, delta, weight):
    """All blocks of a tower, each with its aligner, on x (B,T,N,D) -> Encoded."""
    loss, points = x.new_zeros(()), []
    for block, aligner in zip(blocks, aligners):
        aligned = aligner(x, block, delta)
        x = aligned.x
        loss = loss + weight * aligned.loss
        if aligned.points is not None:
            points.append(aligned.points)
    return Encoded(x, loss, points)


class Alignment(nn.Module):
    """The aligned block. [paper, section 3.2; `use` other than "mi": Table 9]"""

    def __init__(self, width, grid, config, local=conv3x3):
        super().__init__()
        self.grid, self.use = grid, config.use
        self.point_net = PointNet(width, local, ssv2=config.more_convolutions)
        pairs, own = frame_pairs(config.frames, config.align)
        self.register_buffer("pairs", pairs, persistent=False)  # (T-1,2)
        self.register_buffer("own", own, persistent=False)  # (T,2)

    def forward(self, x, block, delta):
        """x (B,T,N,D); `delta` is the disturbance of the points while training, else None."""
        first, second = x[:, self.pairs[:, 0], 1:], x[:, self.pairs[:, 1], 1:]  # (B,T-1,P,D)
        points = self.point_net(first, second)  # (B,T-1,2,2)
        with full_precision(x.device):  # 16 bits would blur the masks and round the loss
            masks = interactive_mask(points, self.grid, delta).flatten(3)  # (B,T-1,2,P)
            # Aligned features a = m . F; MI token = mean over space of a [paper]. The mean is
            # computed as the product m F / P, so that a is never built.
            sums = torch.cat([masks[:, :, :1] @ first, masks[:, :, 1:] @ second], dim=2)
            mi = sums / first.shape[2]  # (B,T-1,2,D)
            loss = alignment_loss(mi[:, :, 0], mi[:, :, 1])

        pair, side = self.own.T
        mi = mi[:, pair, side].unsqueeze(2)  # (B,T,1,D)
        mask = masks[:, pair, side].unsqueeze(3)  # (B,T,P,1)
        if self.use == "mi":  # one more key and value
            x = run_block(block, x, mi)
        elif self.use == "concat":  # P more keys and values
            x = run_block(block, x, mask * x[:, :, 1:])
        else:  # "add": a is added to the patches
            x = run_block(block, x + F.pad(mask, (0, 0, 1, 0)) * x)
        return Aligned(x, loss, points)


# ---- heads ---------------------------------------------------------------------------------------

class TextDecoderLayer(nn.Module):
    """x + CA(LN x, v), then x + MLP(LN x): text x (B,C,E) looks at the video's v (B,P,E).

    [paper; key names: released]
    """

    def __init__(self, embed):
        super().__init__()
        self.norm1 = nn.LayerNorm(embed)
        self.norm3 = nn.LayerNorm(embed)
        self.q_proj = nn.Linear(embed, embed, bias=False)
        self.k_proj = nn.Linear(embed, embed, bias=False)
        self.v_proj = nn.Linear(embed, embed, bias=False)
        self.proj = nn.Linear(embed, embed)
        self.mlp = nn.Sequential(
            nn.Linear(embed, 4 * embed), QuickGELU(), nn.Identity(), nn.Linear(4 * embed, embed))

    def forward(self, x, v):
        q = split_heads(self.q_proj(self.norm1(x)))  # (B,H,C,d)
        k, v = split_heads(self.k_proj(v)), split_heads(self.v_proj(v))  # (B,H,P,d)
        heads = F.scaled_dot_product_attention(q, k, v)  # (B,H,C,d)
        x = x + self.proj(heads.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm3(x))


def split_heads(x):
    """(B,n,E) -> (B,H,n,d)."""
    return x.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2)


class VideoSpecificText(nn.Module):
    """t' = t + alpha Dec(t, v), v = LN(mean over frames of LN(patches) W_vp). [paper]"""

    def __init__(self, width, embed):
        super().__init__()
        self.patch_norm = nn.LayerNorm(width)
        self.norm = nn.LayerNorm(embed)
        self.patch_proj = nn.Parameter(width ** -0.5 * torch.randn(width, embed))  # W_vp
        self.decoder = nn.ModuleList(start_normal(TextDecoderLayer(embed)) for _ in range(2))
        self.alpha = nn.Parameter(torch.full((embed,), 0.1))

    def forward(self, text, patches):
        """Class embeddings (C,E), last patches (B,T,P,D) -> (B,C,E). Nothing is normalised."""
        v = self.norm(self.patch_norm(patches).mean(dim=1) @ self.patch_proj)  # (B,P,E)
        x = text.expand(v.shape[0], -1, -1)  # (B,C,E)
        for layer in self.decoder:
            x = layer(x, v)
        return text + self.alpha * x


# ---- configuration -------------------------------------------------------------------------------

CHOICES = {
    "form": ("paper", "released", "released-ssv2"),
    "align": ("adjacent", "first", "middle"),
    "operator": ("convolution", "window"),
    "use": ("mi", "add", "concat"),
    "host": ("clip", "timesformer", "evl"),
    "rival": ("ila", "none", "average", "divided", "shift", "hungarian", "xclip"),
}


@dataclass(frozen=True)
class ILAConfig:
    """ILA's settings. Tables are the paper's. With a released form, all settings from `align` to
    `rival` keep their defaults."""

    frames: int = knob(8, "T")
    form: str = knob("paper", "paper, released, released-ssv2")
    num_classes: int | None = knob(
        None, "SSv2's recipe: more convolutions, frozen CLIP, a linear head of so many classes")
    align: str = knob("adjacent", "adjacent, first, middle: the partner of each frame (Table 6)")
    blocks: str = knob("all", "which blocks align: all, or a range such as 4-6, from 1 (Table 7)")
    operator: str = knob("convolution", "convolution, window: how PointNet looks around (Table 8)")
    use: str = knob("mi", "mi, add, concat: how a block uses the aligned features (Table 9)")
    rival: str = knob("ila", "ila, none, average, divided, shift, hungarian, xclip (Table 4)")
    host: str = knob("clip", "clip, timesformer, evl: what the frames are aligned in (Table 3)")
    video_prompt: bool = knob(True, "video-specific text (Table 11)")
    multi_frame: bool = knob(True, "multi-frame integration; false: the plain mean over frames")
    align_weight: float = knob(1.0, "of the alignment loss [released]; 0.01 for tiny models")
    finetune: bool = knob(
        False, "with num_classes: the tower trains too, with Kinetics' convolutions (Table 10)")
    decoder_layers: int = knob(4, "host=evl: last blocks read")
    decoder_mlp: int = knob(4, "host=evl: its MLP, in widths D")

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
        if self.frames < 2:
            raise ValueError(f"frames is {self.frames}; alignment needs at least 2")
        if self.form != "paper":
            self.check_released_form()
        if self.host != "clip":
            self.check_host()
        if self.finetune and (self.num_classes is None or self.host != "clip"):
            raise ValueError("finetune=true is for host=clip with num_classes; without num_classes "
                             "the tower trains anyway")

    def check_host(self):
        if self.form != "paper" or self.num_classes is None:
            raise ValueError(f"host {self.host!r} needs num_classes and form 'paper'")
        if self.host == "evl" and self.rival not in ("ila", "none"):
            raise ValueError(f"host 'evl' takes rival=ila or rival=none, not {self.rival!r}")
        if self.host == "timesformer" and self.rival == "divided" and self.blocks != "all":
            raise ValueError("TimeSformer itself (rival=divided) has blocks=all")

    @property
    def more_convolutions(self):
        """Whether this is SSv2's recipe: a linear head on a frozen CLIP, aligned with more care."""
        return self.num_classes is not None and self.host == "clip" and not self.finetune

    def check_released_form(self):
        if (self.form == "released") != (self.num_classes is None):
            raise ValueError(f"num_classes is {self.num_classes}; form 'released' takes none, "
                             "and form 'released-ssv2' needs it")
        for name in ("align", "blocks", "operator", "use", "rival"):
            default = getattr(ILAConfig, name)
            if getattr(self, name) != default:
                raise ValueError(f"form {self.form!r} has no other {name} than {default!r}; only "
                                 "form 'paper' has")


def block_range(blocks, layers):
    """The blocks, counted from 1, of "all" or of a range such as "4-6". Raises ValueError."""
    if blocks == "all":
        return range(1, layers + 1)
    first, _, last = blocks.partition("-")
    if first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last) <= layers:
        return range(int(first), int(last) + 1)
    raise ValueError(f"blocks is {blocks!r}; it must be 'all' or a range within 1-{layers}, "
                     "such as 1-3")


# ---- the model -----------------------------------------------------------------------------------

def check_video(video, frames):
    if video.dim() != 5 or video.shape[1] != frames:
        raise ValueError(f"video of shape {tuple(video.shape)}; "
                         f"this model takes (B,{frames},3,R,R)")


def first_rows(visual, video, frames):
    """Normalised video (B,T,3,R,R) -> the first block's rows (B,T,N,D). Raises ValueError."""
    check_video(video, frames)
    x = visual.ln_pre(visual.tokens(video.flatten(0, 1)) + visual.positional_embedding)
    return x.unflatten(0, video.shape[:2])


def disturbance(epoch):
    """The disturbance of the training points. It halves in epoch 30 and in each one after it,
    counted from 0."""
    return DISTURBANCE * 0.5 ** max(0, epoch - DECAY_EPOCH)


def is_text(name):
    """Whether a parameter of CLIP belongs to its text tower."""
    return not name.startswith("visual.") and name != "logit_scale"


def linear_head(width, classes):
    linear = start_normal(nn.Linear(width, classes))
    return nn.Sequential(nn.LayerNorm(width), nn.Dropout(0.5), linear)


class AlignedModel(nn.Module):
    """What ILA on CLIP and in other hosts share. `encode`: video (B,T,3,R,R) -> Encoded."""

    def __init__(self, clip, config):
        super().__init__()
        self.clip, self.config, self.names = clip, config, None
        delta = torch.tensor(DISTURBANCE, dtype=clip.visual.class_embedding.dtype)
        self.register_buffer("delta", delta)

    def set_epoch(self, epoch):
        """Sets the disturbance of the training points; epochs count from 0."""
        self.delta.fill_(disturbance(epoch))

    def check_head_names(self, names):
        """Raises ValueError unless these are the classes of the linear head."""
        outputs = self.config.num_classes
        too_wide = self.config.form == "released-ssv2" and len(names) < outputs
        if self.names not in (None, names) or len(names) != outputs and not too_wide:
            raise ValueError(f"{len(names)} class names for a linear head of {outputs} classes: it "
                             "knows only those that it was trained on")
        if too_wide and self.names is None:
            warnings.warn(f"the released head has {outputs} outputs; only the first {len(names)} "
                          "are used, one for each class", stacklevel=3)

    @torch.no_grad()
    def interactive_points(self, video):
        """For pictures: the point of each frame, (B,T,2) for each aligned block, first to last."""
        _, own = frame_pairs(self.config.frames, self.config.align)
        pair, side = own.T
        return [points[:, pair, side] for points in self.encode(video).points]


class ILA(AlignedModel):
    """CLIP with aligned frames, multi-frame integration, video-specific text or a linear head."""

    def __init__(self, clip, config=ILAConfig()):
        super().__init__(clip, config)
        if config.host != "clip":
            raise ValueError(f"host {config.host!r} is built by make_ila(clip, config)")
        embed = clip.visual.embed
        check_sizes(clip.visual, config)
        self.aligners = make_aligners(clip.visual, config)
        if config.multi_frame:
            self.integration = start_normal(Block(embed))
            self.frame_positions = nn.Parameter(0.02 * torch.randn(1, config.frames, embed))
        else:
            self.integration = self.frame_positions = None
        self.head = self.video_prompt = None
        if config.num_classes is not None:
            self.head = linear_head(embed, config.num_classes)
        else:
            require_text(clip, "ILA without num_classes")
            if config.video_prompt:
                self.video_prompt = VideoSpecificText(clip.visual.width, embed)
        self.register_buffer("tokens", None, persistent=False)  # (n,C,L) of n templates
        self.text_cache = TextCache(clip)
        self.used_outputs = config.num_classes
        self.to(clip.visual.class_embedding)  # its device and dtype
        clip.requires_grad_(False)
        clip.visual.requires_grad_(self.head is None or config.finetune)
        if self.head is None:
            clip.logit_scale.requires_grad_(True)

    def set_classes(self, names, templates=("{}",)):
        """Class names as in the dataset's files; the text is the bare name, or `templates`' text.

        A linear head knows only the classes that it was trained on, so that it takes names once.
        SSv2's released heads have 400 outputs, of which 174 are used [released]: the others are
        left out, with a warning. Raises ValueError.
        """
        names = list(no_string(names))
        if self.head is None:
            self.tokens = class_tokens(self.clip, names, templates)
            self.text_cache.drop()
        else:
            self.check_head_names(names)
            self.used_outputs = len(names)
        self.names = names

    def class_text(self):
        """Class embeddings (C,E), not normalised; kept even in training, as the tower is frozen."""
        if self.tokens is None:
            raise ValueError("no classes yet: call set_classes(names) first")
        trains = any(p.requires_grad for name, p in self.clip.named_parameters() if is_text(name))
        return self.text_cache(lambda: class_features(self.clip, self.tokens), frozen=not trains)

    def encode(self, video):
        """Normalised video (B,T,3,R,R) -> Encoded."""
        visual = self.clip.visual
        x = first_rows(visual, video, self.config.frames)  # (B,T,N,D)
        delta = self.delta if self.training else None
        return run_blocks(visual.transformer.resblocks, self.aligners, x, delta,
                          self.config.align_weight)

    def integrate(self, x):
        """Last block's rows (B,T,N,D) -> the video's feature (B,E), not normalised."""
        feature = frames = self.clip.visual.project(x[:, :, 0])  # (B,T,E)
        if self.integration is not None:  # mean over t of Block(f + position) + f [paper]
            feature = self.integration(frames + self.frame_positions) + frames
        return feature.mean(dim=1)

    def encode_video(self, video):
        """The way to embed videos: normalised (B,T,3,R,R) -> features (B,E), not normalised."""
        return self.integrate(self.encode(video).x)

    def encode_names(self, names, video=None, templates=("{}",)):
        """The way to embed class names: C names -> features (C,E), not normalised.

        With a `video` (B,T,3,R,R), the names as that video sees them (B,C,E). Cosines with
        encode_video are what forward compares. Raises ValueError for a model with a linear head.
        """
        if self.head is not None:
            raise ValueError("this model has a linear head and no text: it cannot embed names")
        text = class_features(self.clip, class_tokens(self.clip, names, templates))  # (C,E)
        if video is None:
            return text
        if self.video_prompt is None:
            return text.expand(video.shape[0], -1, -1)  # (B,C,E)
        return self.video_prompt(text, self.encode(video).x[:, :, 1:])  # (B,C,E)

    def forward(self, video):
        """Normalised video (B,T,3,R,R) -> logits (B,C), and the weighted alignment loss."""
        x, loss, _ = self.encode(video)
        feature = self.integrate(x)
        if self.head is not None:
            logits = self.head(F.normalize(feature, dim=-1))  # (B,outputs)
            return logits[:, :self.used_outputs], loss
        text = self.class_text()  # (C,E)
        if self.video_prompt is not None:
            text = self.video_prompt(text, x[:, :, 1:])  # (B,C,E)
        return cosine_logits(feature, text, self.clip.logit_scale), loss


# ---- the released form ---------------------------------------------------------------------------

def over_frames(first, second):
    """Features of the pairs' two frames, (B,T-1,...) each -> of the frames (B,T,...). [released]"""
    # a_0 = first_0,  a_t = (first_t + second_{t-1}) / 2,  a_{T-1} = second_{T-2}
    middle = (first[:, 1:] + second[:, :-1]) / 2
    return torch.cat([first[:, :1], middle, second[:, -1:]], dim=1)


def conv_norm_relu(c_in, c_out, kernel=3, groups=1):
    conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, groups=groups)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU())


class SeparableConv(nn.Module):
    """3x3 on each channel, then 1x1 over all. [released key names]"""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.depthwise_conv = conv_norm_relu(c_in, c_in, groups=c_in)
        self.pointwise_conv = conv_norm_relu(c_in, c_out, kernel=1)

    def forward(self, maps):
        return self.pointwise_conv(self.depthwise_conv(maps))


class ReleasedAlignment(nn.Module):
    """What the public code computes instead of the paper's block, under its key names. [released]

    u = LN_m(W_m x); aligned features a = masks . u; interactive features I of the points' maps;
    CLIP's block on x + W_a a + W_i I.
    """

    def __init__(self, width, grid, config):
        super().__init__()
        self.grid, c = grid, CHANNELS
        self.message_fc = nn.Linear(width, width)  # W_m
        self.message_ln = nn.LayerNorm(width)
        if config.form == "released-ssv2":
            first = conv_norm_relu(2 * width, 2 * c)  # three layers of the sequence below
        else:
            first = [SeparableConv(2 * width, 2 * c)]  # one of its layers
        self.interactive_block = nn.Sequential(*first, *conv_norm_relu(2 * c, 2 * c))
        self.prediction_block = nn.Sequential(
            *conv_norm_relu(2 * c, c), nn.MaxPool2d(2), *conv_norm_relu(c, c), nn.MaxPool2d(2),
            nn.AdaptiveMaxPool2d(1), nn.Flatten(2),
            nn.Conv1d(c, c // 2, 1, groups=2), nn.ReLU(),
            start_zero(nn.Conv1d(c // 2, 4, 1, groups=2)), nn.Tanh())
        self.conv = nn.Conv3d(c, c, (3, 1, 1), padding=(1, 0, 0))  # over time
        self.fc = nn.Linear(c, width)
        self.temporal_skip_align_fc = start_zero(nn.Linear(width, width))  # W_a
        self.temporal_skip_fc = start_zero(nn.Linear(width, width))  # W_i
        for convolutions in (self.interactive_block, self.prediction_block):
            convolutions.to(memory_format=torch.channels_last)  # as in PointNet

    def forward(self, x, block, delta):
        B, T = x.shape[:2]
        u = self.message_ln(self.message_fc(x))  # (B,T,N,D)
        cls, patches = u[:, :, :1], u[:, :, 1:]
        pairs = torch.cat([patches[:, :-1], patches[:, 1:]], dim=-1)  # (B,T-1,P,2D)
        h = self.interactive_block(as_maps(pairs))  # (B*(T-1),2c,g,g)
        points = REACH * self.prediction_block(h).view(B, T - 1, 2, 2).to(x.dtype)
        masks = interactive_mask(points, self.grid, delta).flatten(3).unsqueeze(4)  # (B,T-1,2,P,1)
        first = masks[:, :, 0] * patches[:, :-1]  # (B,T-1,P,D)
        second = masks[:, :, 1] * patches[:, 1:]  # (B,T-1,P,D)
        a = torch.cat([cls, over_frames(first, second)], dim=2)  # (B,T,N,D)
        i = torch.cat([cls, self.interactive_features(h, B)], dim=2)  # (B,T,N,D)
        x = x + self.temporal_skip_align_fc(a) + self.temporal_skip_fc(i)
        loss = alignment_loss(first.mean(dim=2), second.mean(dim=2))
        return Aligned(run_block(block, x), loss, points)

    def interactive_features(self, h, B):
        """The pairs' maps h (B*(T-1),2c,g,g), half of the channels for each frame -> (B,T,P,D)."""
        h = h.flatten(2).mT.unflatten(0, (B, -1))  # (B,T-1,P,2c)
        h = over_frames(*h.chunk(2, dim=-1))  # (B,T,P,c)
        h = self.conv(h.movedim(-1, 1).unsqueeze(-1))  # (B,c,T,P,1)
        return self.fc(h.squeeze(-1).movedim(1, -1))


# ---- rivals in the same tower [paper, Table 4] ---------------------------------------------------

def assignment(cost):
    """The cheapest one-to-one matching: costs (n,n), an array -> (n,) the column of each row.

    Kuhn-Munkres with potentials, O(n^3): rows enter one by one, and Dijkstra over reduced costs
    finds each a path to a free column. Everything counts from 1; column 0 holds the new row.
    """
    n = len(cost)
    u, v = np.zeros(n + 1), np.zeros(n + 1)  # cost - u - v >= 0, and 0 for matched pairs
    row_of = np.zeros(n + 1, int)  # of a column; 0: the column is free
    came_from = np.zeros(n + 1, int)  # the column before it on the path
    for new_row in range(1, n + 1):
        row_of[0], column = new_row, 0
        distance = np.full(n + 1, np.inf)
        distance[0] = 0
        done = np.zeros(n + 1, bool)
        while row_of[column]:
            done[column], row = True, row_of[column]
            reach = distance[column] + cost[row - 1] - u[row] - v[1:]
            reach = np.append(np.inf, reach)
            closer = ~done & (reach < distance)
            distance[closer], came_from[closer] = reach[closer], column
            column = np.where(done, np.inf, distance).argmin()
        u[row_of[done]] += distance[column] - distance[done]
        v[done] -= distance[column] - distance[done]
        while column:  # every row on the path moves over by one column
            row_of[column] = row_of[came_from[column]]
            column = came_from[column]
    return row_of[1:].argsort()


def earth_movers_distance(a, b):
    """Mean distance that n equally heavy points a (n,D) travel to b (n,D), a float.

    [paper, Table 5; Euclidean distance: ours]
    """
    cost = torch.cdist(a.detach().double(), b.detach().double()).cpu().numpy()
    return float(cost[np.arange(len(cost)), assignment(cost)].mean())


class TimeAttention(nn.Module):
    """x + Attn(LN(x + position)) along time: a row of (B,T,n,D) meets that row of all frames."""

    def __init__(self, width, frames):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(frames, 1, width))
        self.norm = nn.LayerNorm(width)
        self.attn = start_normal(Attention(width))
        start_zero(self.attn.out_proj)

    def forward(self, x):
        y = self.norm(x + self.position).transpose(1, 2)  # (B,n,T,D)
        return x + self.attn(y, y).transpose(1, 2)


class NoAlignment(nn.Module):
    """CLIP's block on each frame by itself."""

    def __init__(self, width, frames):
        super().__init__()

    def forward(self, x, block, delta):
        return Aligned(run_block(block, x))


class AveragePooling(NoAlignment):
    """An MI token without a mask: the mean of the frame's patches."""

    def forward(self, x, block, delta):
        return Aligned(run_block(block, x, x[:, :, 1:].mean(dim=2, keepdim=True)))


class DividedAttention(nn.Module):
    """TimeSformer: attention along time, then CLIP's block in space."""

    def __init__(self, width, frames):
        super().__init__()
        self.layer = TimeAttention(width, frames)

    def forward(self, x, block, delta):
        return Aligned(run_block(block, self.layer(x)))


class TemporalShift(NoAlignment):
    """TSM in the attention branch: an eighth of the channels from the frame before, an eighth from
    the frame after, zeros at the ends."""

    def forward(self, x, block, delta):
        return Aligned(block.checkpointed(self.shifted_block, block, x))

    def shifted_block(self, block, x):
        y = block.ln_1(x)  # (B,T,N,D)
        eighth = y.shape[-1] // 8
        before = F.pad(y[:, :-1, :, :eighth], (0, 0, 0, 0, 1, 0))  # (B,T,N,D/8)
        after = F.pad(y[:, 1:, :, eighth:2 * eighth], (0, 0, 0, 0, 0, 1))  # (B,T,N,D/8)
        y = torch.cat([before, after, y[..., 2 * eighth:]], dim=-1).flatten(0, 1)  # (B*T,N,D)
        x = x + block.attn(y, y).view_as(x)
        return x + block.mlp(block.ln_2(x))


class HungarianAlignment(DividedAttention):
    """ATA: patches of adjacent frames are matched one to one by cosine, and attention along time
    follows the tracks. The matching is exact and runs on the CPU: slow at full size."""

    def forward(self, x, block, delta):
        tracks = self.tracks(x)  # (B,T,N,1)
        x = self.layer(x.take_along_dim(tracks, dim=2))
        x = x.take_along_dim(tracks.argsort(dim=2), dim=2)  # every row back in its place
        return Aligned(run_block(block, x))

    @torch.no_grad()
    def tracks(self, x):
        """x (B,T,N,D) -> (B,T,N,1): the row of frame t to which each row of frame 0 has moved."""
        B, T, N, _ = x.shape
        unit = F.normalize(x[:, :, 1:], dim=-1)
        with full_precision(x.device):
            cosines = unit[:, :-1] @ unit[:, 1:].mT  # (B,T-1,P,P)
        cost = -cosines.double().cpu().numpy()
        tracks = np.tile(np.arange(N), (B, T, 1))  # the class row stays where it is
        for b in range(B):
            for t in range(T - 1):
                match = assignment(cost[b, t])  # (P,)
                tracks[b, t + 1, 1:] = 1 + match[tracks[b, t, 1:] - 1]
        return torch.from_numpy(tracks).to(x.device).unsqueeze(-1)


class FrameMessages(nn.Module):
    """X-CLIP: each frame's class token makes a message, messages attend to each other along time,
    and a frame's own joins its keys and values."""

    def __init__(self, width, frames):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(width, width), TimeAttention(width, frames))

    def forward(self, x, block, delta):
        return Aligned(run_block(block, x, self.layer(x[:, :, :1])))


RIVALS = {
    "none": NoAlignment, "average": AveragePooling, "divided": DividedAttention,
    "shift": TemporalShift, "hungarian": HungarianAlignment, "xclip": FrameMessages,
}


# ---- what stands before a block ------------------------------------------------------------------

class WindowAttention(nn.Module):
    """In place of a 3x3 convolution, each position attends to its 3x3 window. [paper, Table 8]

    Beyond the border there are zeros. (n,c_in,g,g) -> (n,c_out,g,g); groups have no meaning here.
    """

    def __init__(self, c_in, c_out, groups=1):
        super().__init__()
        self.attn = start_normal(Attention(c_in))
        self.attn.out_proj = nn.Linear(c_in, c_out)

    def forward(self, maps):
        n, c, g, _ = maps.shape
        windows = F.unfold(maps, 3, padding=1).view(n, c, 9, g * g)
        windows = windows.permute(0, 3, 2, 1)  # (n,g*g,9,c)
        middle = windows[:, :, 4:5]  # (n,g*g,1,c)
        return self.attn(middle, windows).squeeze(2).mT.unflatten(2, (g, g))


def make_aligners(visual, config):
    """One aligner for each block of the tower: config.form's or config.rival's in config.blocks,
    and NoAlignment in the other blocks."""
    width, layers = visual.width, len(visual.transformer.resblocks)
    local = WindowAttention if config.operator == "window" else conv3x3
    aligned = block_range(config.blocks, layers)
    aligners = nn.ModuleList()
    for i in range(1, layers + 1):
        if i not in aligned:
            aligners.append(NoAlignment(width, config.frames))
        elif config.rival != "ila":
            aligners.append(RIVALS[config.rival](width, config.frames))
        elif config.form == "paper":
            aligners.append(Alignment(width, visual.grid, config, local))
        else:
            aligners.append(ReleasedAlignment(width, visual.grid, config))
    return aligners


def check_sizes(visual, config):
    """Raises ValueError for a tower whose sizes these settings cannot take."""
    video_prompt = config.video_prompt and config.num_classes is None
    if visual.embed % HEAD_WIDTH and (config.multi_frame or video_prompt):
        raise ValueError(f"this CLIP's joint width {visual.embed} is no multiple of the head width "
                         f"{HEAD_WIDTH}: set multi_frame=false and video_prompt=false")
    if config.form != "paper" and visual.grid < 4:
        raise ValueError(f"form {config.form!r} halves the patches twice and needs 4 x 4 or more; "
                         f"this CLIP has {visual.grid} x {visual.grid}: set form=paper")


# ---- other hosts [paper, Tables 3 and 10] --------------------------------------------------------

class SpaceTimeBlock(nn.Module):
    """TimeSformer's block: attention along time, then CLIP's block in the space of each frame.

    A video has one class token: the class rows of its frames are equal. With probability `drop` a
    video skips a branch while training. [released]
    """

    def __init__(self, block, drop):
        super().__init__()
        self.norm, self.attn = copy.deepcopy(block.ln_1), copy.deepcopy(block.attn)
        width = block.attn.out_proj.in_features
        self.fc = start_zero(nn.Linear(width, width))
        self.drop = drop

    def forward(self, x, block, delta):
        return Aligned(block.checkpointed(self.compute, block, x))

    def compute(self, block, x):
        B, T = x.shape[:2]
        # time: each patch with the same patch of all frames, without the class token
        patches = x[:, :, 1:]  # (B,T,P,D)
        y = self.norm(patches).transpose(1, 2).flatten(0, 1)  # (B*P,T,D)
        r = self.fc(self.attn(y, y)).unflatten(0, (B, -1)).transpose(1, 2)  # (B,T,P,D)
        patches = patches + self.drop_path(r)
        # space: the class token takes the mean over frames of what it sees in each
        x = torch.cat([x[:, :, :1], patches], dim=2)  # (B,T,N,D)
        y = block.ln_1(x).flatten(0, 1)  # (B*T,N,D)
        r = self.drop_path(block.attn(y, y).view_as(x))  # (B,T,N,D)
        cls = x[:, 0, :1] + r[:, :, 0].mean(dim=1, keepdim=True)  # (B,1,D)
        patches = (patches + r[:, :, 1:]).flatten(1, 2)  # (B,T*P,D)
        x = torch.cat([cls, patches], dim=1)  # (B,1+T*P,D)
        x = x + self.drop_path(block.mlp(block.ln_2(x)))
        cls = x[:, None, :1].expand(-1, T, -1, -1)  # (B,T,1,D)
        return torch.cat([cls, x[:, 1:].unflatten(1, (T, -1))], dim=2)

    def drop_path(self, branch):
        """Drops a video's branch (B,...) at random and scales up the others, so the mean stays."""
        ones = branch.new_ones(branch.shape[0], *[1] * (branch.dim() - 1))
        return branch * F.dropout(ones, self.drop, self.training)


class TimeSformer(nn.Module):
    """An image tower with time positions, which trains as a whole.

    rival=divided is TimeSformer itself (Bertasius et al., ICML 2021); it starts as the image tower.
    Else the aligned block [paper], or a rival, takes the place of its attention along time, and
    each frame has its own class token [ours].
    """

    trains_tower = True

    def __init__(self, visual, config):
        super().__init__()
        self.config, blocks = config, visual.transformer.resblocks
        if config.rival == "divided":
            self.aligners = nn.ModuleList()
            for i, block in enumerate(blocks):
                self.aligners.append(SpaceTimeBlock(block, drop=0.1 * i / max(len(blocks) - 1, 1)))
        else:
            self.aligners = make_aligners(visual, config)
        self.positions = nn.Parameter(torch.zeros(config.frames, 1, visual.width))  # (T,1,D)
        self.head = start_normal(nn.Linear(visual.embed, config.num_classes))

    def forward(self, visual, video, delta):
        """Video (B,T,3,R,R) -> Encoded, with the video's feature (B,E) for x."""
        if self.config.rival != "divided":
            check_video(video, self.config.frames)
        x = visual.tokens(video.flatten(0, 1)) + visual.positional_embedding
        x = x.unflatten(0, video.shape[:2])  # (B,T,N,D)
        patches = x[:, :, 1:] + nearest_frames(self.positions, video.shape[1])
        x = visual.ln_pre(torch.cat([x[:, :, :1], patches], dim=2))
        x, loss, points = run_blocks(visual.transformer.resblocks, self.aligners, x, delta,
                                     self.config.align_weight)
        return Encoded(visual.project(x[:, :, 0]).mean(dim=1), loss, points)


def nearest_frames(positions, frames):
    """Time positions (T,1,D) for another number of frames, by nearest neighbour. [released]"""
    T = positions.shape[0]
    return positions[torch.arange(frames, device=positions.device) * T // frames]


class RecordedBlock:
    """CLIP's block, which keeps its output (B*T,N,D), its queries and its keys (B*T,H,N,d)."""

    def __init__(self, block):
        self.block = block

    def __call__(self, x, extra=None):
        block = self.block
        y = y_kv = block.ln_1(x)
        if extra is not None:
            y_kv = torch.cat([y, block.ln_1(extra)], dim=-2)
        k, v = block.attn.keys_values(y_kv)
        self.q, self.k = block.attn.queries(y), k[..., :x.shape[-2], :]
        heads = F.scaled_dot_product_attention(self.q, k, v)
        x = x + block.attn.project_out(heads)
        self.out = block.add_mlp(x)
        return self.out


class EVLLayer(nn.Module):
    """A layer of EVL's decoder: the video's token looks at all rows of one of the tower's blocks.

    y = out + conv(out) + position + cross, s = s + Attn(LN_1 s, LN_3 y), s = s + MLP(LN_2 s), with
    out the rows after the block. [released]
    """

    def __init__(self, visual, config):
        super().__init__()
        width, self.grid = visual.width, visual.grid
        offsets = (2 * self.grid - 1) ** 2  # between two patches
        self.conv = nn.Conv1d(width, width, 3, padding=1, groups=width)  # along time
        self.positions = nn.Parameter(torch.zeros(config.frames, 1, width))  # (T,1,D)
        self.w1 = nn.Parameter(torch.zeros(offsets, width))  # for frame t - 1
        self.w2 = nn.Parameter(torch.zeros(offsets, width))  # for frame t + 1
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)
        self.attn = Attention(width)
        hidden = config.decoder_mlp * width
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), QuickGELU(), nn.Dropout(0.5), nn.Linear(hidden, width))
        nn.init.zeros_(self.attn.out_proj.bias)
        for part in (*self.attn.in_proj_weight.data.chunk(3), self.attn.out_proj.weight):
            nn.init.xavier_uniform_(part)
        for linear in (self.mlp[0], self.mlp[3]):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=1e-6)

    def forward(self, token, out, q, k):
        """token (B,1,D); a block's rows (B,T,N,D), its queries and keys (B,T,H,N,d) -> (B,1,D)."""
        y = self.norm3(self.video_rows(out, q, k)).flatten(1, 2)  # (B,T*N,D)
        token = token + self.attn(self.norm1(token), y)
        return token + self.mlp(self.norm2(token))

    def video_rows(self, out, q, k):
        """y (B,T,N,D)."""
        rows = out.permute(0, 2, 3, 1)  # (B,N,D,T)
        conv = self.conv(rows.flatten(0, 1)).view(rows.shape).permute(0, 3, 1, 2)  # (B,T,N,D)
        q, k = q[:, :, :, 1:], k[:, :, :, 1:]  # (B,T,H,P,d)
        before = self.cross(q[:, 1:], k[:, :-1], self.w1)  # (B,T-1,P,D), for frames 1 to T-1
        after = self.cross(q[:, :-1], k[:, 1:], self.w2)  # (B,T-1,P,D), for frames 0 to T-2
        cross = F.pad(before, (0, 0, 1, 0, 1, 0)) + F.pad(after, (0, 0, 1, 0, 0, 1))  # (B,T,N,D)
        return out + conv + self.positions + cross

    def cross(self, q, k, w):
        """Queries of frames and keys of neighbours, (B,T-1,H,P,d) each -> (B,T-1,P,D)."""
        # cross[p] = sum over p' of A[p,p'] w[r(p,p')],  r numbers the offset from p' to p,
        # A = mean over heads of softmax(q k^T / sqrt(d))
        A = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1).mean(dim=2)  # (B,T-1,P,P)
        p = torch.arange(self.grid ** 2, device=w.device)
        i, j = p // self.grid, p % self.grid  # row and column
        down = i[:, None] - i + self.grid - 1  # (P,P), from 0
        right = j[:, None] - j + self.grid - 1  # (P,P), from 0
        r = down * (2 * self.grid - 1) + right
        return torch.einsum("btpq,pqd->btpd", A, w[r])


class EVL(nn.Module):
    """A decoder over the last blocks of a frozen tower (Lin et al., ECCV 2022). [released]

    rival=none is EVL itself: the tower needs no memory for a backward pass. With rival=ila frames
    are aligned in the tower, and the aligners train [paper].
    """

    trains_tower = False

    def __init__(self, visual, config):
        super().__init__()
        layers = len(visual.transformer.resblocks)
        if config.decoder_layers > layers:
            raise ValueError(f"decoder_layers is {config.decoder_layers}; the tower has {layers}")
        self.config, width = config, visual.width
        self.aligners = make_aligners(visual, config)
        self.token = nn.Parameter(torch.zeros(width))
        self.layers = nn.ModuleList(EVLLayer(visual, config) for _ in range(config.decoder_layers))
        self.head = linear_head(width, config.num_classes)

    def forward(self, visual, video, delta):
        """Video (B,T,3,R,R) -> Encoded, with the video's feature (B,D) for x."""
        (B, T), blocks = video.shape[:2], list(visual.transformer.resblocks)
        unread = len(blocks) - len(self.layers)
        read = [RecordedBlock(block) for block in blocks[unread:]]
        trains = any(parameter.requires_grad for parameter in self.aligners.parameters())
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            x = first_rows(visual, video, self.config.frames)  # (B,T,N,D)
            _, loss, points = run_blocks(blocks[:unread] + read, self.aligners, x, delta,
                                         self.config.align_weight)
        token = self.token.expand(B, 1, -1)  # (B,1,D)
        for layer, block in zip(self.layers, read):
            recorded = [value.unflatten(0, (B, T)) for value in (block.out, block.q, block.k)]
            token = layer(token, *recorded)
        return Encoded(token[:, 0], loss, points)


HOSTS = {"timesformer": TimeSformer, "evl": EVL}


class HostedILA(AlignedModel):
    """ILA in another host, with a linear head. It is used as ILA is."""

    def __init__(self, clip, config):
        super().__init__(clip, config)
        self.host = HOSTS[config.host](clip.visual, config)
        self.to(clip.visual.class_embedding)  # its device and dtype
        clip.requires_grad_(False)
        clip.visual.requires_grad_(self.host.trains_tower)

    def set_classes(self, names):
        """Checks the names of the classes that the head knows. Raises ValueError."""
        names = list(no_string(names))
        self.check_head_names(names)
        self.names = names

    def encode(self, video):
        """Normalised video (B,T,3,R,R) -> Encoded, with the video's feature for x."""
        return self.host(self.clip.visual, video, self.delta if self.training else None)

    def encode_video(self, video):
        """The way to embed videos: normalised (B,T,3,R,R) -> features (B,D), not normalised."""
        return self.encode(video).x

    def encode_names(self, names, video=None):
        raise ValueError("this model has a linear head and no text: it cannot embed names")

    def forward(self, video):
        """Normalised video (B,T,3,R,R) -> logits (B,C), and the weighted alignment loss."""
        feature, loss, _ = self.encode(video)
        return self.host.head(feature), loss


def make_ila(clip, config=ILAConfig()):
    """ILA on a CLIP, or in the host that the configuration names."""
    if config.host == "clip":
        return ILA(clip, config)
    return HostedILA(clip, config)


# ---- released files: ILA, TimeSformer, EVL -------------------------------------------------------

# A released key is rewritten by each of its format's patterns in turn, from its start. Their order
# matters: ILA's keys first all become "clip.*", then what is not CLIP's own gets another name.
ILA_NAMES = (
    ("", "clip."),
    (r"clip\.mit\.positional_embedding", "frame_positions"),
    (r"clip\.mit\.classify_head", "head"),
    (r"clip\.visual\.transformer\.resblocks\.(\d+)\.message_attn\.", r"aligners.\1."),
    (r"clip\.visual\.transformer\.resblocks\.(\d+)\.(message_|temporal_)", r"aligners.\1.\2"),
    (r"clip\.mit\.resblocks\.0", "integration"),
    (r"clip\.prompts_visual_ln", "video_prompt.patch_norm"),
    (r"clip\.prompts_visual_proj", "video_prompt.patch_proj"),
    (r"clip\.prompts_generator", "video_prompt"),
    (r"(video_prompt\.decoder\.\d\.)cross_attn\.", r"\1"),
)
TIMESFORMER_NAMES = (  # beside those of its image tower, which are timm's
    (r"time_embed", "host.positions"),
    (r"head\.", "host.head."),
    (r"blocks\.(\d+)\.temporal_norm1\.", r"host.aligners.\1.norm."),
    (r"blocks\.(\d+)\.temporal_fc\.", r"host.aligners.\1.fc."),
    (r"blocks\.(\d+)\.temporal_attn\.qkv\.", r"host.aligners.\1.attn.in_proj_"),
    (r"blocks\.(\d+)\.temporal_attn\.proj\.", r"host.aligners.\1.attn.out_proj."),
)
EVL_NAMES = (
    (r"decoder\.cls_token", "host.token"),
    (r"proj\.", "host.head."),
    (r"decoder\.temporal_conv\.(\d+)", r"host.layers.\1.conv"),
    (r"decoder\.temporal_pos_embed\.(\d+)", r"host.layers.\1.positions"),
    (r"decoder\.cross_attention\.(\d+)\.", r"host.layers.\1."),
    (r"decoder\.decoder_layers\.(\d+)\.", r"host.layers.\1."),
    (r"(host\.layers\.\d+\.mlp)\.fc1", r"\1.0"),
    (r"(host\.layers\.\d+\.mlp)\.fc2", r"\1.3"),
)


def renamed(state, patterns):
    """A state_dict with every key rewritten by the patterns, one after the other."""
    result = {}
    for key, value in state.items():
        for pattern, name in patterns:
            key = re.sub("^" + pattern, name, key)
        result[key] = value
    return result


def from_ila(state):
    """A released ILA's state_dict -> (ILAConfig, {our key: tensor})."""
    state = renamed(state, ILA_NAMES)
    frames = state["frame_positions"].shape[1]
    if "head.2.weight" not in state:
        return ILAConfig(frames, form="released"), state
    classes = len(state["head.2.weight"])
    return ILAConfig(frames, form="released-ssv2", num_classes=classes), state


def from_timesformer(state):
    """A released TimeSformer's state_dict -> (ILAConfig, {our key: tensor})."""
    state = renamed(state, TIMESFORMER_NAMES)
    state["host.positions"] = state["host.positions"].transpose(0, 1)  # (T,1,D)
    tower = {key: state.pop(key) for key in list(state) if not key.startswith("host.")}
    for key, value in from_timm(tower).items():
        state["clip." + key] = value
    frames, classes = len(state["host.positions"]), len(state["host.head.weight"])
    return ILAConfig(frames, host="timesformer", rival="divided", num_classes=classes), state


def from_evl(state):
    """A released EVL's state_dict, which holds no tower -> (ILAConfig, {our key: tensor})."""
    state = renamed(state, EVL_NAMES)
    layers = len([key for key in state if key.endswith(".norm3.weight")])
    for i in range(layers):
        for kind in ("weight", "bias"):
            parts = [state.pop(f"host.layers.{i}.attn.{part}_proj.{kind}") for part in "qkv"]
            state[f"host.layers.{i}.attn.in_proj_{kind}"] = torch.cat(parts)
        positions = state[f"host.layers.{i}.positions"]
        state[f"host.layers.{i}.positions"] = positions.unsqueeze(1)  # (T,1,D)
    hidden, width = state["host.layers.0.mlp.0.weight"].shape
    config = ILAConfig(
        len(positions), host="evl", rival="none", num_classes=len(state["host.head.2.weight"]),
        decoder_layers=layers, decoder_mlp=hidden // width)
    return config, state


RELEASED_FORMATS = {  # a key that only this format has: its reader
    "mit.positional_embedding": from_ila, "time_embed": from_timesformer,
    "decoder.cls_token": from_evl,
}


def read_released(state_dict):
    """A released ILA, TimeSformer or EVL -> (ILAConfig read off its tensors, {our key: tensor}).

    Keys may begin with "module." or "model.". Raises ValueError for anything else.
    """
    state = {re.sub(r"^(module\.|model\.)+", "", key): torch.as_tensor(value)
             for key, value in state_dict.items()}
    for marker, read in RELEASED_FORMATS.items():
        if marker in state:
            return read(state)
    raise ValueError("not a released ILA, TimeSformer or EVL: none of the keys "
                     f"{', '.join(RELEASED_FORMATS)}")


def released_config(state_dict):
    """The ILAConfig of a released file's state_dict. Raises ValueError for other models' files."""
    return read_released(state_dict)[0]


def released_clip(state_dict):
    """What a released file's state_dict holds for load_clip.

    Kinetics ILA's: a whole CLIP; SSv2 ILA's and TimeSformer's: an image tower; EVL's: nothing, {}.
    """
    _, state = read_released(state_dict)
    return {key.removeprefix("clip."): value for key, value in state.items()
            if key.startswith("clip.")}


def load_released(model, state_dict):
    """Loads a released state_dict into a model of its released_config, strictly.

    What the files do not hold stays: with a linear head the text tower, in EVL the whole CLIP.
    Raises ValueError with the keys.
    """
    config, released = read_released(state_dict)
    state = {}
    for key, value in model.state_dict().items():
        text = key.startswith("clip.") and not key.startswith("clip.visual.")
        kept = text and config.num_classes is not None
        if key == "delta" or kept or config.host == "evl" and key.startswith("clip."):
            state[key] = value
    try:
        model.load_state_dict(state | released)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"not released weights of this model: {reason}") from error
