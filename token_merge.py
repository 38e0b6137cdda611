"""Merging many tokens into few: bipartite soft matching (ToMe, Bolya et al. 2023) and the rivals of the TC-CLIP paper.

So TC-CLIP makes k context tokens of the seeds of all frames. Pure functions on tensors: no weights, no Python loop over
videos or tokens, no look at a value on the host.

Letters: B videos, n tokens at hand, k tokens wanted, r pairs merged in one round, D width.
"""

import torch


def merge_rounds(n, k, step):
    """How many pairs each round merges on the way from n tokens to k.

    [released] int((n-k)/step) rounds of min(step, n//2), then rounds of min(n-k, n//2): a round can at most halve.
    For example 928 -> 96 by 100: eight rounds of 100 and one of 32.
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
    """One round's choice for x (B,n,D): where every token goes among the n - r that are left, (B,n) int64.

    a = even positions, b = odd positions; each a picks its most similar b, and the r best pairs become one token.
    New order: the unmerged a by decreasing similarity, then all b in the old order.
    """
    B, n, _ = x.shape
    n_a = (n + 1) // 2
    unit = x / x.norm(dim=-1, keepdim=True)  # (B,n,D)
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)  # (B,n_a,n_b) cosines
    similarity, partner = scores.max(dim=-1)  # (B,n_a), the first index on ties
    order = similarity.argsort(dim=-1, descending=True, stable=True)  # (B,n_a)
    count = torch.arange(n, device=x.device)
    merged = n_a - r + partner.gather(1, order[:, :r])  # (B,r) the place of each merged a is that of its b
    places = torch.cat([merged, count[:n_a - r].expand(B, -1)], dim=1)  # (B,n_a)
    goes = torch.empty(B, n, dtype=torch.int64, device=x.device)
    goes[:, ::2] = torch.empty_like(places).scatter_(1, order, places)
    goes[:, 1::2] = count[n_a - r:n - r]
    return goes


def add_groups(values, group, k):
    """Sums of the values (B,n,D) that share a group (B,n), groups numbered below k -> (B,k,D)."""
    B, n, D = values.shape
    rows = group + torch.arange(B, device=group.device)[:, None] * k  # (B,n): one row per video and group
    return values.new_zeros(B * k, D).index_add_(0, rows.flatten(), values.flatten(0, 1)).unflatten(0, (B, k))


def group_sizes(group, k):
    """How many tokens each of k groups (B,n) holds -> (B,k) int64."""
    return group.new_zeros(len(group), k).scatter_add(1, group, torch.ones_like(group))


# ---- the strategies: tokens (B,n,D) -> the group of every token, (B,n) int64 below k; only bipartite needs `step` ------

def bipartite(tokens, k, step):
    """Repeated bipartite soft matching. It carries sums where ToMe carries weighted means: their cosines are the same."""
    B, n, _ = tokens.shape
    sums, group = tokens, torch.arange(n, device=tokens.device).expand(B, n)  # every token starts as its own group
    for r in merge_rounds(n, k, step):
        goes = match(sums, r)  # (B, tokens left)
        group = goes.gather(1, group)  # (B,n)
        sums = add_groups(sums, goes, sums.shape[1] - r)  # (B, tokens left, D)
    return group


def random(tokens, k, step):
    """Every token joins a random group, none of which is empty. One draw for all videos and calls [ours]: repeatable."""
    B, n, _ = tokens.shape
    rng = torch.Generator().manual_seed(n)
    place, other = torch.randperm(n, generator=rng), torch.randint(k, (n,), generator=rng)
    return torch.where(place < k, place, other).to(tokens.device).expand(B, -1)


def squared_distance(a, b):
    """Euclidean, squared: a (B,n,D), b (B,m,D) -> (B,n,m). torch.cdist has no half precision."""
    return (a.square().sum(-1)[..., None] + b.square().sum(-1)[:, None] - 2 * a @ b.transpose(1, 2)).clamp(min=0)


def kmeans(tokens, k, step, iterations=5):
    """Lloyd's k-means, started from k evenly spaced tokens; an emptied group keeps its centre."""
    n = tokens.shape[1]
    centres = tokens[:, torch.arange(k, device=tokens.device) * n // k]  # (B,k,D)
    for _ in range(iterations):
        group = squared_distance(tokens, centres).argmin(dim=-1)  # (B,n)
        sizes = group_sizes(group, k)[..., None]  # (B,k,1)
        centres = torch.where(sizes > 0, add_groups(tokens, group, k) / sizes.clamp(min=1), centres)
    return group


def dpc_knn(tokens, k, step, neighbours=5):
    """Density peaks (Rodriguez and Laio 2014) with densities from the nearest neighbours (Du et al. 2016).

    density_i = exp(-mean squared distance to i's nearest neighbours)
    separation_i = distance to the nearest denser token; for the densest, the largest distance of all
    The k largest products density * separation are the centres; every token joins its nearest one.
    """
    B, n, D = tokens.shape
    distance = (squared_distance(tokens, tokens) / D).sqrt()  # (B,n,n)
    near = distance.topk(min(neighbours + 1, n), largest=False).values  # (B,n,1+neighbours), itself included
    density = (-near.square().mean(dim=-1)).exp()  # (B,n)
    rank = density.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)  # (B,n): equal ones in their order
    denser = rank[:, None] < rank[..., None]  # (B,n,n): column j is denser than row i
    separation = distance.where(denser, distance.amax(dim=(1, 2), keepdim=True)).amin(dim=-1)  # (B,n)
    centres = (density * separation).topk(k).indices  # (B,k)
    group = squared_distance(tokens, tokens.take_along_dim(centres[..., None], dim=1)).argmin(dim=-1)  # (B,n)
    return group.scatter(1, centres, torch.arange(k, device=tokens.device).expand(B, -1))  # a centre leads its group


# [paper] aggregation strategies: few-shot averages against no context -3.3 (none), -2.3, +0.1, +0.9, +1.0
MERGES = {"none": None, "random": random, "kmeans": kmeans, "dpc-knn": dpc_knn, "bipartite": bipartite}


def merge_to(tokens, k, step=100, method="bipartite", sources=False):
    """Merges tokens (B,n,D) to the means (B,k,D) of k groups, and gives the groups' sizes (B,k).

    With n <= k, and with method "none", every token stays itself. `step`: pairs that one bipartite round merges.
    With `sources` also (B,n) int64, each token's group. Gradients flow through the means, not the choice of groups.
    """
    B, n, _ = tokens.shape
    if min(k, step) < 1 or method not in MERGES:
        raise ValueError(f"cannot merge to {k} tokens by steps of {step} with {method!r}; numbers start at 1, "
                         f"methods are {', '.join(MERGES)}")
    if n <= k or method == "none":
        k, group = n, torch.arange(n, device=tokens.device).expand(B, n)
    else:
        with torch.no_grad():
            group = MERGES[method](tokens, k, step)
    sizes = group_sizes(group, k).to(tokens.dtype)  # (B,k)
    merged = add_groups(tokens, group, k) / sizes.clamp(min=1)[..., None]  # (B,k,D)
    return (merged, sizes, group) if sources else (merged, sizes)
