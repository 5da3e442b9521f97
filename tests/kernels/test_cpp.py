"""The CPU's own window attention against float64 and the reference, for every width of vectors."""

import platform
import sys

import pytest
import torch

from benchmarks.exact import by_group
from benchmarks.exact import window_attention as exact
from starkv_compile.kernels import reference
from starkv_compile.kernels.compiling import portable
from starkv_compile.kernels.cpp.window_attention import library, window_attention
from starkv_compile.kernels.ops import STARKV
from starkv_compile.kernels.reference.capacity import clip_window

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="C++ kernels are for Linux")
module = sys.modules[window_attention.__module__]
NARROWER = ["", "-mno-avx512f", "-mno-avx"] if platform.machine() == "x86_64" else [""]


@pytest.fixture(params=NARROWER, ids=lambda flag: flag or "native")
def vectors(request, monkeypatch):
    """16, 8 and 4 numbers a vector, as far as this machine has them."""
    flags = (request.param,) if request.param else ()
    monkeypatch.setattr(module, "library", lambda: library(*flags))


def inputs(batch=1, heads=4, groups=2, length=100, dim=32, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, length, dim, generator=generator).to(dtype)
    key = torch.randn(batch, groups, length, dim, generator=generator).to(dtype)
    return query, key


def check(ours, expected):
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 64, 80, 96, 128, 256])
def test_every_dtype_and_head_size(vectors, dtype, dim):
    query, key = inputs(dim=dim, dtype=dtype)
    ours = window_attention(query, key, None, dim**-0.5, 8, 50)
    check(ours, by_group(exact(query, key, None, dim**-0.5, 8), 2))


@pytest.mark.parametrize("window", [1, 2, 7, 8, 32, 64])
@pytest.mark.parametrize("length", [2, 3, 65, 97, 128, 1030, 2200])
def test_every_window_and_length(vectors, window, length):
    """Blocks of rows and tiles of keys that end short; several parts of keys."""
    query, key = inputs(length=length)
    ours = window_attention(query, key, None, 0.2, window, 5000)
    window = clip_window(window, 5000, length)
    check(ours, by_group(exact(query, key, None, 0.2, window), 2))


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (3, 3), (6, 2), (7, 1), (28, 4), (32, 8)])
@pytest.mark.parametrize("per_head", [False, True])
def test_every_group_size(vectors, heads, groups, per_head):
    query, key = inputs(batch=2, heads=heads, groups=groups, length=50)
    ours = window_attention(query, key, None, 0.2, 5, 20, per_head=per_head)
    expected = exact(query, key, None, 0.2, 5)
    check(ours, expected if per_head else by_group(expected, groups))


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
def test_masks(vectors, additive, shared, per_head):
    """Rows of a batch have different lengths; heads may have masks of their own."""
    query, key = inputs(batch=2, length=70)
    mask = torch.ones(70, 70, dtype=torch.bool).tril().expand(2, 1 if shared else 4, -1, -1).clone()
    mask[1, :, :, :23] = False
    if not shared:
        mask[:, 1, :, 30:40] = False
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    ours = window_attention(query, key, mask, 0.2, 8, 40, per_head)
    expected = exact(query, key, mask, 0.2, 8)
    check(ours, expected if per_head else by_group(expected, 2))
    assert (ours[1, :, :23] == 0).all()


@pytest.mark.parametrize("masked", [False, True])
def test_a_given_log_sum_exp_is_used(vectors, monkeypatch, masked):
    query, key = inputs(heads=6, length=90)
    visible = torch.ones(90, 90, dtype=torch.bool).tril()
    mask = visible[None, None] if masked else None
    logits = query @ key.repeat_interleave(3, 1).mT * 0.2
    total = logits.masked_fill(~visible, -torch.inf).logsumexp(-1)
    monkeypatch.setattr(module, "_log_sum", None)
    ours = window_attention(query, key, mask, 0.2, 8, 40, log_sum_exp=total)
    check(ours, by_group(exact(query, key, mask, 0.2, 8), 2))


@pytest.mark.parametrize("given", [False, True])
def test_what_is_not_a_number_follows_the_reference(vectors, given):
    """Bad keys lose their own place; a query that sees nothing does not vote."""
    query, key = inputs(length=60)
    key[0, 0, 5], key[0, 1, 7, 3], key[0, 0, 9, 0] = torch.nan, torch.inf, -torch.inf
    mask = torch.ones(1, 1, 60, 60, dtype=torch.bool).tril()
    mask[:, :, -3] = False
    total = torch.zeros(1, 4, 60) if given else None
    if total is not None:
        total[0, 1, -2], total[0, 2, -4] = torch.nan, -torch.inf
    arguments = (query, key, mask, 0.2, 8, 40, False, total)
    ours, expected = window_attention(*arguments), reference.window_attention(*arguments)
    torch.testing.assert_close(ours, expected, rtol=3e-6, atol=1e-7, equal_nan=True)


def test_keys_may_lie_anywhere_in_memory(vectors):
    query, key = inputs(batch=2, length=80)
    expected = window_attention(query, key, None, 0.2, 8, 40)
    wide = torch.full((2, 90, 2, 40), torch.nan)
    wide[:, 5:85, :, 3:35] = key.transpose(1, 2)
    apart = wide[:, 5:85, :, 3:35].transpose(1, 2)
    assert not apart.is_contiguous()
    for other in (apart, key.mT.contiguous().mT):
        ours = window_attention(query.transpose(1, 2).contiguous().transpose(1, 2), other,
                                None, 0.2, 8, 40)  # fmt: skip
        assert torch.equal(ours, expected)


def test_threads_change_nothing(monkeypatch):
    query, key = inputs(batch=2, length=3000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    one = window_attention(query, key, None, 0.2, 8, 40)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(window_attention(query, key, None, 0.2, 8, 40), one)


def test_fewer_queries_than_the_window_are_an_error():
    query, key = inputs()
    with pytest.raises(ValueError, match="window of 8 tokens, but only 4 queries"):
        window_attention(query[:, :, -4:], key, None, 0.2, 8, 50)


class Attend(torch.nn.Module):
    def forward(self, query, key):
        return STARKV.window_attention(query, key, None, 0.2, 8, 40) * 2


def test_compiled_for_this_process_calls_it_and_what_leaves_it_does_not():
    query, key = inputs()
    expected = reference.window_attention(query, key, None, 0.2, 8, 40) * 2

    def code_of_compiled():
        torch._dynamo.reset()
        out, code = torch._inductor.utils.run_and_get_code(torch.compile(Attend()), query, key)
        torch.testing.assert_close(out, expected)
        return "".join(code)

    assert "window_attention_cpu" in code_of_compiled()
    with portable():
        assert "starkv" not in code_of_compiled()
