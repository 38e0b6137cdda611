"""Merging many tokens into few: bipartite soft matching (ToMe, Bolya et al. 2023) and its rivals.

TC-CLIP makes the context tokens of a video this way, from the seeds of all its frames.

Sections: groups of tokens; bipartite soft matching; its rivals in the TC-CLIP paper; merging.

A strategy only decides which tokens belong together: it gives every token the number of its group.
`merge_to` then takes the mean of each group. There are no weights here, no loops over videos or
tokens, and no GPU-CPU synchronisation. All functions are pure, but for the two that record a CUDA
graph and replay it.

Letters: B videos, n tokens, k groups, r pairs merged in one round, D width.
"""

import functools

import numpy as np
import torch
import torch.nn.functional as F

# ---- groups of tokens ----------------------------------------------------------------------------


def numbered(tokens):
    """The number of each token (B,n,...) in its video, from 0: (B,n) int64."""
    B, n = tokens.shape[:2]
    return torch.arange(n, device=tokens.device).expand(B, n)


def add_groups(values, group, k):
    """Sums of the values (B,n,D) in each group: group (B,n) int64 below k -> (B,k,D)."""
    B, _, D = values.shape
    first = k * torch.arange(B, device=group.device)  # (B,) each video has k rows of its own
    rows = (group + first[:, None]).flatten()  # (B*n,)
    sums = values.new_zeros(B * k, D).index_add_(0, rows, values.flatten(0, 1))
    return sums.unflatten(0, (B, k))  # (B,k,D)


def group_sizes(group, k):
    """The number of tokens in each group: group (B,n) int64 below k -> (B,k) int64."""
    sizes = group.new_zeros(group.shape[0], k)
    return sizes.scatter_add(1, group, torch.ones_like(group))


def ranks(values):
    """The place of each value (B,n) in decreasing order, from 0; equal values keep their order."""
    order = values.argsort(dim=-1, descending=True, stable=True)  # (B,n)
    return torch.empty_like(order).scatter_(-1, order, numbered(values))  # inverse permutation


def place_centres(group, centres):
    """Puts token centres[b,j] into group j, so that no group is empty: group (B,n), centres (B,k).

    The centres of a video must be different tokens.
    """
    return group.scatter(1, centres, numbered(centres))


# ---- bipartite soft matching ---------------------------------------------------------------------

def merge_rounds(n, k, step):
    """How many pairs each round merges on the way from n tokens to k.

    [released] int((n-k)/step) rounds of min(step, n//2), then rounds of min(n-k, n//2): a round can
    at most halve. For example 928 -> 96 by 100: eight rounds of 100 and one of 32.
    """
    assert min(n, k, step) >= 1
    rounds = []
    for _ in range((n - k) // step):
        rounds.append(min(step, n // 2))
        n -= rounds[-1]
    while n > k:
        rounds.append(min(n - k, n // 2))
        n -= rounds[-1]
    return rounds


def match(x, r):
    """One round: the new place of each token x (B,n,D) among the n - r that are left, (B,n) int64.

    a = tokens at even positions, b = tokens at odd positions. Each a picks the b to which its
    cosine is highest. The r a's with the highest cosines join their b; a b and all that join it
    become one token. [paper, ToMe]
    New order: the unmerged a by decreasing cosine, then all b in their old order. [released]
    """
    B, n, _ = x.shape
    unmerged = (n + 1) // 2 - r  # this many a stay alone
    unit = F.normalize(x, dim=-1)  # (B,n,D), zero vectors stay zero
    cosine = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)  # (B, a's, b's)
    best, partner = cosine.max(dim=-1)  # (B, a's), the first b on ties
    rank = ranks(best)  # (B, a's)
    place = torch.empty(B, n, dtype=torch.int64, device=x.device)
    place[:, ::2] = torch.where(rank < r, unmerged + partner, rank - r)  # its partner's, or its own
    place[:, 1::2] = torch.arange(unmerged, n - r, device=x.device)
    return place


def bipartite(tokens, k, step):
    """Repeated bipartite soft matching [paper]: tokens (B,n,D) -> the group of each, (B,n) int64.

    It carries the sum of each group, where ToMe carries the mean weighted by sizes. Both point in
    the same direction, so the cosines are equal; `merge_to` takes the mean at the end.
    """
    sums, group = tokens, numbered(tokens)  # at first, each token is a group
    for r in merge_rounds(tokens.shape[1], k, step):
        left = sums.shape[1] - r
        place = match(sums, r)  # (B, tokens so far)
        sums = add_groups(sums, place, left)  # (B,left,D)
        group = place.gather(1, group)  # (B,n)
    return group


@functools.lru_cache(maxsize=16)
def record_bipartite(shape, dtype, device, k, step):
    """Records `bipartite` on a GPU as one CUDA graph: (graph, the tokens it reads, the groups)."""
    tokens = torch.zeros(shape, dtype=dtype, device=device)
    bipartite(tokens, k, step)  # libraries are loaded before the recording
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        group = bipartite(tokens, k, step)
    return graph, tokens, group


def fast_bipartite(tokens, k, step):
    """`bipartite`, replayed on a GPU from a record.

    This trick may be skipped at first reading; tests/bench_gpu.py checks on a GPU that the groups
    are the same. A round has some 20 small kernels, which take the CPU longer to start than the GPU
    to run.
    """
    if not tokens.is_cuda or torch.compiler.is_compiling():
        return bipartite(tokens, k, step)
    graph, recorded, group = record_bipartite(tokens.shape, tokens.dtype, tokens.device, k, step)
    recorded.copy_(tokens)
    graph.replay()
    return group.clone()  # the next replay writes over it


# ---- its rivals in the TC-CLIP paper -------------------------------------------------------------

def random(tokens, k, step):
    """Every token joins a random group, none of which is empty: (B,n,D) -> (B,n) int64.

    The same draw for all videos and in all calls [ours], so that results can be repeated.
    """
    B, n, _ = tokens.shape
    rng = np.random.default_rng(n)
    order, other = rng.permutation(n), rng.integers(k, size=n)
    group = np.where(order < k, order, other)  # k tokens make sure that no group is empty
    return torch.from_numpy(group).to(tokens.device, non_blocking=True).expand(B, -1)


def squared_distance(a, b):
    """Squared Euclidean distances: a (B,n,D), b (B,m,D) -> (B,n,m)."""
    lengths = a.square().sum(-1)[..., None] + b.square().sum(-1)[:, None]
    return (lengths - 2 * a @ b.transpose(1, 2)).clamp(min=0)


def fill_empty_groups(group, distance, k):
    """Each empty group takes the token that is farthest from its own centre.

    group (B,n), distance (B,n) of each token to its centre -> group (B,n). The first token of a
    group stays in it; the tokens that are left suffice, since n >= k.
    """
    B, n = group.shape
    nobody = group.new_full((B, k), n)
    first = nobody.scatter_reduce(1, group, numbered(group), "amin")  # (B,k), n if empty
    is_first = first.gather(1, group) == numbered(group)  # (B,n)
    farthest = distance.masked_fill(is_first, -1).argsort(dim=-1, descending=True, stable=True)
    empty = first == n  # (B,k)
    turn = (empty.cumsum(dim=-1) - 1).clamp(min=0)
    taken = farthest.gather(1, turn)  # (B,k): the i-th empty group takes the i-th farthest token
    return place_centres(group, torch.where(empty, taken, first))


def kmeans(tokens, k, step, iterations=5):
    """Lloyd's k-means from k evenly spaced tokens: (B,n,D) -> (B,n) int64, no group is empty."""
    n = tokens.shape[1]
    start = torch.arange(k, device=tokens.device) * n // k
    centres = tokens[:, start]  # (B,k,D)
    for _ in range(iterations):
        distance, group = squared_distance(tokens, centres).min(dim=-1)  # (B,n)
        group = fill_empty_groups(group, distance, k)
        centres = add_groups(tokens, group, k) / group_sizes(group, k)[..., None]
    return group


def dpc_knn(tokens, k, step, neighbours=5):
    """Density peaks (Rodriguez and Laio 2014; Du et al. 2016): (B,n,D) -> (B,n) int64.

    density_i = exp(-mean of |x_i - x_j|^2 / D over i itself and its nearest neighbours j)
    separation_i = distance to the nearest denser token; for the densest, the largest distance
    The k largest products density * separation are the centres. Every token joins its nearest one.
    """
    D = tokens.shape[-1]
    squared = squared_distance(tokens, tokens)  # (B,n,n)
    distance = (squared / D).sqrt()
    nearest = distance.topk(min(neighbours + 1, tokens.shape[1]), largest=False).values  # with i
    density = (-nearest.square().mean(dim=-1)).exp()  # (B,n)
    rank = ranks(density)
    is_denser = rank[:, None] < rank[..., None]  # (B,n,n): token j is denser than token i
    largest = distance.amax(dim=(1, 2), keepdim=True)
    separation = distance.where(is_denser, largest).amin(dim=-1)  # (B,n)
    centres = (density * separation).topk(k).indices  # (B,k)
    rows = centres[..., None].expand(-1, -1, D)
    to_centres = squared_distance(tokens, tokens.gather(1, rows))  # (B,n,k)
    return place_centres(to_centres.argmin(dim=-1), centres)


# ---- merging -------------------------------------------------------------------------------------

# A new strategy is added here and nowhere else: tokens (B,n,D), k < n, step -> groups (B,n) int64.
# Beside each, its few-shot average in the paper, in points above a model without any context.
MERGES = {
    "none": None,  # -3.3: the seeds are the context, unmerged
    "random": random,  # -2.3
    "kmeans": kmeans,  # +0.1
    "dpc-knn": dpc_knn,  # +0.9
    "bipartite": fast_bipartite,  # +1.0
}


def merge_to(tokens, k, step=100, method="bipartite", sources=False):
    """Merges tokens (B,n,D) to the means (B,k,D) of k groups; also gives the groups' sizes (B,k).

    With n <= k, and with method "none", every token stays as it is. `step` is the number of pairs
    that one bipartite round merges. With `sources` it also gives each token's group, (B,n) int64.
    Gradients flow through the means and not through the choice of groups. fp16 and bf16 are merged
    in fp32. Raises ValueError if k or step is below 1, or the method is unknown.
    """
    if min(k, step) < 1 or method not in MERGES:
        raise ValueError(f"cannot merge to {k} tokens by steps of {step} with {method!r}: "
                         f"numbers start at 1, methods are {', '.join(MERGES)}")
    n = tokens.shape[1]
    values = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    device = "cpu" if tokens.is_meta else tokens.device.type  # meta tensors have no autocast
    if n <= k or MERGES[method] is None:
        k, group = n, numbered(tokens)
    else:
        with torch.no_grad(), torch.autocast(device, enabled=False):
            group = MERGES[method](values, k, step)  # (B,n)
    sizes = group_sizes(group, k).to(values.dtype)  # (B,k)
    merged = (add_groups(values, group, k) / sizes[..., None]).to(tokens.dtype)  # (B,k,D)
    if sources:
        return merged, sizes, group
    return merged, sizes
