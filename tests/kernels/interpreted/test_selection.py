"""Selection, compaction and rank counting of the kernels: equal to the reference, bit for bit."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from starkv_compile.kernels import reference, triton
from tests.support.kernel_scores import KINDS, scores_of

relaxed = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("past", [5, 1023, 1024, 1025, 3000])
def test_selection_is_the_references(guards, kind, padded, past):
    generator = torch.Generator().manual_seed(past)
    scores = scores_of(kind, 2, past, generator)
    window, length = 8, past + 8
    real = torch.rand(2, length, generator=generator) < 0.7 if padded else None
    given_real = None if real is None else guards.copy(real)
    for capacity in sorted({window + 2, window + 3, past // 3 + window, past, length - 1, length}):
        if capacity < window + 2:
            continue
        arguments = (length, window, capacity)
        ours = triton.select_tokens(guards.copy(scores), given_real, *arguments)
        assert torch.equal(ours, reference.select_tokens(scores, real, *arguments))


@relaxed
@given(data=st.data())
def test_selection_of_any_scores(guards, data):
    value = st.one_of(st.floats(width=32), st.sampled_from([0.0, 1.0, -1.0]))
    past = data.draw(st.integers(2, 60))
    scores = torch.tensor([data.draw(st.lists(value, min_size=past, max_size=past))])
    capacity = data.draw(st.integers(3, past + 1))
    ours = triton.select_tokens(guards.copy(scores), None, past + 1, 1, capacity)
    assert torch.equal(ours, reference.select_tokens(scores, None, past + 1, 1, capacity))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (192, 128)])
@pytest.mark.parametrize("padded", [False, True])
def test_kept_rows_are_the_originals(guards, dtype, dims, padded):
    key = torch.randn(2, 3, 70, dims[0]).to(dtype)
    value = torch.randn(2, 3, 70, dims[1]).to(dtype)
    kept = torch.stack([torch.randperm(70)[:41].sort().values for _ in range(2)])
    real = torch.rand(2, 70) < 0.6 if padded else None
    ours = triton.gather_kv(
        guards.copy(key),
        guards.copy(value),
        guards.copy(kept),
        None if real is None else guards.copy(real),
    )
    for mine, theirs in zip(ours, reference.gather_kv(key, value, kept, real), strict=True):
        assert torch.equal(mine, theirs)
    assert ours[0].untyped_storage().data_ptr() != ours[1].untyped_storage().data_ptr()


def test_rows_are_gathered_from_strided_storage(guards):
    """As a model has them: a transpose of [B, L, G, D]."""
    key, value = torch.randn(2, 70, 3, 32), torch.randn(2, 70, 3, 32)
    kept = torch.arange(0, 70, 3).expand(2, -1)
    ours = triton.gather_kv(
        guards.copy(key).transpose(1, 2), guards.copy(value).transpose(1, 2), kept, None
    )
    expected = reference.gather_kv(key.transpose(1, 2), value.transpose(1, 2), kept, None)
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1], expected[1])


@pytest.mark.parametrize("kind", ["random", "ties", "equal"])
@pytest.mark.parametrize("tokens", [1, 15, 129, 700])
def test_ranks_are_the_references(guards, kind, tokens):
    generator = torch.Generator().manual_seed(tokens)
    scores = scores_of(kind, 2 * 3, tokens, generator).abs().view(2, 3, tokens)
    place = torch.randint(0, 144, (2, tokens), generator=generator)
    valid = torch.arange(tokens) < torch.tensor([[tokens], [max(1, tokens // 2)]])
    ours = triton.rank_histogram(guards.copy(scores), guards.copy(place), valid)
    assert torch.equal(ours, reference.rank_histogram(scores, place, valid))


def test_no_frame_counts_nothing(guards):
    none = torch.zeros(1, 4, dtype=torch.bool)
    ours = triton.rank_histogram(torch.rand(1, 2, 4), torch.zeros(1, 4, dtype=torch.int64), none)
    assert not ours.any()
