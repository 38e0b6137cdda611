"""TC-CLIP, plainly: the whole method of the paper for one video at a time, without any trick.

This is the best first reading. The weights are those of a TCCLIP (video_prompt.py), whose fast form
gives the same logits and gradients in float64 (tests/test_tc.py). Here the text tower runs once for
every video, and every block computes every row, as in the published code.

This is the whole of the default configuration, with joint positions, no merging, no biases, several
prompt levels or gradients into the context as its only variants.

    encode_video   frames -> blocks with temporal context -> frame features, context tokens
    encode_text    class names -> blocks, prompted by the video's context -> text features
    logits         exp(s) cos(mean of the frame features, text feature)

Letters: T frames, N = 1 + P tokens of a frame, D width, H heads of width d, S seeds per frame,
k context tokens, C classes, L text length, M prompt vectors, W text width, E joint width; n rows of
queries, m rows of keys.
"""

import torch
import torch.nn.functional as F

from clip_vit import split_capitals


# ---- attention and MLP ---------------------------------------------------------------------------

def project_heads(attn, x, part):
    """Queries, keys or values (part 0, 1 or 2) of x (...,n,D) -> (...,H,n,d)."""
    weight = attn.in_proj_weight.chunk(3)[part]  # (D,D)
    bias = attn.in_proj_bias.chunk(3)[part]  # (D,)
    return F.linear(x, weight, bias).unflatten(-1, (attn.heads, -1)).transpose(-2, -3)


def attention(attn, x_q, x_kv, bias):
    """A = softmax(q k^T / sqrt(d) + bias); gives W_o A V (...,n,D) and A (...,H,n,m)."""
    q = project_heads(attn, x_q, 0)  # (...,H,n,d)
    k = project_heads(attn, x_kv, 1)  # (...,H,m,d)
    v = project_heads(attn, x_kv, 2)
    A = (q @ k.transpose(-1, -2) / k.shape[-1] ** 0.5 + bias).softmax(dim=-1)
    out = (A @ v).transpose(-2, -3).flatten(-2)  # (...,n,D)
    return attn.out_proj(out), A


def add_mlp(block, x):
    """x + MLP(LN x)."""
    return x + block.mlp(block.ln_2(x))


# ---- vision: the seeds of all frames become context tokens ---------------------------------------

def local_global_bias(model, i, N, k):
    """In block i: b_local on a frame's own N tokens, b_global on the context. (H,1,N+k)."""
    if not model.config.local_global_bias:
        return 0.0
    b_local, b_global = model.vision.local_global_bias[str(i)].chunk(2, dim=1)  # (H,1) each
    bias = torch.cat([b_local.expand(-1, N), b_global.expand(-1, k)], dim=1)  # (H,N+k)
    return bias[:, None]


def merge_round(x, sizes, r):
    """One round of bipartite soft matching: x (n,D) with sizes (n,) -> n - r tokens with sizes.

    a = tokens 0, 2, 4, ..., b = tokens 1, 3, 5, .... Each a picks its most similar b, and the r best pairs merge:
    b becomes the size-weighted mean of itself and of all a that join it.
    """
    a, size_a = x[::2], sizes[::2]
    b, size_b = x[1::2], sizes[1::2]
    cosine = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    best, partner = cosine.max(dim=1)
    order = best.argsort(descending=True, stable=True)
    merged, unmerged = order[:r], order[r:]
    mass_a = a[merged] * size_a[merged, None]
    mass_b = (b * size_b[:, None]).index_add(0, partner[merged], mass_a)
    size_b = size_b.index_add(0, partner[merged], size_a[merged])
    x = torch.cat([a[unmerged], mass_b / size_b[:, None]])  # (n-r,D)
    return x, torch.cat([size_a[unmerged], size_b])


def merge(x, k, step):
    """Merges x (n,D) to k tokens: as many rounds of `step` pairs as fit, then smaller ones."""
    sizes = x.new_ones(len(x))
    full_rounds = (len(x) - k) // step
    while len(x) > k:
        r = step if full_rounds > 0 else len(x) - k
        x, sizes = merge_round(x, sizes, min(r, len(x) // 2))  # a round can at most halve
        full_rounds -= 1
    return x


def choose_seeds(tokens, A, S):
    """The S patches of each frame that its class token attends to most, in decreasing order.

    tokens (T,N,D), A (T,H,N,m) -> (T*S,D), frame after frame. The order matters: when they are merged,
    those at even places choose among those at odd places. [released] A is the block's own attention,
    a softmax over the context too, with its bias; the paper's runs over the frame's own keys.
    """
    T, N, _ = tokens.shape
    scores = A[:, :, 0, 1:N].mean(dim=1)  # (T,P), mean over heads
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :S]  # (T,S)
    return torch.cat([tokens[t, 1 + best[t]] for t in range(T)])


def vision_block(model, i, block, tokens, context):
    """Block i: tokens (T,N,D) and context (k,D) or None -> the same for the next block."""
    config, (T, N, _) = model.config, tokens.shape
    y = y_kv = block.ln_1(tokens)  # (T,N,D)
    bias = 0.0
    if context is not None:  # every frame also looks at the context
        z = block.ln_1(context)  # (k,D)
        y_kv = torch.cat([y, z.expand(T, -1, -1)], dim=1)  # (T,N+k,D)
        bias = local_global_bias(model, i, N, len(z))
    out, A = attention(block.attn, y, y_kv, bias)
    tokens = tokens + out  # the old context is dropped
    context = choose_seeds(tokens, A, int((N - 1) * config.seed_ratio))  # (T*S,D)
    if config.merge != "none":
        context = merge(context, config.context_tokens, config.merge_step)  # (k,D)
    return add_mlp(block, tokens), add_mlp(block, context)


def encode_video(model, video):
    """One video (T,3,R,R) -> frame features (T,E), and the context of every block, each (k,E)."""
    visual, positions = model.clip.visual, model.clip.visual.positional_embedding  # (N,D)
    if model.config.positions == "joint":
        positions = model.vision.positions  # (T,N,D)
    tokens = visual.ln_pre(visual.tokens(video) + positions)  # (T,N,D)
    context, contexts = None, []
    for i, block in enumerate(visual.transformer.resblocks):
        tokens, context = vision_block(model, i, block, tokens, context)
        contexts.append(visual.project(context))
    return visual.project(tokens[:, 0]), contexts


# ---- text: the prompts take up the video's context -----------------------------------------------

def prompt_layer(layer, p, c):
    """p^ = p + MHCA(LN_p p, LN_c c, LN_c c), then p~ = p^ + MLP(LN p^). p (M,W), c (k,W)."""
    out, _ = attention(layer.attn, layer.ln_1(p), layer.ln_1_kv(c), bias=0.0)
    return add_mlp(layer, p + out)


def with_vectors(x, p):
    """Puts the vectors p (M,W) at positions 1..M of every prompt x (C,L,W)."""
    start, name = x[:, :1], x[:, 1 + len(p):]
    return torch.cat([start, p.expand(len(x), -1, -1), name], dim=1)


def encode_text(model, contexts, tokens):
    """The whole text tower for one video: contexts, prompts' tokens (C,L) -> features (C,E)."""
    clip, M, L = model.clip, len(model.vectors), tokens.shape[1]
    x = with_vectors(clip.token_embedding(tokens), model.vectors)  # (C,L,W)
    x = x + clip.positional_embedding[:L]
    causal = x.new_full((L, L), -torch.inf).triu(1)
    layers = dict(zip(model.levels, model.prompt_layers))  # {text block: its prompt layer}
    for j, block in enumerate(clip.transformer.resblocks):
        if j in layers:  # in the paper only the last block
            c = contexts[model.levels[j]]  # (k,E), of the vision block that belongs to block j
            if model.config.stop_gradient:
                c = c.detach()
            layer = layers[j]
            x = with_vectors(x, prompt_layer(layer, x[0, 1:1 + M], c))
        y = block.ln_1(x)
        out, _ = attention(block.attn, y, y, causal)
        x = add_mlp(block, x + out)
    end = tokens.argmax(dim=1)  # the end token has the largest id
    x = x[torch.arange(len(x)), end]  # (C,W)
    return clip.ln_final(x) @ clip.text_projection


# ---- TC-CLIP -------------------------------------------------------------------------------------

def prompts(model, names):
    """[start, "a photo of a", class name, ".", end, padding] as tokens (C,L)."""
    names = [split_capitals(name).replace("_", " ") for name in names]
    length = min(model.config.text_length, len(model.clip.positional_embedding))
    return model.clip.tokenize([f"{model.config.prompt} {name}." for name in names], length)


def logits(model, videos, tokens):
    """exp(s) cos(video, text): normalised videos (B,T,3,R,R), prompts (C,L) -> logits (B,C)."""
    rows = []
    for video in videos:
        frames, contexts = encode_video(model, video)
        text = encode_text(model, contexts, tokens)  # (C,E)
        feature = F.normalize(frames.mean(dim=0), dim=0)  # (E,)
        cosine = F.normalize(text, dim=1) @ feature  # (C,)
        rows.append(model.clip.logit_scale.exp() * cosine)
    return torch.stack(rows)
