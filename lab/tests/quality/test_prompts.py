"""The questions: the same for a seed, balanced, and about what they say they are about."""

import random
from collections import Counter

import pytest
import torch
from starkv_lab.agent.questions import KINDS, Question, ask
from starkv_lab.agent.vocabulary import AGENT, END, TOKENS, USER
from starkv_lab.agent.world import Episode, Frame, sample_episode
from starkv_lab.quality.design import ASKINGS, COLUMNS, Design
from starkv_lab.quality.prompts import make_prompts, needed_cells

from starkv_compile import OptionError


def words(ids):
    return " ".join(TOKENS[i] for i in ids.tolist())


def test_a_design_is_balanced_and_large_enough():
    design = Design.of(2000)
    assert design.questions >= 2000
    counts = Counter(design.batches())
    assert len(counts) == len(design.frames) * len(KINDS)
    assert len(set(counts.values())) == 1
    for wrong in (
        {"questions": 0},
        {"questions": 1, "frames": (0,)},
        {"questions": 1, "frames": ()},
    ):
        with pytest.raises(OptionError):
            Design.of(**wrong)


def test_parts_of_the_questions_add_up():
    design = Design.of(1, frames=(1, 2))
    parts = design.slices()
    of_all = parts["all"]
    assert [of_all[:, [c == way for c in COLUMNS]].sum() for way in ASKINGS] == [design.prompts] * 3
    for way in ASKINGS:
        needs = [part for name, part in parts.items() if name.startswith(f"{way},")]
        assert (sum(needs) == parts[way]).all()
    # Of one frame everything is current; of two, a kind in four is.
    assert parts["again, current frame"].sum() == design.prompts * (1 / 2 + 1 / 2 / 4)
    assert parts["other, both frames"].sum() == design.prompts / 2


def test_same_seed_same_prompts():
    first, again = (make_prompts(Design.of(1, frames=(2,)), 3) for _ in range(2))
    other = make_prompts(Design.of(1, seed=1, frames=(2,)), 3)
    assert torch.equal(first.input_ids, again.input_ids)
    assert torch.equal(first.screens.pixel_values, again.screens.pixel_values)
    for one, two in zip(first.continuations, again.continuations, strict=True):
        assert torch.equal(one.ids, two.ids)
    assert not torch.equal(first.continuations[1].ids, other.continuations[1].ids)


def test_what_is_put_to_a_cache():
    design = Design.of(1, frames=(2,))
    for number, (_, kind) in enumerate(design.batches()):
        prompts = make_prompts(design, number)
        reply, again, *others = prompts.continuations
        for row, prompt in enumerate(prompts.input_ids):
            question = words(prompt).split("<|vision_end|> ")[-1]
            answer = words(reply.ids[row])
            assert question.startswith(f"{kind} ")
            assert words(again.ids[row]) == f"{END} {USER} {question} {answer}"
            assert len(answer.split()) == reply.judged + 1  # all but the full cache's own token
            assert words(again.ids[row, -again.judged :]) == answer
            for other_kind, other in zip(KINDS, others, strict=True):
                said = words(other.ids[row])
                assert said.startswith(f"{END} {USER} {other_kind} ")
                assert f" {question} " not in said
                told = said.split(f"{AGENT} ")[1]
                assert words(other.ids[row, -other.judged :]) == told


def test_what_a_question_needs():
    before = {("red", "star"): (1, 2), ("blue", "ring"): (3, 3)}
    after = {("red", "star"): (4, 4), ("green", "disc"): (2, 0)}
    episode = Episode(8, 12, (Frame(6, before), Frame(7, after)), 0)
    cases = {
        ("click step 7 red star", "click ( x=380 y=580 )"): {(1, (4, 4))},
        ("where step 6 red star", "at ( x=220 y=180 )"): {(0, (1, 2))},
        ("what step 6 x=300 y=420", "it is blue ring ."): {(0, (3, 3))},
        ("return step 6 x=220 y=180 step 7", "it is red star at ( x=380 y=580 )"): {
            (0, (1, 2)),
            (1, (4, 4)),
        },
    }
    for (text, answer), needed in cases.items():
        assert needed_cells(episode, Question("", 6, text, answer)) == needed


@pytest.mark.parametrize("kind", KINDS)
def test_every_question_needs_something(kind):
    rng = random.Random(kind)
    for _ in range(50):
        episode = sample_episode(rng, 3)
        needed = needed_cells(episode, ask(rng, episode, kind))
        assert len(needed) == (2 if kind == "return" else 1)


def test_what_is_asked_for_is_an_element():
    prompts = make_prompts(Design.of(1, frames=(2,)), 0)
    assert (prompts.is_element & prompts.is_asked).sum() == prompts.is_asked.sum() == 16
    assert prompts.is_element.sum(1).tolist() == [24] * 16
