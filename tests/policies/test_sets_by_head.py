"""Policies in which each KV head keeps a set of its own, against sets worked out by hand."""

import torch

from tests.policies.cases import attended, kept


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
