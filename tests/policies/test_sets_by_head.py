"""Policies in which each KV head keeps a set of its own, against sets worked out by hand."""

import torch

from tests.policies.cases import attended, frames, kept


def test_snapkv_cuts_for_each_kv_head():
    one, other = [9.0, 1, 1, 1, 6, 1, 1], [1.0, 9, 1, 1, 6, 1, 1]
    assert kept("snapkv", *attended(one, other), 2) == [[0, 6], [1, 6]]
    assert kept("snapkv", *attended(one, other), 3) == [[0, 4, 6], [1, 4, 6]]
    assert kept("snapkv_mean", *attended(one, other), 2) == [4, 6]


def test_snapkv_averages_over_the_query_heads_of_a_kv_head():
    query, key = torch.zeros(1, 4, 5, 4), torch.zeros(1, 2, 5, 4)
    for head, axis in enumerate((1, 2, 1, 3)):
        query[0, head, :, axis] = 1.0
    key[0, :, 0, 1], key[0, :, 1, 2], key[0, :, 2, 3] = 2.0, 3.0, 4.0
    # One query head of each looks at token 0, the other at token 1 in one and at 2 in the other.
    assert kept("snapkv", query, key, 2) == [[1, 4], [2, 4]]
    assert kept("snapkv", query, key, 3) == [[0, 1, 4], [0, 2, 4]]


def screens(*older, current=(0, 1)):
    """One head of dim 8, so of a subspace of 2; frame 0 at 1 to 4, frame 1 at 6 and 7.

    older: an axis for each token of frame 0. current: those of frame 1. Attention is even.
    """
    key = torch.zeros(1, 1, 10, 8)
    for place, axis in zip((1, 2, 3, 4, 6, 7), (*older, *current), strict=True):
        key[0, 0, place, axis] = 1.0
    return torch.zeros_like(key), key, frames(10, (1, 5), (6, 8))


def test_gui_kv_drops_what_the_current_frame_spans():
    query, key, layout = screens(1, 5, 0, 6)
    # Tokens 1 and 3 lie in the plane of the current frame; of four older ones half are dropped.
    assert kept("gui_kv", query, key, 5, layout) == [[0, 2, 4, 5, 9]]
    assert kept("snapkv", query, key, 5, layout) == [[0, 1, 2, 3, 9]]
    # Of four, 3 tenths are one: the first of two that are equal.
    assert kept("gui_kv", query, key, 7, layout) == [[0, 2, 3, 4, 5, 6, 9]]


def test_gui_kv_spans_the_first_tokens_only():
    query, key, layout = screens(1, 5, 0, 6, current=(0, 5))
    assert kept("gui_kv", query, key, 5, layout) == [[0, 1, 4, 5, 9]]
    query, key, layout = screens(1, 5, 0, 6, current=(0, 0))
    # A second token equal to the first adds no direction: only token 3 is spanned; of the three
    # that are equally far the first goes.
    assert kept("gui_kv", query, key, 5, layout) == [[0, 2, 4, 5, 9]]
    assert kept("gui_kv", query, key, 7, layout) == [[0, 1, 2, 4, 5, 6, 9]]


def test_gui_kv_boosts_the_current_frame_in_each_head():
    query, key, layout = screens(1, 5, 0, 6)
    hidden = torch.ones(1, 10, 3)
    hidden[0, 7] = 4.0
    assert kept("gui_kv", query, key, 2, layout, hidden=hidden) == [[7, 9]]
    assert kept("gui_kv", query, key, 3, layout, hidden=hidden) == [[6, 7, 9]]
