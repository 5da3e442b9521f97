"""The CPU's own kernels: attention against float64, for every width of vectors; exact selection."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.exact import by_group
from benchmarks.exact import window_attention as exact
from starkv_compile.kernels import reference
from starkv_compile.kernels.compiling import portable
from starkv_compile.kernels.cpp import attention
from starkv_compile.kernels.cpp.attention import window_attention
from starkv_compile.kernels.cpp.novelty import key_novelty, spatial_novelty, temporal_novelty
from starkv_compile.kernels.cpp.ranks import rank_histogram
from starkv_compile.kernels.cpp.selection import select_tokens
from starkv_compile.kernels.ops import STARKV
from starkv_compile.kernels.reference.capacity import clip_window
from starkv_compile.kernels.reference.star import fresh_state
from tests.support.kernel_scores import KINDS, scores_of
from tests.support.narrower import NARROWER, narrower

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="C++ kernels are for Linux")


@pytest.fixture(params=NARROWER, ids=lambda flag: flag or "native")
def vectors(request, monkeypatch):
    """16, 8 and 4 numbers a vector, as far as this machine has them."""
    narrower(monkeypatch, "attention", request.param)


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


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_torchs_default_dtype_changes_nothing(default):
    query, key = inputs()
    frame = torch.arange(100)[None] // 20
    row, column = torch.arange(100)[None] % 20 // 4, torch.arange(100)[None] % 4
    current, earlier = torch.arange(80, 100)[None], torch.zeros(1, 0)

    def results():
        return (
            window_attention(query, key, None, 0.2, 8, 50),
            spatial_novelty(key, frame, row, column, earlier),
            temporal_novelty(key, frame, row, column, current, 0),
            key_novelty(key, torch.ones(1, 100, dtype=torch.bool)),
            *fresh_state(key, current),
        )

    expected = results()
    torch.set_default_dtype(default)
    try:
        found = results()
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


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


@pytest.mark.parametrize("per_head", [False, True])
def test_a_mask_of_the_keys_alone(vectors, per_head):
    query, key = inputs(batch=2, length=70)
    mask = (torch.arange(70) >= torch.tensor([[0], [23]]))[:, None, None]
    ours = window_attention(query, key, mask, 0.2, 8, 40, per_head)
    expected = exact(query, key, mask.expand(2, 1, 70, 70), 0.2, 8)
    check(ours, expected if per_head else by_group(expected, 2))


@pytest.mark.parametrize("masked", [False, True])
def test_a_given_log_sum_exp_is_used(vectors, monkeypatch, masked):
    query, key = inputs(heads=6, length=90)
    visible = torch.ones(90, 90, dtype=torch.bool).tril()
    mask = visible[None, None] if masked else None
    logits = query @ key.repeat_interleave(3, 1).mT * 0.2
    total = logits.masked_fill(~visible, -torch.inf).logsumexp(-1)
    monkeypatch.setattr(attention, "_log_sum", None)
    ours = window_attention(query, key, mask, 0.2, 8, 40, log_sum_exp=total)
    check(ours, by_group(exact(query, key, mask, 0.2, 8), 2))


@pytest.mark.parametrize("is_given", [False, True])
def test_what_is_not_a_number_follows_the_reference(vectors, is_given):
    """Bad keys lose their own place; a query that sees nothing does not vote."""
    query, key = inputs(length=60)
    key[0, 0, 5], key[0, 1, 7, 3], key[0, 0, 9, 0] = torch.nan, torch.inf, -torch.inf
    mask = torch.ones(1, 1, 60, 60, dtype=torch.bool).tril()
    mask[:, :, -3] = False
    total = torch.zeros(1, 4, 60) if is_given else None
    if total is not None:
        total[0, 1, -2], total[0, 2, -4] = torch.nan, -torch.inf
    arguments = (query, key, mask, 0.2, 8, 40, False, total)
    ours, expected = window_attention(*arguments), reference.window_attention(*arguments)
    torch.testing.assert_close(ours, expected, rtol=3e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("heads", [2, 4])
def test_queries_and_keys_may_lie_anywhere_in_memory(vectors, heads):
    query, key = inputs(batch=2, heads=heads, length=80)
    expected = window_attention(query, key, None, 0.2, 8, 40)
    scattered = [_between_other_numbers(t) for t in (query, key)]
    assert torch.equal(window_attention(*scattered, None, 0.2, 8, 40), expected)
    turned = key.mT.contiguous().mT
    assert torch.equal(window_attention(query, turned, None, 0.2, 8, 40), expected)


def _between_other_numbers(tensor):
    """[B, H, L, D] as a view of [B, L + 10, H, D + 8], as projections lie, NaN all around."""
    batch, heads, length, dim = tensor.shape
    wide = torch.full((batch, length + 10, heads, dim + 8), torch.nan)
    wide[:, 5:-5, :, 3:-5] = tensor.transpose(1, 2)
    return wide[:, 5:-5, :, 3:-5].transpose(1, 2)


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("past", [1, 5, 1000, 3000])
def test_selection_is_the_references(kind, padded, past):
    generator = torch.Generator().manual_seed(past)
    scores = scores_of(kind, 2, past, generator)
    window, length = 8, past + 8
    real = torch.rand(2, length, generator=generator) < 0.7 if padded else None
    for capacity in (window + 2, window + 3, past // 3 + window + 2, past + 2, length - 1, length):
        arguments = (scores, real, length, window, capacity)
        if clip_window(window, capacity, length) == window:
            assert torch.equal(select_tokens(*arguments), reference.select_tokens(*arguments))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 1, 15, 700, 1000])
def test_ranks_are_the_references(kind, count):
    generator = torch.Generator().manual_seed(count)
    scores = torch.stack([scores_of(kind, 3, 1000, generator) for _ in range(2)])
    scores = scores.nan_to_num(nan=1.0)
    place = torch.randint(0, 144, (2, 1000), generator=generator)
    valid = torch.arange(1000) < torch.tensor([[count], [500]])
    arguments = (scores, place, valid)
    assert torch.equal(rank_histogram(*arguments), reference.rank_histogram(*arguments))


def test_selection_reads_no_more_of_a_mask_than_it_has():
    scores = torch.rand(2, 30)
    expected = select_tokens(scores, torch.ones(2, 34, dtype=torch.bool), 34, 4, 12)
    assert torch.equal(
        select_tokens(scores, torch.ones(2, 1, dtype=torch.bool), 34, 4, 12), expected
    )
    with pytest.raises(RuntimeError, match="expand"):
        select_tokens(scores, torch.ones(2, 20, dtype=torch.bool), 34, 4, 12)


@pytest.mark.slow(ci=True)
@given(data=st.data())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_selection_of_any_scores(data):
    value = st.one_of(st.floats(width=32), st.sampled_from([0.0, -0.0, 1.0, -1.0]))
    past = data.draw(st.integers(1, 60))
    scores = torch.tensor([data.draw(st.lists(value, min_size=past, max_size=past))])
    arguments = (scores, None, past + 1, 1, data.draw(st.integers(3, past + 3)))
    assert torch.equal(select_tokens(*arguments), reference.select_tokens(*arguments))


class Attend(torch.nn.Module):
    def forward(self, query, key):
        scores = STARKV.window_attention(query, key, None, 0.2, 8, 40)
        return scores * 2, STARKV.select_tokens(scores.mean(1), None, key.shape[2], 8, 40)


@pytest.mark.slow(ci=True)
def test_compiled_for_this_process_calls_it_and_what_leaves_it_does_not():
    query, key = inputs()
    expected = reference.window_attention(query, key, None, 0.2, 8, 40)
    kept = reference.select_tokens(expected.mean(1), None, 100, 8, 40)

    def code_of_compiled():
        torch._dynamo.reset()
        out, code = torch._inductor.utils.run_and_get_code(torch.compile(Attend()), query, key)
        torch.testing.assert_close(out, (expected * 2, kept))
        return "".join(code)

    code = code_of_compiled()
    assert "window_attention_cpu" in code
    assert "select_tokens_cpu" in code
    with portable():
        assert "starkv" not in code_of_compiled()
