"""Attention over codes: the reference against attention over what the codes stand for, and the
C++ against the reference."""

import sys

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from starkv_compile.kernels import cpp, reference
from starkv_compile.kernels.ops import STARKV
from starkv_compile.kernels.reference.quantization import centre_of, dequantize, quantize
from starkv_compile.kernels.reference.quantized_attention import quantized_attention
from tests.support.narrower import NARROWER, narrower

KERNELS = {"reference": reference.attend_codes, "C++": cpp.attend_codes}


@pytest.fixture(params=KERNELS)
def kernel(request):
    if request.param == "C++" and sys.platform != "linux":
        pytest.skip("C++ kernels are for Linux")
    return KERNELS[request.param]


@pytest.fixture(params=NARROWER, ids=lambda flag: flag or "native")
def vectors(request, monkeypatch):
    """16, 8 and 4 numbers a vector, as far as this machine has them."""
    narrower(monkeypatch, "quantized_attention", request.param)


def made(dim=32, of_values=None, nbits=4, tokens=33, newer=7, dtype=torch.float32, rows=2):
    """Keys and values in codes, the newer ones, and all of them as attention reads them."""
    generator = torch.Generator().manual_seed(0)

    def tensor(length, width):
        return torch.randn(rows, 2, length, width, generator=generator).to(dtype) + 3

    parts = []
    for width in (dim, of_values or dim):
        older, new = tensor(tokens, width), tensor(newer, width)
        codes = quantize(older, centre_of(older), nbits)
        parts.append((codes, new, torch.cat([dequantize(*codes, dtype), new], 2)))
    return parts


def asked(heads=6, queries=1, dim=32, dtype=torch.float32, rows=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, heads, queries, dim, generator=generator).to(dtype)


def both(query, parts, mask, kernel):
    (key, newer_key, keys), (value, newer_value, values) = parts
    scale = query.shape[-1] ** -0.5
    found = quantized_attention(query, key, value, newer_key, newer_value, mask, scale, kernel)
    wide = (t.double() for t in (query, keys, values))
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double()
    return found, sdpa(*wide, attn_mask=mask, enable_gqa=True)


def check(found, expected, tolerance=2e-5):
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("nbits", [8, 4])
@pytest.mark.parametrize(("dim", "of_values"), [(1, 1), (3, 5), (64, 64), (80, 72), (256, 128)])
def test_every_head_size(kernel, vectors, nbits, dim, of_values):
    check(*both(asked(dim=dim), made(dim, of_values, nbits), None, kernel))


@pytest.mark.parametrize("heads", [2, 6, 14, 16, 22, 64])
@pytest.mark.parametrize("queries", [1, 3])
def test_every_number_of_rows(kernel, vectors, heads, queries):
    check(*both(asked(heads, queries), made(), None, kernel))


@pytest.mark.parametrize("tokens", [1, 5, 511, 512, 1025])
@pytest.mark.parametrize("nbits", [8, 4])
def test_every_length(kernel, tokens, nbits):
    check(*both(asked(), made(tokens=tokens, nbits=nbits), None, kernel))


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 1, 1), (1, 6, 3), (2, 6, 3), (2, 1, 3)])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_masks(kernel, shape, kind):
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(*shape, 40, generator=generator)
    mask = mask > 0.4 if kind == torch.bool else mask * 9
    queries = max(shape[2], 1)
    check(*both(asked(queries=queries), made(), mask, kernel))


@pytest.mark.parametrize("least", [-torch.inf, torch.finfo(torch.float32).min])
def test_a_query_that_sees_no_code(kernel, least):
    mask = torch.zeros(2, 1, 1, 40).index_fill(-1, torch.arange(33), least)
    query, parts = asked(), made()
    found, _ = both(query, parts, mask, kernel)
    (_, key, _), (_, value, _) = parts
    check(found, sdpa(query, key, value, enable_gqa=True).double())


def test_a_query_that_sees_nothing_gets_zeros(kernel):
    mask = torch.ones(2, 1, 1, 40, dtype=torch.bool)
    mask[1] = False
    found, expected = both(asked(), made(), mask, kernel)
    assert torch.equal(found[1], torch.zeros_like(found[1]))
    check(found[:1], expected[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_dtype(kernel, dtype):
    found, expected = both(asked(dtype=dtype), made(dtype=dtype), None, kernel)
    assert found.dtype == dtype
    check(found, expected, 0.02)


def test_logits_of_any_size(kernel):
    check(*both(asked() * 1000, made(), None, kernel), 1e-3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_spoils_its_own_batch_row_and_head(kernel, bad):
    parts = made()
    key, *others = parts[0]
    older = dequantize(*key, torch.float32)
    older[0, 1, 5, 3] = bad
    parts[0] = (quantize(older, key.centre, 4), *others)
    found, _ = both(asked(), parts, None, kernel)
    spoilt = torch.zeros(2, 6, dtype=torch.bool)
    spoilt[0, 3:] = True
    assert torch.equal(found.isnan().any(-1).any(-1), spoilt)


def test_rows_in_any_memory_order(kernel):
    """Of a mask, queries and codes that are views."""
    (key, newer_key, keys), (value, newer_value, values) = made(64, tokens=70)
    key = key._replace(codes=key.codes.mT.contiguous().mT)
    mask = torch.rand(77, 2, generator=torch.Generator().manual_seed(3)).T[:, None, None] * 4
    query = asked(dim=64).transpose(0, 1).contiguous().transpose(0, 1)
    parts = [(key, newer_key, keys), (value, newer_value, values)]
    check(*both(query, parts, mask, kernel))


@pytest.mark.slow(ci=True)
@pytest.mark.parametrize("nbits", [8, 4])
def test_compiled_it_gives_the_same(nbits):
    (key, newer_key, _), (value, newer_value, _) = made(nbits=nbits)
    query = asked()
    given = (query, *key, *value, newer_key, newer_value, None, 0.2)
    found = torch.compile(STARKV.quantized_attention)(*given)
    torch.testing.assert_close(found, STARKV.quantized_attention(*given))
    torch.library.opcheck(STARKV.quantized_attention.default, given, test_utils="test_faketensor")
