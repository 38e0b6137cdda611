"""TC-CLIP: video-conditional prompting (Kim et al., ECCV 2024, section 3.3) and the whole model.

The prompt is [start, M learnable vectors, class name, ".", end]. Before text block j the vectors take up the video
(PromptLayer), then the block runs as usual: the whole text tower for every video and class. But it is causal and the
vectors stand before the name, so for prompting before the last block (the paper's) exactly this is enough [ours]:

    everything before block j is the same for all videos      once per class set (in training once per step)
    the vectors at j's entrance are the same for all classes  prompted once per video, (B,M,W)
    in block j only the end tokens' rows are used             one query per class: all that is new is its attention
                                                              to M vectors, then W_o and the MLP on (B,C,W)

Letters as in clip_vit.py and temporal_context.py, and: M prompt vectors, W text width (= E, as the video is prompted in).
"""

from dataclasses import dataclass

import torch
from torch import nn

from clip_vit import Attention, TextCache, cosine_logits, knob, no_string, split_capitals
from temporal_context import ContextTower


class PromptLayer(nn.Module):
    """p^ = p + MHCA(LN_p p, LN_s c, LN_s c),  p~ = p^ + MLP(LN p^): multi-head cross-attention to the video. [paper]

    Begun with the CLIP weights of text block `block`, whose LN_1 gives LN_p (ln_1) and LN_s (ln_1_kv). [released]
    """

    def __init__(self, block):
        super().__init__()
        width = len(block.ln_1.weight)
        self.attn, self.ln_1, self.ln_1_kv, self.ln_2 = Attention(width), *(nn.LayerNorm(width) for _ in range(3))
        self.mlp = type(block)(width).mlp
        state = {name: value.detach().clone() for name, value in block.state_dict().items()}
        self.load_state_dict(state | {name.replace("ln_1", "ln_1_kv"): state[name].clone() for name in
                                      ("ln_1.weight", "ln_1.bias")}, assign=True)

    def forward(self, p, c):
        """Vectors p (B,M,W), video c (B,k,W) -> p~ (B,M,W)."""
        p = p + self.attn(self.ln_1(p), self.ln_1_kv(c))
        return p + self.mlp(self.ln_2(p))


@dataclass(frozen=True)
class TCConfig:
    """What TC-CLIP is made of; the defaults are the paper's."""

    frames: int = knob(16, "T, needed by joint positions")
    context_tokens: int = knob(96, "k: all that the frames hand on to the next block")
    seed_ratio: float = knob(0.3, "alpha: the share of a frame's patches that become seeds")
    merge_step: int = knob(100, "r: pairs merged by one bipartite round")
    positions: str = knob("space", "space: the same for all frames; joint: one per frame and token")
    local_global_bias: bool = knob(True, "one for own and one for reference tokens, per head")
    text_length: int = knob(30, "longest prompt, in tokens")
    merge: str = knob("bipartite", "bipartite, none, random, kmeans, dpc-knn")
    reference: str = knob("context", "what frames look at: context, class, neighbour, all, none")
    reference_blocks: tuple | None = knob(
        None, "which vision blocks look at it; None: all but the first")
    prompt: str = knob("a photo of a", "the M vectors begin as these words' embeddings")
    prompting: str = knob(
        "video", "video: conditioned on it; learned: vectors alone; none: the words, fixed")
    prompt_blocks: tuple = knob((-1,), "text blocks before which the vectors are prompted")
    context_blocks: tuple = knob((-1,), "the vision blocks whose context each of them gets")
    stop_gradient: bool = knob(True, "no gradient from the text into the vision tower")

    def __post_init__(self):
        for name, known in (("positions", ("space", "joint")), ("prompting", ("video", "learned", "none")),
                            ("reference", ("context", "class", "neighbour", "all", "none")),
                            ("merge", ("bipartite", "none", "random", "kmeans", "dpc-knn"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown; use one of {', '.join(known)}")
        if not 0 < self.seed_ratio <= 1:
            raise ValueError(f"seed_ratio is {self.seed_ratio}; it must lie above 0 and be at most 1")
        for name in ("frames", "context_tokens", "merge_step", "text_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if len(self.prompt_blocks) != len(self.context_blocks) or not self.prompt_blocks:
            raise ValueError(f"prompt_blocks {self.prompt_blocks} and context_blocks {self.context_blocks} must pair up")


class TCCLIP(nn.Module):
    """TC-CLIP: the vision tower with temporal context, and text prompted by each video's context tokens."""

    def __init__(self, clip, config=TCConfig()):
        super().__init__()
        self.clip, self.config = clip, config
        text_blocks, vision_blocks = clip.transformer.resblocks, clip.visual.transformer.resblocks
        W, E = clip.text_projection.shape
        if config.prompting == "video" and E != W:
            raise ValueError(f"video prompting needs a joint width ({E}) equal to the text width ({W}); "
                             "these weights allow prompting=learned")
        for name, blocks, count in (("prompt_blocks", config.prompt_blocks, len(text_blocks)),
                                    ("context_blocks", config.context_blocks, len(vision_blocks)),
                                    ("reference_blocks", config.reference_blocks or (), len(vision_blocks))):
            if any(not -count <= i < count for i in blocks):
                raise ValueError(f"{name} {blocks}: there are blocks 0 to {count - 1} (or -{count} to -1)")
        self.levels = {j % len(text_blocks): i % len(vision_blocks)  # text block: the vision block whose context it gets
                       for j, i in zip(config.prompt_blocks, config.context_blocks) if config.prompting == "video"}
        if config.prompting == "video" and len(self.levels) < len(config.prompt_blocks):
            raise ValueError(f"prompt_blocks {config.prompt_blocks} name a block twice")
        self.vision = ContextTower(clip.visual, config, self.levels.values())
        words = clip.tokenize([config.prompt])[0]
        words = words[1:int(words.argmax())]  # without start and end: M ids
        self.vectors = nn.Parameter(clip.token_embedding.weight[words].detach().clone(),  # (M,W)
                                    requires_grad=config.prompting != "none")
        self.prompt_layers = nn.ModuleList(PromptLayer(text_blocks[j]) for j in sorted(self.levels))
        self.text_cache = TextCache(clip)
        self.register_buffer("tokens", None, persistent=False)
        self.register_buffer("end", None, persistent=False)
        clip.token_embedding.requires_grad_(False)  # [released] the one CLIP tensor that is not trained

    def set_classes(self, names):
        """Class names as in the dataset's files; capitals are split and underscores become spaces [released]."""
        names = [split_capitals(name).replace("_", " ") for name in no_string(names)]
        length = min(self.config.text_length, len(self.clip.positional_embedding))
        tokens = self.clip.tokenize([f"{self.config.prompt} {name}." for name in names], length)
        self.end = tokens.argmax(dim=-1)  # (C,)
        self.tokens = tokens[:, :int(self.end.max()) + 1]  # (C,L), cut as in CLIP.encode_text
        self.text_cache.drop()

    def encode_video(self, video):
        """Normalised video (B,T,3,R,R) -> its feature (B,E), the mean of its frames'; not normalised."""
        return self.vision(self.clip.visual, video)[0].mean(dim=1)

    def forward(self, video):
        """Normalised video (B,T,3,R,R) -> logits (B,C), and the auxiliary loss 0."""
        if self.tokens is None:
            raise ValueError("no classes yet: call set_classes(names) first")
        frames, contexts, _ = self.vision(self.clip.visual, video)  # (B,T,E), {block: (B,k,E)}
        if self.config.stop_gradient:  # c = SG(context tokens, projected to E) [paper]
            contexts = {i: context.detach() for i, context in contexts.items()}
        text = self.encode_text(contexts)  # (B,C,E), or (C,E) if no video is prompted in
        logits = cosine_logits(frames.mean(dim=1), text, self.clip.logit_scale)
        return logits, logits.new_zeros(())

    # ---- text

    def encode_text(self, contexts):
        """Text features prompted by each video's context {block: (B,k,E)} -> (B,C,E); (C,E) without prompting."""
        blocks, last = self.clip.transformer.resblocks, len(self.clip.transformer.resblocks) - 1
        if set(self.levels) == {last}:  # the paper's: of the last block only what is new
            side = self.text_cache(self.class_side)
            x = blocks[last].run(self.last_block, *side, contexts[self.levels[last]])  # (B,C,W)
        else:
            x = self.text_cache(self.shared_blocks)  # (C,L,W)
            if self.levels:
                x = self.prompted_blocks(x, contexts)  # (B,C,L,W)
            x = x[..., torch.arange(len(self.end), device=x.device), self.end, :]  # (...,C,W)
        return self.clip.ln_final(x) @ self.clip.text_projection  # (...,C,E)

    def with_vectors(self, x, p):
        """Puts the vectors p (...,M,W) into positions 1..M of every class's prompt x (...,C,L,W)."""
        p = p.unsqueeze(-3).expand(*x.shape[:-2], -1, -1)  # (...,C,M,W)
        return torch.cat([x[..., :1, :], p, x[..., 1 + len(self.vectors):, :]], dim=-2)

    def shared_blocks(self):
        """The text blocks before the first prompted one, the same for all videos: (C,L,W)."""
        x = self.with_vectors(self.clip.token_embedding(self.tokens), self.vectors)
        x = x + self.clip.positional_embedding[:x.shape[1]]
        blocks = self.clip.transformer.resblocks
        for block in blocks[:min(self.levels, default=len(blocks))]:
            x = block(x, causal=True)
        return x

    def class_side(self):
        """All of the last block that no video changes: the end rows, their queries, and their attention to start and name.

        Start and name act on an end token as *one* key would, with logit log-sum-exp(q k) and value softmax(q k) v.
        -> x (C,W), q (C,H,d), logit (C,H), value (C,H,d), and the vectors at the block's entrance (M,W).
        """
        x, block, M = self.shared_blocks(), self.clip.transformer.resblocks[-1], len(self.vectors)
        vectors = x[0, 1:1 + M]  # (M,W), the same in every class
        fixed = torch.cat([x[:, :1], x[:, 1 + M:]], dim=1)  # (C,L-M,W): row 0 is position 0, any other row i is i + M
        k, v = block.attn.keys_values(block.ln_1(fixed))  # (C,H,L-M,d)
        x = x[torch.arange(len(x), device=x.device), self.end]  # (C,W)
        q = block.attn.queries(block.ln_1(x[:, None]))  # (C,H,1,d)
        beyond = torch.arange(k.shape[-2], device=x.device) > self.end[:, None] - M  # (C,L-M): behind the end token
        scores = q @ k.transpose(-1, -2) / k.shape[-1] ** 0.5  # (C,H,1,L-M)
        scores = scores.masked_fill(beyond[:, None, None], -torch.inf)
        return x, q[:, :, 0], scores.logsumexp(dim=-1)[..., 0], (scores.softmax(dim=-1) @ v)[:, :, 0], vectors

    def last_block(self, x, q, logit, value, vectors, context):
        """The last block at the end tokens, given its class side and each video's context (B,k,W) -> (B,C,W)."""
        B, block = len(context), self.clip.transformer.resblocks[-1]
        p = self.prompt_layers[-1](vectors.expand(B, -1, -1), context)  # (B,M,W)
        k, v = block.attn.keys_values(block.ln_1(p))  # (B,H,M,d)
        scores = torch.einsum("chd,bhmd->bchm", q, k) / k.shape[-1] ** 0.5  # (B,C,H,M)
        a = torch.cat([logit[..., None].expand(B, -1, -1, -1), scores], dim=-1).softmax(dim=-1)  # (B,C,H,1+M)
        heads = a[..., :1] * value + torch.einsum("bchm,bhmd->bchd", a[..., 1:], v)  # (B,C,H,d)
        x = x + block.attn.out_proj(heads.flatten(-2))  # (B,C,W)
        return x + block.mlp(block.ln_2(x))

    def prompted_blocks(self, x, contexts):
        """Prompting before earlier blocks: from there on every block once per video *and* class, (C,L,W) -> (B,C,L,W).

        [released] The vectors that enter a later level are those that the previous block produced.
        """
        B, M, blocks = len(next(iter(contexts.values()))), len(self.vectors), self.clip.transformer.resblocks
        layers = dict(zip(sorted(self.levels), self.prompt_layers))
        x = x.expand(B, -1, -1, -1)  # (B,C,L,W)
        for j in range(min(self.levels), len(blocks)):
            if j in layers:
                x = self.with_vectors(x, layers[j](x[:, 0, 1:1 + M], contexts[self.levels[j]]))
            x = blocks[j](x.flatten(0, 1), causal=True).unflatten(0, (B, -1))
        return x


def load_released(model, state_dict):
    """Loads a released TC-CLIP state_dict (with "module." or without) into a TCCLIP, strictly.

    It has no token embedding, which was never trained; prefix and suffix follow from the class names. Raises ValueError
    that lists the keys.
    """
    rename = (("image_encoder.", "clip.visual."), ("text_encoder.prompt_generation_layer.", "prompt_layers."),
              ("text_encoder.", "clip."), ("prompt_learner.ctx", "vectors"), ("logit_scale", "clip.logit_scale"))
    state = {}
    for key, value in state_dict.items():
        key = key.removeprefix("module.")
        if key in ("prompt_learner.token_prefix", "prompt_learner.token_suffix"):
            continue
        key = next((new + key[len(old):] for old, new in rename if key.startswith(old)), key)
        value = torch.as_tensor(value)
        if key.endswith(".attn.local_global_bias_table"):
            key, value = f"vision.local_global_bias.{key.split('.')[4]}", value.flatten(1)  # (H,1,2) -> (H,2)
        if key == "clip.visual.positional_embedding" and model.config.positions == "joint":
            key, frame = "vision.positions", model.vision.positions[0]  # (N,D)
            value = value.reshape(-1, *frame.shape) if value.numel() % frame.numel() == 0 else value  # (T,N,D)
        state[key] = value
    for name in [name for name in state if name.endswith((".q_proj.weight", ".q_proj.bias"))]:
        parts = [state.pop(name.replace(".q_proj.", f".{p}_proj."), torch.empty(0)) for p in "qkv"]
        state[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    kept = {key: value for key, value in model.state_dict().items() if key == "clip.token_embedding.weight"
            or key == "clip.visual.positional_embedding" and model.config.positions == "joint"}
    try:
        model.load_state_dict(kept | state)
    except RuntimeError as error:
        raise ValueError("not a released TC-CLIP of this architecture: " + " ".join(str(error).split())) from error
