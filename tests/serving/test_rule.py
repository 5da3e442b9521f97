"""How many tokens a prompt loses: the same for the scheduler and for workers."""

import random
from fractions import Fraction
from types import SimpleNamespace

import pytest

from starkv_compile import OptionError
from starkv_compile.policies import POLICIES
from starkv_compile.serving.rule import BUDGET, SERVED, Rule, budget_in, budget_of


def test_whole_blocks_leave_and_at_least_the_budget_stays():
    generator = random.Random(0)
    for _ in range(10_000):
        length, block = generator.randint(1, 20_000), generator.choice([1, 16, 32, 128])
        share = Fraction(generator.randint(1, 100), 100)
        rule = Rule.of({"budget": float(share)})
        skip = rule.skip(length, block)
        kept, wanted = length - skip, length * share.numerator // share.denominator
        assert skip % block == 0
        assert kept >= min(length, max(3, wanted))
        assert kept < max(3, wanted) + block or skip == 0
        assert skip or length - max(3, wanted) < block
        assert skip == Rule.loads(rule.dumps()).skip(length, block)
        assert skip == Rule.of({"budget": 1.0}).skip(length, block, share), "asked by a request"


def test_a_number_of_tokens():
    rule = Rule.of({"budget_tokens": 100})
    assert rule.skip(1000, 32) == 896
    assert rule.skip(120, 32) == 0
    assert rule.skip(1000, 32, Fraction(1)) == 0


def test_all_options_of_a_policy_travel():
    given = {"budget": 0.1, "policy": "snapkv", "pool": 7, "window": 16}
    rule = Rule.loads(Rule.of(given).dumps())
    assert (rule.config.policy.pool, rule.config.window) == (7, 16)


def params(budget):
    return SimpleNamespace(extra_args={BUDGET: budget})


def test_a_requests_budget():
    assert budget_of(None) is None
    assert budget_of(SimpleNamespace(extra_args=None)) is None
    assert budget_of(params(0.2)) == budget_of(params("20%")) == Fraction(1, 5)
    for wrong in (0, -1, 2, "20", "much", [0.2], "1e999999999", "1e-999999999", "9" * 10_000):
        with pytest.raises(OptionError, match="starkv_budget"):
            budget_of(params(wrong))


def test_a_key_that_is_misspelt():
    others = {"session_id": "one", 7: 7}
    assert budget_in(others) is None
    assert budget_in({**others, BUDGET: 1.0}) == 1
    for key in ("starkv_buget", "starkv", "starkv-budget"):
        with pytest.raises(OptionError, match=f"{key}: no such option.*starkv_budget"):
            budget_in({**others, BUDGET: 1.0, key: 0.5})


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_works_or_is_refused_by_name(name):
    kind = POLICIES[name]
    if kind in SERVED:
        assert Rule.of({"policy": name}).config.policy.name == name
    else:
        with pytest.raises(OptionError, match=f"policy='{name}' does not work in vLLM"):
            Rule.of({"policy": name})


def test_stops_inside_of_a_prompt():
    rule = Rule.of({"budget": 0.2, "prefill_chunk_size": 100})
    assert list(rule.stops(90)) == [90]
    assert list(rule.stops(107)) == [107], "the window of 8 tokens would begin before a stop at 100"
    assert list(rule.stops(350)) == [100, 200, 300, 350]
    assert [rule.gone(computed, 350, 16) for computed in (0, 99, 100, 250, 350, 400)] == [
        *(0, 0, 80, 160, 272, 272)
    ]
    assert Rule.loads(rule.dumps()) == rule
    for wrong in (7, 0, 100.0, True, "100"):
        with pytest.raises(OptionError, match=r"prefill_chunk_size=.*at least the window"):
            Rule.of({"prefill_chunk_size": wrong})


def test_a_walk_through_prompts_with_stops():
    """What is gone only grows, windows are whole, and the most blocks are met exactly."""
    generator = random.Random(1)
    for _ in range(2000):
        length, block = generator.randint(1, 3000), generator.choice([1, 16, 32])
        share = Fraction(generator.randint(1, 100), 100)
        delay = generator.randint(0, 1)
        rule = Rule.of({"prefill_chunk_size": generator.randint(8, 1000)})
        computed, freed, held, shared = 0, [0] * delay, 0, None
        while computed < length:
            gone = rule.gone(computed, length, block, share)
            stop = rule.next_stop(computed, length)
            left = rule.skip(stop, block, share)
            assert computed < stop <= length
            assert left >= gone
            assert stop - computed >= min(8, length), "a window does not begin before a stop"
            freed.append(gone // block)
            held = max(held, -(-stop // block) - freed.pop(0))
            if left and shared is None:
                shared = left
            computed = stop
        assert held == rule.most_blocks(length, length, block, share, delay)
        assert shared == rule.shared(length, block, share)
        outputs = length + generator.randint(1, 200)
        assert rule.most_blocks(length, outputs, block, share, delay) >= held
