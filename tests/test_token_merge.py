"""Merging: a naive loop against the vectorised form, the invariants, and the released code's figures."""

import json

import numpy as np
import pytest
import torch
from figures import weights
from helpers import FIGURES
from hypothesis import given, settings
from hypothesis import strategies as st

from token_merge import MERGES, kmeans, merge_rounds, merge_to


def naive_bipartite(x, k, step):
    """METHOD as it reads, for one video (n,D): -> merged (k,D), sizes, group of every token."""
    tokens = [{"mean": row, "size": 1, "members": [i]} for i, row in enumerate(x)]
    full_rounds = max(0, int((len(x) - k) / step))
    while len(tokens) > k:
        n, full_rounds = len(tokens), full_rounds - 1
        r = min(step if full_rounds >= 0 else n - k, n // 2)
        a, b = tokens[::2], tokens[1::2]
        similarity = [[float(p["mean"] @ q["mean"] / p["mean"].norm() / q["mean"].norm()) for q in b] for p in a]
        best = [max(range(len(b)), key=lambda j: (row[j], -j)) for row in similarity]
        order = sorted(range(len(a)), key=lambda i: (-similarity[i][best[i]], i))
        for i in order[:r]:
            p, q = a[i], b[best[i]]
            total = p["size"] + q["size"]
            q["mean"] = (p["mean"] * p["size"] + q["mean"] * q["size"]) / total
            q["size"], q["members"] = total, q["members"] + p["members"]
        tokens = [a[i] for i in order[r:]] + b
    group = torch.empty(len(x), dtype=torch.int64)
    for number, token in enumerate(tokens):
        group[token["members"]] = number
    return torch.stack([t["mean"] for t in tokens]), torch.tensor([t["size"] for t in tokens]), group


@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 30), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_bipartite_equals_the_naive_loop(batch, n, k, step, seed):
    x = torch.randn(batch, n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    merged, sizes, group = merge_to(x, k, step, sources=True)
    for b in range(batch):
        expected = naive_bipartite(x[b], k, step)
        torch.testing.assert_close(merged[b], expected[0], rtol=0, atol=1e-12)
        assert sizes[b].tolist() == expected[1].tolist() and group[b].tolist() == expected[2].tolist()


@given(st.sampled_from(sorted(MERGES)), st.integers(2, 50), st.integers(1, 50), st.integers(0, 10**6))
@settings(max_examples=80, deadline=None)
def test_every_strategy_makes_weighted_means_of_its_sources(method, n, k, seed):
    torch.manual_seed(seed)
    x = torch.randn(2, n, 6, dtype=torch.float64, requires_grad=True)
    merged, sizes, group = merge_to(x, k, 7, method, sources=True)
    assert merged.shape == (2, n if method == "none" else min(n, k), 6)
    assert sizes.sum(dim=1).tolist() == [n, n]  # token mass is conserved
    torch.testing.assert_close((merged * sizes[..., None]).sum(dim=1), x.sum(dim=1))
    for b in range(2):
        for g in range(merged.shape[1]):
            members = x[b][group[b] == g]
            assert len(members) == sizes[b, g] >= 1
            torch.testing.assert_close(merged[b, g], members.mean(dim=0))
    merged.sum().backward()
    torch.testing.assert_close(x.grad.sum(dim=1), merged.new_full((2, 6), float(merged.shape[1])))


@given(st.sampled_from(sorted(MERGES)), st.integers(1, 20), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_as_many_groups_as_tokens_is_the_identity(method, n, more):
    x = torch.randn(2, n, 4)
    merged, sizes, group = merge_to(x, n + more, 3, method, sources=True)
    assert torch.equal(merged, x) and (sizes == 1).all() and (group == torch.arange(n)).all()


@given(st.sampled_from(sorted(MERGES)), st.sampled_from([1, 2, 5]), st.integers(1, 23), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_no_group_is_empty_however_equal_the_tokens(method, distinct, k, seed):
    """A still video has equal frames; a black one has equal tokens, and untrained ones may be zero."""
    rows = torch.randn(distinct, 4, generator=torch.Generator().manual_seed(seed))
    still = rows.repeat(24 // distinct + 1, 1)[:24]
    x = torch.stack([still, torch.zeros_like(still), still.roll(1, 0)])
    for tokens in (x, x.bfloat16(), x.half(), 300 * x.half()):
        merged, sizes, group = merge_to(tokens, k, 5, method, sources=True)
        assert (sizes >= 1).all() and sizes.sum(dim=1).tolist() == [24] * 3
        assert merged.isfinite().all() and merged.dtype == tokens.dtype
        assert (merged[1] == 0).all()


@pytest.mark.parametrize("method", [name for name in MERGES if name != "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_changes_no_choice(method, dtype):
    """Under autocast the groups are those without it; 16-bit tokens are merged as fp32 would."""
    x = torch.randn(2, 928, 64, generator=torch.Generator().manual_seed(0))
    expected = merge_to(x, 96, 100, method, sources=True)
    with torch.autocast("cpu", dtype=dtype):
        found = merge_to(x, 96, 100, method, sources=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    low = x.to(dtype)
    merged, sizes, group = merge_to(low, 96, 100, method, sources=True)
    expected = merge_to(low.float(), 96, 100, method, sources=True)
    assert torch.equal(merged, expected[0].to(dtype)) and torch.equal(sizes, expected[1])
    assert torch.equal(group, expected[2])
    whole, size = merge_to(low, 1, 100, method)  # 928 summands and a size that 8 bits cannot hold
    torch.testing.assert_close(whole[:, 0], low.float().mean(dim=1).to(dtype))
    assert size.tolist() == [[928], [928]]


def naive_kmeans(x, k, iterations):
    """Lloyd's algorithm for one video; an empty group takes the farthest token that leads no group."""
    n = len(x)
    centres = [x[i * n // k] for i in range(k)]
    for _ in range(iterations):
        distance = [[float(((row - c) ** 2).sum()) for c in centres] for row in x]
        group = [min(range(k), key=lambda g: (row[g], g)) for row in distance]
        spare = [i for i in range(n) if group[i] in group[:i]]
        spare.sort(key=lambda i: -distance[i][group[i]])  # stable: the first on ties
        for g in range(k):
            if g not in group:
                group[spare.pop(0)] = g
        centres = [x[[i for i in range(n) if group[i] == g]].mean(dim=0) for g in range(k)]
    return group


@given(st.integers(2, 30), st.integers(1, 30), st.booleans(), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_kmeans_equals_the_naive_loop(n, k, equal, seed):
    k, rng = min(k, n - 1), torch.Generator().manual_seed(seed)
    if equal:  # few different whole numbers: groups run empty, and distances are exact in one round
        x, iterations = torch.randint(3, (n, 2), generator=rng).double(), 1
    else:
        x, iterations = torch.randn(n, 3, generator=rng, dtype=torch.float64), 5
    assert kmeans(x[None], k, 1, iterations)[0].tolist() == naive_kmeans(x, k, iterations)


@given(st.sampled_from(sorted(MERGES)), st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_a_video_does_not_depend_on_its_batch_mates(method, seed):
    x = torch.randn(3, 23, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    together, alone = merge_to(x, 6, 5, method), merge_to(x[1:2], 6, 5, method)
    torch.testing.assert_close(together[0][1:2], alone[0])
    assert torch.equal(together[1][1:2], alone[1])


def test_clustering_finds_clusters():
    centres = 10 * torch.eye(5)
    x = centres.repeat(1, 6, 1) + 0.01 * torch.randn(1, 30, 5)  # token i belongs to cluster i % 5
    for method in ("kmeans", "dpc-knn"):
        group = merge_to(x, 5, 4, method, sources=True)[2][0]
        assert all(len(set(group[c::5].tolist())) == 1 for c in range(5)), method
        assert len(set(group.tolist())) == 5, method


def test_ties_go_to_the_first():
    x = torch.ones(1, 6, 2)  # every pair is equally similar: all a choose the first b
    group = merge_to(x, 3, 10, sources=True)[2]
    assert group.tolist() == [[0, 0, 0, 1, 0, 2]]


@given(st.integers(1, 2000), st.integers(1, 300), st.integers(1, 200))
def test_schedule(n, k, step):
    rounds, left = merge_rounds(n, k, step), n
    for r in rounds:
        assert 0 < r <= left // 2
        left -= r
    assert left == min(n, k)


@pytest.mark.parametrize("wrong", [dict(k=0), dict(step=0), dict(method="average")])
def test_wrong_use_is_named(wrong):
    with pytest.raises(ValueError, match="cannot merge"):
        merge_to(torch.randn(1, 8, 2), **{"k": 3, **wrong})


def test_released_figures():
    figures = np.load(FIGURES / "e_bipartite.npz")
    notes = json.loads((FIGURES / "e_bipartite.json").read_text())
    x = torch.from_numpy(weights.normal("bsm.metric", (2, 232, 64)))
    merged, sizes, group = merge_to(x, 96, 100, sources=True)
    np.testing.assert_allclose(merged.numpy(), figures["merged"], rtol=0, atol=1e-12)
    assert (sizes.numpy() == figures["sizes"]).all() and (group.numpy() == figures["group"]).all()
    for key, schedule in notes["schedules"].items():
        assert merge_rounds(*(int(part.split("=")[1]) for part in key.split(","))) == schedule["r"]
