"""ILA, implicit learnable alignment (Tu et al., ICCV 2023): CLIP's image tower, whose adjacent frames are aligned
before every block.

    patches F_t, F_{t+1} of two frames -> PointNet -> points p1, p2 -> masks m(p1), m(p2)
    MI_t, the masked patches' mean (mutual information: what the frames share): one more key and value in CLIP's block

Form "paper" is the above; "released" is what the public code computes instead, so that its checkpoints load and agree;
"released-ssv2" is its Something-Something branch. `num_classes` asks for SSv2's recipe.

What trains: all that is not under `clip.`; without `num_classes` also CLIP's image tower and logit_scale; the text
tower never. Letters as in clip_vit; g x g = P is the patch grid, c a map's channels, points are (x, y) in [-1, 1].
"""

import math
import re
from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from clip_vit import HEAD_WIDTH, Attention, Block, QuickGELU, TextCache, cosine_logits, knob

FLAT, SLOPE, REACH = 0.25, 1.5, 0.75  # [released] a mask's flat half width, its fall beside it; points are tanh * 0.75
DISTURBANCE, DECAY_EPOCH = 0.2, 29    # [released] the step between the nine points; it halves in each epoch after this
CHANNELS = 128                        # of PointNet's maps


def interactive_mask(points, grid, delta=None):
    """Masks of points, (...,2) -> (...,g,g) in [0, 1], rows y, columns x; in training, with `delta`, mean over nine."""
    # m[i,j] = f(e_i - p_y) f(e_j - p_x),  e_i = 2i/(g-1) - 1,  f(s) = 1 if |s| <= 0.25 else max(0, 1 - 1.5(|s| - 0.25))
    # [paper; constants: released]. Training: the mean over p + delta {-1,0,1} x {-1,0,1} [released]; it is a mean of
    # products, hence the product of two means over three [ours, exact]
    offsets = points.new_zeros(1) if delta is None else delta * points.new_tensor([-1, 0, 1])
    p = points[..., None] + offsets  # (..., 2, 1 or 3)
    s = torch.linspace(-1, 1, grid, dtype=p.dtype, device=p.device) - p[..., None]  # (..., 2, 1 or 3, g)
    x, y = (1 - SLOPE * (s.abs() - FLAT)).clamp(0, 1).mean(dim=-2).unbind(-2)  # (..., g)
    return y[..., :, None] * x[..., None, :]


def alignment_loss(first, second):
    """L_align = mean over pairs of 1 - cos(., .) of both frames' pooled aligned features, (B,T-1,D) each. [paper]"""
    return (1 - F.cosine_similarity(first, second, dim=-1)).mean()


def frame_pairs(frames, align):
    """Which frames are aligned: `pairs` (T-1,2), frame numbers; `own` (T,2), the (pair, side) that is a frame's own."""
    # adjacent: pairs (t, t+1), and the last frame takes the last pair's second side [paper]. first, middle: pairs
    # (t, reference) [paper, Table 6], and the reference takes the second side of its neighbour's pair [ours]
    lone = {"adjacent": frames - 1, "first": 0, "middle": frames // 2}[align]  # the frame that is first in no pair
    left = [t for t in range(frames) if t != lone]
    pairs = [(t, t + 1 if align == "adjacent" else lone) for t in left]
    own = [(left.index(t), 0) if t != lone else (max(lone - 1, 0), 1) for t in range(frames)]
    return torch.tensor(pairs), torch.tensor(own)


# ---- two frames -> two points ----------------------------------------------------------------------------------------

def norm_relu(c):
    return nn.Sequential(nn.BatchNorm2d(c), nn.ReLU())


def initialised(module, std=0.02):
    """Matrices normal with `std`, biases zero [ours]; 0 for what must not disturb CLIP when training starts."""
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1 or name.endswith("bias"):
            nn.init.normal_(parameter, std=0 if name.endswith("bias") else std)
    return module


class WindowAttention(nn.Module):
    """Each position attends to its 3x3 window, zeros beyond the border, in place of a convolution. [paper, Table 8]"""
    def __init__(self, c_in, c_out, groups=1):  # groups are a convolution's: of no meaning here
        super().__init__()
        self.attn = initialised(Attention(c_in))
        self.attn.out_proj = nn.Linear(c_in, c_out)

    def forward(self, maps):
        n, c, g, _ = maps.shape
        windows = F.unfold(maps, 3, padding=1).view(n, c, 9, g * g).permute(0, 3, 2, 1)  # (n,g*g,9,c), its middle at 4
        return self.attn(windows[:, :, 4:5], windows).squeeze(2).mT.unflatten(2, (g, g))  # (n,c_out,g,g)


OPERATORS = {"convolution": partial(nn.Conv2d, kernel_size=3, padding=1, bias=False), "window": WindowAttention}


class PointNet(nn.Module):
    """The paper does not give it; this one lands on its cost table [ours]. The first layer sees the channels of both
    frames, [F_t; F_{t+1}], as A F_t + B F_{t+1}; on SSv2 it is 3x3, and two 3x3 layers follow [paper: more]."""
    def __init__(self, width, operator, ssv2):
        super().__init__()
        local, c, kernel = OPERATORS[operator], CHANNELS, 3 if ssv2 else 1
        wide = 2 * c if ssv2 else c
        self.A, self.B = (nn.Conv2d(width, wide, kernel, padding="same", bias=False) for _ in range(2))
        more = [local(wide, wide), norm_relu(wide), local(wide, c)] if ssv2 else [local(c, c, groups=c)]
        self.layers = nn.Sequential(norm_relu(wide), *more, norm_relu(c), nn.MaxPool2d(2, ceil_mode=True),
                                    local(c, c), norm_relu(c))
        self.point = initialised(nn.Linear(c, 4), std=0)  # both points start in the middle

    def forward(self, first, second):
        """Patches of each pair's two frames, (B,T-1,P,D) each -> a point (x, y) in both, (B,T-1,2,2)."""
        grid = math.isqrt(first.shape[2])
        F_t, F_next = (y.flatten(0, 1).mT.unflatten(2, (grid, grid)) for y in (first, second))  # (B*(T-1),D,g,g)
        h = self.layers(self.A(F_t) + self.B(F_next)).amax(dim=(2, 3))  # (B*(T-1),c)
        return REACH * self.point(h).tanh().view(*first.shape[:2], 2, 2)


# ---- the aligned block. Every way to let frames meet is a module: x (B,T,N,D), CLIP's block, delta (the disturbance,
# None in evaluation) -> x', loss, points

def run_block(block, x, extra=None):
    """CLIP's block in each frame of x (B,T,N,D); `extra` (B,T,n,D) joins keys and values and is gone before the MLP."""
    # PointNet stays outside: under checkpointing it would run twice, and its batch norm count every batch twice
    extra = None if extra is None else extra.flatten(0, 1)  # fused attention wants one batch axis
    return block(x.flatten(0, 1), extra=extra).view_as(x)


USES = {  # of the aligned features a_t = m . F_t: (block, x, own mask (B,T,P,1), MI token (B,T,1,D)) -> x'
    "mi": lambda block, x, mask, mi: run_block(block, x, mi),  # [paper] their mean, one key and value
    "add": lambda block, x, mask, mi: run_block(block, x + F.pad(mask, (0, 0, 1, 0)) * x),  # [Table 9] patches + a_t
    "concat": lambda block, x, mask, mi: run_block(block, x, mask * x[:, :, 1:]),  # [Table 9] P keys and values
}


class Alignment(nn.Module):
    """The aligned block. [paper]"""
    def __init__(self, width, grid, config):
        super().__init__()
        self.grid, self.use = grid, USES[config.use]
        self.point_net = PointNet(width, config.operator, config.num_classes is not None)
        for name, frames in zip(("pairs", "own"), frame_pairs(config.frames, config.align)):
            self.register_buffer(name, frames, persistent=False)  # (T-1,2), (T,2)

    def forward(self, x, block, delta):
        first, second = (x[:, frames, 1:] for frames in self.pairs.T)  # (B,T-1,P,D)
        points = self.point_net(first, second)  # (B,T-1,2,2)
        masks = interactive_mask(points, self.grid, delta).flatten(3)  # (B,T-1,2,P)
        # MI = mean over space of m . F [paper], as the product m F / P: the aligned features m . F are never built
        pooled = torch.cat([masks[:, :, :1] @ first, masks[:, :, 1:] @ second], dim=2) / first.shape[2]  # (B,T-1,2,D)
        pair, side = self.own.T
        x = self.use(block, x, masks[:, pair, side].unsqueeze(3), pooled[:, pair, side].unsqueeze(2))
        return x, alignment_loss(*pooled.unbind(2)), points


def over_frames(first, second):
    """What pairs say of their first and second frame, (B,T-1,...) each -> frames (B,T,...). [released]"""
    # a_0 = first_0,  a_t = (first_t + second_{t-1}) / 2,  a_{T-1} = second_{T-2}
    return torch.cat([first[:, :1], (first[:, 1:] + second[:, :-1]) / 2, second[:, -1:]], dim=1)


class ReleasedAlignment(nn.Module):
    """u = LN_m(W_m x); aligned a = masks . u; I of the points' maps; x + W_a a + W_i I; CLIP's block. [released]"""
    def __init__(self, width, grid, config):
        super().__init__()
        c, conv, self.grid = CHANNELS, partial(nn.Conv2d, kernel_size=3, padding=1), grid
        wide = [conv(2 * width, 2 * c), *norm_relu(2 * c)] if config.num_classes else [nn.Sequential(OrderedDict(
            depthwise_conv=nn.Sequential(conv(2 * width, 2 * width, groups=2 * width), *norm_relu(2 * width)),
            pointwise_conv=nn.Sequential(nn.Conv2d(2 * width, 2 * c, 1), *norm_relu(2 * c))))]
        self.message_fc, self.message_ln = nn.Linear(width, width), nn.LayerNorm(width)
        self.interactive_block = nn.Sequential(*wide, conv(2 * c, 2 * c), *norm_relu(2 * c))
        self.prediction_block = nn.Sequential(
            conv(2 * c, c), nn.BatchNorm2d(c), nn.MaxPool2d(2), nn.ReLU(),
            conv(c, c), nn.BatchNorm2d(c), nn.MaxPool2d(2), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(2),
            nn.Conv1d(c, c // 2, 1, groups=2), nn.ReLU(),
            initialised(nn.Conv1d(c // 2, 4, 1, groups=2), std=0), nn.Tanh())
        self.conv, self.fc = nn.Conv3d(c, c, (3, 1, 1), padding=(1, 0, 0)), nn.Linear(c, width)
        self.temporal_skip_align_fc, self.temporal_skip_fc = (
            initialised(nn.Linear(width, width), std=0) for _ in range(2))

    def forward(self, x, block, delta):
        B, T = x.shape[:2]
        u = self.message_ln(self.message_fc(x))  # (B,T,N,D)
        cls, patches = u[:, :, :1], u[:, :, 1:]
        pairs = torch.cat([patches[:, :-1], patches[:, 1:]], dim=-1).flatten(0, 1)  # (B*(T-1),P,2D)
        h = self.interactive_block(pairs.mT.unflatten(2, (self.grid, -1)))  # (B*(T-1),2c,g,g)
        points = REACH * self.prediction_block(h).view(B, T - 1, 2, 2)
        masks = interactive_mask(points, self.grid, delta).flatten(3).unsqueeze(4)  # (B,T-1,2,P,1)
        first, second = masks[:, :, 0] * patches[:, :-1], masks[:, :, 1] * patches[:, 1:]  # (B,T-1,P,D)
        aligned = torch.cat([cls, over_frames(first, second)], dim=2)  # (B,T,N,D)
        h = over_frames(*h.flatten(2).mT.unflatten(0, (B, T - 1)).chunk(2, dim=-1))  # (B,T,P,c)
        h = self.conv(h.movedim(-1, 1).unsqueeze(-1)).squeeze(-1).movedim(1, -1)  # (B,T,P,c), three frames wide
        x = x + self.temporal_skip_align_fc(aligned) + self.temporal_skip_fc(torch.cat([cls, self.fc(h)], dim=2))
        return run_block(block, x), alignment_loss(first.mean(dim=2), second.mean(dim=2)), points


# ---- rivals in the same tower [paper, Table 4] -----------------------------------------------------------------------

def assignment(cost):
    """Cheapest one-to-one matching: array (n,n) -> (n,) column of each row. Kuhn-Munkres with potentials, O(n^3): rows
    enter one by one, and Dijkstra over reduced costs finds each a way to a free column. Column 0 holds the newcomer."""
    n = len(cost)
    u, v = np.zeros((2, n + 1))  # 1-based, as all below; cost - u - v >= 0, and 0 where matched
    row_of, came_from = np.zeros((2, n + 1), int)  # of a column; row 0: it is free
    for newcomer in range(1, n + 1):
        row_of[0], column = newcomer, 0
        distance, done = np.append(0, np.full(n, np.inf)), np.zeros(n + 1, bool)
        while row_of[column]:
            done[column], row = True, row_of[column]
            reach = np.append(np.inf, distance[column] + cost[row - 1] - u[row] - v[1:])
            closer = ~done & (reach < distance)
            distance[closer], came_from[closer] = reach[closer], column
            column = np.where(done, np.inf, distance).argmin()
        u[row_of[done]] += distance[column] - distance[done]
        v[done] -= distance[column] - distance[done]
        while column:  # every row on the way moves over by one column
            row_of[column] = row_of[came_from[column]]
            column = came_from[column]
    return row_of[1:].argsort()


def earth_movers_distance(a, b):
    """Mean distance that n equally heavy points a (n,D) travel to b (n,D), a float. [paper, Table 5; Euclidean: ours]"""
    cost = torch.cdist(a.detach().double(), b.detach().double()).cpu().numpy()
    return float(cost[np.arange(len(cost)), assignment(cost)].mean())


class TimeAttention(nn.Module):
    """x + Attn(LN(x + position)) along time: each row of (B,T,n,D) with the same row of all frames."""
    def __init__(self, width, frames):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(frames, 1, width))
        self.norm, self.attn = nn.LayerNorm(width), initialised(Attention(width))
        initialised(self.attn.out_proj, std=0)

    def forward(self, x):
        y = self.norm(x + self.position).transpose(1, 2)  # (B,n,T,D)
        return x + self.attn(y, y).transpose(1, 2)


def along_tracks(block, x, time):
    """ATA: patches of adjacent frames are matched one to one by cosine (exactly, on the CPU: slow at full size);
    attention along time follows the tracks, and then all rows return to their places."""
    unit = F.normalize(x[:, :, 1:].detach(), dim=-1)
    cost = -(unit[:, :-1] @ unit[:, 1:].mT).double().cpu().numpy()  # (B,T-1,P,P)
    tracks = np.tile(np.arange(x.shape[2]), (*x.shape[:2], 1))  # the row of frame t to which one of frame 0 has moved
    for b, t in np.ndindex(*cost.shape[:2]):
        tracks[b, t + 1, 1:] = 1 + assignment(cost[b, t])[tracks[b, t, 1:] - 1]
    tracks = torch.from_numpy(tracks).to(x.device).unsqueeze(-1)  # (B,T,N,1)
    return run_block(block, time(x.take_along_dim(tracks, dim=2)).take_along_dim(tracks.argsort(dim=2), dim=2))


def shifted(block, x, _):
    """TSM, in the attention branch: an eighth of the channels from the frame before, an eighth from the one after."""
    def compute(x):
        y = block.ln_1(x)
        before, after, still = y.tensor_split([y.shape[-1] // 8, y.shape[-1] // 4], dim=-1)
        before, after = F.pad(before[:, :-1], (0, 0, 0, 0, 1, 0)), F.pad(after[:, 1:], (0, 0, 0, 0, 0, 1))  # 0 at the ends
        y = torch.cat([before, after, still], dim=-1).flatten(0, 1)  # (B*T,N,D)
        x = x + block.attn(y, y).view_as(x)
        return x + block.mlp(block.ln_2(x))
    return block.run(compute, x)


RIVALS = {  # name: (what builds a layer from width and frames, what runs it: (block, x, layer) -> x')
    "none": (nn.Identity, lambda block, x, _: run_block(block, x)),
    "average": (nn.Identity, lambda block, x, _: run_block(block, x, x[:, :, 1:].mean(dim=2, keepdim=True))),
    "divided": (TimeAttention, lambda block, x, time: run_block(block, time(x))),  # TimeSformer: time, then space
    "shift": (nn.Identity, shifted),
    "hungarian": (TimeAttention, along_tracks),
    "xclip": (lambda width, frames: nn.Sequential(nn.Linear(width, width), TimeAttention(width, frames)),
              lambda block, x, messages: run_block(block, x, messages(x[:, :, :1]))),  # class tokens talk over time
}


class Rival(nn.Module):
    """A rival around CLIP's block, or nothing."""
    def __init__(self, width, grid, config):
        super().__init__()
        make, self.run = RIVALS[config.rival]
        self.layer = make(width, config.frames)

    def forward(self, x, block, delta):
        return self.run(block, x, self.layer), x.new_zeros(()), None


class PromptLayer(nn.Module):
    """x + CA(LN x, v), then x + MLP(LN x): text x (B,C,E) looks at the video's v (B,P,E). [paper; released keys]"""
    def __init__(self, embed):
        super().__init__()
        self.norm1, self.norm3, self.proj = nn.LayerNorm(embed), nn.LayerNorm(embed), nn.Linear(embed, embed)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(embed, embed, bias=False) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(embed, 4 * embed), QuickGELU(), nn.Identity(), nn.Linear(4 * embed, embed))

    def forward(self, x, v):
        q, k, v = (y.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2)  # (B,H,C or P,d)
                   for y in (self.q_proj(self.norm1(x)), self.k_proj(v), self.v_proj(v)))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm3(x))


class VideoPrompt(nn.Module):
    """Video-specific text: t' = t + alpha Dec(t, v), v = LN(mean over frames of LN(patches) W_vp). [paper]"""
    def __init__(self, width, embed):
        super().__init__()
        self.patch_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(embed)
        self.patch_proj = nn.Parameter(width ** -0.5 * torch.randn(width, embed))
        self.decoder = nn.ModuleList(initialised(PromptLayer(embed)) for _ in range(2))
        self.alpha = nn.Parameter(torch.full((embed,), 0.1))

    def forward(self, text, patches):
        """Class embeddings (C,E), last patches (B,T,P,D) -> each video's (B,C,E). Neither is normalised."""
        v = self.norm(self.patch_norm(patches).mean(dim=1) @ self.patch_proj)  # (B,P,E)
        x = text.expand(len(v), -1, -1)  # (B,C,E)
        for layer in self.decoder:
            x = layer(x, v)
        return text + self.alpha * x


# ---- the model -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class ILAConfig:  # tables are the paper's; forms "released" and "released-ssv2" fix align to rival
    frames: int = knob(8, "T")
    form: str = knob("paper", "paper, released, released-ssv2")
    num_classes: int | None = knob(
        None, "SSv2's recipe: more convolutions, a linear head of so many classes, CLIP frozen")
    align: str = knob(
        "adjacent", "adjacent, first, middle: the frame that each is aligned with (Table 6)")
    blocks: str = knob("all", "all, or a range from 1 such as 4-6: the blocks that align (Table 7)")
    operator: str = knob("convolution", "convolution, window: how PointNet looks around (Table 8)")
    use: str = knob("mi", "mi, add, concat: what becomes of the aligned features (Table 9)")
    rival: str = knob("ila", "ila, none, average, divided, shift, hungarian, xclip (Table 4)")
    video_prompt: bool = knob(True, "video-specific text (Table 11)")
    multi_frame: bool = knob(True, "the multi-frame block; False: the plain mean over frames")
    align_weight: float = knob(
        1.0, "of the alignment loss [released]; 0.01 where the model is tiny")

    def __post_init__(self):
        choices = {"form": ("paper", "released", "released-ssv2"), "align": ("adjacent", "first", "middle"),
                   "operator": tuple(OPERATORS), "use": tuple(USES), "rival": ("ila", *RIVALS)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        if self.frames < 2:
            raise ValueError(f"frames is {self.frames}; alignment needs at least 2")
        if self.form != "paper" and (self.form == "released") != (self.num_classes is None):
            raise ValueError(f"num_classes is {self.num_classes}; 'released' has none and 'released-ssv2' needs it")
        changed = [name for name in ("align", "blocks", "operator", "use", "rival")
                   if getattr(self, name) != type(self).__dataclass_fields__[name].default]
        if self.form != "paper" and changed:
            raise ValueError(f"form {self.form!r} is fixed; only 'paper' takes another {', '.join(changed)}")


class ILA(nn.Module):
    """CLIP with aligned frames and the paper's heads: multi-frame integration, video-specific text or linear head."""
    def __init__(self, clip, config=ILAConfig()):
        super().__init__()
        self.clip, self.config = clip, config
        (width, embed), layers = clip.visual.proj.shape, len(clip.visual.transformer.resblocks)
        grid = math.isqrt(len(clip.visual.positional_embedding) - 1)
        limits = re.fullmatch(r"(\d+)-(\d+)", config.blocks.replace("all", f"1-{layers}"))
        first, last = map(int, limits.groups() if limits else (0, 0))
        if not 1 <= first <= last <= layers:
            raise ValueError(f"blocks is {config.blocks!r}; it must be 'all' or a range within 1-{layers}, such as 1-3")
        kind = Rival if config.rival != "ila" else Alignment if config.form == "paper" else ReleasedAlignment
        self.aligners = nn.ModuleList(
            kind(width, grid, config) if first <= i <= last else Rival(width, grid, replace(config, rival="none"))
            for i in range(1, layers + 1))
        self.integration = initialised(Block(embed)) if config.multi_frame else None
        self.frame_positions = nn.Parameter(0.02 * torch.randn(1, config.frames, embed)) if config.multi_frame else None
        self.head = None if config.num_classes is None else nn.Sequential(
            nn.LayerNorm(embed), nn.Dropout(0.5), initialised(nn.Linear(embed, config.num_classes)))
        self.video_prompt = VideoPrompt(width, embed) if config.video_prompt and self.head is None else None
        self.register_buffer("delta", torch.tensor(DISTURBANCE, dtype=clip.visual.proj.dtype))
        self.register_buffer("tokens", None, persistent=False)  # (C,L)
        self.text_cache, self.names = TextCache(clip), None
        self.to(clip.visual.proj)  # its device and dtype
        for name, parameter in clip.named_parameters():
            parameter.requires_grad_(self.head is None and (name.startswith("visual.") or name == "logit_scale"))

    def set_epoch(self, epoch):
        """Halves the disturbance of the training points in every epoch from the 30th on (epochs count from 0)."""
        self.delta.fill_(DISTURBANCE * 0.5 ** max(0, epoch - DECAY_EPOCH))

    def set_classes(self, names):
        """Class names as in the dataset's files; the text is the bare name. A linear head only checks that they are the
        first ones, and as many as it has outputs."""
        if self.head is None:
            self.tokens = self.clip.tokenize(names)
            self.text_cache.drop()
        elif len(names) != self.config.num_classes or self.names not in (None, [*names]):
            raise ValueError(f"{len(names)} class names for a linear head of {self.config.num_classes} classes: it knows "
                             "those that it was trained on alone")
        self.names = [*names]

    def class_text(self):
        """Class embeddings (C,E), not normalised; kept in training too, unless the text tower is made to train."""
        if self.tokens is None:
            raise ValueError("no classes yet: call set_classes(names) first")
        trains = any(p.requires_grad for n, p in self.clip.named_parameters()
                     if not n.startswith("visual.") and n != "logit_scale")
        return self.text_cache(lambda: self.clip.encode_text(self.tokens), frozen=not trains)

    def encode(self, video):
        """(B,T,3,R,R) -> last block's rows (B,T,N,D), weighted alignment loss, points (B,T-1,2,2) per aligned block."""
        if video.dim() != 5 or video.shape[1] != self.config.frames:
            raise ValueError(f"video of shape {tuple(video.shape)}; this model takes (B,{self.config.frames},3,R,R)")
        visual, loss, points = self.clip.visual, 0, []
        x = visual.ln_pre(visual.tokens(video.flatten(0, 1)) + visual.positional_embedding)  # (B*T,N,D)
        x = x.unflatten(0, video.shape[:2])  # (B,T,N,D)
        for block, aligner in zip(visual.transformer.resblocks, self.aligners):
            x, block_loss, pair_points = aligner(x, block, self.delta if self.training else None)
            loss = loss + self.config.align_weight * block_loss  # weight * sum over blocks of L_align [paper]
            points += [] if pair_points is None else [pair_points]
        return x, loss, points

    @torch.no_grad()
    def interactive_points(self, video):
        """For pictures: the point of each frame, (B,T,2) for each aligned block, first to last."""
        pair, side = frame_pairs(self.config.frames, self.config.align)[1].T
        return [points[:, pair, side] for points in self.encode(video)[2]]

    def integrate(self, x):
        """Last block's rows (B,T,N,D) -> the video's feature (B,E), not normalised."""
        feature = frames = self.clip.visual.ln_post(x[:, :, 0]) @ self.clip.visual.proj  # (B,T,E)
        if self.integration is not None:  # mean over t of Block(f + position) + f [paper]
            feature = self.integration(frames + self.frame_positions) + frames
        return feature.mean(dim=1)

    def encode_video(self, video):
        """Normalised video (B,T,3,R,R) -> its feature (B,E), not normalised."""
        return self.integrate(self.encode(video)[0])

    def forward(self, video):
        """Normalised video (B,T,3,R,R) -> logits (B,C), and the weighted alignment loss, a scalar."""
        x, loss, _ = self.encode(video)
        feature = self.integrate(x)
        if self.head is not None:
            return self.head(F.normalize(feature, dim=-1)), loss
        text = self.class_text()  # (C,E)
        if self.video_prompt is not None:
            text = self.video_prompt(text, x[:, :, 1:])  # (B,C,E)
        return cosine_logits(feature, text, self.clip.logit_scale), loss


RELEASED_NAMES = {  # released name, from its start: ours
    r"(module\.)?": "clip.", r"clip\.mit\.positional_embedding": "frame_positions", r"clip\.mit\.classify_head": "head",
    r"clip\.visual\.transformer\.resblocks\.(\d+)\.(?:message_attn\.|(?=message_|temporal_))": r"aligners.\1.",
    r"clip\.mit\.resblocks\.0": "integration", r"clip\.prompts_visual_ln": "video_prompt.patch_norm",
    r"clip\.prompts_visual_proj": "video_prompt.patch_proj", r"clip\.prompts_generator": "video_prompt",
    r"(video_prompt\.decoder\.\d\.)cross_attn\.": r"\1"}


def load_released(model, state_dict):
    """Loads a released ILA state_dict (with "module." or without) into an ILA of form "released" or "released-ssv2".
    Strict, but the latter may lack the text tower, as its checkpoints do. Raises ValueError that lists the keys."""
    state = {k: v for k, v in model.state_dict().items()  # what released checkpoints do not hold
             if k == "delta" or model.head is not None and re.match(r"clip\.(?!visual\.)", k)}
    for key, value in state_dict.items():
        for pattern, name in RELEASED_NAMES.items():
            key = re.sub("^" + pattern, name, key)
        state[key] = torch.as_tensor(value)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError("not released weights of this model: " + " ".join(str(error).split())) from error
