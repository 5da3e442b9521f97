"""The agent's score: counted by frames and kind, held out, and 1 for a model that is right."""

from types import SimpleNamespace

import pytest
from starkv_lab.agent.checkpoints import load_agent
from starkv_lab.agent.questions import KINDS
from starkv_lab.agent.vocabulary import IMAGE, TOKEN_ID, TOKENS
from starkv_lab.training import evaluate as module
from torch.nn import functional as F

from starkv_compile import StarKVConfig, UnsupportedModel, report


class Oracle:
    """Says the next token of its input, or with `wrong` never does so for a noun."""

    config = SimpleNamespace(image_token_id=TOKEN_ID[IMAGE])

    def __init__(self, wrong=()):
        self.wrong = {TOKEN_ID[word] for word in wrong}

    def __call__(self, input_ids, **_):
        following = input_ids.roll(-1, 1)
        for token in self.wrong:
            following = following.masked_fill(following == token, 0)
        return SimpleNamespace(logits=F.one_hot(following, len(TOKENS)).float())


def test_a_model_that_is_always_right(monkeypatch):
    monkeypatch.setattr(module, "MAX_FRAMES", 2)
    score = module.evaluate(Oracle(), episodes=3, questions=8)
    assert {frames for frames, _ in score} == {1, 2}
    assert {kind for _, kind in score} <= set(KINDS)
    assert all(right == asked for right, asked in score.values())
    assert sum(asked for _, asked in score.values()) == 2 * 3 * 8


def test_one_wrong_token_costs_the_answer(monkeypatch):
    monkeypatch.setattr(module, "MAX_FRAMES", 1)
    score = module.evaluate(Oracle(wrong=["click"]), episodes=3, questions=12)
    assert score[1, "click"][0] == 0
    assert score[1, "where"][0] == score[1, "where"][1]


def test_the_shipped_agent_is_right():
    """Its bar: nine of ten held-out questions, up to five frames, full cache."""
    score = module.evaluate(load_agent()[0], episodes=8)
    right, asked = (sum(part) for part in zip(*score.values(), strict=True))
    assert asked == module.MAX_FRAMES * 8 * 10
    assert right / asked > 0.9
    of_five = [n for (frames, _), n in score.items() if frames == 5]
    assert sum(r for r, _ in of_five) / sum(n for _, n in of_five) > 0.8


@pytest.mark.slow
def test_sessions_are_scored_by_kind_and_leave_the_model_as_it_was():
    model, processor = load_agent()
    config = StarKVConfig(budget=1.0, inner="eager")
    score = module.evaluate_sessions(model, processor, config, sessions=2)
    asked = {key: n for key, (_, n) in score.items()}
    assert asked == {(i + 1, kind): 2 for i, kind in enumerate(KINDS)} | {(4, "follow-up"): 4}
    right = sum(r for r, _ in score.values())
    assert right >= 10, "the full cache answers nearly all of twelve"
    with pytest.raises(UnsupportedModel, match="was not compiled"):
        report(model)
