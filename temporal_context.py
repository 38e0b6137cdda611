"""TC-CLIP's vision tower: temporal contextualization (Kim et al., ECCV 2024, section 3.2).

CLIP encodes every frame by itself. Here each block also summarises the whole video in k context
tokens, and all frames look at them in the next block. One block (`ContextTower.run_block`):

    attention   each frame's tokens look at the frame and at the last block's context, which is then
                dropped
    seeds       the S patches of each frame to which its class token attends most, as they are after
                this attention
    summary     the seeds of all frames, merged to k tokens
    MLP         the block's own, on the tokens and on the k tokens: these are the new context

Sections: what frames look at; attention; seeds and summary; the tower.

`tokens` (B,T,N,D) are CLIP's, `context` (B,k,D) lives for one block; they are never one tensor.
Letters as in clip_vit.py, and: S seeds per frame, k context tokens, m reference tokens. References
are what a frame looks at besides itself; by default they are the k context tokens.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from clip_vit import at_least_float32, full_precision
from token_merge import MERGES, merge_to

CHOICES = {  # the tower's settings that are names, and what each may be
    "positions": ("space", "joint"),
    "merge": tuple(MERGES),
    "reference": ("context", "class", "neighbour", "all", "none"),
}


# ---- what frames look at ------------------------------------------------------------------------

# The paper's local-global bias: each head adds b_local to the attention logits of a frame's own
# tokens, and b_global to those of the references. A softmax stays as it is if b_local is subtracted
# from all logits. So only b_global - b_local, added to the references' logits, is computed.

class Seen(NamedTuple):
    """What each frame's tokens look at in one block: the frame's own tokens, then references."""

    keys: torch.Tensor  # (B*T,H,N+m,d)
    values: torch.Tensor  # (B*T,H,N+m,d)
    m: int  # the last m columns are references
    bias: torch.Tensor | None  # (H,) b_global - b_local, added to the references' attention logits


def neighbours(kv):
    """The patches of frames t-1 and t+1: kv (B,T,N,2D) -> (B,T,2P,2D). [paper]

    [ours] The first and the last frame see their one neighbour twice; a single frame sees itself.
    """
    T = kv.shape[1]
    frame = torch.arange(T, device=kv.device)
    before = (frame - 1).abs().clamp(max=T - 1)  # 1, 0, 1, ..., T-2
    after = T - 1 - (T - 2 - frame).abs()  # 1, 2, ..., T-1, T-2
    return torch.cat([kv[:, before, 1:], kv[:, after, 1:]], dim=2)


def reference_kv(kind, kv, context_kv):
    """Keys and values of each frame's references [paper, Table 1]: (B,T,m,2D).

    kv (B,T,N,2D) are those of the frames, context_kv (B,k,2D) those of the context. References that
    all frames share are a view. Raises ValueError if the kind is unknown.
    """
    if kind == "neighbour":
        return neighbours(kv)
    if kind == "context":
        shared = context_kv
    elif kind == "class":
        shared = kv[:, :, 0]  # (B,T,2D)
    elif kind == "all":
        shared = kv[:, :, 1:].flatten(1, 2)  # (B,T*P,2D)
    else:
        raise ValueError(f"reference {kind!r} is unknown; use {', '.join(CHOICES['reference'])}")
    return shared[:, None].expand(-1, kv.shape[1], -1, -1)


# ---- attention ----------------------------------------------------------------------------------

def reference_mask(bias, columns, m):
    """The bias of each head (H,) on the last m of the columns, 0 on the others: (1,H,1,columns)."""
    on_references = bias[None, :, None, None].expand(-1, -1, 1, m)
    return F.pad(on_references, (columns - m, 0))


def biased_attention(q, keys, values, bias, m):
    """softmax(q keys^T / sqrt(d) + bias) values, the bias (H,) on the last m columns only. [paper]

    q (n,H,rows,d), keys and values (n,H,columns,d) -> (n,H,rows,d).
    """
    if bias.requires_grad and torch.is_grad_enabled():
        return with_bias_gradient(q, keys, values, bias, m)
    mask = reference_mask(bias, keys.shape[-2], m)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)


def with_bias_gradient(q, keys, values, bias, m):
    """The same attention, which gives the bias its gradient too.

    The CPU's fused kernel gives a mask no gradient, and a GPU's would build it for every row. This
    trick may be skipped at first reading; tests/test_tc.py, test_biased_attention_and_its_gradients
    compares values and gradients with the formula above. [ours, exact]
    One more channel in queries and keys adds the bias to the products of the references:

        q' = [q, sqrt(d) bias],  key' = [key, 1 if it is a reference's, else 0]
        q' key'^T / sqrt(d) = q key^T / sqrt(d) + bias on the references.

    It comes with seven channels of zeros, since GPU kernels want a multiple of 8.
    """
    columns, d = keys.shape[-2:]
    scaled = (d ** 0.5 * bias).type_as(q)  # (H,)
    on_queries = F.pad(scaled[:, None, None], (0, 7)).expand(*q.shape[:-1], 8)  # (n,H,rows,8)
    on_keys = F.pad(keys.new_ones(m, 1), (0, 7, columns - m, 0))  # (columns,8)
    q = torch.cat([q, on_queries], dim=-1)  # (n,H,rows,d+8)
    keys = torch.cat([keys, on_keys.expand(*keys.shape[:-1], 8)], dim=-1)  # (n,H,columns,d+8)
    heads = F.scaled_dot_product_attention(q, keys, F.pad(values, (0, 8)), scale=d ** -0.5)
    return heads[..., :d]


def attend(attn, y, seen):
    """W_o A V of every row of y (B,T,rows,D) -> (B,T,rows,D)."""
    q = attn.queries(y).flatten(0, 1)  # (B*T,H,rows,d)
    if seen.bias is None:
        heads = F.scaled_dot_product_attention(q, seen.keys, seen.values)
    else:
        heads = biased_attention(q, seen.keys, seen.values, seen.bias, seen.m)
    return attn.project_out(heads).unflatten(0, y.shape[:2])


# ---- seeds and summary --------------------------------------------------------------------------

class Summary(NamedTuple):
    """How one block summarised the video; pictures and tests look at it."""

    merged: torch.Tensor  # (B,k,D) the means of the seeds' groups
    context: torch.Tensor  # (B,k,D) the context tokens: the same after the block's MLP
    sizes: torch.Tensor  # (B,k) how many seeds went into each
    group: torch.Tensor  # (B,T*S) the context token that each seed went into
    seeds: torch.Tensor  # (B,T,S) patch numbers from 0, by decreasing score
    scores: torch.Tensor  # (B,T,P) attention of the class token to each patch, mean over heads


def class_logits(q, keys):
    """q keys^T of the class tokens: q (n,H,1,d), keys (n,H,columns,d) -> (n,H,1,columns).

    Plainly q @ keys.transpose(-1, -2). For that PyTorch copies all keys, since the heads of a token
    lie side by side in memory. Here each head's query is padded with zeros to the width of all
    heads, so that one product with the keys as they lie serves all: H times the multiply-adds of
    one row, and no copy. tests/test_tc.py, test_class_logits compares the two. [ours, exact]
    """
    H = q.shape[1]
    own = torch.eye(H, dtype=q.dtype, device=q.device)[:, :, None]  # (H,H,1)
    wide = (q * own).flatten(2)  # (n,H,H*d)
    side_by_side = keys.transpose(1, 2).flatten(2)  # (n,columns,H*d), a view
    return (wide @ side_by_side.transpose(1, 2))[:, :, None]


@torch.no_grad()
def seed_scores(q, seen, patches):
    """Attention of each frame's class token to its patches: q (B*T,H,1,d) -> (B*T,P).

    score(b,t,p) = mean over heads of A[class token -> patch p]. [released] A is the whole
    attention: its softmax also runs over the references with their bias. (In the paper's equation
    it runs over the frame's own keys only.) This row of A is computed once more here, since fused
    attention does not give A; in fp32, whatever the autocast.
    """
    with full_precision(q.device):
        q, keys = at_least_float32(q), at_least_float32(seen.keys)
        logits = class_logits(q * q.shape[-1] ** -0.5, keys)  # (B*T,H,1,N+m)
        if seen.bias is not None:
            logits = logits + reference_mask(seen.bias, keys.shape[-2], seen.m)
        A = logits.softmax(dim=-1)
    return A[:, :, 0, 1:1 + patches].mean(dim=1)


def take_rows(x, rows):
    """The given rows of each frame: x (B,T,n,D), rows (B,T,S) int64 -> (B,T,S,D)."""
    B, T, n, _ = x.shape
    first = n * torch.arange(B * T, device=x.device).view(B, T, 1)  # the first row of each frame
    flat = x.flatten(0, 2)  # (B*T*n,D)
    return flat.index_select(0, (first + rows).flatten()).unflatten(0, rows.shape)


# ---- the tower ----------------------------------------------------------------------------------

class Encoded(NamedTuple):
    """What the tower makes of videos."""

    frames: torch.Tensor  # (B,T,E) projected class tokens
    contexts: dict  # {block: (B,k,E)} projected context tokens of the blocks that the text reads
    summaries: dict  # {block: Summary} of the blocks that make a context


def looking_blocks(config, count):
    """The blocks, of `count`, whose frames look at references: by default all but the first."""
    if config.reference == "none":
        return set()
    if config.reference_blocks is None:
        return set(range(1, count))
    looking = {i % count for i in config.reference_blocks}
    if 0 in looking:
        raise ValueError(f"reference_blocks {config.reference_blocks} holds block 0, before which "
                         f"there is no context; use blocks 1 to {count - 1}")
    return looking


class ContextTower(nn.Module):
    """CLIP's vision tower with temporal context. It holds what CLIP lacks: biases and positions.

    CLIP's own tower `visual` comes with each call. `config` is a TCConfig (video_prompt.py);
    `read_by_text` are the numbers of the blocks whose context the text reads. Raises ValueError if
    a setting does not fit the tower.
    """

    def __init__(self, visual, config, read_by_text):
        super().__init__()
        self.config = config
        blocks, patches = visual.transformer.resblocks, len(visual.positional_embedding) - 1
        self.seeds = int(patches * config.seed_ratio)  # S
        if self.seeds < 1:
            raise ValueError(f"seed_ratio {config.seed_ratio} makes no seed of {patches} patches: "
                             "raise it")
        self.looking = looking_blocks(config, len(blocks))
        self.read_by_text = set(read_by_text)
        self.summarising = set(read_by_text)  # the blocks that make a context
        if config.reference == "context":
            self.summarising |= {i - 1 for i in self.looking}
        self.local_global_bias = nn.ParameterDict()  # {block: (H,2)}: b_local and b_global per head
        if config.local_global_bias:
            for i in sorted(self.looking):
                table = visual.positional_embedding.new_empty(blocks[i].attn.heads, 2)
                nn.init.trunc_normal_(table, std=0.02)  # [released]
                self.local_global_bias[str(i)] = nn.Parameter(table)
        if config.positions == "joint":  # one per frame and token; at first T copies [released]
            joint = visual.positional_embedding.detach().repeat(config.frames, 1, 1)  # (T,N,D)
            self.positions = nn.Parameter(joint)
            visual.positional_embedding.requires_grad_(False)

    def forward(self, visual, video):
        """Normalised video (B,T,3,R,R) -> Encoded. Raises ValueError if T does not fit."""
        tokens, context = self.embed(visual, video), None  # (B,T,N,D)
        contexts, summaries = {}, {}
        blocks = visual.transformer.resblocks
        for i, block in enumerate(blocks):
            one_block = self.run_block if i < len(blocks) - 1 else self.run_last_block
            tokens, summary = block.checkpointed(one_block, block, i, tokens, context)
            context = None  # what the block looked at goes no further
            if i in self.summarising:
                context, summaries[i] = summary.context, summary
            if i in self.read_by_text:
                contexts[i] = visual.project(context)  # (B,k,E)
        frames = visual.project(tokens[:, :, 0])  # (B,T,E)
        return Encoded(frames, contexts, summaries)

    def embed(self, visual, video):
        """Video (B,T,3,R,R) -> the tokens that enter the first block (B,T,N,D)."""
        B, T = video.shape[:2]
        positions = visual.positional_embedding  # (N,D), the same for every frame
        if self.config.positions == "joint":
            positions = self.positions  # (T,N,D)
            if T != self.config.frames:
                raise ValueError(f"the video has {T} frames; "
                                 f"this model was made for {self.config.frames}")
        tokens = visual.tokens(video.flatten(0, 1)).unflatten(0, (B, T))  # (B,T,N,D)
        return visual.ln_pre(tokens + positions)

    def run_block(self, block, i, tokens, context):
        """Block i: tokens (B,T,N,D) and the context (B,k,D) or None -> tokens, Summary or None."""
        y = block.ln_1(tokens)  # (B,T,N,D)
        seen = self.look(block, i, y, context)
        tokens = tokens + attend(block.attn, y, seen)  # tokens' = tokens + W_o A V
        summary = None
        if i in self.summarising:
            seeds, scores = self.choose_seeds(block, y, seen)
            summary = self.summarise(block, take_rows(tokens, seeds + 1), seeds, scores)
        return block.add_mlp(tokens), summary

    def run_last_block(self, block, i, tokens, context):
        """run_block, computed only at the rows that are used later: class tokens and seeds.

        It may be skipped at first reading; tests/test_tc.py, test_fast_form_equals_the_plain_form
        compares it with tests/plain.py. [ours, exact]
        """
        y = block.ln_1(tokens)  # (B,T,N,D)
        seen = self.look(block, i, y, context)
        summary, rows = None, y.new_zeros(*y.shape[:2], 1, dtype=torch.int64)  # the class tokens
        if i in self.summarising:
            seeds, scores = self.choose_seeds(block, y, seen)
            rows = F.pad(seeds + 1, (1, 0))  # (B,T,1+S): patch p is row p + 1
        tokens = take_rows(tokens, rows) + attend(block.attn, take_rows(y, rows), seen)
        if i in self.summarising:
            summary = self.summarise(block, tokens[:, :, 1:], seeds, scores)
        return block.add_mlp(tokens[:, :, :1]), summary  # (B,T,1,D)

    def look(self, block, i, y, context):
        """What frames look at in block i, from y = LN_1 tokens (B,T,N,D) and the context."""
        kv, m, bias = block.attn.project_kv(y), 0, None  # (B,T,N,2D)
        if i in self.looking:
            context_kv = None
            if self.config.reference == "context":
                context_kv = block.attn.project_kv(block.ln_1(context))  # (B,k,2D)
            reference = reference_kv(self.config.reference, kv, context_kv)  # (B,T,m,2D)
            m = reference.shape[2]
            kv = torch.cat([kv, reference], dim=2)  # (B,T,N+m,2D)
            if self.config.local_global_bias:
                b_local, b_global = self.local_global_bias[str(i)].unbind(dim=1)
                bias = b_global - b_local  # (H,)
        keys, values = kv.flatten(0, 1).chunk(2, dim=-1)  # (B*T,N+m,D)
        return Seen(block.attn.split(keys), block.attn.split(values), m, bias)

    def choose_seeds(self, block, y, seen):
        """The S best patches of each frame (B,T,S) by decreasing score, and all scores (B,T,P)."""
        B, T, N, _ = y.shape
        q = block.attn.queries(y[:, :, :1]).flatten(0, 1)  # (B*T,H,1,d)
        scores = seed_scores(q, seen, patches=N - 1).unflatten(0, (B, T))  # (B,T,P)
        order = scores.argsort(dim=-1, descending=True, stable=True)  # the first on ties
        return order[..., :self.seeds], scores

    def summarise(self, block, found, seeds, scores):
        """Merges the seeds' rows (B,T,S,D), frame after frame, to k context tokens -> Summary."""
        c = self.config
        merged, sizes, group = merge_to(
            found.flatten(1, 2), c.context_tokens, c.merge_step, c.merge, sources=True)
        return Summary(merged, block.add_mlp(merged), sizes, group, seeds, scores)
