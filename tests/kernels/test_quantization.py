"""Quantization to 8 and 4 bits: exact where it can be, near where it cannot, row by row."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from starkv_compile.kernels import cpp
from starkv_compile.kernels.reference.quantization import (
    BITS,
    centre_of,
    dequantize,
    quantize,
    row_bytes,
    turn,
)
from tests.support.narrower import NARROWER, narrower

DIMS = (1, 3, 16, 32, 64, 72, 80, 96, 128, 256)


def back(found, dtype=torch.float32):
    return dequantize(*found, dtype)


def made(dim, seed=0, tokens=9, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, tokens, dim, generator=generator).to(dtype)


@pytest.mark.parametrize("dim", DIMS)
def test_the_rotation_is_orthogonal_and_its_own_inverse(dim):
    rows, others = made(dim), made(dim, 1)
    torch.testing.assert_close(turn(turn(rows)), rows)
    products, turned = (rows * others).sum(-1), (turn(rows) * turn(others)).sum(-1)
    lengths = rows.norm(dim=-1).max() * others.norm(dim=-1).max()
    rounding = 2 * torch.finfo(torch.float32).eps * float(lengths)
    torch.testing.assert_close(turned, products, atol=rounding, rtol=0)


@pytest.mark.parametrize("nbits", BITS)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_number_is_within_a_step(dim, nbits, dtype):
    rows = made(dim, dtype=dtype)
    centre = centre_of(rows)
    found = quantize(rows, centre, nbits)
    assert found.codes.shape == (2, 3, 9, dim if nbits == 8 else (dim + 1) // 2)
    assert found.codes.dtype == torch.uint8
    assert found.codes.shape[-1] + 2 * found.ranges.element_size() == row_bytes(dim, nbits)
    assert found.ranges.element_size() == 2
    turned = turn(rows.float() - centre)
    reach = turned.amax(-1) - turned.amin(-1)
    # Half a step, and what 16 bits take from the least number and from 2^n - 1 steps.
    most = reach / (2**nbits - 1) / 2 + (reach + turned.abs().amax(-1)) / 128 + 1e-6
    off = (turn(back(found) - centre) - turned).abs().amax(-1)
    assert (off <= most).all()
    assert back(found, dtype).dtype == dtype


def test_sizes_are_those_of_the_bits():
    rows = made(128, tokens=100)
    full = rows.bfloat16().untyped_storage().nbytes()
    eight, four = (quantize(rows, centre_of(rows), n) for n in BITS)
    centre = eight.centre.untyped_storage().nbytes()
    assert (eight.nbytes - centre) / full == (128 + 4) / 256
    assert (four.nbytes - centre) / full == (64 + 4) / 256
    assert eight.tokens == four.tokens == 100


@pytest.mark.parametrize("nbits", BITS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_spoils_no_other_one(nbits, bad):
    rows = made(32)
    expected = quantize(rows[:, :, 1:], centre_of(rows[:, :, 1:]), nbits)
    rows[:, :, 0, 5] = bad
    found = quantize(rows, centre_of(rows), nbits)
    assert torch.equal(found.centre, expected.centre)
    assert torch.equal(found.codes[:, :, 1:], expected.codes)
    assert not back(found)[:, :, 0].isfinite().any()
    assert back(found)[:, :, 1:].isfinite().all()


@pytest.mark.parametrize("nbits", BITS)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-30, 6e4])
def test_rows_of_equal_numbers(nbits, value):
    rows = torch.full((1, 1, 4, 16), value)
    zero = torch.zeros(1, 1, 1, 16)
    for centre in (zero, centre_of(rows)):
        torch.testing.assert_close(back(quantize(rows, centre, nbits)), rows, rtol=0.01, atol=1e-6)


@pytest.mark.parametrize("nbits", BITS)
def test_a_row_depends_on_no_other_row(nbits):
    rows = made(64, tokens=20)
    centre = centre_of(rows)
    whole, alone = quantize(rows, centre, nbits), quantize(rows[:, :, 7:8], centre, nbits)
    assert torch.equal(whole.codes[:, :, 7:8], alone.codes)
    assert torch.equal(whole.ranges[:, :, 7:8], alone.ranges)


def test_channels_far_from_zero_cost_nothing_where_all_tokens_share_them():
    rows = made(128, tokens=200)
    far = rows.clone()
    far[..., ::32] += 100.0
    near, found = (back(quantize(x, centre_of(x), 4)) - x for x in (rows, far))
    assert found.norm() < 1.01 * near.norm()


@settings(max_examples=60, deadline=None)
@given(
    dim=st.integers(1, 40),
    nbits=st.sampled_from(BITS),
    scale=st.floats(-20, 20).map(lambda power: 2.0**power),
    seed=st.integers(0, 99),
)
def test_any_size_and_scale(dim, nbits, scale, seed):
    rows = made(dim, seed, tokens=3) * scale
    found = back(quantize(rows, centre_of(rows), nbits))
    reach = rows.abs().amax() * 2 * dim**0.5  # of a row around the centre of all
    assert ((found - rows).abs() <= reach / (2**nbits - 1) + 0.02 * reach + 1e-12).all()


@pytest.mark.skipif(sys.platform != "linux", reason="C++ kernels are for Linux")
class TestCpp:
    @pytest.fixture(params=NARROWER, ids=lambda flag: flag or "native", autouse=True)
    def _vectors(self, request, monkeypatch):
        narrower(monkeypatch, "quantization", request.param)

    def check(self, rows, nbits):
        centre = centre_of(rows)
        torch.testing.assert_close(cpp.centre_of(rows), centre, rtol=1e-5, atol=1e-6)
        codes, ranges = cpp.codes_and_ranges(rows, centre, nbits)
        expected = quantize(rows, centre, nbits)
        assert (codes.dtype, codes.shape) == (torch.uint8, expected.codes.shape)
        assert (ranges.dtype, ranges.shape) == (expected.ranges.dtype, expected.ranges.shape)
        # A sum in another order may fall on the other side of a step or of a range's last digit.
        found, known = (
            dequantize(*parts, centre, torch.float32) for parts in ((codes, ranges), expected[:2])
        )
        step = expected.ranges[..., 1:].float().abs() * rows.shape[-1] ** 0.5
        near = (found - known).abs() <= 1.1 * step + 1e-6
        assert (near | (found.isnan() & known.isnan())).all()
        assert (codes == expected.codes).float().mean() > 0.98

    @pytest.mark.parametrize("nbits", BITS)
    @pytest.mark.parametrize("dim", DIMS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_it_gives_what_the_reference_gives(self, dim, nbits, dtype):
        self.check(made(dim, dtype=dtype), nbits)

    @pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 40])
    def test_every_number_of_rows(self, tokens):
        self.check(made(64, tokens=tokens), 4)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_a_row_that_is_not_finite_is_alone(self, bad):
        rows = made(32)
        rows[1, 2, 3, 4] = bad
        self.check(rows, 4)
        _, ranges = cpp.codes_and_ranges(rows, centre_of(rows), 4)
        assert ranges.isnan().any(-1).sum() == 1

    @pytest.mark.parametrize("nbits", BITS)
    def test_equal_numbers_and_rows_that_are_views(self, nbits):
        self.check(torch.full((1, 2, 5, 16), 3.0), nbits)
        self.check(made(32).mT.contiguous().mT, nbits)
        self.check(made(32)[:, :, 2:6], nbits)
        self.check(made(32).transpose(0, 1), nbits)
        one_head = torch.randn(3, 7, 1, 16, generator=torch.Generator().manual_seed(0))
        self.check(one_head.transpose(1, 2), nbits)
