"""Window attention of the kernels against float64, over dtypes, head sizes, masks and windows."""

import sys

import pytest
import torch

from benchmarks.exact import by_group
from benchmarks.exact import window_attention as exact
from starkv_compile.kernels.reference import window_attention as reference
from starkv_compile.kernels.reference.capacity import clip_window
from starkv_compile.kernels.triton.window_attention import Tiles, window_attention

SMALL = Tiles(rows=16, keys=32)


def inputs(guards, batch=1, heads=4, groups=2, length=100, dim=32, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, length, dim, generator=generator).to(dtype)
    key = torch.randn(batch, groups, length, dim, generator=generator).to(dtype)
    return guards.copy(query), guards.copy(key)


def check(ours, expected):
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_every_dtype_and_head_size(guards, dtype, dim):
    query, key = inputs(guards, dim=dim, dtype=dtype)
    ours = window_attention(query, key, None, dim**-0.5, 8, 50, tiles=SMALL)
    check(ours, by_group(exact(query, key, None, dim**-0.5, 8), 2))


@pytest.mark.parametrize("window", [1, 2, 7, 8, 32, 64])
@pytest.mark.parametrize("length", [65, 96, 97, 128, 161])
def test_every_window_and_length(guards, window, length):
    query, key = inputs(guards, length=length)
    ours = window_attention(query, key, None, 0.2, window, 1000, tiles=SMALL)
    window = clip_window(window, 1000, length)
    check(ours, by_group(exact(query, key, None, 0.2, window), 2))


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (3, 3), (6, 2), (7, 1), (28, 4), (32, 8)])
@pytest.mark.parametrize("per_head", [False, True])
def test_every_group_size(guards, heads, groups, per_head):
    query, key = inputs(guards, batch=2, heads=heads, groups=groups, length=50)
    ours = window_attention(query, key, None, 0.2, 5, 20, per_head=per_head, tiles=SMALL)
    expected = exact(query, key, None, 0.2, 5)
    check(ours, expected if per_head else by_group(expected, groups))


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_masks(guards, additive, shared):
    """Rows of a batch have different lengths; heads may have masks of their own."""
    query, key = inputs(guards, batch=2, length=70)
    mask = torch.ones(70, 70, dtype=torch.bool).tril().expand(2, 1 if shared else 4, -1, -1).clone()
    mask[1, :, :, :23] = False
    if not shared:
        mask[:, 1, :, 30:40] = False
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    ours = window_attention(query, key, guards.copy(mask), 0.2, 8, 40, tiles=SMALL)
    check(ours, by_group(exact(query, key, mask, 0.2, 8), 2))
    assert (ours[1, :, :23] == 0).all()


def test_a_given_log_sum_exp_spares_the_first_pass(guards, monkeypatch):
    query, key = inputs(guards, length=90)
    visible = torch.ones(90, 90, dtype=torch.bool).tril()
    logits = query.double() @ key.double().repeat_interleave(2, 1).mT * 0.2
    total = logits.masked_fill(~visible, -torch.inf).logsumexp(-1).float()
    launched = []

    def launch(kernel, grid, *args, **constants):
        launched.append(kernel.fn.__name__)
        kernel[grid](*args, **constants)

    monkeypatch.setattr(sys.modules[window_attention.__module__], "launch", launch)
    ours = window_attention(
        query, key, None, 0.2, 8, 40, log_sum_exp=guards.copy(total), tiles=SMALL
    )
    assert launched == ["score_keys"]
    check(ours, by_group(exact(query, key, None, 0.2, 8), 2))


def test_strided_inputs(guards):
    """As a model has them: a transpose of [B, S, H, D], and a slice of a longer cache."""
    query, key = inputs(guards, length=60)
    as_rows = guards.copy(query.transpose(1, 2).contiguous()).transpose(1, 2)
    longer = guards.copy(torch.cat([key, torch.full_like(key, torch.nan)], dim=2))[:, :, :60]
    ours = window_attention(as_rows, longer, None, 0.2, 8, 30, tiles=SMALL)
    check(ours, by_group(exact(query, key, None, 0.2, 8), 2))


def test_more_keys_than_queries(guards):
    query, key = inputs(guards, length=60)
    mask = torch.ones(60, 60, dtype=torch.bool).tril()[None, None]
    ours = window_attention(
        guards.copy(query[:, :, 40:]), key, guards.copy(mask[:, :, 40:]), 0.2, 8, 30, tiles=SMALL
    )
    check(ours, by_group(exact(query, key, mask, 0.2, 8), 2))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_mean_what_the_reference_says(guards, bad):
    query, key = inputs(guards, length=60)
    key[0, 0, 13, 3] = bad
    ours = window_attention(query, key, None, 0.2, 8, 30, tiles=SMALL)
    torch.testing.assert_close(ours, reference(query, key, None, 0.2, 8, 30), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("given_sum", [False, True])
def test_a_query_that_sees_nothing_does_not_vote(guards, given_sum):
    query, key = inputs(guards, length=60)
    mask = torch.ones(60, 60, dtype=torch.bool).tril()[None, None].clone()
    mask[..., 55, :] = False
    total = None
    if given_sum:
        logits = query.double() @ key.double().repeat_interleave(2, 1).mT * 0.2
        total = logits.masked_fill(~mask, -torch.inf).logsumexp(-1).float()
    arguments = (query, key, guards.copy(mask), 0.2, 8, 30, False, total)
    voters = torch.arange(52, 60) != 55
    rows = [exact(query[:, :, : i + 1], key[:, :, : i + 1], None, 0.2, 1) for i in range(52, 60)]
    expected = sum(row[..., :52] for row, votes in zip(rows, voters, strict=True) if votes)
    check(window_attention(*arguments, tiles=SMALL), by_group(expected, 2))
    check(reference(*arguments), by_group(expected, 2))


def test_the_tiles_that_ship(guards):
    query, key = inputs(guards, heads=28, groups=4, length=700, dim=128, dtype=torch.bfloat16)
    ours = window_attention(query, key, None, 128**-0.5, 8, 200)
    check(ours, by_group(exact(query, key, None, 128**-0.5, 8), 4))
