"""Selection and compaction: exact counts, exact rows, real bytes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from starkv_compile import StarKVConfig
from starkv_compile.kernels.reference import entropy
from starkv_compile.kernels.reference.capacity import clip_window, split_capacity
from starkv_compile.kernels.reference.selection import gather_kv, select_tokens

lengths = st.integers(2, 300)
windows = st.integers(1, 64)
budgets = st.sampled_from([0.01, 0.05, 0.1, 0.2, 0.29, 0.5, 0.9, 1.0])


def scores_for(seed, batch, past):
    generator = torch.Generator().manual_seed(seed)
    # A few distinct values, so that ties are common.
    return torch.randint(0, 7, (batch, past), generator=generator).float()


@given(length=lengths, window=windows, budget=budgets, seed=st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_kept_indices(length, window, budget, seed):
    capacity = StarKVConfig(budget=budget).capacity(length)
    selected, kept_window = split_capacity(length, window, capacity)
    past = length - clip_window(window, capacity, length)
    scores = scores_for(seed, 2, past)
    kept = select_tokens(scores, None, length, window, capacity)

    assert kept.shape == (2, selected + kept_window)
    assert kept.shape[1] == (capacity if 3 <= capacity <= length else max(2, min(capacity, length)))
    assert (kept[:, 1:] > kept[:, :-1]).all(), "ascending and unique"
    assert kept.min() >= 0
    assert kept.max() == length - 1
    assert kept[:, -kept_window:].tolist() == [list(range(past, length))] * 2
    for row in range(2):
        order = sorted(range(past), key=lambda i: (-scores[row, i].item(), i))
        assert kept[row, :selected].tolist() == sorted(order[:selected]), "ties: lowest index"


@given(
    length=st.integers(4, 120),
    padding=st.integers(0, 119),
    window=st.integers(1, 8),
    capacity=st.integers(3, 120),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_padding_goes_first(length, padding, window, capacity, seed):
    padding = min(padding, length - 1)
    past = length - clip_window(window, capacity, length)
    real = torch.arange(length)[None] >= padding
    scores = scores_for(seed, 1, past)
    kept = select_tokens(scores, real, length, window, capacity)
    kept_padding = int((kept < padding).sum())
    dropped_real = set(range(padding, length)) - set(kept[0].tolist())
    assert kept_padding == 0 or not dropped_real


def test_scores_that_are_not_finite_rank_below_finite_ones():
    scores = torch.tensor([[1.0, float("nan"), float("inf"), 0.5, float("-inf"), 0.25]])
    kept = select_tokens(scores, None, 7, 1, 4)
    assert kept.tolist() == [[0, 3, 5, 6]]


@given(batch=st.integers(1, 3), groups=st.integers(1, 4), length=lengths, seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_kept_rows_are_the_originals_in_new_storage(batch, groups, length, seed):
    generator = torch.Generator().manual_seed(seed)
    key = torch.randn(batch, groups, length, 8, generator=generator)
    value = torch.randn(batch, groups, length, 4, generator=generator)
    count = max(1, length // 4)
    kept = torch.stack(
        [torch.randperm(length, generator=generator)[:count].sort().values for _ in range(batch)]
    )
    new_key, new_value = gather_kv(key, value, kept, None)
    for row in range(batch):
        assert torch.equal(new_key[row], key[row][:, kept[row]])
        assert torch.equal(new_value[row], value[row][:, kept[row]])
    assert new_key.untyped_storage().nbytes() == batch * groups * count * 8 * 4
    assert new_value.untyped_storage().nbytes() == batch * groups * count * 4 * 4
    assert new_key.untyped_storage().data_ptr() != new_value.untyped_storage().data_ptr()


def test_kept_padding_is_zero():
    key = torch.full((1, 1, 4, 2), float("nan"))
    key[0, 0, 2:] = 1.0
    kept = torch.tensor([[1, 2, 3]])
    real = torch.tensor([[False, False, True, True]])
    new_key, _ = gather_kv(key, key, kept, real)
    assert new_key[0, 0].tolist() == [[0, 0], [1, 1], [1, 1]]


@given(seed=st.integers(0, 999), low=st.floats(0.3, 1.0), high=st.floats(1.0, 3.0))
@settings(max_examples=100, deadline=None)
def test_global_entropy_cannot_change_what_is_kept(seed, low, high):
    """One positive power before a top-k is monotone: the published module is inert there."""
    generator = torch.Generator().manual_seed(seed)
    # Well apart, so that rounding cannot make or break ties.
    scores = torch.randperm(200, generator=generator)[None].float() / 200 + 0.01
    degree = entropy.temperature(scores, torch.tensor([200]), low, high)
    shaped = entropy.reshape_global(scores, degree)
    before = select_tokens(scores, None, 208, 8, 40)
    assert torch.equal(before, select_tokens(shaped, None, 208, 8, 40))


def test_subspace_entropy_changes_what_is_kept():
    torch.manual_seed(0)
    group = torch.rand(1, 4, 200) ** 4
    shaped = entropy.reshape_subspaces(group, torch.tensor([200]), 0.3, 2.0)
    assert not torch.equal(
        select_tokens(group.mean(1), None, 208, 8, 40),
        select_tokens(shaped.mean(1), None, 208, 8, 40),
    )
    torch.testing.assert_close(shaped.sum(-1), group.sum(-1))


@pytest.mark.parametrize(("capacity", "kept"), [(0, 2), (1, 2), (2, 2), (3, 3), (9, 5)])
def test_smallest_prompts(capacity, kept):
    assert sum(split_capacity(5, 8, capacity)) == kept
