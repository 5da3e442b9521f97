"""What is done in a step, and what rows of compacted requests see."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
import torch

from starkv_compile import StarKVError
from starkv_compile.serving.current import Batch
from starkv_compile.serving.metadata import outputs_again, rows_of, shifted
from starkv_compile.serving.plan import Plan, Row, plan_step
from starkv_compile.serving.rule import Rule

WINDOW = 8


def row(computed, scheduled, *, prompt=100, skip=64, first=10, number=0):
    """A row of a prompt that is compacted at its end."""
    gone = skip if computed >= prompt else 0
    return Row("a", number, first, computed, scheduled, prompt, gone, prompt, skip)


def test_a_prompt_in_one_step():
    plan = plan_step([row(0, 100)], WINDOW)
    assert (len(plan.compactions), plan.savings, plan.shifts) == (1, [], [0])
    assert plan.compactions[0].end == 110
    assert plan.repeated == []


def test_decoding_sees_the_compacted_prompt():
    assert plan_step([row(100, 1), row(120, 3)], WINDOW) == Plan(shifts=[64, 64])


def test_what_keeps_everything_is_left_alone():
    assert plan_step([row(0, 100, skip=0), row(100, 1, skip=0)], WINDOW) == Plan(shifts=[0, 0])


def test_chunks_whose_queries_are_remembered():
    """The window is 92 to 99."""
    assert plan_step([row(0, 92)], WINDOW).savings == []
    (saving,) = plan_step([row(0, 95)], WINDOW).savings
    assert (saving.start, saving.stop, saving.is_first) == (10 + 92, 10 + 95, True)
    (saving,) = plan_step([row(95, 2)], WINDOW).savings
    assert (saving.start, saving.stop, saving.is_first) == (10, 12, False)
    last = plan_step([row(97, 3)], WINDOW)
    assert last.savings == []
    assert len(last.compactions) == 1


def test_a_window_is_no_larger_than_what_stays():
    """A prefix hit may end at 96, and 97 to 99 are computed. All of the window must be there."""
    small = row(96, 2, skip=96)
    assert small.window(WINDOW) == 2
    assert plan_step([row(0, 97, skip=96)], WINDOW).savings == []
    assert plan_step([small], WINDOW).savings == []
    (saving,) = plan_step([row(96, 3, skip=96)], WINDOW).savings
    assert (saving.start, saving.stop, saving.is_first) == (12, 13, True)


def test_any_chunks_give_every_query_of_the_window_once():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        computed, seen = 0, []
        while computed < 100:
            scheduled = min(int(torch.randint(1, 40, (1,), generator=generator)), 100 - computed)
            one = row(computed, scheduled)
            plan = plan_step([one], WINDOW)
            at = computed - one.first
            for saving in plan.savings:
                assert saving.is_first == (not seen)
                seen += range(saving.start + at, saving.stop + at)
            if plan.compactions:
                seen += range(max(92, computed), 100)
            computed += scheduled
        assert seen == list(range(92, 100))


RULE = Rule.of({"budget": 0.2, "prefill_chunk_size": 50})
"""Prompts of 200 tokens have stops at 50, 100, 150 and 200, where 32, 80, 112 and 160 are gone."""

BLOCK = 16


def batch(computed, prompt=200, budget=None):
    return Batch(
        requests=["a"],
        prompts=[prompt],
        computed=[computed],
        budget=lambda row: budget,
        features=lambda row: None,
        is_alive=lambda request: True,
        groups=(),
        has_grids=True,
    )


def one(computed, scheduled, **of):
    return rows_of(batch(computed, **of), RULE, [0, scheduled], BLOCK)[0]


def test_a_prompt_that_is_compacted_while_it_is_read():
    found = [(r.gone, r.stop, r.left) for r in (one(at, 50) for at in (0, 50, 100, 150, 200))]
    assert found == [(0, 50, 32), (32, 100, 80), (80, 150, 112), (112, 200, 160), (160, 200, 160)]
    assert len(plan_step([one(50, 50)], WINDOW).compactions) == 1
    assert plan_step([one(50, 50)], WINDOW).shifts == [32]
    assert plan_step([one(50, 20)], WINDOW) == Plan(shifts=[32]), "on the way to a stop"
    assert plan_step([one(200, 1)], WINDOW) == Plan(shifts=[160])
    assert plan_step([one(150, 55)], WINDOW).repeated, "outputs of a preempted request"
    assert plan_step([one(150, 49)], WINDOW).ended == []
    assert plan_step([one(150, 50)], WINDOW).ended == ["a"]


def test_queries_before_a_stop_are_remembered_too():
    (saving,) = plan_step([one(50, 47)], WINDOW).savings
    assert (saving.start, saving.stop, saving.is_first) == (42, 47, True)
    assert plan_step([one(50, 47)], WINDOW).compactions == []


def test_a_step_that_goes_on_after_a_stop_is_an_error():
    with pytest.raises(StarKVError, match="goes on after 100 tokens"):
        plan_step([one(60, 70)], WINDOW)
    kept = plan_step([one(60, 70, budget=Fraction(1))], WINDOW)
    assert kept == Plan(shifts=[0]), "a request that keeps everything has nothing to stop for"


def test_outputs_of_a_preempted_request_come_with_its_prompt():
    plan = plan_step([row(0, 105), row(64, 36)], WINDOW)
    assert len(plan.compactions) == 2
    (again,) = plan.repeated
    assert (again.end, again.total - again.prompt) == (110, 5)


@dataclass
class Common:
    """The fields of vLLM's metadata that are changed."""

    query_start_loc: Any
    query_start_loc_cpu: Any
    seq_lens: Any
    block_table_tensor: Any
    slot_mapping: Any
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    seq_lens_cpu_upper_bound: Any = None
    positions: Any = None
    is_prefilling: Any = None
    req_idx: Any = None
    _num_computed_tokens_cache: Any = 1
    _token_to_req_indices_cache: Any = 1


def common():
    starts = torch.tensor([0, 1, 106], dtype=torch.int32)
    return Common(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor([131, 105], dtype=torch.int32),
        seq_lens_cpu_upper_bound=torch.tensor([131, 105], dtype=torch.int32),
        block_table_tensor=torch.arange(10, dtype=torch.int32).view(2, 5) + 1,
        slot_mapping=torch.arange(106),
        positions=torch.arange(106),
        num_reqs=2,
        num_actual_tokens=106,
        max_query_len=105,
        max_seq_len=131,
    )


def test_shifted_rows_begin_at_the_first_block_that_is_left():
    found = shifted(common(), [64, 0], 32, 105)
    assert found.block_table_tensor.tolist()[0][:3] == [3, 4, 5]
    assert found.block_table_tensor.tolist()[1] == [6, 7, 8, 9, 10]
    assert found.seq_lens.tolist() == found.seq_lens_cpu_upper_bound.tolist() == [67, 105]
    assert torch.equal(found.slot_mapping, torch.arange(106)), "slots stay"
    assert found.max_seq_len == 105
    assert found._num_computed_tokens_cache is None


def test_the_second_pass_is_over_outputs_alone():
    again = Row("b", 1, 1, computed=0, scheduled=105, prompt=100, gone=0, stop=100, left=64)
    part, places = outputs_again(common(), [again], 32)
    assert places.tolist() == list(range(101, 106))
    assert part.query_start_loc.tolist() == [0, 5]
    assert part.seq_lens.tolist() == [41]
    assert part.block_table_tensor.tolist()[0][:3] == [8, 9, 10]
    assert part.slot_mapping.tolist() == part.positions.tolist() == list(range(101, 106))
    assert (part.num_reqs, part.num_actual_tokens, part.max_query_len) == (1, 5, 5)
