"""Intervals, against values known by other means."""

import numpy as np
import pytest
from starkv_lab.quality.cells import Cell
from starkv_lab.quality.design import COLUMNS, Design
from starkv_lab.quality.tables import Comparison
from starkv_lab.statistics import Bootstrap, wilson


def test_wilson_of_weighted_questions_holds_their_share():
    """Half of the questions weigh a quarter, and are all wrong."""
    design = Design.of(1)
    right = np.zeros((design.prompts, len(COLUMNS)), bool)
    weights = design.slices()["all"]
    right[weights == 1] = True
    cell = Cell("default", 0.2, {}, right, right, {}, 0.0, 1, 1, 0.0)
    row = next(row for row in Comparison(design, [cell]).rows() if row.part == "all")
    low, high = row.wilson
    assert low < row.accuracy.value < high
    assert row.accuracy.value > right.mean()


def test_wilson_against_published_values():
    """Newcombe (1998), table I: 81 of 263, and 0 of 20 by his method 3."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-4)
    with pytest.raises(ValueError, match="0 of 0"):
        wilson(0, 0)


def test_the_mean_is_weighted_and_its_interval_as_wide_as_theory_says():
    rng = np.random.default_rng(1)
    values = rng.normal(size=(400, 1))
    found = Bootstrap(400).mean(values, np.ones((400, 1)))
    half = 1.96 * values.std() / 400**0.5
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.value == pytest.approx(half, rel=0.15)
    assert found.value - found.low == pytest.approx(half, rel=0.15)
    only_first = np.zeros((400, 1))
    only_first[0] = 3
    alone = Bootstrap(400).mean(values, only_first)
    assert alone.value == pytest.approx(values[0, 0])


def test_questions_of_one_prompt_are_not_independent():
    """Six copies of a question tell no more than one; six independent ones do."""
    rng = np.random.default_rng(2)
    one = rng.integers(0, 2, (300, 1)).astype(float)
    copies = Bootstrap(300).mean(np.repeat(one, 6, 1), np.ones((300, 6)))
    single = Bootstrap(300).mean(one, np.ones((300, 1)))
    assert copies == pytest.approx(single)
    apart = rng.integers(0, 2, (300, 6)).astype(float)
    many = Bootstrap(300).mean(apart, np.ones((300, 6)))
    assert many.high - many.low < 0.6 * (single.high - single.low)


def test_pairing_narrows_a_difference():
    """Two variants that fail on the same hard prompts differ less surely when taken apart."""
    rng = np.random.default_rng(3)
    hard = rng.random((500, 1)) < 0.5
    first, second = 1.0 * hard, 1.0 * (hard & (rng.random((500, 1)) < 0.9))
    weights = np.ones((500, 1))
    paired = Bootstrap(500).mean(first - second, weights)
    alone = Bootstrap(500).mean(first, weights)
    assert paired.excludes_zero
    assert paired.high - paired.low < alone.high - alone.low


def test_no_question_at_all():
    with pytest.raises(ValueError, match="no question"):
        Bootstrap(3).mean(np.ones((3, 1)), np.zeros((3, 1)))
