"""TC-CLIP's vision tower: temporal contextualization (Kim et al., ECCV 2024, section 3.2).

Every frame is encoded by CLIP, and every block summarises the whole video in k context tokens, at which all frames of
the next block may look. One block:

    attention   of each frame's tokens to that frame *and* to the context, which is then dropped
    seeds       the S patches of each frame to which its class token attends most
    summary     the seeds of all frames, merged to k tokens: the next context
    MLP         the block's own, on both

`tokens` (B,T,N,D) are what CLIP has, `context` (B,k,D) lives for one block: never one tensor. Letters as in clip_vit,
and: S seeds per frame, k context tokens, m reference tokens: what a frame sees beside itself, by default the context.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from token_merge import merge_to


class Summary(NamedTuple):
    """How one block summarised the video; pictures and tests look at it."""

    context: torch.Tensor  # (B,k,D) the context tokens before the block's MLP
    sizes: torch.Tensor  # (B,k) how many seeds went into each
    group: torch.Tensor  # (B,T*S) the context token that each seed went into
    seeds: torch.Tensor  # (B,T,S) patch indices from 0, by decreasing score
    scores: torch.Tensor  # (B,T,P) attention of the class token to each patch, mean over heads


# ---- attention -------------------------------------------------------------------------------------------------------

def reference_kv(kind, kv, context_kv):
    """What a frame may look at beside itself [paper, Table 1], as keys and values.

    From the frames' kv (B,T,N,2D) and the context's (B,k,2D) -> (B,T,m,2D); what all frames share is not copied.
    """
    T = kv.shape[1]
    if kind == "neighbour":  # the patches of frames t-1 and t+1, reflected at the ends [ours: the paper does not say]
        t = [min(1, T - 1), *range(T), max(T - 2, 0)]  # frame 0's neighbours are t[0] and t[2], and so on
        return torch.cat([kv[:, t[:T], 1:], kv[:, t[2:], 1:]], dim=2)  # (B,T,2P,2D)
    shared = context_kv if kind == "context" else kv[:, :, 0] if kind == "class" else kv[:, :, 1:].flatten(1, 2)
    return shared[:, None].expand(-1, T, -1, -1)  # (B,T,m,2D), m = k, T or T*P


def on_reference(values, columns, m, fill):
    """A value per head (H,) on the last m of the attention's columns, `fill` on the others: (H,1,columns)."""
    return F.pad(values[:, None, None].expand(-1, 1, m), (columns - m, 0), value=fill)


def biased_attention(q, k, v, bias, m):
    """A v with A = softmax(q [k_frame | k_reference]^T / sqrt(d) + bias), `bias` (H,) on the m references. [paper]

    q (n,H,rows,d), k and v (n,H,columns,d) -> (n,H,rows,d). The fused kernels take the bias as a mask, and give a
    mask no gradient; the bias gets it so [ours, exact]: to raise it by e is to multiply by exp(e) the reference
    columns' values and their share w of the softmax's denominator,

        Attention(bias + e) = Attention(bias; exp(e) v_reference) / (1 + w (exp(e) - 1)).

    With e = bias - bias.detach(), which is 0, no value changes, and e carries the whole gradient.
    """
    columns = k.shape[-2]
    mask = on_reference(bias.detach(), columns, m, 0).expand(len(q), -1, q.shape[-2], -1)  # (n,H,rows,columns), a view
    if not (bias.requires_grad and torch.is_grad_enabled()):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    with torch.no_grad():
        is_reference = F.pad(v.new_ones(m, v.shape[-1]), (0, 0, columns - m, 0))  # (columns,d)
        share = F.scaled_dot_product_attention(q, k, is_reference.expand_as(k), attn_mask=mask)[..., :1]  # (n,H,rows,1)
    growth = (bias - bias.detach()).exp()  # (H,), equal to 1
    v = v * on_reference(growth, columns, m, 1).transpose(-1, -2)  # (n,H,columns,d) * (H,columns,1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask) / (1 + share * (growth[:, None, None] - 1))


@torch.no_grad()
def seed_scores(q_class, k, bias, m, patches):
    """Attention of each frame's class token to its patches: q_class (n,H,1,d), k (n,H,columns,d) -> (n,P).

    [paper] The class row of A, mean over heads; its softmax runs over the reference columns and their bias too.
    """
    row = (q_class * q_class.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (n,H,1,columns)
    if bias is not None:
        row = row + on_reference(bias, k.shape[-2], m, 0)
    return row.softmax(dim=-1)[:, :, 0, 1:1 + patches].mean(dim=1)  # (n,P)


# ---- the tower -------------------------------------------------------------------------------------------------------

def take(rows, index):
    """Rows (B,T,n,D) at index (B,T,S) -> (B,T,S,D)."""
    B, T, n, _ = rows.shape
    frame = torch.arange(B * T, device=index.device).view(B, T, 1) * n  # each frame's first row, rows counted through
    return rows.flatten(0, 2).index_select(0, (frame + index).flatten()).unflatten(0, index.shape)


class ContextTower(nn.Module):
    """CLIP's vision tower with temporal context. Holds what CLIP lacks; the CLIP weights come with each call.

    `config` is a TCConfig (video_prompt.py). `context_blocks` are the blocks whose context the text will read.
    """

    def __init__(self, visual, config, context_blocks):
        super().__init__()
        self.config = config
        blocks, (N, _) = visual.transformer.resblocks, visual.positional_embedding.shape
        self.seeds = int((N - 1) * config.seed_ratio)  # S
        looking = range(1, len(blocks)) if config.reference_blocks is None else config.reference_blocks
        self.looking = {i % len(blocks) for i in looking} if config.reference != "none" else set()  # at references
        self.read = {i % len(blocks) for i in context_blocks}
        self.summarising = set(self.read)  # these blocks make a context
        if config.reference == "context":
            self.summarising |= {i - 1 for i in self.looking}
        if 0 in self.looking or not 1 <= self.seeds < N:
            raise ValueError(f"reference_blocks cannot hold block 0, before which there is no context; and seed_ratio "
                             f"{config.seed_ratio} must leave 1 to {N - 1} seeds of {N - 1} patches")
        self.local_global_bias = nn.ParameterDict()  # {block: b_local and b_global of each head}
        for i in sorted(self.looking) if config.local_global_bias else ():
            table = blocks[i].attn.in_proj_bias.new_empty(blocks[i].attn.heads, 2)
            self.local_global_bias[str(i)] = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))  # (H,2)
        if config.positions == "joint":  # one position per frame and token, begun with T copies of CLIP's [released]
            self.positions = nn.Parameter(visual.positional_embedding.detach().repeat(config.frames, 1, 1))  # (T,N,D)
            visual.positional_embedding.requires_grad_(False)

    def forward(self, visual, video):
        """video (B,T,3,R,R) -> frame features (B,T,E), {read block: context (B,k,E)}, {block: Summary}."""
        positions = self.positions if self.config.positions == "joint" else visual.positional_embedding
        if self.config.positions == "joint" and video.shape[1] != self.config.frames:
            raise ValueError(f"the video has {video.shape[1]} frames; this model was made for {self.config.frames}")
        tokens = visual.tokens(video.flatten(0, 1)).unflatten(0, video.shape[:2])  # (B,T,N,D)
        tokens, context = visual.ln_pre(tokens + positions), None
        contexts, summaries = {}, {}
        for i, block in enumerate(visual.transformer.resblocks):
            last = i == len(visual.transformer.resblocks) - 1
            tokens, context, summary = block.run(self.block, block, i, last, tokens, context)
            if summary is not None:
                summaries[i] = summary
            if i in self.read:
                contexts[i] = visual.ln_post(context) @ visual.proj  # (B,k,E)
        return visual.ln_post(tokens[:, :, 0]) @ visual.proj, contexts, summaries

    def block(self, block, i, last, tokens, context):
        """Block i: tokens (B,T,N,D), context (B,k,D) or None -> both anew, and its Summary or None.

        The last block computes the used rows alone [ours, exact]: class and seeds, after the summary the class.
        """
        B, T, N, _ = tokens.shape
        attn, y = block.attn, block.ln_1(tokens)
        k, v, bias, m = self.keys_values(block, i, y, context)  # (B*T,H,N+m,d), the bias (H,) of the m
        seeds = torch.empty(B, T, 0, dtype=torch.int64, device=tokens.device)  # none without a summary
        if i in self.summarising:
            q_class = attn.queries(y[:, :, :1]).flatten(0, 1)  # (B*T,H,1,d)
            scores = seed_scores(q_class, k, bias, m, N - 1).unflatten(0, (B, T))  # (B,T,P)
            seeds = scores.argsort(dim=-1, descending=True, stable=True)[..., :self.seeds]  # (B,T,S)
        if last:
            used = F.pad(seeds + 1, (1, 0))  # (B,T,1+S): the class token is row 0, patch p is row p + 1
            tokens, y = take(tokens, used), take(y, used)  # (B,T,1+S,D)
        q = attn.queries(y).flatten(0, 1)  # (B*T,H,N or 1+S,d)
        heads = F.scaled_dot_product_attention(q, k, v) if bias is None else biased_attention(q, k, v, bias, m)
        tokens = tokens + attn.project_out(heads).unflatten(0, (B, T))  # tokens' = tokens + W_o A V, as many rows

        context = summary = None
        if i in self.summarising:
            found = tokens[:, :, 1:] if last else take(tokens, seeds + 1)  # (B,T,S,D)
            merged, sizes, group = merge_to(found.flatten(1, 2), self.config.context_tokens, self.config.merge_step,
                                            self.config.merge, sources=True)  # (B,k,D)
            summary = Summary(merged, sizes, group, seeds, scores)
            context = merged + block.mlp(block.ln_2(merged))
        if last:
            tokens = tokens[:, :, :1]
        return tokens + block.mlp(block.ln_2(tokens)), context, summary

    def keys_values(self, block, i, y, context):
        """Keys and values of each frame and of its m reference tokens, (B*T,H,N+m,d); their bias, (H,) or None; m."""
        kv, bias, m = block.attn.project_kv(y), None, 0  # (B,T,N,2D)
        if i in self.looking:
            context_kv = None if context is None else block.attn.project_kv(block.ln_1(context))  # (B,k,2D)
            reference = reference_kv(self.config.reference, kv, context_kv)  # (B,T,m,2D)
            kv, m = torch.cat([kv, reference], dim=2), reference.shape[2]  # (B,T,N+m,2D)
            if self.config.local_global_bias:
                b_local, b_global = self.local_global_bias[str(i)].unbind(dim=1)  # (H,) each
                bias = b_global - b_local  # all that a softmax sees of the two; released checkpoints hold both
        k, v = kv.flatten(0, 1).chunk(2, dim=-1)  # (B*T,N+m,D)
        return block.attn.split(k), block.attn.split(v), bias, m
