"""Whole roots without float64."""

import math

import torch

from starkv_compile.kernels.reference.roots import rounded_root


def test_the_nearest_root_of_every_count():
    roots = torch.arange(1, 1 << 12)
    squares, halves = roots * roots, roots * (roots + 1)
    count = torch.cat([torch.arange(1 << 18), squares - 1, squares, halves, halves + 1])
    nearest = [(math.isqrt(4 * n) + 1) // 2 for n in count.tolist()]
    assert rounded_root(count).tolist() == nearest
