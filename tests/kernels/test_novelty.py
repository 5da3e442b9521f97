"""Novelty in space and in time, and ranks of two kinds of tokens, against cases done by hand."""

import sys

import pytest
import torch
from torch.nn import functional as F

import starkv_compile.policies  # noqa: F401 - registers novelty_scores and share_out
from starkv_compile.kernels import cpp
from starkv_compile.kernels.ops import STARKV
from starkv_compile.kernels.reference.layout import newest_places
from starkv_compile.kernels.reference.novelty import (
    STANDS_FOR,
    key_novelty,
    share_out,
    spatial_novelty,
    temporal_novelty,
)
from tests.support.crossing import slow
from tests.support.narrower import NARROWER, narrower


def layout_of(*parts):
    """frame, row, column, current [1, L]; a number is text, (rows, columns) a frame."""
    frame, row, column = [], [], []
    for part in parts:
        rows, columns = (1, part) if isinstance(part, int) else part
        visual = not isinstance(part, int)
        number = max(frame, default=-1) + 1 if visual else -1
        for place in range(rows * columns):
            frame.append(number)
            row.append(place // columns if visual else 0)
            column.append(place % columns if visual else 0)
    frame, row, column = (torch.tensor([t]) for t in (frame, row, column))
    return frame, row, column, newest_places(frame, frame >= 0)


def by_loops(key, frame, row, column):
    """1 - mean cosine with the up to 8 neighbours, token by token, in float64."""
    units = F.normalize(key[0].double().transpose(0, 1).flatten(1), dim=-1)
    place = {
        (f, r, c): i
        for i, (f, r, c) in enumerate(
            zip(*(t[0].tolist() for t in (frame, row, column)), strict=True)
        )
        if f >= 0
    }
    found = torch.ones(key.shape[2], dtype=torch.float64)
    for (f, r, c), i in place.items():
        around = [
            place[f, r + down, c + right]
            for down in (-1, 0, 1)
            for right in (-1, 0, 1)
            if (down or right) and (f, r + down, c + right) in place
        ]
        if around:
            found[i] = 1 - (units[around] @ units[i]).mean()
    return found


MANY = (5, (3, 4), 2, (1, 1), (4, 2), (1, 6), 3, (5, 1), (3, 4), 2)


def test_novelty_in_space_is_that_of_each_tokens_neighbours():
    frame, row, column, _ = layout_of(*MANY)
    key = torch.randn(1, 2, frame.shape[1], 8, generator=torch.Generator().manual_seed(0))
    ours = spatial_novelty(key, frame, row, column, torch.ones(1, 0))
    torch.testing.assert_close(ours[0].double(), by_loops(key, frame, row, column))
    narrow = layout_of((4, 1), 1)[:3]  # as many rows as there is room to note
    torch.testing.assert_close(
        spatial_novelty(key[:, :, :5], *narrow, torch.ones(1, 0))[0].double(),
        by_loops(key[:, :, :5], *narrow),
    )
    twice = [t.expand(2, *t.shape[1:]) for t in (key, frame, row, column)]
    twice[0] = torch.cat([key, key.flip(2)])
    assert torch.equal(spatial_novelty(*twice, torch.ones(2, 0))[0], ours[0])


def test_what_earlier_prompts_left_keeps_its_novelty():
    """Of the first frame every other token was kept: no neighbour of theirs is asked again."""
    frame, row, column, _ = layout_of(2, (3, 4), 1, (3, 4), 2)
    key = torch.randn(1, 2, frame.shape[1], 8, generator=torch.Generator().manual_seed(1))
    whole = spatial_novelty(key, frame, row, column, torch.ones(1, 0))
    stays = [*range(0, 14, 2), *range(15, frame.shape[1])]
    parts = [t[:, stays] for t in (frame, row, column)]
    told = whole[:, :14:2] + 0.25
    again = spatial_novelty(key[:, :, stays], *parts, told)
    assert torch.equal(again[:, :7], told)
    torch.testing.assert_close(again[:, 7:], whole[:, 15:])


def test_a_key_that_is_not_finite_resembles_nothing():
    frame, row, column, current = layout_of((2, 2), (2, 2))
    key = torch.ones(1, 1, 8, 4)
    key[0, 0, 0, 1], key[0, 0, 7] = float("nan"), 0.0
    novelty = spatial_novelty(key, frame, row, column, torch.ones(1, 0))[0]
    torch.testing.assert_close(novelty, torch.tensor([1, *[1 / 3] * 6, 1]))
    key[0, 0, 1, 1] = float("inf")
    found = temporal_novelty(key, frame, row, column, current, 0)[0]
    assert found.tolist() == [1, 1, 0, 1, 1, 1, 1, 1]


def test_novelty_in_time_is_a_share_of_the_largest_change():
    """Of three frames of 2 x 2 the newest is smaller; cosines with it are 1, 0.5 and 0."""
    frame, row, column, current = layout_of((2, 2), 1, (2, 2), 2, (2, 1), 3)
    key = torch.zeros(1, 1, frame.shape[1], 2)
    key[..., 0] = 1.0
    key[0, 0, 2] = torch.tensor([0.5, 0.75**0.5])  # row 1, column 0 of frame 0
    key[0, 0, 5] = torch.tensor([0.0, 1.0])  # row 0, column 0 of frame 1
    found = temporal_novelty(key, frame, row, column, current, 0)[0].tolist()
    # The newest frame has no column 1, so tokens there are like none; text is no frame's.
    assert found == pytest.approx([0, 1, 0.5, 1, 1, 1, 1, 0, 1, *[1] * 7], abs=1e-6)


def test_every_cell_meets_the_newest_at_its_place_and_the_largest_change_is_one():
    """Cosines are 1 but for two cells of the older frame, where they are 0.5 and 0.75."""
    frame, row, column, current = layout_of((2, 3), 1, (2, 3))
    key = torch.zeros(1, 1, 13, 2)
    key[..., 0] = 1.0
    for place, cosine in ((1, 0.5), (5, 0.75)):
        key[0, 0, place] = torch.tensor([cosine, (1 - cosine**2) ** 0.5])
    expected = [0, 1, 0, 0, 0, 0.5, *[1] * 7]
    for places in (current, current[:, :6]):  # with and without padding of the newest frame
        found = temporal_novelty(key, frame, row, column, places, 0)[0].tolist()
        assert found == pytest.approx(expected, abs=1e-6)


def test_a_newest_frame_that_lost_tokens_is_met_at_its_places():
    """A chunk cut the newest frame, and a compaction dropped its first and fourth token."""
    frame, row, column, current = layout_of((2, 3), (2, 3))
    key = torch.zeros(1, 1, 12, 2)
    key[..., 0] = 1.0
    key[0, 0, 5] = torch.tensor([0.5, 0.75**0.5])
    left = torch.tensor([[*current[0, :6][[1, 2, 4, 5]].tolist(), -1, -1]])
    for temporal in (temporal_novelty, cpp.temporal_novelty):
        found = temporal(key, frame, row, column, left, 0)[0].tolist()
        assert found == pytest.approx([1, 0, 0, 1, 0, 1, *[1] * 6], abs=1e-6)


def test_an_older_frame_may_be_larger_than_the_newest():
    frame, row, column, current = layout_of((3, 3), (2, 2))
    key = torch.ones(1, 1, 13, 2)
    found = temporal_novelty(key, frame, row, column, current[:, :4], 0)[0].tolist()
    assert found == pytest.approx([0, 0, 1, 0, 0, 1, 1, 1, 1, *[1] * 4], abs=1e-6)


def test_what_is_stored_counts_for_the_frames_between_as_well():
    """As above, but the first frame's are of an earlier prompt."""
    frame, row, column, current = layout_of((2, 1), 1, (2, 1), (2, 1), 1)
    key = torch.zeros(1, 1, frame.shape[1], 2)
    key[..., 0] = 1.0
    key[0, 0, 1] = torch.tensor([0.5, 0.75**0.5])
    key[0, 0, 4] = torch.tensor([0.0, 1.0])
    found = temporal_novelty(key, frame, row, column, current, 3)[0].tolist()
    s = STANDS_FOR
    assert found == pytest.approx([s, s + (1 - s) / 2, 1, 0, 1, 1, 1, 1], abs=1e-6)


def test_without_a_newest_frame_all_is_new_in_time():
    frame, row, column, _ = layout_of((2, 2), 3, (2, 2), 1)
    key = torch.ones(1, 1, frame.shape[1], 2)
    nothing = torch.full((1, 4), -1)
    assert temporal_novelty(key, frame, row, column, nothing, 0).tolist() == [
        [1.0] * frame.shape[1]
    ]


def test_key_novelty_is_one_less_the_mean_cosine():
    generator = torch.Generator().manual_seed(6)
    key = torch.randn(2, 3, 20, 8, generator=generator)
    among = torch.rand(2, 20, generator=generator) < 0.7
    key[0, 1, 4, 2], key[1, :, 5] = torch.inf, 0.0
    among[0, 4], among[1, 5] = True, True
    found = key_novelty(key, among)
    units = F.normalize(key.double().transpose(1, 2).flatten(2), dim=-1)
    units[0, 4] = 0.0
    for row in range(2):
        cosines = units[row] @ units[row][among[row]].T
        expected = torch.where(among[row], 1 - cosines.mean(1), 0.0)
        expected[4 if row == 0 else 5] = 0.0
        torch.testing.assert_close(found[row].double(), expected)


def equal_keys(length, seed):
    """[1, 2, length, 8]: one random key, for every token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 2, 1, 8, generator=generator).expand(1, 2, length, 8)


def test_no_novelty_is_below_zero_by_rounding():
    """In float32 the cosine of a key with itself is often slightly more than 1."""
    frame, row, column, current = layout_of(*MANY)
    for seed in range(50):
        key = equal_keys(frame.shape[1], seed)
        for novelty in (
            spatial_novelty(key, frame, row, column, torch.ones(1, 0)),
            temporal_novelty(key, frame, row, column, current, 0),
            key_novelty(key, frame < 0),
        ):
            assert float(novelty.min()) >= 0


def test_a_key_among_itself_alone_is_not_new():
    key = torch.randn(1, 2, 3, 8, generator=torch.Generator().manual_seed(0))
    found = key_novelty(key, torch.tensor([[False, True, False]]))[0].tolist()
    assert found == pytest.approx([0, 0, 0], abs=1e-6)
    assert key_novelty(key, torch.zeros(1, 3, dtype=torch.bool)).tolist() == [[0.0] * 3]


def shared(scores, visual, real, selected, weight, counts=None):
    """`share_out` of tokens that stand before a window of one token of text."""
    frame = F.pad(visual.long() - 1, (0, 1), value=-1)
    real = None if real is None else F.pad(real, (0, 1), value=True)
    return share_out(scores, real, frame, counts, 1, selected + 1, weight)


def default_scores(seen, frame, real=None, fresh=None):
    """`novelty_scores` with a pool of 3, half the attention and twice the novelty.

    Two heads have the mean `seen`. All that is not in the table below is 1.
    """
    length = len(frame)
    attention = torch.stack([2 * torch.tensor(seen), torch.zeros(len(seen))])[None]
    spatial, temporal = torch.ones(2, 1, length)
    unlike = torch.zeros(1, length)
    spatial[0, 3:5] = torch.tensor([0.5, 0.25])
    temporal[0, 4:7] = torch.tensor([0.5, 1.0, 0.2])
    unlike[0, [1, 2, 5, -1]] = torch.tensor([0.1, 0.3, 0.4, 0.9])
    real, fresh = (None if flags is None else torch.tensor([flags]) for flags in (real, fresh))
    return STARKV.novelty_scores(
        attention, spatial, temporal, unlike, real, torch.tensor([frame]), 3, 0.5, 2.0, fresh
    )[0].tolist()


def test_the_default_scores_by_hand():
    """One token of padding, text, a screen of tokens 3, 4 and 6, and a window of one token."""
    frame, real = [-1, -1, -1, 0, 0, -1, 0, -1], [False, *[True] * 7]
    found = default_scores([9.0, 1.0, 3.0, 2.0, 4.0, 5.0, 6.0], frame, real)
    # Text is pooled over text: 2, 2 and 5 of 9. Novelty: 1, 3 and 4 of 8, twice.
    text = [2 / 9 + 2 / 8, 2 / 9 + 6 / 8, 5 / 9 + 8 / 8]
    # The mean attention to the screen is 4: factors 1 + 1/4, 1 + 1/2 and 1 + 3/4.
    screen = [0.5 * 1.25, 0.25 * 0.5 * 1.5, 0.2 * 1.75]
    assert found == pytest.approx([0, text[0], text[1], screen[0], screen[1], text[2], screen[2]])


def test_the_default_scores_of_a_screen_of_one_token_or_without_attention():
    one = default_scores([1.0, 1.0, 1.0, 8.0], [-1, -1, -1, 0, -1, -1, -1])
    assert one[3] == pytest.approx(0.5 * 1.5), "its attention is the mean"
    unseen = default_scores([0.0] * 7, [-1, -1, -1, 0, 0, -1, 0, -1])
    assert unseen[3:5] == pytest.approx([0.5, 0.125])
    assert unseen[5] == pytest.approx(2 * 4 / 8)


def test_the_attention_to_tokens_of_earlier_turns_counts_as_the_mean():
    """Tokens 0 to 3 are of an earlier turn: of the screen, token 3 is, and 4 and 6 are not."""
    frame, seen = [-1, -1, -1, 0, 0, -1, 0, -1], [9.0, 1.0, 3.0, 2.0, 4.0, 5.0, 6.0]
    fresh = [*[False] * 4, *[True] * 4]
    found, counted = default_scores(seen, frame, fresh=fresh), default_scores(seen, frame)
    # The mean attention to these is 5: factors 1 + 2/5 and 1 + 3/5.
    assert found[3] == pytest.approx(0.5 * 1.5)
    assert [found[4], found[6]] == pytest.approx([0.25 * 0.5 * 1.4, 0.2 * 1.6])
    for text in (0, 1, 2, 5):
        assert found[text] == counted[text], "text is scored as before"
    everything = default_scores(seen, frame, fresh=[*[False] * 7, True])
    assert [everything[i] for i in (3, 4, 6)] == pytest.approx([0.75, 0.25 * 0.5 * 1.5, 0.2 * 1.5])


def test_text_gets_its_share_whatever_scores_are_counted_in():
    """100 tokens of a screen and 50 of text, of which 30 are selected."""
    generator = torch.Generator().manual_seed(2)
    visual = torch.randperm(150, generator=generator)[None] < 100
    scores = torch.rand(1, 150, generator=generator)
    for scale in (1e-6, 1.0, 1e6):
        scaled = torch.where(visual, scores, scale * scores)
        for weight, text in ((0.5, 6), (1.0, 10), (2.0, 15), (4.0, 20), (1000.0, 29)):
            final = shared(scaled, visual, None, 30, weight)
            assert ((final >= 1) & ~visual).sum() == text
            assert (final >= 1).sum() == 30
            for kind in (visual, ~visual):
                assert torch.equal(final[kind].argsort(), scores[kind].argsort())


def test_what_one_kind_lacks_goes_to_the_other_and_ties_to_the_earlier():
    visual = torch.tensor([[True, True, True, True, False, False]])
    real = torch.tensor([[False, True, True, True, True, True]])
    scores = torch.tensor([[9.0, 2, 2, 5, 1, 1]])

    def chosen(selected, weight):
        final = shared(scores, visual, real, selected, weight)[0]
        return (final >= 1).nonzero()[:, 0].tolist()

    # 3 tokens of the screen and 2 of text: of 3, text gets 3 * 4 / 7.
    assert chosen(3, 2.0) == [1, 3, 4]
    assert chosen(3, 1000.0) == [3, 4, 5], "all of the text there is"
    assert chosen(4, 0.001) == [1, 2, 3, 4], "all of the screen there is"
    assert chosen(6, 1.0) == [1, 2, 3, 4, 5], "never padding"


def test_shares_are_of_the_session_whatever_is_left_of_it():
    """Of 60 tokens on screens and 20 of text there are left 10 and 18; one of those is window."""
    visual = torch.arange(27)[None] < 10
    scores = torch.rand(1, 27, generator=torch.Generator().manual_seed(5))

    def text(counts):
        final = shared(scores, visual, None, 12, 1.0, counts)
        return int(((final >= 1) & ~visual).sum())

    assert text(None) == 12 * 17 // 27
    assert text(torch.tensor([[20, 60]])) == 12 * 19 // 79
    assert text(torch.tensor([[40, 60]])) == 12 * 39 // 99
    assert text(torch.tensor([[18, 10]])) == text(None), "all of it is left"


def test_tokens_of_the_window_take_no_share():
    """Of 60 tokens on screens and 20 of text there are left 11 and 17; a screen's is window."""
    frame = torch.tensor([[0] * 10 + [-1] * 17 + [0]])
    scores = torch.rand(1, 27, generator=torch.Generator().manual_seed(5))
    final = share_out(scores, None, frame, torch.tensor([[20, 60]]), 1, 13, 1.0)
    assert int((final[:, 10:] >= 1).sum()) == 12 * 20 // 79


def test_a_row_of_padding_alone_shares_nothing_out():
    visual, real = torch.arange(6)[None] < 3, torch.zeros(1, 6, dtype=torch.bool)
    assert shared(torch.rand(1, 6), visual, real, 3, 2.0).tolist() == [[0.0] * 6]


@pytest.mark.parametrize("backend", ["aot_eager", slow("inductor", ci=True)])
def test_compiled_it_is_the_same_on_inputs_that_share_memory(backend):
    frame, row, column, current = layout_of(*MANY)
    long = torch.randn(1, 4, frame.shape[1], 8, generator=torch.Generator().manual_seed(3))
    attention = torch.rand(1, 2, frame.shape[1] - 2, generator=torch.Generator().manual_seed(4))

    def scored(key, attention, frame, row, column, current):
        spatial = STARKV.spatial_novelty(key, frame, row, column, torch.ones(1, 0))
        temporal = STARKV.temporal_novelty(key, frame, row, column, current, 0)
        unlike = STARKV.key_novelty(key, frame < 0)
        scores = STARKV.novelty_scores(
            attention, spatial, temporal, unlike, None, frame, 5, 0.5, 1.0, None
        )
        return STARKV.share_out(scores, None, frame, None, 2, 20, 2.0)

    inputs = (long[:, 1:3], attention, frame, row, column, current)
    compiled = torch.compile(scored, backend=backend, fullgraph=True)
    before = long.clone()
    assert torch.equal(compiled(*inputs).argsort(), scored(*inputs).argsort())
    assert torch.equal(long, before)


@pytest.mark.skipif(sys.platform != "linux", reason="C++ kernels are for Linux")
class TestCpp:
    """The C++ against the reference, on every layout above."""

    LAYOUTS = (MANY, (4,), ((3, 4),), ((4, 1), 1), ((2, 3), (5, 7), 3), (9, (6, 5), (6, 5), 1))

    @pytest.fixture(params=NARROWER, ids=lambda flag: flag or "native", autouse=True)
    def _vectors(self, request, monkeypatch):
        narrower(monkeypatch, "novelty", request.param)

    def inputs(self, parts, dtype=torch.float32, dim=24):
        frame, row, column, current = layout_of(*parts)
        generator = torch.Generator().manual_seed(0)
        key = torch.randn(2, 3, frame.shape[1], dim, generator=generator).to(dtype)
        return key, *(t.expand(2, -1) for t in (frame, row, column, current))

    def check(self, key, frame, row, column, current, before=0):
        earlier = torch.rand(2, before, generator=torch.Generator().manual_seed(1))
        for ours, theirs, arguments in (
            (cpp.spatial_novelty, spatial_novelty, (frame, row, column, earlier)),
            (cpp.temporal_novelty, temporal_novelty, (frame, row, column, current, before)),
            (cpp.key_novelty, key_novelty, (frame < 0,)),
            (cpp.key_novelty, key_novelty, (frame > 0,)),
        ):
            found, expected = ours(key, *arguments), theirs(key, *arguments)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("parts", LAYOUTS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_every_layout_and_dtype(self, parts, dtype):
        self.check(*self.inputs(parts, dtype))

    @pytest.mark.parametrize("before", [1, 5, 9])
    def test_what_earlier_prompts_left(self, before):
        self.check(*self.inputs(MANY), before)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, 0.0, 1e30])
    def test_keys_without_a_direction(self, bad):
        key, *layout = self.inputs(((3, 4), 2, (3, 4), 2))
        key[0, :, [1, 7, 12, 20]] = bad
        self.check(key, *layout)

    def test_keys_that_are_views(self):
        key, *layout = self.inputs(MANY)
        for view in (
            key[..., ::2],
            key.transpose(0, 1).contiguous().transpose(0, 1),
            key.mT.clone().mT,
        ):
            self.check(view, *layout)
