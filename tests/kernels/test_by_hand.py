"""Parts of the scores on numbers worked out by hand, and on the rows and heads that have none."""

import math

import pytest
import torch

from starkv_compile.kernels.reference.attention import window_attention
from starkv_compile.kernels.reference.entropy import (
    reshape_global,
    reshape_subspaces,
    temperature,
)
from starkv_compile.kernels.reference.spatial import (
    GRID_BINS,
    VALUE_BINS,
    _screen_bin,
    boost,
    information,
    mi_weights,
    mutual_information,
    rank_histogram,
    square_grid,
)
from starkv_compile.kernels.reference.temporal import age, discount, update_pattern


@pytest.mark.parametrize(
    ("tokens", "rows"),
    [
        (1, [[0]]),
        (2, [[0, 1]]),  # the root of 2 is nearer to 1
        (3, [[0, 1], [2]]),
        (5, [[0, 1, 2], [3, 4]]),
        (7, [[0, 1, 2], [3, 4, 5], [6]]),  # the root of 7 is nearer to 3
        (9, [[0, 1, 2], [3, 4, 5], [6, 7, 8]]),
    ],
)
def test_rows_and_columns_of_the_square_grid(tokens, rows):
    valid = torch.arange(10)[None] < tokens
    row, column = square_grid(valid)
    for number, places in enumerate(rows):
        for offset, place in enumerate(places):
            assert (int(row[0, place]), int(column[0, place])) == (number, offset)


def test_each_row_of_a_batch_has_a_grid_of_its_own():
    row, _ = square_grid(torch.arange(6)[None] < torch.tensor([[2], [6]]))
    assert row[0, :2].tolist() == [0, 0]
    assert row[1].tolist() == [0, 0, 0, 1, 1, 1]


def test_the_prior_is_a_softmax_of_scaled_information():
    """2, 3 and 6 become 0, 1/4 and 1, whatever they are counted in."""
    parts = [math.exp(x / 0.5) for x in (0.0, 0.25, 1.0)]
    expected = torch.tensor([[part / sum(parts) for part in parts]])
    mi = torch.tensor([[2.0, 3.0, 6.0]])
    for scale, shift in ((1.0, 0.0), (1e-4, 0.0), (1e3, 5.0)):
        torch.testing.assert_close(mi_weights(scale * mi + shift, 0.5), expected)
    assert mi_weights(torch.full((1, 4), 3.0), 0.5).tolist() == [[0.25] * 4]


def attention_of(logits):
    """`window_attention` of one head whose last query has these logits; W is 1."""
    key = torch.tensor(logits)[None, None, :, None]
    return window_attention(torch.ones_like(key), key, None, 1.0, 1, 3)[0, 0].tolist()


def test_the_largest_logit_is_that_of_all_keys():
    """Only the largest keeps every power finite, be it before the window or inside it."""
    assert attention_of([0.0, 2.0, 100.0]) == pytest.approx([0.0, 0.0])
    assert attention_of([8.0, 10.0, 100.0]) == pytest.approx(
        [math.exp(-92), math.exp(-90)], rel=1e-3, abs=0
    )
    assert attention_of([0.0, 100.0, 8.0]) == pytest.approx([0.0, 1.0])
    assert attention_of([98.0, 100.0, 8.0]) == pytest.approx(
        [1 / (1 + math.e**2), 1 / (1 + math.e**-2)]
    )


def test_a_head_without_mass_stays_without_and_changes_no_other():
    scores = torch.tensor([[[0.0, 0.0, 0.0], [1.0, 2.0, 5.0]]])
    tokens = torch.tensor([3])
    shaped = reshape_subspaces(scores, tokens, 0.75, 1.25)
    assert shaped[0, 0].tolist() == [0.0, 0.0, 0.0]
    assert torch.equal(shaped[:, 1:], reshape_subspaces(scores[:, 1:], tokens, 0.75, 1.25))
    assert float(shaped[0, 1].sum()) == pytest.approx(8.0)
    assert temperature(scores, tokens, 0.75, 1.25)[0, 0].tolist() == [0.75]


def test_temperature_follows_the_entropy():
    """Three quarters and a quarter: 0.811 bits of 1; even scores have all, a single one none."""
    two = torch.tensor([2])
    entropy = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    for scores, part in (([3.0, 1.0], entropy), ([2.0, 2.0], 1.0), ([4.0, 0.0], 0.0)):
        found = float(temperature(torch.tensor([scores]), two, 0.5, 2.5))
        assert found == pytest.approx(0.5 + 2.0 * part, abs=1e-4)
    shaped = reshape_global(torch.tensor([[-1.0, 4.0]]), torch.tensor([[2.0]]))
    assert shaped.tolist() == [[0.0, 2.0]]


def test_each_row_has_the_temperature_of_its_own_number_of_tokens():
    scores = torch.rand(2, 3, 6, generator=torch.Generator().manual_seed(0))
    scores[0, :, 4:] = 0.0
    tokens = torch.tensor([4, 6])
    found = temperature(scores, tokens, 0.75, 1.25)
    for row in range(2):
        alone = temperature(scores[row : row + 1], tokens[row : row + 1], 0.75, 1.25)
        torch.testing.assert_close(found[row : row + 1], alone)


def test_scores_become_powers_of_their_share_and_keep_their_sum():
    """At a fixed temperature of 1/2 shares are squared: 1/4 and 3/4 become 1 and 9 of 10."""
    shaped = reshape_subspaces(torch.tensor([[[2.0, 6.0]]]), torch.tensor([2]), 0.5, 0.5)
    assert shaped[0, 0].tolist() == pytest.approx([0.8, 7.2])


def test_a_group_without_mass_on_the_frame_has_no_information():
    """Equal scores would rank by place, and ranks by place tell the place."""
    place = torch.arange(16)
    scores = torch.stack([torch.zeros(16), torch.arange(16.0)])[None]
    found = mutual_information(
        scores, (place // 4)[None], (place % 4)[None], torch.ones(1, 16, dtype=torch.bool)
    )
    assert float(found[0, 0]) == 0.0
    assert float(found[0, 1]) == pytest.approx(math.log(16), abs=1e-5)


def test_the_average_pattern_and_its_stability():
    valid = torch.tensor([[True, True, False]])
    scores = torch.tensor([[[3.0, 1.0, 9.0], [0.0, 0.0, 9.0]]])
    before = torch.tensor([[[0.25, 0.75, 0.0], [0.5, 0.5, 0.0]]])
    pattern, count, stable = update_pattern(scores, valid, before, torch.tensor([2]), 0.9)
    # The first group's shares are 3/4 and 1/4; the second has no mass, so nothing of it is new.
    torch.testing.assert_close(pattern[0, 0], torch.tensor([0.3, 0.7, 0.0]))
    torch.testing.assert_close(pattern[0, 1], torch.tensor([0.45, 0.45, 0.0]))
    assert count.tolist() == [2]
    cosine = (0.75 * 0.3 + 0.25 * 0.7) / math.hypot(0.75, 0.25) / math.hypot(0.3, 0.7)
    assert stable[0].tolist() == pytest.approx([cosine, 0.0])
    fresh, count, stable = update_pattern(scores, valid, before, torch.tensor([3]), 0.9)
    torch.testing.assert_close(fresh[0, 0], torch.tensor([0.75, 0.25, 0.0]))
    assert (count.tolist(), float(stable[0, 0])) == ([2], pytest.approx(1.0))
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    same, count, stable = update_pattern(scores, nothing, before, torch.tensor([7]), 0.9)
    assert torch.equal(same, before)
    assert (count.tolist(), stable.tolist()) == ([7], [[1.0, 1.0]])


def test_age_and_discount():
    assert age(torch.tensor([[-1, 0, 0, 1, 2]])).tolist() == [[0, 2, 2, 1, 0]]
    assert age(torch.tensor([[-1, -1]])).tolist() == [[0, 0]]
    ages = torch.tensor([[0.0, 1.0, 2.0]])
    found = discount(ages, torch.tensor([[1.0, 1.0, 0.5]]), math.log(2), 0.2)
    assert found[0].tolist() == pytest.approx([1.0, 0.6, 0.6])


def test_the_boost_is_a_softmax_of_standardised_norms():
    """Norms 1, 2 and 3 have mean 2 and, of a sample, deviation 1."""
    hidden = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [50.0, 0.0], [torch.nan, 1.0]]])
    valid = torch.tensor([[True, True, True, False, True]])
    parts = [math.exp(x / 2.0) for x in (-1.0, 0.0, 1.0, 0.0)]
    expected = [part / sum(parts) for part in parts]
    found = boost(hidden, valid, 2.0)[0].tolist()
    assert found == pytest.approx([*expected[:3], 0.0, expected[3]])
    assert boost(hidden, torch.zeros_like(valid), 2.0).tolist() == [[0.0] * 5]
    assert boost(hidden, torch.tensor([[False, True, False, False, False]]), 2.0)[0, 1] == 1.0


def boosted(norms, temperature=1.0):
    norms = torch.tensor([norms])
    return boost(norms[..., None], torch.ones_like(norms, dtype=torch.bool), temperature)[0]


def test_the_boost_of_two_tokens_of_one_finite_token_and_of_a_low_temperature():
    apart = math.exp(1 / math.sqrt(2))  # 1 and 3: one less and one more than the mean, over sqrt(2)
    expected = [1 / apart / (apart + 1 / apart), apart / (apart + 1 / apart)]
    assert boosted([1.0, 3.0]).tolist() == pytest.approx(expected)
    assert boosted([3.0, torch.nan]).tolist() == [0.5, 0.5], "it counts as the mean"
    assert boosted([1.0, 3.0], 0.001).tolist() == [0.0, 1.0]
    assert boosted([2.0, 2.0, 2.0, 2.0]).tolist() == [0.25] * 4


@pytest.mark.parametrize(
    ("cells", "bins"),
    [
        (1, [6]),  # the middle of the only cell is the middle of the screen
        (5, [1, 3, 6, 8, 10]),
        (12, list(range(12))),
        (24, [i // 2 for i in range(24)]),
    ],
)
def test_the_bin_of_a_cell_is_that_of_its_middle(cells, bins):
    """Places beyond the valid ones may hold anything."""
    index = torch.tensor([[*range(cells), 99, -99]])
    valid = torch.tensor([[True] * cells + [False] * 2])
    found = _screen_bin(index, valid)[0]
    assert found[:cells].tolist() == bins
    assert 0 <= int(found.min()) <= int(found.max()) < GRID_BINS


def test_padding_of_a_frame_counts_nowhere():
    scores = torch.rand(1, 2, 40, generator=torch.Generator().manual_seed(0))
    place = torch.arange(40)[None] % (GRID_BINS * GRID_BINS)
    valid = torch.arange(40)[None] < 3
    found = rank_histogram(scores, place, valid)
    assert torch.equal(found, rank_histogram(scores[..., :3], place[:, :3], valid[:, :3]))
    ranks = found.sum(-1)[0, 0].nonzero()[:, 0].tolist()
    assert ranks == [0, VALUE_BINS // 3, 2 * VALUE_BINS // 3]


def test_information_is_zero_where_places_tell_nothing():
    one = torch.ones(1, 1, dtype=torch.bool)
    nowhere = torch.zeros(1, 1, dtype=torch.long)
    assert mutual_information(torch.ones(1, 1, 1), nowhere, nowhere, one).tolist() == [[0.0]]
    for rows, columns in ((3, 7), (16, 144), (5, 9)):
        joint = torch.zeros(1, 1, VALUE_BINS, GRID_BINS * GRID_BINS, dtype=torch.int32)
        joint[..., :rows, :columns] = 1
        found = float(information(joint, torch.tensor([rows * columns])))
        assert 0.0 <= found < 1e-9, "never below zero by rounding"
