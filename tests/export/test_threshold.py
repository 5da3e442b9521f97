"""Selection without a sort: equal to the reference, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from starkv_compile.export.capture.select import (
    TENSORRT_TOPK,
    best_by_threshold,
    chosen,
    select_by_threshold,
)
from starkv_compile.export.capture.threshold import bins
from starkv_compile.kernels.reference.novelty import best_by_sort
from starkv_compile.kernels.reference.selection import select_tokens

any_score = st.one_of(
    st.floats(width=32),
    st.sampled_from([0.0, -0.0, 1.0, 1e-41, 3.4e38, float("nan"), float("inf"), float("-inf")]),
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_scores_are_selected_as_by_the_reference(data):
    scores = torch.tensor([data.draw(st.lists(any_score, min_size=2, max_size=60))])
    window = data.draw(st.integers(1, 8))
    length = scores.shape[1] + window
    capacity = data.draw(st.integers(window + 2, length + 5))
    real = torch.tensor([data.draw(st.lists(st.booleans(), min_size=length, max_size=length))])
    for shown in (None, real):
        expected = select_tokens(scores, shown, length, window, capacity)
        assert torch.equal(select_by_threshold(scores, shown, length, window, capacity), expected)


@pytest.mark.parametrize("default", [torch.float16, torch.float64])
def test_torchs_default_dtype_changes_nothing(default):
    scores = torch.tensor([[3e-9, 1e-9, 5e-9, 2e-9, 0.5, 7e-9, 9e5, 8e5]])
    expected = select_by_threshold(scores, None, 9, 1, 5)
    torch.set_default_dtype(default)
    try:
        found = select_by_threshold(scores, None, 9, 1, 5)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)
    assert torch.equal(found, select_tokens(scores, None, 9, 1, 5))


def sink(places):
    scores = torch.softmax(torch.randn(places), 0)
    scores[0] = 1e9
    return scores


@pytest.mark.parametrize("places", [777, 131072])
@pytest.mark.parametrize(
    "scores",
    [
        lambda n: torch.softmax(12 * torch.randn(n), 0),
        lambda n: torch.softmax(torch.randn(n), 0).half().float(),
        lambda n: torch.zeros(n),
        lambda n: (8 * torch.rand(n)).floor(),
        sink,
    ],
    ids=["heavy tail", "half precision", "zeros", "ties", "attention sink"],
)
def test_long_prompts_are_selected_as_by_a_stable_sort(scores, places):
    torch.manual_seed(0)
    values = scores(places)[None]
    expected = select_tokens(values, None, places + 8, 8, places // 5)
    assert torch.equal(select_by_threshold(values, None, places + 8, 8, places // 5), expected)


def test_bins_ascend_and_meet():
    first, step = bins()
    assert list(first) == sorted(first)
    ends = [a + 2**23 * s for a, s in zip(first, step, strict=True)]
    assert all(
        end == begin or begin == first[-1] for end, begin in zip(ends[2:-1], first[3:], strict=True)
    )


def test_auto_takes_the_form_that_tensorrt_can_run():
    assert chosen("auto", TENSORRT_TOPK) == "topk"
    assert chosen("auto", TENSORRT_TOPK + 1) == "threshold"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 1e-30, 0.5, 1.0, 2.0, 1e30]), min_size=1, max_size=40), st.data()
)
def test_the_best_of_each_kind_are_those_of_a_sort(values, data):
    scores = torch.tensor([values])
    flags = data.draw(st.lists(st.sampled_from("vtp"), min_size=len(values), max_size=len(values)))
    kinds = [torch.tensor([[flag == name for flag in flags]]) for name in "vt"]
    quotas = [torch.tensor([[data.draw(st.integers(0, int(kind.sum())))]]) for kind in kinds]
    expected = best_by_sort(scores, kinds, quotas)
    assert int(expected.sum()) == sum(int(quota) for quota in quotas)
    assert torch.equal(best_by_threshold(scores, kinds, quotas), expected)
