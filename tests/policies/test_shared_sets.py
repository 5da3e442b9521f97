"""Policies that keep one set a layer, against sets worked out by hand."""

import math

import pytest
import torch

from starkv_compile.kernels.ops import STARKV
from starkv_compile.policies import POLICIES
from tests.support.policy_cases import attended, frames, kept

WEIGHTS = [9.0, 1, 1, 8, 1, 1, 7, 1, 1, 1]


def test_head_mean_snapkv_averages_before_it_cuts():
    one, other = [9.0, 1, 1, 1, 6, 1, 1], [1.0, 9, 1, 1, 6, 1, 1]
    # Of 20: 10, 10, 2, 2, 12, 2. Token 4 is no head's first and everybody's best.
    assert kept("snapkv_mean", *attended(one, other), 2) == [4, 6]
    assert kept("snapkv_mean", *attended(one, other), 4) == [0, 1, 4, 6]


def test_pooling_lifts_the_neighbours():
    weights = [1.0, 2, 1, 9, 1, 4, 1, 1, 1]
    assert kept("snapkv_mean", *attended(weights), 3) == [3, 5, 8]
    # Sums of three: 3 4 12 11 14 6 6 2, as zeros stand beyond the ends.
    assert kept("snapkv_mean", *attended(weights), 3, pool=3) == [2, 4, 8]


def test_tova_asks_the_last_query_alone():
    query, key = attended([1.0, 5, 1, 1, 1, 1])
    query[0, 0, -2] = 0
    query[0, 0, -2, 1], key[0, 0, 2, 1] = 1.0, 50.0  # all that the query before it sees
    assert kept("snapkv_mean", query, key, 4, window=2) == [1, 2, 4, 5]
    assert kept("snapkv_mean", query, key, 3, window=1) == [0, 1, 5], "of equals the first"
    assert kept("tova", query, key, 3, window=2) == [0, 1, 5]


def test_tova_takes_the_mean_over_heads():
    one, other = [9.0, 1, 6, 1], [1.0, 9, 6, 1]
    assert kept("tova", *attended(one, other), 2) == [2, 3]


@pytest.mark.parametrize(
    ("capacity", "expected"),
    [(3, [0, 1, 9]), (5, [0, 1, 2, 3, 9]), (7, [0, 1, 2, 3, 7, 8, 9]), (10, list(range(10)))],
)
def test_streaming_llm_keeps_four_sinks_and_the_newest(capacity, expected):
    assert kept("streaming_llm", *attended(WEIGHTS), capacity) == expected


def test_sinks_are_the_first_tokens_behind_the_padding():
    real = torch.tensor([[False, False, *[True] * 8]])
    assert kept("streaming_llm", *attended(WEIGHTS), 6, real=real) == [2, 3, 4, 5, 8, 9]


def test_random_is_the_same_every_time_and_another_in_each_layer():
    sets = [kept("random", *attended([1.0] * 60), 20, layer=layer) for layer in (0, 0, 1, 2)]
    assert sets[0] == sets[1]
    assert len({*map(tuple, sets)}) == 3
    assert all(s[-1] == 59 for s in sets), "the window stays"


def test_random_draws_uniformly():
    query, key = attended([1.0] * 101)
    drawn = torch.zeros(101)
    for layer in range(400):
        drawn[kept("random", query, key, 26, layer=layer)] += 1
    # 25 of 100, 400 times: 100 each, standard deviation 8.7.
    assert drawn[:100].min() > 100 - 5 * 8.7
    assert drawn[:100].max() < 100 + 5 * 8.7


def test_random_holds_on_to_what_it_drew():
    """A second turn's set is the one that would have been drawn from all tokens at once."""
    every = torch.arange(90)[None]
    first = kept("random", *attended([1.0] * 50), 26, index=every[:, :50])[:-1]
    index = torch.tensor([[*first, *range(50, 90)]])
    again = kept("random", *attended([1.0] * 65), 22, index=index)
    places = [int(index[0, i]) for i in again]
    assert places == kept("random", *attended([1.0] * 90), 22, index=every)


def test_age_decay_halves_a_frame_that_is_one_older():
    layout = frames(9, (1, 4), (4, 7))
    policy = ("age_decay", *attended([1.0, 6, 1, 1, 4, 1, 1, 2, 1]), 2, layout)
    assert kept(*policy, frame_decay=0.0) == [1, 8]
    assert kept(*policy, frame_decay=math.log(2)) == [4, 8]
    assert kept(*policy, frame_decay=100.0, frame_floor=0.75) == [1, 8], "4.5 against 4"


def test_current_frame_and_text_come_first_and_older_frames_if_there_is_room():
    layout = frames(9, (1, 4), (4, 7))
    policy = ("current_frame", *attended([1.0, 9, 8, 7, 2, 3, 4, 5, 1]))
    assert kept(*policy, 4, layout) == [5, 6, 7, 8]
    assert kept(*policy, 6, layout) == [0, 4, 5, 6, 7, 8]
    assert kept(*policy, 7, layout) == [0, 1, 4, 5, 6, 7, 8]


def test_the_boost_is_for_the_current_frame_and_its_larger_norms():
    layout = frames(9, (1, 4), (4, 7))
    policy = ("snapkv_boost", *attended([4.0, 3, 3, 3, 1, 1, 1, 4, 1]))
    hidden = torch.ones(1, 9, 3)
    hidden[0, 5] = 9.0
    assert kept(*policy, 3, layout) == [0, 7, 8], "nothing to boost by"
    assert kept(*policy, 3, layout, hidden=hidden, boost=0.0) == [0, 7, 8]
    assert kept(*policy, 2, layout, hidden=hidden, boost=2.0) == [5, 8]
    # Of a mass of 2 the other two of the frame get more than the 4 / 21 of any other token.
    assert kept(*policy, 4, layout, hidden=hidden, boost=2.0) == [4, 5, 6, 8]


def test_novelty_prefers_the_key_that_is_unlike_the_others():
    query, key = torch.zeros(1, 1, 5, 4), torch.zeros(1, 1, 5, 4)  # all are attended to alike
    key[0, 0, :, 1] = 1.0
    key[0, 0, 2] = torch.tensor([0.0, 0, 1, 0])
    assert kept("key_novelty", query, key, 2) == [2, 4]
    assert kept("key_novelty", query, key, 2, novelty_weight=0.0) == [0, 4]


def test_novelty_against_attention_in_numbers():
    query, key = torch.zeros(1, 1, 6, 4), torch.zeros(1, 1, 6, 4)
    query[..., 0] = 1.0
    key[0, 0, :, 1] = 1e4  # so long that the axis the queries look along hardly turns a key
    key[0, 0, 2] = torch.tensor([0.0, 0, 1e4, 0])
    key[0, 0, 0, 0] = math.log(5)
    # Attention of the five scored: 5 1 1 1 1 of 9. Cosine with the mean: 5/6, and 1/6 of token 2;
    # so novelty: 1 1 5 1 1 of 9.
    assert kept("key_novelty", query, key, 2, novelty_weight=0.9) == [0, 5]
    assert kept("key_novelty", query, key, 2, novelty_weight=1.1) == [2, 5]


@pytest.mark.parametrize("capacity", [9, 20, 33])
def test_text_alone_is_kept_as_by_key_novelty_whatever_screens_there_are(capacity):
    generator = torch.Generator().manual_seed(7)
    query, key = (torch.randn(1, n, 60, 8, generator=generator) for n in (4, 2))
    options = {"window": 4, "pool": 1}  # pooled they differ at the ends of the text
    assert kept("screen_novelty", query, key, capacity, **options) == kept(
        "key_novelty", query, key, capacity, **options
    )
    # A screen before the text takes its quota, and does not change what of the text comes first.
    layout = frames(60, (0, 20))
    order = [
        [t for t in kept("screen_novelty", query, key, c, layout, **options) if t >= 20]
        for c in (capacity, capacity + 12)
    ]
    assert set(order[0]) <= set(order[1])


@pytest.mark.parametrize("screen", ["varied", "blank"])
def test_the_only_text_before_the_window_stays(screen):
    """Of 5 tokens, text gets 5 * 2 * 1 / (2 * 1 + 6). It is its own mean, up to rounding."""
    layout = frames(8, (1, 8))
    for seed in range(50):
        key = torch.randn(1, 2, 8, 16, generator=torch.Generator().manual_seed(seed))
        if screen == "blank":
            key[:, :, 1:] = key[:, :, 1:2]
        places = kept("screen_novelty", torch.zeros_like(key), key, 6, layout)
        assert len(set(places)) == 6
        assert {0, 7} < set(places)


def test_text_is_new_among_text_alone():
    """Token 8 is unlike the other text and like the whole screen. Text gets 1 of 2 tokens."""
    key = torch.zeros(1, 1, 10, 4)
    key[..., 0] = 1.0
    key[0, 0, [0, 7, 9]] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    places = kept("screen_novelty", torch.zeros_like(key), key, 3, frames(10, (1, 7)))
    assert places == [1, 8, 9]


def test_a_key_that_is_not_a_number_costs_novelty_its_own_place_only():
    query, key = attended([1.0, 5, 1, 3, 1])
    key[0, 0, 2] = float("nan")
    assert kept("key_novelty", query, key, 3, novelty_weight=0.0) == [1, 3, 4]
    assert 2 not in kept("key_novelty", query, key, 4)


@pytest.mark.parametrize("name", POLICIES)
def test_padding_is_never_preferred(name):
    query, key = attended([50.0, 50, *[1.0] * 10], [50.0, 50, *[1.0] * 10])
    real = torch.tensor([[False, False, *[True] * 10]])
    mask = real[:, None, None].expand(1, 1, 12, 12)
    layout = frames(12, (3, 5), (6, 8))
    hidden = torch.randn(1, 12, 3, generator=torch.Generator().manual_seed(0))
    sets = kept(name, query, key, 8, layout, real=real, mask=mask, hidden=hidden)
    for one in sets if isinstance(sets[0], list) else [sets]:
        assert not {0, 1} & set(one)
        assert len(one) == 8


def axes_off(**options):
    """STaR-KV without what the policy in question does not have."""
    return {"boost": 0.0, "mi_weight": 0.0, "frame_decay": 0.0, "entropy": "off", **options}


@pytest.mark.parametrize(
    ("name", "options", "fixed"),
    [
        ("snapkv_mean", {}, {}),
        ("snapkv_boost", {"boost": 2.0}, {}),
        ("age_decay", {"frame_decay": 0.3}, {"stability_floor": 1.0}),
    ],
)
def test_starkv_without_the_other_axes_keeps_the_same(name, options, fixed):
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(1, 4, 80, 8, generator=generator)
    key = torch.randn(1, 2, 80, 8, generator=generator)
    hidden = torch.randn(1, 80, 5, generator=generator)
    layout = frames(80, (4, 30), (32, 58), columns=5)
    common = {"hidden": hidden, "pool": 5, "window": 8}
    for capacity in (12, 30, 60):
        axes = axes_off(**options, **fixed)
        expected = kept("starkv", query, key, capacity, layout, **common, **axes)
        assert kept(name, query, key, capacity, layout, **common, **options) == expected


def test_expected_attention_weighs_mean_spread_and_value():
    query, key = torch.zeros(1, 1, 9, 8), torch.zeros(1, 1, 9, 8)
    query[0, 0, 4:, 0] = 1.0  # mean 1 along axis 0
    query[0, 0, 4::2, 1], query[0, 0, 5::2, 1] = 2.0, -3.0  # mean 0, variance 6 along axis 1
    query[0, 0, :4, 2] = 100.0  # the first four do not count
    value = torch.ones_like(key)
    policy = ("expected_attention", query, key)
    key[0, 0, 5, 0] = 2.0  # expected logit 2
    key[0, 0, 6, 1] = 0.8  # 0.5 * 6 * 0.64 = 1.92
    key[0, 0, 7, 2] = 9.0  # 0
    assert kept(*policy, 6, value=value) == [0, 1, 2, 3, 5, 8]
    key[0, 0, 6, 1] = 0.85  # 2.1675
    assert kept(*policy, 6, value=value) == [0, 1, 2, 3, 6, 8]
    assert kept(*policy, 7, value=value) == [0, 1, 2, 3, 5, 6, 8]
    value[0, 0, 5] = 2.0
    assert kept(*policy, 6, value=value) == [0, 1, 2, 3, 5, 8]


def unlike(length, *odd, dim=4):
    """Keys all alike but for those at `odd`, each along an axis of its own. Attention is even."""
    key = torch.zeros(1, 1, length, dim)
    key[..., 0] = 1.0
    for axis, place in enumerate(odd, 1):
        key[0, 0, place] = torch.eye(dim)[axis]
    return torch.zeros_like(key), key


def test_st_lite_keeps_what_is_unlike_its_neighbours():
    """A frame of 3 x 3 at 1 to 9, one cell of it another: its middle, or its corner."""
    layout = frames(12, (1, 10), columns=3)
    # All 8 neighbours of the middle have one unlike neighbour, of 3 or 5. Text counts 1.
    assert kept("st_lite", *unlike(12, 5), 4, layout) == [0, 5, 10, 11]
    assert kept("st_lite", *unlike(12, 5), 5, layout) == [0, 1, 5, 10, 11], "a corner: 1 of 3"
    # Of a corner's neighbours two are on an edge (1 of 5), the middle has 1 of 8.
    assert kept("st_lite", *unlike(12, 1), 6, layout) == [0, 1, 2, 4, 10, 11]


def test_st_lite_takes_no_cell_of_the_row_above_for_a_neighbour():
    """Two columns: the right end of a row and the left end of the next are not side by side."""
    layout = frames(8, (1, 7), columns=2)
    # Token 2 is unlike: of 1 and 4, ends of its column and row, 1 of 3 neighbours; of 3, 1 of 5.
    assert kept("st_lite", *unlike(8, 2), 4, layout) == [0, 1, 2, 7]


def test_st_lite_drops_what_the_current_frame_repeats():
    """Two frames of 2 x 2 and nothing else; the same odd token stands at 1 and, now, at 5."""
    layout = frames(8, (0, 4), (4, 8), columns=2)
    query, key = unlike(8, 1)
    key[0, 0, 5] = key[0, 0, 1]
    key[0, 0, 2] = torch.tensor([0.5, 0, 0, 0.75**0.5])  # cosine 0.5 with all that is now
    frame, _, _, current = layout
    drops = {c: STARKV.repeats_current(key[0], frame, current, c)[0] for c in (1, 2, 3, 4)}
    dropped = {c: flags.nonzero().flatten().tolist() for c, flags in drops.items()}
    assert dropped == {1: [0, 1, 3], 2: [1, 3], 3: [3], 4: []}
    # Tokens 1 and 5 are equally unlike their neighbours; a tie would go to the first.
    assert kept("st_lite", query, key, 2, layout) == [5, 7]


def test_without_a_current_frame_nothing_repeats_it():
    frame, row, column, _ = frames(10, (1, 3), (4, 6))
    later = (frame, row, column, torch.full((1, 2), -1))
    key = unlike(10)[1]
    assert STARKV.repeats_current(key[0], frame, frames(10, (1, 3), (4, 6))[3], 1).any()
    assert not STARKV.repeats_current(key[0], frame, later[3], 1).any()
    assert not STARKV.repeated_tokens(key, frame[:, None], later[3], 5).any()
