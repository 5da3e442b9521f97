"""The tokens that stay, against those that the cache of a compiled model keeps."""

from types import SimpleNamespace

import pytest
import torch

from starkv_compile.kernels.ops import STARKV
from starkv_compile.kernels.reference.star import Layout, fresh_state
from starkv_compile.policies import ScoreInputs
from starkv_compile.serving.images import beginning, layout_of
from starkv_compile.serving.rule import SERVED, Rule
from starkv_compile.serving.scoring import choose

LENGTH, CAPACITY, WINDOW = 90, 33, 8


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(6, LENGTH, 16, generator=generator)
    key, value = torch.randn(2, 2, LENGTH, 16, generator=generator)
    return query, key, value


def feature(offset, length, grid=None, modality="image", is_embed=None):
    data = (
        None if grid is None else {f"{modality}_grid_thw": SimpleNamespace(data=torch.tensor(grid))}
    )
    place = SimpleNamespace(offset=offset, length=length, is_embed=is_embed)
    return SimpleNamespace(modality=modality, data=data, mm_position=place)


@pytest.mark.parametrize("kind", SERVED, ids=lambda kind: kind.name)
def test_the_windows_queries_are_enough(kind):
    """With all queries of the prompt, a policy keeps the same tokens."""
    query, key, value = tensors()
    layout = layout_of(LENGTH, [feature(5, 24, [1, 4, 6]), feature(40, 20, [1, 4, 5])], key.device)
    rule = Rule.of({"policy": kind.name})
    window = rule.config.scoring_window
    kept, stored = choose(rule, query[:, -window:], key, value, 0.25, CAPACITY, layout, 0)
    assert torch.equal(stored.places, kept)
    heads = kind.per_head
    described = (
        Layout(*(t[:, None].expand(-1, 2, -1) for t in layout[:3]), layout.current)
        if heads
        else layout
    )
    visual = int((layout.frame >= 0).sum())
    places = torch.arange(LENGTH)[None]
    whole = ScoreInputs(
        query=query[None],
        key=key[None],
        value=value[None],
        mask=None,
        scale=0.25,
        log_sum_exp=None,
        hidden=None,
        real=None,
        layout=described,
        counts=torch.tensor([[LENGTH - visual, visual]]),
        state=fresh_state(key[None], layout.current),
        index=places[:, None].expand(-1, 2, -1) if heads else places,
        novelty=None,
        layer=0,
        window=window,
        capacity=CAPACITY,
    )
    scores = rule.config.policy.score(whole).scores
    assert torch.equal(kept, STARKV.select_tokens(scores, None, LENGTH, window, CAPACITY)[0])
    assert kept.shape[-1] == CAPACITY


@pytest.mark.parametrize("kind", SERVED, ids=lambda kind: kind.name)
def test_what_stayed_at_an_earlier_stop_is_an_earlier_prompts(kind):
    """A policy reads of these tokens what a cache would tell it at a second prompt."""
    query, key, value = tensors()
    first, heads = 50, 2 if kind.per_head else 1
    pictures = [feature(5, 24, [1, 4, 6]), feature(40, 20, [1, 4, 5])]  # the second one is cut
    layout = layout_of(LENGTH, pictures, key.device)
    rule = Rule.of({"policy": kind.name})
    told = []
    policy = SimpleNamespace(
        per_head=kind.per_head,
        score=lambda inputs: told.append(inputs) or rule.config.policy.score(inputs),
    )
    watching = SimpleNamespace(
        config=SimpleNamespace(policy=policy, scoring_window=rule.config.scoring_window)
    )
    part = query[:, first - WINDOW : first], key[:, :first], value[:, :first]
    kept, stored = choose(rule, *part, 0.25, 20, beginning(layout, first), 0)
    index = kept.expand(2, -1)[..., None].expand(-1, -1, 16)
    keys, values = (
        torch.cat([t[:, :first].gather(1, index), t[:, first:]], 1) for t in (key, value)
    )
    again, both = choose(
        watching, query[:, -WINDOW:], keys, values, 0.25, CAPACITY, layout, 0, stored
    )
    (inputs,) = told
    places = torch.cat([kept.expand(heads, -1), torch.arange(first, LENGTH).expand(heads, -1)], -1)
    expected = places if kind.per_head else places[0]
    assert torch.equal(inputs.index[0], expected)
    assert torch.equal(inputs.layout[0][0], layout.frame[0][expected])
    assert (inputs.stored, inputs.new) == (20, LENGTH - first)
    expected_frame = [-1] * 10 + [*range(20, 30)]
    assert inputs.layout[3][0][:20].tolist() == expected_frame, "ten came before, ten are new"
    assert (inputs.layout[3][0][20:] == -1).all()
    assert inputs.counts.tolist() == [[LENGTH - 44, 44]], "dropped tokens count"
    assert torch.equal(both.places, expected.gather(-1, again))
    if stored.novelty is not None:
        assert torch.equal(inputs.novelty[0, :20], stored.novelty)
        old = again < 20
        assert torch.equal(both.novelty[old], stored.novelty[again[old]])


def test_pictures_of_known_and_unknown_shape():
    layout = layout_of(40, [feature(20, 10), feature(2, 12, [1, 6, 8])], torch.device("cpu"))
    frame, row, column = (t[0] for t in layout[:3])
    assert frame.tolist() == [-1] * 2 + [0] * 12 + [-1] * 6 + [1] * 10 + [-1] * 10
    assert row[2:14].tolist() == [0] * 4 + [1] * 4 + [2] * 4, "four patches are a token"
    assert column[2:14].tolist() == [0, 1, 2, 3] * 3
    assert (int(row[20:30].max()), int(column[20:30].max())) == (2, 3), "nearly a square"
    assert layout.current[0][:11].tolist() == [*range(20, 30), -1]


def test_shapes_that_a_prefix_hit_would_hide_are_not_read():
    features = [feature(2, 12, [1, 6, 8])]
    seen, hidden = (
        layout_of(40, features, torch.device("cpu"), has_grids) for has_grids in (True, False)
    )
    assert torch.equal(seen.frame, hidden.frame)
    assert int(seen.column.max()) == 3
    features[0].data = None
    assert all(
        torch.equal(a, b)
        for a, b in zip(hidden, layout_of(40, features, torch.device("cpu")), strict=True)
    )


def test_frames_of_a_video_with_text_between_them():
    is_embed = torch.tensor([1] * 4 + [0] * 2 + [1] * 4, dtype=torch.bool)
    video = feature(3, 10, [2, 4, 4], "video", is_embed)
    frame = layout_of(15, [video], torch.device("cpu")).frame[0]
    assert frame.tolist() == [-1] * 3 + [0] * 4 + [-1] * 2 + [1] * 4 + [-1] * 2


def test_text_alone():
    layout = layout_of(7, None, torch.device("cpu"))
    assert layout.frame.tolist() == [[-1] * 7]
