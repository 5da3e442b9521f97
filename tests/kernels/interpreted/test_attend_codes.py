"""Attention over codes by the kernel: what the reference sums."""

import pytest
import torch

from starkv_compile.kernels import reference, triton
from starkv_compile.kernels.reference.quantization import Quantized, centre_of, quantize, turn


def made(guards, dim=32, of_values=None, nbits=4, tokens=70, heads=3, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = turn(torch.randn(2, 2, heads, dim, generator=generator))
    base = torch.randn(2, 2, heads, 1, generator=generator)
    codes = []
    for width in (dim, of_values or dim):
        older = torch.randn(2, 2, tokens, width, generator=generator).to(dtype)
        codes.append(Quantized(*map(guards.copy, quantize(older, centre_of(older), nbits))))
    return guards.copy(rows), guards.copy(base), *codes


def check(arguments, added=None):
    ours = triton.attend_codes(*arguments, added)
    expected = reference.attend_codes(*arguments, added)
    share = (ours.top - expected.top).exp()
    torch.testing.assert_close(ours.weighted * share, expected.weighted, rtol=2e-5, atol=2e-4)
    torch.testing.assert_close(ours.total * share, expected.total, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("nbits", [8, 4])
@pytest.mark.parametrize(("dim", "of_values"), [(1, 1), (3, 5), (64, 64), (80, 72), (256, 128)])
def test_every_head_size(guards, nbits, dim, of_values):
    check(made(guards, dim, of_values, nbits))


@pytest.mark.parametrize("heads", [1, 7, 16, 70])
def test_every_number_of_rows(guards, heads):
    check(made(guards, heads=heads))


@pytest.mark.parametrize("tokens", [1, 64, 65, 256, 257, 600])
@pytest.mark.parametrize("nbits", [8, 4])
def test_every_length(guards, tokens, nbits):
    check(made(guards, tokens=tokens, nbits=nbits))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ranges_of_either_kind(guards, dtype):
    check(made(guards, dtype=dtype))


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 2, 3), (2, 2, 3), (1, 1, 1)])
def test_masks(guards, shape):
    added = torch.randn(*shape, 77, generator=torch.Generator().manual_seed(2)) * 3
    added = added.masked_fill(added > 4, -torch.inf)
    check(made(guards), guards.copy(added)[..., :70])


@pytest.mark.parametrize("least", [-torch.inf, torch.finfo(torch.float32).min])
def test_rows_that_see_nothing_sum_to_nothing_beside_others(guards, least):
    added = torch.full((2, 1, 1, 70), least)
    sums = triton.attend_codes(*made(guards), added)
    other = torch.zeros_like(sums.top)
    share = (sums.top - torch.maximum(sums.top, other)).exp()
    assert torch.equal(sums.weighted * share, torch.zeros_like(sums.weighted))


def test_a_row_that_is_not_finite_shows(guards):
    arguments = made(guards)
    arguments[2].ranges[1, 0, 3, 0] = torch.nan
    total = triton.attend_codes(*arguments, None).total
    assert total[1, 0].isnan().all()
    assert total.isnan().sum() == 3
