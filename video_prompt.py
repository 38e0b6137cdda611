"""TC-CLIP: video-conditional prompting (Kim et al., ECCV 2024, section 3.3) and the whole model.

The prompt of a class is [start, M learnable vectors, class name, ".", end]. Before text block j (in
the paper the last) the vectors take up the context tokens of the video (PromptLayer). Then block j
runs as usual, and the text feature is read at the end token.

Plainly, the text tower runs once for every video and class; tests/plain.py does so. But the tower
is causal and the vectors stand before the name, so they never see the class. And in the last block
only the end token's row is used, which looks at start, vectors and name, of which only the vectors
depend on the video. So if j is the last block, this is enough [ours, exact]:

    once per class set   all blocks before j; in j the end token's query, and the start and name as
                         keys and values (`class_side`)
    once per video       prompting the M vectors, which are the same for all classes
    per video and class  in j one query's attention to the M vectors, W_o and the MLP (`last_block`)

Sections: prompting; configuration; the model; released checkpoints.

Letters as in clip_vit.py and temporal_context.py, and: M prompt vectors, W text width. Prompting by
the video needs W = E: the vectors look at context tokens that are projected to E.
"""

import copy
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from clip_vit import (TextCache, cosine_logits, join_projections, knob, no_string, require_text,
                      split_capitals, state_dict_in)
from temporal_context import CHOICES, ContextTower


# ---- prompting -----------------------------------------------------------------------------------

class PromptLayer(nn.Module):
    """Multi-head cross-attention of the prompt vectors p to the video's context c. [paper]

        p^ = p + MHCA(LN_p p, LN_c c, LN_c c)     queries, keys, values
        p~ = p^ + MLP(LN p^)

    It begins with the weights of the text block before which it stands. [released] LN_p is `ln_1`,
    LN_c is `ln_1_kv`; both begin as that block's LN_1.
    """

    def __init__(self, block):
        super().__init__()
        self.attn = copy.deepcopy(block.attn)
        self.ln_1 = copy.deepcopy(block.ln_1)
        self.ln_1_kv = copy.deepcopy(block.ln_1)
        self.ln_2 = copy.deepcopy(block.ln_2)
        self.mlp = copy.deepcopy(block.mlp)

    def forward(self, p, c):
        """Vectors p (B,M,W) and context c (B,k,W) -> p~ (B,M,W)."""
        p = p + self.attn(self.ln_1(p), self.ln_1_kv(c))
        return p + self.mlp(self.ln_2(p))


class ClassSide(NamedTuple):
    """What no video changes in the last text block, at the end token of each class."""

    x: torch.Tensor  # (C,W) the end token's row
    q: torch.Tensor  # (C,H,d) its query
    logit: torch.Tensor  # (C,H) of the one key that stands for start and name
    value: torch.Tensor  # (C,H,d) of that key
    vectors: torch.Tensor  # (M,W) the vectors that enter the block, the same for every class


def end_rows(x, tokens):
    """The rows of x (...,C,L,W) at the end tokens, which have the largest ids: (...,C,W)."""
    classes = torch.arange(len(tokens), device=tokens.device)
    return x[..., classes, tokens.argmax(dim=-1), :]


def as_one_key(q, k, v, hidden):
    """Many keys as one: q (C,H,1,d), k and v (C,H,n,d) -> its logit (C,H) and its value (C,H,d).

        logit = log-sum-exp(q k / sqrt(d)),  value = softmax(q k / sqrt(d)) v

    Attention to the n keys and any others equals attention to this one key and the others: its
    weight is the sum of the n weights, and its value their weighted mean. Keys that are `hidden`
    (C,n) do not count.
    """
    logits = q @ k.transpose(-1, -2) / k.shape[-1] ** 0.5  # (C,H,1,n)
    logits = logits.masked_fill(hidden[:, None, None], -torch.inf)
    value = logits.softmax(dim=-1) @ v  # (C,H,1,d)
    return logits.logsumexp(dim=-1)[..., 0], value[:, :, 0]


# ---- configuration -------------------------------------------------------------------------------

@dataclass(frozen=True)
class TCConfig:
    """What TC-CLIP is made of; the defaults are the paper's. Raises ValueError on a wrong value."""

    frames: int = knob(16, "T, needed by joint positions")
    context_tokens: int = knob(96, "k: they sum up the video for the next block")
    seed_ratio: float = knob(0.3, "alpha: the share of a frame's patches that become seeds")
    merge_step: int = knob(100, "r: pairs merged by one bipartite round")
    positions: str = knob("space", "space: the same for all frames; joint: one per frame and token")
    local_global_bias: bool = knob(True, "one for own and one for reference tokens, per head")
    text_length: int = knob(30, "longest prompt, in tokens")
    merge: str = knob("bipartite", ", ".join(CHOICES["merge"]))
    reference: str = knob("context", f"what frames look at: {', '.join(CHOICES['reference'])}")
    reference_blocks: tuple | None = knob(
        None, "vision blocks that look at references; None: all but the first")
    prompt: str = knob("a photo of a", "the M vectors begin as these words' embeddings")
    prompting: str = knob(
        "video", "video: prompted by the video; learned: only the vectors; none: the fixed words")
    prompt_blocks: tuple = knob((-1,), "text blocks before which the vectors are prompted")
    context_blocks: tuple = knob(
        (-1,), "for each of prompt_blocks the vision block whose context it gets")
    stop_gradient: bool = knob(True, "no gradient from the text into the vision tower")

    def __post_init__(self):
        choices = CHOICES | {"prompting": ("video", "learned", "none")}
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} {value!r} is unknown; use one of {', '.join(known)}")
        for name in ("frames", "context_tokens", "merge_step", "text_length"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not 0 < self.seed_ratio <= 1:
            raise ValueError(f"seed_ratio is {self.seed_ratio}; it must lie above 0, up to 1")
        if len(self.prompt_blocks) != len(self.context_blocks) or not self.prompt_blocks:
            raise ValueError(f"prompt_blocks {self.prompt_blocks} and context_blocks "
                             f"{self.context_blocks} must pair up")


def check_blocks(name, blocks, count):
    """Raises ValueError if a number names none of `count` blocks; -1 is the last block."""
    for i in blocks:
        if not -count <= i < count:
            raise ValueError(f"{name} {blocks}: there are blocks 0 to {count - 1}, "
                             f"or -{count} to -1")


# ---- the model -----------------------------------------------------------------------------------

class TCCLIP(nn.Module):
    """TC-CLIP: vision with temporal context, and text prompted by each video's context tokens.

        forward
            encode         ContextTower: the video's feature, and its context tokens
            encode_text
                shared_text    what no video changes, kept by text_cache; fast form: class_side
                prompt_text    what videos change: prompted_blocks; fast form: last_block

    Raises ValueError if the config does not fit the CLIP.
    """

    def __init__(self, clip, config=TCConfig()):
        super().__init__()
        require_text(clip, "TC-CLIP")
        self.clip, self.config = clip, config
        self.levels = self.prompt_levels()
        self.vision = ContextTower(clip.visual, config, self.levels.values())
        tokens = clip.tokenize([config.prompt])[0]
        words = tokens[1:int(tokens.argmax())]  # (M,), without start and end
        vectors = clip.token_embedding.weight[words].detach().clone()  # (M,W)
        self.vectors = nn.Parameter(vectors, requires_grad=config.prompting != "none")
        self.prompt_layers = nn.ModuleList(PromptLayer(self.text_blocks[j]) for j in self.levels)
        self.fast_text = list(self.levels) == [len(self.text_blocks) - 1]  # as in the paper
        self.text_cache = TextCache(clip)
        self.register_buffer("tokens", None, persistent=False)
        clip.token_embedding.requires_grad_(False)  # [released] not trained

    @property
    def text_blocks(self):
        return self.clip.transformer.resblocks

    def prompt_levels(self):
        """{text block: the vision block whose context prompts it}, in the order of text blocks."""
        config, clip = self.config, self.clip
        vision_count = len(clip.visual.transformer.resblocks)
        check_blocks("prompt_blocks", config.prompt_blocks, len(self.text_blocks))
        check_blocks("context_blocks", config.context_blocks, vision_count)
        check_blocks("reference_blocks", config.reference_blocks or (), vision_count)
        if config.prompting != "video":
            return {}
        W, E = clip.text_projection.shape
        if E != W:
            raise ValueError(f"video prompting needs a joint width ({E}) equal to the text width "
                             f"({W}); these weights allow prompting=learned")
        levels = {}
        for j, i in zip(config.prompt_blocks, config.context_blocks):
            levels[j % len(self.text_blocks)] = i % vision_count
        if len(levels) < len(config.prompt_blocks):
            raise ValueError(f"prompt_blocks {config.prompt_blocks} name a block twice")
        return dict(sorted(levels.items()))

    def set_classes(self, names):
        """Sets the classes; names are as in the dataset's files. Raises ValueError if one is too
        long for text_length."""
        self.tokens = self.tokenize(names)
        self.text_cache.drop()

    def tokenize(self, names):
        """Class names -> their prompts' tokens (C,L), cut at the longest: the tower is causal.

        [released] Capitals are split and underscores become spaces.
        """
        names = [split_capitals(name).replace("_", " ") for name in no_string(names)]
        length = min(self.config.text_length, len(self.clip.positional_embedding))
        try:
            tokens = self.clip.tokenize([f"{self.config.prompt} {name}." for name in names], length)
        except ValueError as error:
            most = len(self.clip.positional_embedding)
            if length == most:
                raise
            raise ValueError(f"{error}, or train with --set text_length={most}") from error
        longest = int(tokens.argmax(dim=-1).max()) + 1
        return tokens[:, :longest]

    def forward(self, video):
        """Normalised video (B,T,3,R,R) -> logits (B,C), and the auxiliary loss 0."""
        if self.tokens is None:
            raise ValueError("no classes yet: call set_classes(names) first")
        feature, contexts = self.encode(video)
        text = self.encode_text(contexts)  # (B,C,E), or (C,E) unless prompting is "video"
        logits = cosine_logits(feature, text, self.clip.logit_scale)
        return logits, logits.new_zeros(())

    def encode(self, video):
        """Normalised video (B,T,3,R,R) -> feature (B,E), contexts for the text {block: (B,k,E)}."""
        frames, contexts, _ = self.vision(self.clip.visual, video)
        if self.config.stop_gradient:  # c = SG(context tokens, projected to E) [paper]
            contexts = {i: context.detach() for i, context in contexts.items()}
        return frames.mean(dim=1), contexts

    def encode_video(self, video):
        """Embeds videos: normalised (B,T,3,R,R) -> the mean of the frames' features (B,E).

        The features are not normalised. Use this and `encode_names` to embed: TC-CLIP compares
        their cosine.
        """
        return self.encode(video)[0]

    def encode_names(self, names, video=None):
        """Embeds class names, prompted by each video (B,T,3,R,R): (B,C,E), not normalised.

        Without a video it gives (C,E): the vectors stay as they were learned, and no prompt layer
        runs [ours]. It also gives (C,E) unless the config's prompting is "video".
        """
        tokens = self.tokenize(names)
        if video is None:
            return self.project(end_rows(self.first_blocks(tokens), tokens))
        return self.prompt_text(self.shared_text(tokens), tokens, self.encode(video)[1])

    # ---- text

    def encode_text(self, contexts):
        """The classes' text, prompted by {block: (B,k,E)} -> (B,C,E) or (C,E)."""
        shared = self.text_cache(lambda: self.shared_text(self.tokens))
        return self.prompt_text(shared, self.tokens, contexts)

    def shared_text(self, tokens):
        """What no video changes: the rows (C,L,W) that enter the first prompted block, or all rows;
        in the fast form the ClassSide."""
        if self.fast_text:
            return self.class_side(tokens)
        return self.first_blocks(tokens, min(self.levels, default=None))

    def prompt_text(self, shared, tokens, contexts):
        """What the videos change: shared_text and {block: (B,k,E)} -> (B,C,E)."""
        if self.fast_text:
            (context,) = contexts.values()
            x = self.text_blocks[-1].checkpointed(self.last_block, shared, context)
            return self.project(x)
        if self.levels:
            shared = self.prompted_blocks(shared, contexts)  # (B,C,L,W)
        return self.project(end_rows(shared, tokens))

    def project(self, x):
        """End rows after the last block (...,W) -> text features (...,E)."""
        return self.clip.ln_final(x) @ self.clip.text_projection

    def with_vectors(self, x, p):
        """Puts the vectors p (...,M,W) at positions 1..M of every class's prompt x (...,C,L,W)."""
        start, name = x[..., :1, :], x[..., 1 + p.shape[-2]:, :]
        p = p.unsqueeze(-3).expand(*start.shape[:-2], -1, -1)  # (...,C,M,W)
        return torch.cat([start, p, name], dim=-2)

    def first_blocks(self, tokens, count=None):
        """The first `count` text blocks (None: all), unprompted: tokens (C,L) -> (C,L,W)."""
        x = self.with_vectors(self.clip.token_embedding(tokens), self.vectors)
        x = x + self.clip.positional_embedding[:x.shape[1]]
        for block in self.text_blocks[:count]:
            x = block(x, causal=True)
        return x

    def prompted_blocks(self, x, contexts):
        """All blocks from the first prompted one on, per video and class: (C,L,W) -> (B,C,L,W).

        [released] The vectors that enter a later level are those that the block before it made.
        """
        B, M = next(iter(contexts.values())).shape[0], len(self.vectors)
        layers = dict(zip(self.levels, self.prompt_layers))
        x = x.expand(B, -1, -1, -1)  # (B,C,L,W)
        for j in range(min(self.levels), len(self.text_blocks)):
            if j in layers:
                p = layers[j](x[:, 0, 1:1 + M], contexts[self.levels[j]])  # (B,M,W)
                x = self.with_vectors(x, p)
            rows = self.text_blocks[j](x.flatten(0, 1), causal=True)  # (B*C,L,W)
            x = rows.unflatten(0, x.shape[:2])
        return x

    # ---- text in fast form [ours, exact]: may be skipped at first reading; tests/test_tc.py,
    # test_fast_form_equals_the_plain_form compares it with the plain form, tests/plain.py

    def class_side(self, tokens):
        """What no video changes in the last block, at the end rows: tokens (C,L) -> ClassSide."""
        x = self.first_blocks(tokens, -1)  # (C,L,W), all blocks but the last
        block, M = self.text_blocks[-1], len(self.vectors)
        vectors = x[0, 1:1 + M]  # (M,W)
        fixed = torch.cat([x[:, :1], x[:, 1 + M:]], dim=1)  # (C,L-M,W), start and name
        k, v = block.attn.keys_values(block.ln_1(fixed))  # (C,H,L-M,d)
        position = torch.arange(fixed.shape[1], device=x.device)
        # the end token stands M places earlier in `fixed`, which lacks the vectors
        behind_end = position > tokens.argmax(dim=-1, keepdim=True) - M  # (C,L-M)
        x = end_rows(x, tokens)  # (C,W)
        q = block.attn.queries(block.ln_1(x[:, None]))  # (C,H,1,d)
        logit, value = as_one_key(q, k, v, behind_end)
        return ClassSide(x, q[:, :, 0], logit, value, vectors)

    def last_block(self, side, context):
        """The last block's end rows (B,C,W), from the class side and each context (B,k,W)."""
        B, block = context.shape[0], self.text_blocks[-1]
        p = side.vectors.expand(B, -1, -1)  # (B,M,W)
        p = self.prompt_layers[0](p, context)
        k, v = block.attn.keys_values(block.ln_1(p))  # (B,H,M,d)
        logits = torch.einsum("chd,bhmd->bchm", side.q, k) / k.shape[-1] ** 0.5  # (B,C,H,M)
        one_key = side.logit[..., None].expand(B, -1, -1, -1)  # (B,C,H,1)
        A = torch.cat([one_key, logits], dim=-1).softmax(dim=-1)  # (B,C,H,1+M)
        heads = A[..., :1] * side.value  # (B,C,H,d)
        heads = heads + torch.einsum("bchm,bhmd->bchd", A[..., 1:], v)
        return block.add_mlp(side.x + block.attn.out_proj(heads.flatten(-2)))


# ---- released checkpoints ------------------------------------------------------------------------

RELEASED_NAMES = {  # a released key's beginning: ours; the first that fits counts
    "image_encoder.": "clip.visual.",
    "text_encoder.prompt_generation_layer.": "prompt_layers.",
    "text_encoder.": "clip.",
    "prompt_learner.ctx": "vectors",
    "logit_scale": "clip.logit_scale",
}


def our_name(key):
    """A released key -> the name of the tensor in TCCLIP."""
    if key.endswith(".attn.local_global_bias_table"):
        return f"vision.local_global_bias.{key.split('.')[3]}"
    for old, new in RELEASED_NAMES.items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


def our_tensors(state_dict):
    """A released state_dict under our names; in_proj_* joined from q_proj, k_proj and v_proj."""
    tensors = {}
    for key, value in join_projections(state_dict_in(state_dict)).items():
        if key in ("prompt_learner.token_prefix", "prompt_learner.token_suffix"):
            continue  # they follow from the class names
        name = our_name(key)
        if name.startswith("vision.local_global_bias."):
            value = value.flatten(1)  # (H,1,2) -> (H,2)
        tensors[name] = value
    return tensors


def load_released(model, state_dict):
    """Loads a released TC-CLIP state_dict ("module." or not) into a TCCLIP, strictly.

    It holds no token embedding, which was never trained: the model keeps its own. Raises ValueError
    that names the missing, unknown and misshapen keys.
    """
    kept = ["clip.token_embedding.weight"]
    try:
        tensors = our_tensors(state_dict)
    except KeyError as error:
        raise ValueError(f"not a released TC-CLIP of this architecture: no {error}") from error
    if model.config.positions == "joint":
        kept.append("clip.visual.positional_embedding")
        joint = tensors.pop("clip.visual.positional_embedding", torch.empty(0))
        shape = model.vision.positions.shape  # (T,N,D)
        if joint.numel() == shape.numel():
            joint = joint.reshape(shape)
        tensors["vision.positions"] = joint
    own = model.state_dict()
    for name in kept:
        tensors[name] = own[name]
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"not a released TC-CLIP of this architecture: {reason:.240}") from error


def joint_frames(shape):
    """How many frames have positions of their own in a table (N,D), (T*N,D), (1,T*N,D) or (T,N,D).

    N - 1, the number of patches, is a square. If several T fit, the smallest counts.
    """
    if len(shape) == 3 and shape[0] > 1:
        return shape[0]
    rows = math.prod(shape[:-1])
    for T in range(1, rows):
        patches = rows // T - 1
        if rows % T == 0 and math.isqrt(patches) ** 2 == patches:
            return T
    raise ValueError(f"{rows} rows of positional_embedding fit no number of frames")


def numbers(names, start, end=""):
    """The sorted numbers that follow `start` in the names that begin and end so."""
    found = set()
    for name in names:
        if name.startswith(start) and name.endswith(end):
            found.add(int(name.removeprefix(start).split(".")[0]))
    return sorted(found)


def released_config(state_dict, **given):
    """The TCConfig of a released TC-CLIP state_dict ("module." or not), as far as its tensors tell.

    They tell the positions, with the number of frames if these are joint; the text length, if
    prompt_learner.token_suffix is there; the blocks with a bias; the prompt levels. Settings that
    are `given` count first. Raises ValueError if the tensors do not tell which text blocks are
    prompted, or if the positions fit nothing.
    """
    shapes = {key: tuple(value.shape) for key, value in state_dict_in(state_dict).items()}
    found = {}
    frames = joint_frames(shapes["image_encoder.positional_embedding"])
    if frames > 1:
        found |= {"positions": "joint", "frames": frames}
    suffix = shapes.get("prompt_learner.token_suffix")  # (C,L-1-M,W)
    if suffix is not None:
        found["text_length"] = 1 + shapes["prompt_learner.ctx"][0] + suffix[1]
    blocks = numbers(shapes, "image_encoder.transformer.resblocks.")
    biased = numbers(shapes, "image_encoder.transformer.resblocks.", ".local_global_bias_table")
    if not biased:
        found["local_global_bias"] = False
    elif biased != blocks[1:]:
        found["reference_blocks"] = tuple(biased)
    levels = numbers(shapes, "text_encoder.prompt_generation_layer.")
    if len(levels) > 1:  # [released] text block i takes the context of vision block i
        found |= {"prompt_blocks": tuple(levels), "context_blocks": tuple(levels)}
        known = levels == numbers(shapes, "text_encoder.transformer.resblocks.")
        if not known and "prompt_blocks" not in given:
            raise ValueError(f"{len(levels)} prompt layers, and no tensor tells their text blocks: "
                             "set prompt_blocks and context_blocks")
    return TCConfig(**found | given)
